"""Draw an image for each prompt.

Stopped or killed, the same command goes on: what is there is not drawn again, and each image is, bit for bit, what it
would have been. Under `accelerate launch` the processes divide the prompts.

    agentsd generate --prompt "red apple on a blue background" --out images
    agentsd generate --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --batch 8 --out images
    agentsd generate --prompts prompts.txt --count 4 --preset fast --steps 50 --json --out images
    accelerate launch -m agentsd generate --prompts prompts.txt --out images
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from tqdm import tqdm

import agentsd
from agentsd.cli import options, pictures, pipelines
from agentsd.cli.options import CommandError

RECORD = "settings.json"  # beside the images: what made them


def add_parser(commands: Any) -> None:
    parser = options.add(commands, "generate", run, __doc__)
    options.add_prompts(parser, required=True)
    parser.add_argument("--out", type=Path, default=Path("images"), help="folder of the images (default: images)")
    parser.add_argument("--count", type=options.at_least(1), default=1, help="images of each prompt (default: 1)")
    parser.add_argument("--batch", type=options.at_least(1), default=1, help="images at a time (default: 1)")
    options.add_json(parser)
    options.add_patch(parser)
    options.add_image(parser)
    options.add_model(parser)


@dataclass(frozen=True)
class Work:
    """The images to be made. Batches are cut once, by number, so that an image's neighbours are always the same."""

    prompts: list[str]
    out: Path
    batch: int
    seed: int

    def path(self, i: int) -> Path:
        return self.out / f"{i:05d}.png"

    def lacking(self, indices: range) -> list[int]:
        return [i for i in indices if not self.path(i).exists()]

    def batches(self, process: int, processes: int) -> list[range]:
        """What one of several processes has to do. It depends on nothing that another does meanwhile."""
        everything = range(len(self.prompts))
        cut = [everything[start : start + self.batch] for start in everything[:: self.batch]]
        return cut[process::processes]


def run(args: argparse.Namespace) -> None:
    patch = options.patch_of(args)
    prompts = [prompt for prompt in options.prompts_of(args) or [] for _ in range(args.count)]
    work = Work(prompts, args.out, args.batch, args.seed)
    state = PartialState(cpu=args.device == "cpu")
    try:
        record(work, _identity(args, work, patch, state), state.process_index)
        mine = work.batches(state.process_index, state.num_processes)
        todo = [indices for indices in mine if work.lacking(indices)]
        there = sum(map(len, mine)) - sum(len(work.lacking(indices)) for indices in todo)
        start = time.perf_counter()
        if todo:
            _draw_all(args, patch, work, todo, state)
        seconds = time.perf_counter() - start
        _say(args, work, mine, there, seconds, state)
    finally:
        state.destroy_process_group()


def _draw_all(args: argparse.Namespace, patch: Any, work: Work, todo: list[range], state: PartialState) -> None:
    pipe = pipelines.load(args, state.device if state.num_processes > 1 else None)
    pipelines.patch(pipe, patch)
    pipe.set_progress_bar_config(disable=True)
    arguments = pipelines.call(args)
    shared = _metadata(args, patch, pipe)
    total = sum(len(work.lacking(indices)) for indices in todo)
    with tqdm(total=total, unit="image", disable=not state.is_main_process or None) as bar:
        for indices in todo:
            lacking = work.lacking(indices)
            prompts, seeds = [work.prompts[i] for i in indices], [work.seed + i for i in indices]
            images = dict(zip(indices, pipelines.draw(pipe, prompts, seeds, arguments), strict=True))
            for i in lacking:
                own = {"prompt": work.prompts[i], "seed": work.seed + i, "in_batch": [indices.start, indices.stop]}
                with options.writing(work.path(i)):
                    pictures.save(images[i], work.path(i), own | shared)
                bar.update()


def _identity(args: argparse.Namespace, work: Work, patch: Any, state: PartialState) -> dict[str, Any]:
    """All that decides what the images are."""
    device = state.device if state.num_processes > 1 else args.device or pipelines.default_device()
    image = {"steps": args.steps, "batch": work.batch, "seed": work.seed, "offload": args.offload, "dtype": args.dtype}
    made = {"model": args.model, "patch": patch, "device": torch.device(device).type, **pipelines.call(args), **image}
    return {**made, "versions": _versions(), "prompts": work.prompts}


def record(work: Work, identity: dict[str, Any], process: int) -> None:
    """Writes down what the images are, or sees that those in the folder are the same.

    Raises:
        CommandError: they are others, or the folder cannot be written.
    """
    path, part = work.out / RECORD, work.out / f"{RECORD}.{process}"
    try:
        work.out.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not any(work.out.glob("*.png")):  # what was recorded has drawn nothing
            part.write_text(json.dumps(identity, indent=2))
            part.replace(path)
        found = json.loads(path.read_text())
    except OSError as error:
        raise CommandError(f"--out {work.out}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"--out {path}: {error}") from None
    unlike = [name for name in identity if found.get(name) != json.loads(json.dumps(identity[name]))]
    if unlike:
        raise CommandError(f"--out {work.out}: its images have other {', '.join(unlike)}; give another folder")


def _versions() -> dict[str, str]:
    return {"agentsd": agentsd.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


def _metadata(args: argparse.Namespace, patch: Any, pipe: Any) -> dict[str, Any]:
    """What is written into each PNG beside its prompt and seed."""
    parts = {"pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__}
    return {**pipelines.call(args), "model": args.model, **parts, "patch": patch, "versions": _versions()}


def _say(args: Any, work: Work, mine: list[range], there: int, seconds: float, state: PartialState) -> None:
    """Each process speaks of its own share; with one, that is all of them."""
    paths = [str(work.path(i)) for indices in mine for i in indices]
    drawn = len(paths) - there
    share = f" (process {state.process_index + 1} of {state.num_processes})" if state.num_processes > 1 else ""
    if args.json:
        told = {"drawn": drawn, "already_there": there, "seconds": round(seconds, 3), "images": paths}
        print(json.dumps(told | {"process": state.process_index, "processes": state.num_processes}), flush=True)
    else:
        print(f"{drawn} drawn, {there} were there: {work.out}, {seconds:.1f} s{share}", flush=True)
