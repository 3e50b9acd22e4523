"""Cached calls against full ones, of ours and of the caches in diffusers."""

import json

import pytest
from running import run


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("exactness") / "exactness.json"
    result = run("exactness.py", "--kinds", "flux", "--out", out)
    assert result.returncode == 0, result.stderr
    return {row["case"]: row for row in json.loads(out.read_text())["rows"]}


def test_ours_is_exact_in_every_case(rows):
    assert len(rows) == 5 and {row["agentsd"] for row in rows.values()} == {"exact"}


def test_the_check_can_fail(rows):
    """With a ControlNet, one of diffusers adds its residuals twice; where nothing sets a context, another raises."""
    assert rows["plain"]["FirstBlockCache"] == rows["plain"]["MagCache"] == "exact"
    assert rows["ControlNet, groups"]["MagCache"].startswith("wrong by")
    assert rows["image to image, two images"]["FirstBlockCache"].startswith("raises without a context")


def test_what_caches_nothing_is_not_called_exact():
    from exactness import cases, outcome  # noqa: PLC0415

    assert outcome("flux", cases("flux")["plain"], lambda net, case: None, False) == "caches nothing"
