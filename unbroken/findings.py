"""Findings of the checks before a training, which are printed and logged in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Findings:
    """The findings of checks: lines for the user, and whether repeated steps must equal the log. They add up with `+`.

    `warnings` are lines that the user must not miss, `notes` the other ones. `same_trajectory`: every step computes
    what it computed before, so a repeated step must have the logged loss.
    """

    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    same_trajectory: bool = True

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            self.warnings + other.warnings, self.notes + other.notes, self.same_trajectory and other.same_trajectory
        )


def warn(*lines: str) -> Findings:
    """Return findings of warnings only; empty lines are left out."""
    return Findings(warnings=tuple(filter(None, lines)))


def note(*lines: str) -> Findings:
    """Return findings of notes only; empty lines are left out."""
    return Findings(notes=tuple(filter(None, lines)))
