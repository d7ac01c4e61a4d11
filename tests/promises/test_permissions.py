"""A file or folder that may not be read or written: one line that names it, exit code 2, nothing changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import fork_server
from tests.harness import RUN_ID, SCRIPT, SHORT, Done, arguments, contents, environment, train, write_corpus
from unbroken.commands import COMMAND_NAMES

# Even as root: without the capabilities by which root reads and writes everything (capabilities(7)).
AS_OTHERS = """
import ctypes, runpy, sys
libc = ctypes.CDLL(None)
for capability in (1, 2):
    libc.prctl(24, capability, 0, 0, 0)  # what it starts has not got them either
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
for number in (0, 1):  # effective, permitted
    sets[number] &= ~0b110
assert libc.capset(header, sets) == 0
del sys.argv[0]
if sys.argv[0] == "-m":
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUN = f"logs/{RUN_ID}"
RESUMED = ["--resume_from", RUN_ID, "--num_iterations", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("permissions")
    write_corpus(folder)
    train(folder, SHORT, processes=None)
    for path in [*folder.glob(f"{RUN}/model_step*.pt"), folder / RUN / ".attempt"]:
        path.unlink(missing_ok=True)
    (folder / "flags.yaml").write_text("seed: 1\n")
    (folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 50)
    (folder / "ro").mkdir()
    return folder


def refused(folder: Path, typed: list[str]) -> Done:
    env = environment({"PYTHONPATH": str(SCRIPT.parent)})
    program = ["-m", "unbroken"] if typed[0] in COMMAND_NAMES else [str(SCRIPT)]
    command = [sys.executable, "-c", AS_OTHERS, *program, *typed]
    done = fork_server.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr, 0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize(
    ("path", "mode", "typed"),
    [
        ("flags.yaml", 0, [*arguments(SHORT), "--config", "flags.yaml"]),
        (f"{RUN}/{RUN_ID}.log", 0o444, RESUMED),
        (f"{RUN}/{RUN_ID}.metrics.jsonl", 0o444, RESUMED),
        (f"{RUN}/.lock", 0o444, RESUMED),
        (f"{RUN}/final.pt", 0, RESUMED),
        (f"{RUN}/final.pt", 0, [*arguments(SHORT), "--resume_from", "auto"]),
        (f"{RUN}/final.pt", 0, ["--resume_from", f"{RUN}/final.pt"]),
        (f"{RUN}/final.pt", 0, ["verify", f"{RUN}/final.pt"]),
        (f"{RUN}/final.pt", 0, ["show", RUN_ID]),
        (RUN, 0o555, RESUMED),
        (RUN, 0, RESUMED),
        ("logs", 0, [*arguments(SHORT), "--resume_from", "auto"]),
        ("logs", 0, ["ls"]),
        ("data/train_000.bin", 0, RESUMED),
        ("data", 0, RESUMED),
        ("data", 0o444, RESUMED),
        ("ro", 0o555, [*arguments({**SHORT, "run_id": None}), "--output_dir", "ro"]),
        ("ro", 0o555, ["export-log", RUN_ID, "--out", "ro/x.csv"]),
        ("ro", 0o555, ["export", RUN_ID, "ro/model"]),
        ("ro", 0o555, ["data", "text", "a.txt", "--tokenizer", "bytes", "--folder", "ro"]),
        ("a.txt", 0, ["data", "text", "a.txt", "--tokenizer", "bytes", "--folder", "mine"]),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else None,
)
def test_the_file_that_refused_is_named(run: Path, path: str, mode: int, typed: list[str]) -> None:
    before = contents(run)
    kept = os.stat(run / path).st_mode & 0o777
    os.chmod(run / path, mode)
    try:
        done = refused(run, typed)
    finally:
        os.chmod(run / path, kept)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and "Traceback" not in done.text, done.text
    named = path if typed[0] != "show" else Path(path).name
    assert named in (done.out if typed[0] == "verify" else errors[0]) and len(errors) <= 1, done.text
    assert {**contents(run), f"{RUN}/.lock": b""} == {**before, f"{RUN}/.lock": b""}, "it changed something"
