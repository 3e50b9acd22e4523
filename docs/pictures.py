"""Draws the documentation's pictures with the demo model: `python docs/pictures.py`, a minute on two CPU cores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import agentsd
from agentsd.matching import bipartite_soft_matching, partition
from agentsd.merge import merge, unmerge

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
PROMPTS = ["red apple on a blue background", "hamburger on a gray background"]
PARAMETERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ratio": [(f"ratio={r:g}", {"ratio": r}) for r in (0.1, 0.3, 0.5, 0.7)],
    "agent_steps": [(f"agent_steps={s:g}", {"agent_steps": s}) for s in (0.0, 0.2, 0.4, 0.7, 1.0)],
    "agent_cell": [
        (f"agent_sx=agent_sy={n}", {"agent_sx": n, "agent_sy": n, "agent_ratio": 0.99, "agent_steps": 1.0})
        for n in (3, 4, 8, 16)
    ],
    "k": [
        ("k_scale2=0.3, k_shortcut=0.075", {"agent_steps": 1.0}),
        ("k_scale2=1", {"agent_steps": 1.0, "k_scale2": 1.0}),
        ("k_shortcut=0", {"agent_steps": 1.0, "k_shortcut": 0.0}),
        ("k_shortcut=0.3", {"agent_steps": 1.0, "k_shortcut": 0.3}),
    ],
    "use_rand": [("use_rand=True", {"agent_steps": 0}), ("use_rand=False", {"agent_steps": 0, "use_rand": False})],
    "merge": [
        ("merge_attn", {"agent_steps": 0}),
        ("merge_attn, merge_mlp", {"agent_steps": 0, "merge_mlp": True}),
        ("merge_attn, merge_crossattn", {"agent_steps": 0, "merge_crossattn": True}),
        ("max_downsample=2", {"agent_steps": 0, "max_downsample": 2}),
    ],
    "match_interval": [(f"match_interval={n}", {"match_interval": n}) for n in (1, 2, 5, 10)],
    "sample_kv": [
        (f"sample_kv, cells {n}x{n}", {"sample_kv": True, "sx": n, "sy": n, "agent_sx": n, "agent_sy": n})
        for n in (2, 3, 4, 8)
    ],
    "cache_interval": [(f"cache_interval={n}", {"ratio": 0, "cache_interval": n}) for n in (2, 3, 5, 8)],
    "cache_order": [
        (f"cache_interval=3, cache_order={o}, branch {b}", settings)
        for o, b in ((0, 0), (1, 0), (0, 1), (1, 1))
        for settings in ({"ratio": 0, "cache_interval": 3, "cache_order": o, "cache_branch": b},)
    ],
    "cache_cell": [
        (f"cache_interval=3, cache_cell={n}", {"ratio": 0, "cache_interval": 3, "cache_order": 1, "cache_cell": n})
        for n in (1, 2, 3, 4)
    ],
    "preset": [(f'preset="{name}"', {"preset": name}) for name in agentsd.PRESETS],
}


def token_grid(path: Path, side: int = 16) -> None:
    """Cells and dst tokens in both phases, and the groups that merging makes of a picture's pixels."""
    picture = Image.open(EXAMPLES / "images" / "apple.png").convert("RGB").resize((side, side), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.asarray(picture)).reshape(1, -1, 3) / 255
    figure, rows = plt.subplots(2, 2, figsize=(7, 7.4))
    phases = (("early: 4x4 cells, all that can merge: the agents", 4, 0.95), ("late: 2x2 cells, ratio 0.4", 2, 0.4))
    for (label, cell, ratio), (left, right) in zip(phases, rows, strict=True):
        parts = partition(side, side, cell, cell, torch.Generator().manual_seed(0))
        edges = bipartite_soft_matching(pixels - pixels.mean(1, keepdim=True), parts)
        matching = edges.cut(min(int(ratio * side * side), side * side - parts.num_dst))
        merged = unmerge(merge(pixels, matching), matching)
        for axes, colours in ((left, pixels), (right, merged)):
            axes.imshow(colours.reshape(side, side, 3))
            axes.set(xticks=np.arange(0, side, cell) - 0.5, yticks=np.arange(0, side, cell) - 0.5)
            axes.grid(color="white", linewidth=0.6)
            axes.tick_params(length=0, labelbottom=False, labelleft=False)
        for token in parts.dst.tolist():
            y, x = divmod(token, side)
            left.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.2))
        left.set_title(label, fontsize=9, loc="left")
        right.set_title(f"{matching.group.shape[1]} tokens, {matching.groups} groups", fontsize=9, loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(pipe: Any) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipe(PROMPTS, num_inference_steps=25, guidance_scale=4.0, generator=generators).images


def psnr(a: list[Image.Image], b: list[Image.Image]) -> float:
    errors = [np.square(np.asarray(x, dtype=np.float64) - np.asarray(y)).mean() for x, y in zip(a, b, strict=True)]
    return float(np.mean([10 * np.log10(255**2 / max(error, 1e-5)) for error in errors]))


def sheet(columns: list[tuple[str, list[Image.Image]]], path: Path) -> None:
    figure, rows = plt.subplots(len(PROMPTS), len(columns), figsize=(2 * len(columns), 4.3), squeeze=False)
    for j, (label, images) in enumerate(columns):
        for i, image in enumerate(images):
            rows[i, j].imshow(image)
            rows[i, j].axis("off")
        rows[0, j].set_title(label, fontsize=7)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    folder = DOCS / "pictures"
    folder.mkdir(exist_ok=True)
    token_grid(folder / "token_grid.png")
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "demo_model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    unpatched = draw(pipe)
    for parameter, settings in PARAMETERS.items():
        columns = [("unpatched", unpatched)]
        for label, values in settings:
            with agentsd.patched(pipe, seed=0, **{"min_tokens": 0, **values}):
                images = draw(pipe)
            columns.append((f"{label}\n{psnr(unpatched, images):.1f} dB", images))
        sheet(columns, folder / f"{parameter}.png")
        print(f"-> {folder / parameter}.png")


if __name__ == "__main__":
    main()
