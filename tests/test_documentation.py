"""The documentation builds without a warning, and names every parameter."""

import inspect
import subprocess
import sys

import pytest
from conftest import ROOT

import agentsd


def test_it_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "api.html").read_text()
    assert "agentsd.apply_patch" in page and "bipartite_soft_matching" in page


@pytest.mark.parametrize("name", [n for n in inspect.signature(agentsd.apply_patch).parameters if n != "model"])
def test_every_parameter_is_explained(name):
    assert f"`{name}`" in (ROOT / "docs" / "parameters.md").read_text()
    assert name in agentsd.apply_patch.__doc__ + agentsd.Settings.__doc__
