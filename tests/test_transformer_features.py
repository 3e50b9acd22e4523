"""What a patch on a transformer has to bear: copies, compilation, and gradients of blocks that are run twice."""

import copy
import pickle

import pytest
import torch
from conftest import sweep
from tiny_transformers import Trajectory, make_transformer, transformer_inputs

import agentsd

WAYS = {
    "reuse": {"ratio": 0, "cache_interval": 3, "cache_order": 1, "cache_cell": 2},
    "agents": {"ratio": 0.6, "agent_steps": 1.0},
    "sampled": {"sample_kv": True},
    "merged": {"ratio": 0.6, "agent_steps": 0.0},
}
KINDS = ("sd35", "flux", "pixart")


@pytest.fixture(params=sweep(("reuse", "agents"), ("sampled", "merged")))
def way(request) -> dict:
    return WAYS[request.param]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def patched(net, kind, way) -> Trajectory:
    return agentsd.apply_patch(Trajectory(net, kind), seed=0, **way)


def test_a_copy_has_a_patch_of_its_own(kind, way):
    inputs = transformer_inputs(kind)
    pipe = patched(make_transformer(kind), kind, way)
    expected = pipe.run(inputs)
    twin = copy.deepcopy(pipe)
    agentsd.remove_patch(pipe)
    for found, known in zip(twin.run(inputs), expected, strict=True):
        assert torch.equal(found[0], known[0])
    agentsd.remove_patch(pickle.loads(pickle.dumps(twin.transformer)))


@pytest.mark.parametrize("order", ["compiled, patched", "patched, compiled"])
@pytest.mark.parametrize("settings", [{"preset": "balanced"}, {"ratio": 0.6, "cache_interval": 3}])
@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_blocks_compiled_one_by_one_have_graphs_for_each_kind_of_block_and_phase(kind, settings, order):
    """However many blocks there are, and at a second size, too: within the compiler's own limit of eight."""
    if "ratio" in settings and torch.__version__ < "2.10":
        pytest.skip("this version of PyTorch tells processors apart: a graph for each block")
    layers = {"num_layers": 20} | ({"num_single_layers": 21} if kind == "flux" else {})
    pipe, graphs = Trajectory(make_transformer(kind, **layers), kind), []
    small, large = transformer_inputs(kind), transformer_inputs(kind, height=24)

    def counted(module, _):
        graphs.append(module)
        return module.forward

    agentsd.apply_patch(pipe, seed=0, **settings)
    expected = pipe.run(small) + pipe.run(large)
    if order == "compiled, patched":
        agentsd.remove_patch(pipe)
    try:
        pipe.transformer.compile_repeated_blocks(backend=counted, fullgraph=True)
        if order == "compiled, patched":
            pipe.run(small)
            agentsd.apply_patch(pipe, seed=0, **settings)
        graphs.clear()
        found = pipe.run(small)
        phases, made = len(pipe.transformer._agentsd_patch.settings.phases), len(graphs)
        found += pipe.run(large)
    except (ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        agentsd.remove_patch(pipe)
        with pytest.raises(type(error)):
            pipe.transformer.compile_repeated_blocks(backend=counted, fullgraph=True)
            pipe.run(small)
        pytest.skip("this version of diffusers does not compile its blocks without the patch, either")
    for (a,), (b,) in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert made <= 4 * phases + 1  # for the block whose keys cached calls sample
    agentsd.remove_patch(pipe)
    unpatched = pipe.run(small)
    pipe.transformer.compile_repeated_blocks(backend=counted, fullgraph=True)
    for (a,), (b,) in zip(pipe.run(small), unpatched, strict=True):
        assert torch.equal(a, b)


def test_no_graph_breaks(kind, way):
    """With a back end that compiles nothing, which is faster. A graph for each phase, and one for cached calls."""
    net, inputs = make_transformer(kind), transformer_inputs(kind)
    expected = patched(net, kind, way).run(inputs)
    pipe, graphs = patched(net, kind, way), []

    def counted(module, _):
        graphs.append(module)
        return module.forward

    pipe.transformer = torch.compile(net, fullgraph=True, backend=counted)
    try:
        outputs = pipe.run(inputs)
    except torch._dynamo.exc.TorchDynamoException:
        agentsd.remove_patch(pipe)
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            Trajectory(torch.compile(net, fullgraph=True, backend=counted), kind).run(inputs)
        pytest.skip("this version of diffusers does not compile into one graph without the patch, either")
    for found, known in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, known, atol=1e-5, rtol=1e-4)
    assert len(graphs) == len(agentsd.Settings(**way).phases) + ("cache_interval" in way)


def test_a_block_that_is_run_twice_has_the_same_gradients(kind, way):
    net, inputs = make_transformer(kind).train(), transformer_inputs(kind)
    pipe, gradients = patched(net, kind, way), []
    with torch.enable_grad():
        for checkpoints in (False, True):
            if checkpoints:
                net.enable_gradient_checkpointing()
            net.zero_grad()
            pipe.call(0, inputs).square().mean().backward()
            gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
