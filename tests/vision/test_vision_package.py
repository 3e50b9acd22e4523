"""What it takes to import, what it says where something lacks, and how cost grows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agentsd.vision import AgentAttention

TORCH_ALONE = """
import sys
sys.modules.update(dict.fromkeys(["diffusers", "transformers", "accelerate", "timm", "torchvision"]))  # not to be had
import agentsd.vision as vision
vision.AgentAttention(24, 3, (4, 4)), vision.agent_attention
try:
    vision.AgentPVT
except ImportError as error:
    print(error)
"""
WHATEVER_IS_PUBLIC = """
import sys, agentsd
assert not {"diffusers", "timm", "agentsd.vision"} & set(sys.modules)
assert set(agentsd.__all__) <= set(dir(agentsd))
for name in agentsd.__all__:
    value = getattr(agentsd, name)
    assert value is vars(agentsd)[name] is getattr(sys.modules[f"agentsd.{agentsd._HOMES[name]}"], name)
assert not {"timm", "agentsd.vision"} & set(sys.modules)
try:
    agentsd.apply_match
except AttributeError as error:
    print(error)
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_module_needs_torch_alone_and_a_model_names_the_command_to_install_it() -> None:
    assert python(TORCH_ALONE) == 'agentsd.vision.AgentPVT needs timm: pip install "agentsd[vision]"\n'


def test_public_names_are_imported_when_they_are_asked_for() -> None:
    assert python(WHATEVER_IS_PUBLIC) == "module 'agentsd' has no attribute 'apply_match'\n"


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple) else (out,)
        self.elements = max([self.elements, *(x.numel() for x in tensors if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("side", [64, 128, 256])
def test_cost_is_linear_in_the_tokens(side: int) -> None:
    """Operations and the largest tensor, up to 65,536 tokens: in proportion to those of 1,024."""
    costs = []
    for length in (32, side):
        with torch.device("meta"):
            module = AgentAttention(48, 3, (length, length), 49)
            x = torch.empty(1, length * length, 48)
            with FlopCounterMode(display=False) as operations, Largest() as largest:
                module(x)
        costs.append((operations.get_total_flops(), largest.elements))
    for small, large in zip(*costs, strict=True):
        assert large == pytest.approx(small * (side / 32) ** 2, rel=0.02)
