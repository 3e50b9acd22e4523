"""LoRA, IP-Adapter, textual inversion, FreeU, fused projections, custom processors: before the patch and after it."""

from functools import partial
from itertools import product

import ip_adapters
import pytest
import torch
from checks import check
from conftest import TEXT_CHANNELS
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig, get_peft_model
from zoo_transformers import MODELS, TRANSFORMERS

import agentsd
from agentsd.models import denoiser_of

LORA = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


def lora(pipe, run):
    torch.manual_seed(5)
    denoiser_of(pipe).add_adapter(LORA, "style")
    return run


def lora_of_peft(pipe, run):
    """As training scripts have it: PEFT's model stands where the denoiser stood."""
    torch.manual_seed(5)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, get_peft_model(getattr(pipe, name), LORA))
    return run


def lora_scaled(pipe, run):
    run = lora(pipe, run)
    pipe.set_adapters(["style"], [0.5])
    return run


def lora_fused(pipe, run):
    run = lora(pipe, run)
    pipe.fuse_lora(components=list({"unet", "transformer"} & pipe.components.keys()))
    return run


def lora_unfused(pipe, run):
    run = lora_fused(pipe, run)
    pipe.unfuse_lora(components=list({"unet", "transformer"} & pipe.components.keys()))
    return run


def lora_unloaded(pipe, run):
    run = lora(pipe, run)
    pipe.unload_lora_weights()
    return run


def free_u(pipe, run):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.2)
    return run


def fused_qkv(pipe, run):
    denoiser_of(pipe).fuse_qkv_projections()
    return run


def unfused_qkv(pipe, run):
    denoiser_of(pipe).fuse_qkv_projections()
    denoiser_of(pipe).unfuse_qkv_projections()
    return run


def textual_inversion(pipe, run):
    pipe.load_textual_inversion({"<thing>": torch.ones(TEXT_CHANNELS)}, token="<thing>")
    return lambda: run(prompt="<thing> apple")


def ip_adapter(pipe, run):
    torch.manual_seed(6)
    load = {"StableDiffusion3Pipeline": ip_adapters.into_sd3, "FluxPipeline": ip_adapters.into_flux}
    return partial(run, **load.get(type(pipe).__name__, ip_adapters.into_unet)(pipe))


def ip_adapter_unloaded(pipe, run):
    ip_adapter(pipe, run)
    pipe.unload_ip_adapter()
    return run


class Counted:
    """A processor of the user's own, which must go on being called."""

    calls = 0

    def __call__(self, *args, **kwargs):
        Counted.calls += 1
        return super().__call__(*args, **kwargs)


class Custom(Counted, AttnProcessor2_0):
    pass


class CustomJoint(Counted, JointAttnProcessor2_0):
    pass


class CustomFlux(Counted, FluxAttnProcessor):
    pass


def custom_processor(pipe, run):
    own = {"StableDiffusion3Pipeline": CustomJoint, "FluxPipeline": CustomFlux}.get(type(pipe).__name__, Custom)
    denoiser_of(pipe).set_attn_processor(own())
    return run


ALL = tuple(MODELS)
LORAS = ("UNet", "SD 3", "Flux")  # the other has no loader in diffusers
FEATURES = {
    "LoRA": (lora, LORAS),
    "LoRA, PEFT's model": (lora_of_peft, ALL),
    "LoRA, scaled": (lora_scaled, LORAS),
    "LoRA, fused": (lora_fused, LORAS),
    "LoRA, unfused": (lora_unfused, LORAS),
    "LoRA, unloaded": (lora_unloaded, LORAS),
    "FreeU": (free_u, ("UNet",)),
    "fused projections": (fused_qkv, ALL),
    "unfused projections": (unfused_qkv, ALL),
    "textual inversion": (textual_inversion, ("UNet",)),
    "IP-Adapter": (ip_adapter, LORAS),
    "IP-Adapter, unloaded": (ip_adapter_unloaded, LORAS),
    "custom processors": (custom_processor, ALL),
}
CASES = [(feature, model) for feature, (_, models) in FEATURES.items() for model in models]
# in these joint attention is left alone in all blocks, so that features are reused at most
STANDS_ASIDE = {("IP-Adapter", "SD 3"), *product(("fused projections", "custom processors"), ("SD 3", "Flux"))}


def made(feature: str, model: str):
    """Projections of 3.5 medium cannot be fused: diffusers itself fails in its second attention."""
    older = model == "SD 3" and "projections" in feature
    return (TRANSFORMERS["Stable Diffusion 3"] if older else MODELS[model])()


def with_feature(feature: str, model: str):
    pipe, run = made(feature, model)
    return pipe, FEATURES[feature][0](pipe, run)


def settings_of(model: str) -> dict:
    return {} if model == "UNet" else {"cache_interval": 2}


@pytest.mark.parametrize("case", CASES, ids=": ".join)
def test_before_the_patch(case):
    check(*with_feature(*case), settings_of(case[1]))


@pytest.mark.parametrize("case", CASES, ids=": ".join)
def test_after_the_patch(case):
    """The image is that of the other order, and removal gives the one without the patch."""
    settings = settings_of(case[1])
    pipe, run = with_feature(*case)
    plain = run()
    agentsd.apply_patch(pipe, seed=0, **settings)
    expected = run()
    later, run_later = made(*case)
    agentsd.apply_patch(later, seed=0, **settings)
    run_later()
    run_later = FEATURES[case[0]][0](later, run_later)
    assert torch.equal(run_later(), expected)
    agentsd.remove_patch(later)
    assert torch.equal(run_later(), plain)


def test_the_report_is_that_of_the_denoiser_within_peft_s_model():
    reports = []
    for feature in ("LoRA", "LoRA, PEFT's model"):
        pipe, run = with_feature(feature, "UNet")
        agentsd.apply_patch(pipe, preset="balanced", min_tokens=0)
        run()
        reports.append(str(agentsd.report(pipe)))
    assert reports[0] == reports[1]


@pytest.mark.parametrize("case", sorted(STANDS_ASIDE), ids=": ".join)
def test_joint_attention_of_others_is_left_alone_and_the_report_says_so(case):
    pipe, run = with_feature(*case)
    plain = run()
    agentsd.apply_patch(pipe, sample_kv=True)
    with pytest.warns(UserWarning, match="runs unpatched: .* is no plain joint attention"):
        assert torch.equal(run(), plain)
    report = agentsd.report(pipe)
    assert not report.patched and "is no plain joint attention" in str(report)


def test_where_an_ip_adapter_has_no_part_joint_attention_is_patched():
    """In Flux it acts on the blocks that have the text apart."""
    pipe, _ = with_feature("IP-Adapter", "Flux")
    report = agentsd.report(agentsd.apply_patch(pipe))
    assert {layer.name.split(".")[0] for layer in report.patched} == {"single_transformer_blocks"}


@pytest.mark.parametrize("model", ALL)
def test_keys_are_sampled_where_projections_are_fused_no_more(model):
    pipe, run = made("unfused projections", model)
    expected = agentsd.apply_patch(pipe, seed=0, sample_kv=True) and run()
    agentsd.remove_patch(pipe)
    net = denoiser_of(pipe)
    net.fuse_qkv_projections()
    agentsd.apply_patch(pipe, seed=0, sample_kv=True)
    assert not agentsd.report(pipe).patched and "left alone" in str(agentsd.report(pipe))
    net.unfuse_qkv_projections()
    assert agentsd.report(pipe).patched and "left alone" not in str(agentsd.report(pipe))
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("model", ["UNet", "PixArt"])
def test_custom_processors_are_called_as_often_as_without_a_patch(model):
    pipe, run = with_feature("custom processors", model)
    Counted.calls = 0
    run()
    Counted.calls, plain_calls = 0, Counted.calls
    agentsd.apply_patch(pipe)
    run()
    assert Counted.calls == plain_calls > 0
    assert "Custom is kept" in str(agentsd.report(pipe))
