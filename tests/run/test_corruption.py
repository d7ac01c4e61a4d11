"""A machine that computes wrongly: what the replay and the comparison of replicas find, and what they cannot."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import ROOT, RUN_ID, arguments, assert_same_bits, launch, run_folder, train, write_corpus
from unbroken.config import Config
from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.gradients import Gradients
from unbroken.distributed.step_plan import plan_step
from unbroken.distributed.world import World
from unbroken.errors import CorruptionError
from unbroken.model.gpt import GPT
from unbroken.model.language_model import ModelConfig
from unbroken.optim import build_optimizer, param_groups
from unbroken.run.corruption import MicrobatchReplay, require_equal_replicas

CORRUPTED = ROOT / "tests/corrupted_training.py"
RUN = {"run_id": RUN_ID, "num_iterations": 6, "save_every": 3, "warmup_iters": 0, "warmdown_iters": 0}
STEPS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Machine:
    """A d2 on one process, and its steps with `--replay 1`; `during` is called before each computation's comparison."""

    def __init__(self, replay: str = "1") -> None:
        self.config, self.world = Config(model="d2", replay=replay), World.single()
        model = GPT.build_on_meta(ModelConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=128))
        self.sharded = ShardedParameters(model, self.world, param_groups(model, "adamw"))
        model.initialize(1)
        self.model = model.train()
        self.optimizer = build_optimizer(self.sharded, learning_rate=1e-3, weight_decay=0.1)
        self.gradients = Gradients(self.sharded, plan_step(2, 2, 1, 8), self.world)
        self.replay = MicrobatchReplay(self.config, self.sharded, self.gradients, self.world)
        self.tokens = torch.arange(64).view(2, 32) % 97

    def step(self, during: Callable[[int], None] = lambda number: None, number: int = 1) -> None:
        losses = list[torch.Tensor]()
        for index in self.gradients.microbatches():
            for again, _ in enumerate(self.replay.passes(number, index, losses)):
                loss = self.model(self.tokens, self.tokens)
                loss.backward()
                losses.append(loss.detach())
                if index == 0:
                    during(again)
            self.gradients.add(index)
        assert len(losses) == 2
        self.replay.require_equal(number)

    def all_gradients(self) -> torch.Tensor:
        return torch.cat([group.grad.view(torch.int32) for group in self.sharded.groups])


def flip(flat: torch.Tensor, element: int, bit: int) -> None:
    flat.detach().view(-1).view(torch.int32)[element] ^= -(1 << 31) if bit == 31 else 1 << bit


def at(when: int, act: Callable[..., None], *typed: Any) -> Callable[[int], None]:
    """What happens after the first (0) or the second (1) computation."""
    return lambda again: act(*typed) if again == when else None


def test_every_flipped_bit_of_a_gradient_is_found_and_its_tensor_named() -> None:
    machine, chance = Machine(), random.Random(1)
    machine.step()
    for _ in range(70):
        group = chance.choice(machine.sharded.groups)
        slot = chance.choice(group.slots)
        element, bit = chance.randrange(slot.start, slot.stop), chance.randrange(32)
        with pytest.raises(CorruptionError) as raised:
            machine.step(at(chance.randrange(2), flip, group.grad, element, bit), number=7)
        assert f"step 7, rank 0: the gradient of {machine.sharded.name_at(group, slot.start)} " in str(raised.value)
    machine.step()


class FlippedOutput:
    """A hook that changes one bit of what a module returns, in its N-th call, and lets gradients pass."""

    def __init__(self, call: int, chance: random.Random) -> None:
        self.left, self.bit, self.place = call, chance.randrange(32), chance.random()

    def __call__(self, module: Any, typed: Any, result: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            flip(result.data, int(self.place * result.numel()), self.bit)
        return result


def test_a_flipped_activation_is_found_if_it_changes_a_bit_of_loss_or_gradient() -> None:
    machine, chance = Machine(), random.Random(2)
    modules = [module for block in machine.model.blocks() for module in block.modules() if module is not block]
    found = 0
    for _ in range(70):
        grads = list[torch.Tensor]()
        handle = chance.choice(modules).register_forward_hook(FlippedOutput(chance.choice((1, 2)), chance))
        is_found = False
        try:
            machine.step(lambda again, kept=grads: kept.append(machine.all_gradients()))
        except CorruptionError:
            is_found = True
        handle.remove()
        assert is_found or torch.equal(*grads)
        found += is_found
    assert found > 50, found


def test_what_the_replay_cannot_find() -> None:
    """A weight or a moment that is wrong before both computations: they are equal. Only an audit finds it."""
    machine = Machine()
    flip(machine.sharded.groups[0].data, 1_234, 3)
    machine.step()
    machine.optimizer.step()
    state = machine.optimizer.state_of(machine.sharded.groups[0].owned[0].parameter)
    flip(state["exp_avg"], 1_234, 3)
    machine.step()


@pytest.mark.parametrize(("replay", "computed"), [("off", [2, 2, 2, 2]), ("first", [3, 2, 2, 2]), ("3", [3, 2, 3, 2])])
def test_which_steps_are_computed_twice(replay: str, computed: list[int]) -> None:
    machine, calls, counts = Machine(replay), list[int](), []
    machine.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for number in range(1, STEPS + 1):
        calls.clear()
        machine.step(number=number)
        counts.append(len(calls))
    assert counts == computed


def test_the_replay_is_off_without_determinism() -> None:
    machine = Machine()
    machine.replay = MicrobatchReplay(
        replace(machine.config, deterministic="off"), machine.sharded, machine.gradients, machine.world
    )
    machine.step(at(0, flip, machine.sharded.groups[0].grad, 5, 5))


@pytest.mark.parametrize(("ranks", "wrong"), [(4, 2), (3, 0), (2, 1)])
def test_the_rank_whose_weights_differ_is_named(ranks: int, wrong: int) -> None:
    """200 places: a weight on one rank, at a save."""
    machine, chance = Machine("first"), random.Random(3)

    class Several(World):
        size = ranks  # type: ignore[assignment]

        def gather(self, value: Any) -> list[Any]:
            return [value if rank == wrong else list(right) for rank in range(ranks)]

    world, right = Several(machine.world.launch, machine.world.device), []

    class Right(Several):
        def gather(self, value: Any) -> list[Any]:
            right[:] = value
            return [value] * ranks

    require_equal_replicas(machine.config, machine.sharded, 5, Right(world.launch, world.device))
    for _ in range(70):
        group = chance.choice(machine.sharded.groups)
        slot = chance.choice(group.slots)
        element, bit = chance.randrange(slot.start, slot.stop), chance.randrange(32)
        flip(group.data, element, bit)
        name = machine.sharded.name_at(group, slot.start)
        with pytest.raises(CorruptionError, match=f"step 5, rank {wrong}: it has another copy of {name}"):
            require_equal_replicas(machine.config, machine.sharded, 5, world)
        flip(group.data, element, bit)


# ---- through the front door ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without the replay: the bits must be the same."""
    folder = tmp_path_factory.mktemp("sound")
    write_corpus(folder)
    train(folder, {**RUN, "replay": "off"}, processes=None)
    return folder


@pytest.mark.parametrize(
    ("flip", "said", "kept"),
    [
        ("grad:2:9", "step 1, rank 1: the gradient of ", []),
        ("activation:1:30", "step 1, rank 1: the loss", []),
        ("weight:6:9", "step 6, rank 1: it has another copy of ", ["model_step000003.pt"]),
    ],
)
def test_an_attempt_that_computes_wrongly_ends_and_the_next_has_the_right_bits(
    place: Path, sound: Path, flip: str, said: str, kept: list[str]
) -> None:
    """Exit code 1, one line on stderr, nothing saved from it; the log has no line that another attempt contradicts."""
    done = launch(place, arguments(RUN), 2, script=CORRUPTED, env={"FLIP": flip, "ON": "1"}).wait()
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and len(errors) == 1 and errors[0].startswith(f"error: {said}"), done.text
    assert [path.name for path in sorted(run_folder(place).glob("*.pt"))] == kept
    again = train(place, {**RUN, "run_id": None, "resume_from": RUN_ID} if kept else {**RUN, "resume_from": "auto"}, 2)
    assert "DIFFERS" not in again.text
    assert_same_bits(run_folder(place) / "final.pt", run_folder(sound) / "final.pt")


@pytest.mark.parametrize("more", [{"replay": "2"}, {"replay": "2", "activation_checkpointing": "on"}])
def test_no_false_alarm_and_the_same_bits(place: Path, sound: Path, more: dict[str, Any]) -> None:
    train(place, {**RUN, **more}, processes=2)
    assert_same_bits(run_folder(place) / "final.pt", run_folder(sound) / "final.pt")
