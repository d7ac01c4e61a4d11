"""What a run leaves to look at: its journal, TensorBoard, the report, the exported log, after a real SIGKILL."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import RUN_ID, arguments, launch, log_lines, write_corpus
from unbroken.__main__ import main
from unbroken.commands import plot, report
from unbroken.metrics import timeline
from unbroken.metrics.journal import Journal
from unbroken.metrics.timeline import read_timeline
from unbroken.text import format_duration

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def logged(folder: Path, kind: str) -> dict[int, float]:
    lines = [line for line in log_lines(folder) if f" {kind}:" in line]
    return {int(line.split()[0][2:]): float(line.rpartition(":")[2]) for line in lines}


# ---- a real run, killed and resumed ----------------------------------------------------------------------------------


def test_a_killed_run_leaves_each_step_once_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the journal, in TensorBoard's own reading, in the exported table, in the report: nothing twice, none lost."""
    write_corpus(tmp_path)
    changes = {"run_id": RUN_ID, "num_iterations": 12, "save_every": 4, "val_loss_every": 6, "grad_clip": 1.0}
    typed = arguments({**changes, "model": "d2", "resume_from": "auto", "log_tensorboard": True})
    saved = tmp_path / "logs" / RUN_ID / "model_step000004.pt"
    running = launch(tmp_path, typed, processes=None, hold=7)
    running.kill_when(lambda: harness.last_step(tmp_path) == 7 and saved.exists())
    done = launch(tmp_path, typed, processes=None).wait()
    assert done.code == 0 and "WARNING" not in done.text, done.text

    run = read_timeline(harness.log_path(tmp_path))
    assert list(run.metrics) == list(range(13))
    train, val = logged(tmp_path, "trn"), logged(tmp_path, "val")
    assert {step: round(loss, 6) for step, loss in run.series("train_loss")} == pytest.approx(train, abs=1e-6)
    assert {step: round(loss, 6) for step, loss in run.series("val_loss")} == pytest.approx(val, abs=1e-6)
    for name in ("lr", "grad_norm", "tok_per_s", "dt", "wall"):
        assert [step for step, _ in run.series(name) if step] == list(range(1, 13)), name
    first, second = run.attempts
    assert (first.step, first.end, second.end) == (0, "", "finished") and second.step == 4
    assert first.began < first.last <= second.began < second.last <= time.time()
    assert second.environment["threads"] == 1 and second.args["model"] == "d2"
    assert [save["file"] for save in second.saves][-1] == "final.pt"
    spent = timeline.account_time(run.attempts)
    assert spent is not None and 0 < spent.goodput < 1
    assert spent.ideal + sum(spent.lost.values()) == pytest.approx(spent.total, rel=0.02)
    _check_event_file(tmp_path / "logs" / RUN_ID / "tensorboard", dict(run.series("train_loss")), val)
    _check_tools(tmp_path, monkeypatch, capsys, run.series("lr"))


def _check_event_file(folder: Path, train: dict[int, float], val: dict[int, float]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert len(list(folder.iterdir())) == 1
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    assert {"train_loss", "val_loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    found = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert [step for step, _ in found] == list(range(1, 13))
    assert dict(found) == pytest.approx(train, rel=1e-6)
    assert [event.step for event in events.Scalars("val_loss")] == sorted(val)
    assert all(abs(event.wall_time - time.time()) < 3600 for event in events.Scalars("val_loss"))


def _check_tools(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rates: list[tuple[int, float]],
) -> None:
    monkeypatch.chdir(folder)
    assert main(["export-log", RUN_ID]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["step"]) for row in rows] == list(range(13)) and {row["run"] for row in rows} == {RUN_ID}
    assert [(int(row["step"]), float(row["lr"])) for row in rows if row["lr"]] == rates  # to the bit
    assert main(["export-log", RUN_ID, "--out", "x.jsonl"]) == 0
    assert len([json.loads(line) for line in Path("x.jsonl").read_text().splitlines()]) == 13
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main(["export-log", RUN_ID, "--out", "x.parquet"]) == 0
    table = parquet.read_table("x.parquet").to_pylist()
    assert [(row["step"], row["lr"]) for row in table if row["lr"] is not None] == rates
    assert main(["plot", RUN_ID, "--show", "loss,lr,tok_s,grad_norm", "--out", "all.svg"]) == 0
    drawn = Path("all.svg").read_text()
    assert "interrupted after step" in drawn and "not logged" not in drawn
    assert main(["report", RUN_ID, "--check", "--samples", "1", "--tokenizer", "bytes"]) == 0
    page = (Path("logs") / RUN_ID / report.PAGE).read_text()
    for said in ("goodput", "no end recorded", "model_step000008.pt", "What it writes", "same environment"):
        assert said in page, said
    assert page.count("<td>yes</td>") == 4  # three checkpoints and final.pt, every checksum read


# ---- the journal -----------------------------------------------------------------------------------------------------


def line(step: int, wall: float, loss: float, **more: Any) -> str:
    return json.dumps({"step": step, "wall": wall, "dt": 1.0, "train_loss": loss, **more})


def start(step: int, wall: float, began: float, **more: Any) -> str:
    return json.dumps({"event": "start", "step": step, "wall": wall, "began": began, **more})


JOURNAL = [
    start(0, 102.0, 100.0, environment={"torch": "2.12", "host": "a"}, args={"model": "d2", "num_iterations": 6}),
    *(line(step, 102.0 + step, 5.0 - step) for step in range(1, 5)),  # steps 3 and 4 are superseded
    json.dumps({"event": "saved", "step": 2, "wall": 104.5, "file": "model_step000002.pt", "blocked": 0.25}),
    '{"step": 5, "wall": 107, "tra',  # torn by the kill at 106 or later
    start(2, 113.0, 110.0, environment={"torch": "2.13", "host": "a"}, args={"model": "d2", "num_iterations": 6}),
    *(line(step, 111.0 + step, 9.0 - step) for step in range(3, 7)),
    json.dumps({"step": 6, "wall": 119.0, "val_loss": 2.5, "val_seconds": 2.0}),
    json.dumps({"event": "end", "step": 6, "wall": 120.0, "why": "finished"}),
]


def journal(folder: Path, lines: list[str], log: str = "") -> Path:
    path = folder / f"{RUN_ID}.log"
    path.write_text(log)
    path.with_suffix(".metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_a_later_attempt_supersedes_what_came_after_its_start(tmp_path: Path) -> None:
    run = read_timeline(journal(tmp_path, JOURNAL))
    assert run.series("train_loss") == [(1, 4.0), (2, 3.0), (3, 6.0), (4, 5.0), (5, 4.0), (6, 3.0)]
    again = read_timeline(journal(tmp_path, [*JOURNAL, start(2, 200.0, 199.0)]))
    assert list(again.metrics) == [1, 2]
    fresh = read_timeline(journal(tmp_path, [*JOURNAL, start(0, 200.0, 199.0)]))
    assert fresh.metrics == {}


def test_every_second_is_accounted_for(tmp_path: Path) -> None:
    spent = timeline.account_time(read_timeline(journal(tmp_path, JOURNAL)).attempts)
    assert spent is not None and spent.total == 20.0 and spent.ideal == 6.0 and spent.goodput == 0.4
    # 100-102 and 110-113 start up, 106-110 nothing runs, 117-119 validates, of 119-120 and so on the rest
    lost = {"repeated": 2.0, "down": 4.0, "start-up": 5.0, "validation": 2.0, "saves": 0.25, "other": 0.75}
    assert spent.lost == lost


def test_the_log_fills_in_what_a_kill_took_from_the_journal(tmp_path: Path) -> None:
    """Its last second: steps that the log of the last attempt has, but none of a timeline that was given up."""
    log = "# step=0\n" + "".join(f"s:{step} trn:{5 - step}.000000\n" for step in range(1, 5))
    alive = read_timeline(journal(tmp_path, JOURNAL[:3], log))
    assert alive.series("train_loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    resumed = read_timeline(journal(tmp_path, [*JOURNAL[:3], start(2, 113.0, 110.0)], log + "# step=2\n"))
    assert list(resumed.metrics) == [1, 2]
    old = tmp_path / "old.log"  # made before journals were kept
    old.write_text(log)
    assert [step for step, _ in read_timeline(old).series("train_loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "junk",
    [
        "[" * 100_000,
        "null",
        '{"step": true}',
        '{"step": -1, "train_loss": 1.0}',
        '{"step": 1e3}',
        "\0\x1b[2J",
        "9" * 9999,
    ],
)
def test_a_strangers_journal_cannot_stop_the_reader(junk: str, tmp_path: Path) -> None:
    odd = [
        junk,
        '{"event": "start", "step": 3, "wall": "now", "args": 7}',
        '{"step": 7, "wall": Infinity, "dt": NaN, "train_loss": "x", "lr": 1' + "0" * 400 + "}",
        '{"event": "saved", "step": 7, "blocked": "long"}',
        '{"step": 8, "train_loss": NaN}',
    ]
    run = read_timeline(journal(tmp_path, [*JOURNAL, *odd]))
    assert run.series("train_loss")[:6] == [(1, 4.0), (2, 3.0), (3, 6.0), (4, 5.0), (5, 4.0), (6, 3.0)]
    assert math.isnan(run.metrics[8]["train_loss"]) and run.metrics[7] == {}
    assert timeline.account_time(run.attempts) is not None


@pytest.mark.parametrize(("source", "left"), [("logs/x/model_step000000.pt", [0, 1]), ("scratch", [1])])
def test_an_attempt_from_the_checkpoint_of_step_0_keeps_its_validation(
    tmp_path: Path, source: str, left: list[int]
) -> None:
    lines = [
        '{"event": "start", "step": 0, "wall": 100, "from": "scratch"}',
        '{"step": 0, "wall": 101, "val_loss": 6.5}',
        '{"step": 1, "wall": 102, "train_loss": 6.0}',
        json.dumps({"event": "start", "step": 0, "wall": 103, "from": source}),
        '{"step": 1, "wall": 104, "train_loss": 6.0}',
    ]
    assert list(read_timeline(journal(tmp_path, lines)).metrics) == left


def test_a_line_costs_a_step_microseconds(tmp_path: Path) -> None:
    """20 of them are promised, without the write; ten times that is still allowed here. The processor's time counts."""
    kept = Journal(tmp_path / "x.log")
    metrics = {"train_loss": 3.123456, "lr": 1e-3, "time": 1e5, "tok_per_s": 1e6, "tokens": 1e9, "grad_norm": 1.5}
    began = time.thread_time()
    for step in range(5000):
        kept.add({"step": step, "wall": 1.0, "dt": 0.1, **metrics})
    each = (time.thread_time() - began) / 5000
    kept.close()
    assert each < 200e-6
    assert len((tmp_path / "x.metrics.jsonl").read_text().splitlines()) == 5000


def test_a_full_disk_costs_a_warning_and_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Journal(tmp_path / "x.log")
    real = kept._file
    with open("/dev/full", "wb") as full:
        kept._file = full.fileno()
        kept.add({"step": 1})
        kept.add({"step": 2})
        kept.sync()
    kept._file = real
    kept.add({"step": 3})
    kept.close()
    assert capsys.readouterr().err.count("WARNING") == 1
    assert (tmp_path / "x.metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


# ---- the page --------------------------------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=alert(1)>\x1b[2J\u202e\"'&"


class Page(HTMLParser):
    """Every tag and attribute of a page, and the text of its elements."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def evil_page(folder: Path) -> Path:
    """The report of a run whose every file was written by somebody who means harm."""
    about = {"environment": {"torch": EVIL, EVIL: 1}, "args": {"model": EVIL, "num_iterations": EVIL, "seed": EVIL}}
    lines = [start(0, 102.0, 100.0, **about, **{"from": EVIL, "host": EVIL, "git": EVIL, "processes": EVIL})]
    lines += [line(step, 102.0 + step, 5.0 - step) for step in range(1, 4)]
    lines += [json.dumps({"event": "unsaved", "step": 2, "wall": 104.5, "file": EVIL, "error": EVIL, "blocked": EVIL})]
    lines += [start(2, 113.0, 110.0), line(3, 114.0, 2.0), json.dumps({"event": "end", "step": 3, "why": EVIL})]
    log = journal(folder, lines)
    (folder / "model_step000002.pt").write_bytes(b"not a checkpoint")
    assert main(["report", str(log), "--out", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_nothing_from_a_file_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    text = evil_page(tmp_path).read_text("utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 2 and "img" not in {tag for tag, _ in page.tags}
    assert not [1 for _, attrs in page.tags for name in attrs if name.startswith("on") or name in ("src", "href")]
    assert "<img src=x" in html.unescape(text) and "\x1b" not in text and "\u202e" not in text
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; ") and "sha256-" in policy


def test_a_browser_draws_it(tmp_path: Path) -> None:
    """The page's own script runs under its own policy, and says so; the browser has nothing to complain about."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", evil_page(tmp_path).as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 'id="reach" class="soft">o' in done.stdout, done.stderr  # "over … steps" or "off": the script's last line
    assert "CONSOLE" not in done.stderr, done.stderr


def test_a_long_curve_keeps_its_spikes() -> None:
    points = [(step, 1000.0 if step == 77_777 else math.sin(step)) for step in range(100_000)]
    thin = report.thinned(points, 1000)
    assert len(thin) <= 1000 and (77_777, 1000.0) in thin and thin == sorted(thin)
    assert report.thinned(points[:50], 1000) == points[:50]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0123, "12 ms"), (59.94, "59.9 s"), (200, "3 m 20 s"), (7500, "2 h 05 m"), (273600, "3 d 04 h")],
)
def test_durations_are_spelled(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said


# ---- plot and export-log ---------------------------------------------------------------------------------------------


def test_the_average_is_unbiased_and_knows_no_nan() -> None:
    assert plot.smoothed([(k, 3.0) for k in range(9)], 4) == [(k, pytest.approx(3.0)) for k in range(9)]
    points = [(0, 1.0), (1, math.nan), (2, 2.0)]
    assert [step for step, _ in plot.smoothed(points, 2)] == [0, 2]
    assert plot.smoothed(points[:1], 0) == points[:1]


def test_the_terminal_shows_each_panel_and_each_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = journal(tmp_path, JOURNAL, "# step=0\ns:4 trn:1.000000\n# step=2\ns:6 trn:3.000000\n")
    assert main(["plot", str(log), "--terminal", "--show", "loss,grad_norm"]) == 0
    said = capsys.readouterr()
    assert "loss (nats per token): d2 691bd736, validation; dotted: resumed from there" in said.out
    assert said.err == "--show grad_norm: not logged by this run, left out\n" and "gradient" not in said.out
    assert not list(tmp_path.glob("*.png")) and sum(0x2800 < ord(char) < 0x2900 for char in said.out) > 60


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        (["plot", "--show", "loss,speed"], "--show speed: there are loss, lr, grad_norm, tok_s, mfu"),
        (["plot", "--show", "mfu,grad_norm"], "--show mfu,grad_norm: not logged by this run"),
        (["plot", "--smooth", "-1"], "--smooth -1: it must not be negative"),
        (["plot", "--terminal", "--out", "x.png"], "--terminal writes no file; leave out --out"),
        (["plot", "--out", "x.doc"], "--out x.doc: the ending decides the format: .png, .svg, .pdf"),
        (["report", "--samples", "-1"], "--samples -1: it must not be negative"),
        (["report", "--out", "no/x.html"], "cannot write no/x.html: No such file or directory"),
        (["export-log", "--out", "x.xls"], "--out x.xls: the ending decides the format: .csv, .parquet, .jsonl"),
    ],
)
def test_a_slip_is_one_line_and_writes_nothing(
    typed: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    log = journal(tmp_path, JOURNAL)
    before = sorted(tmp_path.iterdir())
    assert main([typed[0], log.name, *typed[1:]]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {why}") and len(err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
