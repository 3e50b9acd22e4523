"""Agent attention against its formula."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agentsd.attention import agent_attention


def formula(query, key, value, agents, k_scale2, k_shortcut):
    query, key, value, agents = (x.double() for x in (query, key, value, agents))
    scale = query.shape[-1] ** -0.5
    gather = torch.softmax(agents @ key.mT * scale, -1)
    hand_out = torch.softmax(query @ agents.mT * scale**k_scale2, -1)
    return hand_out @ (gather @ value) + k_shortcut * value


def inputs(tokens=50, agents=7, dim=16, dtype=torch.float32, magnitude=1.0):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(2, 3, n, dim, generator=generator).mul(magnitude).to(dtype)
    return draw(tokens), draw(tokens), draw(tokens), draw(agents)


@pytest.mark.parametrize("k_scale2, k_shortcut", [(0.3, 0.075), (1.0, 0.0), (0.6, 0.2), (0.0, -1.0)])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)],
)
def test_equals_the_formula(k_scale2, k_shortcut, dtype, tolerance):
    tensors = inputs(dtype=dtype)
    out = agent_attention(*tensors, k_scale2=k_scale2, k_shortcut=k_shortcut)
    assert out.dtype == dtype
    expected = formula(*tensors, k_scale2, k_shortcut)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_queries_and_keys_do_not_overflow(dtype):
    """Products far beyond float16's 65,504, as in Stable Diffusion 2.1: they must be accumulated in float32."""
    query, key, value, agents = inputs(dim=64, dtype=dtype, magnitude=200.0)
    assert (query.float() @ agents.float().mT).abs().max() > 2 * torch.finfo(torch.float16).max
    value = value / 200
    out = agent_attention(query, key, value, agents)
    assert out.isfinite().all()
    expected = formula(query, key, value, agents, 0.3, 0.075)
    torch.testing.assert_close(out.double(), expected, atol=0.05, rtol=0.05)


def test_no_attention_map_is_materialised():
    """The largest tensor that any operation makes has as many elements as an input."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    query, key, value, agents = inputs(tokens=400, agents=100)
    with Largest() as largest:
        agent_attention(query, key, value, agents)
    assert largest.numel == query.numel()
