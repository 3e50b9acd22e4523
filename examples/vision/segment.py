"""The class of every pixel of an image, as colours over it.

python examples/vision/segment.py scene.png --weights runs/segment-agent/model.safetensors --output masks.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from emoji_scenes import CLASSES
from safetensors.torch import load_file
from tasks import ATTENTION, COLOURS, Segment, normalised, picture, sizes, write
from torchvision.utils import draw_segmentation_masks


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="model.safetensors that train.py has written")
    parser.add_argument("--attention", choices=ATTENTION, default="agent", help="what the weights were trained with")
    parser.add_argument("--output", type=Path, default=Path("segmented.png"))
    args = parser.parse_args()
    model = Segment.build(sizes(args.attention))
    model.load_state_dict(load_file(args.weights))
    image = picture(args.image)
    classes = model.eval()(normalised(image[None])).argmax(1)[0]
    masks = torch.stack([classes == 1 + index for index in range(len(CLASSES))])
    for name, share in zip(CLASSES, masks.float().mean((1, 2)), strict=True):
        if share > 0:
            print(f"{share:6.1%}  {name}")
    write(args.output, draw_segmentation_masks((image * 255).byte(), masks, alpha=0.6, colors=COLOURS))


if __name__ == "__main__":
    main()
