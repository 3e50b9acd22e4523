"""Boxes and masks of what an image shows, drawn into it.

python examples/vision/detect.py --weights runs/detect-agent/model.safetensors
"""

from __future__ import annotations

from pathlib import Path

import torch
from emoji_scenes import CLASSES
from tasks import COLOURS
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from trained import load, parser, picture, write


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__, "detected.png")
    options.add_argument("--weights", type=Path, required=True, help="model.safetensors that train.py has written")
    options.add_argument("--least", type=float, default=0.5, help="confidence to draw a box for")
    args = options.parse_args()
    model, size = load(args.weights, "detect")
    image = picture(args.image, size)
    found = model([image])[0]
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
