"""PixArt-alpha and -Sigma (Chen et al. 2023 and 2024, arXiv 2310.00426 and 2403.04692)."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed

from agentsd.hosts.base import Site
from agentsd.hosts.transformer import Transformer


class PixArt(Transformer):
    """Self-attention and cross-attention, in blocks like a UNet's."""

    blocks = (BasicTransformerBlock,)
    text_tokens = 300

    def knows(self, net: Any) -> bool:
        """Video transformers have blocks of time besides."""
        is_video = hasattr(net, "temporal_transformer_blocks")
        return super().knows(net) and isinstance(getattr(net, "pos_embed", None), PatchEmbed) and not is_video

    def site(self, name: str, block: Any, level: int) -> Site:
        return Site(name, level, "no self-attention" if block.only_cross_attention else "")
