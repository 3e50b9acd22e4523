"""Muon: momentum whose update of a matrix is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Matrices of one shape are updated together, as a batch: a small transformer has a hundred of them, and one by one their
Newton-Schulz iterations would take a GPU longer to start than to compute.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, steepest at zero


def orthogonalized(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices of ``(K, rows, columns)``, singular values between about 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the size of an AdamW update (Liu et al. 2025, arXiv 2502.16982).

    AdamW takes the parameters that are no matrices.

    Args:
        parameters: matrices, ``(rows, columns)``.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01):
        parameters = list(parameters)
        shapes = sorted({tuple(p.shape) for p in parameters})
        groups = [{"params": [p for p in parameters if p.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            grads = torch.stack([p.grad for p in matrices])
            state = self.state[matrices[0]]
            if "mean" not in state:
                state["mean"] = torch.zeros_like(grads)
            mean = state["mean"].lerp_(grads, 1 - momentum)
            updates = orthogonalized(grads.lerp(mean, momentum))
            size = 0.2 * max(updates.shape[-2:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates.unbind()), alpha=-size * group["lr"])
