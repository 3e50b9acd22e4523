"""Trains a small Agent-PVT, or its softmax twin, on emoji: classification, detection or segmentation.

    python examples/vision/train.py classify --attention agent --emoji package --output runs/classify-agent

One recipe for both attentions: AdamW, warm-up and cosine, exponential moving average, evaluation on emoji that were
never shown. A run that was interrupted goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from safetensors.torch import save_file
from tasks import ATTENTION, TASKS, Task
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

WARM_UP = 0.05  # part of the training in which the learning rate rises


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--attention", choices=ATTENTION, default="agent")
    parser.add_argument(
        "--emoji", type=Path, required=True, help="unpacked npm package emoji-datasource-google 16.0.0"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, curves and the state")
    parser.add_argument("--steps", type=int, help="default: the task's own")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the schedule by then, whatever the steps")
    parser.add_argument("--batch", type=int, help="default: the task's own")
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--evaluate-scenes", type=int, default=1080)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision", choices=["no", "bf16", "fp16"], help="default: the task's own on a GPU, else no"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    return parser.parse_args()


def learning_rate(base: float, progress: float) -> float:
    """Of a linear warm-up and a cosine, at a `progress` between 0 and 1."""
    if progress < WARM_UP:
        return base * (progress / WARM_UP + 1e-3)
    return base * (0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) + 1e-6


class Run:
    """The state of a training: what is saved, and what goes on from it."""

    def __init__(self, args: argparse.Namespace):
        set_seed(args.seed)
        precision = args.precision or (TASKS[args.task].precision if torch.cuda.is_available() else "no")
        torch.set_float32_matmul_precision("high")
        self.accelerator = Accelerator(mixed_precision=precision)
        self.args = args
        self.task: Task = TASKS[args.task](args.emoji, self.accelerator.device, args.seed)
        self.task.batch = args.batch or self.task.batch
        self.steps: int = args.steps or self.task.steps
        model = self.task.build(args.attention).to(self.accelerator.device)
        optimizer = create_optimizer_v2(model, "adamw", self.task.learning_rate, args.weight_decay)
        self.ema = ModelEmaV3(model, decay=0.998, use_warmup=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.history: dict[str, Any] = {
            "task": args.task,
            "attention": args.attention,
            "parameters": sum(p.numel() for p in model.parameters()),
            "batch": self.task.batch,
            "pixels": self.task.size,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "precision": precision,
            "step": 0,
            "seconds": 0.0,
            "loss": [],
            "evaluations": [],
        }
        self.output: Path = args.output
        self.output.mkdir(parents=True, exist_ok=True)
        if args.resume:
            self.accelerator.load_state(str(self.output / "state"))
            self.ema.load_state_dict(torch.load(self.output / "ema.pt", weights_only=True))
            self.history = json.loads((self.output / "history.json").read_text())

    def progress(self) -> float:
        return max(self.history["step"] / self.steps, self.history["seconds"] / self.args.seconds)

    def due(self) -> int:
        """How many evaluations belong to the progress made; a run that goes on may have been given more steps."""
        return int(min(1.0, self.progress()) * self.args.evaluations + 1e-9)

    def step(self) -> torch.Tensor:
        rate = learning_rate(self.task.learning_rate, min(1.0, self.progress()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        with self.accelerator.autocast():
            loss = self.task.loss(self.model, self.task.training.draw(self.task.batch))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.history["step"] += 1
        self.ema.update(self.accelerator.unwrap_model(self.model), step=self.history["step"])
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        model: nn.Module = self.ema.module.eval()
        return self.task.evaluate(model, self.args.evaluate_scenes)

    def save(self) -> None:
        """Curves, averaged weights in half precision, and the state to go on from."""
        weights = {name: x.half() if x.is_floating_point() else x for name, x in self.ema.module.state_dict().items()}
        weights = {name: x.contiguous() for name, x in weights.items()}
        about = {"task": self.args.task, "attention": self.args.attention}  # so that whoever loads it can build it
        save_file(weights, self.output / "model.safetensors", about)
        torch.save(self.ema.state_dict(), self.output / "ema.pt")
        self.accelerator.save_state(str(self.output / "state"))
        self.write_history()

    def write_history(self) -> None:
        (self.output / "history.json").write_text(json.dumps(self.history, indent=1) + "\n")

    def train(self) -> None:
        evaluated = self.due()
        bar = tqdm(total=self.steps, initial=self.history["step"], desc=f"{self.args.task} {self.args.attention}")
        start = time.perf_counter() - self.history["seconds"]
        while self.progress() < 1:
            loss = self.step()
            bar.update()
            self.history["seconds"] = time.perf_counter() - start
            if self.history["step"] % 20 == 0:
                self.history["loss"].append([self.history["step"], round(loss.item(), 4)])
                bar.set_postfix(loss=self.history["loss"][-1][1])
            if self.due() > evaluated:
                evaluated = self.due()
                self.save()
                figures = {name: round(value, 4) for name, value in self.evaluate().items()}
                self.history["evaluations"].append(
                    {"step": self.history["step"], "seconds": round(self.history["seconds"], 1), **figures}
                )
                self.write_history()
                bar.write(json.dumps(self.history["evaluations"][-1]))
                start = time.perf_counter() - self.history["seconds"]  # evaluation is no training
        bar.close()


if __name__ == "__main__":
    Run(arguments()).train()
