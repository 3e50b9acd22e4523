"""The questions that a patch asks an architecture, and the words in which it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A transformer block, by name.

    Attributes:
        name: of the block in its denoiser.
        level: how many downsamplings lie between the latents and the block; its resolution is 1 / 2 ** level.
        skip: why the block cannot be patched; empty where it can.
        layers: its self-attention, by name in the block.
        joint: whether its self-attention is over the text, too.
    """

    name: str
    level: int
    skip: str = ""
    layers: tuple[str, ...] = ("attn1",)
    joint: bool = False

    @property
    def downsample(self) -> int:
        return int(2**self.level)


@dataclass(frozen=True)
class Middle:
    """The part of a denoiser that a cached call skips, as names of modules in the order of a call.

    Attributes:
        unread: modules whose outputs nothing reads in a cached call.
        last: the module whose output stands for all of them: these are the deep features.
        reader: the module after the middle, where its first argument is the input of the middle and what that adds to
            it. The deep features are then this difference, and nothing reads the output of ``last`` either: so they
            hold what ControlNets add in between, and it does not matter which modules a call leaves out.
        lines: whether features follow a line in time, as measured; elsewhere ``cache_order`` 1 has them follow their
            input, of which ``reader`` tells.
    """

    unread: tuple[str, ...]
    last: str
    reader: str = ""
    lines: bool = True

    def holds(self, name: str) -> bool:
        """Whether the module called ``name`` is in it."""
        return any(name == part or name.startswith(f"{part}.") for part in (*self.unread, self.last))


@dataclass(frozen=True)
class Inputs:
    """What a denoiser call says of itself.

    Attributes:
        sample: the latents, (B, C, H, W), unless they are ``packed``.
        timestep: as it was given.
        text: what the call is conditioned on; calls of one step are told apart by it.
        writes: whether the call may write into outputs of the middle, so that these need memory of their own.
        packed: height and width of latents that come packed as tokens, (B, N, C).
        skipped: the blocks that the call leaves out: by these, too, calls of one step are told apart.
        divisor: by which the loop has divided the schedule's timestep, after casting it to the type it was given in.
        loop: a tensor that a pipeline makes once an image, for all of its calls: loops are told apart by it.
    """

    sample: Tensor
    timestep: Tensor | float
    text: Tensor | None = None
    writes: bool = False
    packed: tuple[int, int] | None = None
    skipped: tuple[int, ...] = ()
    divisor: float = 1.0
    loop: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        if self.packed is not None:
            return self.packed
        height, width = self.sample.shape[-2:]
        return height, width


class Host(Protocol):
    """What is known of one architecture. Hosts have no state: a denoiser is an argument of every question."""

    def knows(self, net: Any) -> bool:
        """Whether ``net`` is of this architecture, as its blocks tell."""

    def inputs(self, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        """What a call with these arguments says; None where some are missing, which the denoiser itself reports."""

    def sites(self, net: nn.Module) -> list[Site]:
        """Every transformer block, in the order of its modules; empty where there is none that is known."""

    def grids(self, net: nn.Module, height: int, width: int) -> list[tuple[int, int]]:
        """The token grid of each level for latents of ``height`` x ``width``: ``grids(...)[site.level]``."""

    def sample_size(self, net: nn.Module) -> tuple[int, int]:
        """Height and width of the latents that the denoiser was made for."""

    def middle(self, net: nn.Module, branch: int) -> Middle:
        """What a cached call skips, where ``branch`` more layers run at its beginning than at least.

        Raises:
            ValueError: features of this denoiser cannot be reused, or not with this ``branch``.
        """

    def outer_share(self, net: nn.Module, middle: Middle, height: int, width: int) -> float:
        """Multiply-adds outside of ``middle``, as a share of all, without the attention products."""
