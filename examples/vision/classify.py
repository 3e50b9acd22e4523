"""What an image shows: by the small emoji classifier beside this file, or by any model of timm's.

python examples/vision/classify.py
python examples/vision/classify.py cat.jpg --model agent_pvt_tiny --checkpoint agent_pvt_t.pth
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from emoji_scenes import CLASSES
from matplotlib import pyplot
from PIL import Image
from tasks import normalised
from torch import Tensor
from trained import load, parser, picture

import agentsd.vision  # noqa: F401 (registers the models)


def emoji_classifier(image: Path, weights: Path) -> dict[str, float]:
    """Probability of each class of the emoji scenes."""
    model, size = load(weights, "classify")
    probabilities = model(normalised(picture(image, size)[None])).softmax(-1)[0]
    return dict(zip(CLASSES, probabilities.tolist(), strict=True))


def imagenet_classifier(image: Path, name: str, checkpoint: Path | None) -> dict[str, float]:
    """Probability of each class of ImageNet, in the authors' evaluation."""
    model = timm.create_model(name, checkpoint_path=checkpoint).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels: Tensor = transform(Image.open(image).convert("RGB"))
    names = timm.data.ImageNetInfo()
    probabilities = model(pixels[None]).softmax(-1)[0].tolist()
    return {names.index_to_description(index): p for index, p in enumerate(probabilities)}


def draw(image: Path, best: dict[str, float], output: Path) -> None:
    """The image beside bars of its probabilities."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.imshow(Image.open(image).convert("RGB"))
    left.axis("off")
    bars = right.barh([name.split(",")[0] for name in best], best.values())
    right.bar_label(bars, [f"{p:.0%}" for p in best.values()], padding=3)
    right.set(xlim=(0, 1.1))
    right.xaxis.set_visible(False)
    right.yaxis.set_inverted(True)
    right.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(output)
    print(f"wrote {output}")


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__, "classified.png")
    weights = Path(__file__).with_name("emoji_classifier.safetensors")
    options.add_argument("--weights", type=Path, default=weights, help="model.safetensors that train.py has written")
    options.add_argument("--model", help="a classifier of timm's, such as agent_pvt_tiny, instead")
    options.add_argument("--checkpoint", type=Path, help="weights of --model")
    args = options.parse_args()
    if args.model:
        probabilities = imagenet_classifier(args.image, args.model, args.checkpoint)
    else:
        probabilities = emoji_classifier(args.image, args.weights)
    best = dict(sorted(probabilities.items(), key=lambda item: -item[1])[:5])
    for name, probability in best.items():
        print(f"{probability:6.1%}  {name}")
    draw(args.image, best, args.output)


if __name__ == "__main__":
    main()
