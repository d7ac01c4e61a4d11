"""`python -m unbroken demo`, which `make train` runs: a small run from start to end, killed once."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import uuid
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from unbroken import console
from unbroken.checkpoint import directory
from unbroken.checkpoint.format.schema import FINAL
from unbroken.commands import plot
from unbroken.data import prepare
from unbroken.errors import UserError
from unbroken.metrics.logfile import read_log
from unbroken.paths import Run, with_logs_dir
from unbroken.runtime import child_training

ITERATIONS = 400
LEAST = 6
SETTINGS = {  # about a minute on two CPU cores, most of it for the head's 50,257 tokens
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
PLAIN_EVERY = 20  # steps between two lines
_REPEATED = re.compile(r"steps? \d+(?:-\d+)? repeated: .*")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: how long."""
    parser.add_argument("--num_iterations", type=int, default=ITERATIONS, metavar="N", help=f"default: {ITERATIONS}")


@dataclass(frozen=True)
class Demo:
    """A demonstration: its run, and the step at which it is killed."""

    place: Run
    num_iterations: int

    @property
    def save_every(self) -> int:
        return max(1, self.num_iterations // 6)

    @property
    def kill_at(self) -> int:
        """A step after a checkpoint, so that the resumed run repeats steps that the log has."""
        saves = max(1, int(KILLED_AT * self.num_iterations) // self.save_every)
        return min(saves * self.save_every + max(1, self.save_every // 4), self.num_iterations - 1)

    def flags(self) -> list[str]:
        """Return the flags, the same both times: `--resume_from auto` starts the run, then continues it."""
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
        return [*typed, *shlex.split(with_logs_dir(""))]


def run(args: argparse.Namespace) -> int:
    """Train, kill, resume, and show the result."""
    if args.num_iterations < LEAST:
        raise UserError(f"--num_iterations must be at least {LEAST}, so that there is something to interrupt")
    demo = Demo(Run(str(uuid.uuid4()), ""), args.num_iterations)
    print("The built-in corpus: the source of Python's standard library, as bytes.", flush=True)
    prepare.ensure_builtin()
    torchrun = "torchrun --standalone --nproc_per_node=1"
    print(f"$ {torchrun} {child_training.SCRIPT.name} {shlex.join(demo.flags())}\n", flush=True)
    try:
        train(demo, demo.kill_at)
        at = read_log(demo.place.log).train[-1][0]
        print(
            console.colored(f"\nKILLED with SIGKILL after step {at}: torchrun and its worker, at once.", console.BOLD)
        )
        print("The same command again:\n", flush=True)
        said = train(demo, None)
    except KeyboardInterrupt:
        shutil.rmtree(demo.place.folder, ignore_errors=True)  # of this demonstration only: its run_id is fresh
        raise
    return show(demo, at, said)


def train(demo: Demo, kill_at: int | None) -> list[str]:
    """Run the command to its end, or kill it after step `kill_at`. Return its output."""
    with closing(console.Console(demo.num_iterations, 0)) as screen:

        def heard(line: str) -> None:
            step = child_training.step_of(line)
            if step < 0:
                screen.line(line)
            else:
                screen.step(step, line if step % PLAIN_EVERY == 0 else "")

        return child_training.train(demo.flags(), kill_at=kill_at, heard=heard)


def show(demo: Demo, killed_at: int, said: list[str]) -> int:
    """Print the files of the run, the proof that nothing was lost, and some text. Return 1 if something was lost."""
    place = demo.place
    proofs = repeated(said)
    picture = place.folder / plot.PICTURE
    plot.draw([place.log], picture)
    print(f"\n{console.colored('Done.', console.BOLD)} Killed after step {killed_at}, resumed, finished.\n")
    print(f"  proof        {'; '.join(proofs) or 'none: the resumed run repeated no step'}")
    print(f"  log          {place.log}")
    print(f"  checkpoints  {place.folder}/  ({with_logs_dir(f'python -m unbroken ls {place.run_id}')})")
    print(f"  loss curve   {picture}")
    typed = f"{place.run_id} --prompt '{PROMPTS[0]}' --num_tokens {WRITTEN_BYTES} --seed {SEED}"
    print(f"\nWhat it writes ({with_logs_dir(f'python -m unbroken sample {typed}')}):\n", flush=True)
    print(console.colored(written(place.folder / FINAL), console.DIM))
    return 0 if proofs and all(proof.endswith("identical") for proof in proofs) else 1


def repeated(said: list[str]) -> list[str]:
    """Return the resumed run's line about repeated steps."""
    return [found[0] for line in said if (found := _REPEATED.search(line))]


def written(final: Path) -> str:
    """Return a few lines that the trained model writes."""
    from unbroken.inference import SamplingConfig, TextGenerator

    with directory.open_file(final) as file:
        author = TextGenerator(file)
    texts = [
        "".join(author.generate(prompt, WRITTEN_BYTES, SamplingConfig(), SEED + k)) for k, prompt in enumerate(PROMPTS)
    ]
    return "\n".join(f"    {line}" for text in texts for line in text.splitlines() if line.strip())
