"""The record of a run for an audit: the exact content of its journal, and the seal that commits to every line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbroken.checkpoint.format.schema import dict_at
from unbroken.errors import UserError, cannot_read
from unbroken.files import regular
from unbroken.metrics.append_file import MAX_LINE_BYTES
from unbroken.metrics.journal import Line
from unbroken.metrics.logfile import Event, LogSchedule, attempt_line, began, event_line, events
from unbroken.metrics.timeline import read_lines

DIGEST_WORDS = ("file", "tensors", "crcs", "pickle")
NAMES = {"train_loss": "trn", "val_loss": "val"}  # in the journal: in the log


@dataclass(frozen=True)
class Start:
    """The start of an attempt: the step that it resumed from, its flags and its machine."""

    step: int
    args: dict[str, Any]
    environment: dict[str, Any]


@dataclass
class Record:
    """A record of what a run has computed, without the steps that a later attempt superseded.

    `losses`: by (`trn` or `val`, step), with all their bits. `digests`: of the saved states by step, as
    `format/digest.py` makes them. Also of superseded attempts: `pickles`, the SHA-256 of every `data.pkl` by step,
    `printed`, the lines of events that the log may have, and `headers`, the words of its headers. `first_step` is the
    first that an attempt began at, `last_step` that of the last loss.
    """

    starts: list[Start] = field(default_factory=list)
    losses: dict[tuple[str, int], float] = field(default_factory=dict)
    digests: dict[int, Line] = field(default_factory=dict)
    pickles: dict[int, set[str]] = field(default_factory=dict)
    printed: set[str] = field(default_factory=set)
    headers: list[dict[str, str]] = field(default_factory=list)
    last_step: int = 0
    first_step: int = 10**15


def read_record(journal: Path) -> Record:
    """Read a journal. Raises UserError if there is none."""
    record = Record()
    try:
        for line in read_lines(journal):
            _add(record, line)
    except OSError as error:
        raise cannot_read(journal, error) from None
    return record


def _add(record: Record, line: Line) -> None:
    step, kind = line["step"], line.get("event")
    if kind == "start":
        record.starts = [each for each in record.starts if each.step < step]
        record.losses = {key: loss for key, loss in record.losses.items() if key[1] <= step}
        record.digests = {each: digest for each, digest in record.digests.items() if each <= step}
        about = {key: value for key, value in line.items() if isinstance(value, str)}
        record.starts.append(Start(step, dict_at(line, "args"), dict_at(line, "environment")))
        words = {name: value for name, value in about.items() if name not in ("event", "course")}
        record.headers.append({**words, "step": str(step)})
        record.first_step = min(record.first_step, step)
    elif kind == "digest" and all(isinstance(line.get(word), str) for word in DIGEST_WORDS):
        record.digests[step] = line
        record.pickles.setdefault(step, set()).add(line["pickle"])
    elif kind is None:
        record.last_step = step
        for name, short in NAMES.items():
            if type(line.get(name)) is float:
                record.losses[short, step] = line[name]
                record.printed.add(event_line(short, step, line[name]))


def journal_events(journal: Path) -> Iterator[Event]:
    """Yield the same as `events` of a log with a line for every step; nothing if there is no journal."""
    with suppress(OSError):
        for line in read_lines(journal):
            if line.get("event") == "start":
                yield "#", 0, attempt_line({"step": str(line["step"]), "course": str(line.get("course", ""))})[1:]
            for name, kind in NAMES.items():
                if "event" not in line and type(line.get(name)) is float:
                    yield kind, line["step"], event_line(kind, line["step"], line[name])


def compare_log(log: Path, record: Record) -> list[str]:
    """Return a line for each place where the log differs from the journal. Raises UserError if there is no log.

    A kill may have lost the journal's last line, so the end of the log may have steps that the journal lacks.
    """
    found, last, headers = list[str](), dict[tuple[str, int], str](), list[str]()
    schedule = LogSchedule.of(record.starts[-1].args if record.starts else {})
    try:
        for kind, step, text in events(log):
            if kind == "#":
                headers.append(text)
                continue
            last[kind, step] = text
            if text not in record.printed and record.first_step < step <= record.last_step:
                found.append(f"{log.name}: the journal has no {text!r}")
    except OSError as error:
        raise cannot_read(log, error) from None
    for (kind, step), loss in record.losses.items():
        line = event_line(kind, step, loss)
        if kind == "trn" and (kind, step) not in last and not schedule.has(step):
            continue
        if last.get((kind, step)) != line:
            found.append(f"{log.name}: step {step} is {last.get((kind, step), 'missing')!r}, the journal says {line!r}")
    expected = [set(attempt_line(header).split()) for header in record.headers]
    said = [{word for word in f"# {text}".split() if not word.startswith("course=")} for text in headers]
    found += [
        f"{log.name}: a start of the journal is not there: {' '.join(sorted(each))[:200]}"
        for each in expected
        if each not in said
    ]
    found += [
        f"{log.name}: the journal has no start {text[:200]!r}"
        for text, each in zip(headers, said, strict=True)
        if each not in expected and began(text) >= record.first_step
    ]
    return found


def seals(journal: Path) -> Iterator[str]:
    """Yield after each whole line the seal of all lines so far, in hexadecimal.

    A seal is the SHA-256 of the seal before, 32 bytes, and the line. Raises UserError if the journal cannot be read, or
    has a line that is too long for one of this program's.
    """
    seal = b""
    try:
        with open(journal, "rb", opener=regular) as file:
            while line := file.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES:
                    raise UserError(
                        f"cannot read {journal}: a line has more than {MAX_LINE_BYTES:,} bytes; it is no run's journal"
                    )
                if line.endswith(b"\n"):
                    seal = hashlib.sha256(seal + line).digest()
                    yield seal.hex()
    except OSError as error:
        raise cannot_read(journal, error) from None
