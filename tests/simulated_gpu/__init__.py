"""GPUs and NCCL that are simulated under torch's CUDA build: whole trainings on `--device cuda` without a GPU.

All of torch above its kernels is real: the allocators of device memory and of pinned memory, streams, events,
autograd's threads, ProcessGroupNCCL, inductor and Triton. Below it are `cudart.cpp`, `nccl.cpp` and `ops.py`. So wrong
calls, missing waits, memory that is reused too early, contexts on another rank's GPU, collectives in different orders,
lack of memory and kernels chosen by timing show here. What kernels compute and how fast they are does not; compiled
kernels are compiled and loaded, but compute nothing.

    python -m tests.simulated_gpu --gpus 4 torchrun --nproc_per_node=4 train_gpt2_mod.py --compile off ...
    python -m tests.simulated_gpu --gpus 4 python -m pytest tests/promises
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch

from tests.simulated_gpu.build import build

HERE = Path(__file__).resolve().parent


def missing() -> str:
    """Return why GPUs cannot be simulated here; "" if they can."""
    if torch.version.cuda is None:
        return "needs torch's CUDA build"
    if "SIM_GPUS" not in os.environ and torch.cuda.is_available():
        return "there is a real GPU"
    return "" if shutil.which("g++") and shutil.which("nm") else "needs g++ and binutils"


def environment(gpus: int = 1, **settings: object) -> dict[str, str]:
    """Return the environment of a command that finds so many GPUs; builds the libraries if that was not done.

    `settings`: those of cudart.cpp without SIM_GPU_, for example `mib=64`.
    """
    sources = [HERE / name for name in ("build.py", "cudart.cpp", "nccl.cpp")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"simulated-gpu-{os.getuid()}-{key}"
    if not folder.is_dir():
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        build(made)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(made)
    preload = next(folder.glob("libcudart.so.*"))
    paths = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": HERE / "site"}
    lists = {name: os.pathsep.join(filter(None, [str(path), os.environ.get(name)])) for name, path in paths.items()}
    named = {f"SIM_GPU_{name.upper()}": str(value) for name, value in settings.items()}
    return {**lists, "LD_PRELOAD": str(preload), "SIM_GPUS": str(gpus), **named}
