"""The sum itself, on real processes: weights, losses and norms have the same bits on any power of two of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests import fork_server
from tests.harness import free_port
from unbroken.config import merge
from unbroken.distributed import flat_params
from unbroken.distributed import gradients as reduction
from unbroken.distributed.flat_params import BLOCK, ShardedParameters
from unbroken.distributed.gradients import NORM_ROWS, Gradients, _batches, tree_sum
from unbroken.distributed.sliced_tensor import SlicedTensor
from unbroken.distributed.step_plan import StepPlan, halve_microbatch, plan_step
from unbroken.distributed.world import World, init_distributed
from unbroken.model.gpt import GPT
from unbroken.model.language_model import ModelConfig
from unbroken.optim import Optimizers, build_optimizer, param_groups
from unbroken.runtime.batch_size import state_bytes
from unbroken.schedule import learning_rate

SMALL = ModelConfig(2, 2, 64, vocab_size=300)


def built(world: World, optimizer_name: str = "adamw") -> tuple[GPT, ShardedParameters, Optimizers]:
    with torch.device("meta"):
        model = GPT(SMALL)
    sharded = ShardedParameters(model, world, param_groups(model, optimizer_name))
    optimizer = build_optimizer(sharded, learning_rate=1e-2, weight_decay=0.1)
    model.initialize(1)
    return model, sharded, optimizer


def train(
    world: World, accumulation: int, overlap: bool, clip: bool, short: int = 0, late: bool = False, muon: bool = False
) -> tuple[str, str, int]:
    """Four steps; a hash of all weights, one of all losses and norms, and how many gradient buffers waited.

    After step `short` rank 0 runs out of memory: at once, or `late`, in its last backward pass.
    """
    model, sharded, optimizer = built(world, "muon" if muon else "adamw")
    plan = plan_step(2, accumulation, world.size, 8)
    gradients = Gradients(sharded, plan, world, overlap=overlap)
    said = []
    for step in range(4):
        if short and step == short:
            with suppress(MemoryError):
                run_out_of_memory(world, model, plan, gradients, late)
            plan = halve_microbatch(plan, 8)
            gradients.replan(plan)
        losses = []
        for index in gradients.microbatches():
            torch.manual_seed(1000 * step + index)
            x = torch.randint(0, 300, (plan.microbatch_size, 16))
            loss = model(x, x)
            loss.backward()
            gradients.add(index)
            losses.append(loss.detach())
        gradients.exchange()
        said += [gradients.clip(0.5).item()] if clip else []
        optimizer.step()
        gradients.gather_weights()
        said += gradients.losses(losses).tolist()
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    return weights, repr(said), len(gradients._waiting)


def run_out_of_memory(world: World, model: GPT, plan: StepPlan, gradients: Gradients, late: bool) -> None:
    """Go through a step, of which rank 0 has no memory for the first microbatch, or `late` for the end of the last."""
    first, last = plan.ranges[0]

    def fail(_: torch.Tensor) -> None:
        raise MemoryError

    for index in gradients.microbatches():
        if world.is_main and index == (last - 1 if late else first):
            hook = model.blocks()[0].attn.c_attn.weight.register_hook(fail)
        x = torch.randint(0, 300, (plan.microbatch_size, 16))
        try:
            model(x, x).backward()
        except MemoryError:
            hook.remove()
            gradients.give_up()
            assert gradients._num_sent == len(gradients._order) or not gradients._overlap
            world.gather(None)
            raise
        gradients.add(index)
    # On a GPU this rank may have to wait for what it has sent before it can tell or hear anything.
    for exchange in gradients._exchanges:
        for _, _, work in exchange._pending:
            work.wait()
    world.gather(None)


def worker(rank: int, size: int, port: int, settings: dict[str, Any], answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    flat_params.CHUNK_BLOCKS = settings.pop("chunk_blocks", flat_params.CHUNK_BLOCKS)
    if settings.pop("broken", False):
        reduction.tree_sum = in_sequence
    with init_distributed("cpu") as world:
        result = train(world, **settings)
    if rank == size - 1:
        answers.put(result)


def in_sequence(terms: list[torch.Tensor]) -> torch.Tensor:
    """The twin: left to right, as plain accumulation does."""
    total = terms[0]
    for term in terms[1:]:
        total.add_(term)
    return total


def on(size: int, **settings: Any) -> tuple[str, str, int]:
    """Train on `size` processes; what the last of them ends with."""
    settings = {"accumulation": 8, "overlap": False, "clip": True, **settings}
    port = free_port()
    context = mp.get_context(fork_server.start_method())
    answers = context.Queue()
    processes = [context.Process(target=worker, args=(rank, size, port, settings, answers)) for rank in range(size)]
    for process in processes:
        process.start()
    result: tuple[str, str, int] = answers.get(timeout=120)
    for process in processes:
        process.join()
    return result


@pytest.fixture(scope="module")
def alone() -> tuple[str, str, int]:
    torch.set_num_threads(1)
    return train(World.single(), 8, overlap=False, clip=True)


@pytest.mark.parametrize(("size", "overlap"), [(2, False), (2, True), (4, True)])
def test_the_same_bits(alone: tuple[str, str, int], size: int, overlap: bool) -> None:
    weights, said, waiting = on(size, overlap=overlap)
    assert (weights, said) == alone[:2]
    assert waiting + 1 == (8 // size).bit_length()


def test_who_runs_out_of_memory_leaves_nobody_waiting() -> None:
    """The others' chunks may be on their way already; the step begins anew for all, with nothing left of it."""
    many = {"muon": True, "chunk_blocks": 2}  # of groups and of chunks, sent in turns
    expected = on(2, overlap=False, short=2, **many)
    assert on(2, overlap=True, short=2, late=True, **many) == on(2, overlap=True, short=2, **many) == expected


def test_a_batch_size_is_chosen_for_what_is_kept(alone: tuple[str, str, int]) -> None:
    """Weight, gradient, two moments, and the partial sums that really waited."""
    assert state_bytes(1, 8) == 4 * (1 + 1 + 2 + alone[2])
    assert state_bytes(8, 8) == 4 * (1 + 1 + 2 / 8 + 0 + 1)


def test_twin_another_order_gives_other_bits(alone: tuple[str, str, int]) -> None:
    assert on(4, broken=True)[0] != alone[0]


def test_a_norm_takes_every_block_once_however_they_are_dealt_out() -> None:
    """Also where a process owns more blocks than one kernel adds, in several slices."""
    runs = [(0, 3), (10, 10 + 2 * NORM_ROWS), (500, 501), (600, 600 + NORM_ROWS)]
    batches = list(_batches(runs, NORM_ROWS))
    covered = [block for batch in batches for lo, hi in batch for block in range(lo, hi)]
    assert covered == [block for lo, hi in runs for block in range(lo, hi)]
    sizes = [sum(hi - lo for lo, hi in batch) for batch in batches]
    assert sizes == [NORM_ROWS, NORM_ROWS, NORM_ROWS, 4]

    with torch.device("meta"):
        sharded = ShardedParameters(GPT(ModelConfig(2, 2, 64, vocab_size=40_000)), World.single())
    (group,) = sharded.groups
    group.grad[: group.used] = torch.randn(group.used, generator=torch.Generator().manual_seed(4))
    squares = Gradients(sharded, plan_step(2, 8, 1, 8), World.single())._squares(group)
    assert len(squares) > 2 * NORM_ROWS
    expected = group.grad[: len(squares) * BLOCK].double().view(-1, BLOCK).square().sum(1)
    torch.testing.assert_close(squares, expected, rtol=1e-5, atol=0)


def test_two_leaves_of_three() -> None:
    """Six microbatches are two leaves of three, on one process or two."""
    assert on(1, accumulation=6, clip=False) == (*on(2, accumulation=6, clip=False)[:2], 1)


def test_on_three_processes_the_sum_is_right_if_not_the_same(alone: tuple[str, str, int]) -> None:
    weights, said, _ = on(3)
    assert weights != alone[0]
    first = [float(part) for part in said[1:-1].split(",")]
    assert first[1:9] == [float(part) for part in alone[1][1:-1].split(",")][1:9]  # the losses of the first step


def test_tree_sum() -> None:
    def expression(count: int) -> str:
        return tree_sum([Term(str(i)) for i in range(count)]).text  # type: ignore[misc, return-value]

    class Term:
        def __init__(self, text: str) -> None:
            self.text = text

        def add_(self, other: Term) -> Term:
            return Term(f"({self.text}+{other.text})")

    assert expression(4) == "((0+1)+(2+3))"
    assert expression(3) == "((0+1)+2)"
    assert expression(6) == "(((0+1)+(2+3))+(4+5))"


def test_fused_adamw_does_not_see_where_slices_end() -> None:
    """The same update of one flat tensor and of its slices: what BLOCK is for."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(6 * BLOCK, generator=generator)
    slopes = torch.randn(4, 6 * BLOCK, generator=generator)

    def updated(cuts: list[int]) -> torch.Tensor:
        flat = values.clone()
        bounds = list(zip([0, *cuts], [*cuts, 6 * BLOCK], strict=True))
        parameters = [torch.nn.Parameter(flat[lo:hi]) for lo, hi in bounds]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
        for slope in slopes:
            for parameter, (lo, hi) in zip(parameters, bounds, strict=True):
                parameter.grad = slope[lo:hi]
            optimizer.step()
        return flat

    whole = updated([])
    assert torch.equal(whole, updated([BLOCK, 3 * BLOCK])) and torch.equal(whole, updated([2 * BLOCK, 4 * BLOCK]))


def test_leaves_cover_everything_once() -> None:
    """The pieces of all processes together are the parameter and its moments, each element once."""
    from unbroken.distributed.world import Launch

    for size in (1, 2, 3, 4):
        covered: dict[str, list[int]] = {}
        for rank in range(size):
            _, sharded, optimizer = built(World(Launch(rank=rank, size=size), torch.device("cpu")))
            trees: dict[str, SlicedTensor] = sharded.model_state()
            for index, entry in sharded.optimizer_state(optimizer)["state"].items():
                trees |= {f"{index}.{key}": leaf for key, leaf in entry.items()}
            for name, leaf in trees.items():
                counts = covered.setdefault(name, [0] * leaf.numel)
                for piece in leaf.slices:
                    for element in range(piece.start, piece.stop):
                        counts[element] += 1
        assert all(set(counts) == {1} for counts in covered.values())
        assert "lm_head.weight" in covered and "0.step" in covered


def test_a_torch_optimizer_loads_the_state() -> None:
    model, sharded, optimizer = built(World.single())
    tree = sharded.optimizer_state(optimizer)
    whole = {
        i: {key: leaf.slices[0].data.view(leaf.shape) if len(leaf.slices) == 1 else leaf for key, leaf in entry.items()}
        for i, entry in tree["state"].items()
    }
    stock = torch.optim.AdamW(model.parameters())
    stock.load_state_dict({"state": whole, "param_groups": tree["param_groups"]})
    assert stock.param_groups[0]["betas"] == [0.9, 0.95] or stock.param_groups[0]["betas"] == (0.9, 0.95)


def schedule(**changes: int) -> Callable[[int], float]:
    settings = {"warmup_iters": 4, "warmdown_iters": 5, "num_iterations": 20, **changes}
    return lambda step: learning_rate(step, merge({"learning_rate": 1.0, **settings}))


def test_learning_rate() -> None:
    rate = schedule()
    assert [rate(step) for step in (1, 2, 4, 5, 15)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert [rate(step) for step in (16, 17, 20)] == [1.0, 0.8, 0.2]
    assert schedule(warmup_iters=0, warmdown_iters=0)(20) == 1.0
    assert (schedule()(0), schedule(warmup_iters=0)(0)) == (0.0, 1.0)  # of a checkpoint before the first update
