"""How much less is there to compute, and to hold in memory? Both counted, of a trajectory that computes nothing.

Exact, the same on every machine, and at any size: what a method saves where arithmetic is all that costs. What it
saves in seconds, `latency.py` measures. The memory is that of the tensors of a denoiser call, with the features that
are kept for later ones, and without the weights and the workspace of kernels.

    python benchmarks/operations.py --model sd15 --size 256 512 1024 2048
    python benchmarks/operations.py --model sd3-medium --size 1024 --steps 28
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, denoiser, denoiser_inputs, load_pipeline
from card import card, write_json
from latency import RESULTS
from methods import chosen, fitting
from options import at_least, errors_in_one_line, option, parsed
from peers import Method
from tables import show_result
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


class FusedAttention(TorchFunctionMode):
    """Attention as one operation, as devices have it. Of tensors without data PyTorch makes the N x N products."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            products = (named[name] for name in ("query", "key", "value"))
            return torch.ops.aten._scaled_dot_product_efficient_attention(*products, None, False)[0]
        return function(*args, **(kwargs or {}))


class LiveMemory(TorchDispatchMode):
    """The most bytes that tensors made within it hold at once: no weights, no inputs, no workspace of a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_mb = 0.0
        self._sizes = WeakIdKeyDictionary()  # of the storages that are alive

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # an output that is one of them is a view
        for storage in _storages(output):
            if storage._cdata not in given:
                self._sizes[storage] = storage.nbytes()
        self.peak_mb = max(self.peak_mb, sum(self._sizes.values()) / 2**20)
        return output


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta)
    return [tensor.untyped_storage() for tensor in tensors]


@torch.inference_mode()
def counted(pipe: Any, method: Method, size: int, steps: int) -> dict[str, Any]:
    """Floating-point operations of the dearest call, of the cheapest and of all, and the peak of memory in MB."""
    net, calls = denoiser(pipe), []
    without_data = lambda _, args, kwargs: (args, tree_map_only(Tensor, lambda tensor: tensor.to("meta"), kwargs))
    pipe.scheduler.set_timesteps(method.steps(steps))
    undo = method.apply(pipe)
    hook = net.register_forward_pre_hook(without_data, with_kwargs=True)  # after what asks for the timestep's value
    with LiveMemory() as memory:
        for t in pipe.scheduler.timesteps:
            args, named = denoiser_inputs(net, size, t)
            with FusedAttention(), FlopCounterMode(display=False) as counter:
                net(*args, **named)
            calls.append(float(counter.get_total_flops()))
    hook.remove()
    undo()
    return {"calls": {"dearest": max(calls), "cheapest": min(calls)}, "total": sum(calls), "peak_mb": memory.peak_mb}


@dataclass
class Case:
    """What is counted."""

    model: str = option("sd15", f"{', '.join(ARCHITECTURES)}, a model id or a folder")
    size: list[int] = option([512], "pixels of a side (default: 512)", nargs="+", type=at_least(1))
    steps: int = option(50, "of a trajectory")
    methods: list[str] | None = option(None, "names as in methods.py (default: all)", nargs="+")
    out: Path = option(RESULTS, "folder of the JSON files", type=Path)


def main() -> None:
    case = parsed(Case, __doc__)
    with errors_in_one_line():
        methods = chosen(case.methods, [])
        pipe = load_pipeline(case.model, torch.float32, "meta")
        methods = fitting(methods, pipe, countable=True)
        for size in case.size:
            rows = [{"method": n, "ratio": m.ratio, **counted(pipe, m, size, case.steps)} for n, m in methods.items()]
            result = {
                "kind": "operations",
                **card("meta"),
                "settings": {**asdict(case), "size": size, "out": None},
                "rows": rows,
            }
            out = case.out / f"operations-{Path(case.model).name}-{size}.json"
            write_json(out, result)
            show_result(result, out)


if __name__ == "__main__":
    main()
