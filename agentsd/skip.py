"""Which modules of a UNet a cheap call skips, and how a module is skipped without rewriting its callers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

PARTS = ("resnets", "attentions", "motion_modules")  # one layer of a block, in the order of a call


def skipped_modules(unet: Any, branch: int) -> list[str]:
    """The modules that a cheap call skips, in the order of a call.

    The first ``branch`` layers of the way down run, and the ``branch + 1`` layers of the way up that take their
    outputs, and the first convolution's, as skip connections. The last module skipped gives these their input.

    Raises:
        ValueError: the UNet is not made of layers that we know, or has too few of them for ``branch``.
    """
    blocks = [*getattr(unet, "down_blocks", ()), *getattr(unet, "up_blocks", ())]
    if not blocks or not all(hasattr(block, "resnets") for block in blocks):
        raise ValueError(f"features of a {type(unet).__name__} cannot be reused: use cache_interval=1.")
    ups = sum(len(block.resnets) for block in unet.up_blocks)
    if branch > ups - 2:
        raise ValueError(
            f"cache_branch={branch} is not allowed: expected 0 to {ups - 2}, since {type(unet).__name__} has {ups} "
            "layers on its way up, and at least one must be skipped."
        )
    names: list[str] = []
    running = branch
    for i, block in enumerate(unet.down_blocks):
        layers = [_layer(f"down_blocks.{i}", block, j) for j in range(len(block.resnets))]
        layers += [[f"down_blocks.{i}.downsamplers.{j}"] for j in range(len(block.downsamplers or ()))]
        names += chain(*layers[running:]) if running else [f"down_blocks.{i}"]
        running = max(running - len(layers), 0)
    names += ["mid_block"] if unet.mid_block is not None else []
    skipping = ups - branch - 1
    for i, block in enumerate(unet.up_blocks):
        layers = [_layer(f"up_blocks.{i}", block, j) for j in range(len(block.resnets))]
        names += chain(*layers[:skipping]) if skipping < len(layers) else [f"up_blocks.{i}"]
        skipping = max(skipping - len(layers), 0)
    return names


def _layer(prefix: str, block: Any, index: int) -> list[str]:
    parts = [part for part in PARTS if len(getattr(block, part, None) or ()) > index]
    return [f"{prefix}.{part}.{index}" for part in parts]


def wrap(module: nn.Module, around: Callable[..., Any], *first: Any) -> None:
    """Have ``around(*first, forward, ...)`` called for ``module.forward(...)``."""
    module.forward = partial(around, *first, module.forward)


def unwrap(module: nn.Module, around: Callable[..., Any]) -> None:
    """Undo `wrap`. Where somebody else has wrapped the module since, ours stays inside, and must do nothing."""
    wrapped = module.forward
    if isinstance(wrapped, partial) and wrapped.func is around:
        forward = wrapped.args[-1]
        if getattr(forward, "__func__", None) is type(module).forward:
            del module.forward
        else:
            module.forward = forward
