"""The state of a patched UNet, and what it plans for each denoiser call."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.block import PatchedBlock
from agentsd.compiled import outside_the_graph
from agentsd.config import Settings
from agentsd.matching import partition
from agentsd.models import unet_of
from agentsd.reuse import Reuse
from agentsd.schedule import Trajectory
from agentsd.sites import Site, grids

ATTRIBUTE = "_agentsd_patch"


class Patch:
    """A patched UNet's state: its settings, its blocks, and the handles that undo it.

    As the UNet's forward pre-hook it plans each denoiser call: which phase holds, and how each block's grid divides
    into src and dst tokens.
    """

    def __init__(self, unet: nn.Module, sites: list[Site], settings: Settings, pipeline: Any = None) -> None:
        self.settings = settings
        self.trajectory = Trajectory(pipeline)
        self.sites = sites
        self.blocks = [PatchedBlock(site, settings) for site in selected(self.sites, settings)]
        self.latent_size = _sample_size(unet)
        self._plan: tuple[Any, ...] | None = None
        self._warned: set[tuple[int, int]] = set()
        self._handles = [
            unet.register_forward_pre_hook(self._before_call, with_kwargs=True),
            unet.register_forward_hook(self._after_call),
        ]
        self.reuse: Reuse | None = None
        if settings.reuses:
            self.reuse = Reuse(settings.cache_interval, settings.cache_branch, settings.cache_order)
            self.reuse.attach(unet)
        for patched_block in self.blocks:
            self._handles += patched_block.attach(unet.get_submodule(patched_block.site.name))

    def remove(self, unet: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        for block in self.blocks:
            block.reset(unet.get_submodule(block.site.name))
        if self.reuse is not None:
            self.reuse.detach(unet)

    @outside_the_graph
    def _after_call(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.reuse is not None:
            self.reuse.after_call()

    @outside_the_graph
    def _before_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample: Tensor = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        settings = self.settings
        height, width = sample.shape[-2:]
        self.latent_size = (height, width)
        step, phase = None, settings.phases[0]
        if self.reuse is not None or (self.blocks and (settings.use_rand or len(settings.phases) > 1)):
            moment = self.trajectory.locate(timestep)
            step = moment.step if settings.use_rand else None
            phase = settings.agent if moment.within_first(settings.agent_steps) else settings.merge
            if self.reuse is not None:
                trajectory = (moment.run, sample.shape, sample.dtype, sample.device)
                self.reuse.before_call(trajectory, moment.call, moment.left)
                if self.reuse.cheap and settings.cheap is not None:
                    phase = settings.cheap
        seed = torch.initial_seed() if settings.seed is None and settings.use_rand else settings.seed
        plan = (height, width, phase, step, seed)
        if plan != self._plan:
            self._plan = plan
            level_grids = grids(unet, height, width)
            for index, block in enumerate(self.blocks):
                grid = level_grids[block.site.level]
                block.counts = phase.counts(*grid)
                generator = None if step is None else _generator(seed, step, index)
                block.partition = None
                if block.counts.changed:
                    block.partition = partition(*grid, phase.sy, phase.sx, generator).to(sample.device)
            self._warn_where_nothing_merges(level_grids)

    def _warn_where_nothing_merges(self, level_grids: list[tuple[int, int]]) -> None:
        settings, size = self.settings, level_grids[0]
        patched_grids = [level_grids[block.site.level] for block in self.blocks]
        if not patched_grids or size in self._warned:
            return
        phases = [phase for phase in (*settings.phases, settings.cheap) if phase is not None]
        if any(phase.counts(*grid).changed for phase in phases for grid in patched_grids):
            return
        most = max(height * width for height, width in patched_grids)
        if most >= settings.min_tokens:
            why = (
                f"ratio={settings.ratio:g} of {size[0]}x{size[1]} latents merges no token. Use a larger image, a "
                "larger ratio, or smaller strides."
            )
        elif self.reuse is None:
            why = (
                f"its layers have {most} tokens and fewer, and below min_tokens={settings.min_tokens} a patch costs "
                "more than it gains. Give min_tokens=0 to patch them all the same."
            )
        else:  # reuse is gain enough
            return
        self._warned.add(size)
        warnings.warn(f"agentsd changes nothing at this size: {why}", stacklevel=2)


def _generator(seed: int | None, step: int, index: int) -> torch.Generator:
    """A generator of this block's draw at this step alone: the same however often, and in what order, it is asked."""
    digest = hashlib.blake2b(f"{seed}/{step}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def selected(sites: list[Site], settings: Settings) -> list[Site]:
    """The sites that ``settings`` patch: by default those of the highest resolution that has self-attention."""
    usable = [site for site in sites if not site.skip] if settings.acts else []
    limit = settings.max_downsample or min((site.downsample for site in usable), default=0)
    return [site for site in usable if site.downsample <= limit]


def _sample_size(unet: nn.Module) -> tuple[int, int]:
    size = getattr(getattr(unet, "config", None), "sample_size", None) or 64
    return (size, size) if isinstance(size, int) else tuple(size)


def patch_of(model: Any) -> Patch | None:
    """The patch on ``model``, if there is one."""
    patch: Patch | None = getattr(unet_of(model), ATTRIBUTE, None)
    return patch
