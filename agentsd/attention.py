"""Agent attention (Han et al., ECCV 2024, arXiv 2312.08874): the one implementation of its two softmaxes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    *,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
    agent_bias: Tensor | None = None,
    token_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention through a few agent tokens, of cost linear in the tokens::

        O = softmax(Q A^T * d^(-k_scale2 / 2) + B2) softmax(A K^T * d^(-1 / 2) + B1) V + k_shortcut * V

    The agents first gather from all tokens, then hand out to all tokens. Both products go through
    `torch.nn.functional.scaled_dot_product_attention`, so that neither attention map is ever in memory and the sums
    are accumulated in float32.

    The defaults are those of the paper's Stable Diffusion. Its vision models have ``k_scale2=1``, ``k_shortcut=0``
    and both biases (equations 4 to 6).

    Args:
        query: (B, H, M, d)
        key, value: (B, H, N, d). ``k_shortcut`` adds V to O, so it needs N = M.
        agents: (B, H, A, d), projected as queries are.
        k_scale2: exponent of the usual scale ``d ** -0.5`` in the second product.
        k_shortcut: weight of V in the output.
        agent_bias: B1, broadcast to (B, H, A, N), in the dtype of the query.
        token_bias: B2, broadcast to (B, H, M, A), in the dtype of the query.
        dropout_p: dropout after each softmax.

    Returns:
        (B, H, M, d)
    """
    gathered = F.scaled_dot_product_attention(agents, key, value, agent_bias, dropout_p)  # (B, H, A, d)
    scale = query.shape[-1] ** (-k_scale2 / 2)
    output = F.scaled_dot_product_attention(query, agents, gathered, token_bias, dropout_p, scale=scale)
    return torch.add(output, value, alpha=k_shortcut) if k_shortcut else output
