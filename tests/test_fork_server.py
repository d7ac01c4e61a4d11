"""The fork server of the tests: a fork ends as a process of its own does."""

from __future__ import annotations

import subprocess
import sys
from typing import IO, Any

import pytest

from tests import fork_server

ENDS = {
    "with a number": "import sys; print('said'); sys.exit(259)",
    "with nothing": "import sys; print('said'); sys.exit(None)",
    "with a text": "import sys; print('said'); sys.exit('a reason')",
    "after its threads": "import threading; threading.Timer(0.2, print, ['said']).start()",
    "after what it registered": "import atexit; atexit.register(print, 'registered'); print('said', end='')",
    "with a failure of what it registered": "import atexit; atexit.register(lambda: 1 / 0); print('said')",
    "with an error": "print('said'); 1 / 0",
    "with an interrupt": "print('said'); raise KeyboardInterrupt",
}


def both(program: str, out: IO[bytes] | int) -> list[tuple[Any, ...]]:
    """What a fork and a process of its own print and return."""
    found = []
    for fresh in (False, True):
        process = fork_server.Popen([sys.executable, "-c", program], fresh=fresh, stdout=out, stderr=subprocess.PIPE)
        said, errors = process.communicate(timeout=120)
        last = errors.splitlines()[-1:]
        found.append((process.returncode, said, last))
    return found


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_a_process_of_its_own_does(end: str) -> None:
    fork, own = both(ENDS[end], subprocess.PIPE)
    assert fork == own and b"said" in own[1]


def test_what_cannot_be_written_at_the_end_is_said() -> None:
    program = "import sys; sys.stdout = open(1, 'w', closefd=False); sys.stdout.write('said')"
    with open("/dev/full", "wb") as full:
        fork, own = both(program, full)
    assert fork == own and own[0] == 120
