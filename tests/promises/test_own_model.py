"""A model in a file of the user's, taken from docs/your-own-model.md: every promise, and no code that a file names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests import fork_server, harness
from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, run, train, write_corpus
from unbroken.errors import UserError
from unbroken.model import families
from unbroken.model.gpt2lmhead import GPT2LMHead

PAGE = (harness.ROOT / "docs/your-own-model.md").read_text("utf-8")
BLOCKS = dict(re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE, re.S))
SETTINGS = {"run_id": RUN_ID, "num_iterations": 6, "save_every": 2, "dropout": 0.1, "optimizer": "muon"}


def tool(folder: Path, *typed: str) -> harness.Done:
    env = harness.environment({"PYTHONPATH": str(harness.ROOT)})
    command = [sys.executable, "-m", "unbroken", *typed]
    done = fork_server.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return harness.Done(done.returncode, done.stdout, done.stderr, 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of the page's model, whose file is in another folder."""
    folder = tmp_path_factory.mktemp("own")
    write_corpus(folder)
    (folder / "models").mkdir()
    for name, text in BLOCKS.items():
        (folder / "models" / name).write_text(text)
    train(folder, {**SETTINGS, "model": "models/my_llama.py:small"}, None)
    return folder


def test_the_page_is_short() -> None:
    assert len(BLOCKS["my_llama.py"].splitlines()) <= 80


def test_killed_and_resized(trained: Path, tmp_path: Path) -> None:
    """From the file in another place: a killed run goes on on 2 processes, by --resume_from auto."""
    write_corpus(tmp_path)
    (tmp_path / "my_llama.py").write_text(BLOCKS["my_llama.py"])
    typed = arguments({**SETTINGS, "model": "my_llama.py:small", "resume_from": "auto"})
    launch(tmp_path, typed, None, pace=0.1, hold=3).kill_at(3)
    done = launch(tmp_path, typed, 2).wait()
    assert done.code == 0 and "differ" not in done.text, done.text
    assert_same_bits(trained / f"logs/{RUN_ID}/final.pt", tmp_path / f"logs/{RUN_ID}/final.pt")
    assert log_lines(tmp_path) == log_lines(trained)


def test_a_checkpoint_names_the_file_and_never_runs_it(trained: Path) -> None:
    saved = torch.load(trained / f"logs/{RUN_ID}/final.pt", weights_only=True)
    assert saved["args"]["model"] == "my_llama.py:small"
    assert saved["sources"]["my_llama.py"] == BLOCKS["my_llama.py"]
    said = "error: model my_llama.py:small: its code is run only if you name the file: type --model FOLDER/my_llama.py:"
    for refused in (
        tool(trained, "sample", RUN_ID, "--tokenizer", "bytes"),
        tool(trained, "audit", RUN_ID),
    ):
        assert refused.code == 2 and refused.err.splitlines()[-1].startswith(said), refused.text
        assert "Traceback" not in refused.err
    saved["args"]["model"] = str(trained / "models/my_llama.py:small")
    torch.save(saved, trained / "evil.pt")
    refused = run(trained, "--resume_from", "evil.pt", "--num_iterations", "9")
    assert refused.code == 2 and "its code is run only if you name the file" in refused.err, refused.text


def test_the_tools_take_the_file(trained: Path) -> None:
    typed = ("--model", "models/my_llama.py:small")
    done = tool(trained, "export", RUN_ID, "out", "--tokenizer", "none", *typed)
    assert done.code == 2 and "has no architecture for my_llama.py:small" in done.err, done.text
    again = run(trained, "--config", f"logs/{RUN_ID}/config.yaml", "--num_iterations", "0")
    assert again.code == 0 and "model my_llama.py:small: 13," in again.out, again.text
    (trained / "models/my_llama.py").write_text(BLOCKS["my_llama.py"].replace("F.silu", "F.relu"))
    done = tool(trained, "sample", RUN_ID, "--tokenizer", "bytes", "--num_tokens", "1", *typed)
    assert done.code == 0 and "the model's source changed since the checkpoint (my_llama.py)" in done.err


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    llama, table = BLOCKS["my_llama.py"], "        self.register_buffer('table', torch.ones(2))\n"
    texts = {
        "llama.py": llama,
        "wrong.py": "1 / 0\n",
        "lacking.py": llama.replace("def blocks", "def others").replace("def initialize", "def fill"),
        "buffered.py": llama.replace("    def blocks", f"{table}\n    def blocks"),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for model, said in {
        "nowhere.py:small": "nowhere.py: there is no such file",
        "llama.py:huge": "its file has no LanguageModel of this size; the sizes are: small, base",
        "wrong.py:small": "the file cannot be imported: ZeroDivisionError: division by zero",
        "lacking.py:small": "lacking.py:small: its class has no blocks, initialize; docs/your-own-model.md says",
        "buffered.py:small": "Llama has a buffer table, which is not saved; compute it in forward",
    }.items():
        with pytest.raises(UserError, match=re.escape(said)):
            families.build(families.declare(str(tmp_path / model)))
    families._declared.clear()
    done = run(tmp_path, "--model", "wrong.py:small")
    assert done.code == 2 and "ZeroDivisionError" in done.err and done.err.count("\n") == 1, done.text


def test_another_size_of_gpt_2(trained: Path) -> None:
    name = families.declare(str(trained / "models/mine.py:shakespeare"))
    assert isinstance(families.huggingface_format(name), GPT2LMHead)
    model = families.build(name)
    shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    assert families.identify(shapes) == (name, {"bias": "on"}) and shapes["lm_head.weight"] == (65, 384)
    families._declared.clear()
    assert families.identify(shapes) == ("", {})
