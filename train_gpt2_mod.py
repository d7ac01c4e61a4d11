"""Pretrain GPT-2. Interrupted and resumed, here or elsewhere, it goes on bit for bit as if nothing had happened.

    torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --model d12 --num_iterations 4768 --save_every 256
    torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --resume_from auto

This file is the run, top to bottom, in the order in which it happens. Step k is the k-th update, counted from 1; a
checkpoint of step k is the state after k updates. What a run is made of is listed once, in `unbroken/state.py`; how a
tensor gets to the disk and back is `unbroken/checkpoint/`, which no edit here has to touch.
"""

from __future__ import annotations

import sys

from unbroken import prefetch

if __name__ == "__main__":
    prefetch.before_torch(sys.argv[1:])  # whose import takes longer than reading the checkpoint

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unbroken import config as flags
from unbroken import console, corpus, fit, machine, resume, wanted
from unbroken.checkpoint.writer import Saver
from unbroken.compiling import Compiler
from unbroken.config import Config
from unbroken.distributed import World, joined, tell_torchrun
from unbroken.errors import UserError
from unbroken.history import History
from unbroken.interrupts import Interrupts
from unbroken.machine import Choices
from unbroken.mirror import Mirror
from unbroken.model import GPT, PRESETS, initialize, without_weights
from unbroken.optim import build_optimizer, members, set_learning_rate
from unbroken.plan import StepPlan, halved, plan_step
from unbroken.reduction import Gradients
from unbroken.resume import Start
from unbroken.saves import Saves, keep_last
from unbroken.schedule import rate_at
from unbroken.sharding import ShardedParameters
from unbroken.state import Progress, RunState
from unbroken.tokens import Feed, Share, Stream
from unbroken.tracing import Trace
from unbroken.validation import Validator


def main(argv: list[str]) -> int:
    """The door: a user's mistake is one line and exit code 2."""
    rank = 0
    try:
        typed = flags.parse(argv)
        with Interrupts() as interrupts, joined(typed.get("device", "auto")) as world:
            rank = world.rank
            interrupts.tells = world.is_main
            if world.launch.by_torchrun:
                interrupts.follow_parent()
            return train(typed, world, interrupts)
    except UserError as error:
        if rank == 0 or not error.everywhere:
            console.say(f"error: {error}", error=True)
            tell_torchrun(f"error: {error}")
        return 2


def train(typed: dict[str, Any], world: World, interrupts: Interrupts) -> int:
    """One attempt of a run: find where it was, make it again, and go on from there."""
    with ExitStack() as attempt:
        start = resume.decide(typed, world, attempt)
        if start.finished:
            with Mirror(start.config, start.run, world) as mirror:  # which may have been killed before
                mirror.begin()
                return nothing_to_do(start, world)
        with world.together():
            if world.is_main:
                resume.take_over(start)
        with world.together():
            choices = Choices.make(start.config, start.saved_dict("environment"), world.device, typed)
        start.notes += machine.prepare(start.config, choices, world)
        compiler = Compiler(start.config, choices, world.device, start.run.folder / "compiled")
        with world.together():
            start.config, found = fit.settle(start.config, choices, world)
        start.notes += found
        config, stream, val_stream, identity = open_data(start, world)
        with world.together():
            validator = Validator(config, choices, world, val_stream) if val_stream else None
        plan = planned(config, world, start)
        model, state = build(config, choices, start, identity, world)
        compiler.compile(model)
        start.notes += [validator.notice] if validator and validator.notice else []
        mirror = attempt.enter_context(Mirror(config, start.run, world))  # ends last: the journal has an end, too
        history = attempt.enter_context(resume.open_history(config, start, world, state.environment))
        resume.begin(start, config, plan, world, history)
        mirror.begin()
        kept, every = keep_last(config), config.keep_every
        saver = attempt.enter_context(
            Saver(start.run.folder, world, keep_last=kept, keep_every=every, before_commit=history.make_durable)
        )
        saves = Saves(config, saver, state, history, world, stream, start.on_disk, start.to_be_saved)
        trace = Trace(config.trace_steps, start.run.folder / f"trace.{world.rank}.txt")
        parts = Parts(
            config, choices, world, interrupts, model, state, plan, stream, validator, saver, saves, history, trace
        )
        return loop(parts)


@dataclass(frozen=True)
class Parts:
    """What one attempt works with."""

    config: Config
    choices: Choices
    world: World
    interrupts: Interrupts
    model: GPT
    state: RunState
    plan: StepPlan
    stream: Stream
    validator: Validator | None
    saver: Saver
    saves: Saves
    history: History
    trace: Trace


def loop(parts: Parts) -> int:
    """Train, validate and save until the run is finished or asked to stop."""
    config, world, history, saves = parts.config, parts.world, parts.history, parts.saves
    progress, optimizer = parts.state.progress, parts.state.optimizer
    plan, gradients = parts.plan, Gradients(parts.state.sharded, parts.plan, world)
    stop = save_now = False
    with Feed(parts.stream, progress.tokens, share(plan, config, world), world.device) as feed:
        while True:
            # ---- between two steps: validate, save, leave
            step = progress.step
            if parts.validator and progress.validated != step and parts.validator.due(step):
                with saves.nothing_lost(step):
                    val_loss = parts.validator.run(parts.model, parts.interrupts)
                if val_loss is None:  # a signal came meanwhile; the resumed run validates this step first
                    return saves.stop(step, parts.interrupts)
                progress.validated = step
                history.val(step, val_loss)
            if step >= config.num_iterations:
                return saves.finish(step)
            if stop:
                return saves.stop(step, parts.interrupts)
            if saves.due(step, asked=save_now):
                saves.save(step)
            saves.report()

            # ---- forward and backward over this process's microbatches, in the one order of addition
            losses: list[torch.Tensor] = []
            out_of_memory = False
            history.step_begins()
            with saves.nothing_lost(step):  # before any process computes: the others would wait for what it sends
                feed.read()
            try:
                for index, (x, y) in zip(gradients.microbatches(), feed.step(), strict=True):
                    torch.manual_seed(microbatch_seed(config.seed, step, index))
                    with parts.trace.microbatch(step + 1, index):
                        with parts.choices.autocast(world.device):
                            loss = parts.model(x, y)
                        loss.backward()
                    gradients.add(index)
                    losses.append(loss.detach())
            except torch.OutOfMemoryError:
                out_of_memory, loss = True, torch.empty(0)  # the graph goes before memory is asked for again
            wants = (bool(parts.interrupts), saves.time_has_come(), out_of_memory)
            stop, save_now, out_of_memory = world.anywhere(*wants)
            if out_of_memory:
                with saves.nothing_lost(step):
                    plan = shrink(plan, config, progress, history, gradients)
                gradients.replan(plan)
                feed.reseat(progress.tokens, share(plan, config, world))
                continue

            # ---- one sum over all processes, one update
            gradients.exchange()
            parts.trace.gradient(step + 1, parts.state.sharded)
            norm = gradients.clip(config.grad_clip) if config.grad_clip else None
            rate = rate_at(step + 1, config, progress)
            set_learning_rate(optimizer, rate)
            parts.saver.before_update()
            optimizer.step()
            gradients.gather_weights()
            progress.step, progress.tokens = step + 1, feed.position
            history.train(progress.step, gradients.losses(losses), tokens=feed.position, lr=rate, grad_norm=norm)
            saves.step_done()


# ---- what a run is made from -----------------------------------------------------------------------------------------


def nothing_to_do(start: Start, world: World) -> int:
    """The checkpoint is as far as the run is to go."""
    if world.is_main:
        console.say(
            f"nothing to do: run {start.run.run_id} is at step {start.progress.step} of --num_iterations"
            f" {start.config.num_iterations}; type a larger --num_iterations to train on"
        )
    return 0


def open_data(start: Start, world: World) -> tuple[Config, Stream, Stream | None, dict[str, Any]]:
    """The training and validation streams, and who they are; a resumed run must find the data it had."""
    with world.together():
        patterns = corpus.patterns(start.config.input_bin, start.config.input_val_bin) if world.is_main else None
    train_bin, val_bin = world.agree(patterns)
    config = dataclasses.replace(start.config, input_bin=train_bin, input_val_bin=val_bin)
    with world.together():
        if config.val_loss_every and not config.input_val_bin:
            raise UserError(f"--val_loss_every needs --input_val_bin beside --input_bin {config.input_bin}")
        stream = Stream.open(config.input_bin)
        val_stream = Stream.open(config.input_val_bin) if config.val_loss_every else None
        identity = stream.identity()
        resume.check_data(start, identity, stream)
    world.same([identity, val_stream and val_stream.identity()], "the data are")
    return config, stream, val_stream, identity


def build(config: Config, choices: Choices, start: Start, data: dict[str, Any], world: World) -> tuple[GPT, RunState]:
    """The model and everything that is saved of it: restored from the checkpoint, or made from the seed."""
    model = without_weights(PRESETS[config.model])
    model.recompute = config.activation_checkpointing == "on"
    model.adds_in_place = world.device.type == "cpu"
    sharded = ShardedParameters(model, world, members(model, config.optimizer))
    optimizer = build_optimizer(sharded, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    state = RunState(
        sharded=sharded,
        optimizer=optimizer,
        progress=start.progress,
        code=Path(__file__).read_text("utf-8"),
        args=dataclasses.asdict(config),
        run_id=start.run.run_id,
        data=data,
        environment=machine.describe(choices, world),
        sources=machine.sources(),
    )
    resume.check_drift(start, state.environment, state.sources, state.code)
    with world.together():
        if start.file is not None:
            resume.restore(state, start.file)
        elif config.init_from:
            with wanted.open_named(Path(config.init_from)) as file:
                state.restore_weights(file)
        else:
            initialize(model, config.seed)
    return model, state


def microbatch_seed(seed: int, step: int, index: int) -> int:
    """The seed of one microbatch's random numbers (a dropout's, say): whoever computes it, whenever, draws the same."""
    return hash((seed, step, index)) & (2**63 - 1)  # a hash of integers is the same in every process


# ---- how a step is divided over the processes ------------------------------------------------------------------------


def planned(config: Config, world: World, start: Start) -> StepPlan:
    """Who computes which microbatches of a step; a run keeps the split it has."""
    sizes = (config.batch_size, config.grad_accumulation_steps, world.size, config.elastic_ranks)
    plan = plan_step(*sizes, min_split=start.progress.split, elastic_ranks_typed=start.elastic_ranks_typed)
    resume.compare_worlds(start, plan, world)
    start.notes += plan.notes
    start.progress.split = plan.split
    return plan


def shrink(plan: StepPlan, config: Config, progress: Progress, history: History, gradients: Gradients) -> StepPlan:
    """Out of GPU memory: half the microbatch and twice as many, so that a step stays the same tokens."""
    if config.on_oom == "fail" or plan.microbatch_size % 2 or not gradients.may_replan:
        raise UserError(
            f"CUDA out of memory with a microbatch of {plan.microbatch_size} x {config.sequence_length} tokens:"
            " use a smaller --batch_size with more --grad_accumulation_steps, --activation_checkpointing on, or a"
            " shorter --sequence_length"
        )
    torch.cuda.empty_cache()
    smaller = halved(plan, config.elastic_ranks)
    history.warn(
        f"CUDA out of memory: going on with microbatches of {smaller.microbatch_size} sequences, twice as many;"
        " the tokens of a step stay the same, bits may differ from here"
    )
    progress.split = smaller.split
    return smaller


def share(plan: StepPlan, config: Config, world: World) -> Share:
    """This process's part of each step's tokens."""
    lo, hi = plan.ranges[world.rank]
    return Share(plan.microbatch_size, config.sequence_length, plan.num_microbatches, lo, hi)


if __name__ == "__main__":
    sys.exit(console.left(main(sys.argv[1:])))
