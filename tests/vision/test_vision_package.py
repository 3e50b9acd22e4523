"""What it takes to import, what it says where something lacks, and how cost grows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agentsd.vision import AgentAttention

WITHOUT_TIMM = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "timm" else find(name, *rest)
import agentsd.vision as vision
vision.AgentAttention(24, 3, (4, 4)), vision.agent_attention
assert not any(name.split(".")[0] in ("timm", "torchvision", "segmentation_models_pytorch") for name in sys.modules)
try:
    vision.AgentPVT
except ImportError as error:
    print(error)
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_without_timm_there_is_the_module_and_the_command_to_install_it() -> None:
    assert 'pip install "agentsd[vision]"' in python(WITHOUT_TIMM)


def test_the_package_does_not_import_vision() -> None:
    assert (
        python("import sys, agentsd; print('agentsd.vision' in sys.modules, 'timm' in sys.modules)") == "False False\n"
    )


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
