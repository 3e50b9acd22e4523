"""Quick start: the same prompts and seeds without and with agentsd, side by side, as `agentsd compare` does it.

Without arguments it uses the demo model beside this file, which needs no download and is small; so it then times a few
UNet calls at the size of Stable Diffusion 1.5, where a call costs what it costs you.

    python examples/quickstart.py
    python examples/quickstart.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red fox in the snow"
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from tqdm import tqdm

import agentsd
from agentsd.cli import compare, options, pictures, pipelines
from agentsd.schedule import full_calls

SCHEDULE = 50  # steps of the presets' schedules


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", nargs="+", default=compare.PROMPTS, help="one or more prompts")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="default: quickstart.png")
    parser.add_argument("--no-real-size", action="store_true", help="skip the timing at Stable Diffusion 1.5's size")
    options.add_patch(parser)
    options.add_image(parser)
    options.add_model(parser)
    args = parser.parse_args()
    try:
        pictures.require_place(args.out)
    except options.CommandError as error:
        parser.error(str(error))
    return args


def real_size_unet(device: str) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5 with random weights: its speed is that of the trained one."""
    fast_half = device != "cpu" or pipelines.has_fast_bfloat16()
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    dtype = torch.bfloat16 if fast_half else torch.float32
    unet = torch.nn.Module.to(unet, dtype).to_empty(device=device).eval()  # that of diffusers warns
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return unet


@torch.inference_mode()
def time_real_size(device: str, seconds: float = 45.0) -> None:
    """Median seconds of a UNet call at 512x512, the variants in turn for about ``seconds``."""
    unet = real_size_unet(device)
    like = next(unet.parameters())
    sample, text = (torch.randn(1, *shape).to(like) for shape in ((4, 64, 64), (77, 768)))
    full_ones = full_calls(SCHEDULE, agentsd.Settings(**agentsd.PRESETS["balanced"]))
    times: dict[str, list[float]] = {name: [] for name in ("unpatched", "full", "cached")}
    began = time.perf_counter()

    def call(name: str, timestep: int) -> None:
        start = time.perf_counter()
        unet(sample, torch.tensor(timestep), text).sample.float().mean().item()  # reading a value waits for the device
        times[name].append(time.perf_counter() - start)
        bar.update()

    with tqdm(desc="UNet calls at 512x512", unit="call") as bar:
        while min(map(len, times.values())) < 2 or time.perf_counter() - began < seconds:
            call("unpatched", 500)
            agentsd.apply_patch(unet, preset="balanced")
            for i in range(full_ones.index(False) + 1):  # go on to the first step that takes the deep features before
                call("full" if full_ones[i] else "cached", 500 - i)
            agentsd.remove_patch(unet)
    plain, full, cached = (statistics.median(t[1:]) for t in times.values())  # the first warms up
    step = (full_ones.count(True) * full + full_ones.count(False) * cached) / SCHEDULE
    print(
        f"\nStable Diffusion 1.5's UNet, random weights, 512x512, batch 1, {str(unet.dtype)[6:]}, {device}, against "
        f"fused attention:\n"
        f"  unpatched {plain:.2f} s a call   full call {full:.2f} s   cached call {cached:.2f} s\n"
        f'  apply_patch(pipe, preset="balanced"), {SCHEDULE} steps: {step:.2f} s a step ({plain / step:.2f}x)'
    )


def main() -> None:
    args = parse_args()
    try:
        patch = options.patch_of(args)
        pipe = pipelines.load(args)
        found = compare.compare(pipe, args.prompt, args.seed, pipelines.call(args), patch)
    except options.CommandError as error:
        print(f"quickstart: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(agentsd.report(pipe), "\n")
    print(found.line(args.steps))
    found.picture(args.prompt).save(args.out)
    print(f"saved {args.out}")
    if args.model == "demo" and not args.no_real_size:
        device = str(pipe.device)
        del pipe
        print("\nThe demo model is small. Stable Diffusion 1.5's UNet, 4,096 tokens and 320 channels:")
        time_real_size(device)


if __name__ == "__main__":
    main()
