"""The front door: one way for all tests to run the program, interrupt it and look at what it left behind."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tests import fork_server

ROOT = Path(__file__).resolve().parent.parent
GPT2_BPE = ROOT / "data/gpt2_bpe"
if not GPT2_BPE.is_dir():
    GPT2_BPE = ROOT.parent / "shared/gpt2_bpe"  # need not be there either
SCRIPT = ROOT / "train_gpt2_mod.py"
PACED = ROOT / "tests/paced_training.py"
RUN_ID = "691bd736-d91a-48bf-a7a9-4b17d3ec0733"  # the guide's

# A tiny run: seconds on two cores, and every step depends on all that came before it.
TINY = {
    "model": "tiny",
    "batch_size": 2,
    "grad_accumulation_steps": 4,
    "sequence_length": 16,
    "num_iterations": 20,
    "learning_rate": 1e-3,
    "warmup_iters": 2,
    "warmdown_iters": 4,
    "weight_decay": 0.1,
    "threads": 1,
    "save_every": 5,
}

if torch.cuda.is_available():
    TINY["compile"] = "off"  # `auto` compiles on a GPU, which takes longer than these runs

OTHER_ID = "0b8e4f86-92e5-4d6f-8f3a-4a5a2f7b9c11"

SHORT = {"run_id": RUN_ID, "num_iterations": 3, "save_every": 2, "warmup_iters": 0, "warmdown_iters": 0}


def write_shard(path: Path, tokens: Sequence[int] | np.ndarray) -> Path:
    """An llm.c shard: 256 little-endian int32, then uint16 tokens."""
    array = np.asarray(tokens, dtype="<u2")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<3i", 20240520, 1, len(array)).ljust(1024, b"\0") + array.tobytes())
    return path


def learnable(count: int, start: int = 0, period: int = 97) -> np.ndarray:
    """Tokens that a model can learn: noise would give a loss that hides a lost optimizer."""
    index = np.arange(start, start + count)
    return (index * index + 3 * index) % period


def write_corpus(folder: Path, train_tokens: int = 6000, val_tokens: int = 700, shards: int = 2) -> None:
    """data/train_*.bin and data/val_000.bin below `folder`."""
    size = train_tokens // shards
    for shard in range(shards):
        write_shard(folder / f"data/train_{shard:03d}.bin", learnable(size, shard * size))
    write_shard(folder / "data/val_000.bin", learnable(val_tokens, 10**6))


def arguments(changes: dict[str, Any] | None = None) -> list[str]:
    """The command line of a tiny run, with some flags changed; None leaves a flag out, True types it bare."""
    flags = {"input_bin": "data/train_*.bin", "input_val_bin": "data/val_*.bin", **TINY, **(changes or {})}
    return as_flags(flags)


def as_flags(flags: dict[str, Any]) -> list[str]:
    typed = []
    for name, value in flags.items():
        if value is not None:
            typed += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return typed


@dataclass
class Done:
    """A finished command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        return self.out + self.err


class Hold:
    """A file beside a folder that says up to which step a training there may go: see paced_training.py."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder.with_name(f"{folder.name}.hold-{uuid.uuid4().hex}")
        self.at(step)

    def at(self, step: int, commits: bool = True) -> None:
        """`commits`: whether checkpoints get their names."""
        new = self.path.with_suffix(".new")
        new.write_text(str(step) if commits else f"{step} uncommitted")
        new.replace(self.path)  # it is read at any time

    @property
    def env(self) -> dict[str, str]:
        return {"HOLD": str(self.path)}


@dataclass
class Running:
    """A command under way, in a process group of its own so that all of it can be killed."""

    process: subprocess.Popen[str]
    folder: Path
    held: Hold | None = None
    started: float = field(default_factory=time.monotonic)

    def release(self, step: int = 10**9, commits: bool = True) -> None:
        """Let a training that is held take more steps, up to this one; `commits`: checkpoints get their names."""
        assert self.held is not None
        self.held.at(step, commits)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """The signal, to every process of the command: torchrun puts its workers into groups of their own."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def kill_at(self, step: int, later: float = 0.0) -> None:
        """SIGKILL for all of it once the log has this step, or some seconds later: in any case before its end."""
        self.kill_when(lambda: last_step(self.folder) >= step, later)

    def kill_when(self, condition: Callable[[], bool], later: float = 0.0) -> None:
        """SIGKILL for all of it once something is true, or some seconds later; a training must be held before its end.

        Or on a busy machine it would end before it is killed.
        """
        self.until(condition)
        time.sleep(later)
        self.kill()
        done = self.wait()
        assert done.code == -signal.SIGKILL, f"it ended before it was killed\n{done.text}"

    def workers(self) -> list[int]:
        """The pids of the training processes; a process that has just ended has no command line."""
        lines = {pid: command_line(pid) for pid in descendants(self.process.pid)}
        return [pid for pid, line in lines.items() if line and not any(other in line for other in OTHERS)]

    def kill_worker(self, number: int) -> None:
        """SIGKILL for one of the training processes, which torchrun notices and ends the others."""
        workers = self.workers()
        os.kill(workers[number % len(workers)], signal.SIGKILL)
        self.until(lambda: not set(workers) & set(self.workers()))

    def wait(self, timeout: float = 240) -> Done:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"timed out after {timeout}s\n{out}\n{err}") from None
        return Done(self.process.returncode, out, err or "", time.monotonic() - self.started)

    def follow(self, stream: str, text: str) -> str:
        """Read what the program says on "out" or "err" until it says this, and return it."""
        pipe = self.process.stdout if stream == "out" else self.process.stderr
        said = ""
        for line in pipe or ():
            said += line
            if text in line:
                return said
        raise AssertionError(f"it never said {text!r}\n{said}{self.wait().text}")

    def until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Wait until something is true of the files, or fail with what the program said."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                if condition():
                    return
                self.kill()
                out, err = self.process.communicate()
                raise AssertionError(f"it never happened (exit code {self.process.returncode})\n{out}\n{err}")
            time.sleep(0.005)


OTHERS = (b"torch.distributed.run", b"fork_server.py")  # processes of a command that do not train


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on, deepest first."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)][::-1]
    except psutil.NoSuchProcess:
        return []


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def free_port() -> int:
    """Below the ports that outgoing connections get, so that none of those takes it before it is listened on."""
    while True:
        port = random.randrange(12_000, 30_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return port
        except OSError:
            pass


def environment(changes: dict[str, str] | None = None) -> dict[str, str]:
    """What a command finds: without what pytest's own torchrun, inductor or W&B have set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "WANDB", "COV"))}
    for name in ("TORCHINDUCTOR_CACHE_DIR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline", **(changes or {})}


def launch(
    folder: Path,
    typed: Sequence[str],
    processes: int | None = 1,
    torchrun: Sequence[str] = (),
    env: dict[str, str] | None = None,
    script: Path = SCRIPT,
    pace: float = 0.0,
    hold: int | None = None,
    fresh: bool = False,
) -> Running:
    """Start the program in `folder`.

    `processes=None` is plain python without torchrun; `pace`: seconds more a step; `hold`: the step behind which it
    waits for `release`; `fresh`: Python itself is started, not a fork of one that has imported torch (fork_server.py).
    """
    held = None if hold is None else Hold(folder, hold)
    if pace or held:
        script, env = PACED, {"PACE": str(pace), **(held.env if held else {}), **(env or {})}
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    command = [*(runner if processes is not None else [sys.executable]), str(script), *typed]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = fork_server.Popen(command, cwd=folder, env=environment(env), text=True, fresh=fresh, **pipes)
    return Running(process, folder, held)


def run(folder: Path, *typed: str) -> Done:
    """The command line as it is, by plain python."""
    return launch(folder, typed, processes=None).wait()


def train(
    folder: Path, changes: dict[str, Any] | None = None, processes: int | None = 1, check: bool = True, **more: Any
) -> Done:
    """Run a tiny training to its end."""
    done = launch(folder, arguments(changes), processes, **more).wait()
    if check:
        assert done.code == 0, done.text
    return done


def trained(folder: Path, changes: dict[str, Any]) -> Path:
    """The folder, with a corpus and a finished run of one process."""
    write_corpus(folder)
    train(folder, changes, processes=None)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    """Damage a checkpoint in the middle of its tensors."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # another name of it stays as it is
    path.write_bytes(content)


def has_open(pid: int, name: str) -> bool:
    """Whether a process has a file of this name open."""
    try:
        return any(os.readlink(link).endswith(f"/{name}") for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def run_folder(folder: Path) -> Path:
    """The folder of the only run below `folder`."""
    found = [path for path in (folder / "logs").iterdir() if path.is_dir()]
    assert len(found) == 1, found
    return found[0]


def log_path(folder: Path) -> Path:
    found = list(folder.glob("logs/*/*.log"))
    assert len(found) == 1, found
    return found[0]


def log_lines(folder: Path) -> list[str]:
    """The log's events, without the lines that begin an attempt."""
    return [line for line in log_path(folder).read_text().splitlines() if not line.startswith("#")]


def last_step(folder: Path) -> int:
    """The last step in the log; 0 if there is none yet."""
    logs = list(folder.glob("logs/*/*.log"))
    steps = re.findall(r"^s:(\d+) trn:", logs[0].read_text(), re.M) if logs else []
    return int(steps[-1]) if steps else 0


def bits(value: Any) -> Any:
    """A checkpoint's value in a form in which equality is equality of bits."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


def trained_bits(path: Path) -> dict[str, Any]:
    """What two runs that are the same must share: weights, moments, step, position and every loss's bits."""
    saved = torch.load(path, weights_only=True)
    return {
        "model": bits(saved["model"]),
        "optimizer": bits(saved["optimizer"]),
        "step": saved["step"],
        "tokens": saved["progress"]["tokens"],
        "losses": saved["progress"]["history"]["digest"],
    }


def assert_same_bits(a: Path, b: Path) -> None:
    """Two checkpoints hold the same training state; names the first thing that differs."""
    left, right = trained_bits(a), trained_bits(b)
    for part in left:
        if left[part] == right[part]:
            continue
        keys = (
            [key for key in left[part] if left[part][key] != right[part].get(key)]
            if isinstance(left[part], dict)
            else ""
        )
        raise AssertionError(f"{part} differs between {a} and {b}: {keys or (left[part], right[part])}"[:600])
