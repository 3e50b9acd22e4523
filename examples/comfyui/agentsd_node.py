"""A node that patches a MODEL of ComfyUI, by the ways that ComfyUI has for it; the algorithm is agentsd's.

The wrapper of a UNet call finds the step in the sampler's sigmas, and decides whether the call is full or cached.
Patches of self-attention then merge, sample or take agents. An output block patch keeps the deep features of a full
call, and in a cached call gives them to the last block, while the layers in between do not run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from agentsd import PRESETS, Settings
from agentsd.attention import agent_attention
from agentsd.control import Controller, Table
from agentsd.features import Lane, slowing
from agentsd.matching import Matching, bipartite_soft_matching, partitions
from agentsd.merge import merge, unmerge
from agentsd.planner import source
from agentsd.schedule import Moment, Phase
from agentsd.wrapping import Wrap, wrap

PAPER = "paper"
Grid = tuple[int, int]


@dataclass
class Call:
    """A UNet call under way.

    Attributes:
        phase: what holds for its self-attention.
        step: of the trajectory, by which tokens are drawn.
        lane: where its deep features come from, or go to; None where they are of no use.
        cached: whether it takes them.
        last: the output block that does.
        tokens: of the highest resolution that has self-attention, which comes first.
        index: of the next block there.
        matching: of the block that runs, until its output is unmerged.
        agents: the matching that makes its agents.
    """

    phase: Phase
    step: int
    lane: Lane | None = None
    cached: bool = False
    last: int = 0
    tokens: int = 0
    index: int = 0
    matching: Matching | None = None
    agents: Matching | None = None


@dataclass
class Trajectory:
    """The calls of one prompt and shape, from noise to image, and which of them are full."""

    sigmas: list[float]
    lane: Lane
    pace: Table | Controller
    step: int = -1
    several: bool = False  # calls of a step that cannot be told apart: none of them is cached


@dataclass
class AgentSD:
    """What is behind the patches of one MODEL.

    Args:
        settings: as `agentsd.apply_patch` takes them.
        before: the wrapper that was there before, which is called inside.
    """

    settings: Settings
    before: Any = None
    call: Call | None = None
    trajectories: dict[Any, Trajectory] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> AgentSD:
        """A clone of the MODEL has a trajectory of its own; ComfyUI copies all that it finds in the options."""
        return AgentSD(self.settings, self.before)

    def __call__(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        """The wrapper: ``args`` has ``input`` (B, 4, H, W), ``timestep`` (B,) sigmas, ``c`` and ``cond_or_uncond``."""
        unet = getattr(getattr(apply_model, "__self__", None), "diffusion_model", None)
        self.call = self._begin(unet, args)
        try:
            with skipping(unet) if self.call is not None and self.call.cached else nullcontext():
                if self.before is not None:
                    return self.before(apply_model, args)
                return apply_model(args["input"], args["timestep"], **args["c"])
        finally:
            self.call = None

    def _begin(self, unet: Any, args: dict[str, Any]) -> Call | None:
        options = args["c"].get("transformer_options", {})
        if options.get("sample_sigmas") is None:
            warnings.warn(
                "AgentSD patch changes nothing: this call has no sample_sigmas; update ComfyUI.", stacklevel=2
            )
            return None
        sigmas = options["sample_sigmas"].tolist()
        sigma, steps = float(args["timestep"][0]), len(sigmas) - 1
        step = min(range(steps), key=lambda i: abs(sigmas[i] - sigma))
        phase = self.settings.phase_at(Moment(step, steps))
        between = not math.isclose(sigmas[step], sigma, rel_tol=1e-4)  # the second call of Heun and its kind
        if not self.settings.reuses or unet is None or between or args["c"].get("control") is not None:
            return Call(phase, step)
        key = (*(options.get("uuids") or args.get("cond_or_uncond", ())), tuple(args["input"].shape))
        at = self.trajectories.get(key)
        if at is None or at.sigmas != sigmas or not at.step <= step <= at.step + 1:
            if step == 0:  # a new image: what is left of others goes
                self.trajectories = {k: t for k, t in self.trajectories.items() if t.sigmas == sigmas and t.step <= 0}
            at = self.trajectories[key] = self._trajectory(sigmas, step)
        at.several |= step == at.step
        at.step = step
        at.lane.begin()
        if at.several:
            return Call(phase, step)
        last = len(unet.output_blocks) - 1
        full = at.pace.full(step, [at.lane.error] if at.lane.error is not None else [])
        cached = at.lane.latest is not None and not full
        return Call(self.settings.cached or phase if cached else phase, step, at.lane, cached, last)

    def _trajectory(self, sigmas: list[float], begin: int) -> Trajectory:
        by_error = self.settings.cache_tolerance > 0
        pace = (Controller if by_error else Table)(self.settings, len(sigmas) - 1, begin)
        lane = Lane(self.settings.cache_order, slowing=slowing(len(sigmas) - 1), measures=by_error)
        return Trajectory(sigmas, lane, pace)

    def output_block(self, h: Tensor, skip: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the last output block gets from below: remembered in a full call, given in a cached one."""
        call, block = self.call, tuple(options.get("block", ()))[:2]
        if call is not None and call.lane is not None and block == ("output", call.last):
            if call.cached:
                return call.lane.estimate(), skip
            call.lane.remember(h.detach().clone())
        return h, skip

    def attention_input(
        self, n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a self-attention gets: all tokens, merged ones, or all queries and sampled keys. (B, N, C) each."""
        call = self.call
        if call is None or n.shape[1] != context.shape[1]:
            return n, context, value
        call.matching = call.agents = None
        call.tokens = call.tokens or n.shape[1]
        grid = grid_of(n.shape[1], options.get("original_shape"))
        if n.shape[1] != call.tokens or grid is None:
            return n, context, value
        index, call.index = call.index, call.index + 1
        counts = call.phase.counts(*grid)
        if not counts.changed:
            return n, context, value
        generator, turn = source(self.settings.seed or 0, call.phase, call.step, index)
        drawn = partitions(*grid, call.phase.sy, call.phase.sx, [generator], n.device, [turn])[0]
        if counts.keys:
            return n, context.index_select(1, drawn.dst), value.index_select(1, drawn.dst)
        edges = bipartite_soft_matching(n, drawn)
        call.matching = edges.cut(counts.merged)
        if counts.agents:  # which need the queries of all tokens, and are taken once these are projected
            call.agents = edges.cut(counts.tokens - counts.agents)
            return n, context, value
        return tuple(merge(x, call.matching) for x in (n, context, value))  # type: ignore[return-value]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """In the place of a block's self-attention, projected: agents where there are some, softmax elsewhere.

        Projections are linear: the mean of projected tokens is the projection of their mean.
        """
        call, heads = self.call, options["n_heads"]
        if call is None or call.agents is None or call.matching is None:
            return _joined(F.scaled_dot_product_attention(*(_heads(x, heads) for x in (q, k, v))))
        merged = [_heads(merge(x, call.matching), heads) for x in (q, k, v)]
        agents = _heads(merge(q, call.agents), heads)
        constants = {"k_scale2": self.settings.k_scale2, "k_shortcut": self.settings.k_shortcut}
        return _joined(agent_attention(*merged, agents, **constants))

    def attention_output(self, n: Tensor, options: dict[str, Any]) -> Tensor:
        """(B, M, C) of merged tokens -> (B, N, C)."""
        call = self.call
        if call is None or call.matching is None or n.shape[1] != call.matching.groups:
            return n
        matching, call.matching = call.matching, None
        return unmerge(n, matching)


@contextmanager
def skipping(unet: Any) -> Iterator[None]:
    """The layers of the middle do not run: a single number takes the place of their outputs."""
    middle = [unet.middle_block] if unet.middle_block is not None else []
    blocks = [*unet.input_blocks[1:], *middle, *unet.output_blocks[:-1]]
    wraps: list[tuple[nn.Module, Wrap]] = []
    try:
        for layer in (layer for block in blocks for layer in block):
            wraps.append((layer, wrap(layer, lambda forward, x, *_, **__: x[:, :1, :1, :1])))
        yield
    finally:
        for layer, wrapped in wraps:
            wrapped.undo(layer)


def grid_of(tokens: int, shape: Any) -> Grid | None:
    """Height and width of the tokens of latents of ``shape`` (B, C, H, W), or None where no halving has as many."""
    height, width = shape[-2:] if shape is not None else (0, 0)
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == tokens else None


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # (B, N, H * d) -> (B, H, N, d)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class AgentSDPatch:
    """The node."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "model_patches/unet"
    DESCRIPTION = "Makes Stable Diffusion 1.x, 2.x and XL faster: reuse of deep features, or the paper's schedule."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        ratio = {"default": 0.4, "min": 0.0, "max": 0.75, "step": 0.05, "tooltip": "for paper alone"}
        return {
            "required": {
                "model": ("MODEL",),
                "preset": (sorted([*PRESETS, PAPER], key="balanced".__ne__),),
                "ratio": ("FLOAT", ratio),
            }
        }

    def patch(self, model: Any, preset: str, ratio: float) -> tuple[Any]:
        settings = Settings.of(None if preset == PAPER else preset, {})
        if settings.ratio and not settings.sample_kv:
            settings = replace(settings, ratio=ratio)
        unet = model.model.diffusion_model
        if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
            raise ValueError(f"AgentSD patch: {type(unet).__name__} is no UNet of Stable Diffusion 1.x, 2.x or XL.")
        model = model.clone()
        agentsd = AgentSD(settings, model.model_options.get("model_function_wrapper"))
        model.set_model_unet_function_wrapper(agentsd)
        model.set_model_attn1_patch(agentsd.attention_input)
        model.set_model_attn1_output_patch(agentsd.attention_output)
        if settings.reuses:
            model.set_model_output_block_patch(agentsd.output_block)
        if any(phase.agent_ratio is not None and phase.ratio for phase in settings.phases):
            for place in self_attentions(unet):
                model.set_model_attn1_replace(agentsd.attention, *place)
        return (model,)


def self_attentions(unet: Any) -> Iterator[tuple[str, int, int]]:
    """Where they are, as ComfyUI counts: the side, the block there, and the transformer block in it."""
    sides = {"input": unet.input_blocks, "middle": [unet.middle_block or []], "output": unet.output_blocks}
    for side, blocks in sides.items():
        for number, block in enumerate(blocks):
            depth = sum(len(getattr(layer, "transformer_blocks", ())) for layer in block)
            yield from ((side, number, index) for index in range(depth))


NODE_CLASS_MAPPINGS = {"AgentSDPatch": AgentSDPatch}
NODE_DISPLAY_NAME_MAPPINGS = {"AgentSDPatch": "AgentSD patch"}
