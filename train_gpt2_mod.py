"""Pretrain GPT-2. An interrupted and resumed run has the same bits as one that was never interrupted.

    torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --model d12 --num_iterations 4768 --save_every 256
    torchrun --standalone --nproc_per_node=1 train_gpt2_mod.py --resume_from auto

This file is the run from top to bottom, in the order in which things happen. Step k is the k-th update, counted from 1;
a checkpoint of step k is the state after k updates. The parts of that state are listed once, in
`unbroken/run/state.py`; the way of a tensor to the disk and back is `unbroken/checkpoint/`.
"""

from __future__ import annotations

import sys

from unbroken.runtime import startup

if __name__ == "__main__":
    startup.prepare_process(sys.argv[1:])  # before torch, whose import takes two seconds

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unbroken import config as flags
from unbroken import console
from unbroken.checkpoint.writer import RunCheckpointWriter
from unbroken.config import Config
from unbroken.data.loader import BatchLoader, RankShare
from unbroken.data.mixture import TokenStream
from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.gradients import Gradients
from unbroken.distributed.memory import out_of_memory_as_user_error, require_out_of_memory, shortage_as_error
from unbroken.distributed.phases import DATA, SHUTDOWN
from unbroken.distributed.step_plan import StepPlan
from unbroken.distributed.world import World, init_distributed, local_rank, report_error
from unbroken.errors import CorruptionError, UserError
from unbroken.findings import note
from unbroken.metrics.logger import RunLogger
from unbroken.mirror.companion import UploaderProcess
from unbroken.mirror.download import fetch_if_newer, fetch_on_other_nodes
from unbroken.model import families
from unbroken.model.language_model import LanguageModel
from unbroken.optim import build_optimizer, param_groups, set_learning_rate
from unbroken.paths import LOGS, use_logs_dir
from unbroken.run import ending, locate, resume
from unbroken.run.anomalies import AnomalyResponse, Rewound, with_rewinds
from unbroken.run.corruption import MicrobatchReplay
from unbroken.run.lock import RunLocks
from unbroken.run.restarts import gather_agents
from unbroken.run.resume import ResumePoint
from unbroken.run.save_policy import SavePolicy
from unbroken.run.state import RunState
from unbroken.run.watchdog import Watchdog
from unbroken.runtime import environment
from unbroken.runtime.batch_size import find_batch_size, shrink
from unbroken.runtime.compile import Compiler
from unbroken.runtime.op_trace import OperationTrace
from unbroken.runtime.settings import ResolvedSettings, apply_settings
from unbroken.runtime.signals import StopSignals
from unbroken.schedule import rate_at
from unbroken.validation import Validator


def main(argv: list[str]) -> int:
    """Run the command line. A user's mistake is one line and exit code 2, a fault of the machine one line and 1."""
    rank = local_rank()
    try:
        typed = flags.parse(argv)
        use_logs_dir(typed.get("logs_dir", LOGS))
        device = typed.get("device", "auto")
        with shortage_as_error(), init_distributed(device) as world, StopSignals() as signals:
            rank = world.rank
            signals.announces = world.is_main
            if world.launch.job:
                signals.follow_parent(world.launch.restarts_left > 0, world.launch.local_rank == 0)
            return with_rewinds(typed, lambda typed, rewound: train(typed, world, signals, rewound))
    except (UserError, CorruptionError) as error:
        report_error(error, rank)
        return error.exit_code


def train(typed: dict[str, Any], world: World, signals: StopSignals, rewound: Rewound | None = None) -> int:
    """Run one attempt: find where the run stands, rebuild it, and continue. Return the exit code.

    `typed`: the typed flags. `rewound`: set if the attempt before in this process went back.
    """
    with ExitStack() as attempt:
        # ---- where to start: download what is newer in the mirror, find the checkpoint that is meant, open it
        agents, locks = gather_agents(world), attempt.enter_context(RunLocks())
        typed, url = fetch_if_newer(typed, agents, world)
        resolved = locate.resolve(typed, [] if rewound else agents, locks, world, attempt)
        if resolved.path and url:
            fetch_on_other_nodes(resolved.path, url, world)
        point = resume.plan_attempt(typed, resolved, world, attempt, rewound)
        if point.finished:
            with UploaderProcess(point.config, point.run, world) as mirror:  # the attempt before may have been killed
                mirror.begin()
                return resume.say_finished(point, resolved.notes, world)
        if any(world.any_rank(bool(signals))):  # torchrun is gone, for example, and the next attempt is about to begin
            return ending.report_early_stop(signals, world)
        resume.prepare_folder(point, world)
        attempt.enter_context(Watchdog(point.config, point.run.folder, world))

        # ---- what is trained: settings of this machine, data, division of a step, model and optimizer
        with world.raise_together():
            settings = ResolvedSettings.resolve(point.config, point.saved_dict("environment"), world.device, typed)
        findings = point.findings + note(*apply_settings(point.config, settings, world))
        compiler = Compiler(point.config, settings, world.device, point.run.folder / "compiled")
        with world.raise_together():
            config, lines = find_batch_size(point.config, settings, world, compiler)
        config, stream, val_stream, data, changes = resume.open_data(point, config, world)
        with world.raise_together():
            validator = Validator(config, settings, world, val_stream) if val_stream else None
        plan = resume.divide_step(point, config, world)
        findings += note(*lines) + changes + resume.check_plan(point, plan, world)
        point.progress.split = plan.split
        model, state = build(config, settings, point, data, world)
        compiler.compile(model)
        findings += resume.check_drift(point, state) + note(validator.notice if validator else "")
        findings += resume.describe_attempt(point, config, model, stream, state.environment, world)

        # ---- from here on the attempt changes what the run has
        if any(world.any_rank(bool(signals))):
            return ending.report_early_stop(signals, world)
        mirror = attempt.enter_context(UploaderProcess(config, point.run, world))  # ends last, after the journal
        logger = attempt.enter_context(resume.open_logger(point, state, findings, world))
        resume.start_attempt(point, config, plan, agents, findings, logger, world)
        mirror.begin()
        writer = attempt.enter_context(
            RunCheckpointWriter(
                *(point.run.folder, world),
                keep_last=config.checkpoints_to_keep,
                keep_every=config.keep_every,
                before_commit=logger.record_save,
                with_weights=config.save_weights_every > 0,
            )
        )
        save_policy = SavePolicy(config, writer, state, logger, world, stream, signals, point)
        trace = OperationTrace(config.trace_steps, point.run.folder / f"trace.{world.rank}.txt")
        attempt.callback(world.phases.enter, SHUTDOWN)  # what is entered last ends first
        context = TrainingContext(
            *(config, settings, world, signals, model, state, plan, stream, validator),
            *(writer, save_policy, logger, trace, AnomalyResponse(config, state, writer, logger, world)),
        )
        finished = loop(context)
    return ending.report_end(finished, point.run, config, state.progress.step, signals, world)


@dataclass(frozen=True)
class TrainingContext:
    """The parts with which one attempt trains."""

    config: Config
    settings: ResolvedSettings
    world: World
    signals: StopSignals
    model: LanguageModel
    state: RunState
    plan: StepPlan
    stream: TokenStream
    validator: Validator | None
    writer: RunCheckpointWriter
    save_policy: SavePolicy
    logger: RunLogger
    trace: OperationTrace
    anomalies: AnomalyResponse


def loop(context: TrainingContext) -> bool:
    """Train, validate and save until the run is finished or asked to stop. Return whether it is finished."""
    config, world, logger, save_policy = context.config, context.world, context.logger, context.save_policy
    progress, optimizer = context.state.progress, context.state.optimizer
    plan, gradients = context.plan, Gradients(context.state.sharded, context.plan, world)
    replay = MicrobatchReplay(config, context.state.sharded, gradients, world)
    stop = save_now = wrong = False
    context.signals.training_begins()
    with BatchLoader(context.stream, progress.tokens, share(plan, config, world), world.device) as loader:
        while True:
            # ---- between two steps: validate, save, leave
            step = progress.step
            if context.validator and not wrong and progress.validated != step and context.validator.due(step):
                logger.flush()  # the validation is no part of the step's time
                with save_policy.save_before_raising(step):
                    val_loss = context.validator.run(context.model, context.signals)
                if val_loss is None:  # a signal came meanwhile; the resumed run validates this step first
                    return save_policy.stop(step, context.signals)
                save_policy.validated(step, val_loss)
                logger.val(step, val_loss)
            if wrong or stop or step >= config.num_iterations or save_policy.due(step, asked=save_now):
                context.anomalies.check()
            if step >= config.num_iterations:
                return save_policy.finish(step)
            if stop:
                return save_policy.stop(step, context.signals)
            if save_policy.due(step, asked=save_now):
                save_policy.save(step, asked=save_now)
            save_policy.report()

            # ---- forward and backward over this process's microbatches, in the one order of addition
            losses, failed = list[torch.Tensor](), ""
            logger.step_begins()
            world.phases.begin_step(step + 1)
            # While no rank computes: the others would wait for this one.
            with save_policy.save_before_raising(step), world.phases.inside(DATA, loader.source):
                loader.read()
            try:
                for index, (x, y) in zip(gradients.microbatches(), loader.step(), strict=True):
                    for _ in replay.passes(step + 1, index, losses):  # one; or two, which must be equal
                        with context.trace.microbatch(step + 1, index):
                            with context.settings.autocast(world.device):
                                loss = context.model(x, y)
                            loss.backward()
                        losses.append(loss.detach())
                    gradients.add(index)
            except (MemoryError, RuntimeError) as error:
                failed, loss = require_out_of_memory(error), torch.empty(0)  # the graph must go
                gradients.give_up()
            wants = (bool(context.signals), save_policy.time_has_come(), context.anomalies.found(), bool(failed))
            stop, save_now, wrong, out_of_memory = world.any_rank(*wants)
            if out_of_memory:
                with save_policy.save_before_raising(step):
                    plan, line = shrink(plan, config, failed)
                progress.split = plan.split
                logger.warn(line)
                gradients.replan(plan)
                loader.seek(progress.tokens, share(plan, config, world))
                continue

            # ---- one sum over all processes, one update
            replay.require_equal(step + 1)
            with save_policy.save_if_out_of_memory(step):
                gradients.exchange()
                context.trace.gradient(step + 1, context.state.sharded)
                norm = gradients.clip(config.grad_clip) if config.grad_clip else None
                all_losses = gradients.losses(losses)
            rate = rate_at(step + 1, config, progress.rewarm)
            set_learning_rate(optimizer, rate)
            context.writer.before_update()
            with out_of_memory_as_user_error("CUDA out of memory in the update: resume from the newest checkpoint"):
                optimizer.step()
                gradients.gather_weights()
            progress.step, progress.tokens = step + 1, loader.position
            logger.train(progress.step, all_losses, tokens=loader.position, lr=rate, grad_norm=norm)
            save_policy.step_done()


# ---- the parts of a run ----------------------------------------------------------------------------------------------


def build(
    config: Config, settings: ResolvedSettings, point: ResumePoint, data: dict[str, Any], world: World
) -> tuple[LanguageModel, RunState]:
    """Build the model and the state of the run, restored from the checkpoint or initialized. Collective.

    Args:
        config: the flags.
        settings: what `auto` means on this machine.
        point: the checkpoint, if there is one.
        data: the identity of the training data, which the state records.
        world: the ranks.
    """
    with world.raise_together():  # one rank may have too little memory
        model = families.build(config.model, config.model_flags)
        model.recompute = config.activation_checkpointing == "on"
        model.adds_in_place = world.device.type == "cpu"
        sharded = ShardedParameters(model, world, param_groups(model, config.optimizer))
        state = RunState(
            sharded=sharded,
            optimizer=build_optimizer(sharded, learning_rate=config.learning_rate, weight_decay=config.weight_decay),
            progress=point.progress,
            code=Path(__file__).read_text("utf-8"),
            args=dataclasses.asdict(config),
            run_id=point.run.run_id,
            data=data,
            environment=environment.describe_environment(settings, world),
            sources=environment.read_sources(),
        )
        if point.file is None and point.weights is None:
            model.initialize(config.seed)
    resume.restore(state, point, world)
    return model, state


def share(plan: StepPlan, config: Config, world: World) -> RankShare:
    """Return this rank's part of the tokens of each step."""
    lo, hi = plan.ranges[world.rank]
    return RankShare(plan.microbatch_size, config.sequence_length, plan.num_microbatches, lo, hi)


if __name__ == "__main__":
    sys.exit(console.finish_output(main(sys.argv[1:])))
