"""Training data without end: emoji strewn over coloured backgrounds, whose class, box and mask are known.

The pictures are those of the npm package ``emoji-datasource-google`` 16.0.0. The classes are seven of its categories,
and every fifth emoji is held out: a model is evaluated on things that it has never seen.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

CLASSES = {
    "smiley": "Smileys & Emotion",
    "person": "People & Body",
    "nature": "Animals & Nature",
    "food": "Food & Drink",
    "travel": "Travel & Places",
    "activity": "Activities",
    "object": "Objects",
}
VISIBLE = 0.3  # an emoji counts if that much of it is not covered by others


@dataclass
class Batch:
    images: Tensor  # (B, 3, S, S), between 0 and 1
    labels: Tensor  # (B, K), an index of CLASSES, or -1 where a scene shows fewer than K
    masks: Tensor  # (B, K, S, S), what is seen of each

    def boxes(self) -> Tensor:
        """(B, K, 4): left, top, right, bottom; meaningless where the label is -1."""
        rows, columns = self.masks.any(3), self.masks.any(2)
        left, top = columns.float().argmax(2), rows.float().argmax(2)
        right = columns.shape[2] - columns.flip(2).float().argmax(2)
        bottom = rows.shape[2] - rows.flip(2).float().argmax(2)
        return torch.stack([left, top, right, bottom], 2).float()

    def segmentation(self) -> Tensor:
        """(B, S, S): 0 for the background, else one more than the label."""
        return (self.masks * (self.labels + 1)[..., None, None]).amax(1)


class Scenes:
    """Draws scenes of up to `things` emoji, on `device`.

    Args:
        folder: the unpacked npm package, with ``emoji.json`` and ``img/google/64``.
        held_out: draw from the fifth of the emoji that training never shows, instead of from the others.
        size: pixels of a scene's side.
        scales: smallest and largest side of an emoji, as parts of the scene's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        held_out: bool,
        things: int,
        size: int = 128,
        scales: tuple[float, float] = (0.2, 0.5),
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        if not (folder / "emoji.json").exists():
            raise SystemExit(
                f"{folder} has no emoji.json: unpack the npm package emoji-datasource-google 16.0.0 "
                "(npm pack emoji-datasource-google@16.0.0) and give its folder"
            )
        category = {name: index for index, name in enumerate(CLASSES.values())}
        chosen = [
            entry
            for entry in json.loads((folder / "emoji.json").read_text())
            if entry["has_img_google"]
            and entry["category"] in category
            and (zlib.crc32(entry["unified"].encode()) % 5 == 0) == held_out
        ]
        files = (folder / "img/google/64" / entry["image"] for entry in chosen)
        self.emoji = torch.stack([pil_to_tensor(Image.open(file).convert("RGBA")) for file in files]).to(device)
        self.labels = torch.tensor([category[entry["category"]] for entry in chosen], device=device)
        self.things, self.size, self.scales, self.device = things, size, scales, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def draw(self, count: int, which: Tensor | None = None) -> Batch:
        """`count` scenes, of random emoji or of those whose indices `which` (count, K) tells."""
        shape = (count, self.things)
        if which is None:
            which = torch.randint(len(self.emoji), shape, generator=self.generator, device=self.device)
        scale = self.uniform(*self.scales, *shape)
        x, y = (self.uniform(-1, 1, *shape) * (1 - scale) for _ in range(2))
        angle, flip = self.uniform(-0.4, 0.4, *shape), torch.sign(self.uniform(-1, 1, *shape))
        sin, cos = torch.sin(angle) / scale, torch.cos(angle) / scale
        # from the scene's coordinates to the emoji's: shift, turn and scale, mirror
        shifted = [-(cos * x - sin * y), -(sin * x + cos * y)]
        theta = torch.stack([flip * cos, flip * -sin, flip * shifted[0], sin, cos, shifted[1]], -1).view(-1, 2, 3)
        grid = F.affine_grid(theta, [theta.shape[0], 4, self.size, self.size], align_corners=False)
        layers = F.grid_sample(self.emoji[which.flatten()].float() / 255, grid, align_corners=False)
        layers = layers.view(*shape, 4, self.size, self.size)
        return self.compose(layers, self.labels[which])

    def compose(self, layers: Tensor, labels: Tensor) -> Batch:
        """(B, K, 4, S, S) layers, from behind to in front, on a background that fades between two light colours."""
        count = layers.shape[0]
        ramp = torch.linspace(0, 1, self.size, device=layers.device)
        start, end = self.uniform(0.5, 1, count, 3, 1, 1), self.uniform(0.5, 1, count, 3, 1, 1)
        images = start + (end - start) * ramp[:, None].expand(self.size, self.size)
        alpha = layers[:, :, 3:]
        tinted = layers[:, :, :3] * self.uniform(0.75, 1.25, *layers.shape[:2], 3, 1, 1)
        for layer, opacity in zip(tinted.unbind(1), alpha.unbind(1), strict=True):
            images = images * (1 - opacity) + layer * opacity
        solid = alpha[:, :, 0] > 0.5
        covered = solid.flip(1).cumsum(1).flip(1) - solid.long()  # how many in front
        masks = solid & (covered == 0)
        seen = masks.sum((2, 3)) > (VISIBLE * solid.sum((2, 3))).clamp(min=16)
        return Batch(images.clamp(0, 1), torch.where(seen, labels, -1), masks & seen[..., None, None])
