"""The first ten minutes on a GPU: whether what was only tested on CPUs holds there, and how fast it is.

    python benchmarks/gpu.py [--minutes 9] [--json gpu.json] [--only NAME,NAME] [--attention ours,sdpa,flex,cudnn,fa3]
    python benchmarks/gpu.py --device cpu      # the same logic with tiny sizes, on a machine without a GPU

It needs only the repository and torch >= 2.9 with CUDA (doctor: psutil too). Each task is a process of its own, so that
one that crashes or runs out of memory costs only itself; what the time does not suffice for is listed as not run.
First the checks run, several at once; beside them each measured model is compiled, into one cache. Then the
measurements run one by one: medians over steps, between events of the GPU. Prints a table of checks and one of figures,
and writes both as JSON after every task. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


RESULT = "RESULT "
COMPILE_ONLY = "UNBROKEN_GPU_COMPILE_ONLY"  # set for a task that only fills the cache of compiled code
HOLDS, FAILS, NOT_HERE, TWO_GPUS, NOT_RUN = "holds", "fails", "needs a GPU", "needs two GPUs", "not run"
SCRIPT = str(ROOT / "train_gpt2_mod.py")
STEP = re.compile(r"step:(\d+)/\d+ \| loss (\S+)")


# Of what was killed something may still be writing.
scratch = functools.partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)


class Size:
    """The sizes of a task: those of a GPU, or tiny ones for `--device cpu`."""

    def __init__(self, device: str) -> None:
        gpu = device == "cuda"
        self.model, self.larger, self.small = ("d12", "d24", "d6") if gpu else ("d2", "d4", "d2")
        self.batches, self.length = ((8, 32, 64), 1024) if gpu else ((1, 2), 16)
        self.larger_batch = 16 if gpu else 1
        self.steps, self.repeats = (30, 20) if gpu else (2, 3)
        self.save_every, self.saves = (10, 6) if gpu else (4, 3)
        self.accumulation = 4 if gpu else 1
        self.buffer = (1 << 30) if gpu else (1 << 20)
        self.compile = gpu
        self.head_gib = (4, 1, 8) if gpu else (0.001,)
        if COMPILE_ONLY in os.environ:
            self.steps, self.batches = 1, self.batches[:2]  # the largest beside others would take too much memory


def say(kind: str, name: str, **about: Any) -> None:
    """Report a result to the process that started this one."""
    print(RESULT + json.dumps({"kind": kind, "name": name, **about}), flush=True)


def check(name: str, holds: bool | str, detail: str = "") -> None:
    result = holds if isinstance(holds, str) else HOLDS if holds else FAILS
    say("check", name, result=result, detail=" ".join(detail.split())[:200])


def check_on_gpu(name: str, device: str, holds: bool, detail: str = "") -> None:
    """Report a check that says nothing on a CPU, except that its own code runs."""
    check(name, NOT_HERE if device == "cpu" and holds else holds, detail)


def figure(name: str, value: float | str, unit: str = "") -> None:
    say("figure", name, value=value, unit=unit)


# ---- a step, without the files around it -----------------------------------------------------------------------------


def prepare(device: str, deterministic: bool = True, dtype: str = "bf16", compiled: bool = True) -> Any:
    """Set this process as a training sets itself; return (settings, world, compiler)."""
    from unbroken.config import merge
    from unbroken.distributed.world import Launch, World
    from unbroken.runtime.compile import Compiler
    from unbroken.runtime.settings import ResolvedSettings, apply_settings

    kind = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    config = merge({"deterministic": "on" if deterministic else "off"})
    settings, world = ResolvedSettings(dtype, compiled, 2), World(Launch(), kind)
    apply_settings(config, settings, world)
    return settings, world, Compiler(config, settings, kind, Path(os.devnull))  # keeps nothing itself


class Training:
    """The model, the sum of gradients and the optimizer of a run with one process, on random tokens."""

    def __init__(self, device: str, name: str, batch: int, length: int, **how: Any) -> None:
        from unbroken.distributed.flat_params import ShardedParameters
        from unbroken.distributed.gradients import Gradients
        from unbroken.distributed.step_plan import plan_step
        from unbroken.model import families
        from unbroken.optim import build_optimizer, param_groups

        self.settings, self.world, compiler = prepare(device, **how)
        self.model = families.build(name)
        self.model.adds_in_place = device == "cpu"
        sharded = ShardedParameters(self.model, self.world, param_groups(self.model, "adamw"))
        self.optimizer = build_optimizer(sharded, learning_rate=1e-4, weight_decay=0.1)
        self.model.initialize(1)
        self.sharded = sharded
        self.gradients = Gradients(sharded, plan_step(batch, 1, 1, 1), self.world)
        compiler.compile(self.model)
        tokens = torch.randint(0, 50257, (batch, length + 1), generator=torch.Generator().manual_seed(2))
        self.x, self.y = (part.contiguous().to(self.world.device) for part in (tokens[:, :-1], tokens[:, 1:]))

    def backward(self) -> None:
        for index in self.gradients.microbatches():
            with self.settings.autocast(self.world.device):
                loss = self.model(self.x, self.y)
            loss.backward()
            self.gradients.add(index)
        self.loss = loss.detach()

    def step(self) -> None:
        self.backward()
        self.gradients.exchange()
        self.gradients.clip(1.0)
        self.optimizer.step()

    def gradient_hash(self) -> str:
        self.backward()
        parts = b"".join(group.grad.cpu().numpy().tobytes() for group in self.sharded.groups)
        return hashlib.sha256(parts).hexdigest()[:16]


def stock(device: str, name: str, batch: int, length: int, compiled: bool) -> Callable[[], None]:
    """Return the step of benchmarks/stock.py on random tokens."""
    from benchmarks import stock as plain
    from unbroken.model import gpt

    torch.set_float32_matmul_precision("high")
    model = plain.GPT(gpt.GPT.sizes[name])
    gpt.GPT.initialize(model, 1)  # type: ignore[arg-type]
    model.to(device)
    trained = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=device == "cuda")
    tokens = torch.randint(0, 50257, (batch, length + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = trained(x, y)
        loss.backward()
        optimizer.step()

    return step


def seconds_of(step: Callable[[], None], device: str, steps: int) -> float:
    """Return the median of the seconds of a step, after three that compile and warm up."""
    if COMPILE_ONLY in os.environ:
        step()
        return float("nan")
    for _ in range(3):
        step()
    wait(device)
    marks: list[Any] = [mark(device)]
    for _ in range(steps):
        step()
        marks.append(mark(device))
    wait(device)
    if device == "cuda":
        return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairwise(marks))
    return statistics.median(b - a for a, b in pairwise(marks))


def mark(device: str) -> Any:
    """Return the present place in the GPU's queue as an event, or the time."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def report_rate(name: str, model: str, tokens: int, length: int, seconds: float, device: str) -> None:
    """Report tokens/s, and MFU where the peak of the card is known."""
    if COMPILE_ONLY in os.environ:
        return
    from unbroken.model import families
    from unbroken.runtime.environment import peak_flops

    figure(name, round(tokens / seconds), "tok/s")
    figure(f"{name}: a step", round(1000 * seconds, 2), "ms")
    card = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = peak_flops({"device": card, "dtype": "bf16"}, 1)
    if peak:
        flops = families.build(model).flops_per_token(length) * tokens / seconds
        figure(f"{name}: MFU", round(100 * flops / peak, 1), "%")


@contextlib.contextmanager
def attention(name: str) -> Iterator[None]:
    """Let the model attend by another kernel; it changes bits, so no run does that."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from unbroken.model import gpt

    def replaced(attend: Callable[..., Any]) -> Any:
        return mock.patch.object(gpt, "attend", attend)

    if name == "ours":
        yield
    elif name == "sdpa":
        with replaced(torch.nn.functional.scaled_dot_product_attention):
            yield
    elif name == "cudnn":
        kernel = sdpa_kernel([SDPBackend.CUDNN_ATTENTION])
        with replaced(torch.nn.functional.scaled_dot_product_attention), kernel:
            yield
    elif name == "fa3":
        from torch.nn.attention import activate_flash_attention_impl  # torch 2.11 and newer

        activate_flash_attention_impl("FA3")
        with replaced(torch.nn.functional.scaled_dot_product_attention):
            yield
    elif name == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        where = "cuda" if torch.cuda.is_available() else "cpu"
        masks = {
            length: create_block_mask(lambda b, h, q, kv: q >= kv, None, None, length, length, where)
            for length in (16, 1024)
        }
        with replaced(lambda q, k, v, is_causal: flex_attention(q, k, v, block_mask=masks[q.size(2)])):
            yield
    else:
        raise SystemExit(f"--attention {name}: there are ours, sdpa, cudnn, flex and fa3")


# ---- checks ----------------------------------------------------------------------------------------------------------


def task_machine(device: str, size: Size, args: argparse.Namespace) -> None:
    figure("torch", torch.__version__)
    if device == "cuda":
        figure("card", torch.cuda.get_device_name())
        figure("capability", ".".join(map(str, torch.cuda.get_device_capability())))
        figure("CUDA", str(torch.version.cuda))
        figure("cuDNN", str(torch.backends.cudnn.version()))
    from unbroken.checkpoint.format import checksum
    from unbroken.runtime.settings import _best_dtype

    figure("--dtype auto", _best_dtype(torch.device(device)))
    figure("checksums by", checksum.crc32.__module__)  # without zlib-ng saves and restores take longer


def task_no_sync(device: str, size: Size, args: argparse.Namespace) -> None:
    for compiled in (False, True) if size.compile else (False,):
        training = Training(device, size.small, 2, size.length, compiled=compiled)
        training.step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        error = ""
        try:
            for _ in range(3):
                training.step()
        except RuntimeError as caught:
            error = str(caught)[:200]
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        how = ", compiled" if compiled else ""
        check_on_gpu(f"three steps without a synchronization{how}", device, not error, error)


def task_gradient_hash(device: str, size: Size, args: argparse.Namespace) -> None:
    training = Training(device, size.small, 2, size.length, compiled=size.compile)
    figure("hash", training.gradient_hash())


def task_same_gradients(device: str, size: Size, args: argparse.Namespace) -> None:
    """Three processes with empty caches, in which inductor's timings are noise."""

    def hashed(_: int) -> tuple[list[dict[str, Any]], str]:
        with scratch() as cache:
            env = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_DISTORT_BENCHMARKING_RESULT": "random"}
            return start("gradient_hash", device, args, 170, env)

    with ThreadPoolExecutor(lanes(device)) as pool:
        done = list(pool.map(hashed, range(3)))
    hashes = [result["value"] for results, _ in done for result in results]
    wrong = "; ".join(sorted({wrong for _, wrong in done if wrong}))
    check(
        "the same gradients with other timings", len(hashes) == 3 and len(set(hashes)) == 1, wrong or " ".join(hashes)
    )


def task_repeats(device: str, size: Size, args: argparse.Namespace) -> None:
    training = Training(device, size.small, 2, size.length, compiled=False)
    hashes, stop = set(), threading.Event()

    def noise() -> None:
        a = torch.rand(512, 512, device=device)
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
            while not stop.is_set():
                a @ a
                wait(device)

    thread = threading.Thread(target=noise)
    thread.start()
    try:
        for _ in range(size.repeats):
            hashes.add(training.gradient_hash())
    finally:
        stop.set()
        thread.join()
    check(f"{size.repeats} gradients beside noise are one", len(hashes) == 1)


def task_collectives(device: str, size: Size, args: argparse.Namespace) -> None:
    import torch.distributed as dist

    from unbroken.distributed.gradients import all_gather_single

    backend = "nccl" if device == "cuda" else "gloo"
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    sent, received = torch.ones(64, device=device), torch.zeros(64, device=device)
    dist.all_to_all_single(received, sent)
    all_gather_single(received, sent)
    dist.all_reduce(sent)
    wait(device)
    check(f"{backend}: the three collectives", bool((received == 1).all()))
    if device == "cpu":
        check("an abort with a kernel pending", NOT_HERE)
        return
    torch.cuda._sleep(4_000_000_000)  # about two seconds; an abort may wait for it, but not for ever
    dist.all_reduce(sent)
    began = time.perf_counter()
    dist.distributed_c10d._abort_process_group()
    check("an abort with a kernel pending", (took := time.perf_counter() - began) < 20, f"{took:.2f} s")
    os._exit(0)  # the kernel may still be running


def task_snapshot(device: str, size: Size, args: argparse.Namespace) -> None:
    """A copy that is late, an update that is late, and a control without the wait."""
    from unbroken.checkpoint.snapshot import HostBuffer, Snapshot
    from unbroken.threads import WorkerThreads

    kind = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    count = size.buffer // 4
    buffer, pool = HostBuffer(kind), WorkerThreads(2, "copies")
    buffer.reserve(4 * count)

    def saved(before_copy: bool, waits: bool) -> list[float]:
        weight, snapshot = torch.zeros(count, device=kind), Snapshot(buffer, pool, kind)
        if device == "cuda" and not before_copy:
            torch.cuda._sleep(200_000_000)
        weight.add_(1)
        if device == "cuda" and before_copy:
            with torch.cuda.stream(snapshot._stream):
                torch.cuda._sleep(200_000_000)
        snapshot.take([(weight, 0)])
        if waits:
            snapshot.before_update()
        weight.add_(1)
        snapshot.wait_until_copied(4 * count)
        return [float(each) for each in buffer.tensor(0, 4 * count).view(torch.float32).aminmax()]

    check_on_gpu("a late copy has the weights before the update", device, saved(True, True) == [1.0, 1.0])
    check_on_gpu("a late update is in the copy", device, saved(False, True) == [1.0, 1.0])
    torn = device == "cpu" or saved(True, False) != [1.0, 1.0]
    check_on_gpu("control: without the wait it has not", device, torn)
    pool.close()
    buffer.release()


def task_pinning(device: str, size: Size, args: argparse.Namespace) -> None:
    from unbroken.checkpoint import snapshot

    kind = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    buffer = snapshot.HostBuffer(kind)
    buffer.reserve(size.buffer)
    source = torch.ones(size.buffer, dtype=torch.uint8, device=kind)
    target = buffer.tensor(0, size.buffer)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    seconds = seconds_of(copy, device, 5)
    figure("copy to the host", round(size.buffer / seconds / 1e9, 1), "GB/s")
    if device == "cpu":
        check("the buffer is pinned", NOT_HERE)
        return
    check("the buffer is pinned", buffer._pinned)
    again = snapshot.HostBuffer(kind)
    again.reserve(size.buffer)
    code = int(torch.cuda.cudart().cudaHostRegister(again.address, again.size, 1))  # type: ignore[no-untyped-call]
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=kind)
    check("a kernel after a pin that failed", code != 0 and float(torch.ones(4, device=kind).sum()) == 4.0)


def task_losses(device: str, size: Size, args: argparse.Namespace) -> None:
    """fp32 gradients of a d2 against those of the CPU."""
    ours = Training(device, "d2", 2, 64, dtype="fp32", compiled=False)
    ours.backward()
    on_cpu = Training("cpu", "d2", 2, 64, dtype="fp32", compiled=False)
    on_cpu.backward()
    worst = max(
        float((a.grad.cpu() - b.grad).norm() / b.grad.norm())
        for a, b in zip(ours.sharded.groups, on_cpu.sharded.groups, strict=True)
    )
    check_on_gpu("fp32 gradients are those of the CPU", device, worst < 1e-4, f"{worst:.1e} relative")


def task_compiled(device: str, size: Size, args: argparse.Namespace) -> None:
    """Gradients of compiled code, whose kernels are other ones, against those of eager code."""
    eager = Training(device, size.small, 2, size.length, compiled=False)
    eager.backward()
    compiled = Training(device, size.small, 2, size.length, compiled=size.compile)
    compiled.backward()
    worst = max(
        float((a.grad - b.grad).norm() / b.grad.norm())
        for a, b in zip(compiled.sharded.groups, eager.sharded.groups, strict=True)
    )
    check_on_gpu("compiled gradients are those of eager code", device, worst < 2e-2, f"{worst:.1e} relative")


# ---- whole trainings -------------------------------------------------------------------------------------------------


def command(device: str, size: Size, **flags: Any) -> list[str]:
    """Return the command line of a training on the built-in corpus."""
    own = {"device": device, "model": size.model, "batch_size": size.batches[0], "sequence_length": size.length}
    own |= {"num_iterations": 100000, "save_every": 0, "compile": "on" if size.compile else "off", **flags}
    return [sys.executable, "-u", SCRIPT, *(f"--{name}={value}" for name, value in own.items())]


@contextlib.contextmanager
def train(folder: str, line: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a training; at the end kill what is left of it, which would disturb all that follows."""
    process = subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process with all that it has started."""
    left = [] if process.poll() is not None else [process.pid, *below(process.pid)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def below(pid: int) -> list[int]:
    """Return the processes that a process has started, and theirs, by /proc: psutil may be missing."""
    parents = dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, last = list[int](), {pid}
    while last:
        last = {child for child, parent in parents.items() if parent in last}
        found += sorted(last)
    return found


def until(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> None:
    """Read lines until one is wanted. Raises RuntimeError with the last one at the end."""
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if wanted(line):
            return
        last = line.strip() or last
    raise RuntimeError(f"the training ended: {last[:160]}")


def task_doctor(device: str, size: Size, args: argparse.Namespace, optimizer: str = "adamw") -> None:
    counts = "1,2" if device == "cuda" else "1"
    line = [sys.executable, "-m", "unbroken", "doctor", "--json", "--device", device, "--model", size.small]
    line += ["--optimizer", optimizer, "--batch_size", "2", "--grad_accumulation_steps", "2", "--steps", "3"]
    line += ["--sequence_length", str(min(size.length, 256)), "--processes", counts]
    compiled = size.compile and optimizer == "adamw"
    line += ["--compile", "on" if compiled else "off"]
    label = f"doctor, {optimizer}, {counts} processes{', compiled' if compiled else ''}"
    if importlib.util.find_spec("psutil") is None:
        check(label, NOT_RUN, "it needs psutil")
        return
    with scratch() as folder:
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    check(label, done.returncode == 0, done.stdout[-200:] if done.returncode else "")


def task_doctor_muon(device: str, size: Size, args: argparse.Namespace) -> None:
    task_doctor(device, size, args, "muon")


def task_signals(device: str, size: Size, args: argparse.Namespace) -> None:
    with scratch() as folder:
        with train(folder, command(device, size, compile="off", model=size.small)) as process:
            until(process, lambda line: bool(STEP.match(line)))
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        stopped = process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in said
        check("SIGTERM saves and stops", stopped, "" if stopped else f"code {process.returncode}: {said[-200:]}")
        line = command(device, size, compile="off", model=size.small, grad_accumulation_steps=2)
        with train(folder, with_torchrun(line)) as process:
            until(process, lambda line: bool(STEP.match(line)))
            trainings = [pid for pid in below(process.pid) if SCRIPT in command_line(pid)]
            began = time.perf_counter()
            os.kill(trainings[1], signal.SIGKILL)
            said, _ = process.communicate(timeout=60)
            took = time.perf_counter() - began
        check("the death of one of two ends both", took < 15 and "died or was stopped" in said, f"{took:.1f} s")


def with_torchrun(line: list[str]) -> list[str]:
    """Return the command line of `command` for two processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *line[2:]]


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def task_two_gpus(device: str, size: Size, args: argparse.Namespace) -> None:
    names = ("NCCL between GPUs", "the exchange beside the backward pass", "one context a process")
    if device == "cpu" or torch.cuda.device_count() < 2:
        for name in names:
            check(name, TWO_GPUS)
        return
    with scratch() as folder:
        line = command(device, size, compile="off", grad_accumulation_steps=2, save_every=2, keep_last=2)
        with train(folder, with_torchrun(line)) as process:
            until(process, lambda line: line.startswith("step:6/"))
            check(names[0], True)
            query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
            if shutil.which(query[0]):
                listed = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
                pids = [line.split(",")[0] for line in listed]
                check(names[2], bool(pids) and len(pids) == len(set(pids)))
            else:
                check(names[2], NOT_RUN, "there is no nvidia-smi")
            check(names[1], NOT_RUN, "compare a profile by hand")


def task_save(device: str, size: Size, args: argparse.Namespace) -> None:
    """The cost of a save by wall clock, in one training: the steps right after each save against those before it."""
    every, times, said = size.save_every, dict[int, float](), list[str]()
    flags = {"save_every": every, "keep_last": 2, "num_iterations": every * (size.saves + 1)}
    own = {"batch_size": size.batches[1], "grad_accumulation_steps": size.accumulation}
    with scratch() as folder, train(folder, command(device, size, **own, **flags)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := STEP.match(line):
                times[int(found[1])] = time.perf_counter()
            said.append(line)
    half = every // 2
    saves = range(2 * every, every * (size.saves + 1), every)  # the first one allocates
    after = [times[step + half] - times[step] for step in saves if step + half in times]
    before = [times[step] - times[step - half] for step in saves if step in times]
    if not after:
        check("a training that saves", False, "".join(said)[-200:])
        return
    cost, quiet = statistics.median(after) - statistics.median(before), statistics.median(before) / half
    figure("a step without a save", round(1000 * quiet, 2), "ms")
    figure("lost by a save", round(1000 * cost, 2), "ms")
    figure("lost when saving every 5 steps", round(100 * cost / (5 * quiet), 2), "%")
    reports = re.findall(r"model_step\S+ \(blocked (\S+)s, durable (\S+)s", "".join(said))
    blocked, durable = (statistics.median(map(float, column)) for column in zip(*reports, strict=True))
    figure("blocked by a save, median", round(1000 * blocked, 2), "ms")
    figure(f"durable after, median; {half} steps take {half * quiet:.2f} s", round(durable, 2), "s")


def task_way_back(device: str, size: Size, args: argparse.Namespace) -> None:
    """SIGKILL to the next step; with code compiled before, and the first time without."""
    from benchmarks.resume import attempt

    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # each run has its own, which is empty at first
    for compiled in ("off", "on") if size.compile else ("off",):
        with scratch() as folder:
            line = command(device, size, compile=compiled, save_every=2, keep_last=2, resume_from="auto")
            first = attempt(line, Path(folder))
            again = attempt(line, Path(folder))
        label = "compiled" if compiled == "on" else "eager"
        if not first.steps or not again.steps:
            check(f"a training that is killed, {label}", False, "it ended by itself")
            continue
        figure(f"start to first step, {label}, cold cache", round(first.steps[0], 2), "s")
        figure(f"SIGKILL to next step, {label}, warm cache", round(again.steps[0], 2), "s")
        figure(f"state restored after, {label}", round(again.resumed or 0, 2), "s")


# ---- speed -----------------------------------------------------------------------------------------------------------


def task_throughput(device: str, size: Size, args: argparse.Namespace) -> None:
    for batch in size.batches:
        training = Training(device, size.model, batch, size.length, compiled=size.compile)
        seconds = seconds_of(training.step, device, size.steps)
        report_rate(f"{size.model} B={batch}", size.model, batch * size.length, size.length, seconds, device)
        del training


def task_larger(device: str, size: Size, args: argparse.Namespace) -> None:
    training = Training(device, size.larger, size.larger_batch, size.length, compiled=size.compile)
    seconds, tokens = seconds_of(training.step, device, size.steps), size.larger_batch * size.length
    report_rate(f"{size.larger} B={size.larger_batch}", size.larger, tokens, size.length, seconds, device)


def task_stock(device: str, size: Size, args: argparse.Namespace) -> None:
    """The stock loop; SDPA may choose cuDNN's attention there unless that is switched off."""
    small, usual = size.batches[:2]
    for batch, cudnn in ((small, True), (usual, True), (usual, False)) if device == "cuda" else ((usual, True),):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch._dynamo.reset()
        step = stock(device, size.model, batch, size.length, size.compile)
        label = f"stock {size.model} B={batch}" + ("" if cudnn else ", no cuDNN attention")
        report_rate(label, size.model, batch * size.length, size.length, seconds_of(step, device, size.steps), device)


def task_nondeterministic(device: str, size: Size, args: argparse.Namespace) -> None:
    batch = size.batches[1]
    training = Training(device, size.model, batch, size.length, compiled=size.compile, deterministic=False)
    seconds = seconds_of(training.step, device, size.steps)
    report_rate(
        f"{size.model} B={batch}, --deterministic off", size.model, batch * size.length, size.length, seconds, device
    )


def task_attention(device: str, size: Size, args: argparse.Namespace) -> None:
    """Candidates, deterministic; a kernel that this torch or card lacks says so."""
    batch = size.batches[1]
    for name in args.attention.split(","):
        torch._dynamo.reset()
        label = f"{size.model} B={batch}, attention {name}"
        try:
            with attention(name):
                training = Training(device, size.model, batch, size.length, compiled=size.compile)
                seconds = seconds_of(training.step, device, size.steps)
        except Exception as error:
            figure(label, f"not here: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}")
            continue
        report_rate(label, size.model, batch * size.length, size.length, seconds, device)


def task_head(device: str, size: Size, args: argparse.Namespace) -> None:
    """Bytes of logits that exist at once."""
    from unbroken.model import loss

    batch = size.batches[1]
    for gib in size.head_gib:
        torch._dynamo.reset()
        loss.CHUNK_BYTES[device] = int(gib * 2**30)
        training = Training(device, size.model, batch, size.length, compiled=size.compile)
        seconds = seconds_of(training.step, device, size.steps)
        report_rate(
            f"{size.model} B={batch}, head {gib} GiB", size.model, batch * size.length, size.length, seconds, device
        )
        del training


def task_products(device: str, size: Size, args: argparse.Namespace) -> None:
    """A small microbatch, which the host may limit, with bf16 partial sums in matrix products forbidden and allowed."""
    training = Training(device, size.model, size.batches[0], size.length, compiled=size.compile)
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed
        seconds = seconds_of(training.step, device, size.steps)
        label = f"{size.model} B={size.batches[0]}, partial sums in bf16 {'allowed' if allowed else 'forbidden'}"
        report_rate(label, size.model, size.batches[0] * size.length, size.length, seconds, device)


def task_profile(device: str, size: Size, args: argparse.Namespace) -> None:
    """The kernels on which a step spends most of its time."""
    from torch.profiler import ProfilerActivity, profile

    training = Training(device, size.model, size.batches[1], size.length, compiled=size.compile)
    seconds = seconds_of(training.step, device, 5)
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as measured:
        for _ in range(2):
            training.step()
        wait(device)
    kind = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
    kernels = sorted(measured.key_averages(), key=lambda each: -getattr(each, kind))
    whole = sum(getattr(each, kind) for each in kernels) or 1  # microseconds of two steps
    if device == "cuda":
        figure("share of a step without a kernel", round(100 * (1 - whole / 2e6 / seconds), 1), "%")
    for each in kernels[:16]:
        share = 100 * getattr(each, kind) / whole
        figure(f"kernel {each.key[:90]}", round(getattr(each, kind) / 2000, 2), f"ms a step, {share:.1f}%")


def task_batch_size(device: str, size: Size, args: argparse.Namespace) -> None:
    """What --batch_size auto predicts, and the peak of a training with it."""
    if device == "cpu":
        check("--batch_size auto fits", NOT_HERE)
        return
    flags = {"batch_size": "auto", "total_batch_size": 512 * size.length, "num_iterations": 2}
    with scratch() as folder, train(folder, command(device, size, **flags)) as process:
        said, _ = process.communicate()
    found = re.search(r"peak memory consumption: (\d+) MiB", said)
    whole = torch.cuda.mem_get_info()[1] / 2**20
    check("--batch_size auto fits", process.returncode == 0 and "out of memory" not in said, said[-200:])
    for line in re.findall(r"--batch_size auto: .*", said):
        figure("--batch_size auto", line.partition(": ")[2])
    if found:
        figure("--batch_size auto, peak of the memory", round(100 * int(found[1]) / whole, 1), "%")


def task_oom(device: str, size: Size, args: argparse.Namespace) -> None:
    """A microbatch for which no card has the memory."""
    if device == "cpu":
        check("without memory the microbatch is halved", NOT_HERE)
        return
    flags = {"batch_size": 1024, "compile": "off", "num_iterations": 1}
    with scratch() as folder, train(folder, command(device, size, **flags)) as process:
        said, _ = process.communicate()
    halved = re.findall(r"going on with microbatches of \d+", said)
    holds = process.returncode == 0 and bool(halved)
    check("without memory the microbatch is halved", holds, " ".join(halved) if holds else said[-200:])


# Seconds that a task may take. Those of the first table run several at once, the longest first.
CHECKS: dict[str, int] = {
    **{"doctor": 200, "same_gradients": 180, "doctor_muon": 180, "signals": 150, "no_sync": 120, "repeats": 120},
    **{"compiled": 120, "collectives": 90, "snapshot": 90, "losses": 90, "machine": 90},
}
# These run alone, the most important first.
MEASUREMENTS: dict[str, int] = {
    **{"throughput": 120, "stock": 120, "nondeterministic": 60, "pinning": 40, "save": 100, "way_back": 150},
    **{"products": 60, "attention": 90, "profile": 60, "larger": 60, "head": 60, "oom": 60},
    **{"batch_size": 120, "two_gpus": 60},
}
TASKS = {**CHECKS, **MEASUREMENTS}
# Compiled beside the checks, each row one by one: more at once would not fit into the memory.
COMPILED = (("stock", "larger"), ("throughput", "attention", "nondeterministic"))


def lanes(device: str) -> int:
    """Return how many tasks run at once: beside one another they are slow on few cores."""
    return max(1, min(6, len(os.sched_getaffinity(0)) // 3)) if device == "cuda" else 1


def start(
    name: str, device: str, args: argparse.Namespace, seconds: float, env: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Run a task in a process of its own; return its results, and what was wrong."""
    line = [sys.executable, str(Path(__file__).resolve()), "--task", name, "--device", device]
    line += ["--attention", args.attention]
    late, code = False, 0
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe could stay open in what the task started
        process = subprocess.Popen(line, env={**os.environ, **(env or {})}, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end(process)
        output.seek(0)
        lines, results = output.read().splitlines(), []
    for text in lines:
        if RESULT in text:
            with contextlib.suppress(ValueError):  # it was killed in the middle of a line
                results.append(json.loads(text.partition(RESULT)[2]))
    last = next((text for text in reversed(lines) if text and RESULT not in text), "")
    wrong = f"took more than {seconds:.0f} s" if late else "" if code == 0 else last[:200] or f"code {code}"
    return results, wrong


class Report:
    """The results so far, written to a file after each task."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.results, self.began = args, list[dict[str, Any]](), time.monotonic()
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.began + 60 * self.args.minutes - time.monotonic()

    def run(self, name: str, compile_only: bool = False) -> None:
        """Run a task and keep its results; one that only compiles has none."""
        seconds, began = min(TASKS[name], self.left), time.monotonic()
        found, wrong = list[dict[str, Any]](), "out of time"
        if seconds > 5:
            env = {COMPILE_ONLY: "1"} if compile_only else None
            found, wrong = start(name, self.args.device, self.args, seconds, env)
        now, how = time.monotonic(), ", only compiled" if compile_only else ""
        print(f"{now - self.began:5.0f} s  {name}{how}: {now - began:.0f} s  {wrong}", flush=True)
        if compile_only:
            return
        if wrong:
            result = NOT_RUN if wrong.startswith(("took more", "out of time")) else FAILS
            found.append({"kind": "check", "name": name, "result": result, "detail": wrong})
        self.keep(found)

    def compile(self, names: list[str]) -> None:
        """Let tasks compile what they will measure, one after another."""
        for name in names:
            self.run(name, compile_only=True)

    def keep(self, found: list[dict[str, Any]]) -> None:
        """Add results, and write all to the file."""
        with self._lock:
            self.results += found
            about = {"device": self.args.device, "results": self.results}
            Path(self.args.json).write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def ratios(results: list[dict[str, Any]], size: Size) -> Iterator[tuple[str, float, str]]:
    """Yield (name, value, unit) of what follows from the measured rates."""
    rates = {each["name"]: each["value"] for each in results if each.get("unit") == "tok/s"}
    case = f"{size.model} B={size.batches[1]}"
    same = [
        rates[name]
        for name in (case, f"{case}, attention ours", f"{case}, head {size.head_gib[0]} GiB")
        if name in rates
    ]
    if not same:
        return
    ours, small = statistics.median(same), f"{size.model} B={size.batches[0]}"
    if small in rates and f"stock {small}" in rates:
        yield f"ours / stock, B={size.batches[0]}", round(rates[small] / rates[f"stock {small}"], 3), ""
    for name, label in (
        (f"stock {case}", "ours / stock"),
        (f"stock {case}, no cuDNN attention", "ours / stock without cuDNN attention"),
        (f"{case}, --deterministic off", "ours / ours with --deterministic off"),
    ):
        if name in rates:
            yield label, round(ours / rates[name], 3), ""
    yield f"spread of {len(same)} measurements of {case}", round(100 * (max(same) / min(same) - 1), 2), "%"


def show(results: list[dict[str, Any]]) -> None:
    """Print both tables."""
    for each in results:
        if each["kind"] == "check":
            detail = f"   {each['detail']}" if each.get("detail") else ""
            print(f"  {each['name']:<48} {each['result']}{detail}")
    print()
    for each in results:
        if each["kind"] == "figure":
            value = f"{each['value']:,}" if isinstance(each["value"], (int, float)) else each["value"]
            print(f"  {each['name']:<48} {value} {each['unit']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--json", default="gpu.json", metavar="FILE")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--attention", default="ours,sdpa,flex,cudnn,fa3")
    parser.add_argument("--task", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        line = "error: there is no GPU for this torch here; --device cpu runs the same logic with tiny sizes"
        print(line, file=sys.stderr)
        return 2
    if args.task:
        globals()[f"task_{args.task}"](args.device, Size(args.device), args)
        return 0
    names = args.only.split(",") if args.only else list(TASKS)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        print(f"error: --only {unknown[0]}: there are {', '.join(TASKS)}", file=sys.stderr)
        return 2
    size, report = Size(args.device), Report(args)
    with scratch() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        with ThreadPoolExecutor(lanes(args.device)) as pool:
            rows = [[name for name in row if name in names] for row in COMPILED] if size.compile else []
            work: list[Callable[[], None]] = [functools.partial(report.compile, row) for row in rows]
            work += [functools.partial(report.run, name) for name in CHECKS if name in names]
            for done in [pool.submit(each) for each in work]:
                done.result()
        for name in MEASUREMENTS:
            if name in names:
                report.run(name)
    report.keep(
        [
            {"kind": "figure", "name": name, "value": value, "unit": unit}
            for name, value, unit in ratios(report.results, size)
        ]
    )
    show(report.results)
    return int(any(each.get("result") == FAILS for each in report.results))


if __name__ == "__main__":
    sys.exit(main())
