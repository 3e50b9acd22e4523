"""Find settings on the machine, with the pipeline and the prompts that they are for."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from agentsd.apply import apply_patch, patched, settings_for, without_patch
from agentsd.models import denoiser_of
from agentsd.schedule import interval_of
from agentsd.settings import Settings
from agentsd.trials import Trial, Tuning, choose, parse_target

PROMPTS = ("a red fox in the snow", "a harbour at night", "portrait of an old sailor", "a bowl of fruit on a table")
UNSTEADY = 1.5  # slowest over fastest of equal images
WARM_UP = 4  # steps: the last of them is a cached call
# in the order in which they are tried while time is left: those that most often win come first
CANDIDATES: Mapping[str, dict[str, Any]] = {
    "balanced": {"preset": "balanced"},
    "quality": {"preset": "quality"},
    "fast": {"preset": "fast"},
    "adaptive": {"preset": "adaptive"},
    "balanced, cache_interval=2": {"preset": "balanced", "cache_interval": 2},
    "balanced, cache_interval=0.25": {"preset": "balanced", "cache_interval": 0.25},
    "adaptive, cache_tolerance=0.15": {"preset": "adaptive", "cache_tolerance": 0.15},
    "few_steps": {"preset": "few_steps"},
    "the paper's schedule": {},
}


def tune(
    pipe: Any,
    target: str | None = None,
    *,
    prompts: Sequence[str] = PROMPTS,
    seconds: float = 60.0,
    seed: int = 0,
    apply: bool = False,
    progress: bool = True,
    **inputs: Any,
) -> Tuning:
    """Try settings on a pipeline, as it is and where it is, and choose those that reach a target.

    Images are drawn one at a time, of the same prompts and seeds for all settings, and compared with those of the
    unpatched pipeline. The pipeline is left as it was, patched or not.

    Args:
        pipe: a pipeline that `agentsd.apply_patch` takes.
        target: a speed-up, as ``"2x"``: the best worst image at this speed or above. Or a fidelity, as ``"35 dB"``:
            the fastest whose worst image has it. None: the fastest whose worst image has 35 dB, and
            is as near to the unpatched one as with half the steps; fewer steps may be the answer, too.
        prompts: of the images; on a slow machine fewer are drawn than are given.
        seconds: about how long it may take; two candidates, if there are as many, are tried in any case.
        seed: of the first image, and one more for each.
        apply: patch the pipeline with what is found.
        progress: show a bar.
        inputs: for the pipeline, as ``num_inference_steps=25, height=768``: those that you will use. With
            ``prompt_embeds`` images differ by their seeds, and ``prompts`` says no more than how many there are.

    Raises:
        ValueError: ``target`` is neither, there is no prompt, or the pipeline cannot be patched.
        TypeError: ``pipe`` is not a pipeline.
    """
    wanted = parse_target(target)
    if not prompts:
        raise ValueError("prompts=() is not allowed: expected one prompt or more.")
    if not callable(pipe) or not hasattr(pipe, "set_progress_bar_config"):
        raise TypeError(f"cannot tune a {type(pipe).__name__}: expected a diffusers pipeline, which draws images.")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    steps = inputs.setdefault("num_inference_steps", 50)
    started = time.perf_counter()
    with without_patch(pipe), _quiet(pipe), tqdm(total=len(CANDIDATES) + 2, disable=not progress) as bar:
        draw = _drawer(pipe, prompts, seed, inputs)
        few = steps if "strength" in inputs else min(steps, WARM_UP)  # image to image makes a share
        draw(1, num_inference_steps=few)  # warms up
        bar.set_description("unpatched")
        true, base = draw(1)
        candidates = distinct(pipe, len(pipe.scheduler.timesteps))
        bar.total = len(candidates) + 2
        count = max(1, min(len(prompts), int(seconds / (10 * base[0]))))
        more, taken = draw(count, begin=1)
        true, base = true + more, base + taken
        trials = [Trial("unpatched", None, statistics.median(base), 1.0, math.inf, math.inf)]

        def speedup(taken: list[float]) -> float:
            """Over the unpatched image before and after: what slows the machine down slows both."""
            base.extend(draw(1)[1])
            return sum(base[-2:]) / 2 / statistics.median(taken)

        def attempt(name: str, settings: dict[str, Any] | None, **changes: Any) -> Trial:
            bar.update()
            bar.set_description(name)
            if settings is None:
                images, taken = draw(count, **changes)
            else:
                with patched(pipe, **settings):
                    draw(1, num_inference_steps=few)
                    images, taken = draw(count)
            decibels = [_psnr(a, b) for a, b in zip(images, true, strict=True)]
            middle = statistics.median(taken)
            return Trial(name, settings, middle, speedup(taken), min(decibels), sum(decibels) / count)

        if steps >= 4:
            trials.append(attempt("unpatched, half the steps", None, num_inference_steps=steps // 2))
        untried = []
        for name, settings in candidates.items():
            tried = sum(trial.settings is not None for trial in trials)
            if tried >= 2 and time.perf_counter() - started > seconds:
                untried.append(name)
            else:
                trials.append(attempt(name, settings))
        chosen, verdict = choose(trials, wanted)
        if next(denoiser_of(pipe).parameters()).is_cuda:
            fastest = max((t for t in trials if t.settings is not None), key=lambda trial: trial.speedup)
            for trial in {t.name: t for t in (chosen, fastest) if t is not None}.values():  # graphs change no pixel
                trials.append(attempt(f"{trial.name}, cuda_graphs", {**(trial.settings or {}), "cuda_graphs": True}))
            trials.append(attempt("unpatched, cuda_graphs", {"ratio": 0, "cuda_graphs": True}))
            chosen, verdict = choose(trials, wanted)
        advice = _advice(pipe, draw, count, few, speedup)
        if max(base) > UNSTEADY * min(base):
            advice.append(
                f"an unpatched image took {min(base):.2f} to {max(base):.2f} s while this ran: something else uses "
                "this machine, so that the speed-ups are rough; once more, when nothing does"
            )
    found = chosen.settings if chosen is not None else None
    if found is not None and apply:
        apply_patch(pipe, **found)
    return Tuning(found, verdict, count, tuple(trials), tuple(advice), tuple(untried))


def distinct(pipe: Any, calls: int) -> dict[str, dict[str, Any]]:
    """The candidates, each but once: some are the same on this denoiser, or in a trajectory of so many ``calls``."""
    net, found = denoiser_of(pipe), dict[Settings, str]()
    for name, settings in CANDIDATES.items():
        with suppress(ValueError):  # where attention is left as it is, those that reuse nothing are none
            chosen = settings_for(net, **settings)
            found.setdefault(replace(chosen, cache_interval=interval_of(chosen.cache_interval, calls)), name)
    if not found:
        settings_for(net)  # raises
    return {name: CANDIDATES[name] for name in found.values()}


Draw = Callable[..., tuple[list[Tensor], list[float]]]


def _drawer(pipe: Any, prompts: Sequence[str], seed: int, inputs: Mapping[str, Any]) -> Draw:
    def draw(count: int, begin: int = 0, **changes: Any) -> tuple[list[Tensor], list[float]]:
        images, taken = [], []
        for i, prompt in enumerate(prompts[begin:count], begin):
            generator = torch.Generator().manual_seed(seed + i)
            start = time.perf_counter()
            given = {**inputs, **changes}
            words = () if "prompt_embeds" in given else (prompt,)
            output = pipe(*words, generator=generator, output_type="pt", **given).images
            images.append(output.float().cpu())  # waits for the device
            taken.append(time.perf_counter() - start)
        return images, taken

    return draw


def _advice(pipe: Any, draw: Draw, count: int, few: int, speedup: Callable[[list[float]], float]) -> list[str]:
    """What helps without a patch, or beside one."""
    net: Any = denoiser_of(pipe)
    said = []
    layouts = [(parameter, parameter.data) for parameter in net.parameters()]
    if any(weight.dim() == 4 for _, weight in layouts):
        try:
            net.to(memory_format=torch.channels_last)
            draw(1, num_inference_steps=few)
            taken = draw(count)[1]
        finally:
            for parameter, weight in layouts:
                parameter.data = weight
        said.append(f"channels_last, without a patch: {speedup(taken):.2f}x")
    if net.device.type == "cuda" and net.dtype == torch.float32:
        said.append("half precision was not tried: load the pipeline with dtype=torch.float16")
    said.append("torch.compile was not tried: it takes minutes before the first image")
    return said


def _psnr(image: Tensor, true: Tensor) -> float:
    """Of images in [0, 1], in dB; 100 where they are equal."""
    error = (image - true).square().mean().item()
    return -10 * math.log10(max(error, 1e-10))


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bars."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before if before is not None else {}
