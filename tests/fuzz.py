"""Coverage-guided fuzzing of all that parses a checkpoint. Not part of `make test`: it needs `pip install atheris`.

    python tests/fuzz.py [-runs=200000] [-max_total_time=600] [CORPUS]

libFuzzer mutates files and pickles and keeps what reaches new lines of `unbroken.checkpoint`. Anything but a UserError
of one printable line is a finding: the input is left behind as crash-<hash>.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import atheris  # type: ignore[import-not-found,unused-ignore]
import torch

with atheris.instrument_imports(include=["unbroken.checkpoint"]):
    from unbroken.checkpoint.format.pickle_reader import unpickle
    from unbroken.checkpoint.format.stored_tensor import PickleRefused
    from unbroken.checkpoint.reader import CheckpointFile

from tests import checkpoints as make
from unbroken.errors import UserError

FOLDER = Path(tempfile.mkdtemp())
MEMORY = 4 << 30  # bytes of address space beyond what is there at the start: an allocation out of proportion fails


def one(data: bytes) -> None:
    """The first byte says what the rest is: a whole file, a pickle by itself, or a pickle in a right zip."""
    kind, rest = data[:1], data[1:]
    path = FOLDER / "fuzzed.pt"
    try:
        if kind == b"\1":
            unpickle(rest, {"0": 24, "1": 24})
            return
        path.write_bytes(make.pickle_file(rest, {"0": bytes(24), "1": bytes(24)}) if kind == b"\2" else rest)
        with CheckpointFile(path) as file:
            file.verify()
            for _, stored in file.stored():
                if stored.numel < 10_000:
                    file.tensor(stored)
    except (UserError, PickleRefused) as error:
        if not str(error).isprintable():
            raise RuntimeError(f"unprintable: {error!r}") from None


def seeds(folder: Path) -> None:
    """What to begin with: one of our own files, and the pickle in it."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = make.torch_bytes({"model": {"w": torch.arange(6.0)}, "n": [1, 2.5, "x", (None, True)], "b": b"\xff"})
    start, size = make.payload(saved, "data.pkl")
    for name, content in (("file", b"\0" + saved), ("one", b"\1"), ("two", b"\2")):
        (folder / name).write_bytes(content if name == "file" else content + saved[start : start + size])


def main() -> None:
    """Seed the corpus, set the limit, fuzz."""
    corpus = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    if corpus is None:
        corpus = str(FOLDER / "corpus")
        sys.argv.append(corpus)
    seeds(Path(corpus))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
