"""What does Python take of a denoiser call? A GPU that draws one image waits for it; none is needed here.

The layout of Stable Diffusion 1.5 has so few channels that arithmetic is nothing, and the methods' calls come in turn,
on one thread. Where calls are recorded (``cuda_graphs=True``), a replay hands back what the recording gave: what is
left is what Python does around it.

    python benchmarks/host.py
    python benchmarks/host.py --methods "agentsd balanced" "DeepCache N=3" --rounds 10
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from methods import agent, chosen, fitting
from options import errors_in_one_line, option, parsed
from tables import show

from agentsd import capture

DEFAULT = ["tomesd r=0.4", "agentsd r=0.4 (the paper's schedule)", "agentsd few_steps", "DeepCache N=3"]
DEFAULT += ["agentsd quality", "agentsd balanced"]
RECORDED = {"unpatched, recorded": agent(ratio=0, cuda_graphs=True)}
RECORDED |= {"agentsd balanced, recorded": agent(preset="balanced", cuda_graphs=True)}


@dataclass
class Case:
    """What is timed."""

    steps: int = option(50, "of a trajectory")
    rounds: int = option(5, "trajectories of each method, after one that warms up")
    methods: list[str] | None = option(DEFAULT, "names as in methods.py (default: six of them)", nargs="+")


class Replayed:
    """In the place of `agentsd.graphs.CudaGraphs`: a graph that takes no time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take_turn(self) -> None: ...

    def record(self, function: Callable[[], object]) -> Callable[[], object]:
        output = function()
        return lambda: output


class Pipe:
    """Blocks and layers of Stable Diffusion 1.5."""

    def __init__(self) -> None:
        sizes = {"sample_size": 8, "cross_attention_dim": 8, "attention_head_dim": 1, "norm_num_groups": 4}
        self.unet = UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), **sizes).eval()
        self.scheduler = EulerDiscreteScheduler()


@torch.inference_mode()
def timed(pipes: dict[str, Pipe], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call of a trajectory, by method: medians over the rounds."""
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8)
    taken: dict[str, list[list[float]]] = {name: [[] for _ in range(steps)] for name in pipes}
    for turn in range(rounds + 1):
        for pipe in pipes.values():
            pipe.scheduler.set_timesteps(steps)
        for i in range(steps):
            for name, pipe in pipes.items():
                start = time.perf_counter()
                pipe.unet(sample, pipe.scheduler.timesteps[i], text)
                if turn:
                    taken[name][i].append(time.perf_counter() - start)
    return {name: [statistics.median(call) for call in calls] for name, calls in taken.items()}


def main() -> None:
    case = parsed(Case, __doc__)
    torch.set_num_threads(1)
    with errors_in_one_line(), patch.object(capture, "CudaGraphs", Replayed):
        base = Pipe()
        methods = fitting(chosen(case.methods, []), base) | RECORDED
        pipes = {name: copy.deepcopy(base) for name in methods}
        for name, method in methods.items():
            method.apply(pipes[name])
        calls = timed(pipes, case.steps, case.rounds)
    whole = {name: sum(seconds) for name, seconds in calls.items()}
    rows = [("method", "dearest call, ms", "cheapest call, ms", "ratio of a trajectory")]
    for name, seconds in calls.items():
        dearest, cheapest = (f"{1e3 * extreme(seconds):.2f}" for extreme in (max, min))
        rows.append((name, dearest, cheapest, f"{whole['unpatched'] / whole[name]:.2f}x"))
    show(rows, f"What Python takes of {case.steps} calls")


if __name__ == "__main__":
    main()
