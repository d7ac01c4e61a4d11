"""The validation loss, of the same tokens and with the same bits on any number of processes."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from unbroken.config import Config
from unbroken.data.loader import BatchesInFlight, copy_to_device, plan_validation, val_batch
from unbroken.data.stream import Stream
from unbroken.distributed.gradients import sum_of_slots
from unbroken.distributed.memory import out_of_memory_as_user_error
from unbroken.distributed.phases import DATA, VALIDATION
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.runtime.settings import ResolvedSettings
from unbroken.runtime.signals import StopSignals


class Validator:
    """A validation on the first `--val_tokens` tokens of the validation stream; `notice` is for the console.

    Args:
        config: the flags.
        settings: the dtype of the forward pass.
        world: the ranks.
        stream: the validation data.
    """

    def __init__(self, config: Config, settings: ResolvedSettings, world: World, stream: Stream) -> None:
        self._every, self._last = config.val_loss_every, config.num_iterations
        self._settings, self._world, self._stream = settings, world, stream
        self._plan = plan_validation(stream, config.val_tokens, config.val_batch_size, config.sequence_length)
        self.notice = self._plan.notice
        self._sums = torch.zeros(self._plan.num_batches, device=world.device)

    def due(self, step: int) -> bool:
        """Return whether to validate after `step` updates: at 0, every --val_loss_every steps, and at the end."""
        return step % self._every == 0 or step == self._last

    @torch.no_grad()
    def run(self, model: nn.Module, signals: StopSignals) -> float | None:
        """Return the mean loss of a token in nats, None if a signal to stop came meanwhile. Collective.

        Each batch's sum has a slot, which one process fills. The slots are added with exact rounding, so that the
        result does not depend on the number of processes.

        Raises UserError on all ranks if a batch cannot be read or does not fit into memory on one of them.
        """
        with self._world.phases.inside(VALIDATION):
            return self._run(model, signals)

    def _run(self, model: nn.Module, signals: StopSignals) -> float | None:
        world, plan, sums = self._world, self._plan, self._sums.zero_()
        too_large = (
            f"CUDA out of memory in a validation with batches of {plan.batch_size} x {plan.sequence_length} tokens:"
            " use a smaller --val_batch_size"
        )
        model.eval()
        error_here: UserError | None = None
        in_flight = BatchesInFlight(world.device)
        for index in range(world.rank, plan.num_batches + world.rank, world.size):
            if self._must_stop(signals, error_here):
                return None
            began = time.monotonic()
            try:
                if index < plan.num_batches:
                    with out_of_memory_as_user_error(too_large):
                        with world.phases.inside(DATA, str(self._stream.shards[0].path)):
                            batch = val_batch(self._stream, plan, index)
                        x, y = (copy_to_device(part, world.device) for part in batch)
                        with self._settings.autocast(world.device):
                            sums[index] = model(x, y, reduction="sum")
                        in_flight.issued()
            except UserError as error:
                error_here = error
            world.phases.batch_done(began)
        if self._must_stop(signals, error_here):
            return None
        model.train()
        return math.fsum(sum_of_slots(sums, world).tolist()) / plan.num_tokens

    def _must_stop(self, signals: StopSignals, error_here: UserError | None) -> bool:
        """Return whether any process got a signal; raise the error of any process on all. Collective."""
        interrupted, failed = self._world.any_rank(bool(signals), error_here is not None)
        if failed:
            self._world.raise_on_all_ranks(error_here)
        return bool(interrupted)
