"""The module: the official one's numbers, the equations written out, and what people do with modules."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from golden import filled, load
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agentsd.vision import AgentAttention, agent_attention
from agentsd.vision.agent_cswin import AgentBranch
from agentsd.vision.attention import ReducedAgentAttention

CASES, TENSORS = load("attention")
MODULES = {
    "deit": lambda: AgentAttention(32, 2, (6, 6), 9, class_tokens=1),
    "pvt": lambda: ReducedAgentAttention(32, 2, (8, 8), 9),
    "swin": lambda: AgentAttention(48, 3, (9, 9), 16),
    "cswin_idx_full": lambda: AgentBranch(32, 2, (1, 1), (12, 12), 9),
    "cswin_idx0": lambda: AgentBranch(32, 2, (1, 3), (12, 12), 9),
    "pvt_backbone": lambda: ReducedAgentAttention(32, 2, (8, 8), 9, agent_shape=(5, 4)),
}
GRIDS = {"cswin_idx_full": (12, 12), "cswin_idx0": (12, 12), "pvt_backbone": (6, 10)}


@pytest.mark.parametrize("case", CASES)
def test_official_numbers(case: str) -> None:
    module, x = filled(MODULES[case]()), TENSORS[f"{case}/x"]
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == CASES[case]["state_dict"]
    for dtype, expected, tolerance in ((torch.float32, "out", 1e-5), (torch.float64, "out_f64", 1e-12)):
        inputs = x.to(dtype)
        module = module.to(dtype)
        y = module(*inputs, GRIDS[case]) if case.startswith("cswin") else module(inputs, GRIDS.get(case))
        torch.testing.assert_close(y, TENSORS[f"{case}/{expected}"], atol=tolerance, rtol=0)


def written_out(module: AgentAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Equations 4 to 6 with the attention maps in memory, on the grid that the module was built for."""
    (height, width), n, heads = grid, module.side**2, module.num_heads
    q, k, v = module.qkv(x).chunk(3, -1)
    images = [t[:, module.class_tokens :].transpose(1, 2).unflatten(2, grid) for t in (q, v)]
    agents = F.adaptive_avg_pool2d(images[0], module.side).flatten(2).transpose(1, 2)
    q, k, v, agents = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v, agents))
    up = nn.Upsample(grid, mode="bilinear")
    b1 = (up(module.an_bias) + (module.ah_bias + module.aw_bias)[0]).reshape(1, heads, n, height * width)
    b2 = up(module.na_bias).reshape(1, heads, n, -1).transpose(2, 3)
    b2 = b2 + (module.ha_bias + module.wa_bias).reshape(1, heads, height * width, n)
    if module.class_tokens:
        b1, b2 = torch.cat([module.ac_bias, b1], 3), torch.cat([module.ca_bias, b2], 2)
    scale = q.shape[-1] ** -0.5
    gathered = torch.softmax(agents @ k.mT * scale + b1, -1) @ v
    out = (torch.softmax(q @ agents.mT * scale + b2, -1) @ gathered).transpose(1, 2).flatten(2)
    out[:, module.class_tokens :] += module.dwc(images[1]).flatten(2).transpose(1, 2)
    return module.proj(out)


@pytest.mark.parametrize(("grid", "agents", "class_tokens"), [((5, 8), 4, 0), ((7, 7), 49, 1), ((3, 4), 25, 2)])
def test_is_the_equations(grid: tuple[int, int], agents: int, class_tokens: int) -> None:
    module = filled(AgentAttention(24, 3, grid, agents, class_tokens=class_tokens)).double()
    x = torch.randn(2, class_tokens + grid[0] * grid[1], 24, dtype=torch.float64)
    torch.testing.assert_close(module(x), written_out(module, x, grid), atol=1e-12, rtol=0)


def test_biases_and_dropout_default_to_none() -> None:
    q, k, v, agents = (torch.randn(2, 3, n, 8) for n in (20, 20, 20, 4))
    zero = agent_attention(q, k, v, agents, agent_bias=torch.zeros(1, 3, 4, 20), token_bias=torch.zeros(1, 3, 20, 4))
    torch.testing.assert_close(agent_attention(q, k, v, agents), zero)
    assert not torch.equal(zero, agent_attention(q, k, v, agents, dropout_p=0.5))


def test_any_grid_at_run_time() -> None:
    """Another grid's biases are those of a module of that grid that was loaded from this one."""
    module = filled(AgentAttention(24, 3, (6, 6), 9, class_tokens=1))
    other = AgentAttention(24, 3, (9, 5), 9, class_tokens=1)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 46, 24)
    torch.testing.assert_close(module(x, (9, 5)), other(x))


@pytest.mark.parametrize("module", [AgentAttention, ReducedAgentAttention])
@torch.enable_grad()
def test_an_empty_batch(module: type[AgentAttention]) -> None:
    x = torch.empty(0, 36, 24, requires_grad=True)
    y = module(24, 3, (6, 6), 9)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


def test_class_tokens_are_not_pooled() -> None:
    """A class token changes others only as a key: without its key and value they do not see it."""
    module = filled(AgentAttention(24, 3, (4, 4), 4, class_tokens=1))
    with torch.no_grad():
        module.ac_bias.fill_(-1e4)  # no agent looks at it
    x = torch.randn(1, 17, 24)
    changed = x.clone()
    changed[:, 0] = torch.randn(24)
    torch.testing.assert_close(module(x)[:, 1:], module(changed)[:, 1:])
    assert not torch.allclose(module(x)[:, 0], module(changed)[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module, x = filled(AgentAttention(64, 4, (8, 8), 16)), torch.randn(2, 64, 64)
    expected = module(x)
    module, x = module.to(dtype), x.to(dtype)
    torch.testing.assert_close(module(x).float(), expected, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(module.float()(x.float()).float(), expected, atol=0.05, rtol=0.05)


def test_compiles_to_one_graph() -> None:
    module = filled(AgentAttention(24, 3, (6, 6), 9, class_tokens=1))
    x = torch.randn(2, 37, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@torch.enable_grad()
def test_checkpointing_gives_the_same_gradients() -> None:
    module, x = filled(AgentAttention(24, 3, (6, 6), 9)), torch.randn(2, 36, 24)
    gradients = []
    for call in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        module.zero_grad()
        call(x).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
    assert all(g.abs().sum() > 0 for g in gradients[0].values()), "a parameter that nothing learns from"
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("class_tokens", [0, 1])
@torch.enable_grad()  # where attention that has a bias to train takes another kernel
def test_exports_to_onnx(class_tokens: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module = filled(AgentAttention(24, 3, (10, 7), 9, class_tokens=class_tokens))
    x = torch.randn(2, class_tokens + 70, 24)
    program, file = torch.onnx.export(module, (x,), dynamo=True, verbose=False), io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), module(x).detach(), atol=1e-5, rtol=1e-5)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="agents=50 is not a square"):
        AgentAttention(24, 3, (6, 6), 50)
    with pytest.raises(ValueError, match="dim=25 is not a multiple of num_heads=3"):
        AgentAttention(25, 3, (6, 6))
    with pytest.raises(ValueError, match="leave agent_shape out"):
        AgentAttention(24, 3, (6, 6), class_tokens=1, agent_shape=(2, 2))
    with pytest.raises(ValueError, match="35 tokens, but a grid of 6x6 and 0 class tokens are 36"):
        AgentAttention(24, 3, (6, 6))(torch.randn(1, 35, 24))
