"""What a checkpoint records about the machine and the source code, and how later changes are reported."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from unbroken.distributed.world import World
from unbroken.host import hostname
from unbroken.model.families import declared_sources
from unbroken.runtime.settings import ResolvedSettings
from unbroken.text import printable

PACKAGE = Path(__file__).resolve().parents[1]


def describe_environment(settings: ResolvedSettings, world: World) -> dict[str, Any]:
    """Return the `environment` of a checkpoint: plain values, without secrets or environment variables."""
    cuda = world.device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or ""),
        "device": torch.cuda.get_device_name(world.device) if cuda else _cpu_name(),
        "cpu_capability": str(torch.backends.cpu.get_cpu_capability()),
        "python": platform.python_version(),
        "host": hostname(),
        "world_size": world.size,
        "dtype": settings.dtype,
        "compile": settings.compile,
        "threads": settings.threads,
        "git_commit": git_commit(),
    }


# bf16 matrix products of a GPU without sparsity, in FLOP/s, from NVIDIA's data sheets; the first name that fits.
PEAK_FLOPS = {
    **{"B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12},
    **{"A100": 312e12, "A40": 150e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12},
    **{"RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12},
}


def peak_flops(environment: dict[str, Any], num_gpus: int) -> float | None:
    """Return the peak FLOP/s of `num_gpus` GPUs by their data sheet; None if it is not known."""
    name = str(environment.get("device", ""))
    whole = not re.search(r"\b(MIG|Laptop)\b", name)
    peak = next((flops for known, flops in PEAK_FLOPS.items() if whole and re.search(rf"\b{known}\b", name)), None)
    return peak * num_gpus if peak and environment["dtype"] == "bf16" else None


DRIFT_NAMES = {
    "torch": "torch",
    "cuda": "CUDA",
    "device": "the processor",
    "cpu_capability": "the CPU's vector instructions",
    "dtype": "--dtype",
    "compile": "--compile",
    "threads": "the number of CPU threads",
}


def environment_drift(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each difference that may change bits; on a GPU the CPU and its threads change none."""
    on_gpu = saved.get("device") not in (None, _cpu_name()) and saved["device"] == now.get("device")
    names = {key: name for key, name in DRIFT_NAMES.items() if not (on_gpu and key in ("cpu_capability", "threads"))}
    return [
        f"{name} changed from {_display(saved[key])} to {_display(now[key])}: bits may differ from here"
        for key, name in names.items()
        if key in saved and saved[key] != now[key]
    ]


def _display(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value == "" else printable(value, 80)


# Earlier releases that compute the same bits on a CPU as this one (none of them was run on a GPU), by the digest of the
# sources in their checkpoints.
SAME_BITS = {
    # 2026-11-25, before the modules moved into packages
    "99f95b483a44306234bd59d63dcb3f22049573d6d8a87edb201e83e1eed02e89",
}


def read_sources() -> dict[str, str]:
    """Return the text of every source file of the package, by its path below it, and of a model of the user's."""
    files = sorted(PACKAGE.rglob("*.py"))
    own = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in files}
    return own | declared_sources()


def sources_drift(saved: dict[str, Any], now: dict[str, str], saved_code: object, code: str) -> list[str]:
    """Return a line that names the source files which differ from those of the checkpoint.

    The list is empty if the checkpoint is of a release in SAME_BITS and this checkout has no local changes.

    Args:
        saved: The checkpoint's `sources`, untrusted.
        now: The present sources.
        saved_code: The checkpoint's `code`, untrusted.
        code: The present entry script.
    """
    changed = sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name) and _trains(name))
    if saved_code != code:
        changed.insert(0, "train_gpt2_mod.py")
    same_bits = sources_digest(saved, saved_code) in SAME_BITS and not git_commit().endswith("+")
    if not changed or same_bits:
        return []
    names = [printable(name, 80) for name in changed[:3]]
    shown = ", ".join(names) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    return [f"the source changed since the checkpoint ({shown}): bits may differ from here"]


def sources_digest(sources: dict[str, Any], code: object) -> str:
    """Return the SHA-256 of a checkpoint's training sources and entry script; untrusted values."""
    texts = {name: text for name, text in sources.items() if _trains(name)} | {"train_gpt2_mod.py": code}
    return hashlib.sha256(json.dumps(texts, sort_keys=True, default=str).encode()).hexdigest()


def _trains(name: str) -> bool:
    """Return whether a source file has a part in training; the tools have none."""
    return not name.startswith("commands/") and name != "__main__.py"


@functools.cache
def git_commit() -> str:
    """Return the commit of the checkout, with `+` if files were changed; "" outside git."""
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


def missing_gpu(wanted: str, device: torch.device) -> str:
    """Return a warning if this torch is built for GPUs, finds none, and no CPU was asked for; else ""."""
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip or ''}"
    if wanted == "cpu" or device.type != "cpu" or not (torch.version.cuda or torch.version.hip):
        return ""
    return (
        f"this torch is built for {built_for} but finds no GPU: training on the CPU, perhaps a hundred times slower;"
        " look at nvidia-smi, or type --device cpu if that is meant"
    )


def peak_memory(device: torch.device) -> str:
    """Return the line about peak memory for the end of a run."""
    if device.type == "cuda":
        return f"peak memory consumption: {torch.cuda.max_memory_allocated(device) // 2**20} MiB"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac, in KiB elsewhere
    return f"peak memory consumption: {peak // (2**20 if sys.platform == 'darwin' else 1024)} MiB"
