"""A patched transformer block carries out its plan: tokens are matched once a call, and merged around each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agentsd.checkpointing import RecordedPlans
from agentsd.hosts import Site
from agentsd.joint import JointAttnProcessor, Part
from agentsd.joint import possible as possible_joint
from agentsd.matching import Edges, Matching, bipartite_soft_matching
from agentsd.merge import merge, unmerge
from agentsd.planner import BlockPlan, Call, Matched, Now, Running
from agentsd.processor import AgentAttnProcessor, keeper, possible
from agentsd.settings import Settings
from agentsd.wrapping import Wrap, in_one_piece, mark


class PatchedBlock:
    """The hooks of one `BasicTransformerBlock`. What a call hands from one to the next is in `Now`, by thread.

    It holds no module, so that a denoiser and its patch do not keep each other alive.

    Attributes:
        site: where the block is.
        aside: what was left alone in calls of it, and why.

    Args:
        said: the kinds of these that a warning has named.
    """

    def __init__(self, index: int, site: Site, settings: Settings, now: Now, said: set[str]) -> None:
        self.index = index
        self.site = site
        self.settings = settings
        self.aside: dict[str, str] = {}
        self._now = now
        self._said = said
        self._recorded: RecordedPlans[BlockPlan] = RecordedPlans()
        constants = (settings.k_scale2, settings.k_shortcut)
        self._processors = {name: self.processor(now, *constants) for name in site.layers}

    processor = AgentAttnProcessor
    possible = staticmethod(possible)

    def attach(self, block: Any) -> tuple[list[RemovableHandle], list[tuple[nn.Module, Wrap]]]:
        """Register the hooks, and mark the layers that have some; what undoes it."""
        handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave),
        ]
        marks = []
        for layer, before in self._layers(block):
            # PyTorch before 2.9 compiles no mark, and a forward of somebody else's is one
            if torch.__version__ >= "2.9" and "forward" not in vars(layer):
                marks.append((layer, mark(layer)))
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            if not self.site.joint:  # first, since hooks of others may keep what they see
                handles.append(layer.register_forward_hook(self._unmerge, prepend=True))
        return handles, marks

    def _layers(self, block: Any) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Those that do something else than without a patch, and the hook before each."""
        settings = self.settings
        if settings.merge_attn or settings.sample_kv or settings.cached is not None:
            yield block.attn1, self._before_self_attention
        if settings.merge_crossattn and block.attn2 is not None:
            yield block.attn2, self._before_layer
        if settings.merge_mlp:
            yield block.ff, self._before_layer

    def reset(self, attn: Any) -> None:
        """Leave nothing in the block's self-attention of calls that an error has cut off."""
        for processor in self._processors.values():
            processor.give_back(attn, calls=2**31)

    def attend(self, attn: Any, x: Tensor, plan: BlockPlan | None) -> Tensor:
        """The block's self-attention of (B, N, C) tokens as in a call with this plan, or with none."""
        under_way, self._now.call = self._now.call, Call(running=Running(plan, x) if plan is not None else None)
        try:
            output: Tensor = attn(x)
        finally:
            self._now.call = under_way
        return output

    @in_one_piece
    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leave()
        x, call, plan = args[0] if args else kwargs.get("hidden_states"), self._now.call, None
        if x is not None:
            coming = call.blocks.get(self.index) if call is not None else None
            plan = self._recorded.plan(x, coming, call is not None and call.recomputed)
        if x is None or plan is None:
            return
        few, beyond = x.shape[1] < plan.counts.tokens, x.shape[1] > plan.counts.tokens
        if few or (beyond and not self.site.joint):  # Kontext's reference tokens come after the image's
            self._leave_alone("tokens", f"it has {x.shape[1]} tokens, and latents of this size {plan.counts.tokens}")
            return
        if call is None:  # in a backward pass
            call = self._now.call = Call()
        # a backward pass runs several calls' blocks again as one; what a graph kept, its next call could overwrite
        kept = call.matched if call.lane is not None and not torch.compiler.is_compiling() else {}
        call.running = Running(plan, x, kept.setdefault(self.index, Matched()))

    @in_one_piece
    def _leave(self, *_: Any) -> None:
        if self._now.call is not None:
            self._now.call.running = None

    def _edges(self, running: Running) -> Edges:
        matched, plan = running.matched, running.plan
        if matched.edges is None:
            x = running.x[:, : plan.counts.tokens]  # Kontext's reference tokens come after the image's
            matched.edges = bipartite_soft_matching(x, plan.partition)
        return matched.edges

    def _merging(self, running: Running) -> Matching:
        matched, counts = running.matched, running.plan.counts
        if matched.merging is None:
            matched.merging = self._edges(running).cut(counts.merged)
        return matched.merging

    def _agents(self, running: Running) -> Matching:
        matched, counts = running.matched, running.plan.counts
        if matched.agents is None:
            matched.agents = self._edges(running).cut(counts.tokens - counts.agents)
        return matched.agents

    def _before_self_attention(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running, merges = self._now.running, self.settings.merge_attn
        if running is None or not (merges or running.plan.counts.keys) or self._has_mask(kwargs):
            return None
        if len(args) > 1 or kwargs.get("encoder_hidden_states") is not None:
            return self._leave_alone("keys", "self-attention is given keys and values of somebody else's")
        if args[0].shape[:2] != running.x.shape[:2]:
            tokens = f"{args[0].shape[1]} tokens of {running.x.shape[1]}"
            return self._leave_alone("tokens", f"its attention is over {tokens}")
        counts, why = possible(attn, running.plan.counts)
        if not counts.changed:
            return self._leave_alone("processor", why)
        self.aside.pop("processor", None)  # it has another since
        if counts.keys:
            return args, {**kwargs, "encoder_hidden_states": args[0].index_select(1, running.plan.partition.dst)}
        if counts.agents:
            self._processors["attn1"].take_over(attn, merge(args[0], self._agents(running)))
        return self._merged(running, args, kwargs)

    def _before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running = self._now.running
        if running is None or running.plan.counts.keys or self._has_mask(kwargs):
            return None
        if name := keeper(layer):
            return self._leave_alone("keeper", f"{name} may keep what a {type(layer).__name__} gives")
        if args[0].shape[:2] != running.x.shape[:2]:
            raise RuntimeError(
                f"A layer of {self.site.name} got {tuple(args[0].shape[:2])} samples and tokens of its block's "
                f"{tuple(running.x.shape[:2])}, so they cannot be merged. Feed-forward chunking does that: call "
                "disable_forward_chunking() on the denoiser, or patch with merge_mlp=False."
            )
        return self._merged(running, args, kwargs)

    def _merged(self, running: Running, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running.merged = True
        return (merge(args[0], self._merging(running)), *args[1:]), kwargs

    def _unmerge(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        running = self._now.running
        if running is None or not running.merged:
            return output
        running.merged = False
        return unmerge(output, self._merging(running))

    def _has_mask(self, kwargs: dict[str, Any]) -> bool:
        """Whether the layer has a mask over its image tokens, which fits neither merged nor sampled ones.

        In cross-attention an attention mask is over the tokens of the text, which are not merged, and an IP-Adapter's
        masks are over the image; self-attention is given these, too, and drops them.
        """
        is_cross_attention = kwargs.get("encoder_hidden_states") is not None
        for mask in ("ip_adapter_masks",) if is_cross_attention else ("attention_mask",):
            if kwargs.get(mask) is not None:
                self._leave_alone(mask, f"its {mask} is made for all tokens")
                return True
        return False

    def _leave_alone(self, kind: str, why: str) -> None:
        self.aside[kind] = why
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"agentsd: a layer of {self.site.name} runs unpatched: {why}.", stacklevel=2)


class JointBlock(PatchedBlock):
    """The hooks of a block with joint attention, in which an image's tokens may be followed by those of others."""

    processor = JointAttnProcessor
    possible = staticmethod(possible_joint)

    def _layers(self, block: Any) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        for name, processor in self._processors.items():
            yield block.get_submodule(name), partial(self._before_joint_attention, processor)

    def _before_joint_attention(
        self, processor: AgentAttnProcessor, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        running = self._now.running
        if running is None or self._has_mask({**kwargs, "encoder_hidden_states": None}):
            return None
        x, counts = args[0] if args else kwargs["hidden_states"], running.plan.counts
        before = x.shape[1] - running.x.shape[1]  # single blocks of Flux have the text among their tokens
        if x.shape[0] != running.x.shape[0] or before < 0:
            return self._leave_alone("tokens", f"its attention is over {x.shape[1]} tokens of {running.x.shape[1]}")
        allowed, why = self.possible(attn, counts)
        if not allowed.changed:
            return self._leave_alone("processor", why)
        self.aside.pop("processor", None)  # it has another since
        matching = agents = None
        if not counts.keys:
            matching = self._merging(running)
            agents = self._agents(running) if counts.agents else None
        processor.take_over(attn, Part(before, running.plan.partition, matching, agents))
        return None
