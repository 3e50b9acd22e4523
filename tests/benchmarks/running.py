"""The commands of benchmarks/, in this process: PyTorch is imported once."""

import contextlib
import importlib
import io
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

BENCHMARKS, DEMO_MODEL = ROOT / "benchmarks", ROOT / "examples" / "demo_model"
PAPER, MERGING = "agentsd r=0.4 (the paper's schedule)", "agentsd balanced, r=0.4"
sys.path.insert(0, str(BENCHMARKS))
pytest.importorskip("torch_fidelity", reason="the extra `bench` is not installed")


def run(script: str, *arguments: object) -> SimpleNamespace:
    """What `python benchmarks/SCRIPT ARGUMENTS` gives: its exit code, what it printed, and its errors."""
    main = importlib.import_module(script.removesuffix(".py")).main
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(BENCHMARKS / script), *map(str, arguments)])
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                main()
            except SystemExit as end:
                code = end.code
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())
