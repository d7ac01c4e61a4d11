"""Resume from a storage: download its newest checkpoint, and the log, if this machine has nothing newer.

`store.py` describes the storage, `upload.py` writes to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from unbroken.checkpoint import directory, disk, rewind
from unbroken.checkpoint.directory import Fingerprint, best_steps, fingerprint_of
from unbroken.checkpoint.format.schema import BEST, FINAL, checkpoint_name
from unbroken.checkpoint.reader import CheckpointFile
from unbroken.checkpoint.rewind import Rewinds
from unbroken.config import MAX_YAML_CHARACTERS, TRAINED, parse_yaml
from unbroken.distributed.world import World
from unbroken.errors import PassingError, UserError, describe_error
from unbroken.files import read_whole
from unbroken.mirror.store import (
    MAX_TEXT_BYTES,
    ContentMismatch,
    DamagedCopy,
    Manifest,
    RemoteCheckpoint,
    RemoteRun,
    Storage,
    is_url,
    say,
)
from unbroken.paths import Run, is_name, is_run_id, journal_of, logs_dir, trusted_output_dir
from unbroken.run.experiment import Experiment, differences
from unbroken.run.locate import compare_runs, complete_run_id, describe_nearest, parse
from unbroken.run.lock import RunLocks
from unbroken.run.restarts import find_interrupted_run
from unbroken.text import printable

Result = TypeVar("Result")
TRIES, SECONDS_BETWEEN_TRIES = 4, 2.0  # of a storage that does not answer


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint on this machine. `time`: when it was saved, in seconds since 1970."""

    run_id: str
    step: int
    time: float
    path: Path


@dataclass(frozen=True)
class FetchPlan:
    """A plan of a download.

    `copies` are of one run, the one to try first at the beginning, and newer than `here` unless the checkpoint was
    `named`. `rewinds`: those of the run, if this machine does not know them.
    """

    url: str
    run_id: str
    copies: list[RemoteCheckpoint]
    named: bool
    here: LocalCheckpoint | None
    rewinds: Rewinds = ()


def fetch_if_newer(typed: dict[str, Any], agents: list[Any], world: World) -> tuple[dict[str, Any], str]:
    """Return the flags, with a `--resume_from` that names a local checkpoint or run, and the URL of the storage.
    Collective.

    Downloads for `--resume_from URL/...`, and with `--mirror` for `auto`, `latest` and run_ids if the storage has a
    newer checkpoint.
    """
    text, mirror = typed.get("resume_from", ""), typed.get("mirror", "")
    if mirror and not is_url(text):
        with world.raise_together():
            storage = Storage(mirror, hurried=True)  # a mistake in the URL is found before anything else happens
            run_id = ""
            if world.is_main:
                storage.require_bucket()
                begun = {*TRAINED, "run_id", "fork"} & set(typed)
                named = typed.get("name", "") if text == "auto" and not begun else text
                run_id = complete_run_id(named) or _find_remote_name(storage, named)
        if run_id := world.broadcast(run_id):
            text, typed = run_id, {**typed, "resume_from": run_id}
    if not is_url(text) and not (mirror and (text in ("auto", "latest") or is_run_id(text))):
        return typed, mirror
    with world.raise_together():
        restarted = world.is_main and find_interrupted_run(agents) is not None  # then its run is on this machine
        found = _fetch_newer(typed) if world.is_main and not restarted else "auto"
    return {**typed, "resume_from": world.broadcast(found)}, parse(text).url if is_url(text) else mirror


def fetch_on_other_nodes(path: Path, url: str, world: World) -> None:
    """Download the checkpoint from which rank 0 resumes, on machines that do not see its files. Collective."""
    identity = world.broadcast(fingerprint_of(path))
    with world.raise_together():
        if identity is not None and world.launch.local_rank == 0 and fingerprint_of(path) != identity:
            _fetch_named(url, path, identity)


def _fetch_newer(typed: dict[str, Any]) -> str:
    """Download what is newer in the storage; return the value of `--resume_from` that names the local result."""
    text, url, exact = typed.get("resume_from", ""), typed.get("mirror", ""), ""
    run_id = "" if typed.get("fork") else typed.get("run_id", "")
    if is_url(text):
        target = parse(text)
        url, run_id, exact = target.url, target.run_id, target.name
        text = "auto" if text.rpartition("/")[2] == "auto" else "latest"
    elif is_run_id(text):
        run_id = text
    storage = Storage(url, hurried=True)
    is_auto = text == "auto" and not run_id and not typed.get("fork")
    here = _newest_local([logs_dir() / run_id] if run_id else _local_runs(typed, is_auto))
    try:
        if not run_id:
            when, run_id = _newest_remote_run(storage, typed, is_auto, tell=here is None)
            if is_auto and here is None and not run_id and not {*TRAINED, "name"} & set(typed):  # it has begun none
                here, (when, run_id) = _newest_local(_local_runs(typed, False)), _newest_remote_run(storage, typed)
            if here is not None and here.run_id != run_id:
                if here.time >= when:
                    run_id = here.run_id
                else:
                    here = _newest_local([logs_dir() / run_id])
        manifest = storage.run(run_id).manifest() if run_id else Manifest()
    except Exception as error:
        if here is None or exact:
            instead = "" if exact else "; this machine has none either"
            kind = UserError if isinstance(error, (UserError, DamagedCopy)) else PassingError
            raise kind(f"cannot look for checkpoints in {url}: {describe_error(error)}{instead}") from None
        say(f"WARNING: cannot look for checkpoints in {url}: {describe_error(error)}; continuing with the local files")
        return here.run_id
    copies, rewinds = list(manifest.checkpoints[::-1]), manifest.rewinds
    divergence = rewind.find_divergence(rewind.read_rewinds(logs_dir() / run_id), rewinds) if run_id else None
    is_behind, fork = divergence is not None and not divergence.ours_is_newer, bool(typed.get("fork"))
    if exact:
        copies = manifest.best_copies()[:1] if exact == BEST else [copy for copy in copies if copy.name == exact]
    elif divergence is not None and not is_behind:  # the storage does not know of the rewind
        copies = [copy for copy in copies if copy.step <= divergence.step]
    elif divergence is not None and here is not None and not fork:
        _set_aside_overtaken(run_id, divergence.step, manifest)
        here = _newest_local([logs_dir() / run_id])
    if here is not None and (exact or fork or not is_behind):
        rewinds = ()  # what is here stays as it is
    if here is not None and not exact:
        copies = [copy for copy in copies if copy.step > here.step]
    if copies:
        name = _fetch_best(FetchPlan(url, run_id, copies, named=bool(exact), here=here, rewinds=rewinds), typed)
        return str(logs_dir() / run_id / name) if exact else run_id
    if exact or here is None:
        if text == "auto" and not exact:
            return "auto"
        where = "/".join(filter(None, (url, run_id, exact)))
        raise UserError(f"there is no whole checkpoint in {where}")
    if not fork and (divergence is None or is_behind):
        _fetch_log(storage.run(run_id), here, typed)
    return run_id


def _find_remote_name(storage: Storage, name: str) -> str:
    """Return the run_id of the run in the storage that has a name; "" for none. Raises UserError."""
    if not is_name(name) or os.path.lexists(name):
        return ""
    try:
        for _, run_id in storage.runs_by_last_copy():
            with suppress(UserError, UnicodeDecodeError):
                if _remote_config(storage, run_id).get("name") == name:
                    return run_id
    except Exception as error:
        raise PassingError(f"cannot look for run {name} in {storage.url}: {describe_error(error)}") from None
    return ""


def _remote_config(storage: Storage, run_id: str) -> dict[str, Any]:
    """Return the config.yaml of a run in the storage. Raises UserError, UnicodeDecodeError, or the storage's error."""
    return parse_yaml((storage.run(run_id).text("config.yaml", MAX_YAML_CHARACTERS + 1) or b"").decode(), run_id)


def _set_aside_overtaken(run_id: str, step: int, manifest: Manifest) -> None:
    """Set aside local checkpoints after `step`, where another machine took the run back, and remember its rewinds."""
    folder, there = logs_dir() / run_id, {copy.fingerprint for copy in (*manifest.checkpoints, *manifest.weights)}
    with RunLocks() as locks:
        locks.take(folder)
        later = [
            found.path
            for found in (*directory.list_checkpoints(folder), *directory.list_weights(folder))
            if (found.step is None or found.step > step) and fingerprint_of(found.path) not in there
        ]
        if later:
            aside = rewind.set_aside(folder, later)
            say(f"{', '.join(path.name for path in later)} overtaken by another machine, kept in {aside}")
        rewind.write_rewinds(folder, manifest.rewinds)


def _local_runs(typed: dict[str, Any], is_auto: bool) -> list[Path]:
    """Return the folders of runs on this machine, newest first; with `auto` those that the command began."""
    if is_auto:
        return [folder for folder, differing in compare_runs(typed).items() if not differing]
    return directory.runs_by_last_save(logs_dir())


def _newest_remote_run(
    storage: Storage, typed: dict[str, Any], is_auto: bool = False, tell: bool = False
) -> tuple[float, str]:
    """Return (time, run_id) of the run copied last, (0.0, "") for none; with `auto` of those that the command began.

    `tell`: whether to print the nearest run if the command began none.
    """
    differing: dict[str, list[str]] = {}
    for when, run_id in storage.runs_by_last_copy():
        if is_auto:
            try:
                config = _remote_config(storage, run_id)
            except (UserError, UnicodeDecodeError) as error:
                say(f"WARNING: passing over {storage.url}/{run_id}: {describe_error(error)}")
                continue
            differing[run_id] = differences(typed, _remote_experiment(config))
        if not is_auto or not differing[run_id]:
            return when, run_id
    if tell and differing and set(TRAINED) & set(typed):
        say(describe_nearest(differing, storage.url))
    return 0.0, ""


def _remote_experiment(config: dict[str, Any]) -> Experiment:
    return Experiment(config, str(config.get("input_bin", "")), name=str(config.get("name", "")))


def _newest_local(folders: Sequence[Path]) -> LocalCheckpoint | None:
    """Return the newest whole checkpoint on this machine, of the first of these runs that has one."""
    for folder in folders:
        file, _ = directory.open_newest_whole(directory.list_checkpoints(folder))
        if file is None:
            continue
        with file:
            if file.is_ours:
                values, path = file.values, file.path
                run_id = folder.name if is_run_id(folder.name) else values["run_id"]
                return LocalCheckpoint(run_id, values["step"], directory.saved_at(values, path), path)
    return None


def _fetch_best(plan: FetchPlan, typed: dict[str, Any]) -> str:
    """Download the first whole copy and the log up to it. Return its name, "" for none. On rank 0.

    A storage that does not answer is no reason to resume from an older copy.
    """
    remote = Storage(plan.url).run(plan.run_id)
    name, failed = "", ""
    unusable: dict[str, Exception] = {}  # objects
    for copy in plan.copies:
        if copy.object in unusable:
            continue
        try:
            _with_retries(partial(_fetch_with_log, remote, plan, copy, typed))
            name = copy.name
            break
        except UserError:
            raise
        except Exception as error:
            failed = f"{remote.url}/{copy.name}: {describe_error(error)}"
            if not isinstance(error, (DamagedCopy, FileNotFoundError)):
                break
            say(f"passing over {failed}")
            unusable[copy.object] = error
    if name:
        say(f"downloaded {name} of run {plan.run_id} from {remote.url}")
    elif plan.named or plan.here is None:
        raise UserError(f"no checkpoint could be downloaded from {remote.url}: {failed}")
    else:
        say(f"WARNING: no checkpoint could be downloaded from {remote.url}: {failed}; continuing with the local files")
        _fetch_log(remote, plan.here, typed)
    damaged = [object for object, error in unusable.items() if isinstance(error, ContentMismatch)]
    if damaged and plan.url == typed.get("mirror"):  # or the newest there would be damaged for ever
        with suppress(Exception):
            manifest = remote.manifest()
            remote.publish(manifest.without([copy for copy in manifest.checkpoints if copy.object in damaged]))
    return name


def _with_retries(work: Callable[[], Result]) -> Result:
    """Return the work's result. A storage that does not answer is asked again; its last error is raised."""
    for _ in range(TRIES - 1):
        try:
            return work()
        except (DamagedCopy, FileNotFoundError, UserError):
            raise
        except Exception:
            time.sleep(SECONDS_BETWEEN_TRIES)
    return work()


def _fetch_with_log(remote: RemoteRun, plan: FetchPlan, copy: RemoteCheckpoint, typed: dict[str, Any]) -> None:
    """Download a copy and its log. Raises DamagedCopy, FileNotFoundError, or the storage's error."""
    run_id = plan.run_id
    with RunLocks() as locks:
        locks.take(logs_dir() / run_id)
        path = ensure_local(remote, run_id, copy)
        _fetch_best_copies(remote, run_id, path)
        if plan.rewinds:
            rewind.write_rewinds(logs_dir() / run_id, plan.rewinds)
        _fetch_texts(remote, _output_dir(path, run_id, copy.step, typed), run_id, of_a_copy=True)


def _fetch_best_copies(remote: RemoteRun, run_id: str, newest: Path) -> None:
    """Download the best checkpoints that the downloaded one names, and link `best.pt`; failures are only warned about.

    The run is locked.
    """
    with CheckpointFile(newest) as file:
        steps = best_steps(file.values)
    manifest = remote.manifest() if steps else Manifest()
    for copy in filter(None, (manifest.get(checkpoint_name(step)) for step in steps)):
        try:
            ensure_local(remote, run_id, copy)
        except (DamagedCopy, FileNotFoundError) as error:
            say(f"WARNING: {copy.name}, one of the best, could not be downloaded: {describe_error(error)}")
    if steps:
        with suppress(OSError):  # the start of the attempt tries again and says why
            directory.link_best(newest.parent, steps)


def _fetch_named(url: str, path: Path, identity: Fingerprint) -> None:
    """Download the checkpoint that rank 0 has at `path`, on another machine."""
    run_id = path.parent.name
    if not is_run_id(run_id):
        return  # not in a run's folder: opening it will fail with the reason
    remote = Storage(url).run(run_id)
    try:
        copy = remote.manifest().get(path.name)
        if copy is None or copy.fingerprint != identity:
            raise UserError(f"{path} is not on every node, nor in {remote.url}")
        with RunLocks() as locks:
            locks.take(logs_dir() / run_id)
            ensure_local(remote, run_id, copy)
    except UserError:
        raise
    except Exception as error:
        raise PassingError(f"cannot download {remote.url}/{path.name}: {describe_error(error)}") from None


def ensure_local(remote: RemoteRun, run_id: str, copy: RemoteCheckpoint) -> Path:
    """Return the path of a copy after downloading it if necessary; the run is locked. A replaced checkpoint is kept."""
    path = logs_dir() / run_id / copy.name

    def check(downloaded: Path) -> None:
        damage = directory.find_damage(downloaded)
        if damage is not None:
            raise DamagedCopy(damage)
        _output_dir(downloaded, run_id, copy.step, {})
        if directory.is_regular(path) and directory.find_damage(path) is None and not _kept_as_periodic(path):
            say(f"{path} differs from the storage's copy, kept in {rewind.link_aside(path)}")

    if (
        not directory.is_regular(path)
        or Fingerprint.of(path) != copy.fingerprint
        or directory.find_damage(path) is not None
    ):
        remote.fetch(copy, path, check)
    return path


def _kept_as_periodic(path: Path) -> bool:
    """Return whether a whole `final.pt` of a run that was extended elsewhere keeps the name of its step."""
    if path.name != FINAL:
        return False
    with CheckpointFile(path) as file:
        step = int(file.values["step"])
    rewind.keep_final_as_periodic(path.parent, step)
    periodic = path.with_name(checkpoint_name(step))
    return periodic.exists() and path.samefile(periodic)


def _output_dir(path: Path, run_id: str, step: int, typed: dict[str, Any]) -> str:
    """Return the run's --output_dir. Raises DamagedCopy if the checkpoint is not of this run and step."""
    with CheckpointFile(path) as file:
        if (file.values["run_id"], file.values["step"]) != (run_id, step):
            raise ContentMismatch(f"it is step {file.values['step']} of run {printable(file.values['run_id'])}")
        return str(
            typed.get("output_dir") or trusted_output_dir(str(file.values["args"].get("output_dir", "")), run_id)
        )


def _fetch_log(remote: RemoteRun, here: LocalCheckpoint, typed: dict[str, Any]) -> None:
    """Download the log of a run whose newest checkpoint is here, if the log was lost here."""
    if not (logs_dir() / here.run_id).is_dir():
        return  # its folder has another name
    with RunLocks() as locks:
        locks.take(logs_dir() / here.run_id)
        try:
            output_dir = _output_dir(here.path, here.run_id, here.step, typed)
        except DamagedCopy:
            return  # of another run: another check reports it
        _fetch_texts(remote, output_dir, here.run_id, of_a_copy=False)


def _fetch_texts(remote: RemoteRun, output_dir: str, run_id: str, of_a_copy: bool) -> None:
    """Download log, journal and config; a local one that is replaced by a different one is kept aside.

    `of_a_copy`: they belong to a downloaded checkpoint, so they replace the local ones unless these continue them.
    Otherwise only longer ones are downloaded. Failures are only warned about.
    """
    run = Run(run_id, output_dir)
    run.create()
    logs = (run.log, journal_of(run.log))
    try:
        here = {path: read_whole(path, MAX_TEXT_BYTES) if path.exists() else b"" for path in logs}
    except OSError as error:
        say(f"WARNING: cannot read the log of run {run_id}: {describe_error(error)}; continuing with the local files")
        return

    def ask() -> dict[Path, bytes | None]:
        found = {path: _longer(remote, path.name, here[path], of_a_copy) for path in logs}
        if not os.path.lexists(run.folder / "config.yaml"):
            found[run.folder / "config.yaml"] = remote.text("config.yaml")
        return found

    try:
        downloaded = _with_retries(ask)
    except Exception as error:
        why = describe_error(error)
        say(f"WARNING: cannot look for the log in {remote.url}: {why}; continuing with the local files")
        return
    others = [path for path in logs if (content := downloaded[path]) is not None and not content.startswith(here[path])]
    try:
        if others:
            aside = rewind.write_aside(others[0].parent, {path.name: here[path] for path in others})
            say(f"{others[0]} differs from the storage's copy, kept in {aside}")
        for path, content in downloaded.items():
            if content is not None:
                final = Path(os.path.realpath(path))
                disk.replace(final.with_name(f".{final.name}.tmp"), final, content)
    except OSError as error:
        say(f"WARNING: cannot write the log of run {run_id}: {describe_error(error)}; continuing with the local files")


def _longer(remote: RemoteRun, name: str, here: bytes, of_a_copy: bool) -> bytes | None:
    """Return the storage's version of a log if it is to replace the local one; else None."""
    if not of_a_copy and remote.size_of(name) <= len(here):
        return None
    there = remote.text(name)
    return None if there is None or here.startswith(there) else there
