"""Self-attention that somebody else feeds or caches: its effect stays, and the patch keeps out of its way."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import image, make_pipeline, make_unet, unet_inputs
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from situations import SETTINGS, distance, inputs_of, sweep, warned

import agentsd

ATTENTION = {"merge_mlp": False}  # which is not somebody else's


def blocks_of(unet):
    return {name: module for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)}


# Keys and values of somebody else's


class Reference:
    """Self-attention sees the tokens of a reference image as well: what each block's bank holds."""

    def __init__(self, unet, how: str) -> None:
        self.banks: dict[str, torch.Tensor] = {}
        self.mode = "off"
        for name, block in blocks_of(unet).items():
            if how == "hook":
                block.attn1.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            else:
                block.forward = self._forward(name, block, positional=how == "positional")

    def context(self, name, x):
        if self.mode == "write":
            self.banks[name] = x.clone()
        return torch.cat([x, self.banks[name]], 1) if self.mode == "read" else None

    def _hook(self, name):
        def hook(attn, args, kwargs):
            context = self.context(name, args[0])
            return args, {**kwargs, "encoder_hidden_states": context}

        return hook

    def _forward(self, name, block, positional):
        def forward(hidden_states, attention_mask=None, encoder_hidden_states=None, **_):
            x = block.norm1(hidden_states)
            context = self.context(name, x)
            attended = block.attn1(x, context) if positional else block.attn1(x, encoder_hidden_states=context)
            x = hidden_states + attended
            x = x + block.attn2(block.norm2(x), encoder_hidden_states=encoder_hidden_states)
            return x + block.ff(block.norm3(x))

        return forward


def referenced(unet, reference, strength: float, timestep=801):
    """An image's call with the banks of a reference image."""
    reference.mode = "write"
    other = inputs_of(1)
    unet(**other | {"sample": strength * other["sample"], "timestep": timestep})
    reference.mode = "read"
    return unet(**unet_inputs(timestep=timestep)).sample


@pytest.mark.parametrize("timestep", sweep([801, 101], [801]))
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "sampling"]))
@pytest.mark.parametrize("how", ["keyword", "positional", "hook"])
def test_a_reference_image_keeps_its_effect(how, name, timestep):
    """What another reference changes is changed under the patch alike: far more than the patch itself changes."""
    unet = make_unet()
    reference = Reference(unet, how)
    plain = [referenced(unet, reference, strength, timestep) for strength in (1, 5)]
    found = []
    for strength in (1, 5):
        agentsd.apply_patch(unet, **SETTINGS[name] | ATTENTION)
        found.append(referenced(unet, reference, strength, timestep))
    effect = plain[1] - plain[0]
    assert distance(found[1] - found[0], effect) < 0.3
    agentsd.remove_patch(unet)
    assert torch.equal(referenced(unet, reference, 1, timestep), plain[0])


@pytest.mark.parametrize("how", ["keyword", "positional", "hook"])
def test_given_keys_are_not_sampled_and_it_is_said_once(how):
    """With the same banks, a call whose layers all have keys of their own is bit-equal to the unpatched one."""
    unet, inputs = make_unet(), unet_inputs()
    reference = Reference(unet, how)
    plain = referenced(unet, reference, 1)
    agentsd.apply_patch(unet, preset="few_steps", max_downsample=2, seed=0)
    with warned() as messages:
        found = [unet(**{**inputs, "timestep": 801}).sample for _ in range(3)]
    assert all(torch.equal(image, plain) for image in found)
    assert len(messages) == len(set(messages)) > 0


@pytest.mark.parametrize("name", sweep(SETTINGS))
def test_a_reference_hooked_in_after_the_patch(name):
    """The order of patch and reference does not matter."""
    unet = agentsd.apply_patch(make_unet(), **SETTINGS[name] | ATTENTION)
    reference, bare = Reference(unet, "keyword"), make_unet()
    effect = torch.sub(*(referenced(bare, Reference(bare, "keyword"), strength) for strength in (5, 1)))
    found = torch.sub(*(referenced(unet, reference, strength) for strength in (5, 1)))
    assert distance(found, effect) < 0.3


# Outputs that somebody else keeps


class Clock:
    """Tells caches the timestep of the running call."""

    def __init__(self, unet) -> None:
        self.now = 999
        unet.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, unet, args, kwargs):
        self.now = int(args[1] if len(args) > 1 else kwargs["timestep"])


def broadcast(unet):
    clock = Clock(unet)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: clock.now,
    )
    apply_pyramid_attention_broadcast(unet, config)


def gate(unet, layer="attn1"):
    """Attention that runs in every third call, as caches of one's own do: its `forward` is replaced."""
    for block in blocks_of(unet).values():
        attn = getattr(block, layer)
        calls, kept, forward = iter(range(10_000)), [], attn.forward

        def cached(*args, calls=calls, kept=kept, forward=forward, **kwargs):
            if next(calls) % 3 == 0:
                kept[:] = [forward(*args, **kwargs)]
            return kept[0]

        attn.forward = cached


def hooked(unet):
    """The same by hooks: the output of an older call is put in the place of each."""
    for block in blocks_of(unet).values():
        calls, kept = iter(range(10_000)), []

        def keep(attn, args, output, calls=calls, kept=kept):
            if next(calls) % 3 == 0:
                kept[:] = [output]
            return kept[0]

        block.attn1.register_forward_hook(keep)


CACHES = {"pyramid attention broadcast": broadcast, "forward": gate, "hooks": hooked}
DESCENT = range(951, 300, -50)


def outputs(unet) -> torch.Tensor:
    """Twelve calls and more on latents that change little, as an image's do."""
    inputs, drift = unet_inputs(), 0.02 * inputs_of(3)["sample"]
    text = inputs["encoder_hidden_states"]
    found = [unet(inputs["sample"] + i * drift, t, text) for i, t in enumerate(DESCENT)]
    return torch.cat([output.sample for output in found])


@pytest.mark.parametrize("order", ["cache first", "patch first"])
@pytest.mark.parametrize("name", sweep(["agents", "merging", "sampling"], ["merging", "sampling"]))
@pytest.mark.parametrize("cache", CACHES)
def test_cached_attention_of_somebody_else(cache, name, order):
    """Outputs of an older call fit the tokens of that call alone: both errors together are no more than their sum."""
    settings = {**SETTINGS, "merging": {"seed": 0, "agent_steps": 0}}[name]
    plain = outputs(make_unet())
    cached, patched, both = make_unet(), make_unet(), make_unet()
    CACHES[cache](cached)
    agentsd.apply_patch(patched, **settings)
    todo = [CACHES[cache], lambda unet: agentsd.apply_patch(unet, **settings)]
    for do in todo if order == "cache first" else reversed(todo):
        do(both)
    apart = distance(outputs(cached), plain) + distance(outputs(patched), plain)
    assert 0 < distance(outputs(both), plain) <= 1.2 * apart


def test_a_layer_that_is_left_to_a_cache_is_reported():
    """The layers that merge beside somebody's cache are none, and the report says why."""
    unet = make_unet()
    broadcast(unet)
    agentsd.apply_patch(unet, agent_steps=0)
    outputs(unet)
    report = agentsd.report(unet)
    assert not report.patched
    assert "pyramid_attention_broadcast" in str(report) or "PyramidAttentionBroadcast" in str(report)


def test_a_cross_attention_cache_beside_merged_cross_attention():
    """The same holds for the tokens that are merged around cross-attention."""
    plain, settings = outputs(make_unet()), {"agent_steps": 0, "merge_crossattn": True, "merge_attn": False, "seed": 0}
    cached, both = make_unet(), make_unet()
    gate(cached, "attn2"), gate(both, "attn2")
    patched = agentsd.apply_patch(make_unet(), **settings)
    agentsd.apply_patch(both, **settings)
    apart = distance(outputs(cached), plain) + distance(outputs(patched), plain)
    assert distance(outputs(both), plain) <= 1.2 * apart


@pytest.mark.parametrize("order", ["cache first", "patch first"])
def test_somebody_s_cache_taken_away_again(order):
    """Without the cache the layers are patched as if it had never been there; without the patch nothing is left."""
    expected = outputs(agentsd.apply_patch(make_unet(), **SETTINGS["agents"]))
    unet = make_unet()
    plain = outputs(unet)
    if order == "cache first":
        broadcast(unet)
    agentsd.apply_patch(unet, **SETTINGS["agents"])
    if order == "patch first":
        broadcast(unet)
    outputs(unet)
    for module in unet.modules():
        if isinstance(getattr(module, "_diffusers_hook", None), HookRegistry):
            for name in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(name, recurse=False)
    assert torch.equal(outputs(unet), expected)
    agentsd.remove_patch(unet)
    assert torch.equal(outputs(unet), plain)


def test_a_cache_in_a_pipeline():
    """Images with diffusers' broadcast and the patch are finite, repeatable, and near the ones without."""
    pipe = make_pipeline()
    plain = image(pipe, steps=8)
    broadcast(pipe.unet)
    agentsd.apply_patch(pipe, **SETTINGS["agents"])
    found = []
    for _ in range(2):
        pipe.unet._reset_stateful_cache() if hasattr(pipe.unet, "_reset_stateful_cache") else None
        for module in pipe.unet.modules():
            registry = getattr(module, "_diffusers_hook", None)
            registry.reset_stateful_hooks(recurse=False) if registry is not None else None
        found.append(image(pipe, steps=8))
    assert torch.equal(*found) and distance(found[0], plain) < 0.5


# Processors that look on


class Counting:
    """As the controllers of prompt-to-prompt: it counts the attention layers of a call, and by them the steps."""

    def __init__(self, layers: int) -> None:
        self.layers, self.calls, self.maps = layers, 0, []

    @property
    def step(self) -> float:
        return self.calls / self.layers


class Controlled:
    def __init__(self, controller: Counting) -> None:
        self.controller = controller

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(layer(x))
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = attn.get_attention_scores(query, key, attention_mask)
        self.controller.calls += 1
        self.controller.maps.append(scores.shape)
        x = attn.batch_to_head_dim(scores @ value)
        return attn.to_out[1](attn.to_out[0](x))


class Stored(Controlled):
    """One that has the maps of all calls, and its controller under a name of its own."""

    def __init__(self, controller: Counting) -> None:
        self._controller, self.kept = controller, []

    @property
    def controller(self) -> Counting:
        return self._controller

    def __call__(self, attn, hidden_states, *others, **named):
        self.kept.append(hidden_states.mean())
        return super().__call__(attn, hidden_states, *others, **named)


class Weighed(torch.nn.Module):
    """One that holds nothing of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.scales, self.layer, self.width = [1.0, 0.5], torch.nn.Linear(2, 2), None
        self.options, self.attend = {"scale": np.float32(1)}, torch.nn.functional.scaled_dot_product_attention
        self.register_buffer("weight", torch.ones(3))

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@pytest.mark.parametrize("kind", [Controlled, Stored])
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "balanced"]))
def test_a_controller_sees_every_step_and_every_map(name, kind):
    """Of its layers nothing is merged and nothing skipped, and it is said."""
    seen = []
    for settings in (None, SETTINGS[name]):
        pipe = make_pipeline()
        controller = Counting(len(pipe.unet.attn_processors))
        pipe.unet.set_attn_processor({key: kind(controller) for key in pipe.unet.attn_processors})
        if settings is None:
            expected = image(pipe, steps=12)
        else:
            agentsd.apply_patch(pipe, **settings | ATTENTION)
            with warned() as messages:
                found = image(pipe, steps=12)
            assert any(kind.__name__ in message for message in messages)
        seen.append((controller.step, controller.maps))
    assert seen[0] == seen[1] and seen[0][0] == 12
    assert torch.equal(found, expected)


def test_a_controller_in_the_place_of_a_forward_sees_every_step():
    """As prompt-to-prompt's own code has it."""
    pipe = make_pipeline()
    layers = [m for m in pipe.unet.modules() if hasattr(m, "processor")]
    controller = Counting(len(layers))
    for layer in layers:
        layer.forward = partial(Controlled(controller), layer)
    agentsd.apply_patch(pipe, preset="balanced")
    with warned() as messages:
        image(pipe, steps=12)
    assert controller.step == 12 and any("partial may look on" in message for message in messages)


def test_a_processor_that_holds_nothing_of_a_call_is_skipped():
    pipe = make_pipeline()
    pipe.unet.set_attn_processor({key: Weighed() for key in pipe.unet.attn_processors})
    agentsd.apply_patch(pipe, preset="balanced")
    image(pipe, steps=12)
    assert agentsd.report(pipe).last["cached"] > 0
