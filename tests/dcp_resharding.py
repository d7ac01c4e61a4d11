"""Under torchrun: torch's own dcp.load of an exported folder into FSDP2, the whole tensors written, and dcp.save again.

dcp_resharding.py MODEL FOLDER WHOLE.pt AGAIN
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from unbroken.checkpoint import CheckpointWriter, ResumableStream, UnsupportedValueError
from unbroken.model import families


def main(name: str, folder: str, whole: str, again: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    model = families.build(name).allocate(torch.device("cpu"))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    # Once as torchtitan does it, once in the nested form that get_state_dict has by default.
    for options in (StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)):
        weights, moments = get_state_dict(model, optimizer, options=options)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state["optimizer"], options=options)
    sharded = [parameter.to_local().shape[0] < parameter.shape[0] for parameter in model.parameters()]
    assert all(sharded), sharded
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    loaded = get_state_dict(model, optimizer, options=full)
    if dist.get_rank() == 0:
        torch.save(loaded, whole)
    dcp.save(state, checkpoint_id=again)
    use_library(model, f"{again}-library")
    dist.destroy_process_group()


def use_library(model: torch.nn.Module, folder: str) -> None:
    """Save from every rank, as DDP does; a sharded model is refused."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with CheckpointWriter(folder) as writer:
        writer.save({"rank": rank, "weight": torch.full((3,), float(rank))}, 1)
        try:
            writer.save({"model": model}, 2)
            assert rank > 0, "a DTensor was saved"
        except UnsupportedValueError as error:
            assert "torch.distributed.checkpoint" in str(error), error
    batch = next(ResumableStream(range(100), 2, shuffle=False))
    assert batch.tolist() == [2 * rank, 2 * rank + 1], batch
    stream = ResumableStream(range(100), 2, shuffle=False)
    stream.load_state_dict({**stream.state_dict(), "position": 2 * ranks})
    assert next(stream).tolist() == [2 * (ranks + rank), 2 * (ranks + rank) + 1]


if __name__ == "__main__":
    main(*sys.argv[1:])
