"""Agent attention as a diffusers attention processor."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from numbers import Number
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from diffusers.models import attention_processor as diffusers_processors
from torch import Tensor, nn

from agentsd.attention import agent_attention
from agentsd.planner import Now
from agentsd.schedule import Counts
from agentsd.wrapping import Wrap

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

# of what a processor has: these hold nothing of a call, and those that diffusers and modules have do not either
INERT = (Number, str, Enum, type(None), type, FunctionType, BuiltinFunctionType, nn.Module, torch.dtype, torch.device)
USUAL = {"_attention_backend", "_parallel_config", *vars(nn.Module())}


def processor_of(attn: Any) -> Any:
    """The layer's own processor, also while a call of another thread has taken it over; None where it has none."""
    processor = getattr(attn, "processor", None)
    return processor.own if isinstance(processor, AgentAttnProcessor) else processor


def looks_on(processor: Any) -> bool:
    """Whether a processor may hold what it sees beyond a call, or count its calls.

    Those of diffusers' models do not. Others may, where they have attention maps, tensors that are no parameters, or
    an object that is no part of a network: a store, a controller.
    """
    if type(processor).__module__.startswith("diffusers.models."):
        return False
    for name, value in getattr(processor, "__dict__", {}).items():
        several = isinstance(value, list | tuple | dict) and len(value)  # what is empty is there to be filled
        parts = (value.values() if isinstance(value, dict) else value) if several else [value]
        if name == "attention_probs" or not (name in USUAL or all(isinstance(part, INERT) for part in parts)):
            return True
    return False


def keeper(layer: Any) -> str:
    """Who may keep for a later call what the layer gives, or looks into its attention: empty where nobody does.

    What is made of merged tokens fits no other call: each has an order of its own. accelerate and compilers keep none.
    """
    hooks = getattr(getattr(layer, "_diffusers_hook", None), "hooks", None)
    return ", ".join(hooks) if hooks and _replaced(layer) is not None else watcher(layer)


def watcher(layer: Any) -> str:
    """Who looks on at every call of the layer, by its processor or in the place of its ``forward``; hooks do not."""
    if looks_on(processor_of(layer)):
        return type(processor_of(layer)).__name__
    forward = _replaced(layer)
    if forward is None or getattr(getattr(layer, "_diffusers_hook", None), "hooks", None):
        return ""
    return getattr(forward, "__name__", type(forward).__name__)


def _replaced(layer: Any) -> Any:
    """What stands in the place of the layer's ``forward``."""
    forward = layer.__dict__.get("forward")  # vars() the compiler of PyTorch 2.6 does not know
    own = hasattr(forward, "_torchdynamo_orig_callable") or hasattr(layer, "_hf_hook")
    if isinstance(forward, MethodType):  # of the layer itself, or a mark
        own = own or forward.__func__ is type(layer).forward or isinstance(forward.__self__, Wrap)
    return None if own else forward


def _has_extras(attn: Any) -> bool:
    return bool(attn.residual_connection or attn.group_norm is not None or attn.spatial_norm is not None)


def possible(attn: Any, counts: Counts) -> tuple[Counts, str]:
    """What self-attention can do of what is planned for its tokens, and why no more."""
    processor = type(processor_of(attn))
    plain = processor in PLAIN_PROCESSORS
    if counts.keys:
        # which projection runs, the processor says: a layer that was fused and unfused still claims to be fused
        if plain and processor.__name__ != "FusedAttnProcessor2_0":
            return counts, ""
        return Counts(counts.tokens), f"{processor.__name__} cannot sample keys and values"
    if counts.merged and (name := keeper(attn)):
        return Counts(counts.tokens), f"{name} may keep what it gives"
    if counts.agents and (not plain or _has_extras(attn)):
        return replace(counts, agents=0), f"no agents: {processor.__name__} is kept and gets merged tokens"
    return counts, ""


class AgentAttnProcessor:
    """Agent attention for single calls of an attention layer.

    It puts the layer's own processor back before it computes, so that between calls, and after any error, each layer
    has the very processor that its user gave it: what diffusers does to processors (adapters, fusing, slicing, other
    back ends) works as without a patch, and there is nothing to undo. A call of another thread that meets it in the
    meantime gets the layer's own.

    Args:
        now: whose running block hands over the agents.
        k_scale2, k_shortcut: the constants of `agent_attention`.
    """

    def __init__(self, now: Now, k_scale2: float, k_shortcut: float) -> None:
        self.k_scale2 = k_scale2
        self.k_shortcut = k_shortcut
        self._now = now
        self.own: Any = None  # of the layer
        self._calls = 0  # that have taken the layer over, and not come yet
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"now": self._now, "k_scale2": self.k_scale2, "k_shortcut": self.k_shortcut}

    def __setstate__(self, state: dict[str, Any]) -> None:
        AgentAttnProcessor.__init__(self, **state)

    def take_over(self, attn: Any, handed: Any) -> None:
        """Compute the next call of ``attn`` in this thread, with what its running block hands over."""
        running = self._now.running
        if running is not None:
            running.handed = handed
        with nullcontext() if torch.compiler.is_compiling() else self._lock:
            if attn.processor is not self:
                self.own, attn.processor = attn.processor, self
            self._calls += 1

    def give_back(self, attn: Any, calls: int = 1) -> None:
        """Put the layer's own processor back, unless more than ``calls`` are to come."""
        with nullcontext() if torch.compiler.is_compiling() else self._lock:
            self._calls = max(self._calls - calls, 0)
            if not self._calls and getattr(attn, "processor", None) is self:
                attn.processor = self.own

    def _take_up(self, attn: Any) -> Any:
        """What was handed over for this call; None for one that was not taken over, as of another thread."""
        running = self._now.running
        if running is None or running.handed is None:
            return None
        handed, running.handed = running.handed, None
        self.give_back(attn)
        return handed

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, M, C) merged tokens -> (B, M, C). What is handed over are agents (B, A, C), before projection."""
        tokens = self._take_up(attn)
        if tokens is None:
            return cast(Tensor, self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb))
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
