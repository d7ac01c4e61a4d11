"""The log of a run whose interruptions left it torn, lost, or ahead of the checkpoint: each event once, none wrong."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

from tests import harness
from tests.harness import RUN_ID, arguments, launch, log_lines, run, write_corpus
from unbroken.commands import export_log
from unbroken.errors import UserError
from unbroken.metrics import record
from unbroken.metrics.append_file import AppendFile
from unbroken.metrics.logfile import LogFile, read_log
from unbroken.metrics.timeline import read_status, read_timeline, was_tracked
from unbroken.paths import journal_of


def test_a_line_torn_by_a_kill_is_no_loss(folder: Path) -> None:
    log = harness.log_path(folder)
    whole = log.read_text()
    log.write_text(whole[: whole.index("s:7 trn:") + len("s:7 trn:1.2")])
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000005.pt")
    assert done.code == 0 and "DIFFERS" not in done.text and "step 6 repeated: identical" in done.text, done.text
    assert log_lines(folder) == [line for line in whole.splitlines() if line[:2] == "s:"]


def test_a_lost_log_is_said(folder: Path) -> None:
    typed = ["--resume_from", f"logs/{RUN_ID}/final.pt", "--num_iterations"]
    done = run(folder, *typed, "11", "--output_dir", "elsewhere")
    assert done.code == 0, done.text
    assert f"WARNING: elsewhere/{RUN_ID}.log lacks the losses from step 1 to 10: the log was lost, or" in done.text
    done = run(folder, "--resume_from", RUN_ID, "--num_iterations", "12", "--output_dir", "elsewhere")
    assert done.code == 0 and "lacks the losses" not in done.text, done.text


def test_a_gap_anywhere_is_closed_from_the_journal_or_said(folder: Path) -> None:
    log, whole = harness.log_path(folder), log_lines(folder)
    kept = [line for line in log.read_text().splitlines() if not line.startswith(("s:2 ", "s:3 ", "s:5 "))]
    log.write_text("\n".join(kept) + "\n")
    back = ["--resume_from", f"logs/{RUN_ID}/model_step000005.pt"]
    done = run(folder, *back)
    assert done.code == 0 and "lacks the losses" not in done.text, done.text
    assert sorted(log_lines(folder)) == sorted(whole)
    log.write_text("\n".join(kept) + "\n")
    journal_of(log).unlink()
    done = run(folder, *back)
    assert done.code == 0 and "lacks the losses from step 2 to 3, 5: the log was lost" in done.text, done.text


@pytest.mark.parametrize("deed", ["removed", "renamed", "rotated", "replaced", "cut"])
def test_what_becomes_of_the_log_meanwhile_is_no_loss(place: Path, deed: str) -> None:
    """By another hand, or logrotate's: at the next save the log has every line again, and the run says so."""
    flags = arguments({"run_id": RUN_ID, "num_iterations": 12, "save_every": 10})
    running = launch(place, flags, processes=None, hold=3)
    running.until(lambda: harness.last_step(place) >= 3)
    log = harness.log_path(place)
    for path in (log, journal_of(log)) if deed != "cut" else (log,):
        before = path.read_bytes()
        if deed == "cut":
            os.truncate(path, 0)
        elif deed == "removed":
            path.unlink()
        else:
            path.rename(path.with_suffix(".1"))
        if deed in ("rotated", "replaced"):
            path.write_bytes(before if deed == "replaced" else b"")
    running.release()
    done = running.wait()
    assert done.code == 0 and "by another process" in done.text and "Traceback" not in done.text, done.text
    assert sorted(line.split()[0] for line in log_lines(place) if "trn" in line) == sorted(
        f"s:{n}" for n in range(1, 13)
    )
    lines = [json.loads(line) for line in journal_of(log).read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 13))


def test_a_link_is_followed_only_to_a_log(folder: Path) -> None:
    log = harness.log_path(folder)
    (folder / "mine").write_text("# mine\n")
    log.unlink()
    log.symlink_to(folder / "mine")
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000005.pt")
    assert done.code == 2 and f"{RUN_ID}.log: it is a link to a file that is no log" in done.err, done.text
    assert (folder / "mine").read_text() == "# mine\n"


def test_an_extension_killed_before_its_first_save(folder: Path, tmp_path: Path) -> None:
    """Another end is another schedule, so nothing is promised of repeated steps; those that are the same stay once."""
    shutil.copytree(folder, tmp_path / "killed", symlinks=True)
    typed = ["--resume_from", f"logs/{RUN_ID}/final.pt", "--num_iterations", "14"]
    assert run(folder, *typed).code == 0
    said = harness.log_path(folder).read_text()
    harness.log_path(tmp_path / "killed").write_text(said[: said.index("s:13 trn:")])
    done = run(tmp_path / "killed", *typed)
    assert done.code == 0, done.text
    assert log_lines(tmp_path / "killed") == log_lines(folder)
    harness.log_path(tmp_path / "killed").write_text(said.replace("s:11 trn:", "s:11 trn:1"))
    shutil.copy(folder / f"logs/{RUN_ID}/model_step000010.pt", tmp_path / "killed/ten.pt")
    done = run(tmp_path / "killed", "--resume_from", "ten.pt", "--num_iterations", "14")
    assert done.code == 0 and "DIFFERS" not in done.text, done.text
    again = log_lines(tmp_path / "killed")[14:]
    assert [line.split()[0] for line in again] == ["s:11", "s:12", "s:13", "s:14"], "all from the first that differs"


def test_what_was_tried_with_other_flags_is_no_measure(folder: Path) -> None:
    """Another learning rate, regretted before its first save: the way back must not be told that it DIFFERS."""
    log, before = harness.log_path(folder), log_lines(folder)
    back = ["--resume_from", f"logs/{RUN_ID}/model_step000005.pt"]
    tried = run(folder, *back, "--learning_rate", "0.01")
    assert tried.code == 0 and "DIFFERS" not in tried.text and " course=" in log.read_text(), tried.text
    assert log_lines(folder)[:11] == before + [line for line in log_lines(folder) if line.startswith("s:7 ")][1:]
    done = run(folder, *back)
    assert done.code == 0 and "DIFFERS" not in done.text, done.text
    assert log_lines(folder)[-4:] == before[-4:], "what is said last is the run as it is"


def test_a_kill_after_going_back_is_measured_by_its_own_course(folder: Path) -> None:
    """The abandoned course has lines of the same steps and of later ones; none of them counts."""
    log, kept = harness.log_path(folder), folder / f"logs/{RUN_ID}"
    back = ["--resume_from", f"logs/{RUN_ID}/model_step000005.pt", "--learning_rate", "0.01", "--save_every", "6"]
    assert run(folder, *back).code == 0
    said, lines = log.read_text(), log_lines(folder)
    log.write_text(said[: said.rindex("s:9 trn:")])
    (kept / "final.pt").unlink()
    done = run(folder, "--resume_from", RUN_ID, "--learning_rate", "0.01", "--on_divergence", "stop")
    assert done.code == 0 and "steps 7-8 repeated: identical" in done.text, done.text
    assert log_lines(folder) == lines


def test_lines_of_another_course_never_count(tmp_path: Path) -> None:
    """Those of an earlier program, before any header, and those of logs in which a course had no name."""
    path = tmp_path / "a.log"
    path.write_text("s:2 trn:1.000000\ns:3 trn:1.000000\n# step=1 course=aaaaaaaa\ns:2 trn:2.000000\n")
    for course, expected in (("aaaaaaaa", {2: "2.0"}), ("", {2: "1.0", 3: "1.0"}), ("bbbbbbbb", {}), (None, {})):
        log = LogFile(path, 1, course)
        log.close()
        assert {step: line[8:11] for (_, step), line in log.expected.items()} == expected
        assert log.later == {("trn", 2): "s:2 trn:2.000000", ("trn", 3): "s:3 trn:1.000000"}
    path.write_text(path.read_text().replace("aaaaaaaa", "other"))
    for start, expected in ((1, {2: "1.0", 3: "1.0"}), (2, {})):
        log = LogFile(path, start, "")
        log.close()
        assert {step: line[8:11] for (_, step), line in log.expected.items()} == expected


def test_a_stop_at_a_difference_stops_every_process(folder: Path) -> None:
    log = harness.log_path(folder)
    log.write_text(log.read_text().replace("s:7 trn:", "s:7 trn:1"))
    typed = ["--resume_from", f"logs/{RUN_ID}/model_step000005.pt", "--on_divergence", "stop"]
    done = launch(folder, typed, processes=2).wait()
    said = [line for line in done.text.splitlines() if line.startswith("error: ")]
    assert done.code != 0 and len(said) == 1 and "step 7 repeated: DIFFERS" in said[0], done.text
    assert "Connection closed" not in done.text, done.text


def test_a_checkpoint_never_has_its_name_before_the_journal_has_its_steps(tmp_path: Path) -> None:
    """Which is written once a second only, and before a commit: trackers are made whole from it after a kill."""
    write_corpus(tmp_path)
    typed = arguments({"run_id": RUN_ID, "save_every": 3, "num_iterations": 10})
    running = launch(tmp_path, typed, processes=None, hold=4)
    running.kill_when((tmp_path / f"logs/{RUN_ID}/model_step000003.pt").exists)
    lines = [json.loads(line) for line in journal_of(harness.log_path(tmp_path)).read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line][:3] == [1, 2, 3]


def test_the_earlier_program_s_steps_are_counted_as_here(tmp_path: Path) -> None:
    """Its s:k is update k + 1. It went on to update 5; the run goes on here from its checkpoint after 3."""
    log = tmp_path / f"{RUN_ID}.log"
    theirs = ["s:0 val:9.000000", *(f"s:{step} trn:{8 - step}.000000" for step in range(5)), "s:4 val:5.000000"]
    ours = ["# time=2026-11-23T18:40:40+00:00 from=model_step000002.pt step=3", "s:4 trn:0.400000", "s:5 trn:0.500000"]
    log.write_text("\n".join([*theirs, *ours, "# time=2026-11-24 step=5", "s:6 trn:0.600000"]) + "\n")
    losses = {1: 8.0, 2: 7.0, 3: 6.0, 4: 0.4, 5: 0.5, 6: 0.6}
    assert dict(read_log(log).train) == losses and dict(read_log(log).val) == {0: 9.0, 4: 5.0}
    rows = {row["step"]: row for row in export_log.rows_of(log)}
    assert {step: row["train_loss"] for step, row in rows.items() if step} == losses
    assert rows[4]["val_loss"] == 5.0 and list(rows) == [0, *losses]
    opened = LogFile(log, 5)
    assert opened.gaps(0, 5) == [] and opened.add_missing([("trn", 1, 8.0), ("trn", 6, 0.6)]) == 0
    opened.close()


def test_a_file_of_gigabytes_without_lines_costs_no_time_or_memory(tmp_path: Path) -> None:
    """Holes and a line without an end: what is before and after a hole is read, in milliseconds."""
    log = tmp_path / f"{RUN_ID}.log"
    events = {log: ["s:1 trn:4.000000", "s:2 trn:3.000000", "s:3 trn:2.000000"]}
    events[journal_of(log)] = [json.dumps({"step": step, "train_loss": 5.0 - step}) for step in (1, 2, 3)]
    for path, (first, *others) in events.items():
        with open(path, "w") as file:
            file.write(f"{first}\n")
            for line in others:
                file.seek(file.tell() + (8 << 30))
                file.write(f"\n{line}\n")
            file.write("x" * (1 << 24))
    began = time.process_time()
    tracemalloc.start()
    assert read_log(log).train == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert read_timeline(log).series("train_loss") == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert not was_tracked(log, "log_wandb", 1 << 40) and read_status(log).step is None
    with pytest.raises(UserError, match="a line has more than 1,048,576 bytes"):
        list(record.seals(journal_of(log)))
    appended = AppendFile(tmp_path / "mine.log")
    appended.append("s:1 trn:4.000000")
    os.replace(log, tmp_path / "mine.log")  # by another process
    assert appended.restore() == ""
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - began < 2 and peak < 64 << 20


def test_a_line_longer_than_any_of_ours_is_no_event(tmp_path: Path) -> None:
    """Read in pieces, it could hold one at the beginning of a piece."""
    log = tmp_path / "a.log"
    log.write_text(f"s:1 trn:4.000000\n{'x' * (1 << 16)}s:2 trn:3.000000\ns:3 trn:2.000000\n")
    assert read_log(log).train == [(1, 4.0), (3, 2.0)]
