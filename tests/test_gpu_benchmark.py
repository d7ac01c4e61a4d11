"""benchmarks/gpu.py on a CPU: its own logic with tiny sizes. What it measures it can only measure on a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests import fork_server
from tests.harness import ROOT, environment


def benchmark(folder: Path, *typed: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *typed]
    return fork_server.run(  # type: ignore[no-any-return]
        line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    done = benchmark(tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: there is no GPU for this torch here; --device cpu")


def test_its_tasks_run_and_it_claims_nothing_about_a_gpu(tmp_path: Path) -> None:
    names = "machine,collectives,snapshot,pinning,no_sync,losses,repeats,stock,save,signals,two_gpus"
    done = benchmark(tmp_path, "--device", "cpu", "--only", names)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    checks = {each["name"]: each["result"] for each in results if each["kind"] == "check"}
    assert "fails" not in checks.values() and "not run" not in checks.values(), checks
    assert checks["three steps without a synchronization"] == "needs a GPU"
    assert checks["NCCL between GPUs"] == "needs two GPUs" and checks["gloo: the three collectives"] == "holds"
    figures = {each["name"] for each in results if each["kind"] == "figure"}
    assert {"stock d2 B=2", "lost when saving every 5 steps", "copy to the host"} <= figures


def test_a_task_that_breaks_fails_and_a_late_one_was_not_run(tmp_path: Path) -> None:
    args = argparse.Namespace(attention="ours")
    _, wrong = gpu.start("nothing", "cpu", args, 60)
    assert wrong.startswith("KeyError: 'task_nothing'")
    _, wrong = gpu.start("throughput", "cpu", args, 0.2)
    assert wrong.startswith("took more than")
    done = benchmark(tmp_path, "--device", "cpu", "--only", "machine", "--minutes", "0")
    assert done.returncode == 0 and "out of time" in done.stdout, done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["results"][0]["result"] == "not run"


def test_nothing_is_left_of_a_training_that_a_task_has_started() -> None:
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with gpu.train(".", [sys.executable, "-c", inner]) as process:
        while len(gpu.below(process.pid)) < 1:
            time.sleep(0.01)
        (child,) = gpu.below(process.pid)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    deadline = time.monotonic() + 10
    while "sleep" in gpu.command_line(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_training_that_ends_says_why() -> None:
    with gpu.train(".", [sys.executable, "-c", "print('step:1/2 | loss 1'); print('no more')"]) as process:
        gpu.until(process, lambda line: bool(gpu.STEP.match(line)))
        with pytest.raises(RuntimeError, match="the training ended: no more"):
            gpu.until(process, lambda line: bool(gpu.STEP.match(line)))


def test_what_is_measured_is_compiled_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside the checks, so that the measurements need no time for it; here nothing is started."""
    calls = list[tuple[str, bool]]()

    def start(name: str, *_: object) -> tuple[list[dict[str, object]], str]:
        calls.append((name, bool(_[-1])))
        return [{"kind": "figure", "name": name, "value": 1, "unit": ""}], ""

    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert gpu.main() == 0
    assert [name for name, compiles in calls if not compiles][-len(gpu.MEASUREMENTS) :] == list(gpu.MEASUREMENTS)
    assert {name for name, compiles in calls if compiles} == {name for row in gpu.COMPILED for name in row}
    assert {each["name"] for each in json.loads((tmp_path / "gpu.json").read_text())["results"]} == set(gpu.TASKS)


def test_ratios_are_those_of_the_medians() -> None:
    rates = {"d2 B=2": 90, "d2 B=2, attention ours": 100, "d2 B=2, head 0.001 GiB": 120, "stock d2 B=2": 80}
    results = [{"name": name, "value": rate, "unit": "tok/s"} for name, rate in rates.items()]
    found = {name: value for name, value, _ in gpu.ratios(results, gpu.Size("cpu"))}
    assert found == {"ours / stock": 1.25, "spread of 3 measurements of d2 B=2": 33.33}


def test_a_task_that_only_compiles_reports_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(gpu.COMPILE_ONLY, "1")
    steps = list[int]()
    seconds = gpu.seconds_of(lambda: steps.append(1), "cpu", 20)
    gpu.report_rate("d2 B=1", "d2", 16, 16, seconds, "cpu")
    assert (len(steps), capsys.readouterr().out) == (1, "")
