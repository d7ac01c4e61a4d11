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
        words = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"][0]["command"]
        return [[re.sub(r"\$\((\w+)\)", r"$\1", word) for word in words[7:]]]
    if path.name == "Dockerfile":
        text = filled(docker_command())
    if path.name == "colab.ipynb":
        cells = json.loads(path.read_text("utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells).replace("\\\n", " ")
    found = re.findall(r'(?:train_gpt2_mod\.py|"\$TRAIN"|spot\.sh) +(--[^\n&|]*)', text)
    return [[word for word in shlex.split(words) if word not in ("$@", "")] for words in found]


def docker_command() -> str:
    """What the image's shell runs."""
    (line,) = re.findall(r"^CMD (.*)$", (RECIPES / "Dockerfile").read_text("utf-8"), re.M)
    shell, flag, text = json.loads(line)
    assert (shell, flag) == ("sh", "-c") and text.startswith("exec "), "the shell would swallow the SIGTERM"
    return str(text)


VALUES = {
    "MODEL": "tiny",
    "DATA": "data/train_*.bin",
    "ITERATIONS": "30",
    "RUN": RUN_ID,
    "MIRROR": "s3://b/runs",
    "PROCESSES": "1",
}


def filled(word: str) -> str:
    """A word with its variables replaced."""
    return re.sub(r"\$\{?(\w+)(?::[?-][^}]*)?\}?", lambda found: VALUES[found[1]], word)


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_every_flag_exists(path: Path) -> None:
    found = commands(path)
    assert found, "no command was found"
    for words in found:
        parse([filled(word) for word in words])
    text = path.read_text("utf-8")
    assert re.search(r'resume_from(=|"?,? "?)auto', text) or "spot.sh" in text
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-4", text), "whoever copies it would share the run"


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_each_trains_what_its_user_says(path: Path) -> None:
    """Model, data and iterations: the default is the built-in corpus, which nobody wants a GPU for."""
    text = path.read_text("utf-8")
    for name in ("MODEL", "ITERATIONS", "SHARDS" if path.name in ("colab.ipynb", "skypilot.yaml") else "DATA"):
        assert name in text, name
    if path.name != "unbroken.service":  # which has spot.sh do it
        words = " ".join(word for each in commands(path) for word in each)
        assert {"--model", "--input_bin", "--num_iterations"} <= set(re.findall(r"--\w+", words))


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
    mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    script = next(word for word in pod["containers"][0]["command"] if word.endswith("train_gpt2_mod.py"))
    assert not any(Path(script).is_relative_to(mount) for mount in mounts), "a volume would hide the code"
    sky = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert sky["resources"]["use_spot"] and '--mirror "$MIRROR"' in sky["run"], "the disk goes with the machine"
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(RECIPES / "unbroken.service")
    assert unit["Service"]["ExecStart"].split()[0].endswith("docs/recipes/spot.sh")
    assert int(unit["Service"]["TimeoutStopSec"]) >= 30
    assert unit["Service"]["RestartPreventExitStatus"] == "2", "a mistake would be tried for ever"
    assert unit["Service"]["EnvironmentFile"].startswith("/"), "with - a missing file would be no error"


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not tool:
        pytest.skip("there is no shellcheck here")
    done = subprocess.run([tool, RECIPES / "spot.sh", RECIPES / "slurm.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_trains(tmp_path: Path) -> None:
    """Its COPY lines in a folder for /opt/unbroken, its command elsewhere; packages and user are this machine's."""
    text = (RECIPES / "Dockerfile").read_text().replace("\\\n", " ")
    assert text.index("RUN pip install") < text.index("COPY unbroken"), "each change would install all packages again"
    assert text.index("RUN pip install") < text.index("USER trainer") < text.index("CMD")
    (path,) = re.findall(r"^ENV PYTHONPATH=(.*)$", text, re.M)
    (work,) = re.findall(r"^WORKDIR (.*)$", text, re.M)
    assert not Path(path).is_relative_to(work), "the volume would hide the code"
    image, volume = tmp_path / "image", tmp_path / "volume"
    image.mkdir()
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", text, re.M):
        placed = image / os.path.relpath(target + (source if target.endswith("/") else ""), path)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, placed)
    volume.mkdir()
    write_corpus(volume)
    command = docker_command().replace(path, str(image))
    env = with_launcher(tmp_path, PYTHONPATH=str(image), **{**VALUES, "ITERATIONS": "2"})
    more = ["--batch_size=1", "--sequence_length=16", "--threads=1"]
    done = subprocess.run(
        ["sh", "-c", f"{command} {' '.join(more)}"], cwd=volume, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and list(volume.glob("logs/*/final.pt")), done.stdout + done.stderr
    del env["MODEL"]
    done = subprocess.run(["sh", "-c", command], cwd=volume, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "MODEL: is not set" in done.stderr, done.stderr


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
    mistake, eviction = job["spec"]["podFailurePolicy"]["rules"]
    assert mistake == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    assert eviction == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:4] == ["python", "-m", "unbroken", "launch"], "a shell would swallow the SIGTERM"
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert "--uid 1000 " in (RECIPES / "Dockerfile").read_text()
    assert container["workingDir"] in {mount["mountPath"] for mount in container["volumeMounts"]}
    sky = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert set(sky) == {"name", "resources", "workdir", "envs", "setup", "run"}
    assert set(sky["envs"].values()) == {None}, "what has a value need not be given"
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
    hold = harness.Hold(tmp_path, 8)
    env = with_launcher(tmp_path, HOLD=str(hold.path), **played, **VALUES)
    assert "set MODEL, SHARDS and ITERATIONS" in cells["what"]
    content = tmp_path / "content"
    (content / "drive/MyDrive").mkdir(parents=True)
    write_corpus(tmp_path)
    install = cells["install"].removeprefix("%%bash\n").replace("/content", str(content))
    train = cells["train"].split("\n!", 1)[1].replace("train_gpt2_mod.py", str(harness.PACED))
    train += " " + " ".join([*FLAGS, "--input_val_bin=data/val_*.bin", "--warmdown_iters=0", "--save_every=1"])
    for runtime in (1, 2):
        shutil.rmtree(content / "unbroken", ignore_errors=True)
        subprocess.run(["bash", "-c", install], cwd=tmp_path, env=env, check=True)
        running = subprocess.Popen(["bash", "-c", f"exec {train}"], cwd=content / "unbroken", env=env)
        if runtime == 1:
            reach(content / "unbroken", 8)
            running.kill()
            hold.at(1000)
        code = running.wait(120)
    (final,) = content.glob("drive/MyDrive/unbroken/logs/*/final.pt")
    log = next(final.parent.glob("*.log")).read_text()
    assert code == 0
    assert log.count("# time=") == 2 and "from=scratch" not in log.split("# time=")[2]


def with_launcher(folder: Path, **more: str) -> dict[str, str]:
    """An environment with this Python and these sources, an srun, and a scontrol that notes what it is asked.

    Of `more`, a name in capitals is a variable, any other a tool's script.
    """
    tools = folder / "bin"
    tools.mkdir()
    for name, text in {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": '[ "$1" = show ] && echo localhost || echo "scontrol $*" >> asked',
        "python": f'exec {sys.executable} "$@"',
        **{name: text for name, text in more.items() if name.islower()},
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    return environment(
        {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            **{name: text for name, text in more.items() if name.isupper()},
        }
    )


def start(folder: Path, script: str, env: dict[str, str], *more: str, steps: int = 30) -> subprocess.Popen[str]:
    flags = [flag for flag in FLAGS if not flag.startswith(("--model", "--input_bin", "--num_iterations"))]
    return subprocess.Popen(
        ["bash", str(folder / script), *flags, *more],
        cwd=folder,
        env={**env, **VALUES, "RUN": env.get("RUN", ""), "ITERATIONS": str(steps)},
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


def final_of(folder: Path) -> Path:
    """The end of the only run."""
    (final,) = folder.glob("logs/*/final.pt")
    return final


def test_spot_goes_on_after_kills_of_its_workers_and_of_itself(tmp_path: Path) -> None:
    straight, spot = tmp_path / "straight", tmp_path / "spot"
    for folder in (straight, spot):
        folder.mkdir()
        write_corpus(folder)
    train(straight, {**SETTINGS, "run_id": RUN_ID})
    shutil.copy(RECIPES / "spot.sh", spot)
    hold = harness.Hold(spot, 6)
    env = with_launcher(spot, TRAIN=str(harness.PACED), HOLD=str(hold.path), PACE="0.1", PAUSE="0.1")
    running = start(spot, "spot.sh", env)
    reach(spot, 5)
    for launcher in harness.children(running.pid):  # its workers notice
        os.kill(launcher, signal.SIGKILL)
    hold.at(13)
    reach(spot, 12)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    hold.at(19)
    running = start(spot, "spot.sh", env)
    reach(spot, 18)
    running.send_signal(signal.SIGTERM)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 143 and "Traceback" not in text, text
    hold.at(30)
    running = start(spot, "spot.sh", env)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 0, text
    assert_same_bits(straight / f"logs/{RUN_ID}/final.pt", final_of(spot))


def test_spot_ends_where_there_is_nothing_left_to_train(tmp_path: Path) -> None:
    """Fewer iterations than the checkpoint has: it was tried 50 times."""
    write_corpus(tmp_path)
    train(tmp_path, {"num_iterations": 6, "save_every": 1, "input_val_bin": None}, processes=None)
    final_of(tmp_path).unlink()
    shutil.copy(RECIPES / "spot.sh", tmp_path)
    running = start(tmp_path, "spot.sh", with_launcher(tmp_path, TRAIN=str(harness.SCRIPT), PAUSE="0.1"), steps=4)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 0 and text.splitlines()[-1].startswith("finished at step 6: logs/"), text
    assert final_of(tmp_path).exists()


def test_spot_goes_on_while_an_old_end_is_there(tmp_path: Path) -> None:
    """A run that is being extended has its old final.pt: a worker that a signal stops has not finished it."""
    write_corpus(tmp_path)
    train(tmp_path, {"num_iterations": 6, "save_every": 1, "input_val_bin": None}, processes=None)
    shutil.copy(RECIPES / "spot.sh", tmp_path)
    hold = harness.Hold(tmp_path, 9)
    env = with_launcher(tmp_path, TRAIN=str(harness.PACED), HOLD=str(hold.path), PAUSE="0.1")
    running = start(tmp_path, "spot.sh", env, steps=20)
    reach(tmp_path, 9)
    for launcher in harness.children(running.pid):
        for worker in harness.children(launcher):
            os.kill(worker, signal.SIGTERM)
    hold.at(20)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 0 and "stopped by SIGTERM" in text and harness.last_step(tmp_path) == 20, text


@pytest.mark.parametrize("missing", ["", "MODEL"])
def test_spot_tries_a_mistake_once(tmp_path: Path, missing: str) -> None:
    shutil.copy(RECIPES / "spot.sh", tmp_path)
    env = {**with_launcher(tmp_path, TRAIN=str(harness.SCRIPT)), **VALUES}
    env.pop(missing, None)
    done = subprocess.run(["bash", "spot.sh", "--modle=d2"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (f"error: {missing} is not set" if missing else "did you mean --model?") in done.stderr


def slurm_job(folder: Path) -> None:
    """The recipe, with the paced training."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text("")
    text = (RECIPES / "slurm.sbatch").read_text()
    (folder / "job").write_text(text.replace("train_gpt2_mod.py --run_id", f"{harness.PACED} --run_id"))


IN_SLURM = {"SLURM_CPUS_PER_TASK": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "PROCESSES": "1"}


@pytest.mark.parametrize("flags", ["good", "bad"])
def test_slurm_goes_back_into_the_queue_only_for_a_run_that_is_under_way(tmp_path: Path, flags: str) -> None:
    write_corpus(tmp_path)
    slurm_job(tmp_path)
    hold = harness.Hold(tmp_path, 6)
    env = with_launcher(tmp_path, SLURM_JOB_ID=str(harness.free_port()), HOLD=str(hold.path), **IN_SLURM)
    if flags == "bad":
        text = (running := start(tmp_path, "job", env, "--modle=d2")).communicate(timeout=120)[0]
        assert running.returncode == 2 and not (tmp_path / "asked").exists(), text
        return
    running = start(tmp_path, "job", env)
    reach(tmp_path, 5)
    for pid in (*harness.children(running.pid), running.pid):  # a preemption sends it to the batch shell too
        os.kill(pid, signal.SIGTERM)
    text = running.communicate(timeout=120)[0]
    assert (tmp_path / "asked").read_text() == f"scontrol requeue {env['SLURM_JOB_ID']}\n", text
    assert "Traceback" not in text
    (tmp_path / "asked").unlink()
    hold.at(30)
    text = (running := start(tmp_path, "job", env, "--modle=d2")).communicate(timeout=120)[0]
    assert running.returncode == 2 and not (tmp_path / "asked").exists(), "nor where there are checkpoints from before"
    text = (running := start(tmp_path, "job", env)).communicate(timeout=120)[0]
    assert running.returncode == 0 and not (tmp_path / "asked").exists(), text
    final = final_of(tmp_path)  # one run: the job's id survives the queue
    running = start(tmp_path, "job", {**env, "SLURM_JOB_ID": str(harness.free_port())}, steps=2)
    text = running.communicate(timeout=120)[0]
    assert running.returncode == 0 and len(list(tmp_path.glob("logs/*/final.pt"))) == 2, "another job, another run"
    assert final.exists()


def test_slurm_trains_on_several_nodes(tmp_path: Path) -> None:
    """Two launchers on this machine, as srun starts one a node: one run on two processes."""
    write_corpus(tmp_path)
    slurm_job(tmp_path)
    nodes = 'while [ "${1#-}" != "$1" ]; do shift; done; "$@" & "$@"; code=$?; wait $! && exit $code'
    more = {**IN_SLURM, "SLURM_NNODES": "2", "SLURM_JOB_ID": str(harness.free_port())}
    env = with_launcher(tmp_path, PACE="0", srun=nodes, **more)
    text = (running := start(tmp_path, "job", env, steps=4)).communicate(timeout=180)[0]
    assert running.returncode == 0 and final_of(tmp_path).exists(), text
    assert "processes: 2," in text, text
