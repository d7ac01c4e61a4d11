"""The validation loss: the same tokens, and the same bits, on any number of processes."""

from __future__ import annotations

import math

import torch
from torch import nn

from unbroken.config import Config
from unbroken.data.loader import copy_to_device, plan_validation, val_batch
from unbroken.data.stream import Stream
from unbroken.distributed.gradients import sum_of_slots
from unbroken.distributed.world import World
from unbroken.errors import UserError
from unbroken.runtime.settings import ResolvedSettings
from unbroken.runtime.signals import StopSignals


class Validator:
    """Validates on the first `--val_tokens` tokens of the validation stream."""

    def __init__(self, config: Config, settings: ResolvedSettings, world: World, stream: Stream) -> None:
        self._every, self._last = config.val_loss_every, config.num_iterations
        self._settings, self._world, self._stream = settings, world, stream
        self._plan = plan_validation(stream, config.val_tokens, config.val_batch_size, config.sequence_length)
        self.notice = self._plan.notice

    def due(self, step: int) -> bool:
        """Before the first update, every --val_loss_every steps, and at the end."""
        return step % self._every == 0 or step == self._last

    @torch.no_grad()
    def run(self, model: nn.Module, signals: StopSignals) -> float | None:
        """The mean loss of a token in nats; None if a signal to stop came meanwhile.

        Collective. A UserError if one process cannot read what it is to validate on, or has no memory for it.

        Each batch's sum has a slot of its own, filled by one process; the slots are added exactly rounded, so neither
        the number of processes nor their order can be seen in the result.
        """
        world, plan = self._world, self._plan
        sums = torch.zeros(plan.num_batches, device=world.device)
        model.eval()
        trouble: UserError | None = None
        for index in range(world.rank, plan.num_batches + world.rank, world.size):
            if self._is_to_stop(signals, trouble):
                return None
            try:
                if index < plan.num_batches:
                    x, y = (copy_to_device(part, world.device) for part in val_batch(self._stream, plan, index))
                    with self._settings.autocast(world.device):
                        sums[index] = model(x, y, reduction="sum")
            except UserError as error:
                trouble = error
            except torch.OutOfMemoryError:
                trouble = UserError(
                    f"CUDA out of memory in a validation with batches of {plan.batch_size} x {plan.sequence_length}"
                    " tokens: use a smaller --val_batch_size"
                )
        if self._is_to_stop(signals, trouble):
            return None
        model.train()
        return math.fsum(sum_of_slots(sums, world).tolist()) / plan.num_tokens

    def _is_to_stop(self, signals: StopSignals, trouble: UserError | None) -> bool:
        """Whether a signal came, to any process. Collective; raises the trouble of any."""
        interrupted, troubled = self._world.any_rank(bool(signals), trouble is not None)
        if troubled:
            self._world.raise_on_all_ranks(trouble)
        return bool(interrupted)
