"""Loading a pipeline, and calling it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

import agentsd
from agentsd.cli.options import CommandError

REPOSITORY = Path(__file__).parents[2]  # where this is a clone of it
DEMO = Path("examples", "demo_model")
DEMO_GUIDANCE = 4.0


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def has_fast_bfloat16() -> bool:
    """Whether the CPU computes in bfloat16, rather than emulating it."""
    mkldnn: Any = torch.backends.mkldnn
    return bool(mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def precision(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """As an argument of `from_pretrained`, for which diffusers before 0.40 has another name."""
    release = tuple(map(int, diffusers.__version__.split(".")[:2]))
    return {"dtype" if release >= (0, 40) else "torch_dtype": dtype}


def from_pretrained(name: str | Path, dtype: torch.dtype) -> Any:
    """The pipeline of an id or a folder, also of one that was saved without some of its parts."""
    said: dict[str, Any] = DiffusionPipeline.load_config(name)
    # Stable Diffusion 3 without its third text encoder is loaded only if that is said anew
    absent = {part: None for part, kind in said.items() if kind == [None, None]}
    return DiffusionPipeline.from_pretrained(name, **absent, **precision(dtype))


def demo_model() -> Path:
    """The folder of the demo model, in the repository that this package belongs to, or else in the present folder."""
    for root in (REPOSITORY, Path.cwd()):
        if (root / DEMO).is_dir():
            return root / DEMO
    raise CommandError(
        "--model demo: the demo model comes with the repository and not with the installed package; "
        "run this in a clone of it, or give --model an id or a folder"
    )


def load(args: argparse.Namespace, device: str | torch.device | None = None) -> Any:
    """The pipeline of ``--model``, on ``device`` or else ``--device``.

    Raises:
        CommandError: there is no such model or device.
    """
    device = device or args.device or default_device()
    name = demo_model() if args.model == "demo" else args.model
    try:
        kind = torch.device(device).type
        dtype = getattr(torch, args.dtype or ("float32" if kind == "cpu" else "float16"))
        pipe = from_pretrained(name, dtype)
        if not args.offload:
            return pipe.to(device)
        pipe.enable_model_cpu_offload(device=device)
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(f"--model {args.model} on {device}: {error}") from None
    return pipe


def patch(pipe: Any, settings: dict[str, Any] | None) -> None:
    """Applies what `agentsd.cli.options.patch_of` gave.

    Raises:
        CommandError: the pipeline cannot be patched like this.
    """
    try:
        if settings is not None:
            agentsd.apply_patch(pipe, **settings)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from None


def call(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of an image, as arguments of the pipeline's call."""
    guidance = DEMO_GUIDANCE if args.guidance is None and args.model == "demo" else args.guidance
    given = {
        "guidance_scale": guidance,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
    }
    return {"num_inference_steps": args.steps, **{name: value for name, value in given.items() if value is not None}}


def draw(pipe: Any, prompts: list[str], seeds: list[int], arguments: dict[str, Any]) -> list[Any]:
    """An image for each prompt. Generators of the CPU give the same noise on every device.

    Raises:
        CommandError: the pipeline does not take the arguments, or memory does not suffice.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = arguments.get("negative_prompt")
    if negative is not None:
        arguments = {**arguments, "negative_prompt": [negative] * len(prompts)}
    try:
        images: list[Any] = pipe(prompts, generator=generators, **arguments).images
    except torch.OutOfMemoryError:
        raise CommandError(f"{len(prompts)} images at once do not fit: give a smaller --batch, or --offload") from None
    except (TypeError, ValueError) as error:
        raise CommandError(f"{type(pipe).__name__}: {error}") from None
    return images
