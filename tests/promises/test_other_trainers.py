"""The examples for Lightning and transformers, with the real packages: an interrupted training ends with the same bits.

Neither package belongs to the environment of the tests; where one is absent, its test is skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import unbroken.checkpoint as ub
from tests.harness import ROOT, bits

MOST_LINES = 60


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Numbers:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index)) + torch.rand(4)


@pytest.mark.parametrize("name", ["lightning_checkpoint_io", "transformers_callback"])
def test_each_is_short(name: str) -> None:
    assert len((ROOT / f"examples/{name}.py").read_text("utf-8").splitlines()) <= MOST_LINES


def test_lightning_continues_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    plugin = example("lightning_checkpoint_io").UnbrokenCheckpointIO

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 4})
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            loss = self.net(batch).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]

    def fit(folder: Path, epochs: int, resume: Path | None = None) -> Any:
        torch.manual_seed(1)
        model = Model()
        saves = ModelCheckpoint(folder, save_top_k=1, monitor="loss", mode="min", save_last=True)
        quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(
            max_epochs=epochs, plugins=[plugin()], callbacks=[saves], log_every_n_steps=1, **quiet
        )
        data = torch.utils.data.DataLoader(torch.arange(32.0).reshape(8, 4), batch_size=4)
        trainer.fit(model, data, ckpt_path=resume)
        return trainer

    fit(tmp_path / "straight", 4)
    fit(tmp_path / "cut", 2)
    trainer = fit(tmp_path / "cut", 4, tmp_path / "cut/last.ckpt")
    straight, resumed = (ub.load(tmp_path / name / "last.ckpt") for name in ("straight", "cut"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert bits(straight[key]) == bits(resumed[key]), key
    assert straight["hyper_parameters"] == {"width": 4}
    best = trainer.checkpoint_callback.best_model_path
    assert sorted(path.name for path in (tmp_path / "cut").glob("*.ckpt")) == sorted([Path(best).name, "last.ckpt"])
    weight = bytes(resumed["state_dict"]["net.0.weight"].view(torch.uint8).flatten().tolist())
    content = (tmp_path / "cut/last.ckpt").read_bytes()
    (tmp_path / "cut/last.ckpt").write_bytes(content.replace(weight, bytes(len(weight))))
    with pytest.raises(ub.DamagedError, match="last.ckpt"):
        fit(tmp_path / "cut", 5, tmp_path / "cut/last.ckpt")


class Stopped(Exception):
    pass


def test_transformers_continues_with_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    made = example("transformers_callback")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).square().mean()}

    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise Stopped

    def train(name: str, stop: bool = False) -> tuple[Any, dict[int, float]]:
        torch.manual_seed(1)
        quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
        args = transformers.TrainingArguments(
            str(tmp_path / "out"),
            **{"max_steps": 9, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            **{"logging_steps": 1, "warmup_steps": 3, "learning_rate": 0.01, **quiet},
        )
        samples = made.Samples(Numbers(), seed=3)
        callbacks = [made.UnbrokenCallback(str(tmp_path / name), samples), *([Stop()] if stop else [])]
        collate = lambda rows: {"x": torch.stack(rows)}  # noqa: E731
        trainer = transformers.Trainer(Model(), args, collate, samples, callbacks=callbacks)
        try:
            trainer.train()
        except Stopped:
            callbacks[0].writer.close()  # a killed process would lose the save in progress, and release the lock
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        return bits({**trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}), losses

    straight, losses = train("straight")
    train("cut", stop=True)
    assert ub.latest(tmp_path / "cut") == tmp_path / "cut/model_step000004.pt"
    resumed, again = train("cut")
    assert resumed == straight
    # The Trainer logs step 4 after the callback, and divides the first mean after a start by all steps before it.
    assert {step: losses[step] for step in losses if step not in (4, 5)} == {s: again[s] for s in again if s != 5}
