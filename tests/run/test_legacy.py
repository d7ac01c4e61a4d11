"""The earlier program's checkpoints: where its loader was in the data, and ours written for it and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.harness import OTHER_ID, ROOT, RUN_ID, bits, launch, run, write_shard
from tests.run.earlier_model import EarlierGPT
from unbroken import __main__ as door
from unbroken import inference
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.commands import export_log, ls
from unbroken.data.stream import Stream
from unbroken.run.legacy import LegacyCheckpoint, data_position


def simulate(counts: list[int], batch: int, batches: int) -> tuple[int, int]:
    """Return (shard, offset) of the next batch, as its DistributedDataLoader has them after `batches` batches."""
    shard = offset = 0
    for _ in range(batches):
        offset += batch
        if offset + batch + 1 > counts[shard]:
            shard, offset = (shard + 1) % len(counts), 0
    return shard, offset


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("counts", [[1000], [700, 129, 1000], [129, 129], [513, 512]])
def test_the_rest_of_a_shard_is_dropped(tmp_path: Path, processes: int, counts: list[int]) -> None:
    """Batches of 2 x 16 tokens on each process, 2 of them in a step."""
    for index, count in enumerate(counts):
        write_shard(tmp_path / f"{index}.bin", [1] * count)
    stream = Stream.open(str(tmp_path / "*.bin"))
    args = {"batch_size": 2, "sequence_length": 16, "grad_accumulation_steps": 2 * processes}
    for step in range(40):
        position, line = data_position(LegacyCheckpoint("a.pt", step, args, processes), stream)
        shard, offset = simulate(counts, 32 * processes, 2 * step)
        assert stream.locate(position) == (stream.shards[shard], offset), (step, line)
        assert f"after {step} updates" in line and ("1 process" in line) == (processes == 1)


# ---- from here to the earlier program and back -----------------------------------------------------------------------


@pytest.fixture
def exported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of 10 steps, with step 5 as the earlier program has it in exported.pt."""
    monkeypatch.chdir(folder)
    assert door.main(["export", f"logs/{RUN_ID}/model_step000005.pt", "exported.pt", "--format", "earlier"]) == 0
    return folder


def test_the_earlier_program_loads_an_export_strictly(exported: Path) -> None:
    saved = torch.load("exported.pt", weights_only=True)
    assert set(saved) == {"model", "optimizer", "step", "code", "args", "run_id"}
    assert (saved["step"], saved["run_id"], saved["args"]["model"]) == (4, RUN_ID, "tiny")
    model = EarlierGPT(2, 2, 128, 512)
    compiled = torch.compile(model)  # as it is there when a checkpoint is loaded
    compiled.load_state_dict(saved["model"], strict=True)  # type: ignore[attr-defined]
    assert list(saved["model"]) == list(compiled.state_dict())  # type: ignore[attr-defined]
    tied = [saved["model"][f"_orig_mod.{name}.weight"] for name in ("lm_head", "transformer.wte")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    optimizer.load_state_dict(saved["optimizer"])
    ours = torch.load(f"logs/{RUN_ID}/model_step000005.pt", weights_only=True)
    for index, parameter in enumerate(model.parameters()):
        state = optimizer.state[parameter]
        assert bits(state["exp_avg"]) == bits(ours["optimizer"]["state"][index]["exp_avg"])
        assert state["exp_avg"].shape == parameter.shape and state["step"] == 5
    with CheckpointFile(f"logs/{RUN_ID}/model_step000005.pt") as file:
        here = inference.load_model(file)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), here(tokens), rtol=1e-4, atol=1e-5)
    for parameter in model.parameters():  # it goes on
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def test_there_and_back_the_weights_are_the_same_bits(exported: Path) -> None:
    """And the moments, the step and the rest of the training; each update is shown once."""
    ours = torch.load(f"logs/{RUN_ID}/model_step000005.pt", weights_only=True)
    end = torch.load(f"logs/{RUN_ID}/final.pt", weights_only=True)
    (exported / "logs").rename(exported / "before")
    home = exported / "logs" / RUN_ID
    home.mkdir(parents=True)
    log = home / f"{RUN_ID}.log"
    log.write_text("".join(f"s:{step} trn:{step}.500000\n" for step in range(7)))  # as that program writes it
    typed = ["--resume_from", "exported.pt", "--num_iterations", "5"]
    done = launch(exported, typed, processes=None, script=ROOT / "tests/counted_training.py").wait()
    assert json.loads((exported / "read.0.json").read_text())["legacy"] == 1
    assert done.code == 0 and "after 5 updates by its optimizer's own count" in done.text, done.text
    back = torch.load(f"logs/{RUN_ID}/final.pt", weights_only=True)
    assert back["step"] == 5 and bits(back["model"]) == bits(ours["model"])
    assert bits(back["optimizer"]["state"]) == bits(ours["optimizer"]["state"])
    done = run(exported, "--resume_from", RUN_ID, "--num_iterations", "10")
    again = torch.load(f"logs/{RUN_ID}/final.pt", weights_only=True)
    assert done.code == 0 and bits(again["model"]) == bits(end["model"]) and "lacks" not in done.text, done.text
    rows = list(export_log.rows_of(log))
    assert [row["step"] for row in rows] == list(range(1, 11)) and "repeated" not in done.text
    assert [row["train_loss"] for row in rows[:5]] == [0.5, 1.5, 2.5, 3.5, 4.5] and rows[5]["train_loss"] != 5.5
    listed = {line.file: (line.step, line.loss) for line in ls.look(home).checkpoints}
    assert listed["model_step000005.pt"] == (5, 4.5) and listed["final.pt"] == (10, round(rows[9]["train_loss"], 6))
    typed_anew = f"--init_from exported.pt --run_id {OTHER_ID} --input_bin data/train_*.bin --num_iterations 0"
    done = run(exported, *typed_anew.split())
    assert done.code == 0, done.text
    assert bits(torch.load(f"logs/{OTHER_ID}/final.pt", weights_only=True)["model"]) == bits(ours["model"])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["exported.pt"], "exported.pt exists; type another name, or --force to replace a file"),
        (["logs", "--force"], "logs exists; type another name, or --force to replace a file"),
        (["new.pt", "--dtype", "bf16"], "--dtype has no effect with --format earlier; leave it out"),
        (["nowhere/new.pt"], "cannot write nowhere/new.pt: Parent directory nowhere does not exist."),
    ],
)
def test_an_export_that_cannot_be_written_is_one_line(
    exported: Path, capsys: pytest.CaptureFixture[str], typed: list[str], line: str
) -> None:
    assert door.main(["export", RUN_ID, *typed, "--format", "earlier"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_an_export_is_not_exported_again(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main(["export", "exported.pt", "again.pt", "--format", "earlier"]) == 2
    assert "exported.pt: it is not of a run of this program, so it cannot be converted" in capsys.readouterr().err
    assert door.main(["export", RUN_ID, "exported.pt", "--format", "earlier", "--force"]) == 0
    assert torch.load("exported.pt", weights_only=True)["step"] == 9
