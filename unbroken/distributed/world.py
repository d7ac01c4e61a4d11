"""The processes of a training: the variables that torchrun sets for each, and the exchange of plain values."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from unbroken import console
from unbroken.distributed.memory import require_out_of_memory
from unbroken.distributed.peer_watch import Peers, watch_peers
from unbroken.distributed.phases import Phases
from unbroken.errors import CorruptionError, PassingError, UserError, shorten
from unbroken.host import end_with_torchrun, hostname

# A collective that waits longer has lost a rank. Compiling and reading a large checkpoint take far less.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)

PRINTING_SECONDS = 10.0  # that the others wait for the line of rank 0

MIG = "MIG"  # in the name of a part of a GPU


@dataclass(frozen=True)
class Launch:
    """The variables that a launcher sets for a process; the defaults are those of a plain `python train_gpt2_mod.py`.

    `job`: the id that torchrun alone sets; "" for any other launcher, and for variables that are set by hand.
    `restarts_left`: how often torchrun (--max-restarts) starts all processes again when one fails.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    job: str = ""
    restarts_left: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """Return the launch of this process. Raises UserError for variables that make no sense."""
        if "RANK" not in os.environ:
            return cls()
        launch = cls(
            rank=_number("RANK", 0),
            local_rank=_number("LOCAL_RANK", 0),
            size=_number("WORLD_SIZE", 1),
            local_size=_number("LOCAL_WORLD_SIZE", 1),
            job=os.environ.get("TORCHELASTIC_RUN_ID", ""),
            restarts_left=_number("TORCHELASTIC_MAX_RESTARTS", 0) - _number("TORCHELASTIC_RESTART_COUNT", 0),
        )
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if launch.rank >= launch.size or (launch.size > 1 and missing):
            problem = f"RANK is {launch.rank}" if launch.rank >= launch.size else f"{missing[0]} is not set"
            raise UserError(
                f"{problem}, but WORLD_SIZE is {launch.size}: start with torchrun, which sets them, or unset them"
            )
        return launch


def local_rank() -> int:
    """Return the number of this process on its node, 0 if no launcher says so."""
    text = os.environ.get("LOCAL_RANK", "")
    return int(text) if text.isdecimal() else 0


def _number(name: str, default: int) -> int:
    """Return the number in an environment variable. Raises UserError."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r:.80}, not a number: start with torchrun, which sets it, or unset it")
    return int(text)


@dataclass(frozen=True)
class World:
    """The ranks of this attempt. `group` carries tensors (gloo or nccl), `control` plain values (gloo).

    `ranks_per_gpu` is the largest number of ranks that share a GPU, `num_gpus` the number of GPUs of all ranks. Methods
    that exchange something are collective: every rank must call them, in the same order. `phases` is what this process
    is doing, `peers` the watch over the others.
    """

    launch: Launch
    device: torch.device
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    ranks_per_gpu: int = 1
    num_gpus: int = 1
    phases: Phases = field(default_factory=Phases, compare=False)
    peers: Peers | None = None

    @classmethod
    def single(cls) -> World:
        """Return a world of one process on the CPU."""
        return cls(Launch(), torch.device("cpu"))

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def size(self) -> int:
        return self.launch.size

    @property
    def local_size(self) -> int:
        return self.launch.local_size

    @property
    def is_main(self) -> bool:
        return self.launch.rank == 0

    @property
    def via_host_memory(self) -> bool:
        """Whether tensors must pass through host memory to reach other ranks (gloo between GPUs)."""
        return self.size > 1 and self.device.type == "cuda" and dist.get_backend(self.group) == "gloo"

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's plain value on every rank. Collective."""
        if self.size == 1:
            return value
        box = [value]
        with self.phases.waiting():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the plain values of all ranks, in rank order, on every rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.phases.waiting():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any rank. Collective; called at every step, so kept cheap."""
        if self.size == 1:
            return list(flags)
        largest = torch.tensor(flags, dtype=torch.int64)
        with self.phases.waiting():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in largest]

    def for_thread(self) -> World:
        """Return the same ranks for a background thread: its collectives must not mix with the main thread's.

        Collective.
        """
        control = None if self.size == 1 else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        return replace(self, control=control, phases=Phases())

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise an error of one rank's body on all ranks, so that no rank waits for a failed one. Collective."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
            with suppress(Exception):
                memory = require_out_of_memory(caught).replace("CUDA", "GPU")
                reason = shorten(f"{caught}", 160) or type(caught).__name__
                error = UserError(f"out of {memory} memory: a smaller --model or --batch_size needs less ({reason})")
        if self.size == 1:
            if error is not None:
                raise error
            return
        known = next((kind for kind in (PassingError, UserError) if isinstance(error, kind)), None)
        texts = self.gather(None if error is None else (known, f"{error}"))
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if not failed:
            return
        rank, (kind, text) = failed[0]
        if kind is None:
            raise error or RuntimeError(f"rank {rank} failed: {text}")
        shared: UserError = kind(text)
        shared.on_all_ranks = True
        raise shared from None

    def require_equal(self, value: Any, what: str) -> None:
        """Raise UserError on every rank unless all ranks have the same plain value. Collective.

        `what` names the value in the message.
        """
        values = self.gather(value)
        with self.raise_together():
            if any(other != value for other in values):
                raise UserError(f"{what}: differs between nodes; each node must see the same files")

    def raise_on_all_ranks(self, error: UserError | None) -> None:
        """Raise on every rank the error that any rank passes; the others pass None. Collective."""
        with self.raise_together():
            if error is not None:
                raise error


def choose_device(name: str, launch: Launch) -> torch.device:
    """Return the device of this rank; `auto` is a GPU if there is one. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this machine or this build of torch has no CUDA; use --device cpu or install a CUDA build"
        )
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


@contextmanager
def init_distributed(device_name: str) -> Iterator[World]:
    """Connect to the other processes that torchrun started, and disconnect at the end. Collective."""
    launch = Launch.from_environment()
    if launch.job and end_with_torchrun():  # who waits for the store of a torchrun that is gone waits for long
        raise SystemExit(128 + signal.SIGTERM)
    device = choose_device(device_name, launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.size == 1:
        yield World(launch, device)
        return
    store = fresh_store(launch)
    places = _gather_places(store, launch, device)
    backend, sharing = choose_backend(places)
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=COLLECTIVE_TIMEOUT)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    with watch_peers(store, launch.rank, launch.size, report_to_torchrun) as peers:
        try:
            yield World(launch, device, dist.group.WORLD, control, sharing, len({*places}), peers=peers)
        except BaseException as error:
            peers.fail(error)
            # Other ranks may never receive what this one has sent, and NCCL would wait for that.
            abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
            if backend == "nccl" and abort is not None:
                with suppress(Exception):  # the error that is being raised says more
                    abort()
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _gather_places(store: Any, launch: Launch, device: torch.device) -> list[tuple[str, str]]:
    """Return the (host, GPU) of every rank in rank order: as for `choose_backend`. Collective."""
    gpu = ""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        gpu = f"{MIG} {about.uuid}" if f" {MIG} " in about.name else str(about.uuid)
    store.set(f"place/{launch.rank}", json.dumps([hostname(), gpu]))
    places = (json.loads(store.get(f"place/{rank}")) for rank in range(launch.size))
    return [(host, gpu) for host, gpu in places]


def choose_backend(places: list[tuple[str, str]]) -> tuple[str, int]:
    """Return the backend for tensors and the largest number of ranks that share one GPU.

    NCCL refuses two ranks on one GPU, so ranks that share one exchange through gloo, and so do ranks on CPUs. The
    number of visible GPUs does not tell: under `srun --gpus-per-task=1` each rank sees one GPU, another one each. NCCL
    tells GPUs by their place on the bus, so all parts of one (MIG) are the same GPU to it.

    Args:
        places: the (host, GPU) of every rank: "" for a CPU, the uuid, or MIG and the uuid of a part of a GPU.
    """
    gpus = Counter(place for place in places if place[1])
    to_nccl = {(host, MIG if gpu.startswith(MIG) else gpu) for host, gpu in gpus}
    sharing = max(gpus.values(), default=1)
    return ("nccl" if len(to_nccl) == len(places) else "gloo"), sharing


def fresh_store(launch: Launch) -> Any:
    """Return torchrun's store under a prefix that only the processes of this attempt know.

    torchrun keeps one store for all attempts (seen in torch 2.13). A restarted process that found the address of a dead
    one there would fail, or wait for it. So rank 0 publishes a new name, and answers each rank that greets it under
    that name. A rank that has read the name of a dead rank 0 gets no answer and reads again.
    """
    store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.size))  # type: ignore[attr-defined]
    own = uuid.uuid4().hex
    if launch.rank == 0:
        store.set("unbroken/leader", own)
        for rank in range(1, launch.size):
            greeting = store.get(f"unbroken/{own}/{rank}").decode()  # waits for it
            store.set(f"unbroken/welcome/{greeting}", own)
        return dist.PrefixStore(own, store)  # type: ignore[attr-defined]
    leader = ""
    while not store.check([f"unbroken/welcome/{own}"]):
        if store.check(["unbroken/leader"]) and (named := store.get("unbroken/leader").decode()) != leader:
            leader = named
            store.set(f"unbroken/{leader}/{launch.rank}", own)
        time.sleep(0.01)
    return dist.PrefixStore(leader, store)  # type: ignore[attr-defined]


def report_error(error: UserError | CorruptionError, rank: int) -> None:
    """Print the line of the error that ends this process, on rank 0 only if all ranks raise it."""
    if rank == 0 or not error.on_all_ranks:
        console.print_line(f"error: {error}", error=True)
        report_to_torchrun(f"error: {error}")
    else:  # torchrun ends all when the first one ends, and rank 0 must have printed by then
        time.sleep(PRINTING_SECONDS)


def report_to_torchrun(text: str) -> None:
    """Write `text` to the file from which torchrun's report takes the error of a failed worker."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        try:
            Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), "utf-8")
        except OSError:
            pass  # the line on stderr has been printed already
