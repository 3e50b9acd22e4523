"""How much faster? Seconds of whole denoising trajectories of every method, in turn, on the real architectures.

A trajectory is a call of the pipeline that takes text embeddings and gives latents: denoiser, guidance and scheduler.
Random weights by default: the speed is that of trained ones, and nothing is downloaded. Ratios are taken within a
round, to what is unpatched and runs in the same mode; every other round goes backwards, so that a machine that slows
down or speeds up favours none. Compiled methods have their rounds in a row, since each compiles anew.

    python benchmarks/latency.py --model sd15 --dtype float16 --size 512 1024
    python benchmarks/latency.py --model sdxl --size 1024 --modes eager reduce-overhead --methods "agentsd balanced"
    python benchmarks/latency.py --model sd3-medium --size 1024 --dtype bfloat16 --steps 28
    python benchmarks/latency.py --model sd15 --device cpu --size 512 --steps 20 --rounds 1 --methods "agentsd fast"

On a CPU a call takes seconds, and a trajectory minutes: fewer steps say the truth of as many steps. On a GPU the last
round is not timed but profiled: kernels, copies between host and device, waits for it, and its time, of a call.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, SCHEDULERS, load_pipeline, random_inputs
from card import card, write_json
from methods import chosen, fitting
from modes import MODES, SLOW_TO_APPLY
from options import at_least, errors_in_one_line, option, parsed
from peers import Method
from profiling import by_operation, on_device
from rich.progress import Progress
from tables import show_result

RESULTS = Path(__file__).parent.parent / "runs" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CUDA = torch.cuda.is_available()


@dataclass
class Case:
    """What is measured."""

    model: str = option("sd15", f"{', '.join(ARCHITECTURES)}, a model id or a folder")
    size: list[int] = option([512], "pixels of a side (default: 512)", nargs="+", type=at_least(1))
    dtype: str = option("float16" if CUDA else "float32", "of weights and latents", choices=DTYPES)
    device: str = option("cuda" if CUDA else "cpu", "of PyTorch")
    batch: int = option(2, "samples of a call: two an image, or 1, which is without guidance")
    steps: int = option(50 if CUDA else 20, "of a trajectory")
    scheduler: str | None = option(None, "which sampler (default: the model's own)", choices=SCHEDULERS)
    rounds: int = option(2, "that are timed")
    modes: list[str] = option(["eager"], "how the denoiser runs (default: eager)", nargs="+", choices=MODES)
    methods: list[str] | None = option(None, "names as in methods.py (default: all)", nargs="+")
    ratios: list[float] = option([], "agentsd and tomesd at these, too", nargs="+", type=float)
    profile: bool = option(CUDA, "one more round by the profiler; on a CPU of one mode")
    out: Path | None = option(None, "JSON file (default: runs/results/latency-...json)", type=Path)

    def __post_init__(self) -> None:
        for size in self.size:
            if size % 64:
                raise ValueError(f"--size {size}: give a multiple of 64 pixels")
        if self.out and len(self.size) > 1:
            raise ValueError(f"--out {self.out}: each of {len(self.size)} sizes has its own file; leave it out")
        if self.batch > 1 and self.batch % 2:
            raise ValueError(f"--batch {self.batch}: give 1, or two for each image, as guidance has it")
        if self.profile and not self.on_cuda and len(self.modes) > 1:
            raise ValueError("--profile: on a CPU give one of the --modes at a time")

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def path(self, size: int) -> Path:
        usual = {self.device: "cpu", f"batch-{self.batch}": "batch-2", f"{self.steps}-steps": "50-steps"}
        usual |= {self.scheduler or "": "", "-".join(self.modes): "eager"}
        unusual = [value for value, default in usual.items() if value != default]
        name = "-".join(["latency", Path(self.model).name, str(size), self.dtype, *unusual])
        return self.out or RESULTS / f"{name}.json"


@contextmanager
def after_each_step(scheduler: Any, ended: Callable[[], None]) -> Iterator[None]:
    step = scheduler.step

    @functools.wraps(step)  # pipelines ask for the names of its arguments
    def stepped(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        ended()
        return output

    scheduler.step = stepped
    try:
        yield
    finally:
        del scheduler.step


class Trajectories:
    """Draws and times the latents of one size."""

    def __init__(self, case: Case, pipe: Any, size: int) -> None:
        self.case, self.pipe = case, pipe
        self.inputs = random_inputs(pipe, case.batch, size)

    def draw(self, method: Method, steps: int | None = None) -> None:
        method.images(self.pipe, num_inference_steps=steps or self.case.steps, **self.inputs)

    def timed(self, method: Method) -> dict[str, Any]:
        """Seconds of a trajectory and of each of its calls, of the host until it had asked for all, and the memory."""
        device = torch.get_device_module(self.case.device)
        if self.case.on_cuda:
            device.reset_peak_memory_stats()
        device.synchronize()
        start, marks = time.perf_counter(), [self._mark()]
        with after_each_step(self.pipe.scheduler, lambda: marks.append(self._mark())):
            self.draw(method)
        host = time.perf_counter() - start
        device.synchronize()
        found: dict[str, Any] = {"seconds": time.perf_counter() - start, "host": host}
        if not self.case.on_cuda:
            return {**found, "calls": [after - before for before, after in itertools.pairwise(marks)]}
        calls = [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(marks)]
        return {**found, "calls": calls, "peak_mb": device.max_memory_allocated() / 2**20}

    def _mark(self) -> Any:
        """A moment: of the clock on a CPU, of the device's queue on a GPU, where asking costs nothing."""
        if not self.case.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def profiled(self, method: Method) -> dict[str, float]:
        if self.case.on_cuda:
            return on_device(lambda: self.draw(method), method.steps(self.case.steps))
        return by_operation(lambda: self.draw(method))

    def rounds(self, mode: str, methods: dict[str, Method], advance: Callable[[], None]) -> dict[str, list[Any]]:
        """By method, what each round measured, and what the profiler did after the last.

        A method that cannot run in the mode has the error in its place: CUDA graphs, for one, keep no cache of others.
        """
        found: dict[str, list[Any]] = {name: [] for name in methods}
        every = range(self.case.rounds + self.case.profile)
        order: Iterable[str] = [name for i in every for name in (reversed(methods) if i % 2 else methods)]
        if mode in SLOW_TO_APPLY:
            order = [name for name in methods for _ in every]
        for name, visits in itertools.groupby(order):
            measured, method = found[name], methods[name]
            undo = method.apply(self.pipe)
            try:
                if not measured:  # what is compiled is so in a whole trajectory
                    self.draw(method, None if mode in SLOW_TO_APPLY else min(4, self.case.steps))
                for _ in visits:
                    profiled = len(measured) == self.case.rounds
                    measured.append(self.profiled(method) if profiled else self.timed(method))
                    advance()
            except RuntimeError as error:
                if name == "unpatched":
                    raise
                measured[:] = [error]
            finally:
                undo()
        return found


def summary(name: str, mode: str, method: Method, rounds: list[Any], base: list[Any]) -> dict[str, Any]:
    ratios = [b["seconds"] / r["seconds"] for r, b in zip(rounds, base, strict=True)]
    calls = [statistics.median(call) for call in zip(*(r["calls"] for r in rounds), strict=True)]
    peaks = [r["peak_mb"] for r in rounds if "peak_mb" in r]
    return {
        "method": name,
        "mode": mode,
        "ratio": method.ratio,
        "seconds": statistics.median(r["seconds"] for r in rounds),
        "speedup": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "calls": {"least": min(calls), "median": statistics.median(calls), "most": max(calls)},
        "host_ms": 1e3 * statistics.median(r["host"] for r in rounds) / len(calls),
        "peak_mb": max(peaks, default=None),
        "rounds": rounds,
    }


def measure(case: Case, pipe: Any, methods: dict[str, Method], size: int) -> dict[str, Any]:
    """The result of one size, written after each mode."""
    trajectories = Trajectories(case, pipe, size)
    settings = {**asdict(case), "size": size, "out": None}
    result: dict[str, Any] = {"kind": "latency", **card(case.device), "settings": settings, "rows": [], "notes": []}
    with Progress(transient=True) as progress:
        total = len(case.modes) * len(methods) * (case.rounds + case.profile)
        task = progress.add_task(f"{size} px, trajectories", total=total)
        for mode in case.modes:
            running = {name: method for name, plain in methods.items() if (method := MODES[mode](plain))}
            found = trajectories.rounds(mode, running, lambda: progress.advance(task))
            for name, measured in found.items():
                if isinstance(measured[0], RuntimeError):
                    reason = str(measured[0]).strip().splitlines()[0]
                    result["notes"].append(f"{name}, {mode}: left out, since it fails with: {reason}")
                    continue
                rounds, last = measured[: case.rounds], measured[case.rounds :]
                row = summary(name, mode, methods[name], rounds, found["unpatched"][: case.rounds])
                if last and not case.on_cuda:
                    result.setdefault("profile", {})[name] = last.pop()
                result["rows"].append(row | dict(*last))
            write_json(case.path(size), result)
    return result


def main() -> None:
    case = parsed(Case, __doc__)
    with errors_in_one_line():
        methods = chosen(case.methods, case.ratios)
        pipe = load_pipeline(case.model, DTYPES[case.dtype], case.device, case.scheduler)
        methods = fitting(methods, pipe)
        for size in case.size:
            result = measure(case, pipe, methods, size)
            show_result(result, case.path(size))


if __name__ == "__main__":
    main()
