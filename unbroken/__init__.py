"""GPT-2 pretraining whose interruptions leave no trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from unbroken.model.language_model import LanguageModel

__version__ = "0.1.0"


def load(what: str | Path, device: str = "cpu", model: str = "") -> tuple[LanguageModel, dict[str, Any]]:
    """Return the model of a checkpoint, in fp32 and ready for inference, and the other content of the checkpoint.

    `what` is a checkpoint file, a run's folder or a run_id. The content is a dict without the tensors: step, run_id,
    args, progress and so on. `model` is FILE.py:SIZE for a model of your own, whose code is run. Raises UserError, a
    ValueError of one line.
    """
    from unbroken.errors import UserError
    from unbroken.inference import load_model
    from unbroken.model import families
    from unbroken.run import locate

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r:.40}: it must be auto, cpu or cuda")
    if model:
        families.declare(model)
    with locate.open_newest(str(what)) as file:
        info = {key: value for key, value in file.values.items() if key not in ("model", "optimizer")}
        return load_model(file, device), info
