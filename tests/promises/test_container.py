"""In a container torchrun is process 1: its workers must not take it for the reaper of orphans."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import SCRIPT, Running, arguments, environment, log_lines, write_corpus

NAMESPACE = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]


def may_make_namespaces() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="unshare(1) may not make a process namespace here")


def launch_as_process_1(folder: Path) -> Running:
    write_corpus(folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command = [*NAMESPACE, *torchrun, str(SCRIPT), *arguments({"num_iterations": 4, "save_every": 0})]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=folder, env=environment(), text=True, **pipes)  # type: ignore[call-overload]
    return Running(process, folder)


def test_a_worker_of_process_1_trains_to_the_end(tmp_path: Path) -> None:
    done = launch_as_process_1(tmp_path).wait()
    assert done.code == 0, done.text
    assert "stopped by" not in done.text
    assert [line.split()[0] for line in log_lines(tmp_path)] == ["s:1", "s:2", "s:3", "s:4"]
