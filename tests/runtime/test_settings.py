"""What `auto` means on a card, by its compute capability."""

from __future__ import annotations

import pytest
import torch

from unbroken.config import merge
from unbroken.distributed.world import Launch, World
from unbroken.runtime.settings import ResolvedSettings, _best_dtype, apply_settings


@pytest.mark.parametrize(
    ("card", "capability", "expected"),
    [
        ("P100", (6, 0), "fp32"),
        ("V100", (7, 0), "fp32"),
        ("T4", (7, 5), "fp32"),
        ("A100", (8, 0), "bf16"),
        ("RTX 3090", (8, 6), "bf16"),
        ("L4", (8, 9), "bf16"),
        ("H100", (9, 0), "bf16"),
        ("B200", (10, 0), "bf16"),
    ],
)
def test_bf16_is_for_cards_that_have_it(
    monkeypatch: pytest.MonkeyPatch, card: str, capability: tuple[int, int], expected: str
) -> None:
    """torch itself decides by the capability; emulation, which a T4 also counts as support, is left out."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"major": capability[0], "minor": capability[1], "name": card})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert _best_dtype(torch.device("cuda")) == expected
    assert torch.cuda.is_bf16_supported(), "with emulation every card has it"


def test_a_line_says_that_processes_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set_num_threads", "set_float32_matmul_precision"):
        monkeypatch.setattr(torch, name, lambda value: None)
    world, settings = World(Launch(), torch.device("meta")), ResolvedSettings("fp32", False, 1)
    said = []
    for shared in (True, False):
        monkeypatch.setattr(World, "via_host_memory", shared)
        said.append(
            [line for line in apply_settings(merge({"deterministic": "off"}), settings, world) if "GPU" in line]
        )
    assert said == [
        ["processes share a GPU: gradients go through host memory, exact but slow; one for each GPU is faster"],
        [],
    ]
