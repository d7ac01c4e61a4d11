"""train_gpt2_mod.py with a list of the climbs on the way from the command line to the restored state.

A climb is a call from a lower package to a higher one in the order of ROOMS: a callback, since imports point downward.
Each is counted once by its two functions, however often it happens; what the entry script calls is no climb. The list
goes to climbs.txt.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt2_mod
from tests.harness import ROOT, SCRIPT
from tests.test_public_interface import ROOMS, room_of
from unbroken.run import resume

PACKAGE = f"{ROOT / 'unbroken'}/"
climbs: set[str] = set()
restore = resume.restore


def place(frame: FrameType) -> tuple[int, str] | None:
    """The floor of the code of a frame, and its name; None for code of others."""
    path = frame.f_code.co_filename
    if path == str(SCRIPT):
        return len(ROOMS), SCRIPT.name
    name = path.removeprefix(PACKAGE)
    return None if name == path else (ROOMS.index(room_of(name)), f"{name}:{frame.f_code.co_name}")


def called(frame: FrameType, event: str, _: object) -> None:
    here, caller = place(frame) if event == "call" else None, frame.f_back
    while here and caller and not place(caller):
        caller = caller.f_back
    above = place(caller) if here and caller else None
    if here and above and above[0] < here[0] and frame.f_code.co_name != "<module>":
        climbs.add(f"{above[1]} -> {here[1]}")


def restored(*typed: object) -> None:
    """The end of the way."""
    restore(*typed)  # type: ignore[arg-type]
    sys.setprofile(None)
    Path("climbs.txt").write_text("\n".join(sorted(climbs)))


if __name__ == "__main__":
    resume.restore = restored  # type: ignore[assignment]
    threading.setprofile(called)
    sys.setprofile(called)
    sys.exit(train_gpt2_mod.main(sys.argv[1:]))
