"""Elsewhere and back: transformers opens an export and computes the same; eval says what training said."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fork_server
from tests.harness import GPT2_BPE, ROOT, RUN_ID, Done, environment, launch, train, write_corpus
from unbroken.data.shards import VOCAB_OFFSET

SETTINGS = {"run_id": RUN_ID, "num_iterations": 12, "learning_rate": 3e-3, "val_loss_every": 12, "val_tokens": 640}
SETTINGS |= {"model": "d2"}  # with the vocabulary of GPT-2's tokenizer
SETTINGS |= {"dtype": "fp32"}  # in which `eval` computes: where the processor has bf16, `auto` would be that
HERE = environment({"PYTHONPATH": str(ROOT)})


def tool(folder: Path, *typed: str) -> Done:
    done = fork_server.run(
        [sys.executable, "-m", "unbroken", *typed], cwd=folder, env=HERE, capture_output=True, text=True
    )
    return Done(done.returncode, done.stdout, done.stderr, 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose folder the tests share; they write only beside it."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder)
    train(folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    done = tool(trained, "export", RUN_ID, "out", "--tokenizer", "bytes")
    assert done.code == 0, done.text
    return trained / "out"


def test_transformers_computes_the_same(trained: Path, exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import unbroken

    assert "vLLM needs `--model-impl transformers`" in (exported / "README.md").read_text()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(theirs).__name__ == "ArceeForCausalLM"
    ours, info = unbroken.load(str(trained / "logs" / RUN_ID))
    assert info["step"] == 12 and info["run_id"] == RUN_ID and info["args"]["model"] == "d2"
    tokens = torch.randint(0, 50257, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = ours.lm_head(ours.hidden(tokens))
        got = theirs(tokens).logits
    assert expected.std() > 0.1, "a model that says nothing would agree with anything"
    assert (got - expected).abs().max() <= 1e-4


def test_the_tokenizer_is_bytes(exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = "def f(x):\n    return 'ä€😀'  # 1\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("<|endoftext|>")["input_ids"] == [50256] == [tokenizer.eos_token_id]


def test_a_tokenizer_json_is_found_where_the_shards_are(tmp_path: Path) -> None:
    """Data, a training, and all that uses the tokenizer later, without the file that the user typed."""
    hf, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    made = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, **{f"w{number}": number for number in range(1, 50)}}, "[UNK]"))
    made.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text(
        "".join(f"w{number * number % 50 or 1} " for number in range(4000)) + "\nw1 " * 900
    )
    assert tool(tmp_path, "data", "text", "text.txt", "--tokenizer", "words.json", "--folder", "data").code == 0
    (tmp_path / "words.json").unlink()
    flags = {**SETTINGS, "input_bin": "data/text_train_*.bin", "input_val_bin": None, "num_iterations": 2}
    train(tmp_path, {**flags, "val_loss_every": 0, "val_tokens": None}, processes=None)
    sampled = tool(tmp_path, "sample", RUN_ID, "--prompt", "w7 w9", "--num_tokens", "5")
    assert sampled.code == 0 and set(sampled.out.removeprefix("w7 w9").strip()) <= set("w[UNK]0123456789"), sampled.text
    measured = tool(tmp_path, "eval", RUN_ID, "--input_bin", "data/text_val_*.bin", "--tokens", "64", "--json")
    assert json.loads(measured.out)["bits_per_byte"] > 1, measured.text
    assert tool(tmp_path, "export", RUN_ID, "out").code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w7 w9")["input_ids"] == [7, 9] and tokenizer.eos_token_id == 50
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 50
    # Shards with a larger vocabulary than the model's are refused before the first step, and a lost tokenizer is named.
    (tmp_path / "data/text.tokenizer.json").unlink()
    lost = tool(tmp_path, "sample", RUN_ID)
    assert lost.code == 2 and re.search(r"tokenizer words-\w{8} is unknown; type --tokenizer FILE\n$", lost.err), (
        lost.text
    )
    (path,) = tmp_path.glob("data/text_train_*.bin")
    content = bytearray(path.read_bytes())
    content[VOCAB_OFFSET : VOCAB_OFFSET + 4] = (60_000).to_bytes(4, "little")
    path.write_bytes(content)
    refused = train(tmp_path, {**flags, "run_id": None, "val_loss_every": 0, "val_tokens": None}, None, check=False)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "has a vocabulary of 60,000 tokens, the model one of 50,257; use a --model with" in refused.err


def test_the_tokenizer_is_gpt_2_s(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if not GPT2_BPE.is_dir():
        pytest.skip("GPT-2's vocabulary is not here")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gpt2_bpe").symlink_to(GPT2_BPE)
    done = tool(tmp_path, "export", str(trained / "logs" / RUN_ID), "out", "--tokenizer", "gpt2", "--dtype", "bf16")
    assert done.code == 0, done.text
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Hello world, it's 2026")["input_ids"] == [15496, 995, 11, 340, 338, 1160, 2075]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_there_and_back_to_a_new_run(trained: Path, exported: Path, tmp_path: Path) -> None:
    done = tool(tmp_path, "import", str(exported), "back.pt")
    assert done.code == 0, done.text
    before = torch.load(trained / "logs" / RUN_ID / "final.pt", weights_only=True)["model"]
    after = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert before.keys() == after.keys()
    for name, weight in before.items():  # a scale of sqrt(2 layers) and back may round
        assert torch.allclose(weight, after[name], rtol=1e-6, atol=0), name
    assert tool(tmp_path, "export", "back.pt", "again").code == 0
    for name in ("config.json", "tokenizer.json"):  # the length of the context and the tokenizer included
        assert (exported / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    write_corpus(tmp_path)
    begun = launch(tmp_path, ["--init_from", "back.pt", "--num_iterations", "1", "--model", "d2"], None).wait()
    assert begun.code == 0, begun.text
    assert tool(tmp_path, "import", str(exported), "back.pt").code == 2, "nothing is overwritten"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 64}, "describes none of the models"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2'"),
        ({"num_hidden_layers": "2" * 1000}, "describes none of the models"),
        ({"rope_theta": 5e5, "rope_parameters": None}, "rope_theta"),
        (None, "is not JSON"),
        ("weights", "is damaged"),
    ],
)
def test_what_is_not_such_a_model_is_one_line(exported: Path, tmp_path: Path, change: Any, said: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    if isinstance(change, dict):
        config = json.loads((tmp_path / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        (tmp_path / ("model.safetensors" if change else "config.json")).write_bytes(b"\xff" * 100)
    done = tool(tmp_path, "import", ".", "back.pt")
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert len(done.err.splitlines()) == 1 and not list(tmp_path.glob("*back*"))


def test_only_an_export_is_replaced(trained: Path, tmp_path: Path) -> None:
    run = str(trained / "logs" / RUN_ID)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("important")
    refused = tool(tmp_path, "export", run, "mine", "--tokenizer", "none")
    assert refused.code == 2 and "--force" in refused.err and (tmp_path / "mine/thesis.tex").exists()
    for _ in range(2):
        assert tool(tmp_path, "export", run, "out", "--tokenizer", "none").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_model_of_other_sources_is_named_in_one_line(trained: Path, tmp_path: Path) -> None:
    """An earlier release's for example; comments and docstrings may differ."""
    tree = torch.load(trained / "logs" / RUN_ID / "final.pt", weights_only=True)
    source = tree["sources"]["model/gpt.py"]
    for name, text in (("same", '"""Said anew."""  # new\n' + source), ("other", source.replace("F.gelu(", "F.relu("))):
        changed = {"sources": {**tree["sources"], "model/gpt.py": text}}
        changed["environment"] = {**tree["environment"], "git_commit": "abc+"}
        torch.save({**tree, **changed}, tmp_path / f"{name}.pt")
    typed = ("--tokenizer", "none")
    assert tool(tmp_path, "export", "same.pt", "out", *typed).err == ""
    said = "WARNING: other.pt: the model's source changed since the checkpoint (model/gpt.py), trained at commit abc+: "
    for command in (
        ("export", "other.pt", "another", *typed),
        ("export", "other.pt", "other.earlier", "--format", "earlier"),
        ("sample", "other.pt", "--num_tokens", "1", "--tokenizer", "bytes"),
    ):
        done = tool(tmp_path, *command)
        assert done.code == 0 and done.err.startswith(said) and done.err.count("WARNING") == 1, done.text
    exported = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "another")]
    assert exported[0] == exported[1]


def test_an_export_that_computes_something_else_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model trained with ReLU², by sources that its checkpoint holds as well: an Arcee of ours is a GELU."""
    pytest.importorskip("transformers")
    from unbroken.__main__ import main
    from unbroken.model import gpt

    monkeypatch.setattr(
        gpt.MLP, "forward", lambda self, x: self.c_proj(torch.nn.functional.relu(self.c_fc(x)).square())
    )
    checkpoint = str(trained / "logs" / RUN_ID / "final.pt")
    assert main(["export", checkpoint, str(tmp_path / "out"), "--tokenizer", "none"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ArceeForCausalLM of transformers computes other logits than this model (")
    assert not list(tmp_path.iterdir())


def test_eval_agrees_with_the_validation_of_training(trained: Path) -> None:
    log = (trained / "logs" / RUN_ID / f"{RUN_ID}.log").read_text()
    expected = float(re.findall(r"^s:12 val:(\S+)", log, re.M)[-1])
    typed = ["--sequence_length", "16", "--tokenizer", "bytes", "--json"]  # as many tokens as in training
    done = tool(trained, "eval", RUN_ID, *typed)
    assert done.code == 0, done.text
    found = json.loads(done.out)
    assert found["tokens"] == 640 and found["loss"] == pytest.approx(expected, abs=2e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))


def test_hellaswag_s_texts_are_those_of_lm_evaluation_harness(tmp_path: Path) -> None:
    """The expected ones are what its `hellaswag` task (0.4.13) makes of these lines."""
    from unbroken.commands.eval import questions

    fields = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he", "label": "1"}
    lines = [
        {**fields, "endings": ["falls.", " [step] gets up.  Then [x] sits."]},
        {**fields, "ctx_a": "How to. [title] Cut it. [step] Now", "ctx_b": "", "endings": ["a", "b"], "label": 0},
        {"ctx": "only this", "endings": ["a", "b"], "label": 0},
    ]
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    assert list(questions(path, 0)) == [
        ("Roof: A man sits. He", ["falls.", " gets up. Then sits."], 1),
        ("Roof: How to.. Cut it. Now", ["a", "b"], 0),
        ("only this", ["a", "b"], 0),
    ]


def test_hellaswag_is_scored_and_a_damaged_line_named(trained: Path, tmp_path: Path) -> None:
    """The tokens of the corpus are small numbers: as bytes they are an ending that the model knows."""
    from tests.harness import learnable

    likely = bytes(int(token) for token in learnable(12)).decode("latin1")
    asked = [
        {"ctx": "a", "endings": ["\x7f" * 12, likely], "label": 1},
        {"ctx": "b", "endings": ["x", "y"], "label": 0},
    ]
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in asked))
    typed = ["eval", str(trained / "logs" / RUN_ID), "--tokenizer", "bytes", "--json"]
    done = tool(tmp_path, *typed, "--hellaswag", str(path), "--limit", "1")
    assert done.code == 0, done.text
    found = json.loads(done.out)
    assert (found["questions"], found["acc"], found["acc_norm"]) == (1, 1.0, 1.0)
    path.write_text('{"ctx": "a", "endings": "b", "label": 0}\n')
    refused = tool(tmp_path, *typed, "--hellaswag", str(path))
    assert refused.code == 2 and "line 1: not a question" in refused.err and "Traceback" not in refused.err
