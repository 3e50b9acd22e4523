"""A model that train.py has written, an image to show it, a picture to write: what the programs beside this share."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tasks import TASKS
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize


def parser(description: str | None, output: str) -> ArgumentParser:
    """Of an `image` and an `--output`."""
    result = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    result.add_argument("image", type=Path, nargs="?", default=Path(__file__).with_name("scene.png"))
    result.add_argument("--output", type=Path, default=Path(output))
    return result


def load(weights: Path, task: str) -> tuple[nn.Module, int]:
    """A model that was trained for `task`, and the pixels of its images' side."""
    with safe_open(weights, "pt") as file:
        about = file.metadata() or {}
    if about.get("task") != task:
        raise SystemExit(
            f"{weights} is a model of train.py's for {about.get('task')!r}, not for {task!r}: "
            "classify.py, detect.py and segment.py each take their own"
        )
    model = TASKS[task].build(about["attention"])
    model.load_state_dict(load_file(weights))
    return model.eval(), TASKS[task].size


def picture(path: Path, size: int) -> Tensor:
    """(3, size, size) between 0 and 1: the middle of an image file, on white."""
    image = Image.open(path).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return center_crop(resize(pil_to_tensor(on_white), size, antialias=True), [size, size]).float() / 255


def write(path: Path, image: Tensor) -> None:
    """Saves (3, H, W) bytes, four times as large."""
    Image.fromarray(F.interpolate(image[None], scale_factor=4)[0].permute(1, 2, 0).numpy()).save(path)
    print(f"wrote {path}")
