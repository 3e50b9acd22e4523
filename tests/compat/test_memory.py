"""Features that save memory, back ends, and training."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from checks import check, distance
from conftest import make_unet, sweep, unet_inputs
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from zoo import PIPELINES, runner
from zoo_transformers import MODELS, TRANSFORMERS

import agentsd
from agentsd.models import denoiser_of

LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian")


CPU = torch.device("cpu")  # in the accelerator's place


def model_offload(pipe):
    """What `enable_model_cpu_offload` does to the denoiser."""
    net, hook = cpu_offload_with_hook(denoiser_of(pipe), CPU)
    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", net)
    pipe._all_hooks = [hook]


def sequential_offload(pipe):
    """Of all parts, since a pipeline asks its first one where to run."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, CPU)


def group_offload(pipe, **how):
    apply_group_offloading(denoiser_of(pipe), onload_device=CPU, offload_device=CPU, **how)


def naive_attention(pipe):
    denoiser_of(pipe).set_attn_processor(diffusers.models.attention_processor.AttnProcessor())


def quantised(pipe):
    """Weights in int8; those of a text encoder and a VAE are not the patch's business."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(denoiser_of(pipe), quantization.Int8WeightOnlyConfig())


ALL = tuple(MODELS)
FEATURES = {
    "attention slicing": (lambda pipe: pipe.enable_attention_slicing(1), ("UNet",)),
    "VAE slicing": (lambda pipe: pipe.vae.enable_slicing(), ALL),
    "VAE tiling": (lambda pipe: pipe.vae.enable_tiling(), ALL),
    "model offload": (model_offload, ALL),
    "sequential offload": (sequential_offload, ALL),
    "group offload": (lambda pipe: group_offload(pipe, offload_type="leaf_level"), ALL),
    "group offload, block by block": (
        lambda pipe: group_offload(pipe, offload_type="block_level", num_blocks_per_group=1),
        ALL,
    ),
    "channels_last": (lambda pipe: denoiser_of(pipe).to(memory_format=torch.channels_last), ALL),
    "gradient checkpointing": (lambda pipe: denoiser_of(pipe).enable_gradient_checkpointing(), ALL),
    "set_attention_backend": (lambda pipe: denoiser_of(pipe).set_attention_backend("native"), ALL),
    "naive attention": (naive_attention, ("UNet", "PixArt")),
    "layerwise casting": (
        lambda pipe: denoiser_of(pipe).enable_layerwise_casting(torch.bfloat16, torch.float32),
        ALL,
    ),
    "half precision": (lambda pipe: pipe.to(torch.bfloat16), ALL),
    "int8 weights of torchao": (quantised, ALL),
}
CASES = [(feature, model) for feature, (_, models) in FEATURES.items() for model in models]


@pytest.mark.parametrize("case", CASES, ids=": ".join)
def test_before_the_patch(case):
    feature, model = case
    pipe, run = MODELS[model]()
    FEATURES[feature][0](pipe)
    check(pipe, run, {}, {"cache_interval": 2})


@pytest.mark.parametrize("case", CASES, ids=": ".join)
def test_after_the_patch(case):
    feature, model = case
    pipe, run = MODELS[model]()
    plain = run()
    agentsd.apply_patch(pipe, seed=0)
    FEATURES[feature][0](pipe)
    patched = run()
    assert patched.isfinite().all() and not torch.equal(patched, plain)
    assert distance(patched, plain) < 0.5
    agentsd.remove_patch(pipe)
    other, unpatched = MODELS[model]()
    FEATURES[feature][0](other)
    assert torch.equal(run(), unpatched())


def train_step(checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    unet = make_unet().train()
    torch.manual_seed(7)
    unet.add_adapter(LORA)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    agentsd.apply_patch(unet, seed=0)
    with torch.enable_grad():
        early, late = (unet(**unet_inputs(timestep=timestep)).sample for timestep in (901, 101))
        loss = early.square().mean() + late.square().mean()  # two calls of different phases before one backward pass
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


def test_lora_training_recomputes_the_very_same_draw():
    loss, gradients = train_step(checkpointing=False)
    recomputed_loss, recomputed = train_step(checkpointing=True)
    assert loss.isfinite() and gradients.keys() == recomputed.keys()
    assert torch.equal(loss, recomputed_loss)
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


SAVED = {**MODELS, "SDXL": PIPELINES["SDXL"], "SD 3.0": TRANSFORMERS["Stable Diffusion 3"]}


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("when", sweep(["in a call"], ["before a call", "after an image"]))
@pytest.mark.parametrize("settings", [{"seed": 0}, {"preset": "balanced"}], ids=["agents", "balanced"])
@pytest.mark.parametrize("model", SAVED)
def test_saved_under_a_patch_and_loaded(model, settings, when, tmp_path):
    """The files are those of an unpatched pipeline, and what is loaded from them is patched like any other."""
    pipe, run = SAVED[model]()
    plain = run()
    pipe.save_pretrained(tmp_path / "plain")
    agentsd.apply_patch(pipe, **settings)
    expected = run() if when == "after an image" else None
    save = lambda *_: pipe.save_pretrained(tmp_path / "patched")
    if when == "in a call":
        handle = denoiser_of(pipe).register_forward_pre_hook(save)
        run()
        handle.remove()
    else:
        save()
    assert files(tmp_path / "patched") == files(tmp_path / "plain")
    missing = {name: part for name, part in pipe.components.items() if part is None}
    loaded = type(pipe).from_pretrained(tmp_path / "patched", **missing)
    loaded.set_progress_bar_config(disable=True)
    draw = runner(loaded, **run.arguments)
    assert agentsd.report(loaded).settings is None and torch.equal(draw(), plain)
    with agentsd.patched(loaded, **settings):
        image = draw()
    assert torch.equal(image, expected if expected is not None else run()) and not torch.equal(image, plain)
    assert agentsd.report(loaded).settings is None and torch.equal(draw(), plain)
