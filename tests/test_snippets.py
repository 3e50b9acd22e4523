"""Every snippet of the README, the docs and the model cards runs, page by page, with the demo model and few steps."""

import copy
import functools
import re
import shlex
import sys

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import POOLED_CHANNELS, ROOT, TEXT_CHANNELS, TEXT_LENGTH
from diffusers import (
    AutoencoderKL,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from tiny_transformers import make_transformer

import agentsd
from agentsd.cli import parser, pictures

DEMO = ROOT / "examples" / "demo_model"
DEMO_SD3 = DEMO.with_name("demo_model_sd3")
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
NEEDS = {"DeepCache": "DeepCache", "tomesd": "tomesd", "agentsd.vision": "timm", "load_lora": "peft"}
STEPS = 4
MODULAR = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40)  # they change from one to the next


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def with_blocks(language: str):
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def demo():
    pipe = StableDiffusionPipeline.from_pretrained(DEMO).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def here(tmp_path, monkeypatch, demo):
    """A folder with the files that snippets speak of, few steps, and this machine in the place of hub and GPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "images").mkdir()
    for cls in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusion3Pipeline, FluxPipeline):
        monkeypatch.setattr(cls, "__call__", in_few_steps(cls.__call__))
    if MODULAR:
        modular = diffusers.StableDiffusionXLModularPipeline
        monkeypatch.setattr(modular, "__call__", in_few_steps(modular.__call__))
        monkeypatch.setattr(modular, "load_components", lambda pipe, **_: None)
        monkeypatch.setattr(diffusers.ModularPipeline, "from_pretrained", lambda name: small_modular_sdxl())
    load = DiffusionPipeline.from_pretrained

    def of_hub(name, **options):
        if "FLUX" in name:
            return tiny_flux()
        if "stable-diffusion-3" in name:
            return StableDiffusion3Pipeline.from_pretrained(DEMO_SD3, **NO_T5, **options)
        return (StableDiffusionPipeline if "/" in name else load).from_pretrained(DEMO, **options)

    texts = (torch.zeros(1, TEXT_LENGTH, TEXT_CHANNELS), torch.zeros(1, POOLED_CHANNELS), torch.zeros(TEXT_LENGTH, 3))
    monkeypatch.setattr(FluxPipeline, "encode_prompt", lambda pipe, **_: texts)
    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", of_hub)
    offload = lambda pipe: cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", offload)
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    yield tmp_path
    torch.compiler.reset()


def small_modular_sdxl():
    sys.path.insert(0, str(ROOT / "examples"))
    from common import small_sdxl  # noqa: PLC0415

    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    parts = small_sdxl().components
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    return pipe


def tiny_flux():
    """Without text encoders, and of random weights but for its autoencoder."""
    vae = AutoencoderKL.from_pretrained(DEMO_SD3, subfolder="vae").to(torch.float32)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = FluxPipeline(vae=vae, transformer=make_transformer("flux"), scheduler=scheduler, **absent)
    pipe.default_sample_size = 32
    return pipe


def in_few_steps(call):
    @functools.wraps(call)
    def short(self, *args, num_inference_steps=STEPS, **kwargs):
        return call(self, *args, num_inference_steps=min(num_inference_steps, STEPS), **kwargs)

    return short


@with_blocks("python")
def test_python(page, here, demo, request):
    text = page.read_text()
    for word, package in NEEDS.items():
        if word in text:
            pytest.importorskip(package)
    prepare(page, here, demo)
    names = {"agentsd": agentsd, "prompt": "red apple on a blue background"}
    for block in blocks(page, "python"):
        if "ModularPipeline" in block and not MODULAR:
            continue
        names["pipe"] = copy.deepcopy(demo)  # each finds a pipeline that nothing has been done to
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("card", ["demo_model", "demo_model_sd3"])
def test_the_demo_models_in_half_precision(card, dtype):
    """As they are stored, and as a GPU runs them: the snippets of their cards, but for the type."""
    absent = NO_T5 if card.endswith("sd3") else {}
    pipe = DiffusionPipeline.from_pretrained(DEMO.with_name(card), **absent).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    draw = lambda: (
        pipe(
            "red apple on a blue background",
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
    )
    plain = draw()
    agentsd.apply_patch(pipe, preset="balanced", seed=0)
    assert (draw() - plain).abs().mean() < 0.1
    agentsd.remove_patch(pipe)
    assert torch.equal(draw(), plain)


def prepare(page, folder, demo) -> None:
    if page.name == "command-line.md":
        image = demo("", num_inference_steps=1).images[0]
        pictures.save(image, folder / "images" / "00000.png", {"prompt": "red apple"})
    if page.name == "together.md":
        from peft import LoraConfig  # noqa: PLC0415
        from peft.utils import get_peft_model_state_dict  # noqa: PLC0415

        unet = copy.deepcopy(demo.unet)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        StableDiffusionPipeline.save_lora_weights(folder / "lora", get_peft_model_state_dict(unet))
    if page.name == "vision.md":
        import timm  # noqa: PLC0415

        import agentsd.vision  # noqa: F401, PLC0415

        for name, file in {"agent_pvt_tiny": "agent_pvt_t.pth", "agent_deit_tiny": "agent_deit_t.pth"}.items():
            torch.save(timm.create_model(name).state_dict(), folder / file)
        backbone = timm.create_model("agent_swin_tiny").state_dict()
        torch.save({f"backbone.{name}": value for name, value in backbone.items()}, folder / "mask_rcnn.pth")


@with_blocks("bash")
def test_commands(page):
    """Commands of agentsd have the options that they are given, scripts are there, and so are extras."""
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) = \[", project.partition("[tool")[0], re.M)
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.partition("  #")[0]
            for words in map(shlex.split, re.split(r"&&|\||;", line)):
                if words[:1] == ["agentsd"] or "-m agentsd" in " ".join(words):
                    parser().parse_args(words[words.index("agentsd") + 1 :])
                for script in [word for word in words if word.endswith(".py") and "$" not in word]:
                    assert (ROOT / script).is_file(), line
                for wanted in re.findall(r"^\.\[([\w,]+)\]$", words[-1] if words else "", re.M):
                    assert set(wanted.split(",")) <= set(extras), line
