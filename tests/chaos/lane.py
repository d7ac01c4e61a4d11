"""One run under faults: started by the same command line until it is finished, and judged after every attempt."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests import harness
from tests.chaos.storage import Rules
from tests.harness import RUN_ID, SCRIPT, Done, Running, arguments, command_line, launch, write_corpus
from tests.metrics.test_trackers import recorded, tensorboard_events
from tests.storage import S3
from unbroken.checkpoint import directory
from unbroken.checkpoint.format import schema
from unbroken.commands.verify import examine
from unbroken.metrics.timeline import read_timeline

ATTEMPT_SECONDS = 120.0  # an attempt that has no reason to take longer
ENDS_SECONDS = 40.0  # until the processes that are left have gone
EXCUSED_STEPS = 12
FRUITLESS = 6  # attempts in a row that bring nothing, without a fault that could be the cause
_OF_RUN = re.compile(
    rf"{RUN_ID}\.(log|metrics\.jsonl)(\.1)?|config\.yaml|compiled|report\.html|\.lock|\.attempt|\.rewinds\.json"
    r"|final\.pt|best\.pt"
    r"|(model|weights)_step\d{6}\.pt|\.spare\.pt\.tmp|stacks\.\d+\.txt|saved|tensorboard|overtaken-\d+"
)


class Violation(AssertionError):
    """A promise that was broken."""


class Finished(Exception):
    """The run is through, or nothing came that the fault could have met."""


@dataclass(frozen=True)
class Course:
    """What is trained, and how.

    `processes`: of which each attempt draws one; None is plain python. `pace`: seconds more a step. `s3`: a server of
    object storage runs beside it, to which the run is mirrored. `rewinds`: the log has lines that count no more.
    `kinds`: the faults that only this course can have.
    """

    name: str
    flags: dict[str, Any]
    processes: tuple[int | None, ...] = (None,)
    pace: float = 0.0
    script: Path = SCRIPT
    env: dict[str, str] = field(default_factory=dict)
    corpus: Callable[[Path], None] = write_corpus
    s3: bool = False
    rewinds: bool = False
    kinds: tuple[str, ...] = ()

    @property
    def typed(self) -> dict[str, Any]:
        return {"run_id": RUN_ID, "resume_from": "auto", **self.flags}


@dataclass
class Injected:
    """A fault, and what became of it: whether the attempt ended, seconds until the next one trained, steps lost."""

    kind: str
    ended: bool = False
    took: float = 0.0
    back: float | None = None
    lost: int | None = None


class Lane:
    """A run of a course in a folder of its own, and the means by which faults reach it."""

    def __init__(self, course: Course, folder: Path, straight: Path, rules: Rules, dice: random.Random) -> None:
        self.course, self.folder, self.straight, self.rules, self.dice = course, folder, straight, rules, dice
        self.running: Running | None = None
        self.injected: list[Injected] = []
        self._not_back: list[Injected] = []  # faults after which no attempt has trained yet
        self._not_resumed: list[Injected] = []  # of which it is not known where the next attempt resumed
        self._said, self._resumed = "", 0  # by the last attempt
        self._excused = self._ended_at = -1  # until which step a fault that is over may end the attempt
        self.attempts = self._ends = self._seen = self._required = self._before = 0
        self.ranks, self.finished, self._is_back = 1, False, False
        self.cause = ""  # why the attempt may end, or have ended, by itself
        self.user_acts = False  # whether a job script may end, because only its user can do something about it
        self.damages = False  # whether a fault has taken away what was committed
        self.stopped_at: int | None = None  # the step at which, or after which, the next attempt must resume
        self.strange: set[Path] = set()  # what a fault has put into the run's folder
        self.env: dict[str, str] = {}  # of the next attempt alone
        folder.mkdir(parents=True)
        course.corpus(folder)
        self.typed, self._env, self.s3 = course.typed, course.env, None
        if course.s3:
            self.s3 = S3()
            self.typed, self._env = {**course.typed, "mirror": self.s3.url}, {**course.env, **self.s3.env}

    # ---- where it is ----

    @property
    def run(self) -> Path:
        return self.folder / "logs" / RUN_ID

    @property
    def log(self) -> Path:
        return self.run / f"{RUN_ID}.log"

    @property
    def journal(self) -> Path:
        return self.run / f"{RUN_ID}.metrics.jsonl"

    def trained(self) -> int:
        """The steps that this attempt has trained, by its journal."""
        try:
            with open(self.journal, "rb") as file:
                file.seek(self._seen if self.journal.stat().st_size >= self._seen else 0)
                return file.read().count(b'"train_loss"')
        except OSError:
            return 0

    def step(self) -> int:
        """The last step in the log."""
        try:
            return harness.last_step(self.folder)
        except OSError:  # it was moved just now
            return 0

    def newest(self) -> int:
        """The step of the newest checkpoint that is whole; 0 if there is none."""
        if not self.run.is_dir():
            return 0
        for entry in sorted(directory.list_checkpoints(self.run), key=lambda item: item.step or 0, reverse=True):
            if directory.is_regular(entry.path) and directory.find_damage(entry.path) is None:
                return directory.read_step(entry.path) or 0
        return 0

    # ---- attempts ----

    def launch(self) -> Running:
        """Start an attempt, as a job script does."""
        assert self.running is None
        self._seen = self.journal.stat().st_size if self.journal.exists() else 0
        self._required, self._before, self._excused = self.newest(), self.step(), -1
        processes = self.dice.choice(self.course.processes)
        how: dict[str, Any] = {"script": self.course.script, "pace": self.course.pace}
        self.running = launch(self.folder, arguments(self.typed), processes, env={**self._env, **self.env}, **how)
        self.env = {}
        self.ranks = processes or 1
        self.attempts += 1
        self._launched, self._is_back = time.monotonic(), False
        return self.running

    def alive(self) -> bool:
        return self.running is not None and self.running.process.poll() is None

    def up(self) -> Running:
        """The attempt that trains; one is started if there is none. It may end at any time: the run may be through."""
        while not self.finished:
            running = self.running or self.launch()
            if self.wait(lambda: self.trained() > 0):
                return running
            self.down()
        raise Finished

    def wait(self, condition: Callable[[], bool], seconds: float = ATTEMPT_SECONDS, patient: bool = False) -> bool:
        """Wait until something is true; False if the attempt has ended before. `patient`: it need not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.alive():
                return condition()
            if time.monotonic() > deadline:
                if patient:
                    break
                self.fail(f"nothing happened for {seconds:.0f} s", self.crash())
            time.sleep(0.004)
        self._note_back()
        return True

    def _note_back(self) -> None:
        if self._is_back or self.trained() == 0:
            return
        self._is_back = True
        for fault in self._not_back:
            fault.back = time.monotonic() - self._launched
        self._not_back = []

    def advance(self, most: int = 12) -> Running:
        """Let the attempt train up to `most` steps more, to no particular point of a step."""
        running = self.up()
        goal = self.trained() + self.dice.randint(0, most)
        if not self.wait(lambda: self.trained() >= goal):
            self.down()
            return self.advance(0)
        time.sleep(self.dice.uniform(0, 0.06))
        return running

    def crash(self) -> Done:
        """SIGKILL for all processes at once."""
        assert self.running is not None
        self.cause = self.cause or "SIGKILL"
        self.running.kill()
        return self.down()

    def ended(self) -> None:
        """End the attempt if there is one; a run that is through ends the fault."""
        if self.running is not None:
            self.crash()
        if self.finished:
            raise Finished

    def down(self, cause: str = "", seconds: float = ATTEMPT_SECONDS, wait_for_all: bool = True) -> Done:
        """Wait until the attempt has ended, and judge it. `cause`: why it may end before the run is finished."""
        assert self.running is not None
        running, self.cause = self.running, self.cause or cause
        try:
            done = running.wait(seconds)
        except AssertionError as error:
            self.running = None
            raise Violation(f"{self.where()}: it does not end\n{error!s:.300}\n{str(error)[-3000:]}") from None
        self._note_back()
        self.running, self._is_back, self._ended_at = None, False, self.trained()
        if wait_for_all:
            self._no_process_is_left()
        self._ends += 1
        self._judge(done)
        self.cause, self.damages, self.user_acts = "", False, False
        return done

    def _no_process_is_left(self) -> None:
        deadline = time.monotonic() + ENDS_SECONDS
        while left := processes_in(self.folder):
            if time.monotonic() > deadline:
                raise Violation(f"{self.where()}: processes are left: {left}")
            time.sleep(0.01)

    def _judge(self, done: Done) -> None:
        if text := traceback_in(done.text):
            self.fail(f"a traceback: {text}", done)
        found = re.search(r"^(?:resuming run .* at step|nothing to do: run .* is at step) (\d+)", done.out, re.M)
        resumed = int(found[1]) if found else 0 if "new run " in done.out else None
        self._resumed = resumed or 0
        if resumed is not None:
            if resumed < self._required and not self.damages:
                self.fail(f"resumed at step {resumed}, but {self._required} is committed and whole", done)
            if self.stopped_at is not None and resumed < self.stopped_at and not self.damages:
                self.fail(f"resumed at step {resumed}, after a stop with a save at {self.stopped_at}", done)
            self.stopped_at = None
            for fault in self._not_resumed:
                fault.lost = max(0, self._before - resumed)
            self._not_resumed = []
        self._said = done.text
        self.finished = done.code == 0 and ("finished at step" in done.out or "nothing to do" in done.out)
        if self.finished:
            return
        if done.code == 0:
            self.fail("exit code 0 of a run that is not finished", done)
        if not self.cause and self._ended_at > self._excused:
            self.fail("it ended by itself", done)
        if done.code == 2 and not self.user_acts:
            self.fail("exit code 2: a job script would not start it again", done)
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        if self.ranks == 1 and done.code == 2 and len(errors) != 1:
            self.fail(f"{len(errors)} lines of errors, not one", done)

    def where(self) -> str:
        last = ", ".join(fault.kind for fault in self.injected[-4:])
        place = f"course {self.course.name}, attempt {self.attempts}, step {self.step()}"
        return f"{place}, cause {self.cause!r}, last faults: {last}"

    def fail(self, what: str, done: Done | None = None) -> None:
        text = "" if done is None else f"\nexit code {done.code}\n{done.out[-2000:]}\n{done.err[-4000:]}"
        raise Violation(f"{self.where()}: {what}{text}")

    # ---- faults ----

    def inject(self, kind: str, fault: Callable[[Lane], None]) -> None:
        """One fault, of which the attempt may end; what a run that is through does not meet any more is not counted."""
        ends, began = self._ends, time.monotonic()
        made = Injected(kind)
        self.injected.append(made)
        try:
            fault(self)
        except Finished:
            self.injected.pop()
            return
        made.ended, made.took = self._ends > ends, time.monotonic() - began
        if made.ended and not self._is_back:
            self._not_back.append(made)
            self._not_resumed.append(made)

    def signal_rank(self, number: int) -> None:
        """The signal to one of the training processes."""
        self.up()
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.a_rank()).send_signal(number)

    def a_rank(self) -> int:
        """The pid of one of the training processes, not of a tracker's or the mirror's."""
        assert self.running is not None
        lines = {pid: command_line(pid) for pid in self.running.workers()}
        ranks = [pid for pid, line in lines.items() if b"_training.py" in line or SCRIPT.name.encode() in line]
        return self.dice.choice(ranks or [self.running.process.pid])

    @contextmanager
    def may_end(self, cause: str) -> Iterator[None]:
        """What happens here may end the attempt, if there is a cause, at once or within a few steps."""
        self.cause = cause
        yield
        if cause and self.running is not None:
            self._excused = self.trained() + EXCUSED_STEPS
        if self.alive():
            self.cause = ""

    def is_near_end(self) -> bool:
        return self.step() + 40 > int(self.course.flags["num_iterations"])

    def settle(self) -> None:
        """Let it train two steps more."""
        goal = self.trained() + 2
        if not self.wait(lambda: self.trained() >= goal):
            self.down()

    def refused(self, cause: str) -> None:
        """An attempt that must end before it trains."""
        self.user_acts = True
        self.launch()
        done = self.down(cause)
        if "nothing to do" in done.out:  # the attempt before was killed when it had written the end
            raise Finished
        if self.finished or self.trained():
            self.fail(f"{cause}: it trained", done)

    def expect_stop(self, done: Done) -> None:
        """After a stop with a save, nothing of what was trained is lost."""
        found = re.search(r"stopped by .* at step (\d+)", done.text)
        self.stopped_at = int(found[1]) if found else None

    def another(self) -> Running:
        """A second attempt, beside the first."""
        return launch(self.folder, arguments(self.typed), None, env=self._env, script=self.course.script)

    def one_of_two(self, other: Running) -> None:
        """Two attempts that began together: one trains, the other one is refused."""
        first, deadline = self.running, time.monotonic() + ENDS_SECONDS
        assert first is not None
        while first.process.poll() is None and other.process.poll() is None:
            if time.monotonic() > deadline:
                other.kill()
                self.fail("two attempts run at once", other.wait())
            time.sleep(0.01)
        refused, self.running = (first, other) if first.process.poll() is not None else (other, first)
        self.ranks = self.ranks if self.running is first else 1
        done = refused.wait()
        if "is being trained" not in done.text:
            self.fail("one of two attempts ended, not because of the other", done)

    def finish(self) -> None:
        """Let it go on to its end without faults, and judge all that it has left behind."""
        fruitless = 0
        while not self.finished:
            step = self.newest()
            if self.running is None:
                self.launch()
            self.down("the fault before")
            fruitless = 0 if self.newest() > step else fruitless + 1
            if fruitless > FRUITLESS:
                self.fail("no attempt brings it forward any more")
        self.verdict()

    def verdict(self) -> None:
        """Compare the finished run with the one that nothing has happened to."""
        straight = self.straight / "logs" / RUN_ID
        for path in sorted(self.run.glob("*.pt")):
            if not examine(path, lambda _: None)["whole"]:
                self.fail(f"{path.name} is damaged")
            if (straight / path.name).exists() and schema.weights_step(path.name) is None:
                harness.assert_same_bits(straight / path.name, path)
        if not (self.run / "final.pt").exists():
            self.fail("there is no final.pt")
        if not self.course.rewinds:
            ours, theirs = harness.log_lines(self.folder), harness.log_lines(self.straight)
            if ours != theirs:
                missing, more = [x for x in theirs if x not in ours], [x for x in ours if x not in theirs]
                twice = [x for x in ours if ours.count(x) > 1]
                self.fail(f"the log differs: missing {missing[:5]}, more {more[:5]}, twice {twice[:5]}")
        ours_is, theirs_is = (read_timeline(folder / f"{RUN_ID}.log").metrics for folder in (self.run, straight))
        for name in ("train_loss", "val_loss"):
            a, b = ({step: each[name] for step, each in is_.items() if name in each} for is_ in (ours_is, theirs_is))
            if a != b:
                self.fail(f"the journal differs in {name}: steps {sorted(set(a.items()) ^ set(b.items()))[:6]}")
        self._judge_trackers()
        stray = [
            path.name for path in self.run.iterdir() if not _OF_RUN.fullmatch(path.name) and path not in self.strange
        ]
        if stray:
            self.fail(f"stray files: {stray}")

    def _judge_trackers(self) -> None:
        """What TensorBoard and W&B have is what the journal has: each step once, in order."""
        metrics = read_timeline(self.log).metrics
        losses = {step: each["train_loss"] for step, each in metrics.items() if "train_loss" in each}
        if self.course.flags.get("log_tensorboard"):
            events = tensorboard_events(self.run / "tensorboard", "train_loss")
            steps = [step for step, _ in events]
            is_off = self._is_off("TensorBoard")
            if steps != [step for step in losses if step in steps or not is_off or step <= self._resumed]:
                self.fail(f"TensorBoard has other steps than the journal: {steps}")
        if self.course.flags.get("log_wandb"):
            found = {
                step for attempt in recorded(self.folder) for step, each in attempt.items() if "train_loss" in each
            }
            if self._is_off("W&B"):
                losses = {step: loss for step, loss in losses.items() if step <= self._resumed or step in found}
            if found != set(losses):
                self.fail(f"W&B lacks steps {sorted(set(losses) - found)} and has {sorted(found - set(losses))} more")

    def _is_off(self, title: str) -> bool:
        """Whether the last attempt could not send a tracker's steps, also not at its end."""
        return f"{title} is switched off" in self._said and f"{title} has every step now" not in self._said

    def end(self) -> None:
        """Kill what still runs."""
        if self.s3 is not None:
            self.s3.kill()
        if self.running is not None:
            self.running.kill()
            self.running.process.communicate()


def traceback_in(text: str) -> str:
    """The last line of the first traceback that is not torchrun's or the tests' own; "" for none."""
    for found in re.finditer(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(.*)", text):
        if re.match(r"W\d{4} ", found[1]):  # a warning of torch's compiler
            continue
        ours = "fork_server.py" not in found[0] or "train_gpt2_mod.py" in found[0]
        if ours and "torch.distributed.elastic" not in found[1]:
            return found[1] or "unknown"
    return ""


def processes_in(folder: Path) -> list[str]:
    """The processes that stand in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(f"{process.pid} {' '.join(process.cmdline())[-80:]}")
        except (psutil.Error, OSError):
            continue
    return found
