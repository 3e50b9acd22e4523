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
from agentsd.merge import merge, unmerge
from agentsd.processor import AgentAttnProcessor, keeper, processor_of
from agentsd.schedule import Counts

PROCESSORS = (FluxAttnProcessor, JointAttnProcessor2_0)  # that compute plain joint attention
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

    def around(self, image: Tensor, length: int) -> Tensor:
        """``image``, places among the image tokens (..., D), as places among ``length`` tokens, with all others."""
        others = torch.arange(length, device=image.device).expand(*image.shape[:-1], length)
        behind = others[..., self.before + self.tokens :]
        return torch.cat((others[..., : self.before], image + self.before, behind), dim=-1)

    def place(self, matching: Matching) -> Tensor:
        """Where a group is: with its dst token, or its only one. (B, M)."""
        batch, tokens, groups = matching.shape
        group, order = matching.group.view(batch, tokens), self.partition.order.long().expand(batch, -1)
        group = (group - torch.arange(batch, device=group.device)[:, None] * groups).gather(1, order)
        place, dst = order.new_zeros(batch, groups), self.partition.num_dst
        place.scatter_(1, group[:, dst:], order[:, dst:])
        return place.scatter_(1, group[:, :dst], order[:, :dst])


def sizes(matching: Matching) -> Tensor:
    """How many tokens each group has, (B, M)."""
    batch, _, groups = matching.shape
    ones = torch.ones(len(matching.group), device=matching.group.device)
    return torch.zeros(batch * groups, device=ones.device).index_add_(0, matching.group, ones).view(batch, groups)


class JointAttnProcessor(AgentAttnProcessor):
    """Joint attention for single calls of a layer, of the `Part` that its block has put down for it."""

    @property
    def part(self) -> Part | None:
        running = self._now.call.running if self._now.call is not None else None
        return running.joint if running is not None else None

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
        part, x, text = self.part, hidden_states, encoder_hidden_states
        if part is None:
            rotary = () if image_rotary_emb is None else (image_rotary_emb,)
            return self.own(attn, x, text, attention_mask, *rotary)
        self._taken_up()
        self.give_back(attn)
        first = 0 if text is None else text.shape[1]
        image = slice(part.before, part.before + part.tokens)

        def heads(projection: Any, norm: Any, rows: Tensor, places: Tensor | None) -> Tensor:
            """(B, S, C) -> (B, H, S, d), at these places of the table: (S,) or (B, S)."""
            projected: Tensor = projection(rows).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            projected = norm(projected) if norm is not None else projected
            if image_rotary_emb is None or places is None:
                return projected
            return _rotated(projected, *(table[places].to(projected.device) for table in image_rotary_emb))

        if part.matching is None:
            at = part.around(part.partition.dst.long(), x.shape[1])
            rows, fewer = x, x.index_select(1, at)
            asking = torch.arange(x.shape[1], device=x.device)
            stands_for = x.new_full((1, part.partition.num_dst), part.tokens / part.partition.num_dst)
        else:
            at = asking = part.around(part.place(part.matching), x.shape[1])
            rows = fewer = torch.cat((x[:, : image.start], merge(x[:, image], part.matching), x[:, image.stop :]), 1)
            stands_for = sizes(part.matching).to(x.dtype)
        query = heads(attn.to_q, attn.norm_q, rows, asking + first)
        key, value = heads(attn.to_k, attn.norm_k, fewer, at + first), heads(attn.to_v, None, fewer, None)
        keys, weights = [key], [_counted(stands_for, part.before, key.shape[2])]
        queries, values = [query], [value]
        if text is not None:
            places = torch.arange(first, device=x.device)
            queries.append(heads(attn.add_q_proj, attn.norm_added_q, text, places))
            keys.append(heads(attn.add_k_proj, attn.norm_added_k, text, places))
            values.append(heads(attn.add_v_proj, None, text, None))
            weights.append(weights[0].new_zeros(len(weights[0]), first))
        every = _Keys(torch.cat(keys, 2), torch.cat(values, 2), torch.cat(weights, 1)[:, None, None])
        if part.partition.num_dst == part.tokens:
            every = _Keys(every.key, every.value, None)
        if part.agents is None:
            output = every.attended_by(torch.cat(queries, 2))
        else:
            merged = slice(part.before, part.before + stands_for.shape[1])
            places = part.place(part.agents) + part.before + first
            agents = heads(attn.to_q, attn.norm_q, merge(x[:, image], part.agents), places)
            mediated = agent_attention(
                query[:, :, merged], every.key, every.value, agents, k_scale2=self.k_scale2, k_shortcut=0.0,
                agent_bias=every.bias,
            )  # fmt: skip
            mediated = torch.add(mediated, value[:, :, merged], alpha=self.k_shortcut)
            around = (query[:, :, : merged.start], query[:, :, merged.stop :], *queries[1:])
            others = every.attended_by(torch.cat(around, 2))
            output = torch.cat((others[:, :, : merged.start], mediated, others[:, :, merged.start :]), 2)
        output = output.transpose(1, 2).flatten(2).to(x.dtype)  # (B, H, S, d) -> (B, S, H * d)
        own, output_of_text = output[:, : query.shape[2]], output[:, query.shape[2] :]
        for layer in getattr(attn, "to_out", None) or ():
            own = layer(own)
        if part.matching is not None:
            groups = slice(part.before, part.before + stands_for.shape[1])
            own = torch.cat((own[:, : groups.start], unmerge(own[:, groups], part.matching), own[:, groups.stop :]), 1)
        if text is None:
            return own
        return own, output_of_text if attn.context_pre_only else attn.to_add_out(output_of_text)


@dataclass(frozen=True)
class _Keys:
    key: Tensor
    value: Tensor
    bias: Tensor | None

    def attended_by(self, query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, self.key, self.value, self.bias)


def _counted(stands_for: Tensor, before: int, length: int) -> Tensor:
    """log(n) for each of the image's keys, and 0 for those around them: (B, D) -> (B, ``length``)."""
    return F.pad(stands_for.log(), (before, length - before - stands_for.shape[1]))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, S, d) by (S, d) or (B, S, d): pairs of neighbours are turned."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x.float() * cos.unsqueeze(-3) + turned.float() * sin.unsqueeze(-3)).to(x.dtype)
