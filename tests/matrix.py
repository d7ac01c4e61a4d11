"""`make test-matrix`: the fast tests on several versions of Python and torch, each in an environment of its own.

    python -m tests.matrix [PYTHON:TORCH ...]        for example 3.13:2.14 or 3.12:newest

An environment lies below UNBROKEN_MATRIX (default: the system's folder for temporary files) and is removed when its
tests have run: with CUDA, as PyPI's builds for Linux have it, it takes 8 GB. pip's own settings (PIP_CONSTRAINT,
PIP_EXTRA_INDEX_URL) decide what it finds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ("3.10:2.9", "3.11:2.13", "3.12:2.14", "3.13:newest", "3.14:newest")
TESTS = ["-q", "-n", "1", "-m", "fast or not slow", "-p", "no:cacheprovider", "--durations=0"]
COUNTS = ("passed", "failed", "error", "skipped")


def main(typed: list[str]) -> int:
    """Print a row of the table for each pair; return 1 if a test failed or a pair could not be had."""
    folder = Path(os.environ.get("UNBROKEN_MATRIX", tempfile.gettempdir())) / "unbroken-matrix"
    folder.mkdir(parents=True, exist_ok=True)
    print("| Python | torch | passed | failed | skipped |\n|---|---|---|---|---|", flush=True)
    rows = [row_of(*pair.split(":"), folder) for pair in typed or PAIRS]
    return 0 if all(rows) else 1


def row_of(python: str, torch: str, folder: Path) -> bool:
    """Make the environment of a pair, run the tests in it, print its row; return whether all passed."""
    interpreter = find_interpreter(python)
    if interpreter is None:
        print(f"| {python} | {torch} | no interpreter | | |", flush=True)
        return False
    place, log = folder / f"{python}-{torch}", folder / f"{python}-{torch}.log"
    wanted = "torch>=2.9" if torch == "newest" else f"torch=={torch}.*"
    inside = place / "bin/python"
    try:
        with open(log, "w") as out:

            def call(*command: str | Path) -> int:
                return subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=False).returncode

            made = call(interpreter, "-m", "venv", "--clear", place) == 0
            install = (inside, "-m", "pip", "install", "-q", "--no-cache-dir")
            if not made or call(*install, "-U", "pip") or call(*install, wanted, *requirements()):
                print(f"| {python} | {torch} | not installed: {log} | | |", flush=True)
                return False
            ask = "import platform, torch; print(platform.python_version(), '|', torch.__version__)"
            versions = subprocess.run([inside, "-c", ask], capture_output=True, text=True, check=False).stdout.strip()
            code = call(inside, "-m", "pytest", *TESTS)
        passed, failed, errors, skipped = counts(log.read_text("utf-8", "replace"))
        print(f"| {versions or f'{python} | {torch}'} | {passed} | {failed + errors} | {skipped} |", flush=True)
        return code == 0
    finally:
        shutil.rmtree(place, ignore_errors=True)


def find_interpreter(python: str) -> str | None:
    """Return an interpreter of this version that runs: of the PATH, or pyenv's."""
    found = [shutil.which(f"python{python}"), *Path.home().glob(f".pyenv/versions/{python}.*/bin/python{python}")]
    for each in filter(None, found):
        if subprocess.run([each, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(each)
    return None


def requirements() -> list[str]:
    """Return the packages of the tests, at any version, without torch."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import pip._vendor.tomli as tomllib  # type: ignore[import-not-found, no-redef, unused-ignore]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

    def expand(names: list[str]) -> list[str]:
        found = []
        for name in names:
            ours = re.fullmatch(r"unbroken\[(.+)\]", name)
            extras = ours[1].split(",") if ours else []
            found += [each for extra in extras for each in expand(project["optional-dependencies"][extra])]
            found += [] if ours or name.startswith("torch") else [name]
        return found

    return expand([*project["dependencies"], "unbroken[dev]"])


def counts(output: str) -> list[int]:
    """Return the numbers of COUNTS in pytest's last line."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    last = lines[-1] if lines else ""
    return [int(found[1]) if (found := re.search(rf"(\d+) {word}", last)) else 0 for word in COUNTS]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
