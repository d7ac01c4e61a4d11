"""--save_steps: checkpoints at steps of the user's choice, the untrained model among them, which stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import RUN_ID, arguments, assert_same_bits, launch, train, write_corpus
from unbroken.__main__ import main
from unbroken.config import StepList, check_value, load_yaml
from unbroken.errors import UserError

CHANGES: dict[str, Any] = {
    **{"run_id": RUN_ID, "num_iterations": 9, "batch_size": 1, "warmup_iters": 0, "warmdown_iters": 0},
    **{"save_every": 3, "keep_last": 1, "save_steps": "0,log2,5-8/2"},
}
RUN = Path("logs") / RUN_ID


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("0,1,2,4,8-64/8", [0, 1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
        ("log2", [1, 2, 4, 8, 16, 32, 64]),
        ("0,log2,60-62,70", [0, 1, 2, 4, 8, 16, 32, 60, 61, 62, 64, 70]),
        ("7-20/5,5-5", [5, 7, 12, 17]),
        ("999999999999999999", []),
    ],
)
def test_a_list_means_these_steps(text: str, steps: list[int]) -> None:
    parsed = StepList.parse(text)
    assert [step for step in range(100) if step in parsed] == steps
    for after, last in ((-1, 99), (4, 61), (0, 1), (64, 63)):
        assert parsed.count(after, last) == len([step for step in steps if after < step <= last])


@pytest.mark.parametrize("text", ["x", "1,,2", "-1", "5-3", "1-9/0", "1-", "log3", "1 2", "1.5", "1" * 19, "٣"])
def test_nonsense_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="^--save_steps .*: it must be steps such as 0,1,2,4,8-64/8 or log2"):
        check_value("save_steps", text)


def test_a_single_step_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("save_steps: 8\n")
    assert load_yaml(str(tmp_path / "flags.yaml")) == {"save_steps": "8"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / RUN).glob("*.pt"))


def test_they_stay_after_kills_and_step_0_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        write_corpus(folder)
    storage = f"file://{straight}/storage"
    train(straight, {**CHANGES, "mirror": storage}, processes=None)
    kept = [f"model_step{step:06d}.pt" for step in (0, 1, 2, 4, 5, 7, 8, 9)]
    assert names(straight) == ["final.pt", *kept]
    copies = {path.name[: len("model_step000000")] for path in (straight / "storage" / RUN_ID).glob("*.pt")}
    assert copies == {name.removesuffix(".pt") for name in kept}, "retention there keeps the same"

    running = launch(killed, arguments(CHANGES), 2, pace=0.3)
    running.kill_at(5)
    train(killed, {**CHANGES, "resume_from": RUN_ID, "num_iterations": None}, processes=None)
    assert names(killed) == names(straight)
    for name in names(straight):
        assert_same_bits(straight / RUN / name, killed / RUN / name)

    shutil.rmtree(killed / "logs")
    (killed / RUN).mkdir(parents=True)
    os.link(straight / RUN / kept[0], killed / RUN / kept[0])
    train(killed, {"resume_from": f"{RUN}/{kept[0]}", **dict.fromkeys(harness.TINY)}, processes=None)
    assert_same_bits(straight / RUN / "final.pt", killed / RUN / "final.pt")
    monkeypatch.chdir(straight)
    assert main(["audit", RUN_ID, "--to", "3"]) == 0
