"""Every pipeline with a transformer: the patch is active, the image stays close, removal gives the bit-equal image."""

import pytest
from checks import check
from zoo_transformers import TRANSFORMERS


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_pipeline(name):
    check(*TRANSFORMERS[name](), {}, {"sample_kv": True}, {"ratio": 0, "cache_interval": 2, "cache_cell": 2})
