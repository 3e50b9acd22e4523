"""How the official models were filled with weights, and what came out of them."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
SIZES = {"t": "tiny", "s": "small", "m": "medium", "b": "base", "l": "large"}


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((DATA / f"{name}.json").read_text()), load_file(DATA / f"{name}.safetensors")


def state_dicts() -> dict[str, Any]:
    return json.loads((DATA / "state_dicts.json").read_text())


def timm_name(case: str) -> str:
    """ "agent_pvt_t_224" -> "agent_pvt_tiny"; the config file of Agent-PVT-L is named after B."""
    _, family, size = case.split("_")[:3]
    return f"agent_{family}_{'large' if (family, size) == ('pvt', 'b') else SIZES[size]}"


def value(key: str, shape: torch.Size) -> Tensor:
    """The weight of that (official) key."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    kind = key.rpartition(".")[2]
    if kind == "weight":
        return drawn / math.sqrt(drawn.numel() / shape[0]) if len(shape) > 1 else 1 + 0.1 * drawn
    return (0.1 if kind == "bias" else 0.5) * drawn


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """The filled state of a model or of `features_only`, with the official keys."""
    state = {key.removeprefix("model."): x for key, x in model.state_dict().items()}
    return {
        key: value(key, x.shape) if x.is_floating_point() and not key.endswith("attn_mask") else x
        for key, x in state.items()
    }


def filled(model: nn.Module) -> nn.Module:
    model.load_state_dict(official_state(model))
    return model.eval()


def image(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def spread(x: Tensor, count: int) -> Tensor:
    return x.flatten()[torch.arange(count) * x.numel() // count]
