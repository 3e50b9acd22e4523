"""Feature reuse: which calls are whole, what a cheap call computes, and that nothing leaks between images."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import image, make_img2img, make_pipeline, make_scheduler, make_unet, unet_inputs
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from diffusers.pipelines.audioldm2 import AudioLDM2UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

import agentsd
from agentsd.features import SLOWING, Lane, along, slowing
from agentsd.hosts import UNet
from agentsd.schedule import EVEN_CALLS, full_calls, interval_of

ONLY_REUSE = {"ratio": 0, "cache_interval": 3}


def calls_made(unet) -> list[bool]:
    """Fills up, call by call, with whether the middle of ``unet`` ran."""
    calls: list[bool] = []
    unet.register_forward_pre_hook(lambda *_: calls.append(False))
    unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: calls.__setitem__(-1, True))
    return calls


@pytest.mark.parametrize(("order", "whole"), [(0, {0, 3, 6}), (1, {0, 1, 3, 6})])
def test_every_third_call_is_whole_and_every_image_starts_with_one(kind, order, whole):
    """Extrapolation takes two whole calls, and the second comes as soon as it can."""
    pipe = agentsd.apply_patch(make_pipeline(kind), **ONLY_REUSE, cache_order=order)
    calls = calls_made(pipe.unet)
    first = image(pipe, steps=8)
    assert {call for call, ran in enumerate(calls) if ran} == whole
    assert torch.equal(image(pipe, steps=8), first)
    assert calls[8:] == calls[:8]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_calls_made_are_the_first_two_the_last_but_one_and_ever_fewer_between(scheduler):
    """Where features are extrapolated, whatever the number of steps, and as many as intervals ask for."""
    pipe = agentsd.apply_patch(make_pipeline(scheduler=make_scheduler(scheduler)), **ONLY_REUSE, cache_order=1)
    calls = calls_made(pipe.unet)
    for steps in (7, 8, 9, 10):
        calls.clear()
        image(pipe, steps=steps)
        assert calls[:2] == [True, True] and calls[-2]
        assert 0 <= sum(calls) - len(calls[-2::-3]) <= 2
        gaps = [b - a for a, b in pairwise(call for call, ran in enumerate(calls) if ran)]
        assert gaps == sorted(gaps)


@pytest.mark.parametrize("steps", [4, 8, 20, 25, 30, 50])
def test_an_interval_below_1_is_a_share_of_the_trajectory(steps):
    """The same calls are whole as at the interval in calls that it comes to: about as many in any number of steps."""
    pipe = make_pipeline()
    share, calls = 0.125, calls_made(pipe.unet)
    interval = interval_of(share, steps)
    assert interval == max(2, round(share * steps + 1e-9))
    for said in (share, interval):
        agentsd.apply_patch(pipe, 0, cache_interval=said, cache_order=1)
        image(pipe, steps=steps)
    assert calls[:steps] == calls[steps:]
    assert steps < 16 or 7 <= sum(calls[:steps]) <= 10


@pytest.mark.parametrize("scheduler", [PNDMScheduler, HeunDiscreteScheduler])
def test_a_share_is_one_of_calls_where_there_are_more_of_them_than_steps(scheduler):
    """Of those of the present image, whatever number of steps the last one had."""
    pipe = agentsd.apply_patch(make_pipeline(scheduler=make_scheduler(scheduler)), 0, cache_interval=0.25)
    calls = calls_made(pipe.unet)
    for steps in (6, 12, 6):
        calls.clear()
        image(pipe, steps=steps)
        assert len(calls) == len(pipe.scheduler.timesteps) > steps
        assert calls == [i % interval_of(0.25, len(calls)) == 0 for i in range(len(calls))]


def test_a_share_is_one_of_the_whole_schedule_where_img2img_starts_in_the_middle():
    """What reuse costs goes by how much noise lies between whole calls: as much as in a whole trajectory."""
    pipe = agentsd.apply_patch(make_img2img(), 0, cache_interval=0.25)
    calls = calls_made(pipe.unet)
    image(pipe, steps=20, image=torch.zeros(1, 3, 16, 16), strength=0.5)
    assert calls == [i % 5 == 0 for i in range(10)]


def test_a_share_without_a_scheduler_is_that_of_a_usual_trajectory():
    unet = agentsd.apply_patch(make_unet(), 0, cache_interval=0.2)
    calls = calls_made(unet)
    for timestep in range(999, 900, -9):
        unet(**{**unet_inputs(), "timestep": timestep})
    assert [call for call, ran in enumerate(calls) if ran] == [0, 5, 10]
    assert str(agentsd.report(unet)).startswith("agentsd: 5 of 50 calls are full; a cached call runs ")


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_share_of_a_schedule_that_was_never_set_is_that_of_a_usual_trajectory(scheduler):
    """A loop with a scheduler of its own: the pipeline's still holds every training timestep."""
    pipe = agentsd.apply_patch(make_pipeline(scheduler=make_scheduler(scheduler)), 0, cache_interval=0.2)
    calls = calls_made(pipe.unet)
    for timestep in range(999, 0, -20):
        pipe.unet(**{**unet_inputs(), "timestep": timestep})
    assert [call for call, ran in enumerate(calls) if ran] == list(range(0, 50, 5))


def test_timesteps_of_one_s_own_are_a_schedule_that_was_set():
    """DDPM leaves its number of steps unset for these."""
    pipe = agentsd.apply_patch(make_pipeline(scheduler=make_scheduler(DDPMScheduler)), 0, cache_interval=0.25)
    calls = calls_made(pipe.unet)
    image(pipe, timesteps=list(range(950, 0, -50)))
    assert calls == [i % 5 == 0 for i in range(19)]


def test_img2img_has_full_calls_as_far_apart_as_the_whole_schedule_and_dense_at_its_own_start():
    pipe = agentsd.apply_patch(make_img2img(), **ONLY_REUSE, cache_order=1)
    calls = calls_made(pipe.unet)
    image(pipe, steps=20, image=torch.zeros(1, 3, 16, 16), strength=0.5)
    assert calls == list(full_calls(10, agentsd.Settings(**ONLY_REUSE, cache_order=1))) and not all(calls)


def test_removal_gives_the_pipeline_back(kind):
    pipe = make_pipeline(kind)
    plain = image(pipe)
    anatomy = {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()}
    agentsd.apply_patch(pipe, **ONLY_REUSE)
    assert not torch.equal(image(pipe), plain)
    agentsd.remove_patch(pipe)
    assert {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()} == anatomy
    assert torch.equal(image(pipe), plain)


@pytest.mark.parametrize("branch", range(3))
def test_a_cheap_call_at_the_same_point_equals_the_whole_one(kind, branch):
    """With the deep features of the very same input, skipping them changes nothing: the sum of all the shapes."""
    unet, inputs = make_unet(kind), unet_inputs(kind)
    expected = unet(**inputs).sample
    agentsd.apply_patch(unet, 0, cache_interval=2, cache_branch=branch)
    calls = calls_made(unet)
    assert torch.equal(unet(**inputs).sample, expected)
    nearby = {**inputs, "timestep": inputs["timestep"] - 1e-6}
    torch.testing.assert_close(unet(**nearby).sample, expected)
    assert calls == [True, False]


@pytest.mark.parametrize("branch", range(4))
@torch.no_grad()
def test_layers_of_several_attentions_are_skipped_as_one(branch):
    """As AudioLDM 2 has them."""
    torch.manual_seed(0)
    widths = {"block_out_channels": (16, 32), "cross_attention_dim": ((None, 16, 24),) * 2, "attention_head_dim": 4}
    ways = {f"{way}_block_types": (f"CrossAttn{way.title()}Block2D",) * 2 for way in ("down", "up")}
    unet = AudioLDM2UNet2DConditionModel(in_channels=4, out_channels=4, norm_num_groups=8, **widths, **ways).eval()
    x, texts = torch.randn(2, 4, 16, 16), (torch.randn(2, 5, 16), torch.randn(2, 5, 24))
    call = lambda t: unet(x, t, encoder_hidden_states=texts[0], encoder_hidden_states_1=texts[1]).sample
    expected = call(601.0)
    agentsd.apply_patch(unet, 0, cache_interval=2, cache_branch=branch)
    for timestep in (601.0, 600.9999):
        torch.testing.assert_close(call(timestep), expected, rtol=0, atol=1e-5)
    assert agentsd.report(unet).last == {"full": 1, "cached": 1}


def test_cheap_calls_run_what_the_branch_says():
    unet = make_unet(layers_per_block=2)
    middles = [UNet().middle(unet, branch) for branch in range(5)]
    names = [{*middle.unread, middle.last} for middle in middles]
    assert "down_blocks.0" in names[0] and "up_blocks.1.attentions.1" in names[0]
    assert "down_blocks.0.attentions.0" not in names[1] and "down_blocks.0.attentions.1" in names[1]
    assert "up_blocks.1.attentions.0" in names[1] and "up_blocks.1.attentions.1" not in names[1]
    assert "down_blocks.0.downsamplers.0" in names[2] and "up_blocks.0" in names[2]
    assert "down_blocks.0.downsamplers.0" not in names[3] and "up_blocks.0.resnets.1" in names[3]
    with pytest.raises(ValueError, match="cache_branch=5 is not allowed: expected 0 to 4"):
        agentsd.apply_patch(unet, cache_interval=2, cache_branch=5)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_schedulers_with_more_calls_than_steps(scheduler):
    pipe = agentsd.apply_patch(make_pipeline(scheduler=make_scheduler(scheduler)), **ONLY_REUSE)
    calls = calls_made(pipe.unet)
    assert image(pipe, steps=6).isfinite().all()
    assert calls == [i % 3 == 0 for i in range(len(calls))]


def test_guidance_in_two_calls_keeps_two_lanes():
    """A step whose calls come one by one gives what one call of both gives."""
    unet, inputs = make_unet(), unet_inputs()
    timesteps = [900, 600, 300]
    split = lambda i: {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    agentsd.apply_patch(unet, **ONLY_REUSE)
    together = [unet(**{**inputs, "timestep": t}).sample for t in timesteps]
    agentsd.apply_patch(unet, **ONLY_REUSE)
    for t, expected in zip(timesteps, together, strict=True):
        for i in range(2):
            torch.testing.assert_close(unet(**{**split(i), "timestep": t}).sample, expected[i : i + 1])


def test_a_step_of_fewer_calls_than_the_last_mixes_up_no_prompts_after_it():
    """Guidance in two calls that is switched off: the first of the two has been somebody else's."""
    unet = agentsd.apply_patch(make_unet(), 0, cache_interval=10)
    calls = calls_made(unet)
    for timestep in (900, 900, 800, 800, 700, 600, 500):
        unet(**{**unet_inputs(), "timestep": timestep})
    assert calls == [True, True, True, True, False, True, False]


def test_img2img_starts_in_the_middle():
    pipe = agentsd.apply_patch(make_img2img(), **ONLY_REUSE)
    calls = calls_made(pipe.unet)
    image(pipe, steps=10, image=torch.zeros(1, 3, 16, 16), strength=0.5)
    assert calls == [True, False, False, True, False]


def test_an_interrupted_image_leaves_nothing_to_the_next():
    pipe = agentsd.apply_patch(make_pipeline(), **ONLY_REUSE)
    expected = image(pipe)

    def interrupt(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        image(pipe, seed=1, callback_on_step_end=interrupt)
    assert torch.equal(image(pipe), expected)


def test_a_change_of_size_starts_anew():
    unet = agentsd.apply_patch(make_unet(), **ONLY_REUSE)
    calls = calls_made(unet)
    for size, timestep in ((16, 900), (16, 800), (24, 700), (24, 600)):
        assert unet(**unet_inputs(height=size, width=size, timestep=timestep)).sample.shape[-1] == size
    assert calls == [True, False, True, False]


@pytest.mark.parametrize("whole", [{"ratio": 0}, {"ratio": 0.4}, {"sample_kv": True, "agent_sx": 2}])
def test_with_a_cell_cheap_calls_sample_and_calls_made_do_what_they_did(kind, whole):
    """A whole call is bit-equal to one without the cell; a cheap one has fewer keys where it runs attention at all."""
    unet, keys = make_unet(kind), []
    inputs = [unet_inputs(kind, timestep=t) for t in (900, 800)]
    agentsd.apply_patch(unet, **whole, cache_interval=2)
    without = [unet(**x).sample for x in inputs]
    agentsd.apply_patch(unet, **whole, cache_interval=2, cache_cell=4)
    attn = unet.get_submodule(agentsd.report(unet).layers[-1].name).attn1
    hook = lambda _, args, kwargs: keys.append(kwargs["encoder_hidden_states"])
    attn.register_forward_pre_hook(hook, with_kwargs=True)
    with_cell = [unet(**x).sample for x in inputs]
    assert torch.equal(with_cell[0], without[0])
    if kind == "sdxl":  # its outermost layers have no attention
        assert torch.equal(with_cell[1], without[1]) and len(keys) == 1
    else:
        assert not torch.equal(with_cell[1], without[1])
        assert keys[1].shape[1] == 256 // 16


def test_a_cell_needs_a_processor_that_can_sample_and_the_report_says_so():
    unet = make_unet()
    unet.fuse_qkv_projections()
    inputs = [unet_inputs(timestep=t) for t in (900, 800)]
    agentsd.apply_patch(unet, ratio=0, cache_interval=2)
    without = [unet(**x).sample for x in inputs]
    agentsd.apply_patch(unet, ratio=0, cache_interval=2, cache_cell=2)
    assert all(torch.equal(unet(**x).sample, expected) for x, expected in zip(inputs, without, strict=True))
    assert "FusedAttnProcessor2_0 cannot sample keys and values in cached calls" in str(agentsd.report(unet))


def test_the_report_tells_of_the_cell():
    report = str(agentsd.report(agentsd.apply_patch(make_unet(), preset="balanced")))
    # the others are skipped in cheap calls, and left alone in whole ones
    assert "1 of 4 transformer blocks patched" in report
    assert "one key of each 2x2, cached calls" in report and "64 keys and values (attention costs 25%)" in report
    assert "unchanged   skipped" in report
    sdxl = str(agentsd.report(agentsd.apply_patch(make_unet("sdxl"), preset="balanced")))
    assert sdxl.startswith("agentsd: 10 of 50 calls are full; a cached call runs ")
    assert "attention is left as it is" in sdxl and "cache_cell changes nothing" in sdxl


def test_freeu_scales_no_feature_twice():
    """Cheap calls right after a whole one, at the same input, equal it: FreeU scales features where they are."""
    unet, inputs = make_unet(layers_per_block=2), unet_inputs()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    expected = unet(**inputs).sample
    agentsd.apply_patch(unet, ratio=0, cache_interval=4, cache_branch=3)
    for i in range(4):
        torch.testing.assert_close(unet(**{**inputs, "timestep": inputs["timestep"] - i * 1e-6}).sample, expected)


def test_without_a_pipeline_images_of_one_step_leave_a_bounded_trace():
    unet = agentsd.apply_patch(make_unet(), **ONLY_REUSE)
    for _ in range(20):
        unet(**unet_inputs(timestep=999))
    assert sum(len(track.lanes) for track in unet._agentsd_patch._now.tracks) <= 4


@pytest.mark.parametrize("order", [0, 1])
def test_more_calls_a_step_than_can_be_told_apart_reuse_nothing(order):
    """Six images in lockstep, one call each: none gets the features of another."""
    unet, images = make_unet(), [{**unet_inputs(), "sample": torch.randn(2, 4, 16, 16)} for _ in range(6)]
    steps = range(900, 100, -100)
    expected = [[unet(**{**inputs, "timestep": t}).sample for inputs in images] for t in steps]
    agentsd.apply_patch(unet, ratio=0, cache_interval=3, cache_order=order)
    with pytest.warns(UserWarning, match="reuses no features"):
        found = [[unet(**{**inputs, "timestep": t}).sample for inputs in images] for t in steps]
    assert all(torch.equal(a, b) for row in zip(found, expected, strict=True) for a, b in zip(*row, strict=True))


@pytest.mark.filterwarnings("error:agentsd reuses no features")
@pytest.mark.parametrize("lanes", [1, 4])
def test_full_calls_in_a_row_that_are_planned_are_no_warning(lanes):
    """Dense at the start, a table of many full calls has nine and more in a row."""
    pipe, text = make_pipeline(), unet_inputs()["encoder_hidden_states"]
    inputs = [unet_inputs() | {"encoder_hidden_states": text + i} for i in range(lanes)]
    agentsd.apply_patch(pipe, ratio=0, cache_interval=2, cache_order=1)
    pipe.scheduler.set_timesteps(50)
    for t in pipe.scheduler.timesteps:
        for each in inputs:
            pipe.unet(**{**each, "timestep": t})
    full = full_calls(50, agentsd.Settings(cache_interval=2, cache_order=1))
    assert all(full[:9]) and agentsd.report(pipe).last["full"] == lanes * sum(full)


@pytest.mark.parametrize("made", [1, 2, 5])
def test_images_that_end_before_their_first_cached_call_are_told_of(made):
    pipe, inputs = make_pipeline(), unet_inputs()
    agentsd.apply_patch(pipe, ratio=0, cache_interval=2, cache_order=1)
    pipe.scheduler.set_timesteps(50)
    with pytest.warns(UserWarning, match="reuses no features: nothing could be reused of"):
        for _ in range(40):
            for t in pipe.scheduler.timesteps[:made]:
                pipe.unet(**{**inputs, "timestep": t})


@pytest.mark.filterwarnings("error:agentsd reuses no features")
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("order", [0, 1])
def test_images_that_are_cancelled_before_one_that_is_not_are_no_warning(lanes, order):
    pipe, text = make_pipeline(), unet_inputs()["encoder_hidden_states"]
    inputs = [unet_inputs() | {"encoder_hidden_states": text + i} for i in range(lanes)]
    agentsd.apply_patch(pipe, ratio=0, cache_interval=0.125, cache_order=order)
    for steps in (1, 1, 1, 20):
        pipe.scheduler.set_timesteps(20)
        for t in pipe.scheduler.timesteps[:steps]:
            for each in inputs:
                pipe.unet(**{**each, "timestep": t})
    assert agentsd.report(pipe).last["cached"] > 0


def test_what_cannot_be_reused_changes_nothing():
    """The patch from before stays, and goes without a trace."""
    pipe = make_pipeline()
    plain = image(pipe)
    agentsd.apply_patch(pipe, seed=0)
    patched = image(pipe)
    with pytest.raises(ValueError, match="cache_branch=99"):
        agentsd.apply_patch(pipe, cache_interval=2, cache_branch=99)
    assert torch.equal(image(pipe), patched)
    agentsd.remove_patch(pipe)
    assert torch.equal(image(pipe), plain)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_recorded_gradients_are_whole():
    unet = agentsd.apply_patch(make_unet(), **ONLY_REUSE)
    calls = calls_made(unet)
    with torch.enable_grad():
        for timestep in (900, 800):
            unet(**unet_inputs(timestep=timestep)).sample.sum().backward()
    assert calls == [True, True]


def test_controlnet_residuals_are_added():
    unet, inputs = agentsd.apply_patch(make_unet(), **ONLY_REUSE), unet_inputs()
    shapes = [(16, 16, 16)] * 2 + [(16, 8, 8), (32, 8, 8)]
    inputs["down_block_additional_residuals"] = [torch.ones(2, *shape) for shape in shapes]
    inputs["mid_block_additional_residual"] = torch.ones(2, 32, 8, 8)
    for timestep in (900, 800):
        assert unet(**{**inputs, "timestep": timestep}).sample.isfinite().all()


@pytest.mark.parametrize(
    "preset, calls, places",
    [
        ("quality", 20, [0, 1, 2, 3, 4, 6, 8, 10, 12, 15, 18]),
        ("balanced", 20, [0, 1, 2, 4, 7, 10, 14, 18]),
        ("fast", 20, [0, 1, 2, 5, 8, 13, 18]),
        ("balanced", 30, [0, 1, 3, 5, 8, 12, 16, 22, 28]),
        ("quality", 50, [0, 1, 3, 5, 8, 12, 16, 21, 27, 33, 40, 48]),
        ("balanced", 50, [0, 1, 3, 7, 11, 16, 23, 30, 39, 48]),
        ("fast", 50, [0, 1, 4, 9, 16, 25, 36, 48]),
    ],
)
def test_the_full_calls_that_were_measured(preset, calls, places):
    """In benchmarks/NOTES.md: other places are other figures."""
    full = full_calls(calls, agentsd.Settings(**agentsd.PRESETS[preset]))
    assert [place for place, ran in enumerate(full) if ran] == places


def test_lines_slow_down_by_what_the_schedule_is_long():
    """And are straight where nobody says."""
    assert slowing(50) ** 50 == pytest.approx(math.exp(-SLOWING)) and slowing(None) == 1.0
    pipe = agentsd.apply_patch(make_pipeline(), preset="balanced")
    image(pipe, steps=8)
    assert [lane.slowing for track in pipe.unet._agentsd_patch._now.tracks for lane in track.lanes] == [slowing(8)]


def test_a_line_is_extrapolated_exactly_but_none_is_drawn_from_the_first_call():
    lane, at = Lane(order=1), lambda call: torch.tensor([1.0, 2.0]) * call
    for call in range(12):
        lane.begin()
        if call < 2 or call % 3 == 0:
            lane.remember(at(call))
        else:
            torch.testing.assert_close(lane.estimate(), at(call if call > 2 else 1))


@given(st.floats(0.5, 0.999), st.integers(1, 8), st.integers(1, 8))
def test_features_that_slow_down_evenly_are_extrapolated_exactly(factor, gap, age):
    """But no further than the two full calls are apart."""
    lane = Lane(order=1, slowing=factor)
    heading, moved = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 4.0])
    at = lambda call: heading + moved * factor**call
    for call in range(2 + gap + age):
        lane.begin()
        if call < 2 or call == 1 + gap:
            lane.remember(at(call))
    latest, ahead = at(1 + gap), at(1 + gap + age) - at(1 + gap)
    assert lane.gap == gap and lane.age == age
    if (ahead.norm() > (at(1 + gap) - at(1)).norm()).item():
        ahead = at(1 + gap) - at(1)
    torch.testing.assert_close(lane.estimate(), latest + ahead, rtol=1e-4, atol=1e-4)


def test_no_line_is_followed_further_than_it_is_long():
    """Two whole calls in a row say little of what comes three calls later."""
    lane = Lane(order=1)
    for call in range(3):
        lane.begin()
        lane.remember(torch.tensor([float(call)]))
    for expected in (3, 3, 3):
        lane.begin()
        torch.testing.assert_close(lane.estimate(), torch.tensor([float(expected)]))


def test_what_an_interrupted_full_call_lacks_is_made_up_for():
    """Calls go on after a full one failed: features get no older than the interval allows."""
    unet = agentsd.apply_patch(make_unet(), **ONLY_REUSE)
    calls, inputs = calls_made(unet), unet_inputs()
    for call, timestep in enumerate(range(900, 0, -100)):
        handle = unet.time_proj.register_forward_hook(lambda *_: 1 / 0) if call == 3 else None
        try:
            unet(**{**inputs, "timestep": timestep})
        except ZeroDivisionError:
            handle.remove()
    assert calls == [True, False, False, False, True, False, True, False, False]


def test_memory_is_stated():
    unet = agentsd.apply_patch(make_unet(), **ONLY_REUSE)
    assert agentsd.report(unet).cache_bytes == 0
    unet(**unet_inputs())
    features = 2 * 32 * 16 * 16 * 4  # into the last layer on the way up
    assert agentsd.report(unet).cache_bytes in (features, features // 2)
    assert "feature reuse" in str(agentsd.report(unet))


def test_the_interval_counts_each_lane_alone():
    """A step of two calls, of different prompts, has two full calls or none."""
    unet = agentsd.apply_patch(make_unet(), 0, cache_interval=2)
    calls, prompts = (
        calls_made(unet),
        [unet_inputs(), {**unet_inputs(), "encoder_hidden_states": torch.ones(2, 5, 16)}],
    )
    for timestep in (900, 800, 700):
        for inputs in prompts:
            unet(**{**inputs, "timestep": timestep})
    assert calls == [True, True, False, False, True, True]


def test_what_is_added_follows_its_input_where_order_is_1():
    """A sum that is a line of its input in each channel is estimated as it is; inputs that stay leave it as it was."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=generator)
    slope, offset, inputs = 1.8 * draw(2, 1, 4) - 0.9, draw(2, 6, 4), draw(5, 2, 6, 4)
    lane = Lane(order=0, follows=True)
    for i, x in enumerate(inputs):
        lane.begin()
        if i > 1:
            torch.testing.assert_close(along(lane.estimate(), x), slope * x + offset)
        if i < 3:
            lane.remember(torch.stack((x, slope * x + offset)))
    lane = Lane(order=0, follows=True)
    for _ in range(2):
        lane.begin()
        lane.remember(torch.stack((inputs[0], offset)))
        assert torch.equal(along(lane.estimate(), inputs[1]), offset)


@pytest.mark.parametrize("calls", [5, 13, 20, 28, 50, None])
@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("interval", [0.125, 2, 7])
def test_features_that_follow_their_input_come_from_full_calls_that_are_evenly_apart(calls, begin, interval):
    """From the first to the last but one. In few calls the second is full, too; without a schedule, and with
    ``cache_order`` 0, they are those of all others.
    """
    settings, uniform = (agentsd.Settings(cache_interval=interval, cache_order=order) for order in (1, 0))
    full, gap = full_calls(calls, settings, begin, evenly=True), interval_of(interval, calls)
    places = [place for place, ran in enumerate(full[begin:]) if ran]
    gaps = {b - a for a, b in pairwise(places)}
    if calls is None:
        assert full == full_calls(calls, uniform, begin)
    elif calls - begin < EVEN_CALLS:
        assert places[0] == 0 and full[begin + 1] and full[-2]
        between = [b - a for a, b in pairwise(places) if a > 1 or (a == 1 and begin == 0)]
        assert not between or max(between) - min(between) <= 1
    else:
        assert places[0] == 0 and places[-1] == calls - begin - 2 and max(gaps) - min(gaps) <= 1
        assert min(gaps) >= gap and len(places) < sum(full_calls(calls, settings, begin))
    assert full_calls(calls, uniform, begin, evenly=True) == full_calls(calls, uniform, begin)


@pytest.mark.parametrize("calls", [5, 20, 25, 50, None])
@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("interval", [0.125, 2, 7])
def test_full_calls(calls, begin, interval):
    """The first is full, with extrapolation the second and the last but one, too, and gaps grow from there on: full
    calls are as many as if they were evenly apart.
    """
    for order in (0, 1):
        full = full_calls(calls, agentsd.Settings(cache_interval=interval, cache_order=order), begin)
        made, apart = full[begin:], interval_of(interval, calls)
        assert made[0] and (not order or made[1])
        assert calls is None or (len(full) == calls and (not order or made[-2]))
        gaps = [b - a for a, b in pairwise(place for place, ran in enumerate(made) if ran)]
        if order == 0 or calls is None:
            assert all(gap == apart for gap in gaps[2 * order :])
        else:
            # rounded to whole calls, gaps may be one shorter than the gap before
            assert all(b >= a - 1 for a, b in pairwise(gaps)) and sum(gaps[: len(gaps) // 2]) <= sum(gaps) / 2
            assert 0 <= sum(made) - len(made[-2::-apart]) <= 2
