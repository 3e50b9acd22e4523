"""Who imports whom in `agentsd/`: no circle, nothing upwards, and the algorithm needs PyTorch alone."""

import ast
import re
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "agentsd"
WHOLE = ("cli", "vision")
ALGORITHM = {"schedule", "matching", "merge", "attention", "features", "control", "hosts.base"}
OTHERS = {  # that import other packages than PyTorch and diffusers
    "vision": {"torch", "timm", "torchvision"},  # an extra
    "tuning": {"torch", "tqdm"},
    "cli": {
        "torch",
        "diffusers",
        "accelerate",
        "tqdm",
        "numpy",
        "PIL",
        "gradio",
    },  # the last an extra, for one command
}
MAY_IMPORT = {  # of the package, in the order of CONTRIBUTING.md
    "schedule": "",
    "matching": "",
    "merge": "matching",
    "attention": "",
    "features": "",
    "control": "schedule features",
    "hosts.base": "",
    "wrapping": "",
    "checkpointing": "",
    "settings": "schedule",
    "idle": "settings",
    "loops": "features wrapping",
    "trajectory": "loops schedule wrapping",
    "hosts.unet": "hosts.base",
    "hosts.transformer": "hosts.base",
    "hosts.sd3": "hosts.base hosts.transformer",
    "hosts.flux": "hosts.base hosts.transformer",
    "hosts.pixart": "hosts.base hosts.transformer",
    "hosts.reused": "hosts.base hosts.transformer",
    "hosts": "hosts.base hosts.unet hosts.sd3 hosts.flux hosts.pixart hosts.reused",
    "planner": "schedule settings matching features",
    "processor": "schedule attention planner wrapping",
    "joint": "schedule matching merge attention processor",
    "block": "matching merge checkpointing settings hosts planner processor joint wrapping",
    "tracks": "schedule features control hosts wrapping",
    "reuse": "schedule checkpointing control features wrapping settings hosts planner processor tracks",
    "graphs": "",
    "capture": "matching planner processor graphs",
    "models": "",
    "patch": "schedule wrapping checkpointing settings trajectory hosts planner block reuse capture models",
    "apply": "wrapping settings idle hosts models patch",
    "costs": "schedule matching planner block",
    "reports": "schedule settings planner",
    "survey": "schedule control costs settings hosts planner processor block models patch reports",
    "trials": "reports",
    "tuning": "apply models schedule settings trials",
    "agentsd": "settings apply reports survey trials tuning",
    "cli": "idle trials tuning agentsd",
    "__main__": "cli",
    "vision": "attention",
}


def name_of(path) -> str:
    """``hosts.unet`` for ``agentsd/hosts/unet.py``, ``agentsd`` for the package itself; some are one, whole."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in WHOLE:
        return parts[0]
    return ".".join(parts).replace("__init__", "").rstrip(".") or "agentsd"


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {name: [path for path in FILES if name_of(path) == name] for name in map(name_of, FILES)}


def imports_of(source: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and packages of others, that are imported anywhere in it."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name for name in submodules if name.removeprefix("agentsd.") in MODULES]
            names = known if known and len(known) == len(submodules) else [node.module, *known]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package == "agentsd":
                first = module.partition(".")[0]
                own.add(first if first in WHOLE else module or "agentsd")
            else:
                others.add(package)
    return own, others


def test_imports_are_found_in_every_form():
    assert imports_of("from agentsd.vision.build import build")[0] == {"vision"}
    lines = ["import agentsd.patch", "from agentsd import merge, report", "def f():", "    import agentsd.hosts.unet"]
    assert imports_of("\n".join(lines)) == ({"patch", "merge", "agentsd", "hosts.unet"}, set())
    others = imports_of("import torch.nn as nn\nfrom diffusers.models import attention")[1]
    assert others == {"torch", "diffusers"}


def test_every_module_is_in_the_table():
    assert set(MAY_IMPORT) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_it_may(module):
    allowed = {"torch"} if module in ALGORITHM else OTHERS.get(module, {"torch", "diffusers"})
    for path in MODULES[module]:
        own, others = imports_of(path.read_text())
        assert own - {module} <= set(MAY_IMPORT[module].split()), path.name
        assert others - sys.stdlib_module_names <= allowed, path.name


def test_the_order_has_no_circle_and_is_that_of_the_contributors_page():
    order = list(MAY_IMPORT)
    for place, module in enumerate(order):
        assert set(MAY_IMPORT[module].split()) <= set(order[:place]), module
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", page, flags=re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`([a-z0-9._]+)`", row)] == [
        name for name in order if name != "agentsd"
    ]


def test_the_algorithm_is_made_of_itself():
    assert all(set(MAY_IMPORT[module].split()) <= ALGORITHM for module in ALGORITHM)
