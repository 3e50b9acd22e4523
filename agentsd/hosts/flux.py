"""Flux (Black Forest Labs 2024): dev, schnell, Fill, Control, Kontext, and their ControlNets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from agentsd.hosts.base import Inputs
from agentsd.hosts.transformer import Transformer

NOTED = "_agentsd_grid"  # on the ids themselves: a pipeline makes one tensor of them for all calls of an image


class Flux(Transformer):
    """Joint attention over text and image, in this order, with rotary positions."""

    blocks = (FluxTransformerBlock, FluxSingleTransformerBlock)
    text_tokens = 512

    def told(self, net: Any, named: Mapping[str, Any]) -> Inputs | None:
        """Latents are packed, (B, N, C) with one token for 2 x 2 of them: their grid stands in ``img_ids`` alone."""
        if named.get("img_ids") is None:
            return None
        x = named["hidden_states"]
        ids, text = named["img_ids"], named.get("encoder_hidden_states")
        rows, columns = _grid(ids, x.shape[1])
        return Inputs(x, named["timestep"], text, packed=(2 * rows, 2 * columns), divisor=1000.0, loop=ids)

    def patch_size(self, net: Any) -> int:
        """Latents are packed by the pipeline, and ``patch_size`` is 1."""
        return 2


def _grid(ids: Tensor, tokens: int) -> tuple[int, int]:
    """Rows and columns of the image, which Kontext's reference tokens follow; one row where there is no such grid.

    Args:
        ids: (N, 3) or (1, N, 3): of each token which image it is of, its row and its column.
    """
    if ids.is_meta or isinstance(ids, FakeTensor):  # these have no values
        return 1, tokens
    found: tuple[int, int] | None
    asked = (tokens, 0 if ids.is_inference() else ids._version)
    before, found = getattr(ids, NOTED, (None, None))
    if found is None or before != asked:
        found = _read(ids, tokens)
        setattr(ids, NOTED, (asked, found))
    return found


def _read(ids: Tensor, tokens: int) -> tuple[int, int]:
    """It waits for the device."""
    ids = ids.reshape(-1, ids.shape[-1])[:tokens].float().cpu()  # a batch repeats them
    image = ids[: int((ids[:, 0] == ids[0, 0]).long().cumprod(0).sum()), 1:]
    rows, columns = (len(set(image[:, axis].tolist())) for axis in (0, 1))
    if rows * columns != len(image):
        return 1, tokens
    raster = torch.cartesian_prod(image[::columns, 0], image[:columns, 1]).view(-1, 2)
    return (rows, columns) if torch.equal(raster, image) else (1, tokens)
