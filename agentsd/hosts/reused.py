"""Transformers whose attention is left as it is, and whose features are reused: Qwen-Image, Flux.2, Chroma, Sana."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from agentsd.hosts.base import Inputs, Site
from agentsd.hosts.transformer import Transformer, blocks_of


class Reused(Transformer):
    """What they have in common.

    Attributes:
        kinds: the names of their blocks' classes, of which older versions of diffusers have not all.
    """

    kinds: tuple[str, ...] = ()

    def knows(self, net: Any) -> bool:
        blocks = [type(block).__name__ for _, block in blocks_of(net)]
        return bool(blocks) and all(name in self.kinds for name in blocks)

    def site(self, name: str, block: Any, level: int) -> Site:
        return Site(name, level, f"the attention of a {type(block).__name__} is left as it is", layers=("attn",))


class Packed(Reused):
    """Latents come as tokens, (B, N, C): where these are in the image, attention alone would ask."""

    def told(self, net: Any, named: Mapping[str, Any]) -> Inputs | None:
        """Loops are told apart by the positions of their tokens, or their text: tensors made once for an image."""
        x, text = named["hidden_states"], named.get("encoder_hidden_states")
        writes = named.get("controlnet_single_block_samples") is not None  # into the outputs of Chroma's blocks
        loop, size = named.get("img_ids", text), (1, x.shape[1])
        return Inputs(x, named["timestep"], text, writes, packed=size, divisor=1000.0, loop=loop)

    def patch_size(self, net: Any) -> int:
        return 1

    def sample_size(self, net: nn.Module) -> tuple[int, int]:
        """As many tokens as 1024 x 1024 pixels have."""
        return 64, 64


class QwenImage(Packed):
    """Qwen-Image and its editors (Qwen Team 2025, arXiv 2508.02324): guidance in two calls."""

    kinds = ("QwenImageTransformerBlock",)
    text_tokens = 256


class Flux2(Packed):
    """FLUX.2 dev and klein (Black Forest Labs 2025)."""

    kinds = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    text_tokens = 512


class Chroma(Packed):
    """Chroma (Lodestone Rock 2025), made of Flux: guidance in two calls, and a mask over the text."""

    kinds = ("ChromaTransformerBlock", "ChromaSingleTransformerBlock")
    text_tokens = 512


class Sana(Reused):
    """Sana (Xie et al. 2024, arXiv 2410.10629): linear attention, and latents of a deeper autoencoder."""

    kinds = ("SanaTransformerBlock",)
    text_tokens = 300

    def told(self, net: Any, named: Mapping[str, Any]) -> Inputs | None:
        x, text = named["hidden_states"], named.get("encoder_hidden_states")
        return Inputs(x, named["timestep"], text, divisor=1 / net.config.timestep_scale, loop=text)
