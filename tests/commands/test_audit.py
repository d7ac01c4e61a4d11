"""The audit: a run is computed again and is the same, or what differs is named; the seal commits to every line."""

from __future__ import annotations

import json
import random
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.checkpoints import padding
from tests.harness import RUN_ID, TINY, contents, environment, train, write_corpus
from unbroken.__main__ import main
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.commands.audit import Leg, plan_legs
from unbroken.metrics.record import Start, read_record

JOURNAL = f"logs/{RUN_ID}/{RUN_ID}.metrics.jsonl"
LOG = f"logs/{RUN_ID}/{RUN_ID}.log"
SHORT = {"run_id": RUN_ID, "num_iterations": 8, "save_every": 4, "val_loss_every": 4, "keep_last": 1, "warmup_iters": 0}


def audit(folder: Path, *typed: str) -> tuple[int, dict[str, Any], str]:
    """The exit code, the verdict, and what is on stderr."""
    command = [sys.executable, "-m", "unbroken", "audit", RUN_ID[:6], "--json", *typed]
    env = environment({"PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    done = fork_server.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=800)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def saved_digests(folder: Path) -> dict[int, str]:
    return {step: line["tensors"] for step, line in read_record(folder / JOURNAL).digests.items()}


def test_a_run_of_4_processes_is_audited_on_1_and_2_and_only_read(place: Path) -> None:
    """Also where retention has removed the checkpoint; its digest is the same whatever the number of processes."""
    train(place, SHORT, processes=4)
    run = place / f"logs/{RUN_ID}"
    assert not (run / "model_step000004.pt").exists()
    before = contents(place)
    for path in (*run.iterdir(), run):
        path.chmod(path.stat().st_mode & ~0o222)
    for processes in ("1", "2"):
        code, verdict, said = audit(place, "--processes", processes)
        assert code == 0 and verdict["match"], (verdict, said)
        assert (verdict["first"], verdict["last"], verdict["losses"], verdict["saves"]) == (0, 8, 8, [4, 8])
    assert contents(place) == before
    run.chmod(0o755)
    assert len(saved_digests(place)) == 2


def test_flags_that_changed_on_the_way_are_those_of_the_replay(place: Path) -> None:
    """Another learning rate from step 4, an extension at step 8; a segment from a checkpoint alone."""
    train(place, {**SHORT, "keep_last": 0})
    again = {"resume_from": f"logs/{RUN_ID}/model_step000004.pt", "run_id": None, "num_iterations": 8}
    train(place, {**SHORT, **again, "learning_rate": 2e-3, "keep_last": 0})
    again |= {"resume_from": RUN_ID, "num_iterations": 10, "on_extend": "rewarm", "learning_rate": 2e-3, "keep_last": 0}
    train(place, {**SHORT, **again})
    code, verdict, said = audit(place)
    assert code == 0 and verdict["saves"] == [4, 8, 10], (verdict, said)
    code, verdict, said = audit(place, "--from", "5", "--to", "9")
    assert code == 0 and (verdict["first"], verdict["last"], verdict["losses"]) == (4, 8, 4), (verdict, said)


def test_a_run_that_left_batches_out(place: Path) -> None:
    """By hand from the start, and more of them from step 4 on."""
    train(place, {**SHORT, "keep_last": 0, "skip_batches": "2-3"}, processes=None)
    again = {"resume_from": f"logs/{RUN_ID}/model_step000004.pt", "run_id": None, "skip_batches": "8"}
    train(place, {**SHORT, **again, "keep_last": 0}, processes=None)
    assert [start.args["skip_batches"] for start in read_record(place / JOURNAL).starts] == ["2-3", "2-3,8"]
    code, verdict, said = audit(place)
    assert code == 0 and verdict["saves"] == [4, 8], (verdict, said)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder)
    train(folder, {**SHORT, "keep_last": 0}, processes=None)
    return folder


@pytest.fixture
def run_of_8(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (old, text.count(old))
    path.write_text(text.replace(old, new))


def test_what_differs_is_named_down_to_the_bit(run_of_8: Path) -> None:
    """A record of another learning rate: the first loss that it changed, the first tensor of the next save, its bit."""
    replaced(run_of_8 / JOURNAL, f'"learning_rate": {TINY["learning_rate"]}', '"learning_rate": 0.002')
    code, verdict, said = audit(run_of_8)
    assert code == 1 and not verdict["match"], said
    loss, digest, first = verdict["differences"]
    assert loss["step"] == 2 and "in the journal" in loss["said"] and loss["said"].endswith("computed")
    assert digest["step"] == 4 and digest["tensor"] == "model.transformer.wte.weight"
    assert first["step"] == 4 and first["tensor"] == "model.transformer.wte.weight"
    assert first["element"] == 0 and 0 <= first["bit"] < 32


def test_the_flipped_bit_of_a_checkpoint_is_named(run_of_8: Path) -> None:
    path = run_of_8 / f"logs/{RUN_ID}/model_step000004.pt"
    with CheckpointFile(path) as file:
        name, stored = [pair for pair in file.stored() if pair[0].endswith("exp_avg")][5]
        offset = file._entries[f"data/{stored.key}"].offset
    content = bytearray(path.read_bytes())
    content[offset + 4 * 7 + 2] ^= 1 << 3
    path.write_bytes(content)
    code, verdict, said = audit(run_of_8, "--to", "4")
    assert code == 1, said
    damage, bit = verdict["differences"]
    assert f"the checksum of {name} is wrong" in damage["said"]
    assert (bit["step"], bit["tensor"], bit["element"], bit["bit"]) == (4, name, 7, 16 + 3)


def places_of_padding(path: Path) -> set[int]:
    """Where the zeros are that align the tensors of a checkpoint."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return {place for entry in archive.infolist() for place in padding(content, entry)}


def test_200_single_bit_changes(run_of_8: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Of checkpoints, log and journal: each is found by `audit --seal HASH`, or is one that no reader looks at."""
    monkeypatch.chdir(run_of_8)
    assert main(["audit", RUN_ID, "--seal", "--json"]) == 0
    seal = json.loads(capsys.readouterr().out)["seal"]
    assert main(["audit", RUN_ID, "--seal", seal]) == 0
    chance = random.Random(16)
    paths = [JOURNAL, LOG, f"logs/{RUN_ID}/model_step000004.pt", f"logs/{RUN_ID}/model_step000008.pt"]
    (run_of_8 / f"logs/{RUN_ID}/final.pt").unlink()
    unread = {path: places_of_padding(run_of_8 / path) for path in paths if path.endswith(".pt")}
    for number in range(200):
        path = run_of_8 / paths[number % 4]
        with open(path, "r+b") as file:
            at = chance.randrange(path.stat().st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
        capsys.readouterr()
        code = main(["audit", RUN_ID, "--seal", seal, "--json"])
        out = capsys.readouterr().out
        if code == 0:
            assert at in unread.get(paths[number % 4], ()), (path, at)
            with CheckpointFile(path) as checkpoint:
                assert checkpoint.verify() == []
        elif path.suffix == ".pt":
            assert any(path.name in each["said"] for each in json.loads(out)["differences"]), out
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(bytes([byte]))


def test_a_seal_covers_what_was_before_it(run_of_8: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(run_of_8)
    assert main(["audit", RUN_ID, "--seal", "--json"]) == 0
    seal = json.loads(capsys.readouterr().out)["seal"]
    with open(JOURNAL, "a") as file:
        file.write('{"event": "stop", "step": 8, "wall": 1.0, "why": "added"}\n')
    assert main(["audit", RUN_ID, "--seal", seal]) == 0
    assert "under the seal" in capsys.readouterr().out
    lines = Path(JOURNAL).read_text().splitlines(keepends=True)
    Path(JOURNAL).write_text("".join([*lines[:3], *lines[4:]]))
    assert main(["audit", RUN_ID, "--seal", seal]) == 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["nothing"], "it is no run"),
        ([RUN_ID, "--seal", "abc"], "64 hexadecimal digits"),
        ([RUN_ID, "--from", "8"], "no save after step 8"),
        ([RUN_ID, "--to", "3"], "no save"),
        ([RUN_ID, "--processes", "-1"], "must not be negative"),
    ],
)
def test_wrong_use_is_one_line(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, typed: list[str], said: str
) -> None:
    monkeypatch.chdir(trained)
    assert main(["audit", *typed]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


def test_the_replay_saves_where_the_run_did_and_nowhere_else() -> None:
    start = Start(0, {"learning_rate": 1.0}, {})
    other = Start(30, {"learning_rate": 2.0}, {})
    assert plan_legs(0, [10, 20, 30], [start]) == [Leg(0, (10, 20, 30), start)]
    assert plan_legs(0, [10, 20, 30, 40, 50], [start, other]) == [Leg(0, (10, 20, 30), start), Leg(30, (40, 50), other)]
    assert [leg.stops for leg in plan_legs(0, [10, 20, 23, 30], [start])] == [(10, 20), (23,), (30,)]
    assert [leg.save_every for leg in plan_legs(0, [10, 20, 23, 30], [start])] == [10, 23, 30]
