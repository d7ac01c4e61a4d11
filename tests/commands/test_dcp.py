"""A checkpoint goes to torch.distributed.checkpoint and FSDP2, and comes back, with the same bits."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import unbroken.checkpoint as ub
from tests.harness import ROOT, assert_same_bits, bits, launch, run_folder, train, write_corpus
from unbroken.__main__ import main
from unbroken.checkpoint.dcp_reader import DcpFolder
from unbroken.errors import UserError


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 4 steps, its export of step 2, and that folder as 2 and 4 processes wrote it."""
    folder = tmp_path_factory.mktemp("dcp")
    write_corpus(folder)
    train(folder, {"num_iterations": 4, "save_every": 2}, processes=None)
    source = run_folder(folder) / "model_step000002.pt"
    assert main(["export", str(source), str(folder / "dcp"), "--format", "dcp"]) == 0
    for processes in (2, 4):
        typed = ["tiny", "dcp", f"whole{processes}.pt", f"again{processes}"]
        env = {"PYTHONPATH": str(ROOT)}
        done = launch(folder, typed, processes, script=ROOT / "tests/dcp_resharding.py", env=env).wait()
        assert done.code == 0, done.text
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_fsdp_loads_the_bits_and_they_come_back(
    exported: Path, tmp_path: Path, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run_folder(exported) / "model_step000002.pt"
    ours = torch.load(source)
    written = exported / f"again{processes}-library"
    assert ub.load(written / "model_step000001.pt")["rank"] == 0 and len(list(written.glob("*.pt"))) == 1
    weights, optimizer = torch.load(exported / f"whole{processes}.pt")
    assert bits(weights) == bits(ours["model"])
    names = list(dict.fromkeys(name for name in ours["model"] if name != "lm_head.weight"))
    for index, entry in ours["optimizer"]["state"].items():
        assert bits(optimizer["state"][names[index]]) == bits(entry), names[index]
    for theirs, group in zip(optimizer["param_groups"], ours["optimizer"]["param_groups"], strict=True):
        assert {key: theirs[key] for key in ("lr", "eps", "weight_decay")} == {
            key: group[key] for key in ("lr", "eps", "weight_decay")
        }
        assert tuple(theirs["betas"]) == tuple(group["betas"])

    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    folder = run_folder(tmp_path)
    before = folder / "model_step000002.pt"
    for name in ("model_step000004.pt", "final.pt"):
        (folder / name).unlink()
    made = tmp_path / "back/model_step000002.pt"
    made.parent.mkdir()
    assert main(["import", str(tmp_path / f"again{processes}"), str(made), "--like", str(before)]) == 0
    assert "step 2; continue with python train_gpt2_mod.py --resume_from" in capsys.readouterr().out
    assert_same_bits(made, before)
    made.rename(before)
    train(tmp_path, {"num_iterations": 4, "save_every": 2, "resume_from": folder.name}, processes=None)
    assert_same_bits(folder / "final.pt", run_folder(exported) / "final.pt")


def test_more_steps_count_as_having_read_the_data(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = run_folder(exported) / "final.pt"
    assert main(["export", str(final), str(tmp_path / "dcp"), "--format", "dcp"]) == 0
    like, made = run_folder(exported) / "model_step000002.pt", tmp_path / "model_step000004.pt"
    assert main(["import", str(tmp_path / "dcp"), str(made), "--like", str(like)]) == 0
    assert "step 4, +2 from --like" in capsys.readouterr().out
    one, other = torch.load(made), torch.load(final)
    assert (one["step"], one["progress"]["tokens"]) == (4, other["progress"]["tokens"])
    assert bits([one["model"], one["optimizer"]["state"]]) == bits([other["model"], other["optimizer"]["state"]])


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a stranger",)


def test_a_stranger_s_folder_is_refused(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like, folder = run_folder(exported) / "model_step000002.pt", tmp_path / "dcp"
    shutil.copytree(exported / "dcp", folder)
    metadata, data = (folder / ".metadata").read_bytes(), (folder / "__0_0.distcp").read_bytes()
    weight = torch.load(like)["model"]["transformer.wte.weight"].numpy().tobytes()[:64]

    def refused(says: str, metadata: bytes = metadata, data: bytes = data) -> None:
        (folder / ".metadata").write_bytes(metadata)
        (folder / "__0_0.distcp").write_bytes(data)
        assert main(["import", str(folder), str(tmp_path / "made.pt"), "--like", str(like)]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and says in err and err.count("\n") == 1 and not out, err
        assert not (tmp_path / "made.pt").exists()

    refused("refers to builtins.print, which could run code", pickle.dumps(Harmful(), 4))
    refused("not a pickle of protocol 4", pickle.dumps({}, 2))
    refused("of another kind", pickle.dumps({"a": 1}, 4))
    refused("no file of the folder", metadata.replace(b"__0_0.distcp", b"../../a/etcp"))
    refused("__1_0.distcp cannot be read: No such file", metadata.replace(b"__0_0.distcp", b"__1_0.distcp"))
    refused("__0_0.distcp is cut off", data=data[:-100_000])
    refused("it is damaged: a checksum is wrong", data=data.replace(weight, bytes(64)))
    for size in (0, 10, len(metadata) // 2, len(metadata) - 1):
        refused("its ", metadata[:size])
    (folder / ".metadata").write_bytes(metadata)
    (folder / "__0_0.distcp").write_bytes(data)
    assert main(["import", str(folder), str(tmp_path / "made.pt")]) == 2
    assert "type --like RUN" in capsys.readouterr().err
    with pytest.raises(UserError, match="another model made it"):
        found = DcpFolder(folder).find("model.transformer.wte.weight")
        assert found is not None
        DcpFolder(folder).read(found, "model.transformer.wte.weight", (3, 3))


def test_flags_that_have_no_effect_are_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(run_folder(exported) / "final.pt")
    assert main(["export", source, str(tmp_path / "a"), "--format", "dcp", "--dtype", "bf16"]) == 2
    assert main(["import", str(tmp_path), str(tmp_path / "a.pt"), "--like", source]) == 2
    assert [line[:6] for line in capsys.readouterr().err.splitlines()] == ["error:"] * 2
    assert not list(tmp_path.iterdir())
