import pytest

pytest.importorskip("timm")
