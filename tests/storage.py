"""Object storage for tests: moto's server, which speaks S3 over HTTP on this machine, and folders."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests import fork_server, harness
from tests.harness import ROOT, RUN_ID, Done, write_corpus
from unbroken.mirror.store import Manifest, RemoteCheckpoint, Storage
from unbroken.mirror.upload import Uploader

BUCKET = "weights"
SECRETS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
OFFLINE = {**SECRETS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}


class S3:
    """moto's server: what is in it is gone when it is killed, like a bucket that somebody else emptied."""

    def __init__(self) -> None:
        self.url = f"s3://{BUCKET}/runs"
        for _ in range(5):  # somebody else may take the port before it does
            self.port = harness.free_port()
            self.env = {**SECRETS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}
            if self.start():
                return
        raise AssertionError("moto did not start")

    def start(self) -> bool:
        command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            if self.process.poll() is not None:
                return False
            try:
                self.fs().mkdir(BUCKET)
                return True
            except Exception:  # of several libraries: not there yet
                time.sleep(0.1)
        return False

    def fs(self) -> object:
        import s3fs

        made = {"client_kwargs": {"endpoint_url": self.env["AWS_ENDPOINT_URL"]}, "key": "test", "secret": "test"}
        retry = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
        return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=retry, **made)

    def counted(self) -> dict[str, RemoteCheckpoint]:
        """The copies of the run that count there, by name."""
        fs: Any = self.fs()
        try:
            content = fs.cat_file(f"{self.url}/{RUN_ID}/manifest.json")
        except FileNotFoundError:
            return {}
        return {copy.name: copy for copy in Manifest.parse(content).checkpoints}

    def content(self, name: str) -> bytes:
        """The bytes of a copy."""
        fs: Any = self.fs()
        return bytes(fs.cat_file(f"{self.url}/{RUN_ID}/{self.counted()[name].object}"))

    def has_objects(self, prefix: str) -> bool:
        """Whether an object of the run begins like this."""
        fs: Any = self.fs()
        return bool(fs.glob(f"{self.url}/{RUN_ID}/{prefix}*"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def tool(folder: Path, *typed: str, env: dict[str, str] | None = None) -> Done:
    command = [sys.executable, "-m", "unbroken", *typed]
    made = harness.environment({"PYTHONPATH": str(ROOT), **(env or {})})
    done = fork_server.run(command, cwd=folder, env=made, capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr, 0.0)


def prepared(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_corpus(folder)
    return folder / "logs" / RUN_ID


def copy_all(uploader: Uploader) -> None:
    """Copy everything that is there now; a failure is raised."""
    ended = threading.Event()
    ended.set()
    uploader.follow(ended, tries=1)


def manifest(store: Path) -> Manifest:
    """What the storage says of the run."""
    return Storage(f"file://{store}").run(RUN_ID).manifest()


def counted(store: Path) -> dict[str, RemoteCheckpoint]:
    """The copies that count there, by the name of the checkpoint."""
    return {copy.name: copy for copy in manifest(store).checkpoints}


def overtaken(store: Path) -> set[str]:
    """The names of the copies that the run went back behind; their objects are still there."""
    copies = manifest(store).overtaken
    assert all((store / RUN_ID / copy.object).stat().st_size == copy.size for copy in copies)
    return {copy.name for copy in copies}


def stored(store: Path, name: str) -> Path:
    """The file in which the storage has a checkpoint."""
    return store / RUN_ID / counted(store)[name].object


def withdraw(store: Path, *names: str) -> None:
    """Make copies not count any more."""
    now = manifest(store)
    Storage(f"file://{store}").run(RUN_ID).publish(now.without([counted(store)[name] for name in names]))
