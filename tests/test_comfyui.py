"""The node for ComfyUI, on a small UNet behind the interface that ComfyUI's nodes see; ComfyUI itself is not here."""

import copy
import importlib.util
import itertools
import json
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import agentsd
from agentsd.attention import agent_attention
from agentsd.merge import merge, unmerge
from agentsd.schedule import full_calls

FOLDER = ROOT / "examples" / "comfyui"
STEPS, WIDTH, HEADS = 20, 16, 2


@pytest.fixture(scope="module")
def node():
    """As ComfyUI loads a folder of its custom nodes."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_agentsd", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.NODE_CLASS_MAPPINGS["AgentSDPatch"]()
    for name in [name for name in sys.modules if name.startswith("comfyui_agentsd")]:
        del sys.modules[name]


class Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.to_k, self.to_v = nn.Linear(context, WIDTH, bias=False), nn.Linear(context, WIDTH, bias=False)

    def forward(self, x, context=None, value=None):
        q, k, v = self.to_q(x), self.to_k(x if context is None else context), value if value is not None else context
        split = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)
        v = self.to_v(x if v is None else v)
        return self.to_out(
            nn.functional.scaled_dot_product_attention(*map(split, (q, k, v))).transpose(1, 2).flatten(2)
        )


class Block(nn.Module):
    """A transformer block that asks the patches as ComfyUI's does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn1, self.attn2 = Attention(WIDTH), Attention(8)

    def forward(self, x, context, options):
        extra = {k: v for k, v in options.items() if k not in ("patches", "patches_replace")} | {"n_heads": HEADS}
        patches, n = options.get("patches", {}), self.norm1(x)
        key = value = n
        for patch in patches.get("attn1_patch", ()):
            n, key, value = patch(n, key, value, extra)
        stand_in = options.get("patches_replace", {}).get("attn1", {}).get((*options["block"], 0))
        if stand_in is not None:
            q, k, v = self.attn1.to_q(n), self.attn1.to_k(key), self.attn1.to_v(value)
            n = self.attn1.to_out(stand_in(q, k, v, extra))
        else:
            n = self.attn1(n, key, value)
        for patch in patches.get("attn1_output_patch", ()):
            n = patch(n, extra)
        x = x + n
        return x + self.attn2(self.norm2(x), context)


class Res(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(channels, WIDTH, 3, padding=1), 0

    def forward(self, x, emb):
        self.calls += 1
        return torch.tanh(self.conv(x)) + emb


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x, context, options):
        tokens = x.flatten(2).transpose(1, 2)
        return self.transformer_blocks[0](tokens, context, options).transpose(1, 2).view_as(x)


class UNet(nn.Module):
    """Two resolutions, and attention at both."""

    def __init__(self) -> None:
        super().__init__()
        down, up = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.Upsample(scale_factor=2)
        listed = lambda *blocks: nn.ModuleList(map(nn.ModuleList, blocks))
        self.input_blocks = listed(
            [nn.Conv2d(4, WIDTH, 3, padding=1)], [Res(WIDTH), Transformer()], [down], [Res(WIDTH), Transformer()]
        )
        self.middle_block = nn.ModuleList([Res(WIDTH), Transformer()])
        double = lambda: Res(2 * WIDTH)
        self.output_blocks = listed(
            [double(), Transformer()], [double(), up], [double(), Transformer()], [double(), Transformer()]
        )
        self.out, self.still = nn.Conv2d(WIDTH, 4, 3, padding=1), False

    def forward(self, x, timestep, context, transformer_options):
        options = {**transformer_options, "original_shape": list(x.shape)}
        emb, skips, h = 0 if self.still else torch.cos(timestep)[:, None, None, None], [], x
        for i, block in enumerate(self.input_blocks):
            h = self.run(block, h, emb, context, {**options, "block": ("input", i)})
            skips.append(h)
        h = self.run(self.middle_block, h, emb, context, {**options, "block": ("middle", 0)})
        for i, block in enumerate(self.output_blocks):
            at, skip = {**options, "block": ("output", i)}, skips.pop()
            for patch in options.get("patches", {}).get("output_block_patch", ()):
                h, skip = patch(h, skip, at)
            h = self.run(block, torch.cat([h, skip], 1), emb, context, at)
        return self.out(h)

    @staticmethod
    def run(block, h, emb, context, options):
        for layer in block:
            others = {Res: (emb,), Transformer: (context, options)}.get(type(layer), ())
            h = layer(h, *others)
        return h


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = UNet()

    def apply_model(self, x, t, c_crossattn, transformer_options, control=None):
        return self.diffusion_model(x, t, c_crossattn, transformer_options)


class Patcher:
    """What a node sees of a MODEL."""

    def __init__(self, model) -> None:
        self.model, self.model_options = model, {"transformer_options": {}}

    def clone(self):
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def add(self, name, patch):
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault(name, []).append(patch)

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper

    def set_model_attn1_patch(self, patch):
        self.add("attn1_patch", patch)

    def set_model_attn1_output_patch(self, patch):
        self.add("attn1_output_patch", patch)

    def set_model_output_block_patch(self, patch):
        self.add("output_block_patch", patch)

    def set_model_attn1_replace(self, patch, side, number, index=None):
        replaced = self.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault("attn1", {})
        replaced[side, number, index] = patch

    def call(self, x, sigma, sigmas, **given):
        options = {
            **self.model_options["transformer_options"],
            "sample_sigmas": sigmas,
            "uuids": given.get("uuids", [1]),
        }
        c = {"c_crossattn": given.get("context", torch.ones(len(x), 3, 8)), "transformer_options": options}
        c |= {"control": given["control"]} if "control" in given else {}
        args = {"input": x, "timestep": sigma.expand(len(x)), "c": c, "cond_or_uncond": [0]}
        wrapper = self.model_options.get(
            "model_function_wrapper", lambda apply, a: apply(a["input"], a["timestep"], **a["c"])
        )
        return wrapper(self.model.apply_model, args)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Patcher(Base().eval())


SIGMAS = torch.linspace(14, 0, STEPS + 1)
NO_PATCH = {"transformer_options": {}}


def sample(model, x, sigmas=SIGMAS, **given):
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) / 14 * model.call(x, sigma, sigmas, **given)
    return x


def noise(seed: int = 1) -> torch.Tensor:
    """Latents of 1,024 tokens: layers of fewer are left alone."""
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed))


def full_ones(model, calls) -> tuple[bool, ...]:
    """Whether the middle ran, for each of the calls."""
    middle, last = (
        block[0] for block in (model.model.diffusion_model.middle_block, model.model.diffusion_model.output_blocks[-1])
    )
    seen = []
    for call in calls:
        before = middle.calls, last.calls
        call()
        assert last.calls == before[1] + 1
        seen.append(middle.calls > before[0])
    return tuple(seen)


def calls_of(model, **given):
    return [lambda sigma=sigma: model.call(noise(), sigma, SIGMAS, **given) for sigma in SIGMAS[:-1]]


PLANNED = full_calls(STEPS, agentsd.Settings.of("balanced", {}))


def test_full_calls_are_those_of_diffusers_and_cached_calls_skip_the_middle(node, model):
    (patched,) = node.patch(model, "balanced", 0.4)
    assert full_ones(model, calls_of(patched)) == PLANNED and not all(PLANNED)
    assert full_ones(model, calls_of(patched.clone())) == PLANNED  # as samplers clone it
    assert not any("forward" in vars(layer) for layer in model.model.diffusion_model.modules())


def test_a_cached_call_with_nothing_sampled_is_a_full_one_where_nothing_moves(node, model):
    (patched,) = node.patch(model, "balanced", 0.4)
    patched.model_options["model_function_wrapper"].settings = agentsd.Settings(
        ratio=0, cache_interval=3, cache_order=1
    )
    model.model.diffusion_model.still = True
    plain = model.call(noise(), SIGMAS[0], SIGMAS)
    for sigma in SIGMAS[:-1]:
        assert torch.allclose(patched.call(noise(), sigma, SIGMAS), plain, atol=1e-5)


@pytest.mark.parametrize("preset", [*agentsd.PRESETS, "paper"])
def test_images_are_near_and_the_model_is_left_alone(node, model, preset):
    plain = sample(model, noise())
    (patched,) = node.patch(model, preset, 0.4)
    near = sample(patched, noise())
    assert not torch.equal(near, plain)
    assert (near - plain).abs().mean() < 0.1 * plain.abs().mean()
    assert torch.equal(sample(patched, noise()), near)  # the next image begins anew
    assert torch.equal(sample(model, noise()), plain) and model.model_options == NO_PATCH


def test_errors_decide_under_adaptive(node, model):
    """Nothing moves: the gaps between full calls double. Nothing is good enough: every second call is full."""
    (patched,) = node.patch(model, "adaptive", 0.4)
    wrapper = patched.model_options["model_function_wrapper"]
    assert wrapper.settings == agentsd.Settings.of("adaptive", {})
    moving = full_ones(model, calls_of(patched))
    model.model.diffusion_model.still = True
    still = full_ones(model, calls_of(patched))
    wrapper.settings = agentsd.Settings.of("adaptive", {"cache_tolerance": 1e-9})
    strict = full_ones(model, calls_of(patched))
    assert still[:2] == moving[:2] == (True, True) and still[STEPS - 2] and moving[STEPS - 2]
    assert sum(still) < sum(moving) <= sum(strict) == STEPS // 2 + 1


def test_two_prompts_in_turn_are_each_as_alone(node, model):
    (patched,) = node.patch(model, "balanced", 0.4)
    contexts = [torch.full((1, 3, 8), value) for value in (-1.0, 1.0)]
    alone = [[patched.call(noise(), sigma, SIGMAS, context=c) for sigma in SIGMAS[:-1]] for c in contexts]
    for i, sigma in enumerate(SIGMAS[:-1]):
        for uuid, context in enumerate(contexts):
            assert torch.equal(patched.call(noise(), sigma, SIGMAS, context=context, uuids=[uuid]), alone[uuid][i])


def test_calls_that_must_be_full(node, model):
    (patched,) = node.patch(model, "balanced", 0.4)
    twice = [call for call in calls_of(patched, uuids=None) for _ in range(2)]
    assert all(full_ones(model, twice))  # two prompts that nobody tells apart
    assert all(full_ones(model, calls_of(patched, control={})))
    between = [lambda sigma=sigma: patched.call(noise(), sigma - 0.3, SIGMAS) for sigma in SIGMAS[:-1]]
    assert (
        full_ones(model, [call for pair in zip(calls_of(patched), between, strict=True) for call in pair])[1::2]
        == (True,) * STEPS
    )


def test_what_was_there_before_is_still_asked(node, model):
    asked = []
    model.set_model_unet_function_wrapper(
        lambda apply, a: asked.append(1) or apply(a["input"], a["timestep"], **a["c"])
    )
    (patched,) = node.patch(model, "balanced", 0.4)
    assert full_ones(model, calls_of(patched)) == PLANNED and len(asked) == STEPS


def test_attention_is_that_of_the_package(node, model):
    """Merged late, and agents early: by hand, from the tokens before their projection."""
    (patched,) = node.patch(model, "paper", 0.4)
    wrapper, layer = patched.model_options["model_function_wrapper"], Attention(WIDTH)
    options = {"original_shape": [1, 4, 32, 32], "n_heads": HEADS}
    n = torch.randn(1, 1024, WIDTH, generator=torch.Generator().manual_seed(2))
    of_node = sys.modules[type(wrapper).__module__]
    split = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)
    for phase in wrapper.settings.phases:
        wrapper.call = of_node.Call(phase, 3)
        counts, matched = phase.counts(32, 32), wrapper.attention_input(n, n, n, options)
        matching = wrapper.call.matching
        tokens = merge(n, matching)
        if counts.agents:
            agents = split(layer.to_q(merge(n, wrapper.call.agents)))
            assert agents.shape[2] == counts.agents and matched[0] is n
            q, k, v = (split(to(tokens)) for to in (layer.to_q, layer.to_k, layer.to_v))
            by_hand = agent_attention(q, k, v, agents).transpose(1, 2).flatten(2)
            output = wrapper.attention(*(to(n) for to in (layer.to_q, layer.to_k, layer.to_v)), options)
            assert torch.allclose(output, by_hand, atol=1e-5)
        else:
            assert all(torch.equal(x, tokens) for x in matched)
            output = tokens
        assert torch.equal(wrapper.attention_output(output, options), unmerge(output, matching))
    wrapper.call = None


def test_without_a_schedule_it_says_that_nothing_changes(node, model):
    (patched,) = node.patch(model, "balanced", 0.4)
    with pytest.warns(UserWarning, match="no sample_sigmas"):
        assert torch.equal(patched.call(noise(), SIGMAS[0], None), model.call(noise(), SIGMAS[0], None))


def test_a_model_without_a_unet_is_refused(node, model):
    model.model.diffusion_model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear is no UNet"):
        node.patch(model, "balanced", 0.4)


def test_the_workflow_gives_the_node_what_it_takes(node):
    workflow = json.loads((FOLDER / "workflow.json").read_text())
    (inputs,) = [step["inputs"] for step in workflow.values() if step["class_type"] == "AgentSDPatch"]
    declared = node.INPUT_TYPES()["required"]
    assert list(inputs) == list(declared) and inputs["preset"] in declared["preset"][0]
    links = [value for step in workflow.values() for value in step["inputs"].values() if isinstance(value, list)]
    assert all(source in workflow for source, _ in links)
