"""GPT-2 pretraining whose interruptions leave no trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from unbroken.model.language_model import LanguageModel

__version__ = "0.1.0"


def load(what: str | Path, device: str = "cpu") -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint, ready to use, and what the checkpoint says of it.

    `what` is a checkpoint file, a run's folder or a run_id. The weights are fp32; the dict has everything but the
    tensors: step, run_id, args, progress, ... Raises UserError, a ValueError of one line.
    """
    from unbroken.errors import UserError
    from unbroken.inference import load_model
    from unbroken.run import locate

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r:.40}: there are auto, cpu and cuda")
    with locate.open_newest(str(what)) as file:
        info = {key: value for key, value in file.values.items() if key not in ("model", "optimizer")}
        return load_model(file, device), info
