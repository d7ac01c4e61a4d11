"""The door: help that answers at once, completion in the shells, colour on terminals only."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fork_server
from tests.harness import OTHER_ID, ROOT, RUN_ID, SCRIPT, arguments, environment, write_corpus
from unbroken import __main__ as door
from unbroken import config
from unbroken.commands import COMMAND_NAMES, completion
from unbroken.config import FIELDS

UNBROKEN = [sys.executable, "-m", "unbroken"]
COLOUR = re.compile(r"\x1b\[[\d;]*3\d[\d;]*m")


# ---- help ------------------------------------------------------------------------------------------------------------


def test_the_help_of_training_is_grouped_and_ends_with_examples_that_parse() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not re.search(r"\| +torch$", done.stderr, re.M), (
        "nobody waits for torch to be helped"
    )
    text = done.stdout
    groups = {item.metadata["group"] for item in FIELDS.values()}
    assert all(f"\n{group}:\n" in text for group in groups)
    assert all(len(line) <= 110 for line in text.splitlines())
    assert "--[no-]fork" in text and "(default: d12)" in text
    examples = re.findall(
        r"^  (?:python|torchrun --\S+ --\S+) train_gpt2_mod.py (.*)$", text.split("examples:")[1], re.M
    )
    assert len(examples) == 4
    for example in examples:
        words = config.build_parser().parse_args(shlex.split(example))
        assert vars(words)


def test_the_help_of_the_tools_names_them_all() -> None:
    text = door.usage()
    assert all(re.search(rf"^  {name} +\S", text, re.M) for name in COMMAND_NAMES)
    assert "examples:" in text and all(len(line) <= 110 for line in text.splitlines())


# ---- completion ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "logs" / RUN_ID).mkdir(parents=True)
    (tmp_path / "scratch" / OTHER_ID).mkdir(parents=True)
    (tmp_path / "scratch/by-name").mkdir()
    (tmp_path / "scratch/by-name/mine").symlink_to(f"../{OTHER_ID}")
    for name in (f"logs/{RUN_ID}/final.pt", "with space.pt", "mine.yaml"):
        (tmp_path / name).touch()
    for shell in completion.SHELLS:
        (tmp_path / f"{shell}.completion").write_text(completion.script(shell))
    return tmp_path


CASES = [
    ("python train_gpt2_mod.py --mod", ["--model"]),
    ("python3 train_gpt2_mod.py --model d1", ["d12"]),
    ("python train_gpt2_mod.py --model = d1", ["d12"]),
    ("python train_gpt2_mod.py --device =", ["auto", "cpu", "cuda"]),
    ("torchrun --standalone --nproc_per_node = 2 path/train_gpt2_mod.py --save_every ", ["auto"]),
    ("train_gpt2_mod.py --no-f", ["--no-fork"]),
    ("python train_gpt2_mod.py --resume_from ", ["latest", "best", "auto", RUN_ID, "with space.pt", "logs", "scratch"]),
    (f"python train_gpt2_mod.py --init_from logs/{RUN_ID}/", [f"logs/{RUN_ID}/final.pt"]),
    ("python train_gpt2_mod.py --config m", ["mine.yaml"]),
    ("python train_gpt2_mod.py --seed ", []),
    ("python -m unbroken ver", ["verify"]),
    ("unbroken ver", ["verify"]),
    ("python -m unbroken verify 6", [RUN_ID]),
    ("python -m unbroken diff final.pt lat", ["latest"]),
    ("python -m unbroken ls 6", [RUN_ID]),
    ("python -m unbroken ls --logs_dir scratch ", ["mine", OTHER_ID]),
    ("python -m unbroken plot --logs_dir scratch m", ["mine"]),
    ("train_gpt2_mod.py --logs_dir = scratch --resume_from 0", [OTHER_ID]),
    ("python -m unbroken ls --ch", ["--check"]),
    ("python -m unbroken data ", ["builtin", "text", "fineweb"]),
    ("python -m unbroken data text --tokenizer g", ["gpt2"]),
    ("python -m unbroken plot --show gr", ["grad_norm"]),
    ("python -m unbroken completion ", ["bash", "zsh", "fish"]),
    ("python another.py --mod", []),
]


def test_bash_completes(place: Path) -> None:
    ask = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _unbroken_line; printf "%s|" "${COMPREPLY[@]}"; echo'
    lines = [line + "''" if line.endswith(" ") else line for line, _ in CASES]
    asked = "".join(f"COMP_WORDS=({line}); {ask}\n" for line in lines)
    done = subprocess.run(
        ["bash", "--norc", "-c", f"source bash.completion\n{asked}complete -p torchrun"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [line for line in done.stderr.splitlines() if "compopt" not in line] == []  # it is no completion here
    *said, registered = done.stdout.splitlines()
    assert "-F _unbroken_line torchrun" in registered
    for (line, wanted), answer in zip(CASES, said, strict=True):
        assert [word for word in answer.split("|") if word] == wanted, line


def test_bash_leaves_what_completed_python_before(place: Path) -> None:
    """And to read the script twice is no harm."""
    text = (
        "_theirs() { COMPREPLY=(theirs); }; complete -F _theirs python; source bash.completion; source bash.completion;"
    )
    asked = 'COMP_WORDS=(python x); COMP_CWORD=1; _unbroken_line python x python; echo "$COMPREPLY"'
    done = subprocess.run(["bash", "--norc", "-c", text + asked], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.stdout == "theirs\n", done


def test_fish_and_zsh_read_their_scripts(place: Path) -> None:
    shells = [shell for shell in ("fish", "zsh") if shutil.which(shell)]
    if not shells:
        pytest.skip("there is neither fish nor zsh here")
    for shell in shells:
        done = subprocess.run([shell, "-n", f"{shell}.completion"], cwd=place, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not tool:
        pytest.skip("there is no shellcheck here")
    script = Path(completion.__file__).with_suffix(".bash")
    done = subprocess.run([tool, "-s", "bash", "-e", "SC2207", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_script_knows_every_flag_and_command(shell: str) -> None:
    text = completion.script(shell)
    dashes = "-l " if shell == "fish" else "--"
    assert [name for name in FIELDS if f"{dashes}{name}" not in text] == []
    assert [name for name in COMMAND_NAMES if not re.search(rf"\b{name}\b", text)] == []


def test_a_missing_shtab_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert door.main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "error: completion needs shtab: pip install shtab\n"


def test_what_a_flag_takes_is_said_of_flags_that_there_are() -> None:
    assert set(completion.TRAINING) <= set(FIELDS)


# ---- colour ----------------------------------------------------------------------------------------------------------


def on_a_terminal(command: list[str], folder: Path, **env: str) -> str:
    """What a command writes to a terminal."""
    master, slave = pty.openpty()
    changes = {"TERM": "xterm-256color", "COLUMNS": "100", **env}
    kept = {name: value for name, value in environment(changes).items() if name != "NO_COLOR" or "NO_COLOR" in env}
    process = subprocess.Popen(command, cwd=folder, env=kept, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # EIO: the last one has closed the terminal
            break
        if not part:
            break
        said += part
    os.close(master)
    assert process.wait(60) == 0, said
    return said.decode()


def test_nothing_but_lines_where_it_is_piped_and_colour_only_where_it_is_wanted(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    command = [sys.executable, str(SCRIPT), *arguments({"num_iterations": 3, "warmdown_iters": 0, "run_id": RUN_ID})]
    env = environment({"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    done = fork_server.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert not set(done.stdout) & {"\x1b", "\r", "\b"} and "" not in done.stdout.splitlines()
    assert done.stdout.count("| loss ") == 3
    listing = [*UNBROKEN, "ls"]
    path = {"PYTHONPATH": str(ROOT)}
    assert "\x1b[" in on_a_terminal(listing, tmp_path, **path)
    assert "\x1b" not in on_a_terminal(listing, tmp_path, **path, NO_COLOR="1")
    again = [*command, "--resume_from", RUN_ID, "--num_iterations", "6"]
    bar = on_a_terminal(again, tmp_path, NO_COLOR="1")
    assert "| loss " in bar and not COLOUR.search(bar)


@pytest.mark.parametrize("command", [["train_gpt2_mod.py"], ["-m", "unbroken", "ls"]])
def test_windows_is_told_in_one_line(command: list[str]) -> None:
    """Before anything is imported that Windows lacks."""
    lacking = ["fcntl", "resource", "pwd", "grp", "termios"]
    run = (
        f"runpy.run_path({command[0]!r}, run_name='__main__')"
        if len(command) == 1
        else "from unbroken.__main__ import main; sys.exit(main(['ls']))"
    )
    program = f"import sys, runpy; sys.platform = 'win32'; sys.modules.update(dict.fromkeys({lacking})); {run}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Unbroken needs Linux or macOS; on Windows run it in WSL2\n"
