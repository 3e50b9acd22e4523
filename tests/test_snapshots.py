"""Images as they were when their settings were made: a change of the code's structure leaves every bit of them.

`python tests/test_snapshots.py` takes the snapshots anew, after a change that is meant to change images.
"""

import itertools
import platform
import re
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import UNETS, image, make_pipeline, make_scheduler
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import save_file

import agentsd

FILE = Path(__file__).parent / "data" / "snapshots.safetensors"
STEPS = 30  # enough for every phase, and for each preset to cache calls enough to be told from unpatched images
CLOSE = 1e-3  # of a standard deviation: other processors round differently, and so decide a near tie of matches
SCHEDULERS = {"sd15": DDIMScheduler, "sd21": EulerDiscreteScheduler, "sdxl": EulerDiscreteScheduler}
SETTINGS = {
    "plain": None,
    "schedule": {"ratio": 0.4},
    "everything": {"ratio": 0.6, "max_downsample": 2, "merge_crossattn": True, "merge_mlp": True},
    "few_steps": {"preset": "few_steps"},
    "quality": {"preset": "quality"},
    "balanced": {"preset": "balanced"},
    "balanced, merging": {"preset": "balanced", "ratio": 0.4},
    "cache": {"cache_interval": 3, "cache_branch": 1, "cache_order": 0},
}


def environment() -> dict[str, str]:
    """Where images are expected to have the same bits."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    processor = model[1] if model else platform.processor()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return versions | {"capability": torch.backends.cpu.get_cpu_capability(), "processor": processor}


def snapshot(kind: str, name: str) -> torch.Tensor:
    """Latents (1, 4, 16, 16) of an image with the settings ``name``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums depends on it
    try:
        pipe = make_pipeline(kind, make_scheduler(SCHEDULERS[kind]))
        if SETTINGS[name] is not None:
            agentsd.apply_patch(pipe, **SETTINGS[name], min_tokens=0, seed=1)
        return image(pipe, STEPS)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_image_is_what_it_was(kind, name):
    with safe_open(FILE, "pt") as file:
        expected, same = file.get_tensor(f"{kind}/{name}"), file.metadata() == environment()
    tolerance = 0 if same else CLOSE * expected.std().item()
    torch.testing.assert_close(snapshot(kind, name), expected, rtol=0, atol=tolerance)


def test_snapshots_are_further_from_each_other_than_rounding_goes(kind):
    with safe_open(FILE, "pt") as file:
        images = [file.get_tensor(f"{kind}/{name}") for name in SETTINGS]
    for one, other in itertools.combinations(images, 2):
        assert (one - other).abs().max() > 10 * CLOSE * one.std()


if __name__ == "__main__":
    latents = {f"{kind}/{name}": snapshot(kind, name) for kind in UNETS for name in SETTINGS}
    save_file(latents, FILE, environment())
