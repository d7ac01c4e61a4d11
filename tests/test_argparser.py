"""What the command line says about a flag that is misspelt, empty or has a value of the wrong kind."""

from __future__ import annotations

import pytest

from unbroken import config
from unbroken.__main__ import main
from unbroken.commands import data as data_command
from unbroken.commands import parser_of
from unbroken.errors import UserError
from unbroken.paths import as_typed

MODELS = "d2, d4, d6, d8, d12, d24, d36, d48, tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt2-tiny"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "--model=tinny",
            f"--model tinny: it must be one of {MODELS}, or FILE.py:SIZE for a model of your own;",
        ),
        ("--device=gpu", "--device gpu: it must be one of auto, cpu, cuda"),
        ("--save_every=1.5", "--save_every 1.5: it must be a whole number or auto"),
        ("--num_iterations=1e3", "--num_iterations 1e3: it must be a whole number"),
        ("--learning_rate=1e-3x", "--learning_rate 1e-3x: it must be a number"),
        ("--learning_rate=", "--learning_rate is empty; give a value or leave the flag out"),
        ("--model=", "--model is empty; give a value or leave the flag out"),
        ("--num_iterations", "--num_iterations: no value follows it; give one or leave the flag out"),
        ("--fork=true", "--fork is a switch without a value; type the flag alone"),
        ("--log_wandb True", "unknown argument 'True'; --log_wandb is a switch without a value"),
        ("--wandb_log=True", "unknown argument '--wandb_log=True'; did you mean --log_wandb?"),
        ("--lr=1", "unknown argument '--lr=1'; did you mean --learning_rate?"),
    ],
)
def test_a_mistake_in_a_flag_names_the_flag_and_what_it_may_be(typed: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        config.parse(typed.split(" "))
    assert str(refused.value).startswith(said)


@pytest.mark.fast
def test_commands_are_shown_as_an_installed_package_takes_them() -> None:
    shown = as_typed(config.EXAMPLES, installed=True)
    assert "\n  unbroken-train --model d2\n" in shown and "--nproc_per_node=8 -m train_gpt2_mod --model d12" in shown
    assert "train_gpt2_mod.py" not in shown and as_typed(config.EXAMPLES) == config.EXAMPLES


@pytest.mark.fast
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "the following arguments are required: training_script"),
        (["nowhere.py"], "nowhere.py: there is no such file"),
    ],
)
def test_the_launcher_refuses_in_one_line(typed: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *typed]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.mark.fast
def test_a_tool_says_what_is_missing_or_misspelt() -> None:
    for typed, said in {
        (): "{builtin,text,fineweb} is missing; see --help",
        ("textt",): "textt: it must be one of builtin, text, fineweb; did you mean text?",
        (
            "text",
            "a.txt",
            "--tokenizer",
            "no/such",
        ): "--tokenizer no/such: it must be one of bytes, gpt2, or",
    }.items():
        with pytest.raises(UserError) as refused:
            parser_of("data", data_command).parse_args(typed)
        assert str(refused.value).startswith(said)
