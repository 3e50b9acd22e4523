"""Where the time of a trajectory goes, by torch's own profiler."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# none of them within another
OPERATIONS = {
    "convolutions": "aten::conv2d",
    "attention": "aten::scaled_dot_product_attention",
    "linear layers": "aten::linear",
}
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def on_device(run: Callable[[], Any], calls: int) -> dict[str, float]:
    """What one denoiser call asks of a GPU, in the mean of a trajectory: kernels, copies, waits, ms of its time."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))  # a file of 100,000 kernels is read sooner than profiler.events()
        counts = counted_events(json.loads(path.read_text())["traceEvents"])
    return {name: count / calls for name, count in counts.items()}


def counted_events(events: list[dict[str, Any]]) -> dict[str, float]:
    """Of a trace as Chrome reads it: kernels, copies between host and device, waits of the host, ms of the device."""
    found: Counter[str] = Counter(kernels=0, copies=0, waits=0, device_ms=0)
    for event in events:
        category, name = event.get("cat", ""), event.get("name", "")
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            found["device_ms"] += event["dur"] / 1e3
        found["kernels"] += category == "kernel"
        found["copies"] += category == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name)
        found["waits"] += category == "cuda_runtime" and name in WAITS
    return dict(found)


def by_operation(run: Callable[[], Any]) -> dict[str, float]:
    """Shares of the time of all calls that ``run`` makes on a CPU; projections and MLPs are linear layers.

    Everything else is norms and sums, the scheduler, and what a method does beside the layers.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("all"):
        run()
    seconds = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    shares = {kind: seconds.get(operation, 0.0) / seconds["all"] for kind, operation in OPERATIONS.items()}
    return {**shares, "everything else": 1 - sum(shares.values()), "seconds": seconds["all"]}
