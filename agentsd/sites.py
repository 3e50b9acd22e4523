"""The transformer blocks of a diffusers UNet, and the exact token grid each of them sees.

Found by structure, never by the number of tokens: every Stable Diffusion UNet (1.x, 2.x, SDXL, their ControlNets and
AnimateDiff's) has ``down_blocks``, ``mid_block`` and ``up_blocks`` holding `Transformer2DModel`s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn


@dataclass(frozen=True)
class Site:
    """A transformer block, by name.

    Attributes:
        name: of the block in its UNet.
        level: how many downsamplings lie between the latents and the block; its resolution is 1 / 2 ** level.
        skip: why the block cannot be patched; empty where it can.
    """

    name: str
    level: int
    skip: str = ""

    @property
    def downsample(self) -> int:
        return int(2**self.level)


def find_sites(unet: nn.Module) -> list[Site]:
    """Every transformer block of ``unet``, in the order of its modules; empty where it has none that we know."""
    sites = []
    for prefix, level in _levels(unet):
        for name, transformer in unet.get_submodule(prefix).named_modules(prefix=prefix):
            if isinstance(transformer, Transformer2DModel):
                for i, block in enumerate(transformer.transformer_blocks):
                    if isinstance(block, BasicTransformerBlock):
                        skip = "no self-attention" if block.only_cross_attention else ""
                        sites.append(Site(f"{name}.transformer_blocks.{i}", level, skip))
    return sites


def grids(unet: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
    """The token grid of each level for latents of ``height`` x ``width``: `grids(...)[site.level]` is a site's.

    The way up has the grids of the way down: diffusers upsamples to the size of the skip connection.
    """
    sizes = [(height, width)]
    for sampler in _downsamplers(unet):
        height, width = (_downsampled(sampler, size) for size in sizes[-1])
        sizes.append((height, width))
    return sizes


def _levels(unet: nn.Module) -> Iterator[tuple[str, int]]:
    level = 0
    for i, block in enumerate(getattr(unet, "down_blocks", ())):
        yield f"down_blocks.{i}", level
        level += len(_samplers(block, "downsamplers"))
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block", level
    for i, block in enumerate(getattr(unet, "up_blocks", ())):
        yield f"up_blocks.{i}", level
        level -= len(_samplers(block, "upsamplers"))


def _samplers(block: nn.Module, kind: str) -> list[nn.Module]:
    """In a list, which ControlNet-XS has a single one without."""
    samplers = getattr(block, kind, None) or ()
    return [samplers] if isinstance(samplers, nn.Module) and not isinstance(samplers, nn.ModuleList) else [*samplers]


def _downsamplers(unet: nn.Module) -> Iterator[nn.Module]:
    for block in getattr(unet, "down_blocks", ()):
        yield from _samplers(block, "downsamplers")


def _downsampled(sampler: nn.Module, size: int) -> int:
    padded = not (isinstance(sampler, Downsample2D) and (sampler.padding == 0 or not sampler.use_conv))
    return (size + 1) // 2 if padded else size // 2
