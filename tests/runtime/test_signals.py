"""Which signal stops a run after its step, and which one at once."""

from __future__ import annotations

import os
import signal

import pytest

from unbroken.runtime import signals
from unbroken.runtime.signals import StopSignals


@pytest.mark.parametrize(
    ("numbers", "at_once"),
    [
        ([signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGINT], False),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGTERM], False),
    ],
)
def test_only_a_second_sigint_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch, numbers: list[signal.Signals], at_once: bool
) -> None:
    now, left = 0.0, []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    monkeypatch.setattr(os, "_exit", left.append)
    with StopSignals() as stop:
        for number in numbers:
            now += 10.0
            stop._note(number, None)
    assert left == ([130] if at_once else []) and stop.name == numbers[0].name
