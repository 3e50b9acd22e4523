"""Every pipeline: the patch is active, the image stays close, and removal gives the bit-equal image back."""

import pytest
from checks import check
from zoo import PIPELINES


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name):
    check(*PIPELINES[name](), {}, {"sample_kv": True}, {"cache_interval": 2})
