"""Every pipeline: the patch is active, the image stays close, and removal gives the bit-equal image back."""

import pytest
from checks import check
from zoo import PIPELINES

SETTINGS = {"agents": {}, "sampling": {"sample_kv": True}, "reuse": {"cache_interval": 2}}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    "settings", [{}, {"sample_kv": True}, {"cache_interval": 2}], ids=["agents", "sample", "reuse"]
)
def test_pipeline(name, settings):
    pipe, run = PIPELINES[name]()
    check(pipe, run, **settings)
