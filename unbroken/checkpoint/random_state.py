"""The state of this process's random number generators, as an object with a state_dict."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class RandomState:
    """The global generators of Python, numpy (if it is imported) and torch (CPU, and CUDA once it is in use).

    Put one into the tree that is saved: `{"model": model, "random": RandomState()}`. It holds nothing itself.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the present states as tensors and plain values."""
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if "numpy" in sys.modules:
            kind, keys, *rest = sys.modules["numpy"].random.get_state()
            state["numpy"] = (kind, keys.tolist(), *rest)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generators to a state that `state_dict` returned."""
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "numpy" in state:
            import numpy

            numpy.random.set_state(state["numpy"])
        if "cuda" in state:
            for index, each in enumerate(state["cuda"][: torch.cuda.device_count()]):  # fewer may be visible now
                torch.cuda.set_rng_state(each, index)
