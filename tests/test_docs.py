"""The tables are the results', and links lead somewhere."""

import re
import runpy
import sys

import pytest
from conftest import ROOT

CARDS = ("examples/demo_model/README.md", "examples/demo_model_sd3/README.md")
OTHERS = ("README.md", "CONTRIBUTING.md", "benchmarks/results/README.md", *CARDS)
PAGES = [ROOT / name for name in OTHERS] + sorted((ROOT / "docs").glob("*.md"))


def test_the_page_gives_the_results():
    pytest.importorskip("rich", reason="the extra `bench` is not installed")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import measured  # noqa: PLC0415

    assert measured.table(ROOT / "benchmarks" / "results") in (ROOT / "docs" / "measured.md").read_text()


def test_the_picture_of_cells_and_groups_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="neither of the extras `bench` and `vision` is installed")
    runpy.run_path(str(ROOT / "docs" / "pictures.py"))["token_grid"](tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_the_first_screen_repeats_the_page():
    """Each speed-up of the README's table is that of the same row in measured.md, which has its range, too."""
    cells = lambda name: [line.strip("| ").split(" | ") for line in (ROOT / name).read_text().splitlines()]
    measured = {row[0]: row[1:4] for row in cells("docs/measured.md") if len(row) == 4 and "(" in row[1]}
    speed = r"\**\d\.\d\dx\**"
    rows = {row[0].strip("*"): row[1:4] for row in cells("README.md") if len(row) > 3 and re.fullmatch(speed, row[1])}
    assert len(rows) == 6
    for method, speeds in rows.items():
        known = measured[method.replace("the paper's schedule, r=0.4", "agentsd r=0.4 (the paper's schedule)")]
        assert [speed.strip("*") for speed in speeds] == [text.split()[0] for text in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
