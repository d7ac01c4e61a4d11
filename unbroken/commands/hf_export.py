"""`python -m unbroken export`: a checkpoint as a Hugging Face folder that unmodified transformers opens."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken import console
from unbroken.errors import UserError, describe_error
from unbroken.run import locate

if TYPE_CHECKING:
    from unbroken.checkpoint.reader import CheckpointFile


HELP = "write a checkpoint as a Hugging Face model"
MARK = "unbroken.json"  # tells an export of ours, which may be replaced, from anything else
END_OF_TEXT_NAME = "<|endoftext|>"


def configure(parser: argparse.ArgumentParser) -> None:
    """What, where to, and in which form."""
    parser.add_argument("what", metavar="FILE|RUN", help=locate.CHECKPOINT_HELP)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write; an earlier export is replaced")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument(
        "--tokenizer", choices=("auto", "bytes", "gpt2", "none"), default="auto", help="auto: by the checkpoint"
    )
    parser.add_argument("--force", action="store_true", help="replace whatever is in DIR")
    parser.add_argument("--push_to_hub", default="", metavar="OWNER/NAME", help="upload it to huggingface.co as well")
    parser.add_argument("--public", action="store_true", help="where that is a new repository, let everybody see it")


def run(args: argparse.Namespace) -> int:
    """Write beside the target, then take its place."""
    target = Path(os.path.realpath(args.folder)) if args.folder.is_symlink() else args.folder
    if target.name in ("", ".."):
        raise UserError(f"cannot write {target}: type the name of a folder, which is made")
    _may_replace(target, args.force)
    temporary, old = (target.with_name(f".{target.name}.{kind}{os.getpid()}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        _write(args.what, temporary, args.dtype, args.tokenizer)
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(temporary, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove(old)
    console.print_line(f"{target}: open it with transformers' AutoModelForCausalLM.from_pretrained({str(target)!r})")
    if args.push_to_hub:
        _push(target, args.push_to_hub, args.public)
    return 0


def _remove(path: Path) -> None:
    """The export before, or the file that --force replaces."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _may_replace(target: Path, force: bool) -> None:
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from None
    if taken and not force and not (target / MARK).is_file():
        raise UserError(f"{target} is there already and is no export of ours: choose another folder, or type --force")


def _write(what: str, folder: Path, dtype: str, tokenizer: str) -> None:
    import torch

    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("export needs safetensors: pip install safetensors tokenizers") from None
    from unbroken.data.tokenizers import END_OF_TEXT
    from unbroken.inference import context_length, load_model, trained_on_bytes
    from unbroken.model.huggingface import config_json, to_huggingface

    with locate.open_newest(what) as file:
        model, context = load_model(file), context_length(file.values)
        if tokenizer == "auto":
            tokenizer = "bytes" if trained_on_bytes(file.values, model) else "gpt2"
        about = _about(file)
    if tokenizer != "none":
        _write_tokenizer(folder, tokenizer == "bytes", context)
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    name = str(kind).removeprefix("torch.")
    weights = to_huggingface(dict(model.state_dict()), model.config, kind)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, in its own words
        raise OSError(describe_error(error)) from None
    _json(folder / "config.json", config_json(model.config, context, END_OF_TEXT, name))
    _json(
        folder / "generation_config.json",
        {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "do_sample": True, "temperature": 0.8},
    )
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors leaves it to its owner alone
    _json(folder / MARK, about)
    (folder / "README.md").write_text(_card(about, context, tokenizer), "utf-8")


def _about(file: CheckpointFile) -> dict[str, Any]:
    from unbroken.run import legacy
    from unbroken.text import printable

    def text(key: str) -> str:
        return printable(str(file.values.get(key, "")), 200)

    model = legacy.identify_model(file.values, str(file.path))
    return {"model": model, "step": text("step"), "run_id": text("run_id"), "file": printable(file.path.name, 200)}


def _card(about: dict[str, Any], context: int, tokenizer: str) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {about["model"]}, step {about["step"]}

A GPT-2 sized language model, pretrained with Unbroken (run {about["run_id"]}, checkpoint {about["file"]}) on sequences
of {context} tokens, tokenizer: {tokenizer}. It is the `arcee` architecture of transformers, without remote code:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

Every text that it was trained on begins with `<|endoftext|>`, which the tokenizer does not add by itself.

It has not been tuned to follow instructions or to be safe: it continues text as its training data would.
"""


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _write_tokenizer(folder: Path, of_bytes: bool, context: int) -> None:
    """`tokenizer.json`: GPT-2's, or one in which a byte is a token and its value the id."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise UserError("a tokenizer needs tokenizers: pip install tokenizers; or --tokenizer none") from None
    from unbroken.data.tokenizers import BPE_FILES, BPE_FOLDER, END_OF_TEXT, has_bpe

    if of_bytes:
        vocabulary = {letter: byte for byte, letter in _letters().items()}
        made = Tokenizer(models.BPE({**vocabulary, END_OF_TEXT_NAME: END_OF_TEXT}, []))
    elif has_bpe(BPE_FOLDER):
        made = Tokenizer(models.BPE.from_file(*(str(BPE_FOLDER / name) for name in BPE_FILES)))
    else:
        try:
            made = Tokenizer.from_pretrained("openai-community/gpt2")
        except Exception as error:  # whatever the hub's client raises
            raise UserError(
                f"GPT-2's tokenizer cannot be fetched ({describe_error(error)}): put OpenAI's {' and '.join(BPE_FILES)}"
                f" into {BPE_FOLDER}, or type --tokenizer none"
            ) from None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not of_bytes)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END_OF_TEXT_NAME])
    made.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_NAME)
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    _json(folder / "tokenizer_config.json", {**names, **more, "clean_up_tokenization_spaces": False})


def _letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: its own where it has a visible one, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


def _push(folder: Path, name: str, public: bool) -> None:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--push_to_hub needs huggingface_hub: pip install huggingface_hub") from None
    try:
        hub = HfApi()
        hub.create_repo(name, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from Unbroken")
    except Exception as error:  # whatever the client and the network raise
        raise UserError(
            f"--push_to_hub {name} failed ({describe_error(error)}); {folder} is whole: log in with `hf auth login` and"
            f" run `hf upload {name} {folder}`"
        ) from None
    console.print_line(f"https://huggingface.co/{name}")
