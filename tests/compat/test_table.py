"""docs/compatibility.md has a row for every case that is tested, and for no other."""

import re

import pytest
from conftest import ROOT
from test_accelerators import HOW
from test_adapters import FEATURES as ADAPTERS
from test_memory import FEATURES as MEMORY
from zoo import PIPELINES
from zoo_reused import REUSED
from zoo_transformers import MODELS, TRANSFORMERS

PAGE = (ROOT / "docs" / "compatibility.md").read_text()
SECTIONS = {"Pipelines": PIPELINES, "Pipelines with a transformer": TRANSFORMERS, "Compilers": HOW}
SECTIONS["Pipelines whose features alone are reused"] = REUSED
BY_MODEL = {"Adapters": ADAPTERS, "Memory, back ends, training": MEMORY}


def rows(section: str) -> list[list[str]]:
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


@pytest.mark.parametrize("section", SECTIONS)
def test_rows(section):
    assert [row[:2] for row in rows(section)[2:]] == [[name, "yes"] for name in SECTIONS[section]]


@pytest.mark.parametrize("section", BY_MODEL)
def test_rows_and_columns(section):
    head, _, *rest = rows(section)
    assert head == ["feature", *MODELS, "what to know"]
    tested = {
        name: ["yes" if model in models else "-" for model in MODELS]
        for name, (_, models) in BY_MODEL[section].items()
    }
    assert {row[0]: row[1:-1] for row in rest} == tested


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGE):
        file, _, heading = link.partition("#")
        path = ROOT / "docs" / file
        assert path.exists(), link
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if heading else []
        assert heading in ["", *(re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings)], link
