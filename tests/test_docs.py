"""The README's table is the results', and links lead somewhere."""

import re
import sys

import pytest
from conftest import ROOT

CARDS = ("examples/demo_model/README.md", "examples/demo_model_sd3/README.md")
NAMES = ("README.md", "CONTRIBUTING.md", "docs/compatibility.md", *CARDS)
PAGES = [ROOT / name for name in NAMES]


def test_the_readme_gives_the_results():
    pytest.importorskip("rich", reason="the extra `bench` is not installed")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import readme  # noqa: PLC0415

    assert readme.table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
