"""`--batch_size auto`: the largest microbatch that fits, for a step of `--total_batch_size` tokens."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from unbroken.config import AUTO, Config
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.model.gpt import PRESETS, GPTConfig, build_uninitialized
from unbroken.model.loss import CHUNK_BYTES, rows_at_a_time

if TYPE_CHECKING:
    from unbroken.runtime.settings import ResolvedSettings


GPU_SHARE, HOST_SHARE = 0.92, 0.7  # of the free memory; the rest is for fragments and for what else runs there
MOST_TOKENS_ON_CPU = 16_384  # beyond, a larger product is no faster
SNAPSHOT_BYTES = 12  # of a parameter, in host memory
KEPT_PER_LAYER = 20  # activations of a token and channel that a layer keeps for its backward pass


def find_batch_size(config: Config, settings: ResolvedSettings, world: World) -> tuple[Config, list[str]]:
    """The configuration with numbers for batch size and accumulation, and what is to be said of it; collective."""
    if config.batch_size != AUTO:
        return config, []
    sequences = config.total_batch_size // config.sequence_length
    budget, base, each = (
        _measured(config, settings, world) if world.device.type == "cuda" else _estimated(config, world)
    )
    fits = min(world.gather(int((budget - base) // each)))
    if fits < 1:
        raise UserError(
            f"--batch_size auto: not even one sequence of {config.sequence_length} tokens fits into memory; use"
            " --activation_checkpointing on, a shorter --sequence_length or a smaller --model"
        )
    size = largest_batch_size(sequences, fits, world.size, config.elastic_ranks)
    count = sequences // size
    said = f"--batch_size auto: {count} microbatches of {size} sequences a step (at most {fits} fit)"
    return dataclasses.replace(config, batch_size=size, grad_accumulation_steps=count), [said]


def largest_batch_size(sequences: int, fits: int, world_size: int, elastic_ranks: int) -> int:
    """The largest divisor of `sequences` up to `fits` that keeps every promise of exactness, or as many as can be."""
    sizes = [size for size in range(1, min(fits, sequences) + 1) if sequences % size == 0]
    for share in (elastic_ranks, world_size):
        kept = [size for size in sizes if sequences // size % share == 0]
        if kept:
            return kept[-1]
    return next((size for size in reversed(sizes) if sequences // size >= world_size), sizes[0])


def state_bytes(world_size: int, elastic_ranks: int) -> float:
    """On a process, for each parameter of the model: weight and gradient, its share of two moments, the partial sums
    that wait (`Gradients`), and between several processes the one that is being exchanged.
    """
    waiting = max(1, elastic_ranks // world_size).bit_length() - 1
    return 4 * (2 + 2 / world_size + waiting + (world_size > 1))


def _estimated(config: Config, world: World) -> tuple[float, float, float]:
    """On a CPU, in bytes: (to be had, taken by the state, taken by a sequence)."""
    shape = PRESETS[config.model]
    each = state_bytes(world.size, config.elastic_ranks) + SNAPSHOT_BYTES / world.size
    state = each * _parameters(shape) + 3 * CHUNK_BYTES["cpu"]
    layers = 2 if config.activation_checkpointing == "on" else shape.n_layer
    sequence = 4 * config.sequence_length * shape.n_embd * (KEPT_PER_LAYER * layers + shape.n_layer)
    most = max(1, MOST_TOKENS_ON_CPU // config.sequence_length) * sequence + state
    return min(HOST_SHARE * _available() / world.local_size, most), state, sequence


def _available() -> int:
    """Bytes of host memory that a process can still have."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 8 << 30


def _parameters(shape: GPTConfig) -> int:
    return shape.vocab_size * shape.n_embd + 12 * shape.n_layer * shape.n_embd**2


def _measured(config: Config, settings: ResolvedSettings, world: World) -> tuple[float, float, float]:
    """On a GPU, the same from two backward passes of a model without weights worth the name.

    What the head takes grows only until it works through its rows piece by piece: measured is beyond that, if it fits.
    """
    shape = PRESETS[config.model]
    budget = GPU_SHARE * torch.cuda.mem_get_info(world.device)[0] / world.ranks_per_gpu
    saturated = -(-rows_at_a_time("cuda", shape.vocab_size) // config.sequence_length)
    for size in (saturated, 1):
        peaks = _peak_memory((size, size + 1), config, settings, world)
        if peaks:
            each = max(peaks[1] - peaks[0], 1)
            beside_weights_and_gradients = state_bytes(world.size, config.elastic_ranks) - 8
            return budget, peaks[0] - size * each + beside_weights_and_gradients * _parameters(shape), each
    return budget, budget, 1.0


def _peak_memory(sizes: tuple[int, int], config: Config, settings: ResolvedSettings, world: World) -> list[int]:
    """The most memory that a step of so many sequences takes, in bytes; nothing if it does not fit."""
    peaks = []
    try:
        model = build_uninitialized(PRESETS[config.model], world.device)
        model.recompute = config.activation_checkpointing == "on"
        for size in sizes:
            torch.cuda.reset_peak_memory_stats(world.device)
            tokens = torch.zeros(size, config.sequence_length, dtype=torch.int64, device=world.device)
            with settings.autocast(world.device):
                loss = model(tokens, tokens)
            loss.backward()
            peaks.append(torch.cuda.max_memory_allocated(world.device))
            model.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        return []
    finally:
        model = loss = tokens = None  # type: ignore[assignment]
        torch.cuda.empty_cache()
    return peaks
