"""What is wrong with a command is said in one line."""

import subprocess
import sys

import pytest
from conftest import ROOT
from running import BENCHMARKS, run


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("host.py", ["--methods", "magic"], "magic"),
        ("latency.py", ["--model", "no/such/model"], "no/such/model"),
        ("latency.py", ["--rounds", "0"], "--rounds: '0' is not allowed: expected a whole number, 1 or more"),
        ("latency.py", ["--size", "100"], "multiple of 64"),
        ("latency.py", ["--batch", "3"], "--batch 3"),
        ("latency.py", ["--size", "64", "128", "--out", "one.json"], "--out"),
        ("latency.py", ["--modes", "magic"], "--modes"),
        ("latency.py", ["--scheduler", "magic"], "--scheduler"),
        ("latency.py", ["--device", "cpu", "--profile", "--modes", "eager", "compile"], "--profile"),
        ("operations.py", ["--steps", "0"], "--steps"),
        ("operations.py", ["--methods", "magic"], "magic"),
        ("quality.py", ["--model", "no/such/model"], "no/such/model"),
        ("quality.py", ["--images", "0"], "--images"),
        ("quality.py", ["--first", "-1"], "--first"),
        ("quality.py", ["--real", "no/such/folder"], "no/such/folder"),
        ("quality.py", ["--folder", "/proc/nowhere"], "/proc/nowhere"),
        ("quality.py", ["--prompts", "no.txt"], "no.txt"),
        ("quality.py", ["--methods", "magic"], "magic"),
        ("report.py", ["--results", "no/such/folder"], "no/such/folder"),
    ],
)
def test_one_clear_line_and_exit_code_2(script, arguments, message):
    result = run(script, *arguments)
    assert result.returncode == 2
    assert message in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_peer_that_is_not_installed_is_left_out_and_named(monkeypatch):
    import methods  # noqa: PLC0415

    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None if name == "tgate" else name)
    assert "T-GATE" not in methods.chosen(None, [])
    with pytest.raises(ValueError, match="pip install tgate"):
        methods.chosen(["T-GATE"], [])


def test_what_python_takes_of_calls_that_run_and_of_those_that_are_replayed():
    result = run("host.py", "--steps", 4, "--rounds", 1, "--methods", "agentsd balanced")
    assert result.returncode == 0
    for name in ("unpatched", "agentsd balanced", "unpatched, recorded", "agentsd balanced, recorded"):
        assert any(line.split("│")[1].strip() == name for line in result.stdout.splitlines() if "│" in line)


def test_a_script_runs_by_its_path():
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "latency.py"), "--rounds", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 2 and "--rounds" in result.stderr.strip().splitlines()[-1]
