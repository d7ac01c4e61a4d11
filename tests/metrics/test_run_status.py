"""How a run is doing, over what its curves are drawn, and several texts and evaluations at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import harness
from tests.harness import OTHER_ID, RUN_ID, SHORT, arguments, last_step, launch, train, trained, write_corpus
from unbroken.__main__ import main
from unbroken.commands import ls
from unbroken.commands.report import curves_of
from unbroken.config import Config
from unbroken.distributed.world import World
from unbroken.metrics.logger import RunLogger
from unbroken.metrics.metric_table import BY_NAME, METRICS
from unbroken.metrics.timeline import RunStatus, read_status, read_timeline
from unbroken.paths import Run, journal_of
from unbroken.runtime import environment

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps, validated after 2 and 4."""
    changes = {**SHORT, "model": "d2", "num_iterations": 4, "val_loss_every": 2}
    return trained(tmp_path_factory.mktemp("finished"), changes)


def test_ls_says_what_a_run_is_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Running, stopped, killed, finished; before it has saved anything, too."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    typed = arguments({**SHORT, "num_iterations": 90, "save_every": 0})
    folder = tmp_path / "logs" / RUN_ID
    running = launch(tmp_path, typed, processes=None, pace=0.3)
    running.until(lambda: last_step(tmp_path) >= 3)
    seen = ls.look(folder)
    assert seen.trained_by == f"process {running.process.pid}" and seen.ended == "" and not seen.checkpoints
    assert seen.step is not None and 3 <= seen.step < 90 and seen.loss is not None
    assert main(["ls"]) == 0
    assert re.search(rf"of 90 · .* tok/s · \d.* left · running, {seen.trained_by}\n  no ch", capsys.readouterr().out)
    assert seen.seconds_left is not None and 0.3 < seen.seconds_left < 600
    running.kill()
    running.wait()
    assert main(["ls"]) == 0
    assert " · no end recorded (killed, or running on another machine), " in capsys.readouterr().out
    train(tmp_path, {**SHORT, "num_iterations": 2, "run_id": OTHER_ID})
    assert main(["ls", OTHER_ID]) == 0
    assert f"step 2 of 2 · loss {read_timeline(journal_log(tmp_path)).metrics[2]['train_loss']:.6f} · finished, " in (
        capsys.readouterr().out
    )


def journal_log(folder: Path) -> Path:
    return folder / "logs" / OTHER_ID / f"{OTHER_ID}.log"


def test_the_last_words_are_found_behind_any_length(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert read_status(log) == RunStatus()
    step = '{"step": %d, "wall": 5.0, "train_loss": %d.5, "tok_per_s": 7.0}\n'
    stop = '{"event": "stop", "step": 9999, "wall": 6.0, "why": "stopped by SIGTERM"}\n'
    lines = [step % (k, k) for k in range(10_000)]
    end = '{"event": "end", "step": 9999, "wall": 7.0, "why": "stopped"}\n'
    journal_of(log).write_text("".join([*lines, stop, end]))
    assert read_status(log) == RunStatus(9999, 9999.5, 7.0, 7.0, "stopped by SIGTERM")
    with open(journal_of(log), "a") as file:
        file.write('{"event": "start", "step": 50, "wall": 8.0, "began": 7.5}\n{"step": 51, "tr')
    assert read_status(log) == RunStatus(50, 9999.5, 7.0, 8.0, "")


@pytest.mark.parametrize("x", ["step", "tokens", "hours"])
def test_curves_are_drawn_over_what_is_asked_for(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: str
) -> None:
    monkeypatch.chdir(finished)
    assert main(["plot", RUN_ID, "--x", x, "--out", str(tmp_path / "a.svg")]) == 0
    label = {"step": "step", "tokens": "tokens", "hours": "minutes of training"}[x]
    drawing = (tmp_path / "a.svg").read_text()
    assert f">{label}</text>" in drawing and f">run d2 {RUN_ID[:8]}</text>" in drawing
    from unbroken.commands.plot import Drawn

    drawn = Drawn.read(finished / "logs" / RUN_ID / f"{RUN_ID}.log", x)
    metrics = drawn.run.metrics
    wanted = {
        "step": [0, 2, 4],
        "tokens": [0, metrics[2]["tokens"], metrics[4]["tokens"]],
        "hours": [0, metrics[2]["time"] / 3.6e6, metrics[4]["time"] / 3.6e6],
    }
    assert [place for place, _ in drawn.series("val_loss")] == wanted[x]


def test_without_a_journal_only_steps_are_known(tmp_path: Path, capsys: Capture) -> None:
    log = tmp_path / "x.log"
    log.write_text("# step=0\ns:1 trn:2.000000\n")
    assert main(["plot", str(log), "--x", "tokens"]) == 2
    assert "has no journal with the tokens of its steps; leave out --x" in capsys.readouterr().err


def test_several_texts_are_those_of_the_seeds(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(finished)
    typed = ["sample", RUN_ID, "--tokenizer", "bytes", "--num_tokens", "8", "--prompt", "x"]
    alone = []
    for seed in ("5", "6"):
        assert main([*typed, "--seed", seed]) == 0
        alone.append(capsys.readouterr().out)
    assert main([*typed, "--seed", "5", "--num_samples", "2"]) == 0
    assert capsys.readouterr().out == f"--- 1 of 2\n{alone[0]}--- 2 of 2\n{alone[1]}"


def test_several_checkpoints_are_a_row_each(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(finished)
    files = [f"logs/{RUN_ID}/model_step00000{step}.pt" for step in (2, 4)]
    typed = ["eval", "--tokenizer", "bytes", "--tokens", "256"]
    alone = []
    for file in files:
        assert main([*typed, file, "--json"]) == 0
        alone.append(json.loads(capsys.readouterr().out))
    assert main([*typed, *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == alone
    assert main([*typed, *files]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["checkpoint", "step", "tokens"]
    assert [row.split()[:2] for row in rows] == [[files[0], "2"], [files[1], "4"]]


@pytest.mark.parametrize(
    ("device", "dtype", "processes", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 8, 8 * 989e12),
        ("NVIDIA H100 PCIe", "bf16", 1, 756e12),
        ("NVIDIA A100-SXM4-40GB", "bf16", 2, 624e12),
        ("NVIDIA A10G", "bf16", 1, 70e12),
        ("NVIDIA L40S", "bf16", 1, 362e12),
        ("NVIDIA RTX A4000", "bf16", 1, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", 1, None),
        ("NVIDIA H100 80GB HBM3", "fp32", 8, None),
        ("AMD EPYC 9554", "bf16", 1, None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_name(device: str, dtype: str, processes: int, peak: float | None) -> None:
    assert environment.peak_flops({"device": device, "dtype": dtype}, processes) == peak


def test_where_the_peak_is_known_the_share_of_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Played: this processor is given one. The model makes 6 x 458,752 + 12 x 2 x 128 x 16 operations for a token."""
    import train_gpt2_mod

    monkeypatch.setattr("unbroken.metrics.logger.peak_flops", lambda *_: 1e12)
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    assert train_gpt2_mod.main(arguments({**SHORT, "num_iterations": 2})) == 0
    log = tmp_path / "logs" / RUN_ID / f"{RUN_ID}.log"
    step = read_timeline(log).metrics[2]
    assert "mfu" in BY_NAME and f" tok/s | {step['mfu']:.1%} MFU\n" in capsys.readouterr().out
    assert step["mfu"] == pytest.approx(step["tok_per_s"] * (6 * 458_752 + 12 * 2 * 128 * 16) / 1e12)


def test_a_metric_of_ones_own_reaches_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One argument to `logger.train`: journal, tables, the report's chart, the plot and TensorBoard have it."""
    monkeypatch.chdir(tmp_path)
    config, run = Config(log_tensorboard=True, num_iterations=3), Run(RUN_ID, "")
    run.create()
    about: dict[str, Any] = {"config": config, "run": run, "start_step": 0, "saved": {}, "world": World.single()}
    with RunLogger(**about, compare=False, header={"step": "0"}, environment={}) as logger:
        for step in (1, 2, 3):
            logger.train(step, torch.ones(2), tokens=step, lr=0.1, my_metric=torch.tensor(step / 4), other=7)
    timeline = read_timeline(run.log)
    assert timeline.series("my_metric") == [(1, 0.25), (2, 0.5), (3, 0.75)] and timeline.extra == ["my_metric", "other"]
    capsys.readouterr()
    assert main(["export-log", str(run.log)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith(",wall,my_metric,other") and [row.split(",")[-2:] for row in rows][2] == ["0.75", "7.0"]
    assert curves_of(timeline)[-2:] == ["my_metric", "other"]
    assert main(["plot", str(run.log), "--show", "loss,my_metric", "--terminal"]) == 0
    assert "my_metric: " in capsys.readouterr().out
    (events,) = (run.folder / "tensorboard").iterdir()
    assert events.read_bytes().count(b"my_metric") == 3
    assert main(["plot", str(run.log), "--show", "mine"]) == 2 and "my_metric, other" in capsys.readouterr().err


def test_the_documents_have_a_row_for_every_metric() -> None:
    text = (harness.ROOT / "docs/looking.md").read_text("utf-8")
    assert [metric.name for metric in METRICS if f"| `{metric.name}` | {metric.text} |" not in text] == []
