"""The CUDA code, run on simulated GPUs. `make test-simulated-gpu` runs this."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server, harness, simulated_gpu
from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus

REASON = simulated_gpu.missing() if os.environ.get("UNBROKEN_SIMULATED_GPU") else "make test-simulated-gpu runs it"
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

FLAGS: dict[str, Any] = {
    **{"run_id": RUN_ID, "device": "cuda", "compile": "off", "num_iterations": 6, "save_every": 2, "grad_clip": 1},
    **{"val_loss_every": 3, "val_tokens": 256},
}


def trained(folder: Path, gpus: int, processes: int = 0, changes: dict[str, Any] | None = None, **settings: Any) -> str:
    """Train to the end on simulated GPUs; return what was printed."""
    folder.mkdir(exist_ok=True)
    write_corpus(folder)
    env = simulated_gpu.environment(gpus, report=folder / "report.txt", **settings)
    return train(folder, {**FLAGS, **(changes or {})}, processes=processes or gpus, env=env).text


def run_code(folder: Path, code: str, gpus: int = 1, *typed: str) -> Any:
    """Run Python code on simulated GPUs, with this project's packages; return the completed process."""
    env = {**os.environ, **simulated_gpu.environment(gpus)}
    env["PYTHONPATH"] += f"{os.pathsep}{harness.ROOT}"
    command = [sys.executable, "-c", code, *typed]
    return fork_server.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one GPU, and the report of its process."""
    folder = tmp_path_factory.mktemp("straight")
    assert "device Simulated GPU: bf16" in trained(folder, 1)
    return folder


def final(folder: Path) -> Path:
    return folder / f"logs/{RUN_ID}/final.pt"


@pytest.mark.parametrize(("gpus", "processes"), [(2, 2), (4, 4), (1, 2)], ids=["2 with NCCL", "4 with NCCL", "shared"])
def test_any_number_of_gpus_gives_the_same_bits(straight: Path, tmp_path: Path, gpus: int, processes: int) -> None:
    trained(tmp_path, gpus, processes)
    assert_same_bits(final(straight), final(tmp_path))
    assert log_lines(straight) == log_lines(tmp_path)
    contexts = re.findall(r"rank (\d) contexts((?: \d)+)$", (tmp_path / "report.txt").read_text(), re.M)
    assert contexts and all(opened == f" {int(rank) % gpus}" for rank, opened in contexts), "a GPU of another rank"


def test_a_killed_run_continues_on_another_number_of_gpus(straight: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    running = launch(tmp_path, arguments(FLAGS), 2, env=simulated_gpu.environment(2), pace=0.5, hold=4)
    running.kill_at(3)  # a GPU's step is in the log when the next one is under way
    trained(tmp_path, 1, changes={"resume_from": RUN_ID})
    assert_same_bits(final(straight), final(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_leave_when_nccl_waits_for_a_dead_rank(tmp_path: Path, number: int) -> None:
    """NCCL's kernels wait for ever; the abort, the exit and the unpinning must not wait for them."""
    write_corpus(tmp_path)
    changes = {**FLAGS, "num_iterations": 1000}
    running = launch(tmp_path, arguments(changes), 2, env=simulated_gpu.environment(2), pace=0.2)
    running.until(lambda: harness.last_step(tmp_path) >= 3)
    os.kill(running.workers()[1], number)
    began = time.monotonic()
    done = running.wait(timeout=60)
    assert done.code == 1 and "died or was stopped" in done.text, done.text
    assert time.monotonic() - began < 30, done.text  # some seconds on a quiet machine


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"capability": 75}, "fp32, not compiled"), ({"pin_fails": 1}, "bf16, not compiled")],
    ids=["a T4", "memory that cannot be pinned"],
)
def test_other_cards_train_and_save(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    text = trained(tmp_path, 1, **settings)
    assert f"device Simulated GPU: {said}" in text and "final.pt" in text, text
    attention = f"_{'efficient' if 'fp32' in said else 'flash'}_attention_backward"
    assert attention in (tmp_path / "report.txt").read_text()


def test_too_little_memory_halves_the_microbatch_and_then_says_so(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    changes = {**FLAGS, "grad_accumulation_steps": 1, "batch_size": 64, "sequence_length": 64, "grad_clip": 0}
    texts = [
        harness.train(tmp_path, changes, None, check=False, env=simulated_gpu.environment(1, mib=mib))
        for mib in (2, 40)
    ]
    assert texts[0].code == 2 and "error: out of GPU memory" in texts[0].err, texts[0].text
    assert texts[1].code == 0 and "going on with microbatches of" in texts[1].text, texts[1].text
    assert not any("Traceback" in done.text for done in texts)


def test_the_checks_of_the_benchmark_hold(tmp_path: Path) -> None:
    """With controls of its own: a snapshot whose update does not wait has wrong bytes."""
    code = """if True:
        import argparse, sys
        from benchmarks import gpu
        size = gpu.Size("cpu")
        size.compile, size.buffer = False, 1 << 24
        for name in ("machine", "snapshot", "pinning", "losses", "repeats", "no_sync"):
            getattr(gpu, f"task_{name}")("cuda", size, argparse.Namespace())
        """
    done = run_code(tmp_path, code)
    results = re.findall(r'"name": "([^"]+)", "result": "(\w+)"', done.stdout)
    assert len(results) == 8 and {result for _, result in results} == {"holds"}, done.stdout + done.stderr


def test_the_simulation_finds_what_a_gpu_would_do(tmp_path: Path) -> None:
    """Memory that is reused while another stream reads it, a stream that does not wait, a kernel that is not there."""
    code = """if True:
        import torch
        side, host = torch.cuda.Stream(), torch.empty(1 << 16).pin_memory()

        def copied(waits, kept):
            source = torch.zeros(1 << 16, device="cuda")
            torch.cuda.synchronize()  # in the memory there may be ones
            torch.cuda._sleep(4_000_000_000)
            source.add_(1)
            with torch.cuda.stream(side):
                if waits:
                    side.wait_stream(torch.cuda.default_stream())
                    torch.cuda._sleep(100_000_000)
                host.copy_(source, non_blocking=True)
            if kept:
                source.record_stream(side)
            del source
            torch.full((1 << 16,), 2.0, device="cuda")
            torch.cuda.synchronize()
            return host.unique().tolist()

        print(copied(True, True), copied(False, True), copied(True, False))
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.ones(1, device="cuda").item()
        except RuntimeError as error:
            print("no:", str(error).splitlines()[0])
        """
    done = run_code(tmp_path, code)
    right, early, reused, read = done.stdout.splitlines()[0].split("] ") + done.stdout.splitlines()[1:]
    assert right == "[1.0" and early != "[1.0" and reused != "[1.0]" and read.startswith("no:"), (
        done.stdout + done.stderr
    )


def test_a_rank_with_less_memory_makes_all_halve_the_microbatch(tmp_path: Path) -> None:
    """Its GPU runs out of memory while that of the other waits in NCCL for its chunks."""
    write_corpus(tmp_path)
    changes = {**FLAGS, "grad_accumulation_steps": 2, "batch_size": 64, "sequence_length": 64, "grad_clip": 0}
    done = train(tmp_path, changes, 2, env=simulated_gpu.environment(2, mib="400,60"))
    assert "going on with microbatches of" in done.text and "step:6/6" in done.text, done.text


def test_compiled_code_is_the_same_without_timing_and_without_atomics(tmp_path: Path) -> None:
    """Inductor and Triton compile for the GPU; their kernels compute nothing here."""
    sources = []
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        write_corpus(folder)
        changes = {**FLAGS, "compile": "on", "num_iterations": 1, "val_loss_every": 0, "replay": "off"}
        done = train(folder, {**changes, "on_nan": "go_on"}, None, env=simulated_gpu.environment())
        assert "bf16, compiled" in done.text
        paths = (folder / f"logs/{RUN_ID}/compiled").rglob("*.py")
        code = {re.sub(r"/\S+|\w{52}", "", path.read_text()) for path in paths}  # without paths and hashes of them
        assert sum("triton_heuristics" in text for text in code) > 5
        assert not any("tl.atomic" in text for text in code)
        for kernel in ("_dk_dv", "_softmax_loss"):
            assert any(kernel in text for text in code), f"not {kernel}, which is for this GPU"
        assert not [*folder.rglob("*.best_config")], "a kernel was chosen by timing"
        sources.append(code)
    assert sources[0] == sources[1]


def test_the_kernels_for_hopper_compute_what_torch_does(tmp_path: Path) -> None:
    """In Triton's interpreter, which has no bf16: whole blocks, a part of one, and values that are a view."""
    code = """if True:
        import torch
        import torch.nn.functional as F
        import unbroken.model.hopper_attention, unbroken.model.hopper_loss
        from unbroken.model.loss import softmax_loss

        def error(a, b):
            return float((a.float() - b).norm() / b.norm())

        for tokens in (128, 200, 63):
            parts = torch.randn(2, tokens, 3, 2, 64).half().unbind(2)
            own = [part.transpose(1, 2).detach().requires_grad_() for part in parts]
            exact = [part.detach().float().requires_grad_() for part in own]
            given = torch.randn(2, 2, tokens, 64).half()
            out = torch.ops.unbroken.causal_attention(*own)[0]
            reference = F.scaled_dot_product_attention(*exact, is_causal=True)
            out.backward(given)
            reference.backward(given.float())
            print(error(out, reference), *(error(a.grad, b.grad) for a, b in zip(own, exact)))
        for width in (64, 8192, 50304):
            logits, targets = torch.randn(3, width), torch.tensor([0, 7, width - 2])
            logits[:, width - 1] = -torch.inf
            derivative = logits.half()
            losses = torch.ops.unbroken.softmax_loss(derivative, targets)
            print(*map(error, (losses, derivative), softmax_loss(logits.half().float(), targets)))
        """
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(harness.ROOT)}
    done = fork_server.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    errors = [float(word) for word in done.stdout.split()]
    assert len(errors) == 18 and max(errors) < 1e-3, done.stdout + done.stderr


def test_the_library_saves_and_restores_the_tensors_of_a_gpu(tmp_path: Path) -> None:
    """With random states of two GPUs, of which the second process sees one."""
    code = """if True:
        import sys, torch
        from unbroken.checkpoint import CheckpointWriter, RandomState, load, load_into

        def fresh():
            model = torch.nn.Linear(256, 256).cuda()
            return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

        def bits(model, optimizer):
            moments = [state["exp_avg"] for state in optimizer.state.values()]
            return [each.detach().cpu() for each in (*model.parameters(), *moments)]

        model, optimizer = fresh()
        if sys.argv[1] == "save":
            random, saved = RandomState(), {}
            with CheckpointWriter("checkpoints") as writer:
                for step in range(1, 5):
                    optimizer.zero_grad()
                    model(torch.ones(4, 256, device="cuda")).square().sum().backward()
                    writer.before_update()
                    optimizer.step()
                    tree = {"model": model, "optimizer": optimizer, "step": step, "random": random}
                    writer.save(tree, step, overlap=step % 2 == 0)
                    saved[step] = bits(model, optimizer)
            torch.save(saved, "saved.pt")
        for step, expected in torch.load("saved.pt").items():
            model, optimizer = fresh()
            tree = {"model": model, "optimizer": optimizer, "step": 0, "random": RandomState()}
            path = f"checkpoints/model_step{step:06d}.pt"
            assert load_into(tree, path)["step"] == step
            assert all(torch.equal(a, b) for a, b in zip(bits(model, optimizer), expected, strict=True))
            assert torch.equal(load(path, device="cuda")["model"]["bias"].cpu(), expected[1])
        print("same bits")
        """
    for gpus, what in ((2, "save"), (1, "load")):
        done = run_code(tmp_path, code, gpus, what)
        assert done.stdout.strip() == "same bits", done.stdout + done.stderr
