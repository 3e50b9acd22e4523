"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), and their ControlNets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock

from agentsd.hosts.base import Inputs, Site
from agentsd.hosts.transformer import Transformer


class StableDiffusion3(Transformer):
    """Joint attention over image and text, in this order; positions are added once, before the first block."""

    blocks = (JointTransformerBlock, SD3SingleTransformerBlock)
    text_tokens = 77 + 256

    def told(self, net: Any, named: Mapping[str, Any]) -> Inputs | None:
        """Skip-layer guidance is a call of its own, which leaves blocks out.

        A ControlNet without positions of its own is given tokens, (B, N, C): their grid is that of its condition.
        """
        x, text, condition = named["hidden_states"], named.get("encoder_hidden_states"), named.get("controlnet_cond")
        packed, skipped = None, tuple(named.get("skip_layers") or ())
        if x.dim() == 3:
            if condition is None:
                return None
            packed = (condition.shape[-2], condition.shape[-1])
        return Inputs(x, named["timestep"], text, packed=packed, skipped=skipped)

    def site(self, name: str, block: Any, level: int) -> Site:
        """Blocks of 3.5 medium have a second attention, over the image alone."""
        second = ("attn2",) if getattr(block, "attn2", None) is not None else ()
        return Site(name, level, layers=("attn", *second), joint=True)
