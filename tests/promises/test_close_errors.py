"""A close(2) that reports an error, as NFS, quotas and FUSE do: nothing that is on disk may be called unsaved."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, RUN_ID, SHORT, arguments, environment, last_step, launch, run_folder
from unbroken.checkpoint import directory

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
int close(int file) {
  static int (*real)(int);
  if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "close");
  char link[64], path[PATH_MAX];
  const char *folder = getenv("BAD_CLOSE");
  struct stat found;
  int flags = fcntl(file, F_GETFL), bad = 0;
  if (folder && flags >= 0 && !fstat(file, &found) && (S_ISDIR(found.st_mode) || (flags & O_ACCMODE) != O_RDONLY)) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    bad = size > 0 && !strncmp(path, folder, strlen(folder));
  }
  int done = real(file);
  if (bad) { errno = EDQUOT; return -1; }
  return done;
}
"""


@pytest.fixture
def bad_close(tmp_path_factory: pytest.TempPathFactory, place: Path) -> dict[str, str]:
    """The environment of a process in which close(2) reports EDQUOT for what it has written below `place`."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C compiler here")
    folder = tmp_path_factory.mktemp("close")
    (folder / "close.c").write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "close.so", "close.c", "-ldl"], cwd=folder, check=True)
    return {"LD_PRELOAD": str(folder / "close.so"), "BAD_CLOSE": str(place.resolve())}


def test_an_error_of_close_ends_no_training(place: Path, bad_close: dict[str, str]) -> None:
    """Lock, log, journal, config, checkpoints, their folder, TensorBoard's file."""
    typed = arguments({**SHORT, "log_tensorboard": True})
    done = launch(place, typed, processes=None, env=bad_close, fresh=True).wait()
    assert (done.code, done.err) == (0, "") and "WARNING" not in done.out, done.text
    assert directory.finished_step(directory.list_checkpoints(run_folder(place))) == 3 and last_step(place) == 3
    typed = ["--resume_from", RUN_ID, "--num_iterations", "4"]
    done = launch(place, typed, processes=None, env=bad_close, fresh=True).wait()
    assert (done.code, done.err) == (0, "") and "WARNING" not in done.out and last_step(place) == 4, done.text


def test_an_error_of_close_damages_no_shard(place: Path, bad_close: dict[str, str]) -> None:
    (place / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 50)
    command = [sys.executable, "-m", "unbroken", "data", "text", "a.txt", "--folder", "mine", "--tokenizer", "bytes"]
    env = environment({**bad_close, "PYTHONPATH": str(ROOT)})
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(list(place.glob("mine/*.bin"))) == 2, done.stdout + done.stderr
