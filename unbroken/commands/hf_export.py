"""`python -m unbroken export`: write a checkpoint for transformers, for DCP, or for the earlier program."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import console
from unbroken.commands import BPE_HELP, add_model_file, atomic_output, dcp_folder
from unbroken.commands.dcp_folder import DCP
from unbroken.data.tokenizers import END_OF_TEXT, END_OF_TEXT_NAME, TOKENIZERS, Tokenizer, TokenizerNames, choose
from unbroken.errors import UserError, describe_error
from unbroken.model import families
from unbroken.run import locate
from unbroken.text import printable

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.model.huggingface import HuggingFaceFormat
    from unbroken.model.language_model import LanguageModel


HUGGING_FACE, EARLIER = "huggingface", "earlier"  # --format
TOLERANCE = 1e-3  # of the largest logit: a thousand times what the order of sums changes
MARK = "unbroken.json"  # a folder with this file is an export of ours and may be replaced


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the folder and the form of the weights."""
    parser.add_argument("what", metavar="FILE|RUN", help=locate.CHECKPOINT_HELP)
    parser.add_argument("target", type=Path, metavar="DIR", help="folder to write; an earlier export is replaced")
    parser.add_argument(
        "--format",
        choices=(HUGGING_FACE, DCP, EARLIER),
        default=HUGGING_FACE,
        help="dcp: weights and optimizer for torch.distributed.checkpoint; earlier: DIR is a .pt file that the guide's"
        " earlier program resumes from (default: huggingface)",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="dtype of the weights (default: fp32)")
    parser.add_argument(
        "--tokenizer",
        choices=TokenizerNames(("auto", *TOKENIZERS, "none")),
        help="auto: the checkpoint's own (default: auto)",
    )
    parser.add_argument("--bpe_dir", type=Path, metavar="DIR", help=BPE_HELP)
    add_model_file(parser)
    parser.add_argument("--force", action="store_true", help="replace whatever is in DIR")


def run(args: argparse.Namespace) -> int:
    """Write a temporary folder beside the target, then rename it; or the file."""
    if args.format == EARLIER:
        return _write_earlier(args)
    target = Path(os.path.realpath(args.target)) if args.target.is_symlink() else args.target
    if target.name in ("", ".."):
        raise UserError(f"cannot write {target}: type the name of a folder")
    _check_target(target, args.force)
    temporary, old = (target.with_name(f".{target.name}.{kind}{os.getpid()}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        if args.format == DCP:
            dcp_folder.write(args, temporary)
        else:
            _write(args, temporary)
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(temporary, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove(old)
    if args.format == DCP:
        console.print_line(
            f"{target}: load it with torch.distributed.checkpoint.load(state, checkpoint_id={str(target)!r})"
        )
        return 0
    console.print_line(f"{target}: open it with transformers' AutoModelForCausalLM.from_pretrained({str(target)!r})")
    return 0


def _write_earlier(args: argparse.Namespace) -> int:
    """Write a checkpoint for the earlier program. Raises UserError."""
    import torch

    from unbroken.inference import load_model
    from unbroken.run import legacy

    for name in ("dtype", "tokenizer", "bpe_dir"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} has no effect with --format {EARLIER}; leave it out")
    target: Path = args.target
    if target.is_dir() or (target.exists() and not args.force):
        raise UserError(f"{printable(target, 4096)} exists; type another name, or --force to replace a file")
    with locate.open_newest(args.what) as file:
        load_model(file)
        values, step = legacy.to_legacy(file), file.values["step"]

    def write(path: Path) -> None:
        try:
            torch.save(values, path)
        except RuntimeError as error:  # a full disk or a missing folder, in torch's own words
            raise OSError(f"{error}".splitlines()[0]) from None

    atomic_output.write_whole(target, write)
    console.print_line(f"{target}: step {step} for the earlier program, which keeps no position in the data")
    return 0


def _remove(path: Path) -> None:
    """Remove the earlier export, or the file that --force replaces."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_target(target: Path, force: bool) -> None:
    """Raise UserError if the target is anything but an export of ours, an empty folder or nothing, without --force."""
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from None
    if taken and not force and not (target / MARK).is_file():
        raise UserError(f"{target} exists and is no export of this program; choose another folder, or type --force")


def _write(args: argparse.Namespace, folder: Path) -> None:
    """Write all files of the export. Raises UserError for a mistake of the user's, OSError for the disk."""
    import torch

    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("export needs safetensors: pip install safetensors tokenizers") from None
    from unbroken.inference import context_length, find_tokenizer, load_model

    with locate.open_newest(args.what) as file:
        model = load_model(file)
        context = context_length(file.values, model)
        tokenizer = find_tokenizer(file.values, model) if args.tokenizer in (None, "auto") else args.tokenizer
        about = _about(file)
    stored = families.huggingface_format(about["model"])
    if stored is None:
        raise UserError(f"{file.path}: transformers has no architecture for {about['model']}")
    end, end_name = END_OF_TEXT, END_OF_TEXT_NAME
    if tokenizer != "none":
        end, end_name = _write_tokenizer(folder, *choose(tokenizer, args.bpe_dir), context)
    kind = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    config = stored.config_json(model.config, context, end, str(kind).removeprefix("torch."))
    _compare_with_transformers(model, stored, config)
    try:
        save_file(stored.export_model(model, kind), folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in safetensors' own words
        raise OSError(describe_error(error)) from None
    _json(folder / "config.json", config)
    _json(
        folder / "generation_config.json",
        {"bos_token_id": end, "eos_token_id": end, "do_sample": True, "temperature": 0.8},
    )
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read it
    _json(folder / MARK, {**about, "tokenizer": tokenizer} if tokenizer in TOKENIZERS else about)
    (folder / "README.md").write_text(_card(about, context, Path(tokenizer).name, end_name, stored), "utf-8")


def _compare_with_transformers(model: LanguageModel, stored: HuggingFaceFormat, config: dict[str, Any]) -> None:
    """Raise UserError if transformers computes other logits than the model; say so if it is not installed."""
    import torch

    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        console.print_line("not compared with what transformers computes: pip install transformers", error=True)
        return
    made = AutoConfig.for_model(**{key: value for key, value in config.items() if not key.endswith("dtype")})
    factory: Any = AutoModelForCausalLM
    theirs = factory.from_config(made).eval()
    theirs.load_state_dict(stored.export_model(model, torch.float32), strict=False)  # the tied head is not among them
    theirs.tie_weights()
    length = min(64, config["max_position_embeddings"])
    tokens = torch.randint(0, config["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, got = model(tokens)[0], theirs(tokens).logits[0, -1]
    apart = float((got - ours).abs().max() / ours.abs().max())
    if not apart <= TOLERANCE:
        raise UserError(
            f"{stored.architecture} of transformers computes other logits than this model ({apart:.1%} apart): "
            "change its export in unbroken/model/ with the model"
        )


def _about(file: CheckpointFile) -> dict[str, Any]:
    """Return what the export records about its checkpoint."""
    from unbroken.run import legacy

    def text(key: str) -> str:
        return printable(str(file.values.get(key, "")), 200)

    model, _ = legacy.identify_model(file.values, str(file.path))
    return {"model": model, "step": text("step"), "run_id": text("run_id"), "file": printable(file.path.name, 200)}


def _card(about: dict[str, Any], context: int, tokenizer: str, end_name: str, stored: HuggingFaceFormat) -> str:
    """Return the model card."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {about["model"]}, step {about["step"]}

A GPT-2 sized language model, pretrained with Unbroken (run {about["run_id"]}, checkpoint {about["file"]}) on sequences
of {context} tokens, tokenizer: {tokenizer}. In transformers it is a `{stored.architecture}`, without remote code.
{stored.limits}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

Every text that it was trained on begins with `{end_name}`, which the tokenizer does not add by itself.

It has not been tuned to follow instructions or to be safe: it continues text as its training data would.
"""


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _write_tokenizer(folder: Path, tokenizer: type[Tokenizer], place: Path | None, context: int) -> tuple[int, str]:
    """Write `tokenizer.json` and `tokenizer_config.json`; return the token at the end of a text, and its name.

    Raises UserError if the tokenizer cannot be made.
    """
    try:
        made, (end, end_name) = tokenizer.to_huggingface(place), tokenizer.end_of(place)
    except ImportError:
        raise UserError("a tokenizer needs tokenizers: pip install tokenizers; or --tokenizer none") from None
    made.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_name)
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    _json(folder / "tokenizer_config.json", {**names, **more, "clean_up_tokenization_spaces": False})
    return end, end_name
