"""LoRA, IP-Adapter, textual inversion, FreeU, fused projections, custom processors: before the patch and after it."""

import pytest
import torch
from checks import check
from conftest import TEXT_CHANNELS
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from zoo import build, runner

import agentsd

LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


def pipe_and_run(**arguments):
    pipe = build("StableDiffusionPipeline")
    return pipe, runner(pipe, **arguments)


def lora(pipe, run):
    torch.manual_seed(5)
    pipe.unet.add_adapter(LORA, "style")
    return run


def lora_scaled(pipe, run):
    run = lora(pipe, run)
    pipe.set_adapters(["style"], [0.5])
    return run


def lora_fused(pipe, run):
    run = lora(pipe, run)
    pipe.fuse_lora(components=["unet"])
    return run


def lora_unfused(pipe, run):
    run = lora_fused(pipe, run)
    pipe.unfuse_lora(components=["unet"])
    return run


def lora_unloaded(pipe, run):
    run = lora(pipe, run)
    pipe.unload_lora_weights()
    return run


def free_u(pipe, run):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.2)
    return run


def fused_qkv(pipe, run):
    pipe.fuse_qkv_projections(vae=False)
    return run


def unfused_qkv(pipe, run):
    pipe.fuse_qkv_projections(vae=False)
    pipe.unfuse_qkv_projections(vae=False)
    return run


def textual_inversion(pipe, run):
    pipe.load_textual_inversion({"<thing>": torch.ones(TEXT_CHANNELS)}, token="<thing>")
    return lambda: run(prompt="<thing> apple")


def ip_adapter(pipe, run):
    torch.manual_seed(6)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    encoder = CLIPVisionModelWithProjection(config)
    pipe.register_modules(image_encoder=encoder)
    state = {
        "image_proj": {
            "proj.weight": torch.randn(4 * TEXT_CHANNELS, config.projection_dim) * 0.02,
            "proj.bias": torch.zeros(4 * TEXT_CHANNELS),
            "norm.weight": torch.ones(TEXT_CHANNELS),
            "norm.bias": torch.zeros(TEXT_CHANNELS),
        },
        "ip_adapter": {},
    }
    cross = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for i, name in enumerate(cross):
        channels = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            state["ip_adapter"][f"{2 * i + 1}.{part}.weight"] = torch.randn(channels, TEXT_CHANNELS) * 0.05
    pipe.unet._load_ip_adapter_weights([state])
    embeds = torch.ones(2, 1, config.projection_dim)
    return lambda: run(ip_adapter_image_embeds=[embeds])


def ip_adapter_unloaded(pipe, run):
    ip_adapter(pipe, run)
    pipe.unload_ip_adapter()
    return run


class Custom(AttnProcessor2_0):
    """A processor of the user's own, which must go on being called."""

    calls = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        type(self).calls += 1
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def custom_processor(pipe, run):
    pipe.unet.set_attn_processor(Custom())
    return run


FEATURES = {
    "LoRA": lora,
    "LoRA, scaled": lora_scaled,
    "LoRA, fused": lora_fused,
    "LoRA, unfused": lora_unfused,
    "LoRA, unloaded": lora_unloaded,
    "FreeU": free_u,
    "fused projections": fused_qkv,
    "unfused projections": unfused_qkv,
    "textual inversion": textual_inversion,
    "IP-Adapter": ip_adapter,
    "IP-Adapter, unloaded": ip_adapter_unloaded,
    "custom processors": custom_processor,
}


def test_keys_are_sampled_where_projections_are_fused_no_more():
    pipe, run = pipe_and_run()
    expected = agentsd.apply_patch(pipe, seed=0, sample_kv=True) and run()
    agentsd.remove_patch(pipe)
    pipe.fuse_qkv_projections(vae=False)
    agentsd.apply_patch(pipe, seed=0, sample_kv=True)
    assert "cannot sample" in str(agentsd.report(pipe))
    pipe.unfuse_qkv_projections(vae=False)
    assert "cannot sample" not in str(agentsd.report(pipe))
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("feature", FEATURES)
def test_before_the_patch(feature):
    pipe, run = pipe_and_run()
    check(pipe, FEATURES[feature](pipe, run))


@pytest.mark.parametrize("feature", FEATURES)
def test_after_the_patch(feature):
    """The image is that of the other order, and removal gives the one without the patch."""
    pipe, run = pipe_and_run()
    run = FEATURES[feature](pipe, run)
    plain = run()
    agentsd.apply_patch(pipe, seed=0)
    expected = run()
    later, run_later = pipe_and_run()
    agentsd.apply_patch(later, seed=0)
    run_later()
    run_later = FEATURES[feature](later, run_later)
    assert torch.equal(run_later(), expected)
    agentsd.remove_patch(later)
    assert torch.equal(run_later(), plain)


def test_custom_processors_are_called_as_often_as_without_a_patch():
    pipe, run = pipe_and_run()
    custom_processor(pipe, run)
    Custom.calls = 0
    run()
    Custom.calls, plain_calls = 0, Custom.calls
    agentsd.apply_patch(pipe)
    run()
    assert Custom.calls == plain_calls
    assert "Custom is kept" in str(agentsd.report(pipe))
