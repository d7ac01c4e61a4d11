"""torch.compile: its settings, the folder of compiled code, and its start while the checkpoint is loaded.

Importing the compiler takes two seconds of Python, and testing the processor one more, most of it in child processes.
Loading is system calls and copies, so on two cores they hardly disturb one another.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import shutil
import stat
import threading
from pathlib import Path

import torch

from unbroken.config import Config
from unbroken.host import hostname
from unbroken.model.kernels import load_kernels
from unbroken.model.language_model import LanguageModel
from unbroken.runtime.settings import ResolvedSettings, cpp_compiler

LEAST_FREE = 256 << 20  # bytes, for compiled code to be kept with the run


class Compiler:
    """A compiler that gets ready in the background as soon as it is constructed."""

    def __init__(self, config: Config, settings: ResolvedSettings, device: torch.device, folder: Path) -> None:
        """Start in the background if the run is compiled.

        Args:
            config: the flags.
            settings: what `auto` means on this machine.
            device: where the model is.
            folder: keeps compiled code with the run, so that another machine need not compile again.
        """
        self._deterministic, self._device = config.deterministic == "on", device
        self._ready: threading.Thread | None = None
        if settings.compile:
            note = folder / "processor.json" if _keep_in(folder) else None
            self._ready = threading.Thread(target=_warm_up, args=(device, note), name="compiler", daemon=True)
            self._ready.start()

    def compile(self, model: LanguageModel) -> None:
        """Make the layers of `model` be compiled at their first use, if the run is compiled."""
        if self._ready is None:
            return
        self._ready.join()
        _allow_shapes()
        if self._device.type == "cpu":
            _keep_fewer_activations()
        if self._deterministic:
            _fix_choices()
        load_kernels(self._device)
        model.compile_blocks()


def _warm_up(device: torch.device, note: Path | None) -> None:
    """Import what the first compilation needs, and test the processor."""
    with contextlib.suppress(Exception):  # another torch, a full disk: the first compilation raises the error
        importlib.import_module("torch._dynamo")  # first: it is what the main thread may want meanwhile
        importlib.import_module("torch._inductor.compile_fx")
        if device.type == "cpu" and note is not None:
            _look_at_processor(note)


def _look_at_processor(note: Path) -> None:
    """Tell inductor which vector instructions work.

    Inductor tries each in a child process, which takes more than a second: 7.7 s instead of 5.9 s to the first step of
    a d2. `note` records for which processor, compiler and torch all of them were found to work.
    """
    from torch._inductor import config as inductor
    from torch._inductor import cpu_vec_isa as found

    if inductor.cpp.vec_isa_ok is not None:
        return
    with inductor.patch({"cpp.vec_isa_ok": True}):  # no longer: it is part of the key of compiled code
        untried = [str(each) for each in found.valid_vec_isa_list()]
    compiler = shutil.which(cpp_compiler()) or ""
    told = json.dumps([untried, compiler, hostname(), str(torch.__version__), platform.python_version()])
    try:
        if note.read_text("utf-8") == told:
            return
    except (OSError, ValueError):
        pass
    found.valid_vec_isa_list.cache_clear()
    if [str(each) for each in found.valid_vec_isa_list()] == untried:
        with contextlib.suppress(OSError):
            note.write_text(told, "utf-8")


def _keep_in(folder: Path) -> bool:
    """Set the folder of inductor's cache, which is keyed by code, versions and hardware. Return whether that was done.

    The code in it is executed, so only the owner may be able to write to it.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return False
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if shutil.disk_usage(folder).free < LEAST_FREE:
            return False  # what cannot be compiled for want of room would end the run
    except OSError:
        return False
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        return False
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve())
    return True


def _allow_shapes() -> None:
    """Let all shapes be compiled: from the ninth on the compiler would go on without compiling, with other bits.

    An attempt that looks for a batch size, halves it and validates has about as many; the one after it has fewer.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = 64


def _keep_fewer_activations() -> None:
    """Make compiled code recompute casts, norms and the GELU: half the kept activations for 2% of a step."""
    with contextlib.suppress(ImportError):  # another torch: it keeps more
        import torch._functorch.config as functorch

        if hasattr(functorch, "ban_recompute_materialized_backward"):
            functorch.ban_recompute_materialized_backward = False


def _fix_choices() -> None:
    """Stop inductor from choosing kernels by timing, which would give each attempt other bits."""
    import torch._inductor.config as inductor

    for name in ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise", "coordinate_descent_tuning"):
        setattr(inductor, name, False)
    inductor.triton.autotune_pointwise = False  # `deterministic` leaves this choice to timing
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
    else:  # torch 2.9
        inductor.dynamic_scale_rblock = False  # two block sizes of looped reductions
        inductor.shape_padding = False  # matrix products of odd sizes with and without padding
