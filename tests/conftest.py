"""Tiny models of the real architectures, with random weights."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

import agentsd

ROOT = Path(__file__).parent.parent
ATTENTION_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS = {
    "sd15": {"attention_head_dim": 4},
    "sd21": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}
ONE_LEVEL = {  # as little as can be patched: quick to run, and to compile
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}
TEXT_LENGTH, TEXT_CHANNELS, POOLED_CHANNELS = 5, 16, 32


def make_unet(kind: str = "sd15", **overrides) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_CHANNELS,
        "norm_num_groups": 8,
        **ATTENTION_BLOCKS,
        **UNETS[kind],
        **overrides,
    }
    return UNet2DConditionModel(**config).eval()


def make_pipeline(kind: str = "sd15", scheduler=None, **overrides):
    """A pipeline that takes ``prompt_embeds`` and makes latents."""
    unet, scheduler = make_unet(kind, **overrides), scheduler or make_scheduler(DDIMScheduler)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
    if kind == "sdxl":
        pipe = StableDiffusionXLPipeline(
            vae, None, None, None, None, unet, scheduler, force_zeros_for_empty_prompt=False, add_watermarker=False
        )
    else:
        pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_img2img(scheduler=None, **overrides) -> StableDiffusionImg2ImgPipeline:
    parts = make_pipeline(scheduler=scheduler, **overrides).components
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_scheduler(cls, **config):
    defaults = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    wanted = {"steps_offset": 1, "clip_sample": False}  # as in Stable Diffusion; pipelines warn without them
    extra = {name: value for name, value in wanted.items() if name in inspect.signature(cls.__init__).parameters}
    return cls(**defaults | extra | config)


def embeddings(batch: int = 1, *, pooled: bool = False) -> dict[str, torch.Tensor]:
    """Prompt embeddings for a call of a pipeline."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    result = {name: draw(TEXT_LENGTH, TEXT_CHANNELS) for name in names}
    if pooled:
        result |= {name.replace("prompt", "pooled_prompt"): draw(POOLED_CHANNELS) for name in names}
    return result


def image(pipe, steps: int = 5, seed: int = 0, **kwargs) -> torch.Tensor:
    """Latents of one image (B, 4, 16, 16)."""
    pooled = isinstance(pipe, StableDiffusionXLPipeline)
    arguments = {
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipe(**embeddings(pooled=pooled), **arguments | kwargs).images


def unet_inputs(kind: str = "sd15", batch: int = 2, height: int = 16, width: int = 16, timestep=601) -> dict:
    """Keyword arguments of a UNet call; every sample differs."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator)
    inputs = {
        "sample": draw(4, height, width),
        "timestep": timestep,
        "encoder_hidden_states": draw(TEXT_LENGTH, TEXT_CHANNELS),
    }
    if kind == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": draw(POOLED_CHANNELS), "time_ids": torch.ones(batch, 6)}
    return inputs


def sweep(often, rarely) -> list:
    """Values of a parameter: those of ``rarely`` are left to the long tests, with whatever they are combined."""
    return [*often, *(pytest.param(value, marks=pytest.mark.long) for value in rarely)]


def pytest_xdist_auto_num_workers(config) -> int:
    """The whole suite is shared among up to four processes; files that are named run in this one, without delay."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return 0 if named or config.option.collectonly else min(os.cpu_count() or 1, 4)


def pytest_configure() -> None:
    """Each of several workers keeps to one core, and so do the processes that it starts."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


VISION = ("timm", "torchvision", "segmentation_models_pytorch", "torchmetrics", "pycocotools")


def pytest_pycollect_makemodule(module_path) -> None:
    """The tests of vision need its extra, whole: without it they are skipped, and it is said why."""
    missing = [name for name in VISION if not find_spec(name)] if module_path.parent.name == "vision" else []
    if missing:
        pytest.skip(f'{", ".join(missing)} missing: pip install "agentsd[vision]"')


@pytest.fixture(params=list(UNETS))
def kind(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def small_layers_are_patched(request, monkeypatch):
    """The tests' models have fewer tokens than layers that are patched by default; those of scripts have not."""
    if "run_script" in request.fixturenames:
        return
    for name in ("apply_patch", "patched"):
        function = getattr(agentsd, name)
        monkeypatch.setattr(agentsd, name, functools.wraps(function)(functools.partial(function, min_tokens=0)))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def run_script(monkeypatch):
    """A function that runs a script with its arguments as ``python`` does, but in this process: imports take longest.

    It returns what `subprocess.run` returns; an exception of the script's is one of the test's.
    """

    def run(path: Path, *arguments: object) -> subprocess.CompletedProcess:
        words, out, err, code = [str(path), *map(str, arguments)], io.StringIO(), io.StringIO(), 0
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", words)
            patch.syspath_prepend(path.parent)
            try:
                with torch.enable_grad():  # which it is not up to a test to turn off for it
                    runpy.run_path(str(path), run_name="__main__")
            except SystemExit as exit:
                code = exit.code or 0
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def browser_page():
    """A page of headless Chromium; its ``asked_for`` lists the addresses that it asked for."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.asked_for = []
        page.on("request", lambda request: page.asked_for.append(request.url))
        yield page
        browser.close()


def pytest_terminal_summary(terminalreporter) -> None:
    """How many combinations of the compatibility table were tried."""
    tried = [r for r in terminalreporter.stats.get("passed", []) if r.when == "call" and "compat/" in r.nodeid]
    if tried:
        terminalreporter.write_line(f"compatibility: {len(tried)} combinations tried and passed")
