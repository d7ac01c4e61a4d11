"""docs/recipes: every file parses, every flag in it exists, and the shell ones are run."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import harness
from tests.harness import ROOT, RUN_ID, TINY, assert_same_bits, environment, train, write_corpus
from unbroken.config import parse

RECIPES = ROOT / "docs/recipes"
SETTINGS = {"num_iterations": 30, "save_every": 1}
FLAGS = [f"--{name}={value}" for name, value in {**TINY, **SETTINGS}.items()] + ["--input_bin=data/train_*.bin"]


def commands(path: Path) -> list[list[str]]:
    """The words behind train_gpt2_mod.py in each command of a recipe."""
    text = re.sub(r"^\s*#.*$", "", path.read_text("utf-8"), flags=re.M).replace("\\\n", " ")
    if path.name == "kubernetes.yaml":
        job = yaml.safe_load(text)
        return [job["spec"]["template"]["spec"]["containers"][0]["command"][5:]]
    if path.name == "Dockerfile":
        (line,) = re.findall(r"^CMD (.*)$", text, re.M)
        return [json.loads(line)[4:]]
    if path.name == "colab.ipynb":
        cells = json.loads(path.read_text("utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells).replace("\\\n", " ")
    found = re.findall(r'(?:train_gpt2_mod\.py|"\$TRAIN"|spot\.sh) +(--[^\n&|]*)', text)
    return [[word for word in shlex.split(words) if word not in ("$@", "")] for words in found]


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_every_flag_exists(path: Path) -> None:
    found = commands(path)
    assert found, "no command was found"
    for words in found:
        parse([word.replace("$RUN", RUN_ID) for word in words])
    text = path.read_text("utf-8")
    assert re.search(r'resume_from(=|"?,? "?)auto', text) or "spot.sh" in text


def test_they_parse() -> None:
    for name in ("spot.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", RECIPES / name], check=True)
    job = yaml.safe_load((RECIPES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert job["kind"] == "Job" and pod["restartPolicy"] == "Never", "podFailurePolicy needs Never"
    assert pod["terminationGracePeriodSeconds"] >= 100 and "--grace_seconds=100" in pod["containers"][0]["command"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }
    sky = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert sky["resources"]["use_spot"] and "--mirror s3://" in sky["run"], "the disk goes with the machine"
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(RECIPES / "unbroken.service")
    assert unit["Service"]["ExecStart"].split()[0].endswith("docs/recipes/spot.sh")
    assert int(unit["Service"]["TimeoutStopSec"]) >= 30


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not tool:
        pytest.skip("there is no shellcheck here")
    done = subprocess.run([tool, RECIPES / "spot.sh", RECIPES / "slurm.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_has_what_the_program_needs() -> None:
    text = (RECIPES / "Dockerfile").read_text()
    copied = {word for words in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in words.split()}
    assert all((ROOT / name).exists() for name in copied)
    assert {"requirements.lock", "train_gpt2_mod.py", "unbroken"} <= copied


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze here")
    unit = (RECIPES / "unbroken.service").read_text().replace("/home/trainer/unbroken", str(ROOT))
    (tmp_path / "unbroken.service").write_text(unit.replace("User=trainer", "User=root"))
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "unbroken.service"], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), done


def test_kubernetes_and_skypilot_say_what_they_mean() -> None:
    """The fields that decide whether a run goes on: a typing error in one of them is silently nothing."""
    job = yaml.safe_load((RECIPES / "kubernetes.yaml").read_text())
    assert job["apiVersion"] == "batch/v1" and set(job["spec"]) == {"backoffLimit", "podFailurePolicy", "template"}
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["torchrun", "--standalone"], "a shell would swallow the SIGTERM"
    assert container["workingDir"] in {mount["mountPath"] for mount in container["volumeMounts"]}
    sky = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert set(sky) == {"name", "resources", "workdir", "setup", "run"}
    for script in (sky["setup"], sky["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)


def test_colab_goes_on_in_a_new_runtime(tmp_path: Path) -> None:
    """Its cells as they are, in a folder for /content; git, pip and the loss of the machine are played."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(RECIPES / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = {cell["id"]: cell["source"] for cell in notebook["cells"]}
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    played = {"git": 'mkdir "$4" && cp -r ../data "$4" 2>/dev/null; exit 0', "pip": "exit 0"}
    env = with_torchrun(tmp_path, PACE="0.1", **played)
    content = tmp_path / "content"
    (content / "drive/MyDrive").mkdir(parents=True)
    write_corpus(tmp_path)
    install = cells["install"].removeprefix("%%bash\n").replace("/content", str(content))
    train = cells["train"].split("\n!", 1)[1].replace("train_gpt2_mod.py", str(harness.PACED))
    train += " " + " ".join([*FLAGS, "--warmdown_iters=0", "--save_every=1"])
    for runtime in (1, 2):
        shutil.rmtree(content / "unbroken", ignore_errors=True)
        subprocess.run(["bash", "-c", install], cwd=tmp_path, env=env, check=True)
        running = subprocess.Popen(["bash", "-c", f"exec {train}"], cwd=content / "unbroken", env=env)
        if runtime == 1:
            reach(content / "unbroken", 8)
            running.kill()
        code = running.wait(120)
    assert code == 0 and (content / "drive/MyDrive/unbroken/logs" / RUN_ID / "final.pt").exists()
    log = (content / "drive/MyDrive/unbroken/logs" / RUN_ID / f"{RUN_ID}.log").read_text()
    assert log.count("# time=") == 2 and "from=scratch" not in log.split("# time=")[2]


def with_torchrun(folder: Path, **more: str) -> dict[str, str]:
    """An environment whose PATH has this Python's torchrun, an srun, and a scontrol that notes what it is asked.

    Of `more`, a name in capitals is a variable, any other a tool's script.
    """
    tools = folder / "bin"
    tools.mkdir()
    for name, text in {
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "srun": 'exec "$@"',
        "scontrol": 'echo "scontrol $*" >> asked',
        "python": f'exec {sys.executable} "$@"',
        **{name: text for name, text in more.items() if name.islower()},
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    return environment(
        {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "RUN": RUN_ID,
            **{name: text for name, text in more.items() if name.isupper()},
        }
    )


PLAIN = f'shift 2; exec {sys.executable} "$@"'  # a torchrun that hands the exit code of its worker on


def start(folder: Path, script: str, env: dict[str, str], steps: str = "30") -> subprocess.Popen[str]:
    command = ["bash", str(folder / script), *FLAGS, f"--num_iterations={steps}"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def reach(folder: Path, step: int) -> None:
    end = time.monotonic() + 120
    while harness.last_step(folder) < step:
        assert time.monotonic() < end, "the training does not get there"
        time.sleep(0.05)


def test_spot_goes_on_after_kills_of_its_workers_and_of_itself(tmp_path: Path) -> None:
    straight, spot = tmp_path / "straight", tmp_path / "spot"
    for folder in (straight, spot):
        folder.mkdir()
        write_corpus(folder)
    train(straight, {**SETTINGS, "run_id": RUN_ID})
    shutil.copy(RECIPES / "spot.sh", spot)
    env = with_torchrun(spot, TRAIN=str(harness.PACED), PACE="0.1", PAUSE="0.1")
    running = start(spot, "spot.sh", env)
    reach(spot, 5)
    for torchrun in harness.children(running.pid):  # its workers notice
        os.kill(torchrun, signal.SIGKILL)
    reach(spot, 12)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    running = start(spot, "spot.sh", env)
    reach(spot, 18)
    running.send_signal(signal.SIGTERM)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 143, text
    running = start(spot, "spot.sh", env)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 0, text
    assert_same_bits(straight / f"logs/{RUN_ID}/final.pt", spot / f"logs/{RUN_ID}/final.pt")


def test_spot_ends_where_there_is_nothing_left_to_train(tmp_path: Path) -> None:
    """Fewer iterations than the checkpoint has: it was tried 50 times."""
    write_corpus(tmp_path)
    train(tmp_path, {"run_id": RUN_ID, "num_iterations": 6}, processes=None)
    (tmp_path / f"logs/{RUN_ID}/final.pt").unlink()
    shutil.copy(RECIPES / "spot.sh", tmp_path)
    running = start(tmp_path, "spot.sh", with_torchrun(tmp_path, TRAIN=str(harness.SCRIPT), PAUSE="0.1"), "4")
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 0 and text.count("resuming run") == 1, text
    assert (tmp_path / f"logs/{RUN_ID}/final.pt").exists()


def test_spot_goes_on_while_an_old_end_is_there(tmp_path: Path) -> None:
    """A run that is being extended has its old final.pt: a worker that a signal stops has not finished it."""
    write_corpus(tmp_path)
    train(tmp_path, {"run_id": RUN_ID, "num_iterations": 6}, processes=None)
    shutil.copy(RECIPES / "spot.sh", tmp_path)
    env = with_torchrun(tmp_path, TRAIN=str(harness.PACED), PACE="0.1", PAUSE="0.1", torchrun=PLAIN)
    running = start(tmp_path, "spot.sh", env, "20")
    reach(tmp_path, 9)
    for worker in harness.children(running.pid):
        os.kill(worker, signal.SIGTERM)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 0 and "stopped by SIGTERM" in text and harness.last_step(tmp_path) == 20, text


@pytest.mark.parametrize("flags", ["good", "bad"])
def test_slurm_goes_back_into_the_queue_only_for_a_run_that_is_under_way(tmp_path: Path, flags: str) -> None:
    write_corpus(tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    (tmp_path / "run_id").write_text(RUN_ID)
    text = (RECIPES / "slurm.sbatch").read_text().replace("--nproc_per_node=8", "--nproc_per_node=1")
    (tmp_path / "job").write_text(
        text.replace("train_gpt2_mod.py", str(harness.PACED)).replace("--save_every auto", "")
    )
    env = with_torchrun(tmp_path, SLURM_JOB_ID="42", SLURM_CPUS_PER_TASK="2", PACE="0.1")
    if flags == "bad":
        done = subprocess.run(["bash", "job", "--modle=d2"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode != 0 and not (tmp_path / "asked").exists(), "a mistake would be tried for ever"
        return
    running = start(tmp_path, "job", env)
    reach(tmp_path, 5)
    for torchrun in harness.children(running.pid):
        os.kill(torchrun, signal.SIGTERM)
    running.communicate(timeout=120)
    assert (tmp_path / "asked").read_text() == "scontrol requeue 42\n"
    (tmp_path / "asked").unlink()
    done = subprocess.run(["bash", "job", "--modle=d2"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path / "asked").exists(), "nor where there are checkpoints from before"
    text = (running := start(tmp_path, "job", env)).communicate(timeout=120)[0]
    assert running.returncode == 0 and not (tmp_path / "asked").exists(), text
    assert (tmp_path / f"logs/{RUN_ID}/final.pt").exists()
