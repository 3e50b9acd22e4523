"""Applying and undoing, what a patch changes, and what it must not."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import image, make_pipeline, make_unet, unet_inputs
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import agentsd

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")


def anatomy(unet) -> dict:
    """Everything a patch could leave behind: processors by identity, hooks, and the attributes of all modules."""
    return {
        "processors": {name: id(processor) for name, processor in unet.attn_processors.items()},
        "hooks": {n: [len(getattr(m, hooks)) for hooks in HOOKS] for n, m in unet.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in unet.named_modules()},
        "state": list(unet.state_dict()),
    }


SETTINGS = [
    {},
    {"agent_steps": 0},
    {"agent_steps": 1, "use_rand": False},
    {"merge_crossattn": True, "merge_mlp": True},
    {"merge_attn": False, "merge_mlp": True},
    {"max_downsample": 2, "ratio": 0.6},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_removing_restores_everything(kind, settings):
    unet, inputs = make_unet(kind), unet_inputs(kind)
    before, plain = anatomy(unet), unet(**inputs).sample
    assert agentsd.apply_patch(unet, **settings) is unet
    changed = unet(**inputs).sample
    assert changed.isfinite().all()
    assert not torch.equal(changed, plain)
    torch.testing.assert_close(changed, plain, atol=plain.std().item(), rtol=0)  # near: a perturbation, not noise
    assert agentsd.remove_patch(unet) is unet
    assert anatomy(unet) == before
    assert torch.equal(unet(**inputs).sample, plain)


def test_removing_what_is_not_patched_does_nothing():
    unet = make_unet()
    before = anatomy(unet)
    agentsd.remove_patch(unet)
    assert anatomy(unet) == before


def test_a_pipeline_and_its_unet_are_the_same_patch(kind):
    pipe = make_pipeline(kind)
    before, plain = anatomy(pipe.unet), image(pipe)
    agentsd.apply_patch(pipe)
    assert not torch.equal(image(pipe), plain)
    agentsd.remove_patch(pipe.unet)
    assert anatomy(pipe.unet) == before
    assert torch.equal(image(pipe), plain)


def test_applying_twice_replaces():
    unet, inputs = make_unet(), unet_inputs()
    before = anatomy(unet)
    agentsd.apply_patch(unet, ratio=0.5, use_rand=False)
    once = unet(**inputs).sample
    hooks = anatomy(unet)["hooks"]
    agentsd.apply_patch(unet, ratio=0.2, merge_mlp=True)
    agentsd.apply_patch(unet, ratio=0.5, use_rand=False)
    assert anatomy(unet)["hooks"] == hooks
    assert torch.equal(unet(**inputs).sample, once)
    agentsd.remove_patch(unet)
    assert anatomy(unet) == before


def test_processors_found_in_place_are_kept():
    unet, inputs = make_unet(), unet_inputs()
    unet.set_attn_processor(AttnProcessor())
    before = anatomy(unet)
    agentsd.apply_patch(unet)
    unet(**inputs)
    assert anatomy(unet)["processors"] == before["processors"]
    agentsd.remove_patch(unet)
    assert anatomy(unet) == before


def test_ratio_zero_is_bit_equal(kind):
    unet, inputs = make_unet(kind), unet_inputs(kind)
    plain = unet(**inputs).sample
    with pytest.warns(UserWarning, match="changes nothing with ratio=0"):
        agentsd.apply_patch(unet, ratio=0, merge_crossattn=True, merge_mlp=True)
    assert torch.equal(unet(**inputs).sample, plain)


def test_a_patch_that_merges_nothing_warns_once():
    unet = make_unet()
    with pytest.warns(UserWarning, match="changes nothing with merge_attn, merge_crossattn and merge_mlp all False"):
        agentsd.apply_patch(unet, merge_attn=False)
    agentsd.apply_patch(unet, ratio=0.2)
    with pytest.warns(UserWarning, match=r"changes nothing at this size: ratio=0.2 of 2x2 latents") as caught:
        unet(**unet_inputs(height=2, width=2))
        unet(**unet_inputs(height=2, width=2))
    assert len(caught) == 1


def test_patched_undoes_itself_also_after_an_error():
    pipe = make_pipeline()
    before = anatomy(pipe.unet)
    with pytest.raises(ZeroDivisionError), agentsd.patched(pipe, ratio=0.5) as same:
        assert same is pipe
        assert agentsd.report(pipe).settings.ratio == 0.5
        raise ZeroDivisionError
    assert anatomy(pipe.unet) == before


@pytest.mark.parametrize("given", [(), (0.3,)])
@pytest.mark.parametrize("settings", [{}, {"preset": "balanced"}, {"preset": "fast", "seed": 3}])
def test_patched_takes_what_apply_patch_takes(given, settings):
    unet = make_unet()
    expected = agentsd.report(agentsd.apply_patch(unet, *given, **settings)).settings
    agentsd.remove_patch(unet)
    with agentsd.patched(unet, *given, **settings):
        assert agentsd.report(unet).settings == expected


def test_patched_gives_back_the_patch_that_was_there():
    pipe = make_pipeline()
    agentsd.apply_patch(pipe, ratio=0.3, seed=5, merge_mlp=True)
    expected = image(pipe)
    with agentsd.patched(pipe.unet, ratio=0.5):
        assert agentsd.report(pipe).settings.ratio == 0.5
    assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "runwayml/stable-diffusion-v1-5", None], ids=type)
def test_a_model_with_nothing_to_patch(model):
    with pytest.raises((TypeError, ValueError), match="expected a diffusers pipeline with a UNet of Stable Diffusion"):
        agentsd.apply_patch(model)


def test_a_resolution_without_attention():
    with pytest.raises(ValueError, match=r"max_downsample=1 is not allowed.*self-attention at downsampling 2 only"):
        agentsd.apply_patch(make_unet("sdxl"), max_downsample=1)


# Random draws


def test_equal_seeds_give_equal_images_and_touch_no_generator():
    pipe = make_pipeline()
    agentsd.apply_patch(pipe, seed=3)
    state = torch.get_rng_state()
    first = image(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image(pipe), first)
    agentsd.apply_patch(pipe, seed=3)
    assert torch.equal(image(pipe), first)
    agentsd.apply_patch(pipe, seed=4)
    assert not torch.equal(image(pipe), first)


def test_without_a_seed_torchs_is_followed():
    pipe = make_pipeline()
    agentsd.apply_patch(pipe)
    torch.manual_seed(1)
    first = image(pipe)
    torch.manual_seed(2)
    assert not torch.equal(image(pipe), first)
    torch.manual_seed(1)
    assert torch.equal(image(pipe), first)


def test_the_users_generator_is_left_alone():
    pipe, ours, theirs = make_pipeline(), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    image(pipe, generator=theirs, eta=0.5)
    agentsd.apply_patch(pipe)
    image(pipe, generator=ours, eta=0.5)
    assert torch.equal(ours.get_state(), theirs.get_state())


def partitions(unet, timestep) -> list[torch.Tensor]:
    """The draws of all patched blocks in one call."""
    drawn, patch = [], unet._agentsd_patch
    look = lambda *_: drawn.extend(plan.partition.order for plan in patch._now.call.blocks.values())
    with unet.conv_in.register_forward_hook(look):
        unet(**unet_inputs(timestep=timestep))
    return drawn


def test_draws_differ_between_steps_and_blocks():
    unet = agentsd.apply_patch(make_unet(), seed=0)
    first, second, again = (partitions(unet, timestep) for timestep in (900, 880, 900))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_guidance_as_two_calls_equals_one(kind):
    unet, inputs = agentsd.apply_patch(make_unet(kind), seed=0), unet_inputs(kind, batch=3)
    together = unet(**inputs).sample
    for i in range(3):
        one = tree_map_only(torch.Tensor, lambda x, i=i: x[i : i + 1], inputs)
        torch.testing.assert_close(unet(**one).sample, together[i : i + 1], atol=1e-5, rtol=1e-5)


class Reads(TorchDispatchMode):
    """Counts the operations that would make a GPU's host wait for a value."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func.__name__.startswith("index.") and any(x.dtype == torch.bool for x in args[1] if x is not None)
        self.count += masked or func.__name__.split(".")[0] in self.waiting
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("agent_steps", [0, 1])
def test_no_value_is_read_back_from_the_device(kind, agent_steps):
    unet, inputs = make_unet(kind), unet_inputs(kind)
    with Reads() as unpatched:
        unet(**inputs)
    agentsd.apply_patch(unet, agent_steps=agent_steps, merge_crossattn=True, merge_mlp=True)
    with Reads() as patched:
        unet(**inputs)
    assert patched.count == unpatched.count
    with Reads() as reads:
        bool(inputs["sample"].sum() > 0), inputs["sample"][inputs["sample"] > 0], inputs["sample"].nonzero()
    assert reads.count == 3  # it does see them


# Life with a patch


def test_state_and_files_hold_no_trace(tmp_path):
    unet, inputs = make_unet(), unet_inputs()
    keys, plain = list(unet.state_dict()), unet(**inputs).sample
    agentsd.apply_patch(unet)
    assert list(unet.state_dict()) == keys
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert agentsd.report(loaded).settings is None
    assert torch.equal(loaded(**inputs).sample, plain)
    assert "agentsd" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_a_patch_of_its_own(copied):
    pipe = make_pipeline()
    plain = image(pipe)
    agentsd.apply_patch(pipe, seed=0)
    expected = image(pipe)
    twin = copied(pipe)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(image(twin), expected)
    agentsd.remove_patch(twin)
    assert torch.equal(image(twin), plain)
    assert torch.equal(image(pipe), expected)
    agentsd.remove_patch(pipe)
    assert torch.equal(image(pipe), plain)
    assert anatomy(twin.unet)["hooks"] == anatomy(pipe.unet)["hooks"]


def test_a_deleted_pipeline_is_freed_at_once():
    pipe = make_pipeline()
    agentsd.apply_patch(pipe)
    image(pipe)
    unet = weakref.ref(pipe.unet)
    gc.disable()
    try:
        del pipe
        assert unet() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_is_close_to_float32(dtype, tolerance):
    unet, inputs = agentsd.apply_patch(make_unet(), seed=0), unet_inputs()
    expected = unet(**inputs).sample
    half = unet.to(dtype)(**{k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}).sample
    assert half.dtype == dtype
    error = (half.float() - expected).square().mean().sqrt() / expected.std()
    assert error < tolerance


@pytest.mark.parametrize("size", [(16, 24), (17, 23), (9, 30), (5, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_size_and_batch(kind, size, batch):
    unet = agentsd.apply_patch(make_unet(kind))
    out = unet(**unet_inputs(kind, batch, *size)).sample
    assert out.shape == (batch, 4, *size)
    assert out.isfinite().all()


def test_an_attention_mask_is_obeyed_unmerged():
    """The first layer of a patched call gives what it gives unpatched, and a warning says so."""
    unet, inputs, seen = make_unet(), unet_inputs(), []
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    mask = torch.zeros(2, 1, 256)
    mask[..., 100:] = -10_000
    masked = lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})
    attn.register_forward_pre_hook(masked, with_kwargs=True)
    attn.register_forward_hook(lambda *call: seen.append(call[-1]))
    unet(**inputs)
    agentsd.apply_patch(unet)
    with pytest.warns(UserWarning, match="runs unpatched: its attention_mask"):
        unet(**inputs)
    assert torch.equal(*seen)


def test_the_users_processors_stay_theirs():
    """What diffusers does to processors works on a patched UNet, and takes effect."""
    unet, inputs = agentsd.apply_patch(make_unet(), use_rand=False), unet_inputs()
    expected = unet(**inputs).sample
    unet.set_default_attn_processor()
    torch.testing.assert_close(unet(**inputs).sample, expected)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(unet(**inputs).sample, expected)
    agentsd.remove_patch(unet)
    unet.unfuse_qkv_projections()
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor}


def test_an_error_in_the_middle_leaves_the_processors():
    unet, inputs = agentsd.apply_patch(make_unet(), agent_steps=1), unet_inputs()
    before = anatomy(unet)["processors"]
    to_k = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    handle = to_k.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unet(**inputs)
    handle.remove()
    assert anatomy(unet)["processors"] == before
    agentsd.remove_patch(unet)
    assert torch.equal(unet(**inputs).sample, make_unet()(**inputs).sample)


@pytest.mark.parametrize("agent_steps", [0, 1])
def test_gradient_checkpointing_gives_the_same_gradients(agent_steps):
    gradients = []
    for checkpointing in (False, True):
        unet = agentsd.apply_patch(make_unet(), agent_steps=agent_steps, seed=0)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        with torch.enable_grad():
            unet(**unet_inputs()).sample.square().mean().backward()
        gradients.append(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.grad)
        assert gradients[-1].isfinite().all()
        copy.deepcopy(unet)
    torch.testing.assert_close(*gradients)


def test_chunked_feed_forward_is_refused_by_name():
    unet = agentsd.apply_patch(make_unet(), merge_mlp=True)
    for name, module in unet.named_modules():
        if name.endswith("transformer_blocks.0"):
            module.set_chunk_feed_forward(64, dim=1)
    with pytest.raises(RuntimeError, match=r"Feed-forward chunking.*merge_mlp=False"):
        unet(**unet_inputs())
