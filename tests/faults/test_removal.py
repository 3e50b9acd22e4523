"""Removal through any handle and after anything that happened to the UNet: it never raises, and leaves nothing."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import image, make_pipeline, make_unet, unet_inputs
from diffusers import StableDiffusionPipeline
from situations import SETTINGS, hooks_and_attributes, inputs_of, sweep
from zoo import PIPELINES, make_controlnet, runner

import agentsd
from agentsd.wrapping import Wrap

CONTROLLED = {"seed": 0, "patch_controlnet": True}


def controlled(name="ControlNet"):
    pipe, run = PIPELINES[name]()
    return pipe, run, run()


def nets_of(pipe):
    return getattr(pipe.controlnet, "nets", [pipe.controlnet])


def text_to_image(pipe):
    """Another pipeline on the UNet, without a ControlNet."""
    return StableDiffusionPipeline.from_pipe(pipe)


HANDLES = {
    "the UNet": lambda pipe: pipe.unet,
    "a pipeline without ControlNet": text_to_image,
    "a pipeline of the same kind": lambda pipe: type(pipe).from_pipe(pipe),
    "the pipeline": lambda pipe: pipe,
}


@pytest.mark.parametrize("handle", HANDLES)
@pytest.mark.parametrize("name", ["ControlNet", "several ControlNets"])
def test_controlnets_are_unpatched_through_any_handle(name, handle):
    """What was patched in one call is unpatched in one, and the report agrees."""
    pipe, run, plain = controlled(name)
    before = [hooks_and_attributes(net) for net in (pipe.unet, *nets_of(pipe))]
    agentsd.apply_patch(pipe, **CONTROLLED)
    assert not torch.equal(run(), plain)
    agentsd.remove_patch(HANDLES[handle](pipe))
    assert [hooks_and_attributes(net) for net in (pipe.unet, *nets_of(pipe))] == before
    assert torch.equal(run(), plain)
    assert agentsd.report(pipe).settings is None and not agentsd.report(pipe).patched


@pytest.mark.parametrize("handle", list(HANDLES)[:3])
def test_a_patch_through_another_handle_replaces_that_of_the_controlnets(handle):
    """One UNet, one patch: the ControlNets of the patch before are not left patched."""
    pipe, run, _ = controlled()
    agentsd.apply_patch(pipe, seed=0)
    unet_alone = run()
    agentsd.apply_patch(pipe, **CONTROLLED)
    assert not torch.equal(run(), unet_alone)
    before = hooks_and_attributes(make_controlnet(make_unet()))
    agentsd.apply_patch(HANDLES[handle](pipe), seed=0)
    assert hooks_and_attributes(pipe.controlnet) == before
    agentsd.remove_patch(pipe)


def test_a_controlnet_that_was_exchanged_is_unpatched():
    """The one that was patched, and that the pipeline no longer has."""
    pipe, run, plain = controlled()
    first, second = pipe.controlnet, make_controlnet(make_unet())
    clean = hooks_and_attributes(second)
    agentsd.apply_patch(pipe, **CONTROLLED)
    pipe.controlnet = second
    agentsd.remove_patch(pipe)
    assert hooks_and_attributes(first) == hooks_and_attributes(second) == clean
    pipe.controlnet = first
    assert torch.equal(run(), plain)


def test_a_controlnet_of_two_pipelines_with_a_unet_each():
    """Removing one patch leaves the images of the other pipeline what they were, or says why it cannot."""
    pipe, run, plain = controlled()
    parts = pipe.components
    other = type(pipe)(**parts | {"unet": copy.deepcopy(pipe.unet)}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    for patched in (pipe, other):
        agentsd.apply_patch(patched, **CONTROLLED)
    agentsd.remove_patch(other), agentsd.remove_patch(pipe)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("handle", HANDLES)
def test_patched_gives_back_the_patch_of_a_deleted_pipeline(handle):
    """With its settings and its ControlNets, whatever the block's own handle was."""
    pipe, run, _ = controlled()
    agentsd.apply_patch(pipe, ratio=0.3, **CONTROLLED)
    expected, settings = run(), agentsd.report(pipe).settings
    parts, cls, model = pipe.components, type(pipe), HANDLES[handle](pipe)
    if handle != "the pipeline":
        del pipe, run
    with agentsd.patched(model, ratio=0.5):
        assert agentsd.report(model).settings.ratio == 0.5
    assert agentsd.report(model).settings == settings
    again = cls(**parts, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    arguments = {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
    assert torch.equal(runner(again, **arguments)(), expected)


@pytest.mark.parametrize("error", [False, True])
def test_patched_inside_of_patched(error):
    """Each level gives back the one around it, also after an error and through other handles."""
    pipe = make_pipeline()
    plain = image(pipe)
    agentsd.apply_patch(pipe, ratio=0.3, seed=0)
    outer = image(pipe)
    try:
        with agentsd.patched(pipe.unet, ratio=0.5), agentsd.patched(pipe, preset="balanced"):
            image(pipe)
            if error:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert torch.equal(image(pipe), outer)
    agentsd.remove_patch(pipe.unet)
    assert torch.equal(image(pipe), plain)


# Modules that were replaced or wrapped since


class Around(torch.nn.Module):
    """What sharding and split inference put around a module."""

    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def wrap_block(unet):
    blocks = unet.down_blocks[0].attentions[0].transformer_blocks
    blocks[0] = Around(blocks[0])


def wrap_down_block(unet):
    unet.up_blocks[1].attentions[0] = Around(unet.up_blocks[1].attentions[0])


def wrap_attention(unet):
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1 = Around(block.attn1)


def compile_block(unet):
    blocks = unet.down_blocks[0].attentions[0].transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")


def compile_down_block(unet):
    unet.down_blocks[0] = torch.compile(unet.down_blocks[0], backend="eager")


def fresh_down_block(unet):
    unet.down_blocks[0] = make_unet().down_blocks[0]


def fresh_transformer_block(unet):
    fresh = make_unet().up_blocks[1].attentions[0].transformer_blocks[0]
    unet.up_blocks[1].attentions[0].transformer_blocks[0] = fresh


def no_middle(unet):
    unet.mid_block = None


def fewer_blocks(unet):
    del unet.up_blocks[1].attentions[1].transformer_blocks[0]


CHANGES = [
    wrap_block, wrap_down_block, wrap_attention, compile_block, compile_down_block, fresh_down_block,
    fresh_transformer_block, no_middle, fewer_blocks,
]  # fmt: skip


def outputs(unet) -> torch.Tensor:
    return torch.cat([unet(**inputs_of(0, timestep=t)).sample for t in (900, 800, 700, 200)])


@pytest.mark.parametrize("called", sweep([False, True], [True]))
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "reuse"]))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_modules_replaced_after_the_patch(change, name, called):
    """Reported, patched again, and removed without an error; old and new modules keep nothing of ours."""
    expected, unet = make_unet(), make_unet()
    change(expected)
    plain = outputs(expected)
    clean = hooks_and_attributes(make_unet())
    agentsd.apply_patch(unet, **SETTINGS[name])
    before = dict(unet.named_modules())
    change(unet)
    if called:
        assert outputs(unet).isfinite().all()
    assert str(agentsd.report(unet))
    agentsd.remove_patch(unet)
    after = {name: (sorted(vars(m)), len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in before.items()}
    assert {name: state for name, state in after.items() if state[1:] != clean[name][1:]} == {}
    assert not [name for name, module in before.items() if "forward" in vars(module)]
    assert hooks_and_attributes(unet) == hooks_and_attributes(expected)
    assert torch.equal(outputs(unet), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents"]))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_unet_that_was_changed_under_its_patch_can_be_patched_anew(change, name):
    """The new patch is the one that the changed UNet would get."""
    expected, unet = make_unet(), make_unet()
    change(expected)
    agentsd.apply_patch(unet, **SETTINGS[name])
    outputs(unet)
    change(unet)
    try:
        agentsd.apply_patch(expected, **SETTINGS[name])
    except ValueError as refusal:
        with pytest.raises(ValueError, match=str(refusal)[:20]):
            agentsd.apply_patch(unet, **SETTINGS[name])
    else:
        agentsd.apply_patch(unet, **SETTINGS[name])
        assert torch.equal(outputs(unet), outputs(expected))
    agentsd.remove_patch(unet)
    torch._dynamo.reset()


def long_video(pipe):
    pipe.enable_free_noise(context_length=4, context_stride=2)
    pipe.enable_free_noise_split_inference(spatial_split_size=64, temporal_split_size=4)


@pytest.mark.parametrize("order", ["patch first", "split first"])
@pytest.mark.parametrize("name", ["agents", "balanced"])
def test_split_inference_of_long_videos(name, order):
    """FreeNoise replaces transformer blocks by its own: patched or said not to be, and removed without an error."""
    pipe, run = PIPELINES["AnimateDiff"]()
    arguments = {"num_frames": 6, "num_inference_steps": 4}
    if order == "split first":
        long_video(pipe)
    agentsd.apply_patch(pipe, **SETTINGS[name])
    if order == "patch first":
        long_video(pipe)
    assert run(**arguments).isfinite().all()
    assert str(agentsd.report(pipe))
    agentsd.apply_patch(pipe, **SETTINGS[name])
    assert run(**arguments).isfinite().all()
    agentsd.remove_patch(pipe)
    found = run(**arguments)
    fresh, run_fresh = PIPELINES["AnimateDiff"]()
    long_video(fresh)
    assert torch.equal(found, run_fresh(**arguments))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("name", sweep(SETTINGS))
def test_offload_hooks_that_outlive_the_patch(name):
    """accelerate keeps each module's forward and puts it back later: three rounds add up to nothing."""
    unet = make_unet()
    plain, clean = outputs(unet), hooks_and_attributes(unet)
    for _ in range(3):
        agentsd.apply_patch(unet, **SETTINGS[name])
        cpu_offload(unet, torch.device("cpu"))
        outputs(unet)
        agentsd.remove_patch(unet)
        assert torch.equal(outputs(unet), plain)
        remove_hook_from_module(unet, recurse=True)
        assert [name for name, module in unet.named_modules() if is_wrapped(module)] == []
        assert torch.equal(outputs(unet), plain)
    assert {n: s[1:] for n, s in hooks_and_attributes(unet).items()} == {n: s[1:] for n, s in clean.items()}


def is_wrapped(module) -> bool:
    """Whether calls reach something else than the class's own forward; accelerate leaves a bound copy of this."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


@pytest.mark.parametrize("first", ["hook", "patch"])
@pytest.mark.parametrize("name", ["agents", "reuse"])
def test_a_hook_on_a_few_modules_removed_before_or_after_the_patch(name, first):
    """Removed in either order, nothing is left and the images are the unpatched ones."""
    unet = make_unet()
    plain = outputs(unet)
    hooked = [unet.down_blocks[0], unet.up_blocks[1].attentions[1], unet.mid_block]
    agentsd.apply_patch(unet, **SETTINGS[name])
    for module in hooked:
        add_hook_to_module(module, ModelHook())
    patched = outputs(unet)
    assert torch.equal(patched, outputs(agentsd.apply_patch(make_unet(), **SETTINGS[name])))
    remove = [lambda: agentsd.remove_patch(unet), lambda: [remove_hook_from_module(module) for module in hooked]]
    for step in remove if first == "patch" else reversed(remove):
        step()
    assert torch.equal(outputs(unet), plain)
    assert not any(is_wrapped(module) for module in unet.modules())


def around(forward):
    def own(*args, **kwargs):
        return forward(*args, **kwargs)

    return own


@pytest.mark.parametrize("name", sweep(SETTINGS))
def test_a_forward_of_the_user_s(name):
    """Set before the patch it is there after it; set over the patch it stays, and ours in it does nothing."""
    unet = make_unet()
    plain = outputs(unet)
    before = around(unet.down_blocks[0].forward)
    unet.down_blocks[0].forward = before
    agentsd.apply_patch(unet, **SETTINGS[name])
    after = around(unet.up_blocks[1].forward)
    unet.up_blocks[1].forward = after
    expected = outputs(unet)
    agentsd.remove_patch(unet)
    assert unet.down_blocks[0].forward is before and unet.up_blocks[1].forward is after
    assert torch.equal(outputs(unet), plain)
    agentsd.apply_patch(unet, **SETTINGS[name])
    assert torch.equal(outputs(unet), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_removal_in_the_middle_of_a_call(name):
    """By a hook of the user's, deep inside of the call: this ends, and the next one is unpatched."""
    unet = make_unet()
    plain = outputs(unet)
    agentsd.apply_patch(unet, **SETTINGS[name])
    unet(**unet_inputs(timestep=950))
    layer = unet.up_blocks[1].attentions[1].transformer_blocks[0].attn1.to_q
    handle = layer.register_forward_pre_hook(lambda *_: agentsd.remove_patch(unet) and None)
    assert unet(**unet_inputs(timestep=900)).sample.isfinite().all()
    handle.remove()
    assert torch.equal(outputs(unet), plain)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("first", ["prepared", "patched"])
@pytest.mark.parametrize("name", sweep({**SETTINGS, "graphs": {}}, ["graphs", "balanced"]))
def test_a_unet_that_accelerate_prepared_and_unwraps(name, first, keep):
    """In mixed precision it wraps ``forward``, and may bind what it finds there to the model."""
    settings = SETTINGS.get(name, {"ratio": 0, "cache_interval": 2, "cuda_graphs": True})
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    call = torch.no_grad()(lambda net: net(**unet_inputs()).sample)
    plain = accelerator.unwrap_model(accelerator.prepare(make_unet()), keep_fp32_wrapper=keep)
    expected, unet = call(plain), make_unet()
    if first == "patched":
        agentsd.apply_patch(unet, **settings)
    prepared = accelerator.prepare(unet)
    if first == "prepared":
        agentsd.apply_patch(prepared, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "agentsd replays no CUDA graph here")
        call(prepared)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
        call(unwrapped)
    agentsd.remove_patch(unwrapped)
    assert torch.equal(call(unwrapped), expected)
    assert not any(isinstance(value, Wrap) for value in vars(unwrapped).values())
