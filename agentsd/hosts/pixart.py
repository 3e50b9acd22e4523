"""PixArt-alpha and -Sigma (Chen et al. 2023 and 2024, arXiv 2310.00426 and 2403.04692)."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from agentsd.hosts.transformer import Transformer


class PixArt(Transformer):
    """Self-attention and cross-attention, in blocks like a UNet's."""

    blocks = (BasicTransformerBlock,)
    text_tokens = 300

    def knows(self, net: Any) -> bool:
        """Video transformers have blocks of time besides."""
        is_video = hasattr(net, "temporal_transformer_blocks")
        return super().knows(net) and isinstance(getattr(net, "pos_embed", None), PatchEmbed) and not is_video

    def skip(self, block: nn.Module) -> str:
        return "no self-attention" if getattr(block, "only_cross_attention", False) else ""
