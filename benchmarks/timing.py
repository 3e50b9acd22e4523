"""What is timed: single UNet calls, or whole images."""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

import torch
from architectures import load_unet, random_inputs
from diffusers import DiffusionPipeline
from measure import PeakMemory, breakdown
from methods import PHASES, Calls, Method, trajectory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Timed = dict[str, tuple[dict[str, float], float | None]]  # what a round has timed, by `Calls.alike`


class Denoiser:
    """Times single UNet calls."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.unet = load_unet(args.model, DTYPES[args.dtype], args.device)
        self.extra = random_inputs(self.unet, args.batch, args.size)
        self.sample, self.text = (self.extra.pop(name) for name in ("sample", "encoder_hidden_states"))
        # methods that follow a pipeline's scheduler find one whose schedule holds the calls to be timed
        self.timesteps, self.starts = trajectory(args.steps)
        self.scheduler = SimpleNamespace(timesteps=self.timesteps, order=1)
        self.spent = 0.0  # seconds, in all calls
        if args.compile:
            self.unet.compile()
        else:
            self.call(0)  # the very first pays for memory, too
        self.profiles: dict[str, dict[str, float]] = {}  # by `Calls.alike`

    def round(self, method: Method, timed: Timed) -> dict[str, Any]:
        calls = Calls(method, self.args.steps)
        if calls.alike not in timed:
            timed[calls.alike] = self.time(method, calls)
        seconds, peak_mb = timed[calls.alike]
        return {"calls": seconds, "schedule": calls.schedule(seconds), "peak_mb": peak_mb}

    def memory(self) -> Any:
        return PeakMemory(self.args.device)

    def time(self, method: Method, calls: Calls) -> tuple[dict[str, float], float | None]:
        """Seconds of a call of each kind, and the peak memory of all of them in MB."""
        seconds: dict[str, float] = {}
        with self.memory() as memory:
            for phase in PHASES:
                undo = method.at(self.args.steps).apply(self)
                try:
                    if self.args.compile:
                        self.run(phase, calls.of(phase))
                    seconds |= self.run(phase, calls.of(phase))  # of each kind, the last
                finally:
                    undo()
        return seconds, memory.peak_mb

    def run(self, phase: str, names: list[str]) -> dict[str, float]:
        return {name: self.call(self.starts[phase] + i) for i, name in enumerate(names)}

    @torch.inference_mode()
    def call(self, place: int) -> float:
        start = time.perf_counter()
        output = self.unet(self.sample, self.timesteps[place], self.text, **self.extra).sample
        output.float().mean().item()  # reading a value waits for the device
        seconds = time.perf_counter() - start
        self.spent += seconds
        return seconds

    def profile(self, method: Method) -> dict[str, float]:
        """Shares of the time by kind of layer, in all the calls of a round: some are there for others to follow."""
        calls = Calls(method, self.args.steps)

        def seconds() -> float:
            before = self.spent
            self.time(method, calls)
            return self.spent - before

        if calls.alike not in self.profiles:
            self.profiles[calls.alike] = breakdown(seconds, self.unet)
        return self.profiles[calls.alike]


class WholePipeline:
    """Times whole images; ``batch`` counts those of the denoiser, of which guidance makes two an image."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=DTYPES[args.dtype]).to(args.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.unet = self.pipe.unet
        self.images = max(1, args.batch // 2)
        if args.compile:
            self.unet.compile()

    def round(self, method: Method, timed: Timed) -> dict[str, Any]:
        undo = method.apply(self.pipe)
        try:
            if self.args.compile:
                self.image()
            with PeakMemory(self.args.device) as memory:
                start = time.perf_counter()
                self.image()
                seconds = (time.perf_counter() - start) / self.images
        finally:
            undo()
        return {"calls": {}, "schedule": seconds, "peak_mb": memory.peak_mb}

    def image(self) -> None:
        sides = {"height": self.args.size, "width": self.args.size}
        self.pipe(["a photograph"] * self.images, num_inference_steps=self.args.steps, **sides)
