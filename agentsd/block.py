"""A patched transformer block: its tokens are matched once a call, then merged around each of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agentsd.config import Counts, Settings
from agentsd.matching import Matching, Partition, bipartite_soft_matching
from agentsd.merge import merge, unmerge
from agentsd.processor import AgentAttnProcessor, Agents, can_use_agents
from agentsd.sites import Site


class PatchedBlock:
    """The hooks of one `BasicTransformerBlock`, and what they hand to each other during one call of it.

    It holds no module, so that a UNet and its patch are not kept alive by each other.

    Attributes:
        site: where the block is.
        counts, partition: the plan for the coming call, set before it; a partition of None leaves the block alone.
    """

    def __init__(self, site: Site, settings: Settings) -> None:
        self.site = site
        self.settings = settings
        self.counts = Counts(0, 0, 0)
        self.partition: Partition | None = None
        self._matching: Matching | None = None
        self._agent_matching: Matching | None = None

    def attach(self, block: nn.Module) -> list[RemovableHandle]:
        """Register the hooks; their handles undo it."""
        handles = [
            block.register_forward_pre_hook(self._match, with_kwargs=True),
            block.register_forward_hook(self._forget),
        ]
        merged_layers: list[tuple[nn.Module | None, Callable[..., Any]]] = []
        if self.settings.merge_attn:
            merged_layers.append((block.get_submodule("attn1"), self._merge_attention))
        if self.settings.merge_crossattn:
            merged_layers.append((getattr(block, "attn2", None), self._merge))
        if self.settings.merge_mlp:
            merged_layers.append((block.get_submodule("ff"), self._merge))
        for layer, merge_hook in merged_layers:
            if layer is not None:
                handles.append(layer.register_forward_pre_hook(merge_hook, with_kwargs=True))
                handles.append(layer.register_forward_hook(self._unmerge))
        return handles

    def _match(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._matching = self._agent_matching = None
        if self.partition is None:
            return
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] != self.counts.tokens:
            raise RuntimeError(
                f"{self.site.name} got {x.shape[1]} tokens where its place in the UNet predicts {self.counts.tokens}. "
                "The UNet is of a kind that agentsd does not know: call agentsd.remove_patch, and please report it."
            )
        edges = bipartite_soft_matching(x, self.partition)
        self._matching = edges.cut(self.counts.merged)
        if self.counts.agents and wrap_processor(block.attn1):
            self._agent_matching = edges.cut(self.counts.tokens - self.counts.agents)

    def _forget(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._matching = self._agent_matching = None

    def _merge(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._matching is None:
            return None
        return (merge(args[0], self._matching), *args[1:]), kwargs

    def _merge_attention(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(attn.processor, AgentAttnProcessor):
            attn.processor.agents = None
        if self._matching is None:
            return None
        if kwargs.get("attention_mask") is not None:
            self._matching = None
            warnings.warn(
                f"{self.site.name} runs unpatched: its attention mask is made for unmerged tokens.", stacklevel=2
            )
            return None
        if self._agent_matching is not None:
            tokens = merge(args[0], self._agent_matching)
            attn.processor.agents = Agents(tokens, self.settings.k_scale2, self.settings.k_shortcut)
        return self._merge(attn, args, kwargs)

    def _unmerge(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self._matching is None else unmerge(output, self._matching)


def wrap_processor(attn: Any) -> bool:
    """Put an `AgentAttnProcessor` around the processor of ``attn``; False where agents cannot stand in for it.

    Called before each use of agents: a user may have replaced the processor since.
    """
    if not can_use_agents(attn):
        return False
    if not isinstance(attn.processor, AgentAttnProcessor):
        attn.set_processor(AgentAttnProcessor(attn.processor))
    return True


def unwrap_processor(attn: Any) -> None:
    """Put back the very processor that `wrap_processor` found."""
    if isinstance(getattr(attn, "processor", None), AgentAttnProcessor):
        attn.set_processor(attn.processor.inner)
