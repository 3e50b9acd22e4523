"""docs/compatibility.md has a row for every case that is tested, and for no other."""

import re

import pytest
from conftest import ROOT
from test_accelerators import HOW
from test_adapters import FEATURES as ADAPTERS
from test_memory import FEATURES as MEMORY
from zoo import PIPELINES
from zoo_transformers import TRANSFORMERS

PAGE = (ROOT / "docs" / "compatibility.md").read_text()
SECTIONS = {
    "Pipelines": PIPELINES,
    "Pipelines with a transformer": TRANSFORMERS,
    "Adapters": ADAPTERS,
    "Memory, back ends, training": MEMORY,
    "Compilers": HOW,
}


@pytest.mark.parametrize("section", SECTIONS)
def test_rows(section):
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert [row[0] for row in rows[2:]] == list(SECTIONS[section])
    assert all(row[1] == "yes" for row in rows[2:])


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
