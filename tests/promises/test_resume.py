"""Resuming as the guide promises it: which checkpoint, which arguments, and every line that is said about them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fork_server, harness
from tests.harness import (
    RUN_ID,
    arguments,
    assert_same_bits,
    bits,
    launch,
    log_lines,
    run,
    train,
    write_corpus,
    write_shard,
)
from unbroken.commands import ls
from unbroken.metrics.timeline import read_timeline
from unbroken.runtime import environment

OTHER_ID = "00c1e2f3-0000-4000-8000-000000000001"


def checkpoint(folder: Path, name: str) -> Path:
    return folder / "logs" / RUN_ID / name


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def test_the_six_keys_and_ours(finished: Path) -> None:
    saved = load(checkpoint(finished, "model_step000005.pt"))
    guide = {"model", "optimizer", "step", "code", "args", "run_id"}
    assert set(saved) == guide | {"format", "progress", "data", "rng", "environment", "sources"}
    assert saved["step"] == 5 and saved["run_id"] == RUN_ID
    assert saved["code"] == harness.SCRIPT.read_text() and "model/gpt.py" in saved["sources"]
    assert saved["args"]["grad_accumulation_steps"] == 4
    assert saved["model"]["lm_head.weight"].data_ptr() == saved["model"]["transformer.wte.weight"].data_ptr()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros_like(w)) for w in list(saved["model"].values())[:-1]])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state_dict()["state"][0]["step"] == 5


def test_the_last_periodic_checkpoint_is_the_final_one_too(finished: Path) -> None:
    assert checkpoint(finished, "final.pt").samefile(checkpoint(finished, "model_step000010.pt"))


def test_nothing_to_do(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    left = checkpoint(folder, ".spare.pt.tmp")
    left.touch()  # of an attempt that was killed when `final.pt` had its name
    log = harness.log_path(folder)
    with log.open("ab") as file:
        file.write(bytes(9))
    for typed in (["--resume_from", f"logs/{RUN_ID}/final.pt"], ["--resume_from", "latest"], ["--resume_from", RUN_ID]):
        done = run(folder, *typed)
        assert done.code == 0 and "nothing to do" in done.out, done.text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")} and not left.exists()
    assert b"\0" not in log.read_bytes()


def test_extending_keeps_the_old_end(folder: Path) -> None:
    """Example 2 of the guide; the jump of the learning rate is said with its numbers."""
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/final.pt", "--num_iterations", "14")
    assert done.code == 0, done.text
    assert "WARNING: extending after the warmdown began: the learning rate jumps from 0.00025 at step 10" in done.text
    assert "to 0.001 at step 11" in done.text and "model_step000005.pt is the last checkpoint before" in done.text
    assert load(checkpoint(folder, "final.pt"))["step"] == 14
    assert load(checkpoint(folder, "model_step000010.pt"))["step"] == 10
    ends = [load(checkpoint(folder, name))["progress"]["history"] for name in ("model_step000010.pt", "final.pt")]
    assert ends[0]["training_seconds"] < ends[1]["training_seconds"]
    assert [line.split()[0] for line in log_lines(folder)] == [f"s:{step}" for step in range(1, 15)]


def test_rewarming(folder: Path) -> None:
    done = run(
        folder, "--resume_from", RUN_ID, "--num_iterations", "14", "--on_extend", "rewarm", "--warmup_iters", "2"
    )
    assert done.code == 0, done.text
    assert "WARNING: extending" not in done.text and "goes from 0.00025" in done.text
    assert load(checkpoint(folder, "final.pt"))["progress"]["rewarm"]["steps"] == 2
    rates = dict(read_timeline(harness.log_path(folder)).series("lr"))
    assert [rates[step] for step in (6, 7, 10)] == [0.001, 0.001, 0.00025], "as the updates had them"
    assert [rates[step] for step in (11, 12, 13, 14)] == pytest.approx([0.000625, 0.00075, 0.0005, 0.00025])


def test_mismatches_are_warned_about_and_training_proceeds(folder: Path) -> None:
    done = run(
        folder,
        *("--resume_from", f"logs/{RUN_ID}/model_step000005.pt", "--model", "d4", "--batch_size", "1"),
        *("--grad_accumulation_steps", "8", "--sequence_length", "16"),
        *("--weight_decay", "0.25"),
    )
    assert done.code == 0, done.text
    assert "\n--weight_decay 0.25 from step 6 on; it was 0.1\n" in done.text
    assert "WARNING: model mismatch - checkpoint: tiny, current: d4" in done.text
    assert "going on with model tiny, which the weights belong to" in done.text
    assert "WARNING: batch_size mismatch - checkpoint: 2, current: 1" in done.text
    assert "WARNING: grad_accumulation_steps mismatch - checkpoint: 4, current: 8" in done.text
    assert "sequence_length mismatch" not in done.text
    final = load(checkpoint(folder, "final.pt"))
    assert final["step"] == 10 and final["progress"]["tokens"] == 10 * 2 * 4 * 16


def test_the_journal_counts_the_tokens_that_were_trained_on(folder: Path) -> None:
    """Also those before a --batch_size that was typed anew."""
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000005.pt", "--batch_size", "1")
    assert done.code == 0, done.text
    counted = dict(read_timeline(harness.log_path(folder)).series("tokens"))
    assert [counted[step] for step in (5, 6, 10)] == [5 * 128, 5 * 128 + 64, 5 * 128 + 5 * 64]


def test_halved_batches_take_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    """Half the batch_size with twice the accumulation: token for token what the straight run trains on."""
    traced = harness.ROOT / "tests/traced_training.py"
    said = {}
    for name, changes in (("same", []), ("halved", ["--batch_size", "1", "--grad_accumulation_steps", "8"])):
        shutil.copytree(folder, tmp_path / name, symlinks=True)
        typed = ["--resume_from", f"logs/{RUN_ID}/model_step000005.pt", *changes]
        done = launch(tmp_path / name, typed, processes=None, script=traced).wait()
        assert done.code == 0, done.text
        said[name] = (tmp_path / name / "tokens.0.txt").read_text()
    assert said["same"] == said["halved"] and len(said["same"].splitlines()) == 5 * 8


def test_going_back_keeps_what_is_overtaken(folder: Path) -> None:
    newer = hashlib.sha256(checkpoint(folder, "model_step000010.pt").read_bytes()).hexdigest()
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000005.pt")
    assert done.code == 0, done.text
    assert "going back to step 5: model_step000010.pt, final.pt overtaken, kept in" in done.text
    assert "steps 6-10 repeated: identical" in done.text
    kept = checkpoint(folder, "overtaken-1") / "model_step000010.pt"
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == newer
    assert_same_bits(kept, checkpoint(folder, "model_step000010.pt"))


def test_a_repeat_that_differs_is_named(folder: Path) -> None:
    """The twin: another loss in the log than the one that is computed."""
    log = harness.log_path(folder)
    log.write_text(log.read_text().replace("s:7 trn:", "s:7 trn:1"))
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000005.pt")
    assert done.code == 0 and "step 7 repeated: DIFFERS" in done.text, done.text
    shutil.rmtree(checkpoint(folder, "overtaken-1"))
    log.write_text(log.read_text() + "s:8 trn:1.000000\n")
    for _ in range(2):  # a loop that restarts it must not get past
        done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000005.pt", "--on_divergence", "stop")
        assert done.code == 2 and "step 8" in done.err and "Traceback" not in done.err


def test_fork(folder: Path) -> None:
    """A fork has its own id, folder and log, names its parent, and leaves it untouched."""
    before = sorted((path.name, path.stat().st_mtime_ns) for path in checkpoint(folder, "").glob("*.pt"))
    file = f"logs/{RUN_ID}/model_step000005.pt"
    done = run(folder, "--resume_from", file, "--fork", "--learning_rate", "0.002", "--run_id", OTHER_ID)
    assert done.code == 0 and f"forked from run {RUN_ID} at step 5" in done.text, done.text
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in checkpoint(folder, "").glob("*.pt"))
    saved = load(folder / "logs" / OTHER_ID / "final.pt")
    digest = hashlib.sha256(checkpoint(folder, "model_step000005.pt").read_bytes()).hexdigest()
    assert saved["run_id"] == OTHER_ID and saved["args"]["learning_rate"] == 0.002
    assert saved["progress"]["parent"] == {"run_id": RUN_ID, "step": 5, "file": file, "sha256": digest}
    assert f"{RUN_ID}@5" in (folder / "logs" / OTHER_ID / f"{OTHER_ID}.log").read_text()
    own = load(folder / "logs" / OTHER_ID / "model_step000005.pt")  # at once: nobody need fork again after a kill
    assert own["run_id"] == OTHER_ID and bits(own["model"]) == bits(load(folder / file)["model"])
    assert bits(own["optimizer"]["state"]) == bits(load(folder / file)["optimizer"]["state"])


def test_a_fork_of_the_end(folder: Path) -> None:
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000010.pt", "--fork", "--run_id", OTHER_ID)
    assert done.code == 0 and "WARNING" not in done.text, done.text
    assert_same_bits(folder / "logs" / OTHER_ID / "final.pt", checkpoint(folder, "final.pt"))


def test_a_checkpoint_without_an_optimizer(folder: Path) -> None:
    """The guide's KeyError is one line; and the way out that it names works."""
    saved = load(checkpoint(folder, "final.pt"))
    torch.save({"model": saved["model"], "step": 10, "args": saved["args"]}, folder / "old.pt")
    done = run(folder, "--resume_from", "old.pt")
    assert done.code == 2 and done.err.count("\n") == 1, done.text
    assert "it was made before checkpoints held the optimizer" in done.err and "--init_from old.pt" in done.err
    done = run(folder, *arguments({"init_from": "old.pt", "num_iterations": 1}))
    assert done.code == 0, done.text
    first = float(log_of(folder, exclude=RUN_ID).splitlines()[1].split("trn:")[1])
    assert first < 8.5, "the new run does not begin with the old weights"


def test_one_line_begins_a_run_from_other_weights_and_goes_on_with_it(folder: Path) -> None:
    torch.save({"model": load(checkpoint(folder, "final.pt"))["model"]}, folder / "old.pt")
    auto = ["--init_from", "old.pt", "--resume_from", "auto"]
    refused = run(folder, "--init_from", "old.pt", "--resume_from", RUN_ID)
    assert refused.code == 2 and "type --resume_from auto" in refused.err and refused.err.count("\n") == 1
    for steps, said in ((1, ""), (2, f"resuming run {OTHER_ID} from logs/{OTHER_ID}/final.pt at step 1")):
        done = run(folder, *arguments({"run_id": OTHER_ID, "num_iterations": steps}), *auto)
        assert done.code == 0 and said in done.text, done.text
    made = folder / "logs" / OTHER_ID
    assert "init_from: old.pt\n" in (made / "config.yaml").read_text()
    done = run(folder, "--resume_from", OTHER_ID, "--num_iterations", "3")
    assert done.code == 0 and load(made / "final.pt")["args"]["init_from"] == "old.pt", (
        "where the run came from is lost"
    )


def log_of(folder: Path, exclude: str) -> str:
    return next(path for path in folder.glob("logs/*/*.log") if exclude not in str(path)).read_text()


def test_a_step_of_a_length_that_somebody_made_up_is_not_read(folder: Path) -> None:
    """Its tokens are to be compared with the data: 2^39 of them would be a terabyte."""
    saved = load(checkpoint(folder, "model_step000005.pt"))
    saved["progress"]["next_batch"]["tokens"] = 2**39
    torch.save(saved, folder / "made_up.pt")
    done = run(folder, "--resume_from", "made_up.pt", "--fork")
    assert done.code == 2 and done.err.count("\n") == 1, done.text
    assert "the checkpoint's progress is damaged: next_batch is not as long as a step" in done.err


def test_a_checkpoint_of_the_earlier_program(folder: Path) -> None:
    """Compiled names, DDP's prefix, rotary buffers, bf16, step from 0, divided accumulation, no data position."""
    saved = load(checkpoint(folder, "model_step000005.pt"))
    order = [name for name in saved["model"] if name != "lm_head.weight"]
    weights = {f"_orig_mod.{name}": saved["model"][name].bfloat16() for name in order}
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    weights["_orig_mod.transformer.h.0.attn.rotary.inv_freq"] = torch.ones(32)
    for entry in saved["optimizer"]["state"].values():
        entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg"].bfloat16(), entry["exp_avg_sq"].bfloat16()
    args = {name: saved["args"][name] for name in harness.TINY if name in saved["args"]} | {"num_iterations": 8}
    args |= {"input_bin": "data/train_*.bin", "input_val_bin": "data/val_*.bin", "resume_from": "", "log_wandb": False}
    old = {"model": weights, "optimizer": saved["optimizer"], "step": 4, "code": "", "args": args, "run_id": OTHER_ID}
    (folder / "logs" / OTHER_ID).mkdir()
    torch.save(old, folder / "logs" / OTHER_ID / "model_step000004.pt")
    torch.save(old, folder / "logs" / OTHER_ID / "model_step000005.pt")  # its name for the state after 6 updates
    assert [line.step for line in ls.look(folder / "logs" / OTHER_ID).checkpoints] == [5, 5]  # by the same count
    done = run(folder, "--resume_from", f"logs/{OTHER_ID}/model_step000004.pt")
    assert done.code == 0, done.text
    assert "after 5 updates by its optimizer's own count, on 1 process" in done.text, done.text
    assert "its next batch begins at token 640" in done.text
    assert load(folder / "logs" / OTHER_ID / "model_step000005.pt")["progress"]["tokens"] == 5 * 128
    assert load(folder / "logs" / OTHER_ID / "overtaken-1/model_step000005.pt")["code"] == ""
    after = load(folder / "logs" / OTHER_ID / "final.pt")
    assert after["step"] == 8 and after["progress"]["tokens"] == 8 * 128
    lines = [line for line in log_of(folder, exclude=RUN_ID).splitlines() if line.startswith("s:")]
    straight = next(line for line in log_of(folder, exclude=OTHER_ID).splitlines() if line.startswith("s:6 "))
    assert lines[0].startswith("s:6 trn:")
    assert abs(float(lines[0].split(":")[2]) - float(straight.split(":")[2])) < 0.05  # bf16 weights


def test_changed_data_is_an_error_unless_allowed(folder: Path) -> None:
    write_shard(folder / "data/train_001.bin", harness.learnable(3000, 5))
    typed = ["--resume_from", f"logs/{RUN_ID}/final.pt", "--num_iterations", "12"]
    done = run(folder, *typed)
    assert done.code == 2 and "the training data changed" in done.err and "train_001.bin" in done.err, done.text
    done = run(folder, *typed, "--allow_data_change")
    assert done.code == 0 and "WARNING: the training data changed" in done.text, done.text


def test_a_shard_that_is_added_joins_when_the_epoch_ends(folder: Path) -> None:
    """The steps until then are those of the run without it, and a resumed run knows when it joined."""
    typed = ["--resume_from", f"logs/{RUN_ID}/model_step000005.pt"]
    before = harness.log_lines(folder)
    write_shard(folder / "data/train_000b.bin", harness.learnable(3000, 5))
    done = run(folder, *typed)
    line = "new shards of training data: 'train_000b.bin'; they join at the end of the epoch, at position 6,000"
    assert done.code == 0 and line in done.text and "restore it" not in done.text, done.text
    assert harness.log_lines(folder) == before
    saved = load(folder / f"logs/{RUN_ID}/final.pt")["data"]
    assert [shard.get("from") for shard in saved["shards"]] == [None, 6000, None] and saved["tokens"] == 9000
    done = run(folder, "--resume_from", RUN_ID, "--num_iterations", "11")
    assert done.code == 0 and "new shards" not in done.text, done.text


def test_other_validation_data_are_an_error_unless_allowed(tmp_path: Path) -> None:
    folder = harness.trained(tmp_path, {**harness.SHORT, "val_loss_every": 3})
    write_shard(folder / "data/val_000.bin", harness.learnable(700, 5))
    typed = ["--resume_from", f"logs/{RUN_ID}/final.pt", "--num_iterations", "4"]
    done = run(folder, *typed)
    assert done.code == 2 and "the validation data changed: shard 'val_000.bin' has other" in done.err, done.text
    done = run(folder, *typed, "--allow_data_change")
    assert done.code == 0 and "its losses are not those of before" in done.text, done.text


def test_another_thread_count_is_kept_or_said(folder: Path) -> None:
    typed = ["--resume_from", f"logs/{RUN_ID}/final.pt", "--num_iterations", "11"]
    done = run(folder, *typed, "--threads", "2")
    assert done.code == 0 and "the number of CPU threads changed from 1 to 2: bits may differ" in done.text
    assert load(checkpoint(folder, "final.pt"))["environment"]["threads"] == 2


def test_what_is_not_there_any_more_is_said_so() -> None:
    assert environment.environment_drift({"cuda": "12.8"}, {"cuda": ""}) == [
        "CUDA changed from 12.8 to none: bits may differ from here"
    ]


def test_auto_without_a_checkpoint_begins(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    done = train(tmp_path, {"resume_from": "auto", "num_iterations": 2}, processes=None)
    assert "step:2/2" in done.out and len(list(tmp_path.glob("logs/*/final.pt"))) == 1


def test_falling_back_past_a_damaged_checkpoint(folder: Path) -> None:
    """A flipped bit in a weight: `auto` goes on from the one before, the file by name is an error that names it."""
    path = checkpoint(folder, "model_step000010.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    checkpoint(folder, "final.pt").unlink()
    path.write_bytes(content)
    done = run(folder, "--resume_from", f"logs/{RUN_ID}/model_step000010.pt", "--num_iterations", "12")
    assert done.code == 2 and "damaged" in done.err and "model_step000005.pt" in done.err, done.text
    done = run(folder, "--resume_from", "auto")
    assert done.code == 0 and "passing over" in done.text and "at step 5" in done.text, done.text
    assert load(checkpoint(folder, "final.pt"))["step"] == 10


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """The refusal names host and pid; a dead holder blocks nobody."""
    write_corpus(tmp_path)
    first = launch(tmp_path, arguments({"run_id": RUN_ID, "num_iterations": 100000}), processes=None, hold=6)
    first.until(lambda: (tmp_path / "logs" / RUN_ID / "model_step000005.pt").exists())
    second = run(tmp_path, "--resume_from", RUN_ID)
    assert second.code == 2, second.text
    assert f"is being trained by process {first.process.pid} on {os.uname().nodename}" in second.err
    first.kill(signal.SIGKILL)
    first.wait()
    done = run(tmp_path, "--resume_from", RUN_ID, "--num_iterations", str(harness.last_step(tmp_path) + 2))
    assert done.code == 0, done.text


def test_plain_python_and_torchrun_agree(finished: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    train(tmp_path, {"run_id": RUN_ID, "num_iterations": 10, "warmup_iters": 0, "warmdown_iters": 4})
    assert_same_bits(checkpoint(finished, "final.pt"), checkpoint(tmp_path, "final.pt"))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--resume_from", "nowhere.pt"], "nowhere.pt"),
        (
            ["--init_from", "scratch"],
            "--init_from scratch: there is no such file, folder or run; `python",
        ),
        (["--resume_from", "latest"], "no whole checkpoint under logs/"),
        (["--resume_from", OTHER_ID], f"no whole checkpoint in logs/{OTHER_ID}"),
        (["--resume"], "unknown argument '--resume'; did you mean --resume_from?"),
        (["--batch_size", "0"], "--batch_size 0: it must be at least 1"),
        (["--batch_size", "x"], "--batch_size x: it must be a whole number or auto"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--model", "d13"], "--model"),
        (["--run_id", "../../etc"], "is not a uuid4"),
        (["--fork"], "--fork needs --resume_from"),
        (["--input_bin", "nothing_*.bin"], "nothing_*.bin"),
        (["--input_bin", "data/fineweb10B/fineweb_train_*.bin"], "python -m unbroken data fineweb"),
        (["--elastic_ranks", "3"], "must be a power of two"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, typed: list[str], message: str) -> None:
    """Exit code 2, one line that says what is wrong, no traceback, and nothing left behind."""
    done = run(tmp_path, *typed)
    assert done.code == 2, done.text
    assert message in done.err and done.err.count("\n") == 1 and done.err.startswith("error: "), done.err
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.log"))


def test_show_is_json(finished: Path) -> None:
    import sys

    command = [sys.executable, "-m", "unbroken", "show", str(checkpoint(finished, "final.pt")), "--json"]
    shown = fork_server.run(
        command, cwd=harness.ROOT, env=harness.environment(), capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout)["step"] == 10


def test_the_beginning_of_a_run_id_is_enough(place: Path) -> None:
    train(place, {"run_id": RUN_ID, "num_iterations": 2}, processes=None)
    done = launch(place, ["--resume_from", RUN_ID[:8], "--num_iterations", "3"], None).wait()
    assert done.code == 0 and f"resuming run {RUN_ID} from logs/{RUN_ID}/final.pt at step 2" in done.out, done.text
    wrong = launch(place, ["--resume_from", "0123abcd"], None).wait()
    assert wrong.code == 2 and "no run under logs/ begins with it; `python -m unbroken ls` lists the runs" in wrong.err
