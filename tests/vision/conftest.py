"""All of these tests need the extra `vision`, whole: without it they are skipped."""

from importlib.util import find_spec

import pytest

NEEDED = ("timm", "torchvision", "segmentation_models_pytorch", "torchmetrics", "pycocotools")


def pytest_pycollect_makemodule() -> None:
    """Here and not at the top: a conftest that is named on the command line cannot skip."""
    missing = [name for name in NEEDED if not find_spec(name)]
    if missing:
        pytest.skip(f'{", ".join(missing)} missing: pip install "agentsd[vision]"')
