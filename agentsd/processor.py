"""Agent attention as a diffusers attention processor."""

from __future__ import annotations

from typing import Any

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


def can_use_agents(attn: Any) -> bool:
    """Whether agent attention can stand in for ``attn``: plain self-attention without extras of its own."""
    extras = attn.residual_connection or attn.group_norm is not None or attn.spatial_norm is not None
    return type(attn.processor) in PLAIN_PROCESSORS and not extras


def can_sample_kv(attn: Any) -> bool:
    """Whether ``attn`` may take its keys and values from other rows than its queries: a fused projection cannot.

    The processor says which projection runs. A layer that was fused and unfused still claims to be fused.
    """
    return type(attn.processor) in PLAIN_PROCESSORS and type(attn.processor).__name__ != "FusedAttnProcessor2_0"


class AgentAttnProcessor:
    """Agent attention for single calls of an attention layer.

    It puts the layer's own processor back before it computes, so that between calls, and after any error, each layer
    has the very processor that its user gave it: what diffusers does to processors (adapters, fusing, slicing, other
    back ends) works as without a patch, and there is nothing to undo.

    Args:
        k_scale2, k_shortcut: the constants of `agent_attention`.
    """

    def __init__(self, k_scale2: float, k_shortcut: float) -> None:
        self.k_scale2 = k_scale2
        self.k_shortcut = k_shortcut
        self._own: Any = None
        self.agents: Tensor | None = None  # (B, A, C), of the call taken over

    def take_over(self, attn: Any, agents: Tensor) -> None:
        """Compute the next call of ``attn``, with ``agents`` (B, A, C), before projection."""
        self._own, attn.processor, self.agents = attn.processor, self, agents

    def give_back(self, attn: Any) -> None:
        """Put the layer's own processor back, if it is taken over, and forget the agents."""
        if attn.processor is self:
            attn.processor = self._own
        self._own = self.agents = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, M, C) merged tokens -> (B, M, C)."""
        tokens = self.agents
        self.give_back(attn)
        query, agents = _heads(attn, attn.to_q(hidden_states)), _heads(attn, attn.to_q(tokens))
        key, value = _heads(attn, attn.to_k(hidden_states)), _heads(attn, attn.to_v(hidden_states))
        if attn.norm_q is not None:
            query, agents = attn.norm_q(query), attn.norm_q(agents)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        output = agent_attention(query, key, value, agents, k_scale2=self.k_scale2, k_shortcut=self.k_shortcut)
        output = output.transpose(1, 2).flatten(2)  # (B, H, M, d) -> (B, M, H * d)
        for layer in attn.to_out:  # projection and dropout
            output = layer(output)
        return output.div(attn.rescale_output_factor)


def _heads(attn: Any, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    return x.view(batch, tokens, attn.heads, -1).transpose(1, 2)  # (B, M, H * d) -> (B, H, M, d)
