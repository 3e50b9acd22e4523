"""The state of a patched denoiser, and how it is attached and undone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from agentsd.block import JointBlock, PatchedBlock
from agentsd.capture import Capture
from agentsd.checkpointing import RecordedPlans
from agentsd.hosts import Inputs, Middle, Site, host_of
from agentsd.models import denoiser_of
from agentsd.planner import Call, Draws, Grid, Now, plan
from agentsd.reuse import Reuse
from agentsd.schedule import Moment
from agentsd.settings import Settings
from agentsd.trajectory import Trajectory
from agentsd.wrapping import Weakly, Wrap, forget_graphs, is_running, outside_the_graph, refuse_tracing, wrap

ATTRIBUTE = "_agentsd_patch"


class Patch:
    """A patched denoiser's state: its settings, its blocks, and what undoes it.

    As the denoiser's forward pre-hook it has each call planned: which phase holds, whether it is full or cached, and
    how each block's grid divides into src and dst tokens. All that a call changes is in `Now`, by thread.

    Attributes:
        nets: the ControlNets that are patched with it, and their patches.
        latent_size: of the last call, or before it the denoiser's own.
        calls: how many of the present trajectory were full and cached; of all, where none is cached.
    """

    def __init__(self, net: nn.Module, settings: Settings, pipeline: Any = None) -> None:
        self.host = host = host_of(net)
        self.settings = settings
        self.sites = host.sites(net)
        self.latent_size = host.sample_size(net)
        self.nets: list[tuple[Weakly[nn.Module], Patch]] = []
        self.calls = {"full": 0, "cached": 0}
        self.trajectory = Trajectory(pipeline)
        self._now = Now()
        self._draws = Draws()
        self._recorded: RecordedPlans[Call] = RecordedPlans()
        self._leaving = False
        self._grids: dict[Grid, tuple[Grid, ...]] = {}
        self._seen: set[Grid] = set()
        selected = select(self.sites, settings)
        self.middle = host.middle(net, settings.cache_branch) if settings.reuses else Middle((), "")
        self.outermost = [not self.middle.holds(site.name) for site in selected]
        said: set[str] = set()
        self.blocks = [
            (JointBlock if site.joint else PatchedBlock)(index, site, settings, self._now, said)
            for index, site in enumerate(selected)
        ]
        keeps = settings.reuses or settings.match_interval > 1
        self.reuse = Reuse(settings, self.middle, self._now) if keeps else None
        self.capture = Capture(self._now, self.middle.holds) if settings.cuda_graphs else None

    def attach(self, net: nn.Module) -> None:
        self._handles = [
            net.register_forward_pre_hook(self._before_call, with_kwargs=True),
            net.register_forward_hook(self._after_call, always_call=True),
        ]
        self._patched: list[tuple[nn.Module, PatchedBlock]] = []
        self._wraps: list[tuple[nn.Module, Wrap]] = [*self.reuse.attach(net)] if self.reuse is not None else []
        in_full_calls = self.settings.ratio > 0 or self.settings.sample_kv
        for block in self.blocks:
            if not (in_full_calls or self.outermost[block.index]):  # cached calls skip it
                continue
            module = net.get_submodule(block.site.name)
            self._patched += [(module.get_submodule(layer), block) for layer in block.site.layers]
            handles, marks = block.attach(module)
            self._handles += handles
            self._wraps += marks
        if self.capture is not None:
            self._wraps.append((net, wrap(net, self.capture)))
        setattr(net, ATTRIBUTE, self)
        forget_graphs()
        for other, patch in self.nets:
            if (alive := other()) is not None:
                patch.attach(alive)

    def detach(self, net: nn.Module) -> None:
        """Never raises: modules may have been replaced since. In the middle of a call it waits for its end."""
        self._leaving = self._now.call is not None and is_running(net)
        if self._leaving:
            return
        for handle in self._handles:
            handle.remove()
        for attn, block in self._patched:
            block.reset(attn)
        for module, wrapped in self._wraps:
            wrapped.undo(module)
        if self.capture is not None:
            self.capture.forget()
        net.__dict__.pop(ATTRIBUTE, None)
        self._now.call = None
        self._now.tracks.clear()
        forget_graphs()
        for other, patch in self.nets:
            if (alive := other()) is not None and getattr(alive, ATTRIBUTE, None) is patch:
                patch.detach(alive)

    @outside_the_graph
    def _before_call(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_tracing()
        if self.settings.reuses and vars(net).get("_is_replica"):  # its middle would be the original's
            raise RuntimeError(
                "agentsd: features cannot be reused in replicas of torch.nn.DataParallel. Give each device a pipeline "
                "of its own, or use DistributedDataParallel or cache_interval=1."
            )
        self._end()  # of a call that was interrupted
        inputs = self.host.inputs(net, args, kwargs)
        if inputs is None:
            return
        self.latent_size = inputs.size
        moment = self._locate(inputs)
        coming, place = self._call(net, inputs, moment), (moment.step, moment.steps)
        call = self._now.call = self._recorded.plan(inputs.sample, coming, True, place)
        if call is not None:
            call.recomputed = torch._C._current_graph_task_id() != -1
        if self.capture is not None:
            self.capture.look_at(net, coming.cached)

    def _locate(self, inputs: Inputs) -> Moment:
        """The moment of a call, where anything depends on it."""
        settings = self.settings
        if self.reuse is not None or (self.blocks and (settings.use_rand or len(settings.phases) > 1)):
            return self.trajectory.locate(inputs.timestep, inputs.divisor, inputs.sample, inputs.loop)
        return Moment(0, 1)

    def _call(self, net: nn.Module, inputs: Inputs, moment: Moment) -> Call:
        settings = self.settings
        call = self.reuse.before_call(moment, inputs) if self.reuse is not None else Call()
        if call.begins:
            self.calls = {"full": 0, "cached": 0}
        self.calls["cached" if call.cached else "full"] += 1
        if self.blocks:
            grids = self.grids(net, inputs.size)
            planned = plan(settings, moment, grids, call.cached, self.outermost)
            seed = torch.initial_seed() if settings.seed is None else settings.seed
            drawn = seed if settings.use_rand else None
            call.blocks = self._draws.blocks(planned, grids, moment, drawn, inputs.sample.device)
            self._warn_where_nothing_merges(inputs.size, grids)
        return call

    @outside_the_graph
    def _after_call(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._end()
        if self._leaving:
            self.detach(net)

    def _end(self) -> None:
        call, self._now.call = self._now.call, None
        if call is None:
            return
        if self.reuse is not None:
            self.reuse.after_call(call)
        running = call.running  # of a block that an error has cut off
        if running is not None and running.handed is not None:
            for attn, block in self._patched:
                block.reset(attn)

    def grids(self, net: nn.Module, size: Grid) -> tuple[Grid, ...]:
        """The token grid of each patched block for latents of this size."""
        if size not in self._grids:
            levels = self.host.grids(net, *size)
            self._grids[size] = tuple(levels[block.site.level] for block in self.blocks)
        return self._grids[size]

    def _warn_where_nothing_merges(self, size: Grid, grids: tuple[Grid, ...]) -> None:
        settings = self.settings
        if size in self._seen:
            return
        self._seen.add(size)
        phases = [phase for phase in (*settings.phases, settings.cached) if phase is not None]
        if any(phase.counts(*grid).changed for phase in phases for grid in grids):
            return
        most = max(height * width for height, width in grids)
        if most >= settings.min_tokens:
            why = (
                f"ratio={settings.ratio:g} of {size[0]}x{size[1]} latents merges no token. Use a larger image, a "
                "larger ratio, or smaller strides."
            )
        elif not settings.reuses:
            why = (
                f"its layers have {most} tokens and fewer, and below min_tokens={settings.min_tokens} a patch costs "
                "more than it gains. Give min_tokens=0 to patch them all the same."
            )
        else:  # reuse is gain enough
            return
        warnings.warn(f"agentsd changes nothing at this size: {why}", stacklevel=2)


def select(sites: list[Site], settings: Settings) -> list[Site]:
    """The sites that ``settings`` patch: by default those of the highest resolution that has self-attention."""
    usable = [site for site in sites if not site.skip] if settings.acts else []
    limit = settings.max_downsample or min((site.downsample for site in usable), default=0)
    return [site for site in usable if site.downsample <= limit]


def patch_of(model: Any) -> Patch | None:
    """The patch on ``model``, if there is one."""
    patch: Patch | None = getattr(denoiser_of(model), ATTRIBUTE, None)
    return patch
