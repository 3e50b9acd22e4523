"""Pipelines from a checkpoint in the original format, one file."""

import torch
from checks import check
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from zoo import build, runner

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
PLACES = {  # of the tiny UNet's parts in the original numbering
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original(name: str) -> str:
    place = next(place for place in PLACES if name.startswith(f"{place}."))
    rest = name.removeprefix(f"{place}.")
    if ".resnets." in f".{place}.":
        part, kind = rest.rsplit(".", 1)
        rest = f"{RESNET[part]}.{kind}"
    return f"model.diffusion_model.{PLACES[place]}.{rest}"


def test_from_single_file(tmp_path):
    pipe = build("StableDiffusionPipeline")
    weights = {original(name): weight.contiguous() for name, weight in pipe.unet.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    pipe.save_pretrained(tmp_path / "config")
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    loaded = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "config"), local_files_only=True, **parts
    )
    loaded.set_progress_bar_config(disable=True)
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], weight), name
    check(loaded, runner(loaded))
