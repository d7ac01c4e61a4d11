"""Settings resolved for this machine (dtype, compile, threads) and applied to the process."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unbroken.config import Config
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.host import available_cores
from unbroken.text import format_count

TRITON_CAPABILITY = (7, 0)  # compute capability from which inductor uses Triton
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>


@dataclass(frozen=True)
class ResolvedSettings:
    """The values of `auto` on this machine.

    They determine bits, so a resumed run keeps them unless others are typed.
    """

    dtype: str
    compile: bool
    threads: int

    @classmethod
    def resolve(
        cls, config: Config, saved: dict[str, Any], device: torch.device, typed: dict[str, Any]
    ) -> ResolvedSettings:
        """Return the typed values, else those of the run, else the best for this machine. Raises UserError.

        Args:
            config: the flags.
            saved: the `environment` of the checkpoint, untrusted; empty for a new run.
            device: where to train.
            typed: the typed flags.
        """
        dtype = config.dtype if config.dtype != "auto" else _saved(saved, "dtype", str) or _best_dtype(device)
        compiled = config.compile == "on" if config.compile != "auto" else _saved(saved, "compile", bool)
        threads = config.threads if typed.get("threads") else _saved(saved, "threads", int) or config.threads
        if dtype not in ("bf16", "fp32") or not 0 <= threads <= 4096:
            raise UserError("the checkpoint's `environment` is damaged: type --dtype and --threads to go on without it")
        compiled = _compiles_by_default(device) if compiled is None else compiled
        settings = cls(dtype, compiled, threads or available_cores())
        missing = _missing_for_compile(device) if settings.compile else ""
        if missing:
            raise UserError(f"compiled code needs {missing}: install it, or type --compile off")
        return settings

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context for bf16 matrix products over fp32 weights, or for plain fp32."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


def cpp_compiler() -> str:
    """Return the compiler that inductor uses for a CPU."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def _compiles_by_default(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TRITON_CAPABILITY


def _missing_for_compile(device: torch.device) -> str:
    """Return what torch.compile lacks on this machine; "" if it lacks nothing."""
    if device.type == "cpu":
        return "" if shutil.which(cpp_compiler()) else f"a C++ compiler, and there is no {cpp_compiler()}"
    if not _compiles_by_default(device):
        return "a GPU with compute capability 7.0 for Triton, and this one is older"
    if importlib.util.find_spec("triton") is None:
        return "Triton, and there is no package of that name"
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "a C compiler for Triton, and there is no gcc or clang"
    scheme = sysconfig.get_default_scheme()  # that of Debian has another folder than the one where Triton looks
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    return "" if header.exists() else f"the headers of Python for Triton (python3-dev), and there is no {header}"


def _saved(saved: dict[str, Any], key: str, kind: type) -> Any:
    value = saved.get(key)
    return value if type(value) is kind else None


def _best_dtype(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Without these instructions a CPU emulates bf16: measured 100 times slower than fp32.
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported: Callable[[], bool] | None = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return "bf16"
    return "fp32"


def apply_settings(config: Config, settings: ResolvedSettings, world: World) -> list[str]:
    """Set threads, determinism and matrix precision of this process. Return lines for the user."""
    torch.set_num_threads(settings.threads)
    if world.device.type == "cpu":
        _keep_freed_memory()
    if world.device.type == "cuda":
        # The gradient of the head sums over 50,304 columns: partial sums in bf16 would be too coarse.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("high" if settings.dtype == "bf16" else "highest")
    notes = []
    if config.deterministic == "on":
        # warn_only would silently keep the nondeterministic backward of attention.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Not the public function: it imports the whole compiler, 2.4 seconds that an eager run has no use for.
        getattr(torch._C, "_set_deterministic_algorithms", torch.use_deterministic_algorithms)(True, warn_only=False)
        # Filling costs time, and nothing reads what it fills.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    else:
        notes.append("--deterministic off: a resumed run may differ in its bits from an unbroken one; no --replay")
    if world.via_host_memory:
        notes.append(
            "processes share a GPU: gradients go through host memory, exact but slow; one for each GPU is faster"
        )
    if world.device.type == "cpu" and settings.threads * world.local_size > available_cores():
        notes.append(
            f"{format_count(world.local_size, 'process')} x {format_count(settings.threads, 'thread')} on"
            f" {format_count(available_cores(), 'core')}: exact but slow;"
            " --threads 1 from the start of a run would be faster"
        )
    return notes


def _keep_freed_memory() -> None:
    """Make glibc reuse large blocks instead of returning each to the kernel, and torch ask for huge pages.

    Otherwise every large activation and gradient is fresh pages: half of a small model's step, measured. Filling 1.5 GB
    with huge pages takes 0.2 s, with small ones 0.6 to 3 s.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # c10 reads it at its first large allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # mallopt(3); other C libraries lack it
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
