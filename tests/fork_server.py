"""Start Python programs as forks of a process that has imported torch: milliseconds instead of two seconds.

`Popen` and `run` are those of `subprocess`. A command that begins with this very Python becomes a fork of a server, one
for each process of pytest; everything else starts as ever. The fork is what the program would be: a child of the caller
with the pid that `Popen` says, its own session where asked, the caller's ignored signals, the given folder,
environment, pipes and command line (proc(5)), and a fresh `__main__`. The server has imported `unbroken`, which reads
nothing of its surroundings at that (test_public_interface), and called nothing of it; no parallel region of OpenMP has
run in it.

A fork that starts Python itself (`_starts_python`) has a server of its own, from which its children are forked.

Started afresh is what reads at its start something that the server has read already (`_READ_AT_START`), what has
options of Python, a terminal, or a module in its folder that would come before an imported one; and everything where
UNBROKEN_TEST_FRESH is set, or anywhere but on Linux. Forks of one server share the seed of Python's hashes and the
addresses of memory. While a fork is made, some milliseconds, a process that loses its parent becomes the caller's and
not that of process 1. `fresh=True` is for a test to which the start itself, or such an orphan, matters.
"""

from __future__ import annotations

import atexit
import builtins
import ctypes
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

FRESH = "UNBROKEN_TEST_FRESH"
ROOT = Path(__file__).resolve().parent.parent
# What both a training and torchrun import of other people's. Nothing here may start a thread.
_IMPORTED = ("numpy.typing", "torch", "torch.distributed.run", "rich.console", "rich.progress", "yaml", "zlib_ng")
_OWN = ("train_gpt2_mod", "unbroken")
# Read by Python, the dynamic loader, OpenMP, or torch and its libraries when they are loaded, and never again.
_READ_AT_START = re.compile(
    r"(PYTHON(?!PATH$)|LD_|OMP_|GOMP_|KMP_|MKL|OPENBLAS|BLIS|MALLOC_|GLIBC_"
    r"|TORCH(?!ELASTIC_|INDUCTOR_CACHE_DIR|_NCCL_|_DISABLE_SHARE_)|PYTORCH|CUDA|NVIDIA|HIP|ROCR|ATEN_|ONEDNN|DNNL|NPY_|NUMPY|LC_|TZ$|HOME$|VIRTUAL_ENV$|LOGLEVEL$)|LANG"
)
# As the program sets them before it imports torch; a command for which they are others starts afresh.
_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
_PADDING = 1 << 14  # the longest command line that a fork can have
_PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>
_STDIO = (0, 1, 2)
_execute_child = subprocess.Popen._execute_child  # type: ignore[attr-defined]


# ---- the caller ------------------------------------------------------------------------------------------------------


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A process, forked where that makes no difference."""

    def __init__(self, *typed: Any, fresh: bool = False, **named: Any) -> None:
        self._fresh = fresh
        super().__init__(*typed, **named)

    def _execute_child(self, *typed: Any) -> None:  # type: ignore[override]
        how = inspect.signature(_execute_child).bind(self, *typed).arguments
        with _lock:
            pid = None if self._fresh or not _possible(how) else _fork(how)
        if pid is None:
            _execute_child(self, *typed)
            return
        self.pid, self._child_created = pid, True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            *(how[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )


def run(command: list[Any], *, timeout: float | None = None, check: bool = False, **more: Any) -> Any:
    """`subprocess.run`."""
    if more.pop("capture_output", False):
        more["stdout"] = more["stderr"] = subprocess.PIPE
    with Popen(command, **more) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start_method() -> str:
    """That of `multiprocessing`: its own fork server, with torch imported in it; `spawn` where all is to be fresh."""
    if sys.platform != "linux" or os.environ.get(FRESH):
        return "spawn"
    multiprocessing.set_forkserver_preload(["numpy", "torch", "torch.distributed"])
    return "forkserver"


@dataclass(frozen=True)
class _Server:
    """The other end, what its environment was when it started, and the modules that it has imported."""

    channel: socket.socket
    base: dict[str, str]
    modules: frozenset[str]


_lock = threading.Lock()
_server: _Server | None = None


def _server_of_tests() -> _Server:
    """The server of this process of pytest, started when it is first wanted."""
    global _server
    if _server is None:
        ours, theirs = socket.socketpair()
        base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if "SIM_GPUS" not in base:  # simulated GPUs are installed from there
            base.pop("PYTHONPATH", None)
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), "." * _PADDING],
            env={**base, **_WAITING},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,  # pipes, which cannot seek: what Python has found out of them stays true in a fork
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        said = _receive(ours)
        if said is None:
            raise RuntimeError(f"the fork server did not start\n{process.communicate()[1].decode()}")
        _server = _Server(ours, base, frozenset(said["modules"]))
    return _server


def _possible(how: Mapping[str, Any]) -> bool:
    """Whether a fork would be the same as a process of its own."""
    if sys.platform != "linux" or os.environ.get(FRESH) or not isinstance(how["args"], (list, tuple)):
        return False
    usual = {"executable": None, "preexec_fn": None, "pass_fds": (), "shell": False, "gid": None, "uid": None}
    usual |= {"umask": -1, "process_group": -1, "restore_signals": True, "close_fds": True}
    if any(how[name] != value for name, value in usual.items() if name in how):
        return False
    command = [os.fsdecode(word) for word in how["args"]]
    if command[0] != sys.executable or _program(command) is None:
        return False
    if len("\0".join(command).encode()) >= _PADDING or any(_is_terminal(file) for file in _stdio(how)):
        return False
    server = _server_of_tests()
    env, base = {**_WAITING, **_environment(how)}, {**server.base, **_WAITING}
    if any(_READ_AT_START.match(name) for name in set(env) | set(base) if env.get(name) != base.get(name)):
        return False
    return not any(_shadows(folder, server.modules) for folder in _searched(command, how["cwd"], env))


def _program(command: list[str]) -> tuple[str, str, list[str]] | None:
    """What Python is to run: its kind, its name, and its arguments."""
    rest = command[1:]
    if rest[:1] == ["-u"]:
        rest = rest[1:]
    if len(rest) > 1 and rest[0] in ("-m", "-c"):
        return rest[0], rest[1], rest[2:]
    if rest and not rest[0].startswith("-"):
        return "script", rest[0], rest[1:]
    return None


def _environment(how: Mapping[str, Any]) -> dict[str, str]:
    env = os.environ if how["env"] is None else how["env"]
    return {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}


def _stdio(how: Mapping[str, Any]) -> list[int]:
    files = (how["p2cread"], how["c2pwrite"], how["errwrite"])
    return [number if file == -1 else file for number, file in zip(_STDIO, files, strict=True)]


def _is_terminal(file: int) -> bool:
    try:
        return os.isatty(file)
    except OSError:
        return True  # closed: what that means for a program is for a real start to show


def _searched(command: list[str], cwd: Any, env: dict[str, str]) -> list[Path]:
    """The folders in which the program's imports are looked for first."""
    folder = Path(os.getcwd(), os.fsdecode(cwd or "."))
    kind, name, _ = _program(command) or ("", "", [])
    first = (folder / name).resolve().parent if kind == "script" else folder
    return [first, *(folder / more for more in env.get("PYTHONPATH", "").split(os.pathsep) if more)]


def _shadows(folder: Path, modules: frozenset[str]) -> bool:
    """Whether a module of this folder would be imported in place of one that the server has; or it is not there."""
    try:
        names = [name for name in os.listdir(folder) if name.partition(".")[0] in modules]
        if folder.samefile(ROOT):
            names = [name for name in names if name.partition(".")[0] not in _OWN]
    except OSError:
        return True
    return any("." in name or (folder / name / "__init__.py").exists() for name in names)


def _fork(how: Mapping[str, Any]) -> int | None:
    """A fork of the server that is a child of this process: its parent ends, and orphans come to us for the moment."""
    server = _server_of_tests()
    command = [os.fsdecode(word) for word in how["args"]]
    kind, name, typed = _program(command) or ("", "", [])
    ignored = [int(number) for number in signal.valid_signals() if _ignores(number)]
    asked = {
        "command": command,
        "program": [kind, name, typed],
        "cwd": str(Path(os.getcwd(), os.fsdecode(how["cwd"] or "."))),
        "env": _environment(how),
        "session": bool(how["start_new_session"]),
        "ignored": ignored,
        "umask": _umask(),
    }
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        _send(server.channel, asked, _stdio(how))
        said = _receive(server.channel)
    except OSError:
        said = None
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)
    return None if said is None else int(said["pid"])  # None: the server was killed


def _ignores(number: int) -> bool:
    restored = (signal.SIGPIPE, signal.SIGXFSZ)  # by subprocess
    return number not in restored and signal.getsignal(number) == signal.SIG_IGN


def _umask() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("Umask:")[2].split()[0], 8)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        raise OSError("prctl failed")


# ---- between the two -------------------------------------------------------------------------------------------------


def _send(channel: socket.socket, message: dict[str, Any], files: list[int]) -> None:
    data = json.dumps(message).encode("ascii")
    size = len(data).to_bytes(8, "big")
    if files:
        socket.send_fds(channel, [size], files)
    else:
        channel.sendall(size)
    channel.sendall(data)


def _receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next message, its files under "files"; None when the other end has gone."""
    head, files, _, _ = socket.recv_fds(channel, 8, 3)
    if len(head) < 8:
        return None
    size, data = int.from_bytes(head, "big"), b""
    while len(data) < size:
        more = channel.recv(size - len(data))
        if not more:
            return None
        data += more
    return {**json.loads(data), "files": files}


# ---- the server ------------------------------------------------------------------------------------------------------


def _main() -> None:
    """The server; returns in every fork of it, which then is the program."""
    global _server
    channel = socket.socket(fileno=int(sys.argv[1]))
    sys.path.pop(0)  # this folder
    for name in _IMPORTED:
        importlib.import_module(name)
    sys.path.insert(0, str(ROOT))
    commands = importlib.import_module("unbroken.commands")
    for name in ("train_gpt2_mod", *map(commands.module_of, commands.COMMAND_NAMES)):
        importlib.import_module(name)
    sys.path.remove(str(ROOT))
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads in the server: a fork has only one of them"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for pytest, at whose end this ends
    modules = {name.partition(".")[0] for name in sys.modules} - {"__main__"}
    base = {name: value for name, value in os.environ.items() if name not in _WAITING}
    _server = _Server(channel, base, frozenset(modules))
    _send(channel, {"modules": sorted(modules)}, [])
    for registered in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        registered.atexit = False  # torch's operators: taking them apart in each fork copies memory as well
    gc.collect()
    gc.freeze()  # what is not looked at is not copied
    _become(_serve(channel))


def _serve(channel: socket.socket) -> dict[str, Any]:
    """Fork for ever; return what is asked for in the forks alone."""
    while True:
        asked = _receive(channel)
        if asked is None:
            os._exit(0)
        pid_read, pid_written = os.pipe()
        wait, go = os.pipe()  # the program does not begin before its parent is the caller
        asked["mask"] = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            os.close(go)
            if asked["session"]:
                os.setsid()
            os.write(pid_written, os.getpid().to_bytes(8, "big"))
            os.read(wait, 1)
            return asked
        os.waitpid(between, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, asked["mask"])
        _send(channel, {"pid": int.from_bytes(os.read(pid_read, 8), "big")}, [])
        for file in (pid_read, pid_written, wait, go, *asked["files"]):
            os.close(file)


def _become(asked: dict[str, Any]) -> None:
    """Make this fork the program, and run it."""
    kind, name, typed = asked["program"]
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        if number in asked["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) in (signal.SIG_IGN, None):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.umask(asked["umask"])
    os.chdir(asked["cwd"])
    for number, file in zip(_STDIO, asked["files"], strict=True):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.orig_argv[:] = asked["command"]
    _set_command_line(asked["command"])
    if _starts_python(name, typed):
        worker = _serve_children(asked["mask"])
        if worker is not None:
            return _become(worker)
    sys.path[:0] = [entry for entry in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if entry]
    _forget()
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["mask"])
    _execute(kind, name, typed)


def _starts_python(name: str, typed: list[str]) -> bool:
    """Whether the program starts Python itself: torchrun, some tools, the benchmark, a training with an uploader."""
    if name == "unbroken":
        return typed[:1] in (["audit"], ["demo"], ["doctor"], ["launch"])
    return name == "torch.distributed.run" or name.endswith("benchmarks/gpu.py") or "--mirror" in typed


def _forget() -> None:
    """Forget what modules have read or drawn in the process that they were imported in."""
    import multiprocessing.process
    import tempfile

    import numpy as np
    import torch

    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    np.random.seed()
    torch.default_generator.seed()  # or what the program forgets to seed would be the same in all


def _set_command_line(command: list[str]) -> None:
    """Over the server's own, which is long enough; the rest stays NULs."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[45]), int(stat[46])  # arg_start and arg_end of proc(5), whose third field is the first here
    text = b"".join(os.fsencode(word) + b"\0" for word in command)
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _serve_children(mask: Any) -> dict[str, Any] | None:
    """Give this process a server of its own, made now: later it has threads.

    Returns, in the forks of that server, what they are to be.
    """
    global _server
    assert _server is not None
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in _STDIO:  # or the pipes of the caller would stay open
            os.dup2(nowhere, number)
        os.close(nowhere)
        _set_command_line([sys.executable, __file__])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return _serve(theirs)
    theirs.close()
    _server = _Server(ours, _server.base, _server.modules)
    handler = importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler")
    handler.Popen = Popen  # type: ignore[attr-defined]
    subprocess.Popen = Popen  # type: ignore[misc]
    return None


def _execute(kind: str, name: str, typed: list[str]) -> None:
    """As Python itself runs a script, a module or a text."""
    main = types.ModuleType("__main__")
    space: dict[str, Any] = main.__dict__
    space.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    try:
        if kind == "-m":
            sys.path.insert(0, os.getcwd())
            if not hasattr(sys.modules.get(name), "__path__"):
                sys.modules.pop(name, None)
            sys.argv[:] = ["-m", *typed]
            _, spec, code = runpy._get_module_details(name)  # type: ignore[attr-defined]
            sys.argv[0] = spec.origin
            space.update(__file__=spec.origin, __spec__=spec, __loader__=spec.loader, __package__=spec.parent)
            space["__cached__"] = spec.cached
        elif kind == "-c":
            sys.path.insert(0, "")
            sys.argv[:] = ["-c", *typed]
            code = compile(name, "<string>", "exec")
        else:
            sys.path.insert(0, str(Path(name).resolve().parent))
            sys.argv[:] = [name, *typed]
            path = os.path.join(os.getcwd(), name)
            space.update(__file__=path, __loader__=SourceFileLoader("__main__", path), __cached__=None)
            code = compile(Path(path).read_bytes(), path, "exec")
        exec(code, space)
        _end(0)
    except SystemExit as error:
        _end(0 if error.code is None else error.code)
        raise
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.excepthook = lambda *_: None
        raise


def _end(code: object) -> None:
    """End the process as Python does, but without taking the modules apart, which would copy the server's memory.

    That is a fifth of a second. Returns where Python has something to say: a code that is no number, a stream that
    cannot be flushed.
    """
    if not isinstance(code, int):
        return
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except (OSError, ValueError):
        return
    os._exit(code & 0xFF)


if __name__ == "__main__":
    _main()
