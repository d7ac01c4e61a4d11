"""`python -m unbroken demo`, which `make train` runs: a small run from start to end, killed once."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unbroken import console
from unbroken.checkpoint.format.schema import FINAL
from unbroken.data import prepare
from unbroken.errors import UserError
from unbroken.runtime import child_training

if TYPE_CHECKING:
    from unbroken.paths import Run


HELP = "train a small model for about a minute, kill it once with SIGKILL, resume it"
ITERATIONS = 400
LEAST = 6
SETTINGS = {  # about a minute on two CPU cores, most of it for the head's 50,257 words
    "model": "d2",
    "batch_size": 4,
    "sequence_length": 64,
    "learning_rate": 3e-3,
    "val_batch_size": 8,
    "val_tokens": 4096,
}
KILLED_AT = 0.6  # of the run
SEED = 1
PROMPTS = ("def ", "class ", "import ")
WRITTEN_BYTES = 120  # after each
POLL_SECONDS = 0.05
PLAIN_EVERY = 20  # steps between two lines where there is no terminal for a bar
_TRAINED = re.compile(r"^s:(\d+) trn:(\S+)$", re.M)
_STEP = re.compile(r"step:(\d+)/\d+ \| loss ")
_REPEATED = re.compile(r"steps? \d+(?:-\d+)? repeated: .*")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: how long."""
    parser.add_argument("--num_iterations", type=int, default=ITERATIONS, metavar="N", help=f"default: {ITERATIONS}")


@dataclass(frozen=True)
class Demo:
    """A demonstration: its run, and where it is killed."""

    place: Run
    num_iterations: int

    @property
    def save_every(self) -> int:
        return max(1, self.num_iterations // 6)

    @property
    def kill_at(self) -> int:
        """A step some way behind a checkpoint, so that the resumed run repeats what the log already holds."""
        saves = max(1, int(KILLED_AT * self.num_iterations) // self.save_every)
        return min(saves * self.save_every + max(1, self.save_every // 4), self.num_iterations - 1)

    def command(self) -> list[str]:
        """Return the command, the same both times: `--resume_from auto` starts the run, then continues it."""
        settings = {
            **SETTINGS,
            "num_iterations": self.num_iterations,
            "warmup_iters": min(10, self.save_every),
            "warmdown_iters": self.num_iterations // 3,
            "val_loss_every": self.save_every,
            "save_every": self.save_every,
            "run_id": self.place.run_id,
            "resume_from": "auto",
        }
        typed = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return [*child_training.torchrun_command(1), str(child_training.SCRIPT), *typed]


def run(args: argparse.Namespace) -> int:
    """Train, kill, train on, and show the result."""
    from unbroken.paths import Run

    if args.num_iterations < LEAST:
        raise UserError(f"--num_iterations must be at least {LEAST}, so that there is something to interrupt")
    demo = Demo(Run(str(uuid.uuid4()), ""), args.num_iterations)
    print("The built-in corpus: the source of Python's standard library, as bytes.", flush=True)
    prepare.ensure_builtin()
    shown = " ".join(demo.command()[3:]).replace(str(child_training.SCRIPT), child_training.SCRIPT.name)
    print(f"$ torchrun {shown}\n", flush=True)
    try:
        train(demo, demo.kill_at)
        at = last_step(demo.place.log)[0]
        print(
            console.colored(f"\nKILLED with SIGKILL after step {at}: torchrun and its worker, at once.", console.BOLD)
        )
        print("The very same command again:\n", flush=True)
        said = train(demo, None)
    except KeyboardInterrupt:
        shutil.rmtree(demo.place.folder, ignore_errors=True)  # of this demonstration only: its run_id is fresh
        raise
    return show(demo, at, said)


def train(demo: Demo, kill_at: int | None) -> list[str]:
    """Run the command to its end, or kill it after step `kill_at`. Return its output."""
    said = []
    with child_training.running_command(demo.command()) as process, progress(demo.num_iterations) as (say, advance):
        for line in child_training.read_lines(process, POLL_SECONDS):
            if line is not None:
                said.append(line)
                say(line)
            step, loss = last_step(demo.place.log)
            advance(step, loss)
            if kill_at is not None and step >= kill_at:
                return said
        code = process.wait()
    if kill_at is not None or code != 0 or not (demo.place.folder / FINAL).exists():
        reasons = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        raise UserError(reasons[-1] if reasons else f"the training ended early, with exit code {code}")
    return said


def last_step(log: Path) -> tuple[int, str]:
    """Return (last step, its loss) of a log; 0 if there is none."""
    found = _TRAINED.findall(log.read_text("utf-8")) if log.exists() else []
    return (int(found[-1][0]), found[-1][1]) if found else (0, "")


Say = Callable[[str], None]
Advance = Callable[[int, str], None]


@contextmanager
def progress(num_iterations: int) -> Iterator[tuple[Say, Advance]]:
    """Yield a function that prints a line and one that moves the bar; without a terminal few lines are printed."""
    if not sys.stdout.isatty():
        yield _say_plainly, lambda step, loss: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("starting", total=num_iterations)

        def say(line: str) -> None:
            if not _STEP.match(line):
                bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

        def advance(step: int, loss: str) -> None:
            if step:
                bar.update(task, completed=step, description=f"loss {loss}")

        yield say, advance


def _say_plainly(line: str) -> None:
    step = _STEP.match(line)
    if step is None or int(step[1]) % PLAIN_EVERY == 0:
        print(line, flush=True)


def show(demo: Demo, killed_at: int, said: list[str]) -> int:
    """Print where everything is, the proof that nothing was lost, and some text. Return 1 if something was lost."""
    place = demo.place
    proofs = repeated(said)
    print(f"\n{console.colored('Done.', console.BOLD)} Killed after step {killed_at}, resumed, finished.\n")
    print(f"  proof        {'; '.join(proofs) or 'none: the resumed run repeated no step'}")
    print(f"  log          {place.log}")
    print(f"  checkpoints  {place.folder}/  (python -m unbroken ls {place.run_id})")
    print(f"  loss curve   {draw(place)}")
    typed = f"--prompt '{PROMPTS[0]}' --num_tokens {WRITTEN_BYTES} --seed {SEED}"
    print(f"\nWhat it writes (python -m unbroken sample {place.run_id} {typed}):\n", flush=True)
    print(console.colored(written(place.folder / FINAL), console.DIM))
    return 0 if proofs and all(proof.endswith("identical") for proof in proofs) else 1


def repeated(said: list[str]) -> list[str]:
    """Return the resumed run's line about repeated steps."""
    return [found[0] for line in said if (found := _REPEATED.search(line))]


def draw(place: Run) -> Path:
    """Draw the picture of the losses."""
    from unbroken.commands import plot

    picture = place.folder / plot.PICTURE
    plot.draw([place.log], picture)
    return picture


def written(final: Path) -> str:
    """A few lines by the trained model."""
    from unbroken.checkpoint.reader import CheckpointFile
    from unbroken.inference import SamplingConfig, TextGenerator

    with CheckpointFile(final) as file:
        author = TextGenerator(file)
    texts = [
        "".join(author.generate(prompt, WRITTEN_BYTES, SamplingConfig(), SEED + k)) for k, prompt in enumerate(PROMPTS)
    ]
    return "\n".join(f"    {line}" for text in texts for line in text.splitlines() if line.strip())
