"""A patched block, through the public API, against the algorithm written as plainly as it can be: loops and einsum."""

import pytest
import torch
from conftest import make_unet, unet_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

import agentsd

HEADS = {"sd15": 4, "sd21": 2}


def groups_of(x, edges, dst, alone, r):
    """Tokens by group: each dst with those of the ``r`` best edges that lead to it, then the rest on their own."""
    groups = {d: [d] for d in dst}
    for _, s, d in edges[:r]:
        groups[d].append(s)
    return list(groups.values()) + [[s] for _, s, _ in edges[r:]] + [[s] for s in alone]


def mean(x, groups):
    return torch.stack([x[group].mean(0) for group in groups])


def spread(y, groups, tokens):
    out = y.new_empty(tokens, y.shape[-1])
    for row, group in zip(y, groups, strict=True):
        out[group] = row
    return out


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def attend(attn, x, context, agents=None, k_scale2=0.3, k_shortcut=0.075):
    """Attention of (N, C) tokens with both maps written out."""
    q, k, v = (split(f(y), attn.heads) for f, y in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context)))
    scale = q.shape[-1] ** -0.5
    if agents is None:
        out = torch.einsum("hqk,hkd->hqd", (torch.einsum("hqd,hkd->hqk", q, k) * scale).softmax(-1), v)
    else:
        a = split(attn.to_q(agents), attn.heads)
        gather = (torch.einsum("had,hkd->hak", a, k) * scale).softmax(-1)
        hand_out = (torch.einsum("hqd,had->hqa", q, a) * scale**k_scale2).softmax(-1)
        out = torch.einsum("hqa,had->hqd", hand_out, torch.einsum("hak,hkd->had", gather, v)) + k_shortcut * v
    return attn.to_out[0](out.transpose(0, 1).flatten(1))


def plain_block(block, x, context, grid, kwargs):
    """One sample (N, C) through a `BasicTransformerBlock` under a patch without random draws."""
    height, width = grid
    agent_phase = kwargs["agent_steps"] == 1
    sy, sx = (kwargs["agent_sy"], kwargs["agent_sx"]) if agent_phase else (kwargs["sy"], kwargs["sx"])
    tokens = height * width
    dst = [y * sy * width + x_ * sx for y in range(height // sy) for x_ in range(width // sx)]
    src = [n for n in range(tokens) if n not in set(dst)]
    unit = x / x.norm(dim=-1, keepdim=True)
    similarity = (unit @ unit.T).tolist()
    edges = sorted(((*max((similarity[s][d], d) for d in dst), s) for s in src) if dst else [], reverse=True)
    edges = [(score, s, d) for score, d, s in edges]
    alone = [] if dst else src
    r = min(int(tokens * kwargs["ratio"]), len(edges))
    groups = groups_of(x, edges, dst, alone, r)
    agent_r = min(len(edges), int(tokens * kwargs["agent_ratio"]))
    agents = None
    if agent_phase and r > 0 and 2 * (tokens - agent_r) < tokens - r:
        agents = groups_of(x, edges, dst, alone, agent_r)

    def around(layer, y, merged):
        return spread(layer(mean(y, groups)), groups, tokens) if merged else layer(y)

    normed = block.norm1(x)
    constants = {name: kwargs[name] for name in ("k_scale2", "k_shortcut")}
    if agents is not None and kwargs["merge_attn"]:
        constants["agents"] = mean(normed, agents)
    x = x + around(lambda y: attend(block.attn1, y, y, **constants), normed, kwargs["merge_attn"])
    x = x + around(lambda y: attend(block.attn2, y, context), block.norm2(x), kwargs["merge_crossattn"])
    return x + around(block.ff, block.norm3(x), kwargs["merge_mlp"])


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_patched_block_is_the_plain_algorithm(kind, data):
    draw, stride, switch = data.draw, st.integers(1, 5), st.booleans()
    grid, batch = (draw(st.integers(4, 14)), draw(st.integers(4, 14))), draw(st.integers(1, 3))
    kwargs = {name: draw(stride) for name in ("sx", "sy", "agent_sx", "agent_sy")}
    kwargs["agent_steps"] = draw(st.sampled_from([0.0, 1.0]))
    prefix = "agent_" if kwargs["agent_steps"] else ""
    most = 1 - 1 / (kwargs[prefix + "sx"] * kwargs[prefix + "sy"])
    kwargs |= {
        "ratio": draw(st.floats(0.05, 0.95)) * most,
        "agent_ratio": draw(st.floats(0.5, 0.99)),
        "k_scale2": draw(st.floats(0, 1.5)),
        "k_shortcut": draw(st.floats(-0.5, 0.5)),
        "merge_attn": draw(switch),
        "merge_crossattn": draw(switch),
        "merge_mlp": draw(switch),
    }
    if kwargs["ratio"] == 0 or not any(kwargs[f"merge_{name}"] for name in ("attn", "crossattn", "mlp")):
        return
    unet = make_unet(kind).double()
    agentsd.apply_patch(unet, use_rand=False, **kwargs)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    calls = []
    block.register_forward_hook(lambda m, args, kw, out: calls.append((args[0], out)), with_kwargs=True)
    inputs = unet_inputs(batch=batch, height=grid[0], width=grid[1])
    inputs = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    unet(**inputs)
    agentsd.remove_patch(unet)
    x, out = calls[0]
    for i in range(batch):
        expected = plain_block(block, x[i], inputs["encoder_hidden_states"][i], grid, kwargs)
        torch.testing.assert_close(out[i], expected, atol=1e-9, rtol=1e-9)
