"""W&B, against the real package offline: its own files are read back."""

from __future__ import annotations

import http.server
import importlib.util
import json
import struct
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import RUN_ID, arguments, launch, log_lines, train, write_corpus
from unbroken.config import Config
from unbroken.errors import UserError
from unbroken.metrics import trackers
from unbroken.metrics.timeline import was_tracked
from unbroken.paths import JOURNAL, Run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="there is no wandb here")

SETTINGS = {"run_id": RUN_ID, "num_iterations": 12, "grad_accumulation_steps": 1, "save_every": 4, "val_loss_every": 6}
SETTINGS["log_wandb"] = True


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, crc, length, type) after 7 bytes."""
    assert content.startswith(b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts = (b"" if kind in (1, 2) else parts) + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts


def recorded(folder: Path) -> list[dict[int, dict[str, float]]]:
    """For each attempt, oldest first: step -> metrics, in the order of W&B's own file; its id is the run's."""
    from wandb.proto import wandb_internal_pb2

    attempts = []  # a folder is named after the second; the second one in it gets "-1" at the end
    for path in sorted((folder / "wandb").glob(f"offline-run-*-{RUN_ID}*/run-{RUN_ID}.wandb")):
        steps: dict[int, dict[str, float]] = {}
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                assert record.run.run_id == RUN_ID
            if record.WhichOneof("record_type") == "history":
                values = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                step = int(values.get("_step", record.history.step.num))
                assert step not in steps, f"step {step} twice in {path}"
                steps[step] = {key: value for key, value in values.items() if not key.startswith("_")}
        assert list(steps) == sorted(steps), "out of order"
        attempts.append(steps)
    return attempts


def tensorboard_events(folder: Path, tag: str) -> list[tuple[int, float]]:
    """The values of a scalar in a folder's one event file: TFRecords of length, CRC, event, CRC."""
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + size])
        found += [(int(event.step), value.simple_value) for value in event.summary.value if value.tag == tag]
        at += 16 + size
    return found


def logged(folder: Path, kind: str) -> dict[int, float]:
    lines = [line for line in log_lines(folder) if f" {kind}:" in line]
    return {int(line.split()[0][2:]): float(line.rpartition(":")[2]) for line in lines}


def test_an_interrupted_run_is_one_run(tmp_path: Path) -> None:
    """Killed after step 7 and resumed from 4: each step once, repeated ones with the same value, none lost."""
    write_corpus(tmp_path)
    typed = arguments({**SETTINGS, "resume_from": "auto"})
    saved = tmp_path / "logs" / RUN_ID / "model_step000004.pt"

    def begun() -> list[Path]:
        """W&B's files; it starts beside the training."""
        return [path for path in tmp_path.glob("wandb/offline-run-*/*.wandb") if path.stat().st_size]

    running = launch(tmp_path, typed, processes=None, hold=7)
    running.kill_when(lambda: harness.last_step(tmp_path) == 7 and saved.exists() and bool(begun()))
    done = launch(tmp_path, typed, processes=None).wait()
    assert done.code == 0, done.text
    assert "WARNING: W&B" not in done.text, done.text
    first, second = recorded(tmp_path)
    together: dict[int, dict[str, float]] = {}
    for steps in (first, second):
        for step, metrics in steps.items():
            for key in ("train_loss", "val_loss", "lr"):
                if key in metrics:
                    assert together.setdefault(step, {}).get(key, metrics[key]) == metrics[key], (step, key)
                    together[step][key] = metrics[key]
    for kind, key in (("trn", "train_loss"), ("val", "val_loss")):
        found = {step: round(metrics[key], 6) for step, metrics in together.items() if key in metrics}
        assert found == pytest.approx(logged(tmp_path, kind), abs=1e-6)
    assert set(together) == set(range(13))


def test_a_tracker_that_fails_costs_no_step(tmp_path: Path) -> None:
    """A server that is not there: one warning at most, the whole run, and the same losses."""
    write_corpus(tmp_path)
    broken = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    broken |= {"WANDB_INIT_TIMEOUT": "5"}
    done = train(tmp_path, {**SETTINGS, "num_iterations": 3}, processes=None, env=broken)
    assert "step:3/3" in done.out
    assert (tmp_path / "logs" / RUN_ID / "final.pt").exists()
    assert done.text.count("WARNING: W&B is switched off") == 1, done.text


FAILING = f"""
import sys
sys.path.insert(0, {str(harness.ROOT)!r})
import psutil
import train_gpt2_mod
from unbroken.metrics import trackers

def failing(log, fail):
    def failing_log(self, step, metrics):
        if step == 3:
            fail()
        log(self, step, metrics)
    return failing_log

def full():
    raise OSError(28, "No space left on device")

def kill_core():
    cores = [each for each in psutil.Process().children(recursive=True) if each.name() == "wandb-core"]
    for core in cores:
        core.kill()
    psutil.wait_procs(cores)

trackers.TensorBoardTracker.log = failing(trackers.TensorBoardTracker.log, full)
trackers.WandbTracker.log = failing(trackers.WandbTracker.log, kill_core)
sys.exit(train_gpt2_mod.main(sys.argv[1:]))
"""


def test_a_tracker_that_fails_in_the_middle_gets_the_rest_at_the_end(tmp_path: Path) -> None:
    """TensorBoard's disk is full at step 3, and W&B's process is killed: in the end each has each step once."""
    write_corpus(tmp_path)
    (tmp_path / "failing.py").write_text(FAILING)
    flags = {**SETTINGS, "log_tensorboard": True, "num_iterations": 8}
    done = launch(tmp_path, arguments(flags), processes=None, script=tmp_path / "failing.py").wait()
    assert done.code == 0, done.text
    losses = logged(tmp_path, "trn")
    for title in ("TensorBoard", "W&B"):
        assert done.err.count(f"WARNING: {title} is switched off, training goes on: ") == 1, done.text
        assert f"{title} has every step now" in done.err, done.text
    assert [step for step, _ in tensorboard_events(tmp_path / "logs" / RUN_ID / "tensorboard", "train_loss")] == list(
        losses
    )
    found = {step: each["train_loss"] for step, each in recorded(tmp_path)[-1].items() if "train_loss" in each}
    assert found == pytest.approx(losses, abs=1e-6) and list(losses) == list(range(1, 9))


class DeletedRun(http.server.BaseHTTPRequestHandler):
    """A W&B server on which the run was deleted, as api.wandb.ai answers."""

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["content-length"])).decode("utf-8", "replace")
        code, answer = 200, {"data": {"viewer": {"id": "1", "entity": "me", "flags": "{}"}, "model": None}}
        if "upsertBucket" in text:
            said = {"message": "run me/unbroken/x was previously created and deleted; try a new run name"}
            code, answer = 409, {"errors": [said], "data": {"upsertBucket": None}}
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


def test_a_run_that_was_deleted_in_wandb_is_one_line(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), DeletedRun) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
        env |= {"WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3", "WANDB_PROJECT": "mine"}
        done = train(tmp_path, {**SETTINGS, "num_iterations": 3}, processes=None, env=env)
        server.shutdown()
    said = f"WARNING: W&B is switched off, training goes on: run {RUN_ID} was deleted in the project mine: restore it"
    assert said in done.text and "WARNING: W&B lacks steps that the journal has" in done.text, done.text
    assert "Traceback" not in done.text and "WANDB_PROJECT" in done.text


def test_the_end_of_a_run_waits_for_no_tracker_for_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    never = threading.Event()

    class Hanging:
        def __init__(self, *_: object) -> None: ...

        def log(self, step: int, metrics: object) -> None: ...

        def close(self) -> None:
            never.wait(60)

    assert trackers.FINISH_SECONDS <= 20 and trackers.INIT_SECONDS < trackers.FINISH_SECONDS
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1.5)
    tracker = trackers.ThreadedTracker(
        "log_wandb", trackers.Entry(Hanging, "wandb", "W&B"), Config(), Run(RUN_ID, ""), 0
    )
    began = time.monotonic()
    tracker.close(0)
    assert time.monotonic() - began < 10
    err = capsys.readouterr().err
    assert "waiting for W&B, at most 1.5s\n" in err and "it did not finish within 1.5s" in err
    never.set()


@pytest.mark.parametrize("flag", ["log_wandb", "log_trackio", "log_mlflow", "log_tensorboard"])
def test_a_tracker_that_is_not_installed_is_an_error(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--{flag} needs the package .*: pip install"):
        trackers.start_trackers(Config(**{flag: True}), Run(RUN_ID, ""), 0)
    assert trackers.start_trackers(Config(), Run(RUN_ID, ""), 0) == []


def test_without_the_package(tmp_path: Path) -> None:
    """One line before anything is trained."""
    write_corpus(tmp_path)
    (tmp_path / "hidden.py").write_text(
        "import importlib.util, runpy, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'wandb' else real(name, *more)\n"
        f"sys.argv[0] = {str(harness.SCRIPT)!r}\n"
        f"sys.path.insert(0, {str(harness.ROOT)!r})\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = launch(tmp_path, arguments(SETTINGS), processes=None, script=tmp_path / "hidden.py").wait()
    assert done.code == 2 and "pip install wandb" in done.err and not list(tmp_path.rglob("*.pt")), done.text


@pytest.mark.parametrize(
    ("typed", "own", "is_new", "name"),
    [
        ("", "", True, "gpt2-d2 691bd736"),
        ("", "base", True, "base"),
        ("mine", "base", True, None),
        ("", "base", False, None),
    ],
)
def test_only_the_first_attempt_names_the_run_in_wandb(
    monkeypatch: pytest.MonkeyPatch, typed: str, own: str, is_new: bool, name: str | None
) -> None:
    """W&B itself reads WANDB_NAME where it is given no name."""
    given: dict[str, Any] = {}
    run = types.SimpleNamespace(step=0, log=lambda *_, **__: None)
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **flags: given.update(flags) or run, run=None)
    )
    monkeypatch.setenv("WANDB_NAME", typed)
    trackers.WandbTracker(Config(model="d2", name=own), Run(RUN_ID, ""), {}, is_new)
    assert given["name"] == name and given["id"] == RUN_ID


def test_a_run_that_failed_is_no_second_start_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B gives an active run back, which counts the steps that its lost process never wrote."""
    run = types.SimpleNamespace(step=145, log=lambda *_, **__: None)

    def teardown() -> None:
        raise RuntimeError

    fake = types.SimpleNamespace(init=lambda **_: run, run=run, teardown=teardown)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(RuntimeError, match="does not start a second time"):
        trackers.WandbTracker(Config(), Run(RUN_ID, ""), {}, False)


def test_an_attempt_that_was_killed_before_its_first_save_has_named_the_run(tmp_path: Path) -> None:
    """The one after it begins at step 0 again, and must not undo a rename; what it writes itself is not looked at."""
    log = tmp_path / f"{RUN_ID}.log"
    lines = [{"event": "start", "step": 0, "args": {"log_wandb": on}} for on in (False, True)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    log.with_suffix(JOURNAL).write_text(text)
    assert was_tracked(log, "log_wandb", len(text))
    assert not was_tracked(log, "log_wandb", len(text) // 2)
    assert not was_tracked(log, "log_tensorboard", len(text))
    assert not was_tracked(tmp_path / "other.log", "log_wandb", 0)


def test_flags_say_where_wandb_puts_a_run_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group and tags only at first, because they may have been changed in W&B since."""
    run = types.SimpleNamespace(step=0, log=lambda *_, **__: None)
    config = Config(wandb_project="p", wandb_entity="me", wandb_group="g", wandb_tags="a, b,")

    def given(is_new: bool, **environment: str) -> dict[str, Any]:
        flags: dict[str, Any] = {}
        init = types.SimpleNamespace(init=lambda **typed: flags.update(typed) or run, run=None)
        with monkeypatch.context() as changed:
            changed.setitem(sys.modules, "wandb", init)
            for name in ("PROJECT", "ENTITY", "RUN_GROUP", "TAGS"):
                changed.delenv(f"WANDB_{name}", raising=False)
            for name, value in environment.items():
                changed.setenv(name, value)
            trackers.WandbTracker(config, Run(RUN_ID, ""), {}, is_new)
        return {name: value for name, value in flags.items() if name in ("project", "entity", "group", "tags")}

    assert given(True) == {"project": "p", "entity": "me", "group": "g", "tags": ["a", "b"]}
    assert given(False) == {"project": "p", "entity": "me"}
    theirs = {"WANDB_PROJECT": "q", "WANDB_ENTITY": "us", "WANDB_RUN_GROUP": "h", "WANDB_TAGS": "c"}
    assert given(True, **theirs) == {"project": "q", "entity": None, "group": None, "tags": None}
