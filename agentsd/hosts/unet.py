"""Stable Diffusion UNets: 1.x, 2.x, XL, their ControlNets, AnimateDiff's.

Found by structure, never by the number of tokens: all have ``down_blocks``, ``mid_block`` and ``up_blocks`` holding
`Transformer2DModel`s.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from agentsd.hosts.base import Inputs, Middle, Site

PARTS = ("resnets", "attentions", "motion_modules")  # one layer of a block, in the order of a call


class UNet:
    """The `agentsd.hosts.base.Host` of these."""

    def knows(self, net: Any) -> bool:
        return hasattr(net, "down_blocks")

    def inputs(self, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        if named.get("sample") is None or named.get("timestep") is None:
            return None
        adapted = named.get("down_intrablock_additional_residuals") is not None
        # FreeU scales what it finds, in place
        scaled = any(vars(block).get("s1") for block in getattr(net, "up_blocks", ()))
        return Inputs(named["sample"], named["timestep"], named.get("encoder_hidden_states"), adapted or scaled)

    def sites(self, net: nn.Module) -> list[Site]:
        sites = []
        for prefix, level in _levels(net):
            for name, transformer in net.get_submodule(prefix).named_modules(prefix=prefix):
                if isinstance(transformer, Transformer2DModel):
                    for i, block in enumerate(transformer.transformer_blocks):
                        if isinstance(block, BasicTransformerBlock):
                            skip = "no self-attention" if block.only_cross_attention else ""
                            sites.append(Site(f"{name}.transformer_blocks.{i}", level, skip))
        return sites

    def grids(self, net: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
        """The way up has the grids of the way down: diffusers upsamples to the size of the skip connection."""
        sizes = [(height, width)]
        for block in getattr(net, "down_blocks", ()):
            for sampler in _samplers(block, "downsamplers"):
                height, width = (_downsampled(sampler, size) for size in sizes[-1])
                sizes.append((height, width))
        return sizes

    def sample_size(self, net: nn.Module) -> tuple[int, int]:
        size = getattr(getattr(net, "config", None), "sample_size", None) or 64
        return (size, size) if isinstance(size, int) else tuple(size)

    def middle(self, net: Any, branch: int) -> Middle:
        """The first ``branch`` layers of the way down run, and the ``branch + 1`` layers of the way up that take their
        outputs, and the first convolution's, as skip connections. The last module skipped gives these their input.
        """
        blocks = [*getattr(net, "down_blocks", ()), *getattr(net, "up_blocks", ())]
        if not blocks or not all(hasattr(block, "resnets") and _even(block) for block in blocks):
            raise ValueError(f"features of a {type(net).__name__} cannot be reused: use cache_interval=1.")
        ups = sum(len(block.resnets) for block in net.up_blocks)
        if branch > ups - 2:
            raise ValueError(
                f"cache_branch={branch} is not allowed: expected 0 to {ups - 2}, since {type(net).__name__} has {ups} "
                "layers on its way up, and at least one must be skipped."
            )
        names: list[str] = []
        running = branch
        for i, block in enumerate(net.down_blocks):
            layers = [_layer(f"down_blocks.{i}", block, j) for j in range(len(block.resnets))]
            layers += [[f"down_blocks.{i}.downsamplers.{j}"] for j in range(len(block.downsamplers or ()))]
            names += chain(*layers[running:]) if running else [f"down_blocks.{i}"]
            running = max(running - len(layers), 0)
        names += ["mid_block"] if net.mid_block is not None else []
        skipping = ups - branch - 1
        for i, block in enumerate(net.up_blocks):
            layers = [_layer(f"up_blocks.{i}", block, j) for j in range(len(block.resnets))]
            names += chain(*layers[:skipping]) if skipping < len(layers) else [f"up_blocks.{i}"]
            skipping = max(skipping - len(layers), 0)
        return Middle(tuple(names[:-1]), names[-1])

    def outer_share(self, net: nn.Module, middle: Middle, height: int, width: int) -> float:
        """A weight is multiplied once for each position of its level, and one that acts on text or time once or so."""
        grids, levels = self.grids(net, height, width), dict(_levels(net))
        work = {True: 0, False: 0}
        for name, module in net.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() > 1 and not name.endswith(("attn2.to_k", "attn2.to_v")):
                level = next((at for prefix, at in levels.items() if name.startswith(f"{prefix}.")), 0)
                rows, columns = (1, 1) if "time_" in name or "add_" in name else grids[level]
                work[middle.holds(name)] += weight.numel() * rows * columns
        return work[False] / max(sum(work.values()), 1)


def _even(block: Any) -> bool:
    """Whether all layers of a block have as many modules of each part; some UNets have several attentions in each."""
    return not any(len(getattr(block, part, None) or ()) % len(block.resnets) for part in PARTS)


def _layer(prefix: str, block: Any, index: int) -> list[str]:
    counts = {part: len(getattr(block, part, None) or ()) // len(block.resnets) for part in PARTS}
    return [f"{prefix}.{part}.{count * index + i}" for part, count in counts.items() for i in range(count)]


def _levels(net: nn.Module) -> Iterator[tuple[str, int]]:
    level = 0
    for i, block in enumerate(getattr(net, "down_blocks", ())):
        yield f"down_blocks.{i}", level
        level += len(_samplers(block, "downsamplers"))
    if getattr(net, "mid_block", None) is not None:
        yield "mid_block", level
    for i, block in enumerate(getattr(net, "up_blocks", ())):
        yield f"up_blocks.{i}", level
        level -= len(_samplers(block, "upsamplers"))


def _samplers(block: nn.Module, kind: str) -> list[nn.Module]:
    """In a list, which ControlNet-XS has a single one without."""
    samplers = getattr(block, kind, None) or ()
    return [samplers] if isinstance(samplers, nn.Module) and not isinstance(samplers, nn.ModuleList) else [*samplers]


def _downsampled(sampler: nn.Module, size: int) -> int:
    """Half of ``size``, rounded up by a padded convolution and down by others. A resnet that halves pools."""
    if isinstance(sampler, Downsample2D):
        rounds_up = sampler.use_conv and sampler.padding > 0
    else:
        rounds_up = not hasattr(sampler, "time_emb_proj")
    return (size + 1) // 2 if rounds_up else size // 2
