"""The first ten minutes on a GPU: whether what was only tested on CPUs holds there, and how fast it is.

    python benchmarks/gpu.py [--minutes 9] [--json gpu.json] [--only NAME,NAME] [--attention sdpa,flex,cudnn,fa3]
    python benchmarks/gpu.py --device cpu      # the same logic with tiny sizes, on a machine without a GPU

It needs only the repository and torch >= 2.9 with CUDA. Each task is a process of its own, so that one that crashes or
runs out of memory costs only itself; what the time does not suffice for is listed as not run. Prints a table of checks
and one of figures, and writes both as JSON. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


RESULT = "RESULT "
HOLDS, FAILS, NOT_HERE, TWO_GPUS, NOT_RUN = "holds", "fails", "needs a GPU", "needs two GPUs", "not run"
SCRIPT = str(ROOT / "train_gpt2_mod.py")
STEP = re.compile(r"step:(\d+)/\d+ \| loss (\S+)")


class Size:
    """The sizes of a task: those of a GPU, or tiny ones for `--device cpu`."""

    def __init__(self, device: str) -> None:
        gpu = device == "cuda"
        self.model, self.larger, self.small = ("d12", "d24", "d6") if gpu else ("d2", "d4", "d2")
        self.batches, self.length = ((8, 32, 64), 1024) if gpu else ((1, 2), 16)
        self.larger_batch = 16 if gpu else 1
        self.steps, self.repeats, self.losses = (20, 20, 50) if gpu else (2, 3, 3)
        self.save_steps = 200 if gpu else 6
        self.buffer = (1 << 30) if gpu else (1 << 20)
        self.compile = gpu
        self.head_gib = (1, 2, 4) if gpu else (0.001,)


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
    return settings, world, Compiler(config, settings, kind, Path(tempfile.mkdtemp()) / "compiled")


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
    """Return the seconds of a step, after three that compile and warm up."""
    for _ in range(3):
        step()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - began) / steps


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def report_rate(name: str, model: str, tokens: int, length: int, seconds: float, device: str) -> None:
    """Report tokens/s, and MFU where the peak of the card is known."""
    from unbroken.model import families
    from unbroken.runtime.environment import peak_flops

    figure(name, round(tokens / seconds), "tok/s")
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

    if name in ("sdpa", ""):
        yield
    elif name == "cudnn":
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            yield
    elif name == "fa3":
        from torch.nn.attention import activate_flash_attention_impl  # torch 2.11 and newer

        activate_flash_attention_impl("FA3")
        yield
    elif name == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        masks: dict[int, Any] = {}

        def attend(q: Any, k: Any, v: Any, is_causal: bool) -> Any:
            return flex_attention(q, k, v, block_mask=masks[q.size(2)])

        for length in (16, 1024):
            masks[length] = create_block_mask(
                lambda b, h, q, kv: q >= kv, None, None, length, length, "cuda" if torch.cuda.is_available() else "cpu"
            )
        functions = type(torch)("functions")
        functions.__dict__.update(vars(gpt.F))
        functions.scaled_dot_product_attention = attend  # type: ignore[attr-defined]
        before, gpt.F = gpt.F, functions  # type: ignore[assignment]
        try:
            yield
        finally:
            gpt.F = before  # type: ignore[assignment]
    else:
        raise SystemExit(f"--attention {name}: there are sdpa, cudnn, flex and fa3")


# ---- checks ----------------------------------------------------------------------------------------------------------


def task_machine(device: str, size: Size, args: argparse.Namespace) -> None:
    figure("torch", torch.__version__)
    if device == "cuda":
        figure("card", torch.cuda.get_device_name())
        figure("capability", ".".join(map(str, torch.cuda.get_device_capability())))
        figure("CUDA", str(torch.version.cuda))
        figure("cuDNN", str(torch.backends.cudnn.version()))
    from unbroken.runtime.settings import _best_dtype

    figure("--dtype auto", _best_dtype(torch.device(device)))


def task_no_sync(device: str, size: Size, args: argparse.Namespace) -> None:
    training = Training(device, size.small, 2, size.length, compiled=False)
    training.step()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    error = ""
    try:
        for _ in range(3):
            training.step()
    except RuntimeError as caught:
        error = str(caught)[:200]
    check_on_gpu("three steps without a synchronization", device, not error, error)


def task_gradient_hash(device: str, size: Size, args: argparse.Namespace) -> None:
    training = Training(device, size.small, 2, size.length, compiled=size.compile)
    figure("hash", training.gradient_hash())


def task_same_gradients(device: str, size: Size, args: argparse.Namespace) -> None:
    """Three processes with empty caches, in which inductor's timings are noise."""
    hashes = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            env = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_DISTORT_BENCHMARKING_RESULT": "random"}
            hashes += [result["value"] for result in start("gradient_hash", device, args, 120, env)[0]]
    check("the same gradients with other timings", len(hashes) == 3 and len(set(hashes)) == 1, " ".join(hashes))


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
    for _ in range(size.repeats):
        hashes.add(training.gradient_hash())
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
    torch.cuda._sleep(20_000_000_000)
    dist.all_reduce(sent)
    began = time.perf_counter()
    dist.distributed_c10d._abort_process_group()
    check("an abort with a kernel pending", (took := time.perf_counter() - began) < 5, f"{took:.2f} s")
    os._exit(0)  # the kernel is still running


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
        return buffer.tensor(0, 4 * count).view(torch.float32).unique().tolist()

    check_on_gpu("a late copy has the weights before the update", device, saved(True, True) == [1.0])
    check_on_gpu("a late update is in the copy", device, saved(False, True) == [1.0])
    torn = device == "cpu" or saved(True, False) != [1.0]
    check_on_gpu("control: without the wait it has not", device, torn)
    pool.close()


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


# ---- whole trainings -------------------------------------------------------------------------------------------------


def command(device: str, size: Size, **flags: Any) -> list[str]:
    """Return the command line of a training on the built-in corpus."""
    own = {"device": device, "model": size.model, "batch_size": size.batches[0], "sequence_length": size.length}
    own |= {"num_iterations": 100000, "save_every": 0, "compile": "on" if size.compile else "off", **flags}
    return [sys.executable, "-u", SCRIPT, *(f"--{name}={value}" for name, value in own.items())]


def train(folder: str, line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process with all that it has started."""
    from unbroken.runtime.child_training import kill_tree

    kill_tree(process)


def until(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> str:
    """Read lines until one is wanted; return it, "" at the end."""
    assert process.stdout is not None
    return next((line for line in process.stdout if wanted(line)), "")


def task_doctor(device: str, size: Size, args: argparse.Namespace) -> None:
    counts = "1,2" if device == "cuda" else "1"
    for optimizer in ("adamw", "muon") if device == "cuda" else ("adamw",):
        line = [sys.executable, "-m", "unbroken", "doctor", "--json", "--device", device, "--model", size.small]
        line += ["--optimizer", optimizer, "--batch_size", "2", "--grad_accumulation_steps", "2", "--steps", "3"]
        line += ["--sequence_length", str(min(size.length, 256)), "--processes", counts]
        line += ["--compile", "on" if size.compile and optimizer == "adamw" else "off"]
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)
        check(
            f"doctor, {optimizer}, {counts} processes",
            done.returncode == 0,
            "" if not done.returncode else done.stdout[-300:],
        )


def task_signals(device: str, size: Size, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        process = train(folder, command(device, size, compile="off", model=size.small))
        until(process, lambda line: bool(STEP.match(line)))
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        check("SIGTERM saves and stops", process.returncode == 0 and "stopped by SIGTERM" in said, said[-200:].strip())
        line = command(device, size, compile="off", model=size.small, grad_accumulation_steps=2)
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *line[2:]]
        process = train(folder, runner)
        until(process, lambda line: bool(STEP.match(line)))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        began = time.perf_counter()
        os.kill(int(children[-1]), signal.SIGKILL)
        said, _ = process.communicate(timeout=120)
        took = time.perf_counter() - began
        check("the death of one of two ends both", took < 15 and "died or was stopped" in said, f"{took:.1f} s")


def task_two_gpus(device: str, size: Size, args: argparse.Namespace) -> None:
    names = ("NCCL between GPUs", "the exchange beside the backward pass", "one context a process")
    if device == "cpu" or torch.cuda.device_count() < 2:
        for name in names:
            check(name, TWO_GPUS)
        return
    with tempfile.TemporaryDirectory() as folder:
        line = command(device, size, compile="off", grad_accumulation_steps=2, save_every=2)
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *line[2:]]
        process = train(folder, runner)
        reached = until(process, lambda line: line.startswith("step:6/"))
        check(names[0], bool(reached))
        query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
        pids = [
            line.split(",")[0] for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        ]
        check(names[2], bool(pids) and len(pids) == len(set(pids)))
        check(names[1], NOT_RUN, "compare a profile by hand")
        end(process)


def task_save(device: str, size: Size, args: argparse.Namespace) -> None:
    """The cost of a save by wall clock: steps with a save every 5 against steps without any."""
    took = {}
    for every in (0, 5):
        with tempfile.TemporaryDirectory() as folder:
            process = train(folder, command(device, size, save_every=every, num_iterations=size.save_steps))
            times, blocked = [], []
            assert process.stdout is not None
            for line in process.stdout:
                times += [time.perf_counter()] if STEP.match(line) else []
                blocked += [float(found[1]) for found in [re.search(r"blocked (\S+)s", line)] if found]
            process.wait()
            first = len(times) // 4
            took[every] = (times[-1] - times[first]) / max(1, len(times) - 1 - first) if times else float("nan")
    figure("a step without saves", round(took[0], 5), "s")
    figure("lost when saving every 5 steps", round(100 * (took[5] / took[0] - 1), 2), "%")
    figure("blocked a save, median", round(statistics.median(blocked), 4) if blocked else "none", "s")


def task_way_back(device: str, size: Size, args: argparse.Namespace) -> None:
    """SIGKILL to the next step; with code compiled before, and the first time without."""
    from benchmarks.resume import attempt

    for compiled in ("off", "on") if size.compile else ("off",):
        with tempfile.TemporaryDirectory() as folder:
            line = command(device, size, compile=compiled, save_every=2, resume_from="auto")
            first = attempt(line, Path(folder))
            again = attempt(line, Path(folder))
        label = "compiled" if compiled == "on" else "eager"
        if first.steps and again.steps:
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
    for cudnn in (True, False) if device == "cuda" else (True,):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch._dynamo.reset()
        batch = size.batches[1]
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
    """Candidates in place of SDPA, deterministic; a kernel that this torch or card lacks says so."""
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


def task_batch_size(device: str, size: Size, args: argparse.Namespace) -> None:
    """What --batch_size auto predicts, and the peak of a training with it."""
    if device == "cpu":
        check("--batch_size auto fits", NOT_HERE)
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = {"batch_size": "auto", "total_batch_size": 512 * size.length, "num_iterations": 2}
        done = subprocess.run(command(device, size, **flags), cwd=folder, capture_output=True, text=True)
    found = re.search(r"peak memory consumption: (\d+) MiB", done.stdout)
    free = torch.cuda.mem_get_info()[1] / 2**20
    check("--batch_size auto fits", done.returncode == 0 and "out of memory" not in done.stdout, done.stdout[-200:])
    if found:
        figure("--batch_size auto, peak of the memory", round(100 * int(found[1]) / free, 1), "%")


# In this order: what breaks first comes first, what is only nice to know last.
TASKS: dict[str, int] = {  # seconds that a task may take
    **{"machine": 60, "collectives": 60, "snapshot": 60, "pinning": 60, "no_sync": 60, "losses": 60, "repeats": 60},
    **{"throughput": 120, "stock": 90, "save": 90, "way_back": 90, "signals": 90, "same_gradients": 120},
    **{"doctor": 150, "nondeterministic": 60, "attention": 120, "head": 90, "larger": 90, "batch_size": 60},
    **{"two_gpus": 60},
}


def start(
    name: str, device: str, args: argparse.Namespace, seconds: float, env: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Run a task in a process of its own; return its results, and what was wrong."""
    line = [sys.executable, str(Path(__file__).resolve()), "--task", name, "--device", device]
    process = subprocess.Popen(
        [*line, "--attention", args.attention],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        end(process)

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    timer.cancel()
    code = process.wait()
    results = [json.loads(line.removeprefix(RESULT)) for line in lines if line.startswith(RESULT)]
    last = next((line for line in reversed(lines) if line and not line.startswith(RESULT)), "")
    wrong = f"took more than {seconds:.0f} s" if late.is_set() else "" if code == 0 else last[:200]
    return results, wrong


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
    parser.add_argument("--attention", default="sdpa,flex,cudnn,fa3")
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
    deadline, results = time.monotonic() + 60 * args.minutes, []
    for name in names:
        left = min(TASKS[name], deadline - time.monotonic())
        if left < 5:
            results.append({"kind": "check", "name": name, "result": NOT_RUN, "detail": "out of time"})
            continue
        print(f"... {name}", flush=True)
        found, wrong = start(name, args.device, args, left)
        results += found
        if wrong:
            late = wrong.startswith("took more")
            result = NOT_RUN if late else FAILS
            results.append({"kind": "check", "name": name, "result": result, "detail": wrong})
    show(results)
    Path(args.json).write_text(json.dumps({"device": args.device, "results": results}, indent=1) + "\n", "utf-8")
    return int(any(each.get("result") == FAILS for each in results))


if __name__ == "__main__":
    sys.exit(main())
