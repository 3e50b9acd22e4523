"""The training data: emoji composed into captioned scenes.

A scene is one thing on a coloured background, at one of five places, in one of two sizes, mirrored or not, and its
caption says all of that: ``small red apple on a blue background, left, mirrored``. One scene in five is never trained
on (`Scene.held_out`), so that a prompt can ask for a combination the model has not seen.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CANVAS = 128
BACKGROUNDS = {
    "white": (255, 255, 255),
    "pink": (248, 187, 208),
    "orange": (255, 204, 128),
    "yellow": (255, 241, 130),
    "green": (165, 214, 167),
    "blue": (144, 202, 249),
    "purple": (206, 147, 216),
    "gray": (160, 170, 178),
}
PLACES = {"": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
SIZES = {"": 62, "small": 44}  # pixels of the emoji
MARGIN = 3


@dataclass(frozen=True)
class Scene:
    thing: str
    background: str
    place: str = ""
    size: str = ""
    mirrored: bool = False

    @property
    def caption(self) -> str:
        article = "an" if self.background[0] in "aeiou" else "a"
        words = f"{self.size} {self.thing}".strip()
        extras = [self.place] * bool(self.place) + ["mirrored"] * self.mirrored
        return ", ".join([f"{words} on {article} {self.background} background", *extras])

    @property
    def held_out(self) -> bool:
        """True for the fifth of the combinations that training never shows (a hash: stable between runs)."""
        key = f"{self.thing}|{self.background}|{self.place}|{self.size}"
        return zlib.crc32(key.encode()) % 5 == 0


def emoji_codes() -> dict[str, str]:
    """The things that there are, each with the code points of its emoji."""
    lines = Path(__file__).with_name("things.txt").read_text().splitlines()
    pairs = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: code for code, name in pairs}


def things() -> list[str]:
    return list(emoji_codes())


class Scenes:
    """Renders scenes from a folder of 64x64 emoji PNGs (``emoji-datasource-google``, ``img/google/64``)."""

    def __init__(self, emoji_folder: Path):
        self.files = {name: emoji_folder / f"{code}.png" for name, code in emoji_codes().items()}
        missing = [path.name for path in self.files.values() if not path.exists()]
        if missing:
            raise SystemExit(
                f"{emoji_folder} lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: "
                "unpack the npm package emoji-datasource-google 16.0.0 and give its folder img/google/64"
            )
        self.emoji = lru_cache(maxsize=None)(self._emoji)

    @property
    def things(self) -> list[str]:
        return list(self.files)

    def words(self) -> list[str]:
        """Every caption's words, for the tokenizer."""
        scenes = [Scene(t, b, p, s, True) for t, b, p, s in product(self.files, BACKGROUNDS, PLACES, SIZES)]
        return sorted({word for scene in scenes for word in scene.caption.replace(",", " ,").split()})

    def _emoji(self, thing: str, pixels: int, mirrored: bool) -> Image.Image:
        image = Image.open(self.files[thing]).convert("RGBA")
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image.resize((pixels, pixels), Image.Resampling.LANCZOS)

    def render(self, scene: Scene, canvas: int = CANVAS) -> Image.Image:
        """The scene as an RGB image of ``canvas`` x ``canvas`` pixels; a smaller canvas has less room around it."""
        pixels = SIZES[scene.size]
        emoji = self.emoji(scene.thing, pixels, scene.mirrored)
        room = (canvas - pixels) // 2
        dx, dy = PLACES[scene.place]
        step = room - MARGIN
        image = Image.new("RGB", (canvas, canvas), BACKGROUNDS[scene.background])
        image.paste(emoji, (room + dx * step, room + dy * step), emoji)
        return image

    def draw(self, rng: random.Random, *, held_out: bool = False) -> Scene:
        """A random scene, from the trained combinations or from the held-out ones."""
        while True:
            scene = Scene(
                rng.choice(self.things),
                rng.choice(list(BACKGROUNDS)),
                rng.choice(list(PLACES)),
                rng.choice(list(SIZES)),
                rng.random() < 0.5,
            )
            if scene.held_out == held_out:
                return scene


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """PIL images -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
