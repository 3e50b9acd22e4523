"""Boxes and masks of what an image shows, drawn into it.

python examples/vision/detect.py scene.png --weights runs/detect-agent/model.safetensors --output boxes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from emoji_scenes import CLASSES
from safetensors.torch import load_file
from tasks import ATTENTION, COLOURS, Detect, picture, sizes, write
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="model.safetensors that train.py has written")
    parser.add_argument("--attention", choices=ATTENTION, default="agent", help="what the weights were trained with")
    parser.add_argument("--least", type=float, default=0.5, help="confidence to draw a box for")
    parser.add_argument("--output", type=Path, default=Path("detected.png"))
    args = parser.parse_args()
    model = Detect.build(sizes(args.attention))
    model.load_state_dict(load_file(args.weights))
    image = picture(args.image)
    found = model.eval()([image])[0]
    sure = found["scores"] >= args.least
    labels, masks = found["labels"][sure] - 1, found["masks"][sure, 0] > 0.5
    for label, score, box in zip(labels, found["scores"][sure], found["boxes"][sure], strict=True):
        print(f"{score:6.1%}  {list(CLASSES)[label]}  {[round(x) for x in box.tolist()]}")
    colours = [COLOURS[label] for label in labels]
    drawn = (image * 255).byte()
    if colours:
        drawn = draw_segmentation_masks(drawn, masks, alpha=0.4, colors=colours)
        drawn = draw_bounding_boxes(drawn, found["boxes"][sure], [list(CLASSES)[i] for i in labels], colours)
    write(args.output, drawn)


if __name__ == "__main__":
    main()
