"""No value is read back from the device: the real architectures run on fake CUDA tensors, which have none to read.

Of SDXL's ten transformer blocks in a row two do for all, since they are alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_transformers import Trajectory, make_transformer, transformer_inputs
from torch._subclasses import FakeTensorMode

import agentsd

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SETTINGS = {
    "agents and merging": {},
    "everything merged": {"merge_crossattn": True, "merge_mlp": True, "max_downsample": 4},
    "sampling": {"sample_kv": True},
    "reuse": {"cache_interval": 2},
}


def can_fake_cuda() -> bool:
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda") + 1
    except (RuntimeError, AssertionError):
        return False
    return True


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.skipif(not can_fake_cuda(), reason="a build of torch without CUDA makes no fake CUDA tensors")
@pytest.mark.parametrize("config", [SD15, SDXL], ids=["Stable Diffusion 1.5", "SDXL"])
def test_no_data_dependent_operation(config):
    with FakeTensorMode(), torch.device("cuda"), default_dtype(torch.float16):
        unet = UNet2DConditionModel(**config).eval()
        size, xl = config["sample_size"], "addition_embed_type" in config
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)} if xl else None
        for settings in SETTINGS.values():
            agentsd.apply_patch(unet, **settings)
            assert agentsd.report(unet).patched
            for timestep in (901, 101):  # numbers, as a pipeline's scheduler with a step index gives none to read
                output = unet(
                    torch.empty(2, 4, size, size),
                    timestep,
                    torch.empty(2, 77, config["cross_attention_dim"]),
                    added_cond_kwargs=added,
                ).sample
                assert output.device.type == "cuda" and output.shape == (2, 4, size, size)


@pytest.mark.skipif(not can_fake_cuda(), reason="a build of torch without CUDA makes no fake CUDA tensors")
@pytest.mark.parametrize("kind", ["sd35", "pixart"])
def test_no_data_dependent_operation_in_a_transformer(kind):
    """Its loop gives elements of the schedule, expanded to the batch. Flux's divides them, so that they are read."""
    with FakeTensorMode(), torch.device("cuda"):
        inputs = {name: torch.empty_like(value, device="cuda") for name, value in transformer_inputs(kind).items()}
        pipe = Trajectory(make_transformer(kind), kind)
        pipe.scheduler.timesteps = torch.empty(8, device="cuda")
        for settings in SETTINGS.values():
            if settings.get("merge_mlp") and kind != "pixart":
                continue
            agentsd.apply_patch(pipe, **settings)
            for step in range(8):
                assert pipe.call(step, inputs).device.type == "cuda"
            assert agentsd.report(pipe).patched
            agentsd.remove_patch(pipe)
