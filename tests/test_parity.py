"""Equality with the official AgentSD code, whose outputs are stored in tests/data."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from safetensors import safe_open

import agentsd
from agentsd.block import PatchedBlock
from agentsd.hosts import Site
from agentsd.matching import partition
from agentsd.planner import BlockPlan, Call, Now
from agentsd.settings import Settings

DATA = Path(__file__).parent / "data"
BLOCKS = json.loads((DATA / "parity.json").read_text())
UNETS = json.loads((DATA / "parity_unet.json").read_text())


def load(file: str, prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and other tensors of one case."""
    with safe_open(DATA / file, "pt") as tensors:
        case = {key.removeprefix(prefix): tensors.get_tensor(key) for key in tensors.keys() if key.startswith(prefix)}
    weights = {key.removeprefix("w/"): case.pop(key) for key in list(case) if key.startswith("w/")}
    return weights, case


def ours(kwargs: dict) -> dict:
    """The reference's arguments for one phase, as settings of a schedule that has only that phase."""
    kwargs = dict(kwargs)
    sx, sy, agent = kwargs.pop("sx"), kwargs.pop("sy"), kwargs["agent_ratio"] > 0.5
    strides = {"agent_sx": sx, "agent_sy": sy} if agent else {"sx": sx, "sy": sy}
    return kwargs | strides | {"agent_steps": float(agent)}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_block(name):
    case = BLOCKS[name]
    weights, tensors = load("parity.safetensors", f"{name}/")
    block = BasicTransformerBlock(
        case["channels"],
        case["heads"],
        case["channels"] // case["heads"],
        cross_attention_dim=case["cross_attention_dim"],
    )
    block.load_state_dict(weights)
    plain = block(tensors["x"], encoder_hidden_states=tensors["context"])
    torch.testing.assert_close(plain, tensors["plain"], atol=1e-5, rtol=0)

    settings = Settings(**ours(case["kwargs"]), min_tokens=0)
    (phase,) = settings.phases
    now = Now()
    PatchedBlock(0, Site("block", 0), settings, now, set()).attach(block)
    generator = torch.Generator().manual_seed(case["seed"]) if case["seed"] is not None else None
    size = case["height"], case["width"]
    now.call = Call(blocks={0: BlockPlan(phase.counts(*size), partition(*size, phase.sy, phase.sx, generator))})
    out = block(tensors["x"], encoder_hidden_states=tensors["context"])
    torch.testing.assert_close(out, tensors["out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("phase", ["agent", "tome"])
@torch.no_grad()
def test_unet(name, phase):
    weights, tensors = load("parity_unet.safetensors", f"{name}/")
    unet = UNet2DConditionModel.from_config(UNETS[name]["config"]).eval()
    unet.load_state_dict(weights)
    inputs = (tensors["sample"], UNETS[name]["timestep"], tensors["context"])
    plain = unet(*inputs).sample
    torch.testing.assert_close(plain, tensors["plain"], atol=1e-5, rtol=0)

    agentsd.apply_patch(unet, **ours(UNETS[name]["outputs"][phase]["kwargs"]))
    torch.testing.assert_close(unet(*inputs).sample, tensors[f"out/{phase}"], atol=1e-5, rtol=0)
    agentsd.remove_patch(unet)
    assert torch.equal(unet(*inputs).sample, plain)
