"""`--optimizer muon`: whole matrices on every number of processes, the same bits after kills, one file format."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.harness import RUN_ID, arguments, assert_same_bits, launch, log_lines, train, write_corpus
from unbroken.distributed.flat_params import ShardedParameters
from unbroken.distributed.world import World
from unbroken.model.gpt import GPT
from unbroken.model.language_model import ModelConfig
from unbroken.optim import build_optimizer, param_groups

SETTINGS = {
    "run_id": RUN_ID,
    "optimizer": "muon",
    "grad_accumulation_steps": 4,
    "num_iterations": 16,
    "save_every": 4,
    "grad_clip": 0.5,
    "learning_rate": 1e-2,
}


def test_killed_and_resized(tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 processes with a SIGKILL of everything between, against a run that nobody touched."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
        write_corpus(folder)
    train(straight, SETTINGS)
    typed = arguments({**SETTINGS, "resume_from": "auto"})
    for processes, goal in ((1, 5), (2, 9), (4, 13)):
        launch(broken, typed, processes, pace=0.1, hold=goal).kill_at(goal)
    done = launch(broken, typed, 1).wait()
    assert done.code == 0, done.text
    assert_same_bits(straight / f"logs/{RUN_ID}/final.pt", broken / f"logs/{RUN_ID}/final.pt")
    assert log_lines(broken) == log_lines(straight)
    saved = torch.load(straight / f"logs/{RUN_ID}/final.pt", weights_only=True)["optimizer"]
    kinds = [set(state) for state in saved["state"].values()]
    assert kinds.count({"momentum_buffer"}) == 8 and {"step", "exp_avg", "exp_avg_sq"} in kinds
    assert any(state["momentum_buffer"].abs().max() > 0 for state in saved["state"].values() if len(state) == 1)


def test_another_optimizer_than_the_checkpoint_s_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    train(tmp_path, {"run_id": RUN_ID, "num_iterations": 2})
    refused = launch(tmp_path, ["--resume_from", RUN_ID, "--optimizer", "muon", "--num_iterations", "4"], None).wait()
    assert refused.code == 2
    assert refused.text.strip().splitlines()[-1].startswith("error: --optimizer muon:")
    assert "--init_from" in refused.text and "Traceback" not in refused.text


def test_an_update_is_torch_s_own_on_each_matrix() -> None:
    """Query, key and value are a matrix each; every other hidden matrix is one; the embedding gets AdamW."""
    torch.manual_seed(0)
    model = GPT.build_on_meta(ModelConfig(2, 2, 128, vocab_size=300))
    sharded = ShardedParameters(model, World.single(), param_groups(model, "muon"))
    optimizer = build_optimizer(sharded, learning_rate=0.01, weight_decay=0.1)
    expected = {}
    for name, parameter in model.named_parameters():
        parameter.data.normal_()
        assert parameter.grad is not None
        parameter.grad.normal_()
        parts = parameter.detach().clone().split(128) if "c_attn" in name else (parameter.detach().clone(),)
        slopes = parameter.grad.split(128) if "c_attn" in name else (parameter.grad,)
        own = [torch.nn.Parameter(part) for part in parts]
        for part, slope in zip(own, slopes, strict=True):
            part.grad = slope.clone()
        alone: torch.optim.Optimizer
        if ".h." in name:
            alone = torch.optim.Muon(own, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        else:
            alone = torch.optim.AdamW(own, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
        alone.step()
        expected[name] = torch.cat([part.detach() for part in own])
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
