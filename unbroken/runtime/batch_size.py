"""`--batch_size auto`: the largest microbatch that fits into memory, for a step of `--total_batch_size` tokens."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from unbroken.config import AUTO, Config
from unbroken.distributed.memory import free_cached_memory, kind_of_shortage, require_out_of_memory
from unbroken.distributed.step_plan import StepPlan, halve_microbatch
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.model import families
from unbroken.model.language_model import LanguageModel
from unbroken.model.loss import CHUNK_BYTES, rows_at_a_time
from unbroken.text import format_count

if TYPE_CHECKING:
    from unbroken.runtime.compile import Compiler
    from unbroken.runtime.settings import ResolvedSettings


GPU_SHARE, HOST_SHARE = 0.92, 0.7  # of the free memory; fragmentation and other programs need the rest
MAX_TOKENS_ON_CPU = 16_384  # of a microbatch: larger matrix products are no faster
SNAPSHOT_BYTES = 12  # in host memory, for each parameter: the weight and two moments


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory of a process in bytes: `budget` it may use, `fixed` for the run's state, `sequence` for each sequence."""

    budget: float
    fixed: float
    sequence: float

    @property
    def num_sequences(self) -> int:
        """Number of sequences that fit into a microbatch, 0 or less if there is none."""
        return int((self.budget - self.fixed) // self.sequence)


def shrink(plan: StepPlan, config: Config, memory: str) -> tuple[StepPlan, str]:
    """Return a plan with half the microbatch and twice as many, after GPU memory ran out, and the line that says so.

    A step keeps its tokens.

    Args:
        plan: The present plan.
        config: The flags.
        memory: Which memory ran out on this rank: "CUDA", "host", or "" for none.

    Raises UserError if the microbatch cannot be halved, or if host memory ran out: another program may have taken it.
    """
    if memory == "host" or config.on_oom == "fail" or plan.microbatch_size % 2:
        raise kind_of_shortage(memory)(
            f"{memory or 'CUDA'} out of memory with a microbatch of {plan.microbatch_size} x {config.sequence_length}"
            " tokens: use a smaller --batch_size with more --grad_accumulation_steps, --activation_checkpointing on, or"
            " a shorter --sequence_length"
        )
    free_cached_memory()
    smaller = halve_microbatch(plan, config.elastic_ranks)
    return smaller, (
        f"CUDA out of memory: going on with microbatches of {format_count(smaller.microbatch_size, 'sequence')},"
        " twice as many;"
        " the tokens of a step stay the same, bits may differ from here"
    )


def find_batch_size(
    config: Config, settings: ResolvedSettings, world: World, compiler: Compiler
) -> tuple[Config, list[str]]:
    """Return the configuration with numbers in place of `auto`, and notes for the console. Collective.

    Args:
        config: The flags.
        settings: What `auto` means on this machine.
        world: The ranks.
        compiler: Compiles the model if the run is compiled: on a GPU it is measured as it is trained.


    Raises UserError if a single sequence does not fit.
    """
    if config.batch_size != AUTO:
        return config, []
    model = families.build(config.model, config.model_flags)
    model.recompute = config.activation_checkpointing == "on"
    on_gpu = world.device.type == "cuda"
    memory = _measure(model, config, settings, world, compiler) if on_gpu else _estimate(model, config, world)
    fits = min(world.gather(memory.num_sequences))
    if fits < 1:
        raise UserError(
            f"--batch_size auto: not even one sequence of {config.sequence_length} tokens fits into memory; use"
            " --activation_checkpointing on, a shorter --sequence_length or a smaller --model"
        )
    sequences = config.total_batch_size // config.sequence_length
    size = largest_batch_size(sequences, fits, world.size, config.elastic_ranks)
    count = sequences // size
    microbatches = f"{format_count(count, 'microbatch')} of {format_count(size, 'sequence')}"
    note = f"--batch_size auto: {microbatches} a step (at most {fits} fit)"
    return dataclasses.replace(config, batch_size=size, grad_accumulation_steps=count), [note]


def largest_batch_size(sequences: int, fits: int, world_size: int, elastic_ranks: int) -> int:
    """Return the number of sequences of a microbatch.

    It is the largest divisor of `sequences` up to `fits` whose number of microbatches is a multiple of
    `elastic_ranks`; if there is none, a multiple of `world_size`; if there is none, at least `world_size`.

    Args:
        sequences: Sequences of a step.
        fits: Sequences that fit into the memory of a process.
        world_size: Number of processes.
        elastic_ranks: Number of processes up to which the bits are the same.
    """
    sizes = [size for size in range(1, min(fits, sequences) + 1) if sequences % size == 0]
    for divisor in (elastic_ranks, world_size):
        exact = [size for size in sizes if sequences // size % divisor == 0]
        if exact:
            return exact[-1]
    return next((size for size in reversed(sizes) if sequences // size >= world_size), sizes[0])


def state_bytes(world_size: int, elastic_ranks: int) -> float:
    """Return the bytes that a process holds for each parameter of the model.

    They are weight and gradient, its share of two moments, the partial sums that wait (`Gradients`), and with several
    processes the sum that is being exchanged.
    """
    waiting = max(1, elastic_ranks // world_size).bit_length() - 1
    return 4 * (2 + 2 / world_size + waiting + (world_size > 1))


def _estimate(model: LanguageModel, config: Config, world: World) -> MemoryUse:
    """Estimate the memory of a process on a CPU."""
    per_parameter = state_bytes(world.size, config.elastic_ranks) + SNAPSHOT_BYTES / world.size
    fixed = per_parameter * model.num_parameters() + 3 * CHUNK_BYTES["cpu"]
    sequence = model.activation_bytes(config.sequence_length)
    useful = max(1, MAX_TOKENS_ON_CPU // config.sequence_length) * sequence + fixed
    return MemoryUse(min(HOST_SHARE * _available_bytes() / world.local_size, useful), fixed, sequence)


def _available_bytes() -> int:
    """Return the bytes of host memory that a process can still allocate; 8 GiB where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 8 << 30


def _measure(
    model: LanguageModel, config: Config, settings: ResolvedSettings, world: World, compiler: Compiler
) -> MemoryUse:
    """Measure the memory of a process on a GPU, by backward passes with two sizes of microbatch.

    The memory of the head grows with the microbatch only until its logits are computed in pieces; the sizes are beyond
    that point if they fit. Of a model too large for that, the head is a small part.
    """
    budget = GPU_SHARE * torch.cuda.mem_get_info(world.device)[0] / world.ranks_per_gpu
    in_pieces = -(-rows_at_a_time("cuda", model.config.vocab_size) // config.sequence_length)
    for size in sorted({in_pieces, min(in_pieces, 4), 1}, reverse=True):
        peaks = _peak_memory((size, size + 1), config, settings, world, compiler)
        if peaks:
            sequence = max(peaks[1] - peaks[0], 1)
            other_state = state_bytes(world.size, config.elastic_ranks) - 8  # weight and gradient are in the peak
            return MemoryUse(budget, peaks[0] - size * sequence + other_state * model.num_parameters(), sequence)
    return MemoryUse(budget, budget, 1.0)


def _peak_memory(
    sizes: tuple[int, int], config: Config, settings: ResolvedSettings, world: World, compiler: Compiler
) -> list[int]:
    """Return the peak memory of a step with each number of sequences, in bytes; empty if one does not fit."""
    peaks = []
    try:
        model = families.build(config.model, config.model_flags).allocate(world.device)
        model.recompute = config.activation_checkpointing == "on"
        compiler.compile(model)
        for size in sizes:
            torch.cuda.reset_peak_memory_stats(world.device)
            tokens = torch.zeros(size, config.sequence_length, dtype=torch.int64, device=world.device)
            with settings.autocast(world.device):
                loss = model(tokens, tokens)
            loss.backward()
            peaks.append(torch.cuda.max_memory_allocated(world.device))
            model.zero_grad(set_to_none=True)
    except RuntimeError as error:
        require_out_of_memory(error)
        peaks = []
    model = loss = tokens = None  # type: ignore[assignment]
    free_cached_memory()
    return peaks
