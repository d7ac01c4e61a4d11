"""Values of a checkpoint that nobody writes by mistake: each is taken, or refused in one line, without a traceback.

The tensors and the form of these files are as they should be; what is inside of that is a stranger's.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fork_server, harness
from tests.harness import OTHER_ID, ROOT, RUN_ID, SHORT, arguments, launch, trained, write_corpus
from tests.saving import whole_tree
from unbroken.checkpoint import writer
from unbroken.checkpoint.format import zip_index, zip_layout
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.metrics.logfile import LogFile, attempt_line, events, read_log

HUGE = 2**2000
EVIL = "a\x1b[2J\nWARNING: b\x07"

# What to put where, and the exit code: 0 where the value decides nothing.
VALUES: list[tuple[str, Any, int]] = [
    ("environment.world_size", 0, 0),
    ("environment.world_size", "many", 0),
    ("environment.world_size", 2**70, 0),
    ("environment.torch", EVIL, 0),
    ("environment.device", {EVIL: EVIL}, 0),
    ("environment.threads", -1, 2),
    ("sources", {f"{EVIL}.py": "x"}, 0),
    ("progress.history.digest", "\ud800", 0),
    ("progress.history.training_seconds", float("nan"), 0),
    ("progress.parent", {"x": 1}, 2),
    ("progress.parent", {"run_id": "a step=9", "step": 1, "file": "", "sha256": ""}, 2),
    ("progress.parent", {"run_id": RUN_ID, "step": HUGE, "file": "", "sha256": ""}, 2),
    ("progress.rewarm", {"step": HUGE, "learning_rate": 0.1, "steps": 5}, 2),
    ("progress.rewarm", {"step": 1, "learning_rate": 0.1, "steps": HUGE}, 2),
    ("progress.tokens", HUGE, 2),
    ("progress.validated", HUGE, 2),
    ("progress.split", 0, 2),
    ("progress.epoch", EVIL, 2),
    ("progress.next_batch", {"tokens": HUGE, "sha256": EVIL}, 2),
    ("data", {"tokens": HUGE, "shards": EVIL}, 2),
    ("data.validation", EVIL, 0),
    ("data", {"tokens": 1, "shards": [{"name": EVIL, "bytes": HUGE, "tokens": 1, "hash": "\ud800"}]}, 2),
    ("args.output_dir", "a\0b", 0),
    ("args.output_dir", "\ud800", 0),
    ("args.output_dir", "/proc/1", 0),
    ("args.input_bin", "a\0b", 2),
    ("args.input_bin", EVIL, 2),
    ("args.input_bin", "\ud800", 2),
    ("args.model", EVIL, 2),
    ("args.warmdown_iters", HUGE, 2),
    ("args.num_iterations", HUGE, 2),
    ("args.learning_rate", float("inf"), 2),
    ("args.elastic_ranks", 2**70, 2),
    ("args.total_batch_size", HUGE, 2),
    ("args.keep_last", HUGE, 2),
    ("args.batch_size", 10**7, 2),
    ("args.sequence_length", 10**7, 2),
    ("args.save_every", True, 2),
    ("rng.seed", EVIL, 0),
]

# One process for all of them: importing torch takes longer than refusing a file.
DRIVER = """
import contextlib, io, json, os, sys, traceback
import train_gpt2_mod
for name in sorted(os.listdir("hostile")):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = train_gpt2_mod.main(["--resume_from", f"hostile/{name}", *sys.argv[1:]])
        except BaseException:
            code = -1
            traceback.print_exc(file=said)
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 2 steps."""
    return trained(tmp_path_factory.mktemp("finished"), {**SHORT, "num_iterations": 2, "warmdown_iters": 0})


def changed(saved: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    made = {**saved, **{key: copy.deepcopy(saved[key]) for key in saved if key not in ("model", "optimizer")}}
    *folders, last = place.split(".")
    inside: Any = made
    for key in folders:
        inside = inside[key]
    inside[last] = value
    return made


def test_no_value_of_a_file_makes_a_traceback(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    saved = torch.load(tmp_path / f"logs/{RUN_ID}/final.pt", weights_only=True)
    (tmp_path / "hostile").mkdir()
    for index, (place, value, _) in enumerate(VALUES):
        torch.save(changed(saved, place, value), tmp_path / f"hostile/{index:03d}.pt")
    env = harness.environment({"PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-c", DRIVER, "--num_iterations", "3", "--allow_data_change"]
    done = fork_server.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(VALUES), done.stderr[-2000:]
    for (place, value, wanted), (code, said) in zip(VALUES, answers, strict=True):
        about = f"{place} = {value!r:.60}: exit code {code}\n{said}"
        assert code == wanted or (place == "data" and code == 0), about
        assert not [letter for letter in said if not letter.isprintable() and letter != "\n"], about
        assert "\nWARNING: b" not in said and len(said) < 20_000, about
        if code == 2:
            assert said.startswith("error: ") and said.count("\n") == 1, about
    log = (tmp_path / f"logs/{RUN_ID}/{RUN_ID}.log").read_text()
    assert "\x1b" not in log and log.isascii()


@pytest.mark.parametrize("counter", [float("nan"), float("inf"), -1.0, 0.5, 1e300, HUGE])
def test_the_earlier_programs_counter(finished: Path, tmp_path: Path, counter: float) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    saved = torch.load(tmp_path / f"logs/{RUN_ID}/final.pt", weights_only=True)
    saved["optimizer"]["state"][0]["step"] = counter
    old = {key: saved[key] for key in ("model", "optimizer", "step", "args")}
    torch.save(old, tmp_path / "old.pt")
    done = launch(tmp_path, ["--resume_from", "old.pt"], processes=None).wait()
    assert done.code == 2 and "step counter is" in done.err and done.err.count("\n") == 1, done.text


@pytest.mark.parametrize("kind", ["fifo", "sparse"])
def test_odd_files_in_another_run_s_folder_stop_nobody(tmp_path: Path, kind: str) -> None:
    """A FIFO would be waited for, a file of 8 GB would be read into memory."""
    write_corpus(tmp_path)
    other = tmp_path / "logs" / OTHER_ID
    other.mkdir(parents=True)
    for name in (".attempt", ".lock", "config.yaml", f"{OTHER_ID}.log", f"{OTHER_ID}.metrics.jsonl", "final.pt"):
        if kind == "fifo":
            os.mkfifo(other / name)
        else:
            (other / name).touch()
            os.truncate(other / name, 8 << 30)
    flags = arguments({"num_iterations": 2, "save_every": 0, "resume_from": "auto"})
    done = launch(tmp_path, flags, processes=1).wait()
    assert done.code == 0 and "step:2/2" in done.out, done.text
    environment = harness.environment({"PYTHONPATH": str(ROOT)})
    tool = fork_server.run([sys.executable, "-m", "unbroken", "ls"], cwd=tmp_path, env=environment, timeout=60)
    assert tool.returncode == 0


def test_a_shard_that_is_no_file_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    os.mkfifo(tmp_path / "data/train_999.bin")
    done = launch(tmp_path, arguments(), processes=None).wait()
    assert done.code == 2 and "train_999.bin: it is not a regular file" in done.err, done.text


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_a_path_cannot_pass_for_an_attempt_of_another_kind(tmp_path: Path) -> None:
    """Of another step, that is, or of another course: the log's words decide what is compared with what."""
    path = tmp_path / "a.log"
    written = attempt_line({"time": "now", "from": "my runs/step=7 course=other\ns:9 trn:1.000000", "step": "2"})
    path.write_text(f"{written}\ns:3 trn:4.000000\n")
    assert read_log(path).attempts == [(2, written[2:])]
    assert written.split()[2:] == ["from=my\\x20runs/step=7\\x20course=other\\ns:9\\x20trn:1.000000", "step=2"]
    log = LogFile(path, 2, course="")
    assert log.expected == {("trn", 3): "s:3 trn:4.000000"}
    log.close()


def test_what_a_full_disk_refused_is_written_before_a_checkpoint_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    log = LogFile(tmp_path / "a.log", 0)
    monkeypatch.setattr(os, "write", full)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            log.append(f"s:{step} trn:4.000000")
    with pytest.raises(OSError, match="No space"):
        log.sync()
    monkeypatch.undo()
    log.sync()
    assert [step for _, step, _ in events(tmp_path / "a.log")] == [1, 2]
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        log.append("s:3 trn:4.000000")
    assert log.close() == f"{tmp_path / 'a.log'} lost 1 line: No space left on device"


# ---- the container and its folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 100, zip_index.MAX_ENTRIES, zip_index.MAX_ENTRIES + 1])
def test_a_directory_larger_than_its_entries_can_be_is_not_read(tmp_path: Path, count: int) -> None:
    """A file of holes, whose end says that all before it is the zip's directory: no byte of that is to be read."""
    size = 4 << 30
    path = tmp_path / "model_step000001.pt"
    end64 = zip_layout.END64.pack(
        zip_layout.END64_MARK, zip_layout.END64.size - 12, 45, 45, 0, 0, count, count, size, 0
    )
    locator = zip_layout.LOCATOR.pack(zip_layout.LOCATOR_MARK, 0, size, 1)
    end = zip_layout.END.pack(zip_layout.END_MARK, 0, 0, 0xFFFF, 0xFFFF, zip_layout.LIMIT, zip_layout.LIMIT, 0)
    with open(path, "wb") as file:
        file.seek(size)
        file.write(end64 + locator + end)
    with pytest.raises(UserError, match="the zip's directory does not fit into the file"):
        CheckpointFile(path)


def test_a_name_is_given_up_on_the_disk_before_its_blocks_are_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut could leave the old name on half of a newer checkpoint."""
    did: list[str] = []
    recorded(monkeypatch, did, "rename", lambda source, target: f"{Path(source).name} > {Path(target).name}")
    sync = writer.files.sync_folder
    monkeypatch.setattr(writer.files, "sync_folder", lambda folder: (did.append("sync"), sync(folder))[1])
    with writer.RunCheckpointWriter(tmp_path, World.single(), keep_last=1) as saver:
        for step in (1, 2, 3):
            saver.save(whole_tree(step), step)
            saver.wait()
    spared = "model_step000001.pt > .spare.pt.tmp"
    if spared not in did or not any(step.startswith(".spare.pt.tmp >") for step in did):
        pytest.skip("this filesystem recycles nothing")
    assert did[did.index(spared) + 1] == "sync", did


def recorded(monkeypatch: pytest.MonkeyPatch, did: list[str], name: str, told: Callable[..., str]) -> None:
    real = getattr(os, name)

    def call(*given: Any, **more: Any) -> Any:
        did.append(told(*given))
        return real(*given, **more)

    monkeypatch.setattr(os, name, call)
