"""Joint attention over image and text, as in Stable Diffusion 3 and Flux, where its image tokens are fewer.

Text keeps all its keys and queries, and so do the reference tokens that may follow the image's. Of the image, either
keys and values alone are fewer (sampled), or all of it (merged), or agents stand between. So that the text does not
weigh more than it did, each key of the image counts as often as it stands for a token: log(n) is added to its logits,
which is exact where the keys and values that it stands for are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from agentsd.attention import agent_attention
from agentsd.matching import Matching, Partition
from agentsd.merge import merge, sizes, unmerge
from agentsd.processor import AgentAttnProcessor, keeper, processor_of
from agentsd.schedule import Counts

PROCESSORS = (FluxAttnProcessor, JointAttnProcessor2_0)  # that compute plain joint attention
Parts = tuple[Tensor, ...]  # of the tokens, and of the text where it is apart
Table = tuple[Tensor, Tensor]  # of rotary positions: cosines and sines, (S, d) each


def possible(attn: Any, counts: Counts) -> tuple[Counts, str]:
    """What joint attention can do of what is planned for its image tokens, and why no more."""
    own = processor_of(attn)
    why = ""
    # Stable Diffusion 3 has a processor for fused projections, and layers that claim to be fused when they are no more
    fused = isinstance(own, FluxAttnProcessor) and attn.fused_projections
    if type(own) not in PROCESSORS or fused:
        why = f"{type(own).__name__} is no plain joint attention with projections of its own"
    elif getattr(own, "_attention_backend", None) not in (None, "native") or getattr(own, "_parallel_config", None):
        why = "its attention has a back end of its own"
    elif name := keeper(attn):
        why = f"{name} may keep what it gives"
    return (Counts(counts.tokens), why) if why else (counts, "")


@dataclass(frozen=True)
class Part:
    """What becomes of the image tokens in one call of a layer.

    Attributes:
        before: how many tokens of text stand in front of them.
        partition: of the image tokens.
        matching: where they are merged; None where keys and values are sampled.
        agents: the groups whose means are agents, where there are any.
    """

    before: int
    partition: Partition
    matching: Matching | None = None
    agents: Matching | None = None

    @property
    def tokens(self) -> int:
        return len(self.partition.order)

    def fewer(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens (B, N, C): those that are keys, their places (S,) or (B, S), and what the image's stand for."""
        if self.matching is None:
            at, dst = self.around(self.partition.dst.long(), x.shape[1]), self.partition.num_dst
            return x.index_select(1, at), at, x.new_full((1, dst), self.tokens / dst)
        at, image = self.around(self.place(self.matching), x.shape[1]), slice(self.before, self.before + self.tokens)
        return _with(merge(x[:, image], self.matching), x, image), at, sizes(self.matching).to(x.dtype)

    def around(self, image: Tensor, length: int) -> Tensor:
        """``image``, places among the image tokens (..., D), as places among ``length`` tokens, with all others."""
        others = torch.arange(length, device=image.device).expand(*image.shape[:-1], length)
        behind = others[..., self.before + self.tokens :]
        return torch.cat((others[..., : self.before], image + self.before, behind), dim=-1)

    def place(self, matching: Matching) -> Tensor:
        """Where a group is: with its dst token, or its only one. (B, M)."""
        batch, groups, dst = len(matching.group), matching.groups, self.partition.num_dst
        order = self.partition.order.long().expand(batch, -1)
        group = (matching.group % groups).gather(1, order)
        place = order.new_zeros(batch, groups)
        place.scatter_(1, group[:, dst:], order[:, dst:])
        return place.scatter_(1, group[:, :dst], order[:, :dst])


class JointAttnProcessor(AgentAttnProcessor):
    """Joint attention for single calls of a layer, of the `Part` that its block hands over."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Table | None = None,
    ) -> Any:
        """(B, N, C) tokens, and (B, T, C) of text -> the same. Some layers have the text among the tokens.

        ``image_rotary_emb`` has the text's positions before the tokens'.
        """
        part, x, text = self._take_up(attn), hidden_states, encoder_hidden_states
        if part is None:
            rotary = () if image_rotary_emb is None else (image_rotary_emb,)
            return self.own(attn, x, text, attention_mask, *rotary)
        keys, at, stands_for = part.fewer(x)
        image = slice(part.before, part.before + stands_for.shape[1])  # where it is among these
        rows, asking = (x, torch.arange(x.shape[1], device=x.device)) if part.matching is None else (keys, at)
        project = _Projections(attn, text, image_rotary_emb)
        query, key, value = project("q", rows, asking), torch.cat(project("k", keys, at), 2), project("v", keys, at)
        bias = None
        if part.partition.num_dst < part.tokens:  # log(n) for each of the image's keys, and 0 for those around them
            bias = F.pad(stands_for.log(), (image.start, key.shape[2] - image.stop))[:, None, None]
        if part.agents is None:
            output = F.scaled_dot_product_attention(torch.cat(query, 2), key, torch.cat(value, 2), bias)
        else:
            means = merge(x[:, part.before : part.before + part.tokens], part.agents)
            agents = project.tokens("q", means, part.place(part.agents) + part.before)
            output = self._mediated(query, key, value, bias, agents, image)
        output = output.transpose(1, 2).flatten(2).to(x.dtype)  # (B, H, S, d) -> (B, S, H * d)
        own, output_of_text = output[:, : rows.shape[1]], output[:, rows.shape[1] :]
        for layer in getattr(attn, "to_out", None) or ():
            own = layer(own)
        if part.matching is not None:
            own = _with(unmerge(own[:, image], part.matching), own, image)
        if text is None:
            return own
        return own, output_of_text if attn.context_pre_only else attn.to_add_out(output_of_text)

    def _mediated(self, query: Parts, key: Tensor, value: Parts, bias: Any, agents: Tensor, image: slice) -> Tensor:
        """Attention in which agents stand between the image's queries and all keys."""
        (own, *of_text), every = query, torch.cat(value, 2)
        scales: dict[str, Any] = {"k_scale2": self.k_scale2, "k_shortcut": 0.0, "agent_bias": bias}
        handed = agent_attention(own[:, :, image], key, every, agents, **scales)
        handed = torch.add(handed, value[0][:, :, image], alpha=self.k_shortcut)
        around = torch.cat((own[:, :, : image.start], own[:, :, image.stop :], *of_text), 2)
        others = F.scaled_dot_product_attention(around, key, every, bias)
        return torch.cat((others[:, :, : image.start], handed, others[:, :, image.start :]), 2)


@dataclass(frozen=True, eq=False)  # the compiler of PyTorch 2.6 hashes what is called
class _Projections:
    """Queries, keys and values (``"q"``, ``"k"``, ``"v"``) of a layer, in heads, the first two at their places."""

    attn: Any
    text: Tensor | None
    table: Table | None  # of the text's places, and the tokens' after them

    def __call__(self, kind: str, rows: Tensor, places: Tensor) -> Parts:
        """Of tokens (B, S, C), at these places (S,) or (B, S), and of the text: (B, H, S, d) and (B, H, T, d)."""
        own, text = self.tokens(kind, rows, places), self.text
        if text is None:
            return (own,)
        first = torch.arange(text.shape[1], device=text.device)
        return own, self._heads(f"add_{kind}_proj", f"norm_added_{kind}", text, first)

    def tokens(self, kind: str, rows: Tensor, places: Tensor) -> Tensor:
        first = 0 if self.text is None else self.text.shape[1]
        return self._heads(f"to_{kind}", f"norm_{kind}", rows, places + first)

    def _heads(self, projection: str, norm: str, rows: Tensor, places: Tensor) -> Tensor:
        heads: Tensor = getattr(self.attn, projection)(rows).unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)
        if norm.endswith("v"):
            return heads
        heads = heads if getattr(self.attn, norm) is None else getattr(self.attn, norm)(heads)
        return heads if self.table is None else _rotated(heads, *(t[places].to(heads.device) for t in self.table))


def _with(image: Tensor, tokens: Tensor, instead: slice) -> Tensor:
    """``tokens``, (B, N, C), with those of the image in the place of these."""
    return torch.cat((tokens[:, : instead.start], image, tokens[:, instead.stop :]), 1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, S, d) by (S, d) or (B, S, d): pairs of neighbours are turned."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x.float() * cos.unsqueeze(-3) + turned.float() * sin.unsqueeze(-3)).to(x.dtype)
