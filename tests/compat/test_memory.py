"""Features that save memory, back ends, and training."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from checks import check, distance
from conftest import make_unet, unet_inputs
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from zoo import build, make_vae, runner

import agentsd

LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian")


def group_offload(pipe):
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def model_offload(pipe):
    """What `enable_model_cpu_offload` does to the UNet, with the CPU in the accelerator's place."""
    accelerate = pytest.importorskip("accelerate")
    pipe.unet, hook = accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    pipe._all_hooks = [hook]


FEATURES = {
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "VAE slicing": lambda pipe: pipe.vae.enable_slicing(),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "model offload": model_offload,
    "sequential offload": lambda pipe: cpu_offload(pipe.unet, torch.device("cpu")),
    "group offload": group_offload,
    "channels_last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "gradient checkpointing": lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    "set_attention_backend": lambda pipe: pipe.unet.set_attention_backend("native"),
    "naive attention": lambda pipe: pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor()),
    "layerwise casting": lambda pipe: pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_before_the_patch(feature):
    pipe = build("StableDiffusionPipeline")
    FEATURES[feature](pipe)
    check(pipe, runner(pipe), {}, {"cache_interval": 2})


@pytest.mark.parametrize("feature", FEATURES)
def test_after_the_patch(feature):
    pipe = build("StableDiffusionPipeline")
    run = runner(pipe)
    plain = run()
    agentsd.apply_patch(pipe, seed=0)
    FEATURES[feature](pipe)
    patched = run()
    assert patched.isfinite().all() and not torch.equal(patched, plain)
    assert distance(patched, plain) < 0.5
    agentsd.remove_patch(pipe)
    assert distance(run(), plain) < 0.02


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


def test_saved_and_loaded(tmp_path):
    """What a patch leaves out of a saved pipeline, and that a loaded one is patched like any other."""
    pipe = build("StableDiffusionPipeline")
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, vae=make_vae(), safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    check(loaded, runner(loaded))
