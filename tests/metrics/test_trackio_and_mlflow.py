"""Trackio and MLflow: one run in each over kills, every step once, read back by the real packages.

UNBROKEN_TRACKER_KILLS=20 kills twenty times. `pip install trackio mlflow` first: without them this is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness import RUN_ID, arguments, environment, launch, write_corpus
from unbroken.metrics.timeline import read_timeline

for package in ("trackio", "mlflow"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"there is no {package} here", allow_module_level=True)

KILLS = int(os.environ.get("UNBROKEN_TRACKER_KILLS", "1"))
METRICS = ("train_loss", "val_loss", "lr", "tokens")
READ = {
    "trackio": """
import trackio
from trackio.sqlite_storage import SQLiteStorage
for run in trackio.Api().runs("unbroken"):
    values = {name: SQLiteStorage.get_metric_values("unbroken", run.name, name) for name in NAMES}
    metrics = {name: [(row["step"], row["value"]) for row in rows] for name, rows in values.items()}
    found.append({"name": run.name, "metrics": metrics, "flags": run.config})
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient("sqlite:///logs/mlflow.db")
experiment = client.get_experiment_by_name("unbroken")
for run in client.search_runs([experiment.experiment_id]):
    metrics = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in NAMES}
    found.append({"name": run.info.run_name, "metrics": metrics, "flags": run.data.params, "status": run.info.status})
""",
}


def read_back(folder: Path, package: str, env: dict[str, str]) -> list[dict[str, Any]]:
    """What the package itself says of its runs."""
    code = f"import json\nNAMES = {METRICS}\nfound = []\n{READ[package]}\nprint('found', json.dumps(found))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment(env), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("found "))
    return list(json.loads(line.removeprefix("found ")))


def all_grew(before: dict[Path, int]) -> bool:
    return all(rows(path) > count for path, count in before.items())


def rows(path: Path) -> int:
    """The rows of metrics in a database that another process writes; 0 while there is none."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return int(database.execute("select count(*) from metrics").fetchone()[0])
    return 0


def test_each_step_is_there_once_after_kills(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    databases = (tmp_path / "trackio/unbroken.db", tmp_path / "logs/mlflow.db")
    changes = {"run_id": RUN_ID, "name": "base", "num_iterations": 30 * (KILLS + 1), "save_every": 3}
    changes |= {"grad_accumulation_steps": 1, "val_loss_every": 7, "log_trackio": True, "log_mlflow": True}
    typed = arguments({**changes, "resume_from": "auto"})
    chance = random.Random(KILLS)
    for _ in range(KILLS):
        before = {path: rows(path) for path in databases}
        running = launch(tmp_path, typed, processes=None, env=env, pace=0.25)
        running.until(partial(all_grew, before))
        time.sleep(chance.uniform(0, 2))
        running.kill()
        assert running.wait().code == -9
    done = launch(tmp_path, typed, processes=None, env=env).wait(timeout=1500)
    assert done.code == 0 and "is switched off" not in done.text and "Warning" not in done.err, done.text
    history = read_timeline(tmp_path / "logs" / RUN_ID / f"{RUN_ID}.log")
    for package in READ:
        (run,) = read_back(tmp_path, package, env)
        for name in METRICS:
            assert sorted(map(tuple, run["metrics"][name])) == history.series(name), (package, name)
        assert run["name"].startswith("base") and run["flags"]["model"] == "d2"
        assert run.get("status", "FINISHED") == "FINISHED"
