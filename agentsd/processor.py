"""The attention processor of a patched self-attention layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers.models import attention_processor as diffusers_processors
from torch import Tensor

from agentsd.attention import agent_attention

# What agent attention may stand in for: the processors that compute plain self-attention, each in its own way.
PLAIN_PROCESSORS = tuple(
    getattr(diffusers_processors, name)
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    )
    if hasattr(diffusers_processors, name)
)


class Agents(NamedTuple):
    """The agents of one attention call: (B, A, C) tokens, before projection, and the constants of the formula."""

    tokens: Tensor
    k_scale2: float
    k_shortcut: float


class AgentAttnProcessor:
    """Agent attention while `agents` is set, else the processor that was found in place.

    Args:
        inner: the processor found in place. None, which diffusers passes where it rebuilds processors by their type
            (`load_ip_adapter`), means diffusers' default one.
    """

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner if inner is not None else diffusers_processors.AttnProcessor2_0()
        self.agents: Agents | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, M, C) -> (B, M, C): ``hidden_states`` has been merged already, and the caller unmerges."""
        output: Tensor
        if self.agents is None:
            output = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask)
            return output
        tokens, k_scale2, k_shortcut = self.agents
        query, agents = _heads(attn, attn.to_q, hidden_states), _heads(attn, attn.to_q, tokens)
        key, value = _heads(attn, attn.to_k, hidden_states), _heads(attn, attn.to_v, hidden_states)
        if attn.norm_q is not None:
            query, agents = attn.norm_q(query), attn.norm_q(agents)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        merged = agent_attention(query, key, value, agents, k_scale2=k_scale2, k_shortcut=k_shortcut)
        merged = merged.transpose(1, 2).flatten(2)  # (B, H, M, d) -> (B, M, H * d)
        projection, dropout = attn.to_out
        output = dropout(projection(merged)) / attn.rescale_output_factor
        return output


def _heads(attn: Any, projection: Any, x: Tensor) -> Tensor:
    heads: Tensor = projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, M, C) -> (B, H, M, d)
    return heads


def can_use_agents(attn: Any) -> bool:
    """Whether agent attention can stand in for ``attn``: plain self-attention without extras of its own."""
    extras = attn.residual_connection or attn.group_norm is not None or attn.spatial_norm is not None
    return type(attn.processor) in (AgentAttnProcessor, *PLAIN_PROCESSORS) and not extras
