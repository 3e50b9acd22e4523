"""Images compared, put side by side, and written to files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from agentsd.cli.options import CommandError, require_folder

KEY = "agentsd"  # of the metadata in a PNG
AMPLIFIED = 8


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    error = float(np.square(np.asarray(a, dtype=np.float64) - np.asarray(b)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """Black where both are equal, and elsewhere `AMPLIFIED`."""
    return ImageChops.difference(a, b).point(lambda value: min(AMPLIFIED * value, 255))


def save(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Writes a PNG with its metadata, whole or not at all."""
    text = PngInfo()
    text.add_text(KEY, json.dumps(metadata))
    part = path.with_suffix(".part")
    image.save(part, format="PNG", pnginfo=text)
    part.replace(path)


def require_place(path: Path) -> None:
    """Before anything is drawn, that a picture can be written to ``path``.

    Raises:
        CommandError: there is no such folder, or no such kind of picture.
    """
    require_folder(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise CommandError(f"--out {path}: {path.suffix or 'no ending'} is no kind of picture: give a name in .png")


def side_by_side(rows: Sequence[tuple[str, Sequence[Image.Image]]], prompts: Sequence[str]) -> Image.Image:
    """One labelled picture: a row of images per method, the prompts underneath."""
    side, gap, head, foot = 192, 8, 26, 40
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=12)
    width = gap + len(prompts) * (side + gap)
    sheet = Image.new("RGB", (width, len(rows) * (head + side) + foot), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows):
        top = row * (head + side)
        draw.text((gap, top + 4), label, "black", font)
        for i, image in enumerate(images):
            fitted = image.resize(_fitted(image.size, side), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (gap + i * (side + gap), top + head))
    for i, prompt in enumerate(prompts):
        left, bottom = gap + i * (side + gap), len(rows) * (head + side) + 4
        draw.multiline_text((left, bottom), _wrapped(prompt, small, side), "dimgray", small, spacing=2)
    return sheet


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return round(size[0] * scale), round(size[1] * scale)


def _wrapped(text: str, font: Any, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines[:2])
