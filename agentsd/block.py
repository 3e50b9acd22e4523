"""A patched transformer block: its tokens are matched once a call, then merged around each of its layers."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agentsd.checkpointing import RecordedPlans
from agentsd.config import Counts, Settings
from agentsd.matching import Matching, Partition, bipartite_soft_matching
from agentsd.merge import merge, unmerge
from agentsd.processor import AgentAttnProcessor, can_sample_kv, can_use_agents
from agentsd.sites import Site


class PatchedBlock:
    """The hooks of one `BasicTransformerBlock`, and what they hand to each other during one call of it.

    It holds no module, so that a UNet and its patch do not keep each other alive.

    Attributes:
        site: where the block is.
        counts, partition: the plan for the coming call, set before it; a partition of None leaves the block alone.
    """

    def __init__(self, site: Site, settings: Settings) -> None:
        self.site = site
        self.settings = settings
        self.counts = Counts(0, 0, 0)
        self.partition: Partition | None = None
        self._recorded: RecordedPlans[tuple[Counts, Partition | None]] = RecordedPlans()
        self._dst: Tensor | None = None
        self._matching: Matching | None = None
        self._agent_matching: Matching | None = None
        self._merged = False
        self._processor = AgentAttnProcessor(settings.k_scale2, settings.k_shortcut)

    def attach(self, block: Any) -> list[RemovableHandle]:
        """Register the hooks; their handles undo it."""
        settings = self.settings
        samples = settings.sample_kv or settings.cheap is not None
        layers = [
            (block.attn1, self._self_attention, settings.merge_attn or samples),
            (block.attn2, self._merge, settings.merge_crossattn and block.attn2 is not None),
            (block.ff, self._merge, settings.merge_mlp),
        ]
        handles = [
            block.register_forward_pre_hook(self._match, with_kwargs=True),
            block.register_forward_hook(self._forget),
        ]
        for layer, merge_hook, wanted in layers:
            if wanted:
                handles.append(layer.register_forward_pre_hook(merge_hook, with_kwargs=True))
                handles.append(layer.register_forward_hook(self._unmerge))
        return handles

    def _match(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.reset(block)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        counts, partition = self._recorded.plan(x, (self.counts, self.partition))
        if partition is None:
            return
        if x.shape[1] != counts.tokens:
            raise RuntimeError(
                f"{self.site.name} got {x.shape[1]} tokens where its place in the UNet predicts {counts.tokens}. "
                "The UNet is of a kind that agentsd does not know: call agentsd.remove_patch, and please report it."
            )
        partition = partition.to(x.device)
        if counts.keys:
            self._dst = partition.dst
            return
        edges = bipartite_soft_matching(x, partition)
        self._matching = edges.cut(counts.merged)
        if counts.agents:
            self._agent_matching = edges.cut(counts.tokens - counts.agents)

    def reset(self, block: Any) -> None:
        """Leave nothing of a call that an error has cut off."""
        self._processor.give_back(block.attn1)
        self._forget()

    def _forget(self, *_: Any) -> None:
        self._matching = self._agent_matching = self._dst = None
        self._merged = False

    def _merge(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._merged = False
        if self._matching is None or self._has_mask(kwargs):
            return None
        x = args[0]
        if x.shape[:2] != self._matching.shape[:2]:
            raise RuntimeError(
                f"A layer of {self.site.name} got {tuple(x.shape[:2])} samples and tokens of its block's "
                f"{self._matching.shape[:2]}, so they cannot be merged. Feed-forward chunking does that: call "
                "disable_forward_chunking() on the UNet, or patch with merge_mlp=False."
            )
        self._merged = True
        return (merge(x, self._matching), *args[1:]), kwargs

    def _has_mask(self, kwargs: dict[str, Any]) -> bool:
        """Whether the layer has a mask over its image tokens, which fits neither merged nor sampled ones.

        In cross-attention an attention mask is over the tokens of the text, which are not merged, and an IP-Adapter's
        masks are over the image; self-attention is given these, too, and drops them.
        """
        is_cross_attention = kwargs.get("encoder_hidden_states") is not None
        for mask in ("ip_adapter_masks",) if is_cross_attention else ("attention_mask",):
            if kwargs.get(mask) is not None:
                warnings.warn(
                    f"A layer of {self.site.name} runs unpatched: its {mask} is made for all tokens.", stacklevel=2
                )
                return True
        return False

    def _self_attention(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._dst is not None:
            return self._sample_kv(self._dst, attn, args, kwargs)
        if not self.settings.merge_attn:
            return None
        merged = self._merge(attn, args, kwargs)
        if self._merged and self._agent_matching is not None and can_use_agents(attn):
            self._processor.take_over(attn, merge(args[0], self._agent_matching))
        return merged

    def _sample_kv(self, dst: Tensor, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let every token attend to the dst tokens alone, with whatever processor ``attn`` has."""
        if not can_sample_kv(attn) or self._has_mask(kwargs):
            return None
        return args, {**kwargs, "encoder_hidden_states": args[0].index_select(1, dst)}

    def _unmerge(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self._merged or self._matching is None:
            return output
        self._merged = False
        return unmerge(output, self._matching)
