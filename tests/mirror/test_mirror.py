"""A run in object storage: copied while it trains, gone on with on an empty machine, with what storages do in between.

Against moto's server, which speaks S3 over HTTP on this machine, and against file://.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    RUN_ID,
    arguments,
    assert_same_bits,
    command_line,
    launch,
    log_lines,
    train,
    trained,
    write_corpus,
)
from tests.storage import OFFLINE, S3, SECRETS, counted, manifest, overtaken, prepared, stored, tool, withdraw
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.mirror import download
from unbroken.mirror.store import RemoteCheckpoint, RemoteRun, Storage

CHANGES = {"run_id": RUN_ID, "num_iterations": 12, "grad_accumulation_steps": 2, "save_every": 3, "val_loss_every": 6}


@pytest.fixture
def s3() -> Iterator[S3]:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    server = S3()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted, nor copied."""
    return trained(tmp_path_factory.mktemp("unbroken"), CHANGES)


@pytest.fixture(scope="module")
def copied(unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m unbroken mirror` makes of it."""
    store = tmp_path_factory.mktemp("store")
    done = tool(unbroken, "mirror", RUN_ID, f"file://{store}")
    assert done.code == 0 and "5 checkpoints" in done.out, done.text
    return store


# ---- a real server ---------------------------------------------------------------------------------------------------


def test_an_empty_machine_goes_on_from_s3(unbroken: Path, tmp_path: Path, s3: S3) -> None:
    """Killed with its disk; the same command line on another machine ends with the same bits and the same log."""
    typed = arguments({**CHANGES, "mirror": s3.url, "resume_from": "auto"})
    first, second = tmp_path / "first", tmp_path / "second"
    prepared(first)
    running = launch(first, typed, processes=2, env=s3.env, hold=4)
    running.kill_when(lambda: "model_step000003.pt" in s3.counted())
    shutil.rmtree(first)

    run = prepared(second)
    done = launch(second, typed, env=s3.env).wait()
    assert done.code == 0 and "downloaded model_step00000" in done.text, done.text
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")
    assert log_lines(second) == log_lines(unbroken)
    for path in run.glob("*.pt"):
        assert s3.content(path.name) == path.read_bytes()


@pytest.mark.first
def test_a_dead_server_costs_no_step(tmp_path: Path, s3: S3) -> None:
    """Killed while copying and started again empty: training goes on meanwhile, in the end all is there once more."""
    run = prepared(tmp_path)
    changes = {**CHANGES, "num_iterations": 45, "val_loss_every": 0, "save_every": 15, "mirror": s3.url}
    # Without botocore's own retries, which may outlast the time that the server is away: then nobody notices.
    env = {**s3.env, "AWS_MAX_ATTEMPTS": "1"}
    running = launch(tmp_path, arguments(changes), processes=None, env=env, hold=16)
    running.until(lambda: s3.has_objects("model_step000015-"))
    s3.kill()
    running.release()
    said = running.follow("err", "WARNING: mirror")  # or it would be back before anybody has noticed
    running.until(lambda: (run / "final.pt").exists())
    assert running.process.poll() is None, "it waits for what is still to be copied"
    assert s3.start()
    done = running.wait()
    assert done.code == 0, done.text
    assert (said + done.err).count("WARNING: mirror") == 1 and "is back" in done.out, done.text
    files = {path.name for path in run.glob("*.pt")}
    assert len(files) == 4
    for name in files:
        assert s3.counted()[name].crc32 == zlib.crc32((run / name).read_bytes())
        assert s3.content(name) == (run / name).read_bytes()


def test_a_bucket_that_does_not_exist_is_said_before_training(tmp_path: Path, s3: S3) -> None:
    write_corpus(tmp_path)
    typed = arguments({**CHANGES, "mirror": "s3://forgotten/runs"})
    done = launch(tmp_path, typed, processes=None, env=s3.env).wait()
    assert done.code == 2 and "there is no bucket forgotten; create it first" in done.err, done.text
    assert done.err.count("\n") == 1 and not (tmp_path / "logs").exists()


def test_a_server_that_never_answers_holds_nothing_up(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1]
        env = {**SECRETS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        running = launch(tmp_path, arguments({**CHANGES, "mirror": "s3://there/runs"}), processes=None, env=env)
        running.until(lambda: (run / "final.pt").exists())
        running.kill()
        running.wait()


# ---- what is there, and what of it counts ----------------------------------------------------------------------------


def test_all_is_there_and_read_back(unbroken: Path, copied: Path) -> None:
    run = unbroken / "logs" / RUN_ID
    for name in (f"{RUN_ID}.log", f"{RUN_ID}.metrics.jsonl", "config.yaml"):
        assert (copied / RUN_ID / name).read_bytes() == (run / name).read_bytes(), name
    for path in run.glob("*.pt"):
        assert stored(copied, path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(copy.step for copy in counted(copied).values()) == [3, 6, 9, 12, 12]
    assert len(list((copied / RUN_ID).glob("*.pt"))) == 4, "both of step 12 are the same bytes"
    before = {path: path.stat().st_mtime_ns for path in (copied / RUN_ID).glob("*.pt")}
    assert tool(unbroken, "mirror", RUN_ID, f"file://{copied}").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (copied / RUN_ID).glob("*.pt")}, "copied once"


def torn(store: Path) -> None:
    stored(store, "final.pt").write_bytes(b"half")
    withdraw(store, "final.pt", "model_step000012.pt")


def flipped(store: Path) -> None:
    with open(stored(store, "final.pt"), "r+b") as file:
        file.seek(50_000)
        byte = file.read(1)[0]
        file.seek(50_000)
        file.write(bytes([byte ^ 1]))


def cut(store: Path) -> None:
    path = stored(store, "final.pt")
    path.write_bytes(path.read_bytes()[:-4096])


def lying(store: Path) -> None:
    path = store / RUN_ID / "manifest.json"
    value = json.loads(path.read_text())
    for entry in value["checkpoints"]:
        if entry["step"] == 12:
            entry.update({"step": 1e99, "size": -1, "tail": "x", "crc32": [], "time": "no"})
    path.write_text(json.dumps(value))


def swapped(store: Path) -> None:
    """Another step's object under this step's name."""
    path = store / RUN_ID / "manifest.json"
    value = json.loads(path.read_text())
    third = next(entry for entry in value["checkpoints"] if entry["step"] == 3)
    for entry in value["checkpoints"]:
        if entry["step"] == 12:
            entry.update({**third, "step": 12, "name": entry["name"]})
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("damage", [torn, flipped, cut, lying, swapped])
def test_what_is_not_whole_is_passed_over(
    copied: Path, tmp_path: Path, unbroken: Path, damage: Callable[[Path], None]
) -> None:
    """The next one is brought, it leads to the same bits, and the mirror is mended on the way."""
    store = tmp_path / "store"
    shutil.copytree(copied, store)
    damage(store)
    machine = tmp_path / "machine"
    run = prepared(machine)
    typed = ["--resume_from", f"file://{store}/latest", "--mirror", f"file://{store}"]
    done = launch(machine, typed, processes=None).wait()
    assert done.code == 0 and "downloaded model_step000009.pt" in done.text, done.text
    assert ("passing over" in done.text) == (damage in (flipped, cut, swapped)), done.text
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")
    assert log_lines(machine) == log_lines(unbroken)
    assert stored(store, "final.pt").read_bytes() == (run / "final.pt").read_bytes()
    assert counted(store)["final.pt"].crc32 == zlib.crc32((run / "final.pt").read_bytes())


def test_strangers_names_are_not_followed(copied: Path, tmp_path: Path) -> None:
    """A manifest may be a stranger's: only names of ours count, and they stay inside."""
    store = tmp_path / "store"
    shutil.copytree(copied, store)
    path = store / RUN_ID / "manifest.json"
    value = json.loads(path.read_text())
    good = value["checkpoints"][0]
    for name in ("..\x1b[31m.pt", "model_step3.pt", "other.pt", "model_step000099.pt", "../model_step000003.pt"):
        value["checkpoints"] += [{**good, "name": name}, {**good, "object": f"../{name}"}]
    path.write_text(json.dumps(value))
    (store / "not-a-run").mkdir()
    assert Storage(f"file://{store}").runs() == [RUN_ID]
    assert manifest(store) == manifest(copied)


def test_a_storage_of_an_older_version(copied: Path, unbroken: Path, tmp_path: Path) -> None:
    """It has no manifest but a .json beside each copy. It is resumed from, and goes on with a manifest."""
    store = tmp_path / "store"
    shutil.copytree(copied, store)
    for name, copy in counted(copied).items():
        if copy.step < 12:
            (store / RUN_ID / copy.object).rename(store / RUN_ID / name)
            said = {key: getattr(copy, key) for key in ("step", "size", "tail", "crc32", "time")}
            (store / RUN_ID / f"{name}.json").write_text(json.dumps(said))
    (store / RUN_ID / "manifest.json").unlink()
    machine = tmp_path / "machine"
    run = prepared(machine)
    typed = ["--resume_from", "auto", "--mirror", f"file://{store}"]
    done = launch(machine, typed, processes=None).wait()
    assert done.code == 0 and "downloaded model_step000009.pt" in done.text, done.text
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")
    assert {*counted(store)} == {*counted(copied)}
    assert stored(store, "model_step000003.pt").name == "model_step000003.pt", "copied once"


def test_a_damaged_manifest_is_one_line(copied: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(copied, store)
    (store / RUN_ID / "manifest.json").write_text("{")
    prepared(tmp_path)
    done = launch(tmp_path, ["--resume_from", f"file://{store}/{RUN_ID}"], processes=None).wait()
    assert done.code == 2 and "manifest.json is damaged" in done.err and done.err.count("\n") == 1, done.text


def test_retention_and_going_back(unbroken: Path, tmp_path: Path) -> None:
    """The mirror keeps what the folder keeps; what an attempt overtakes is set aside there as it is here."""
    run, store = prepared(tmp_path), tmp_path / "store"
    shutil.copytree(unbroken / "logs" / RUN_ID, run)
    url = f"file://{store}"
    assert tool(tmp_path, "mirror", RUN_ID, url).code == 0
    typed = ["--resume_from", f"logs/{RUN_ID}/model_step000006.pt", "--learning_rate", "5e-4", "--keep_last", "1"]
    ended = launch(tmp_path, [*typed, "--mirror", url], processes=None).wait()
    assert ended.code == 0, ended.text
    assert overtaken(store) == {"model_step000009.pt", "model_step000012.pt", "final.pt"}
    assert {*counted(store)} == {"model_step000012.pt", "final.pt"}
    assert stored(store, "final.pt").read_bytes() == (run / "final.pt").read_bytes()


def test_the_newer_of_both_is_taken(copied: Path, unbroken: Path, tmp_path: Path) -> None:
    """A disk that is ahead of its mirror is not set back, an older disk is not trained from."""
    for name, older in (("model_step000003.pt", "model_step000003.pt"), ("final.pt", "")):
        machine = tmp_path / name
        run = prepared(machine)
        run.mkdir(parents=True)
        shutil.copy(unbroken / "logs" / RUN_ID / name, run)
        typed = ["--resume_from", "auto", "--mirror", f"file://{copied}"]
        done = launch(machine, typed, processes=None).wait()
        assert done.code == 0 and "nothing to do" in done.text, done.text
        assert {path.name for path in run.glob("*.pt")} == {"final.pt", older} - {""}


def test_a_damaged_copy_does_not_set_a_disk_back(copied: Path, unbroken: Path, tmp_path: Path) -> None:
    """The storage's newest is damaged, what it has besides is older than what is here: go on with what is here."""
    store, machine = tmp_path / "store", tmp_path / "machine"
    shutil.copytree(copied, store)
    flipped(store)
    run = prepared(machine)
    shutil.copytree(unbroken / "logs" / RUN_ID, run, ignore=shutil.ignore_patterns("final.pt", "*012.pt"))
    done = launch(machine, ["--resume_from", "latest", "--mirror", f"file://{store}"], processes=None).wait()
    assert done.code == 0 and "continuing with the local files" in done.err, done.text
    assert "model_step000009.pt at step 9" in done.out and "overtaken, kept in logs" not in done.out, done.text
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")


def test_an_exact_copy_does_not_write_over_another_file(copied: Path, unbroken: Path, tmp_path: Path) -> None:
    run = prepared(tmp_path)
    train(tmp_path, {**CHANGES, "num_iterations": 6, "seed": 3}, processes=None)
    mine = (run / "model_step000003.pt").read_bytes()
    url = f"file://{copied}/{RUN_ID}/model_step000003.pt"
    done = launch(tmp_path, ["--resume_from", url, "--output_dir", "other"], processes=None).wait()
    assert done.code == 0 and "differs from the storage's copy, kept in" in done.out, done.text
    assert (run / "overtaken-1/model_step000003.pt").read_bytes() == mine
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")


@pytest.mark.parametrize("failures", [2, 99])
@pytest.mark.parametrize("here", [False, True])
def test_a_storage_that_stutters_is_asked_again(
    copied: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, here: bool
) -> None:
    """A timeout is no damage: it never makes an older copy the newest."""
    run, asked, fetch = prepared(tmp_path), [], RemoteRun.fetch
    if here:
        run.mkdir(parents=True)
        shutil.copy(unbroken / "logs" / RUN_ID / "model_step000003.pt", run)

    def stuttering(self: RemoteRun, copy: RemoteCheckpoint, *more: Any) -> None:
        asked.append(copy.name)
        if len(asked) <= failures:
            raise TimeoutError("it took too long")
        fetch(self, copy, *more)

    monkeypatch.setattr(RemoteRun, "fetch", stuttering)
    monkeypatch.setattr(download, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.chdir(tmp_path)
    typed = {"resume_from": "latest", "mirror": f"file://{copied}"}
    if failures == 99 and not here:
        with pytest.raises(UserError, match=r"no checkpoint could be downloaded .*took too long"):
            download.fetch_if_newer(typed, [], World.single())
    else:
        assert download.fetch_if_newer(typed, [], World.single())[0]["resume_from"] == RUN_ID
    assert asked == ["final.pt"] * (download.TRIES if failures == 99 else failures + 1)


def test_without_a_network_it_goes_on_with_what_is_here(unbroken: Path, tmp_path: Path) -> None:
    run = prepared(tmp_path)
    run.mkdir(parents=True)
    shutil.copy(unbroken / "logs" / RUN_ID / "model_step000003.pt", run)
    typed = ["--resume_from", "latest", "--mirror", "s3://there/x"]
    running = launch(tmp_path, typed, processes=None, env=OFFLINE)
    said = running.follow("err", "WARNING: mirror s3://there/x")
    running.until(lambda: (run / "final.pt").exists())
    running.kill()
    running.wait()
    assert "continuing with the local files" in said
    assert_same_bits(unbroken / "logs" / RUN_ID / "final.pt", run / "final.pt")


# ---- slips and strangers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--resume_from", f"s3://there/{RUN_ID}/final.pt"], "cannot look for checkpoints in s3://there: "),
        (["--mirror", "/a/path"], "/a/path is no storage"),
        (["--mirror", "ftp://a/b"], "ftp://a/b is no storage"),
        (["--mirror", "s3://key:secret@bucket/x"], "the URL contains a secret"),
        (["--mirror", "az://bucket/x"], "az:// needs the package adlfs: pip install adlfs"),
        (["--resume_from", "file:///nowhere/x.pt"], "must end in /latest"),
        (["--resume_from", "file:///nowhere/latest"], "there is no whole checkpoint in file:///nowhere"),
        (["--resume_from", f"file:///nowhere/{RUN_ID}"], f"there is no whole checkpoint in file:///nowhere/{RUN_ID}"),
        (["--resume_from", f"file:///nowhere/{RUN_ID}/final.pt"], "there is no whole checkpoint in file:///nowhere"),
    ],
)
def test_a_slip_is_one_line(tmp_path: Path, typed: list[str], says: str) -> None:
    write_corpus(tmp_path)
    done = launch(tmp_path, typed, processes=None, env=OFFLINE).wait()
    assert done.code == (1 if "cannot look" in says else 2), done.text  # a network may be back at the next attempt
    assert done.err.startswith("error: ") and says in done.err, done.text
    assert done.err.count("\n") == 1 and not (tmp_path / "logs").exists()


def test_an_unreachable_storage_begins_no_new_run(tmp_path: Path) -> None:
    """`auto` on an empty machine: a fresh run because the network is down would be the wrong one."""
    write_corpus(tmp_path)
    typed = arguments({"resume_from": "auto", "mirror": "s3://there/runs"})
    done = launch(tmp_path, typed, processes=None, env=OFFLINE).wait()
    assert done.code == 1 and "cannot look for checkpoints in s3://there/runs" in done.err, done.text
    assert not (tmp_path / "logs").exists()


def test_a_checkpoint_does_not_say_where_it_is_sent(copied: Path, tmp_path: Path) -> None:
    """Who resumes a stranger's checkpoint does not send his weights to the stranger's bucket."""
    machine, store = tmp_path / "machine", tmp_path / "store"
    run = prepared(machine)
    train(machine, {**CHANGES, "num_iterations": 3, "mirror": f"file://{store}"}, processes=None)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    done = launch(machine, ["--resume_from", str(run / "final.pt"), "--num_iterations", "6"], processes=None).wait()
    assert done.code == 0 and "mirror" not in done.text, done.text
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*")}


def test_nothing_is_left_running(tmp_path: Path) -> None:
    """SIGKILL for the training alone: the process that copies leaves by itself."""
    prepared(tmp_path)
    changes = {**CHANGES, "num_iterations": 500, "mirror": f"file://{tmp_path}/store"}
    running = launch(tmp_path, arguments(changes), processes=None, hold=4)
    running.until(lambda: bool(counted(tmp_path / "store")))
    (copier,) = running.workers()[:1]
    running.process.kill()
    running.wait()
    for _ in range(600):
        if not command_line(copier):
            return
        time.sleep(0.1)
    raise AssertionError("the copying process is still there")
