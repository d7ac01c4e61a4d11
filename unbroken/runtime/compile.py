"""torch.compile: what it is told, where its code is kept, and its start beside the loading of the checkpoint.

Importing the compiler takes two seconds of Python, and finding out about the processor one more, most of it in child
processes; loading is system calls and copies. On two cores they hardly disturb one another.
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
from unbroken.model.language_model import LanguageModel
from unbroken.runtime.settings import ResolvedSettings, cpp_compiler

LEAST_FREE = 256 << 20  # bytes, for compiled code to be kept with the run


class Compiler:
    """Gets ready from the moment it is made, in the background."""

    def __init__(self, config: Config, settings: ResolvedSettings, device: torch.device, folder: Path) -> None:
        """`folder` is where compiled code is kept, with the run, so that another machine need not make it again."""
        self._deterministic, self._device = config.deterministic == "on", device
        self._ready: threading.Thread | None = None
        if settings.compile:
            note = folder / "processor.json" if _keep_in(folder) else None
            self._ready = threading.Thread(target=_warm_up, args=(device, note), name="compiler", daemon=True)
            self._ready.start()

    def compile(self, model: LanguageModel) -> None:
        """Have the layers of `model` compiled at their first use, if the run is a compiled one."""
        if self._ready is None:
            return
        self._ready.join()
        if self._device.type == "cpu":
            _keep_fewer_activations()
        if self._deterministic:
            _fix_choices()
        model.compile_blocks()


def _warm_up(device: torch.device, note: Path | None) -> None:
    """What the first compilation would wait for."""
    with contextlib.suppress(Exception):  # another torch, a full disk: who compiles finds out
        importlib.import_module("torch._dynamo")  # first: it is what the main thread may want meanwhile
        importlib.import_module("torch._inductor.compile_fx")
        if device.type == "cpu" and note is not None:
            _look_at_processor(note)


def _look_at_processor(note: Path) -> None:
    """Have inductor know the vector instructions that it can use.

    It tries each in a child process, which takes more than a second. `note` says for which processor, compiler and
    torch all those that the processor has were found to work.
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
    """Inductor's own cache, keyed by code, versions and hardware. What is in it is run, so it must be ours alone."""
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


def _keep_fewer_activations() -> None:
    """Let compiled code compute casts, norms and the GELU again: measured, half of what is kept, for 2% of a step."""
    import torch._functorch.config as functorch

    if hasattr(functorch, "ban_recompute_materialized_backward"):
        functorch.ban_recompute_materialized_backward = False


def _fix_choices() -> None:
    """Inductor may choose kernels by timing them, which would give an attempt other bits than the one before."""
    import torch._inductor.config as inductor

    inductor.max_autotune = False
    if hasattr(inductor, "dynamic_scale_rblock"):  # torch 2.9 times two block sizes of looped reductions
        inductor.dynamic_scale_rblock = False
    inductor.coordinate_descent_tuning = False
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
