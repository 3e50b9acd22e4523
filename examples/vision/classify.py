"""What an image shows: by the small emoji classifier of train.py, or by any model of timm's.

python examples/vision/classify.py examples/images/apple.png
python examples/vision/classify.py cat.jpg --model agent_pvt_tiny --checkpoint agent_pvt_t.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import agentsd.vision  # noqa: F401 (registers the models)


def emoji_classifier(image: Path, weights: Path) -> dict[str, float]:
    """Probability of each class of the emoji scenes."""
    from emoji_scenes import CLASSES  # noqa: PLC0415
    from tasks import Classify, normalised, picture, sizes  # noqa: PLC0415

    model = Classify.build(sizes("agent"))
    model.load_state_dict(load_file(weights))
    probabilities = model.eval()(normalised(picture(image)[None])).softmax(-1)[0]
    return dict(zip(CLASSES, probabilities.tolist(), strict=True))


def imagenet_classifier(image: Path, name: str, checkpoint: Path | None) -> dict[str, float]:
    """Probability of each class of ImageNet, in the authors' evaluation."""
    model = timm.create_model(name, checkpoint_path=checkpoint).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels: Tensor = transform(Image.open(image).convert("RGB"))
    names = timm.data.ImageNetInfo()
    probabilities = model(pixels[None]).softmax(-1)[0].tolist()
    return {names.index_to_description(index): p for index, p in enumerate(probabilities)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--weights", type=Path, help="model.safetensors that train.py has written")
    parser.add_argument("--model", help="a classifier of timm's, such as agent_pvt_tiny")
    parser.add_argument("--checkpoint", type=Path, help="weights of --model")
    args = parser.parse_args()
    if args.model:
        probabilities = imagenet_classifier(args.image, args.model, args.checkpoint)
    elif args.weights:
        probabilities = emoji_classifier(args.image, args.weights)
    else:
        parser.error("give the --weights that train.py has written, or a --model of timm's")
    for name, probability in sorted(probabilities.items(), key=lambda item: -item[1])[:5]:
        print(f"{probability:6.1%}  {name}")


if __name__ == "__main__":
    main()
