"""Inference mode, half precision, hostile arguments: as without a patch, or a clear error."""

import copy
import io
import pickle

import diffusers
import numpy as np
import pytest
import torch
from conftest import embeddings, image, make_pipeline, make_scheduler, make_unet, unet_inputs
from situations import SETTINGS, distance, inputs_of, sweep
from zoo import build, runner

import agentsd

# Inference mode, and what comes after it


def loss_and_gradients(unet):
    unet.train().zero_grad()
    with torch.enable_grad():
        loss = sum(unet(**unet_inputs(timestep=t)).sample.square().mean() for t in (901, 101))
        loss.backward()
    return [p.grad.clone() for p in unet.parameters() if p.grad is not None]


SETTINGS_AND_LAYERS = SETTINGS | {"every layer": {"seed": 0, "merge_mlp": True, "merge_crossattn": True}}


@pytest.mark.parametrize("mode", sweep([torch.inference_mode, torch.no_grad], [torch.inference_mode]))
@pytest.mark.parametrize("name", sweep(SETTINGS_AND_LAYERS, ["sampling", "every layer"]))
def test_training_after_inference(name, mode):
    """The gradients are those of a UNet that was never called before."""
    settings = SETTINGS_AND_LAYERS[name]
    expected = loss_and_gradients(agentsd.apply_patch(make_unet(), **settings))
    unet = agentsd.apply_patch(make_unet(), **settings)
    with mode():
        for timestep in (901, 101):
            unet(**unet_inputs(timestep=timestep))
    found = loss_and_gradients(unet)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", sweep(SETTINGS_AND_LAYERS))
def test_a_patch_applied_in_inference_mode(name):
    """Where the patch was applied does not matter to what is trained afterwards."""
    settings = SETTINGS_AND_LAYERS[name]
    unet = make_unet()
    with torch.inference_mode():
        agentsd.apply_patch(unet, **settings)
        unet(**unet_inputs(timestep=901))
    expected = loss_and_gradients(agentsd.apply_patch(make_unet(), **settings))
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(unet), expected, strict=True))


MODES = {
    "one call each": [torch.inference_mode, torch.no_grad] * 4,
    "inference mode first": [torch.inference_mode] * 2 + [torch.no_grad] * 6,
    "gradients in between": [torch.inference_mode, torch.inference_mode, torch.enable_grad] + [torch.no_grad] * 5,
}


def in_modes(unet, modes):
    residuals = [torch.full((2, 16, 16, 16), 0.1)] * 2 + [torch.full((2, c, 8, 8), 0.1) for c in (16, 32)]
    found = []
    for call, mode in enumerate(modes):
        with mode():
            inputs = unet_inputs(timestep=900 - 100 * call)
            extra = {
                "down_block_additional_residuals": [r.clone() for r in residuals],
                "mid_block_additional_residual": torch.full((2, 32, 8, 8), 0.1),
            }
            found.append(unet(**inputs, **extra).sample)
    return found


@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", sweep(SETTINGS, ["balanced"]))
def test_modes_that_change_within_an_image(name, modes):
    """Each call is what it is with `no_grad` throughout; a recorded one may be full where the other is not."""
    expected = in_modes(agentsd.apply_patch(make_unet(), **SETTINGS[name]), [torch.no_grad] * len(modes))
    found = in_modes(agentsd.apply_patch(make_unet(), **SETTINGS[name]), modes)
    assert all(output.isfinite().all() for output in found)
    if torch.enable_grad not in modes:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", sweep(SETTINGS))
def test_copies_after_inference_mode(name):
    """Deep copies and pickles of a UNet that ran there, which then train and draw."""
    unet = agentsd.apply_patch(make_unet(), **SETTINGS[name])
    with torch.inference_mode():
        unet(**unet_inputs(timestep=901))
    expected = loss_and_gradients(agentsd.apply_patch(make_unet(), **SETTINGS[name]))
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(twin), expected, strict=True))


# Half precision


def keys_of(x: torch.Tensor, dtype: torch.dtype, **settings) -> torch.Tensor:
    """The tokens (B, M, C) that the value projection of the first block gets where the block is given ``x``."""
    unet = make_unet(block_out_channels=(x.shape[-1], 32))
    block, seen = unet.down_blocks[0].attentions[0].transformer_blocks[0], []

    def give(block, args, kwargs):
        return (x.to(block.norm1.weight.dtype), *args[1:]), kwargs

    block.register_forward_pre_hook(give, with_kwargs=True)
    block.norm1.register_forward_hook(lambda *_: x.to(block.norm1.weight.dtype))  # merged as they are
    block.attn1.to_v.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
    agentsd.apply_patch(unet, agent_steps=0, use_rand=False, **settings)
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in unet_inputs().items()}
    unet.to(dtype)(**inputs)
    return seen[0]


def tokens(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(5)) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-8, 2.0**13])
def test_tokens_match_by_direction_however_large_they_are(scale, dtype):
    """Norms leave float16's range where the tokens themselves do not: a power of two changes no match."""
    x = tokens().to(dtype).float()
    small, large = keys_of(x, dtype), keys_of(x * scale, dtype)
    torch.testing.assert_close(large / scale, small, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_of_zeros_attracts_no_others(dtype):
    """A dst token without a direction is nearest to none, so it stays what it is."""
    x = tokens()
    x[:, 2 * 16 + 4] = 0  # the top left of a cell
    kept = (keys_of(x, dtype).abs().amax(-1) <= 1e-6).sum(-1)
    assert kept.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fill", [0.0, 1.0, 60_000.0])
def test_tokens_that_are_all_alike(fill, dtype):
    """Ties merge somehow, and the merged tokens are what all of them were."""
    merged = keys_of(torch.full((2, 256, 64), fill), dtype)
    torch.testing.assert_close(merged, torch.full_like(merged, fill).to(dtype).float(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents"]))
def test_the_batch_does_not_matter_in_half_precision(name, dtype):
    """Guidance in two calls is that in one, but for rounding."""
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in unet_inputs().items()}
    together = agentsd.apply_patch(make_unet(), **SETTINGS[name]).to(dtype)(**inputs).sample.float()
    unet = agentsd.apply_patch(make_unet(), **SETTINGS[name]).to(dtype)
    for i in range(2):
        one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        assert distance(unet(**one).sample.float(), together[i : i + 1]) < 0.05


# Hostile arguments


@pytest.mark.parametrize(
    "preset",
    [[], {}, set(), ["balanced"], ("balanced",), np.array(["balanced"]), 1, True, b"fast", "", torch.nn.Linear],
    ids=repr,
)
def test_a_preset_that_is_no_name(preset):
    """Any object is refused by the same error, which lists the names."""
    unet = make_unet()
    with pytest.raises((TypeError, ValueError), match=r"preset=.* is not allowed: expected one of 'quality'"):
        agentsd.apply_patch(unet, preset=preset)
    with (
        pytest.raises((TypeError, ValueError), match=r"preset=.* is not allowed"),
        agentsd.patched(unet, preset=preset),
    ):
        pass
    assert agentsd.report(unet).settings is None


@pytest.mark.parametrize("value", [1e308, -1e308, 1e40, 3e38, 10**400, float("inf"), float("nan"), 1e-320, -0.0])
@pytest.mark.parametrize("setting", ["k_shortcut", "k_scale2"])
def test_constants_of_any_size(setting, value):
    """Refused at once by an error that names the constant, or of use in a call."""
    unet = make_unet()
    try:
        agentsd.apply_patch(unet, agent_steps=1, **{setting: value})
    except (TypeError, ValueError) as error:
        assert f"{setting}=" in str(error) and "is not allowed" in str(error)
        assert agentsd.report(unet).settings is None
    else:
        assert unet(**unet_inputs()).sample.shape == (2, 4, 16, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unet(**unet_inputs())


HUGE = {
    "sx": 10**30, "sy": 2**64, "agent_sx": 2**63, "agent_sy": 10**400, "min_tokens": 10**400, "seed": 2**64,
    "cache_branch": 10**30, "cache_cell": 2**64, "cache_interval": 1e308,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:agentsd changes nothing")
@pytest.mark.parametrize("setting", HUGE)
def test_counts_of_any_size(setting):
    """The same for cells, thresholds, intervals, and seeds."""
    unet = make_unet()
    extra = {"cache_interval": 2} if setting in ("cache_branch", "cache_cell") else {}
    try:
        agentsd.apply_patch(unet, **{setting: HUGE[setting]}, **extra)
    except (TypeError, ValueError) as error:
        assert f"{setting}=" in str(error) and "is not allowed" in str(error)
    else:
        for timestep in (900, 800, 100):
            assert unet(**unet_inputs(timestep=timestep)).sample.isfinite().all()
        assert str(agentsd.report(unet))


NO_TIMES = [
    float("nan"), float("inf"), -float("inf"), -5, 1e9, 1e300, True, np.float32(3.3), np.int64(5),
    torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor([float("nan"), 5.0]), torch.tensor([5, 900]),
    torch.tensor(5, dtype=torch.int8), torch.tensor(5.0, dtype=torch.bfloat16), torch.tensor([]), "5", None,
]  # fmt: skip


def outcome(call):
    try:
        output = call()
    except Exception as error:
        return type(error)
    return output.sample.isfinite().flatten().tolist()


@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "reuse"]))
@pytest.mark.parametrize("timestep", NO_TIMES, ids=repr)
def test_timesteps_that_are_none(timestep, name):
    """The same values are finite as without a patch, or the same error comes; the next call is right."""
    unet = agentsd.apply_patch(make_unet(), **SETTINGS[name])
    expected = outcome(lambda: make_unet()(**unet_inputs(timestep=timestep)))
    assert outcome(lambda: unet(**unet_inputs(timestep=timestep))) == expected
    right = agentsd.apply_patch(make_unet(), **SETTINGS[name])
    assert torch.equal(unet(**unet_inputs(timestep=950)).sample, right(**unet_inputs(timestep=950)).sample)


CALLS = {
    "nothing": lambda unet: unet(),
    "latents alone": lambda unet: unet(unet_inputs()["sample"]),
    "no text": lambda unet: unet(unet_inputs()["sample"], 5),
    "no text, by name": lambda unet: unet(sample=unet_inputs()["sample"], timestep=5),
    "a timestep alone": lambda unet: unet(timestep=5),
    "no timestep": lambda unet: unet(**{k: v for k, v in unet_inputs().items() if k != "timestep"}),
    "latents twice": lambda unet: unet(unet_inputs()["sample"], **unet_inputs()),
    "an argument too many": lambda unet: unet(**unet_inputs(), nonsense=1),
    "latents that are none": lambda unet: unet(None, 5, None),
    "latents of a list": lambda unet: unet(**unet_inputs() | {"sample": [1, 2]}),
}


@pytest.mark.parametrize("name", sweep(SETTINGS, ["balanced"]))
@pytest.mark.parametrize("call", CALLS)
def test_calls_that_lack_an_argument(call, name):
    """The error is that of the UNet itself: of the same type, with the same words."""
    with pytest.raises(Exception) as plain:
        CALLS[call](make_unet())
    unet = agentsd.apply_patch(make_unet(), **SETTINGS[name])
    with pytest.raises(type(plain.value)) as patched:
        CALLS[call](unet)
    assert str(patched.value) == str(plain.value)
    expected = agentsd.apply_patch(make_unet(), **SETTINGS[name])(**inputs_of(0)).sample
    assert torch.equal(unet(**inputs_of(0)).sample, expected)


# Pickles


@pytest.mark.parametrize("name", sweep(SETTINGS, ["balanced"]))
@pytest.mark.parametrize(
    "kind",
    ["DPMSolverSDEScheduler", "EulerDiscreteScheduler", "CosineDPMSolverMultistepScheduler", "EDMEulerScheduler"],
)
def test_a_unet_is_pickled_whatever_its_scheduler_holds(kind, name):
    """Generators of SDE schedulers cannot be pickled: they are not the UNet's."""
    pipe = make_pipeline()
    cls = getattr(diffusers, kind)
    pipe.scheduler = cls() if "EDM" in kind or "Cosine" in kind else make_scheduler(cls)
    agentsd.apply_patch(pipe, **SETTINGS[name])
    image(pipe, steps=3)
    file = io.BytesIO()
    torch.save(pipe.unet, file)
    file.seek(0)
    for twin in (
        pickle.loads(pickle.dumps(pipe.unet)),
        torch.load(file, weights_only=False),
        copy.deepcopy(pipe.unet),
    ):
        assert twin(**unet_inputs(timestep=900)).sample.isfinite().all()
        assert agentsd.report(twin).settings == agentsd.report(pipe).settings


@pytest.mark.parametrize("name", sweep(SETTINGS, ["balanced"]))
def test_a_pickle_holds_no_features(name):
    """What is saved is as large after an image as before one."""
    pipe = agentsd.apply_patch(make_pipeline(), **SETTINGS[name])
    before = len(pickle.dumps(pipe.unet))
    image(pipe, steps=4)
    assert len(pickle.dumps(pipe.unet)) < before + 20_000


# Guidance that reads attention


@pytest.mark.parametrize("most", sweep([None, 8], [8]))
@pytest.mark.parametrize("name", sweep(SETTINGS))
def test_self_attention_guidance(name, most):
    """It reads the middle's attention map of all tokens: the image is near the unpatched one, or an error says why."""
    pipe = build("StableDiffusionSAGPipeline")
    run = runner(pipe, sag_scale=0.75)
    plain = run()
    agentsd.apply_patch(pipe, **SETTINGS[name], max_downsample=most)
    try:
        found = run()
    except (ValueError, RuntimeError) as error:
        assert "agentsd" in str(error) and "max_downsample" in str(error), error
    else:
        assert distance(found, plain) < 0.5 and torch.equal(run(), found)
    agentsd.remove_patch(pipe)
    assert torch.equal(run(), plain)


# Types that change


@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "adaptive"]))
def test_double_precision(name):
    pipe = make_pipeline().to(torch.float64)
    given = {key: x.double() for key, x in embeddings().items()}
    draw = lambda: (
        pipe(**given, num_inference_steps=12, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    )
    expected = draw()
    agentsd.apply_patch(pipe, **SETTINGS[name])
    found = draw()
    assert found.dtype == torch.float64 and distance(found, expected) < 0.2


CHANGES = {"begins": (7, 14), "ends": (0, 7), "in turns": (0, 14, 2), "every third": (0, 14, 3)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", sweep(SETTINGS, ["agents", "balanced", "adaptive"]))
@torch.no_grad()
def test_autocast_that_begins_or_ends_within_an_image(name, change):
    """Features in half precision are those of other calls than features in float32."""
    found = []
    for settings in (None, SETTINGS[name]):
        unet = make_unet() if settings is None else agentsd.apply_patch(make_unet(), **settings)
        for i in range(14):
            inputs = unet_inputs(timestep=900 - 20 * i)
            inputs["sample"] *= 1 - 0.01 * i
            with torch.autocast("cpu", torch.bfloat16, enabled=i in range(*CHANGES[change])):
                found.append(unet(**inputs).sample.float())
    assert max(distance(a, b) for a, b in zip(found[14:], found[:14], strict=True)) < 0.2
