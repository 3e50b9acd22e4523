"""Agent attention (Han et al., ECCV 2024, arXiv 2312.08874), in the form its authors use for Stable Diffusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def agent_attention(
    query: Tensor, key: Tensor, value: Tensor, agents: Tensor, *, k_scale2: float = 0.3, k_shortcut: float = 0.075
) -> Tensor:
    """Attention through a few agent tokens, of cost linear in the tokens::

        O = softmax(Q A^T * d^(-k_scale2 / 2)) softmax(A K^T * d^(-1 / 2)) V + k_shortcut * V

    The agents first gather from all tokens, then hand out to all tokens. Both products go through
    `torch.nn.functional.scaled_dot_product_attention`, so that neither attention map is ever in memory and the sums
    are accumulated in float32.

    Args:
        query, key, value: (B, H, M, d), one row for each token in all three, since the shortcut adds V to O.
        agents: (B, H, A, d), projected as queries are.
        k_scale2: exponent of the usual scale ``d ** -0.5`` in the second product.
        k_shortcut: weight of V in the output.

    Returns:
        (B, H, M, d)
    """
    gathered = F.scaled_dot_product_attention(agents, key, value)  # (B, H, A, d)
    output = F.scaled_dot_product_attention(query, agents, gathered, scale=query.shape[-1] ** (-k_scale2 / 2))
    return torch.add(output, value, alpha=k_shortcut)
