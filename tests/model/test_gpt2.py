"""GPT-2 elsewhere and back: transformers computes the same; its folders and nanoGPT's ckpt.pt are taken over."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import RUN_ID, learnable, run, train, write_corpus
from unbroken.errors import UserError
from unbroken.model import families
from unbroken.model.gpt2 import GPT2, GPT2Config
from unbroken.model.gpt2lmhead import GPT2LMHead
from unbroken.run.imported import read_folder

FLAGS = {"input_bin": "data/train_*.bin", "dtype": "fp32", "threads": 1, "batch_size": 2, "sequence_length": 16}
SHORT = {**FLAGS, "model": None, "run_id": RUN_ID, "warmup_iters": 0, "warmdown_iters": 0, "save_every": 0}
TOLERANCE = 1e-5
BATCH = 128  # tokens of a step


def logits(model: Any) -> Tensor:
    """The logits of every position of some tokens."""
    tokens = torch.randint(0, 50257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found: Tensor = model.lm_head(model.hidden(tokens)) if isinstance(model, GPT2) else model(tokens).logits
    return found


def random_model(**flags: Any) -> GPT2:
    """One whose every weight counts, norms and biases included."""
    model = families.build("gpt2-tiny", flags).allocate(torch.device("cpu")).eval()
    assert isinstance(model, GPT2)
    model.initialize(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
    return model


@pytest.mark.parametrize("bias", ["on", "off", "qkv"])
def test_transformers_computes_the_same_and_there_and_back_are_the_same_bits(bias: str) -> None:
    transformers = pytest.importorskip("transformers")
    model, stored = random_model(bias=bias), GPT2LMHead()
    config = stored.config_json(model.config, 64, 50256, "float32")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    missing, unknown = theirs.load_state_dict(stored.export_model(model, torch.float32), strict=False)
    assert (missing, unknown) == (["lm_head.weight"], []) and theirs.config.vocab_size == 50257
    theirs.tie_weights()
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert logits(theirs).std() > 0.1 and (logits(theirs) - logits(model)).abs().max() <= TOLERANCE
    back = stored.import_model(theirs.state_dict(), families.build("gpt2-tiny"))
    again = families.build("gpt2-tiny").allocate(torch.device("cpu")).eval()
    again.load_state_dict(back)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_token_by_token_is_the_same_and_nothing_is_dropped_outside_of_training() -> None:
    model = random_model(dropout=0.5)
    tokens = torch.randint(0, 50257, (1, 12))
    caches = model.new_caches()
    with torch.inference_mode():
        for at in range(12):
            found = model.next_logits(tokens[:, at : at + 1], caches)
        assert (found - model(tokens)).abs().max() <= TOLERANCE
        assert torch.equal(model(tokens), model(tokens))
        assert not torch.equal(model.train()(tokens), model.eval()(tokens))
        with pytest.raises(UserError, match="a sequence of 1025 tokens: this model has 1024 positions"):
            model(torch.zeros(1, 1025, dtype=torch.int64))


def test_it_is_counted_as_openai_and_nanogpt_count() -> None:
    model = families.build("gpt2")
    assert model.num_parameters() == 124_439_808
    assert model.flops_per_token(1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert families.build("gpt2", {"bias": "off"}).num_parameters() == 124_337_664  # nanoGPT: 123.55M without positions
    dropped = families.build("gpt2", {"dropout": 0.1}).activation_bytes(1024)
    assert dropped - model.activation_bytes(1024) == 12 * 12 * 12 * 1024**2
    assert [shape for _, shape in model.hidden_matrices()] == [(768, 768), (768, 768), (3072, 768), (768, 3072)] * 12


def test_a_hugging_face_folder_begins_a_run_whose_export_is_the_trained_model(tmp_path: Path) -> None:
    """In several files, with a head stored twice; the doubtful ones are one line each."""
    transformers = pytest.importorskip("transformers")
    write_corpus(tmp_path)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=128, resid_pdrop=0.3)
    torch.manual_seed(5)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "hub", max_shard_size="20MB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    train(tmp_path, {**SHORT, "init_from": "hub", "num_iterations": 0, "resume_from": "auto"}, None)
    saved = torch.load(tmp_path / f"logs/{RUN_ID}/final.pt", weights_only=True)
    assert (saved["args"]["model"], saved["args"]["bias"], saved["args"]["init_from"]) == ("gpt2-tiny", "on", "hub")
    ours = random_model()
    ours.load_state_dict(saved["model"])
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert (logits(ours) - logits(theirs)).abs().max() <= TOLERANCE
    again = {**SHORT, "run_id": None, "resume_from": RUN_ID, "num_iterations": 3, "learning_rate": 1e-2}
    train(tmp_path, {**again, "dropout": 0.1}, None)

    from unbroken.__main__ import main

    assert main(["export", str(tmp_path / "logs" / RUN_ID), str(tmp_path / "out"), "--tokenizer", "none"]) == 0
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(trained) is transformers.GPT2LMHeadModel
    assert main(["export", str(tmp_path / "logs" / RUN_ID), str(tmp_path / "old.pt"), "--format", "earlier"]) == 2
    import unbroken

    model, info = unbroken.load(tmp_path / "logs" / RUN_ID)
    assert info["step"] == 3 and (logits(model) - logits(theirs)).abs().max() > 0.1
    assert (logits(trained) - logits(model)).abs().max() <= TOLERANCE

    content = json.loads((tmp_path / "hub/config.json").read_text())
    for change, said in (
        ({"activation_function": "relu"}, "activation_function 'relu', a gpt2-tiny has 'gelu_new'"),
        ({"n_layer": 3}, "describes none of the models"),
    ):
        (tmp_path / "hub/config.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=said):
            read_folder(tmp_path / "hub")
    (tmp_path / "hub/config.json").write_text(json.dumps(content))
    (tmp_path / "hub/model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(UserError, match="does not name the files beside it"):
        read_folder(tmp_path / "hub")


def nanogpt_optimizer(model: GPT2) -> torch.optim.AdamW:
    """As nanoGPT makes it."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)


def nanogpt_steps(model: GPT2, optimizer: torch.optim.AdamW, starts: list[int]) -> None:
    """An update with each batch of 4 x 2 x 16 tokens that begins there."""
    for start in starts:
        tokens = torch.from_numpy(learnable(BATCH + 1, start)).long()
        x, y = tokens[:-1].view(8, 16), tokens[1:].view(8, 16)
        optimizer.zero_grad()
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def test_a_run_of_nanogpt_goes_on(tmp_path: Path) -> None:
    """With a padded vocabulary: the next update is that of its own AdamW from its moments, without the padding."""
    write_corpus(tmp_path)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 128, "vocab_size": 50304}
    model = GPT2(GPT2Config(**sizes))
    model.initialize(7)
    optimizer = nanogpt_optimizer(model)
    nanogpt_steps(model, optimizer, [500, 40, 1000])
    config = {"batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
    config |= {"grad_clip": 1.0, "max_iters": 4, "warmup_iters": 0, "block_size": 16, "beta2": 0.95, "compile": True}
    saved: dict[str, Any] = {
        "model": {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "model_args": {**sizes, "block_size": 1024, "bias": True, "dropout": 0.0},
        "iter_num": 3,
        "best_val_loss": torch.tensor(3.25),
        "config": config,
    }
    torch.save(saved, tmp_path / "ckpt.pt")

    cropped = GPT2(GPT2Config(2, 2, 128))
    cropped.load_state_dict({name: w[:50257] if len(w) == 50304 else w for name, w in model.state_dict().items()})
    continued = nanogpt_optimizer(cropped)
    state = optimizer.state_dict()
    for moment in ("exp_avg", "exp_avg_sq"):
        state["state"][0][moment] = state["state"][0][moment][:50257].clone()
    continued.load_state_dict(state)
    nanogpt_steps(cropped, continued, [3 * 8 * 1024 % 6000])

    flags = [f"--{name}={FLAGS[name]}" for name in ("input_bin", "dtype", "threads")]
    done = run(tmp_path, "--resume_from", "ckpt.pt", "--run_id", RUN_ID, "--sequence_length", "16", *flags)
    assert done.code == 0, done.text
    said = "ckpt.pt is a checkpoint of nanoGPT at iteration 3, best validation loss 3.2500: its data order was"
    assert said in done.text and "in the order of the shards, from token 24,576" in done.text, done.text
    after = torch.load(tmp_path / f"logs/{RUN_ID}/final.pt", weights_only=True)
    assert after["step"] == 4 and after["progress"]["history"]["best_val_loss"] == 3.25
    assert after["args"]["bias"] == "on"
    for name, weight in cropped.state_dict().items():
        torch.testing.assert_close(after["model"][name], weight, rtol=1e-4, atol=2e-5)
    moments = continued.state_dict()["state"]
    for index, entry in after["optimizer"]["state"].items():
        torch.testing.assert_close(entry["exp_avg"], moments[index]["exp_avg"], rtol=1e-3, atol=1e-6)
    begun = run(tmp_path, "--init_from", "ckpt.pt", "--num_iterations", "0", "--bias", "on", *flags)
    assert begun.code == 0, begun.text
    saved["model_args"]["n_head"] = 4  # whose weights have the same shapes
    torch.save(saved, tmp_path / "ckpt.pt")
    refused = run(tmp_path, "--resume_from", "ckpt.pt")
    assert refused.code == 2 and "it is a nanoGPT checkpoint of other sizes (n_layer 2, n_head 4," in refused.err
