"""In every Python process of a command: replace torch's CUDA kernels as soon as torch is imported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

OPS = Path(__file__).resolve().parent.parent / "ops.py"


class AfterTorch:
    """A finder that calls `ops.install()` once torch has been imported."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            ops = importlib.util.spec_from_file_location("simulated_gpu_ops", OPS)
            assert ops is not None and ops.loader is not None
            kernels = importlib.util.module_from_spec(ops)
            ops.loader.exec_module(kernels)
            kernels.install()

        spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, AfterTorch())  # type: ignore[arg-type]
