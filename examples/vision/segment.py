"""The class of every pixel of an image, as colours over it.

python examples/vision/segment.py --weights runs/segment-agent/model.safetensors
"""

from __future__ import annotations

from pathlib import Path

import torch
from emoji_scenes import CLASSES
from tasks import COLOURS, normalised
from torchvision.utils import draw_segmentation_masks
from trained import load, parser, picture, write


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__, "segmented.png")
    options.add_argument("--weights", type=Path, required=True, help="model.safetensors that train.py has written")
    args = options.parse_args()
    model, size = load(args.weights, "segment")
    image = picture(args.image, size)
    classes = model(normalised(image[None])).argmax(1)[0]
    masks = torch.stack([classes == 1 + index for index in range(len(CLASSES))])
    for name, share in zip(CLASSES, masks.float().mean((1, 2)), strict=True):
        if share > 0:
            print(f"{share:6.1%}  {name}")
    write(args.output, draw_segmentation_masks((image * 255).byte(), masks, alpha=0.6, colors=COLOURS))


if __name__ == "__main__":
    main()
