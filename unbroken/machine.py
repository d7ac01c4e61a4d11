"""The machine a run trains on: what is chosen for it once, what a checkpoint remembers of it, how drift is told."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unbroken.checkpoint.schema import printable
from unbroken.config import Config
from unbroken.distributed import World, cores, host
from unbroken.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Choices:
    """What `auto` became. Part of the run's bits, so a resumed run keeps them unless others are typed."""

    dtype: str
    compile: bool
    threads: int

    @classmethod
    def make(cls, config: Config, saved: dict[str, Any], device: torch.device, typed: dict[str, Any]) -> Choices:
        """Typed, else the run's own, else the best for this machine. `saved` is a checkpoint's `environment`."""
        dtype = config.dtype if config.dtype != "auto" else _saved(saved, "dtype", str) or _best_dtype(device)
        compiled = config.compile == "on" if config.compile != "auto" else _saved(saved, "compile", bool)
        threads = config.threads if typed.get("threads") else _saved(saved, "threads", int) or config.threads
        if dtype not in ("bf16", "fp32") or not 0 <= threads <= 4096:
            raise UserError("the checkpoint's `environment` is damaged: type --dtype and --threads to go on without it")
        choices = cls(dtype, device.type == "cuda" if compiled is None else compiled, threads or cores())
        if choices.compile and device.type == "cpu" and shutil.which(cpp_compiler()) is None:
            raise UserError(
                f"compiled code needs a C++ compiler, and there is no {cpp_compiler()}: install it, or type"
                " --compile off"
            )
        return choices

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """bf16 matrix products over fp32 master weights, or plain fp32."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


def cpp_compiler() -> str:
    """What inductor makes code for a CPU with."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _saved(saved: dict[str, Any], key: str, kind: type) -> Any:
    value = saved.get(key)
    return value if type(value) is kind else None


def _best_dtype(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # Without these instructions a CPU emulates bf16: measured 100 times slower than fp32.
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported: Callable[[], bool] | None = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return "bf16"
    return "fp32"


def prepare(config: Config, choices: Choices, world: World) -> list[str]:
    """Set threads, determinism and matrix precision of this process; returns what the user should know."""
    torch.set_num_threads(choices.threads)
    if world.device.type == "cpu":
        _keep_freed_memory()
    torch.set_float32_matmul_precision("high" if choices.dtype == "bf16" else "highest")
    notes = []
    if config.deterministic == "on":
        # warn_only would silently keep the nondeterministic backward of attention.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Not the public function: it imports the whole compiler, 2.4 seconds that an eager run has no use for.
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        # Filling costs time, and nothing reads what it fills.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    else:
        notes.append("--deterministic off: a resumed run may differ in its bits from an unbroken one")
    if world.device.type == "cpu" and choices.threads * world.local_size > cores():
        notes.append(
            f"{world.local_size} processes x {choices.threads} threads on {cores()} cores: exact but slow;"
            " --threads 1 from the start of a run would be faster"
        )
    return notes


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning each to the kernel, and torch ask for huge pages.

    Otherwise every large activation and gradient is fresh pages: measured, half of a small model's step. Filling
    1.5 GB with pages takes 0.2 seconds in huge ones and 0.6 to 3 in small ones.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # c10 reads it at its first large allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # mallopt(3); other C libraries lack it
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def describe(choices: Choices, world: World) -> dict[str, Any]:
    """The `environment` of a checkpoint: plain values, no secrets, nothing of the environment variables."""
    cuda = world.device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or ""),
        "device": torch.cuda.get_device_name(world.device) if cuda else _cpu_name(),
        "cpu_capability": str(torch.backends.cpu.get_cpu_capability()),
        "python": platform.python_version(),
        "host": host(),
        "world_size": world.size,
        "dtype": choices.dtype,
        "compile": choices.compile,
        "threads": choices.threads,
        "git_commit": git_commit(),
    }


# bf16 matrix products of a GPU without sparsity, in FLOP/s, from NVIDIA's data sheets; the first name that fits.
PEAKS = {
    **{"B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12},
    **{"A100": 312e12, "A40": 150e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12},
    **{"RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12},
}


def peak_flops(environment: dict[str, Any]) -> float | None:
    """Of all processes' GPUs together, what their data sheets say; None where it is not known."""
    name = str(environment.get("device", ""))
    whole = not re.search(r"\b(MIG|Laptop)\b", name)
    peak = next((flops for known, flops in PEAKS.items() if whole and re.search(rf"\b{known}\b", name)), None)
    return peak * environment["world_size"] if peak and environment["dtype"] == "bf16" else None


DRIFT = {
    "torch": "torch",
    "cuda": "CUDA",
    "device": "the processor",
    "cpu_capability": "the CPU's vector instructions",
    "dtype": "--dtype",
    "compile": "--compile",
    "threads": "the number of CPU threads",
}


def drift(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each thing that may change bits and is not what the checkpoint was made with."""
    return [
        f"{name} changed from {_told(saved[key])} to {_told(now[key])}: bits may differ from here"
        for key, name in DRIFT.items()
        if key in saved and saved[key] != now[key]
    ]


def _told(value: Any) -> str:
    return "none" if value == "" else printable(value, 80)


def sources() -> dict[str, str]:
    """The text of every source file of the package, by its path below the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in files}


def sources_drift(saved: dict[str, Any], now: dict[str, str], saved_code: object, code: str) -> list[str]:
    """One line naming the source files that are not what the checkpoint was made with."""
    changed = sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name) and _trains(name))
    if saved_code != code:
        changed.insert(0, "train_gpt2_mod.py")
    if not changed:
        return []
    names = [printable(name, 80) for name in changed[:3]]
    shown = ", ".join(names) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    return [f"the source changed since the checkpoint ({shown}): bits may differ from here"]


def _trains(name: str) -> bool:
    """The tools have no part in a training run."""
    return not name.startswith("commands/") and name != "__main__.py"


def git_commit() -> str:
    """The commit of the checkout the program runs from, with `+` where files were changed; empty outside git."""
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> str:
    """One line for the end of a run."""
    if device.type == "cuda":
        return f"peak memory consumption: {torch.cuda.max_memory_allocated(device) // 2**20} MiB"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, in KiB elsewhere
    return f"peak memory consumption: {peak // (2**20 if sys.platform == 'darwin' else 1024)} MiB"
