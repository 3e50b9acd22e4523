"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), and their ControlNets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock
from torch import nn

from agentsd.hosts.base import Inputs
from agentsd.hosts.transformer import Transformer


class StableDiffusion3(Transformer):
    """Joint attention over image and text, in this order; positions are added once, before the first block."""

    blocks = (JointTransformerBlock, SD3SingleTransformerBlock)
    text_tokens = 77 + 256

    def told(self, net: Any, named: Mapping[str, Any]) -> Inputs | None:
        """Skip-layer guidance is a call of its own, which leaves blocks out."""
        inputs = super().told(net, named)
        skipped = tuple(named.get("skip_layers") or ())
        return replace(inputs, skipped=skipped) if inputs is not None else None

    def skip(self, block: nn.Module) -> str:
        return "joint attention is left as it is"
