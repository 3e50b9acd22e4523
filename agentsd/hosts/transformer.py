"""What transformers in place of a UNet have in common: one token grid, and blocks in a row."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from agentsd.hosts.base import Inputs, Middle, Site

ENDS = "norm_out"  # the module after the last block
LISTS = ("transformer_blocks", "single_transformer_blocks")  # in the order of a call


class Transformer:
    """The `agentsd.hosts.base.Host` of them, but for what each says of itself.

    Attributes:
        blocks: the classes of their transformer blocks.
        text_tokens: how many the cost of a call is counted with.
    """

    blocks: tuple[type[nn.Module], ...] = ()
    text_tokens = 0

    def knows(self, net: Any) -> bool:
        blocks = [block for _, block in blocks_of(net)]
        return bool(blocks) and all(isinstance(block, self.blocks) for block in blocks)

    def inputs(self, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        named = dict(zip(_parameters(net.__class__), args, strict=False)) | kwargs
        if named.get("hidden_states") is None or named.get("timestep") is None:
            return None
        return self.told(net, named)

    def told(self, net: Any, named: Mapping[str, Any]) -> Inputs | None:
        """`inputs`, of arguments by their names, with latents (B, C, H, W)."""
        return Inputs(named["hidden_states"], named["timestep"], named.get("encoder_hidden_states"))

    def sites(self, net: nn.Module) -> list[Site]:
        level = self.patch_size(net).bit_length() - 1
        return [self.site(name, block, level) for name, block in blocks_of(net)]

    def site(self, name: str, block: Any, level: int) -> Site:
        """A block of joint attention, unless its host knows better."""
        return Site(name, level, layers=("attn",), joint=True)

    def patch_size(self, net: Any) -> int:
        """Rows and columns of latents in a token: a power of two."""
        return int(getattr(getattr(net, "config", None), "patch_size", None) or 1)

    def grids(self, net: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
        """Of each level down to that of the tokens."""
        return [(height >> level, width >> level) for level in range(self.patch_size(net).bit_length())]

    def sample_size(self, net: nn.Module) -> tuple[int, int]:
        size = int(getattr(getattr(net, "config", None), "sample_size", None) or 128)
        return size, size

    def middle(self, net: Any, branch: int) -> Middle:
        """The first block and ``branch`` more run. All others are skipped, together with what ControlNets add between
        them: what they make of their input is a sum, which the norm after the last block reads. The text ends there.
        A line in time leads such sums astray (benchmarks/NOTES.md).
        """
        names = [name for name, _ in blocks_of(net)]
        if not hasattr(net, ENDS):
            raise ValueError(f"features of a {type(net).__name__} cannot be reused: use cache_interval=1.")
        if branch > len(names) - 2:
            raise ValueError(
                f"cache_branch={branch} is not allowed: expected 0 to {len(names) - 2}, since {type(net).__name__} "
                f"has {len(names)} blocks, and at least one must be skipped."
            )
        return Middle(tuple(names[branch + 1 : -1]), names[-1], reader=ENDS, lines=False)

    def outer_share(self, net: nn.Module, middle: Middle, height: int, width: int) -> float:
        """A weight is multiplied once for each token that it acts on: of the image, of the text, or of both."""
        rows, columns = self.grids(net, height, width)[-1]
        work = {True: 0, False: 0}
        for name, module in net.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() > 1:
                work[middle.holds(name)] += weight.numel() * self.tokens(name, rows * columns)
        return work[False] / max(sum(work.values()), 1)

    def tokens(self, name: str, image: int) -> int:
        """How many tokens the module called ``name`` acts on, where the image has so many."""
        if any(part in name for part in ("norm", "time", "adaln", "mod", "guidance")):  # the same for all tokens
            return 1
        if name.startswith(LISTS[1]):
            return image + self.text_tokens
        of_text = ("context", "txt_", ".add_", "to_add_out", "caption", "attn2.to_k", "attn2.to_v")
        return self.text_tokens if any(part in name for part in of_text) else image


def blocks_of(net: Any) -> list[tuple[str, nn.Module]]:
    """The transformer blocks by name, in the order of a call."""
    lists = ((name, getattr(net, name, None)) for name in LISTS)
    return [(f"{name}.{i}", block) for name, blocks in lists if blocks is not None for i, block in enumerate(blocks)]


@lru_cache(maxsize=16)
def _parameters(cls: type) -> tuple[str, ...]:
    """The names of the arguments of a denoiser's ``forward``."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
