"""`--save_every auto`: the interval that loses least, and what a run does with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import RUN_ID, arguments, launch, write_corpus
from unbroken.config import AUTO, Config
from unbroken.run.save_policy import SaveIntervalTuner, checkpoints_to_come, optimal_interval

seconds = st.floats(0.01, 100)


@given(cost=seconds, mtbf=st.floats(60, 1e6))
def test_no_other_interval_loses_less(cost: float, mtbf: float) -> None:
    chosen = optimal_interval(cost, 0.0, mtbf)

    def loss(interval: float) -> float:
        return cost / interval + interval / (2 * mtbf)

    assert all(loss(chosen) <= loss(chosen * factor) * (1 + 1e-9) for factor in (0.5, 0.9, 1.1, 2.0))


@given(cost=seconds, durable=seconds, mtbf=st.floats(1, 1e6))
def test_one_save_is_under_way_at_a_time(cost: float, durable: float, mtbf: float) -> None:
    assert optimal_interval(cost, durable, mtbf) >= 2 * durable


def test_the_cost_of_a_save_is_what_steps_take_longer_beside_it() -> None:
    cadence, now = SaveIntervalTuner(mtbf=3600, now=0.0), 0.0
    assert not cadence.due(1e9), "nothing has been measured"
    for _ in range(100):
        now += 1.0
        cadence.step_done(1.0)
    assert cadence.due(now)
    cadence.save_begins(now, blocked=0.2)
    assert not cadence.due(now + 1e9), "one at a time"
    for extra in (0.4, 0.2):
        now += 1.0 + extra
        cadence.step_done(1.0 + extra)
    said = cadence.save_ended(durable=2.0)
    assert cadence.cost == pytest.approx(0.8)
    assert cadence.interval == pytest.approx((2 * 0.8 * 3600) ** 0.5)
    assert "saving every 76s, about 76 steps" in said and "0.80s" in said and "every 60 minutes" in said
    assert not cadence.due(now) and cadence.due(now + 80)
    assert cadence.save_ended(durable=9.0) == "" and cadence.interval < 80, "final.pt is no save of its own"


def test_a_save_before_any_step_says_nothing() -> None:
    """A fork that is stopped at once, or a run whose last step had been saved before."""
    cadence = SaveIntervalTuner(mtbf=3600.0, now=0.0)
    assert cadence.save_ended(durable=0.1) == ""
    cadence.save_begins(1.0, blocked=0.1)
    assert cadence.save_ended(durable=0.1) == ""


def test_a_run_chooses_says_so_and_keeps_two(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    typed = {"run_id": RUN_ID, "save_every": "auto", "mtbf_minutes": 0.001, "num_iterations": 150}
    typed |= {"grad_accumulation_steps": 1}
    done = launch(tmp_path, arguments(typed)).wait()
    assert done.code == 0, done.text
    assert re.search(
        r"^saving every \d+s, about [\d,]+ steps: a save costs \d+\.\d\ds, an interruption", done.text, re.M
    )
    assert done.text.count("saved logs/") >= 2
    assert 1 <= len(list((tmp_path / "logs" / RUN_ID).glob("model_step*.pt"))) <= 2
    resumed = launch(tmp_path, ["--resume_from", RUN_ID, "--num_iterations", "152"]).wait()
    assert resumed.code == 0, resumed.text


@pytest.mark.parametrize(
    ("typed", "said"),
    [("often", "often: it must be a whole number or auto"), ("-3", "must not be negative")],
)
def test_what_is_neither_a_number_nor_auto_is_refused(tmp_path: Path, typed: str, said: str) -> None:
    refused = launch(tmp_path, [f"--save_every={typed}"], None).wait()
    assert refused.code == 2 and said in refused.text and "Traceback" not in refused.text


@pytest.mark.parametrize(
    ("flags", "step", "count"),
    [
        ({"save_every": 5}, 0, 4),
        ({"save_every": 5}, 12, 2),
        ({"save_every": 6}, 0, 4),
        ({"save_every": 2, "keep_last": 2}, 0, 3),
        ({"save_every": 2, "keep_last": 2, "keep_every": 10}, 0, 5),
        ({"save_every": 2, "keep_last": 2, "keep_best": 3, "val_loss_every": 5}, 0, 6),
        ({"save_every": 0}, 0, 1),
        ({"save_every": 0, "save_steps": "0,log2,15-30/5"}, 2, 6),
        ({"save_every": AUTO}, 0, 4),
    ],
)
def test_the_checkpoints_that_a_disk_must_hold(flags: dict[str, Any], step: int, count: int) -> None:
    assert checkpoints_to_come(Config(num_iterations=20, **flags), step) == count
