"""Joint attention with fewer image tokens, against plain implementations of what it is to be."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from tiny_transformers import Trajectory, image_ids, make_transformer, transformer_inputs

import agentsd
from agentsd.patch import patch_of
from agentsd.schedule import Counts

KINDS = ("sd3", "sd35", "flux")
SAMPLED = {"sample_kv": True}
MERGED = {"ratio": 0.6, "agent_steps": 0.0}
AGENTS = {"ratio": 0.6, "agent_steps": 1.0}
WAYS = {"sampled": SAMPLED, "merged": MERGED, "agents": AGENTS}


def projected(attn, x, text, rotary):
    """Queries, keys and values of [text, tokens], (B, S, H, d), as diffusers makes them."""
    split = lambda y: y.unflatten(-1, (attn.heads, -1))
    normed = lambda norm, y: norm(y) if norm is not None else y
    q, k, v = normed(attn.norm_q, split(attn.to_q(x))), normed(attn.norm_k, split(attn.to_k(x))), split(attn.to_v(x))
    if text is not None:
        tq = normed(attn.norm_added_q, split(attn.add_q_proj(text)))
        tk = normed(attn.norm_added_k, split(attn.add_k_proj(text)))
        q, k, v = torch.cat((tq, q), 1), torch.cat((tk, k), 1), torch.cat((split(attn.add_v_proj(text)), v), 1)
    if rotary is not None:
        q, k = (apply_rotary_emb(y, rotary, sequence_dim=1) for y in (q, k))
    return q, k, v


def softmax(q, k, v, weight, power=1.0):
    """Attention in which a key counts ``weight`` times: (B, S, H, d) each, ``weight`` (B or 1, K)."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** (-power / 2) + weight.log()[:, None, None]
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def finished(attn, output, text, x):
    output, first = output.flatten(2), 0 if text is None else text.shape[1]
    own = output[:, first:]
    for layer in getattr(attn, "to_out", None) or ():
        own = layer(own)
    if text is None:
        return own
    return own, output[:, :first] if attn.context_pre_only else attn.to_add_out(output[:, :first])


def plainly(attn, part, x, text, rotary):
    """What a call of the layer is to give, from full tensors and loops."""
    first = (0 if text is None else text.shape[1]) + part.before
    image = slice(first, first + part.tokens)
    q, k, v = projected(attn, x, text, rotary)
    weight = torch.ones(len(x), k.shape[1])
    if part.matching is None:  # gathered after the rotary embedding
        gone = torch.ones(k.shape[1], dtype=torch.bool)
        gone[: image.start] = gone[image.stop :] = False
        gone[part.partition.dst.long() + first] = False
        weight[:, image] = part.tokens / part.partition.num_dst
        return finished(attn, softmax(q, k[:, ~gone], v[:, ~gone], weight[:, ~gone]), text, x)

    def merged(matching, b):
        """Means of the groups of one sample, where each is, and how many tokens it has."""
        group = matching.group[b] - b * matching.groups
        dst = set(part.partition.dst.tolist())
        members = [(group == g).nonzero().flatten().tolist() for g in range(matching.groups)]
        places = [next((i for i in m if i in dst), m[0]) for m in members]
        rows = torch.stack([x[b, [i + part.before for i in m]].mean(0) for m in members])
        return group, rows, places, torch.tensor([float(len(m)) for m in members])

    outputs = []
    for b in range(len(x)):
        group, rows, places, counts = merged(part.matching, b)
        fewer = torch.cat((x[b, : part.before], rows, x[b, part.before + part.tokens :]))[None]
        tokens = list(range(q.shape[1]))
        at = tokens[: image.start] + [p + first for p in places] + tokens[image.stop :]
        table = None if rotary is None else tuple(t[at] for t in rotary)
        mq, mk, mv = projected(attn, fewer, None if text is None else text[b : b + 1], table)
        kept = slice(first, first + len(rows))
        weight = torch.ones(1, mk.shape[1])
        weight[:, kept] = counts
        out = softmax(mq, mk, mv, weight)
        if part.agents is not None:
            _, agents, places, _ = merged(part.agents, b)
            table = None if rotary is None else tuple(t[[p + first for p in places]] for t in rotary)
            a = projected(attn, agents[None], None, table)[0]
            gathered = softmax(a, mk, mv, weight)
            handed = softmax(mq[:, kept], a, gathered, torch.ones(1, len(agents)), power=0.3)
            out[:, kept] = handed + 0.075 * mv[:, kept]
        outputs.append(torch.cat((out[:, : kept.start], out[:, kept][:, group], out[:, kept.stop :]), 1))
    return finished(attn, torch.cat(outputs), text, x)


def watched(net, kind):
    """Each call of joint attention: the layer, its arguments, its output and what was planned."""
    calls = []

    def before(attn, args, kwargs):
        patch = patch_of(net)
        running = patch._now.running if patch is not None else None
        calls.append([attn, kwargs, None, running.handed if running is not None else None])

    def after(attn, args, output):
        calls[-1][2] = output

    for name, module in net.named_modules():
        if name.endswith((".attn", ".attn2")):
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after)
    return calls


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(16, 16), (20, 18)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_gives_what_a_plain_implementation_gives(kind, way, size):
    """Of Kontext's reference tokens, which come last in Flux here, none is merged or left out."""
    net, inputs = make_transformer(kind), transformer_inputs(kind, 2, *size)
    if kind == "flux":
        reference = transformer_inputs(kind, 2, 8, 6)
        inputs["hidden_states"] = torch.cat((inputs["hidden_states"], reference["hidden_states"].flip(0)), 1)
        inputs["img_ids"] = torch.cat((inputs["img_ids"], image_ids(4, 3, image=1)))
    plain = Trajectory(net, kind).call(0, inputs)
    pipe = agentsd.apply_patch(Trajectory(net, kind), seed=0, **WAYS[way])
    calls = watched(net, kind)
    output = pipe.call(0, inputs)
    assert len(calls) == {"sd3": 4, "sd35": 6, "flux": 5}[kind]
    for attn, kwargs, found, part in tuple(calls):
        assert part is not None and (part.agents is not None) == (way == "agents")
        x, text = kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
        expected = plainly(attn, part, x, text, kwargs.get("image_rotary_emb"))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output, plain)
    agentsd.remove_patch(net)
    assert torch.equal(Trajectory(net, kind).call(0, inputs), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_of_one_token_change_nothing(kind, monkeypatch):
    net, inputs = make_transformer(kind), transformer_inputs(kind)
    expected = Trajectory(net, kind).call(0, inputs)
    pipe = agentsd.apply_patch(Trajectory(net, kind), **SAMPLED, sx=1, sy=1, agent_sx=1, agent_sy=1)
    torch.testing.assert_close(pipe.call(0, inputs), expected, atol=1e-6, rtol=0)
    monkeypatch.setattr("agentsd.planner._counts", lambda *_: Counts(64, keys=64))
    pipe = agentsd.apply_patch(Trajectory(net, kind), **SAMPLED, sx=1, sy=1, agent_sx=1, agent_sy=1)
    calls = watched(net, kind)
    torch.testing.assert_close(pipe.call(0, inputs), expected, atol=1e-5, rtol=0)
    assert all(part is not None for *_, part in calls)


@pytest.mark.parametrize("way", ["sampled", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_equal_tokens_loses_nothing(kind, way):
    """So the text keeps its weight. Without positions, which tell the tokens of an image apart."""
    net, inputs = make_transformer(kind), transformer_inputs(kind)
    inputs["hidden_states"] = torch.ones_like(inputs["hidden_states"])
    if kind == "flux":
        inputs["txt_ids"] = inputs["txt_ids"] * 0
        net.pos_embed.register_forward_hook(lambda _, __, table: (torch.ones_like(table[0]), table[1] * 0))
    else:
        net.pos_embed.pos_embed.zero_()
    expected = Trajectory(net, kind).call(0, inputs)
    pipe = agentsd.apply_patch(Trajectory(net, kind), **WAYS[way])
    torch.testing.assert_close(pipe.call(0, inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["sd3", "flux"])  # diffusers' own fused projections fail in 3.5's second attention
def test_layers_with_processors_of_others_are_left_alone_and_the_report_says_so(kind):
    net, inputs = make_transformer(kind), transformer_inputs(kind)
    net.fuse_qkv_projections()
    expected = Trajectory(net, kind).call(0, inputs)
    pipe = agentsd.apply_patch(Trajectory(net, kind), **SAMPLED)
    with pytest.warns(UserWarning, match="runs unpatched: .* is no plain joint attention"):
        assert torch.equal(pipe.call(0, inputs), expected)
    assert "is no plain joint attention" in str(agentsd.report(pipe))
    assert not agentsd.report(pipe).patched


@pytest.mark.parametrize(("backend", "alone"), [("native", False), ("_native_math", True)])
def test_attention_with_another_back_end_is_left_alone(backend, alone):
    net, inputs = make_transformer("flux"), transformer_inputs("flux")
    for processor in net.attn_processors.values():  # as set_attention_backend does, and for other models, too
        processor._attention_backend = backend
    expected = Trajectory(net, "flux").call(0, inputs)
    pipe = agentsd.apply_patch(Trajectory(net, "flux"), **SAMPLED)
    assert torch.equal(pipe.call(0, inputs), expected) == alone
    assert ("has a back end of its own" in str(agentsd.report(pipe))) == alone


@pytest.mark.parametrize("name", ["merge_mlp", "merge_crossattn"])
def test_what_joint_blocks_do_not_have_is_an_error(name):
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"{name}=True is not allowed: .* joint attention"):
            agentsd.apply_patch(make_transformer(kind), **{name: True})


def test_an_error_in_a_layer_leaves_its_processor(monkeypatch):
    for kind in KINDS:
        net, inputs = make_transformer(kind), transformer_inputs(kind)
        before = dict(net.attn_processors)
        pipe = agentsd.apply_patch(Trajectory(net, kind), **SAMPLED)
        handle = net.transformer_blocks[1].attn.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipe.call(0, inputs)
        handle.remove()
        assert net.attn_processors == before
        assert pipe.call(0, inputs).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_says_that_joint_attention_is_not_timed(kind):
    report = agentsd.report(agentsd.apply_patch(make_transformer(kind), ratio=0.4), measure=True)
    assert report.patched and not any(layer.seconds for layer in report.layers)
    assert "not timed: its attention is joint" in str(report)
