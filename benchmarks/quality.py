"""What does it cost in quality? The same prompts and seeds for every method, measured against real images.

Resumable: an image that is there is not made again, and one is only there when it is whole. With several devices,
``accelerate launch benchmarks/quality.py ...`` gives each process its share of the images; on CPUs it is
``ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 benchmarks/quality.py ...``.

    python benchmarks/quality.py --model examples/demo_model --images 64
    python benchmarks/quality.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts imagenet \\
        --images 2000 --steps 50 --guidance 7.5 --real path/to/imagenet/val --extractor inception-v3-compat
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from card import card, errors_in_one_line, write_json
from diffusers import DiffusionPipeline
from methods import Method, chosen
from prompts import load_prompts
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tables import ABOVE, ERROR, print_table, quality_rows

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "runs" / "results"
LIMIT = "no self-attention at the top (the limit)"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples" / "demo_model"), help="model id or folder")
    parser.add_argument("--images", type=int, default=64, help="of each method (default: 64)")
    parser.add_argument("--first", type=int, default=0, help="number of the first, its seed: for others than before")
    parser.add_argument("--prompts", default="demo", help="demo, imagenet, or a text file (default: demo)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--methods", nargs="+", help="names as in methods.py (default: all)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[], help="agentsd and tomesd at these, too")
    parser.add_argument("--real", type=Path, help="folder of real images as PNG (default: none, or --emoji's scenes)")
    parser.add_argument("--emoji", type=Path, help="img/google/64 of emoji-datasource-google: the demo model's data")
    parser.add_argument(
        "--extractor", default="efficientnet-lite0", help="of torch-fidelity; FID has inception-v3-compat"
    )
    parser.add_argument("--clip", help="model id or folder for the CLIP score")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quality", help="of the images")
    parser.add_argument("--out", type=Path, help="JSON file (default: runs/results/quality-...json)")
    args = parser.parse_args()
    args.out = args.out or RESULTS / f"quality-{Path(args.model).name}-{args.steps}-steps.json"
    for name in ("images", "steps", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.first < 0:
        parser.error(f"--first {args.first}: give 0 or more")
    for name in ("real", "emoji"):
        if getattr(args, name) is not None and not getattr(args, name).is_dir():
            parser.error(f"--{name} {getattr(args, name)}: there is no such folder")
    if args.real and not any(args.real.glob("*.png")):
        parser.error(f"--real {args.real}: there is no PNG file right in this folder, and only such are read")
    return args


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return args.folder / re.sub(r"[^a-z0-9.=]+", "-", name.lower()).strip("-")


def in_project(value: Any) -> str:
    """As text, and a path of the project without what lies before it: the same wherever the project is."""
    return str(value).replace(f"{ROOT}/", "")


def count(folder: Path) -> int:
    """How many images there are, of all processes."""
    return len(list(folder.glob("*.png")))


def claim(folder: Path, method: Method, args: argparse.Namespace) -> None:
    """Make the folder of a method's images.

    Raises:
        ValueError: it is there with images of other settings, or with more than are asked for.
    """
    wanted = {name: getattr(args, name) for name in ("prompts", "first", "steps", "guidance", "batch")}
    wanted |= {"model": in_project(args.model), "method": method.settings}
    made = folder / "settings.json"
    if made.exists() and json.loads(made.read_text()) != wanted:
        raise ValueError(f"{folder} holds images of other settings: give another --folder, or delete it")
    if count(folder) > args.images:
        raise ValueError(f"{folder} holds more than --images {args.images}: give as many, or another --folder")
    write_json(made, wanted)


def save(image: Any, path: Path) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    image.save(part, format="PNG")
    part.replace(path)


def generate(pipe: Any, method: Method, prompts: list[str], folder: Path, args: argparse.Namespace, show: Any) -> None:
    """The images of one method that are not there yet: this process's share of them.

    Batches are always the same ones, since the sums of a batch depend on its size in the last bit: where a stop left
    one half done, it is drawn again, and what is lacking of it is saved. ``show`` is told how many images there are,
    those of all processes.
    """
    state, path = PartialState(), lambda i: folder / f"{i:05d}.png"
    numbers = range(args.first, args.first + args.images)
    batches = [numbers[start : start + args.batch] for start in range(0, args.images, args.batch)]
    missing = [indices for indices in batches if not all(path(i).exists() for i in indices)]
    state.wait_for_everyone()  # nobody draws before all have seen what is missing
    for indices in missing[state.process_index :: state.num_processes]:
        # a batch knows nothing of those before it: tomesd draws from where it left off, since it was applied
        torch.manual_seed(indices[0])
        undo = method.apply(pipe)
        try:
            images = pipe(
                [prompts[i - args.first] for i in indices],
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                generator=[torch.Generator().manual_seed(i) for i in indices],
            ).images
        finally:
            undo()
        for i, image in zip(indices, images, strict=True):
            if not path(i).exists():
                save(image, path(i))
        show(count(folder))
    state.wait_for_everyone()
    show(count(folder))


def real_images(args: argparse.Namespace) -> Path | None:
    if args.real or not args.emoji:
        return args.real
    from prompts import demo_scenes  # noqa: PLC0415
    from scenes import Scenes  # noqa: PLC0415  (the trainer's folder is on the path once scenes are asked for)

    folder, scenes = args.folder / f"real-{args.first}-{args.images}", Scenes(args.emoji)
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(demo_scenes(args.first + args.images)[args.first :], args.first):
        if not (folder / f"{i:05d}.png").exists():
            save(scenes.render(scene), folder / f"{i:05d}.png")
    return folder


def measure(args: argparse.Namespace, methods: dict[str, Method], prompts: list[str]) -> dict[str, Any]:
    import metrics  # noqa: PLC0415  (slow to import, and a later step)

    unpatched, real = folder_of(args, "unpatched"), real_images(args)
    notes = [] if real else ["no real images: the distances are those to the unpatched images"]
    rows: list[dict[str, Any]] = []
    distance, replicates = metrics.distance_name(args.extractor), {}
    with tempfile.TemporaryDirectory() as features:
        for name, method in methods.items():
            folder, patched = folder_of(args, name), name != "unpatched"
            values = metrics.against_unpatched(folder, unpatched) if patched else {}
            if real or patched:
                values |= metrics.fidelity(folder, real or unpatched, args.extractor, features)
            if real and args.images >= 2 * metrics.GROUPS:
                replicates[name] = metrics.without_each_group(folder, real, args.extractor, features)
            if name in replicates and patched:
                values[distance + ABOVE] = values[distance] - rows[0]["metrics"][distance]
                above = replicates[name] - replicates["unpatched"]
                values[distance + ABOVE + ERROR] = metrics.standard_error(above)
            more, missing = metrics.learned(folder, unpatched, prompts, args.clip)
            notes += [line for line in missing if line not in notes]
            rows.append({"method": name, "ratio": method.ratio, "metrics": values | more})
    return {"rows": rows, "notes": notes}


def main() -> None:
    args = parse_args()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which only accelerate's Accelerator reads
    with errors_in_one_line():
        methods = {name: m for name, m in chosen(args.methods, args.ratios).items() if name != LIMIT}
        prompts = load_prompts(args.prompts, args.first + args.images)[args.first :]
        dtype = torch.float32 if state.device.type == "cpu" else torch.float16
        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(state.device)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if state.is_main_process:
            for name, method in methods.items():
                claim(folder_of(args, name), method, args)
    state.wait_for_everyone()
    pipe.set_progress_bar_config(disable=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not state.is_main_process) as progress:
        for name, method in methods.items():
            there = count(folder_of(args, name))
            task = progress.add_task(name, total=args.images, completed=there)
            show = lambda images, task=task: progress.update(task, completed=images)
            generate(pipe, method, prompts, folder_of(args, name), args, show)
    if state.is_main_process:
        settings: dict[str, Any] = {key: in_project(value) for key, value in vars(args).items()}
        settings["processes"] = state.num_processes
        result = {
            "kind": "quality",
            **card(str(state.device)),
            "settings": settings,
            **measure(args, methods, prompts),
        }
        write_json(args.out, result)
        print_table(result, quality_rows(result))
        print(*result["notes"], f"-> {args.out}", sep="\n")


if __name__ == "__main__":
    main()
