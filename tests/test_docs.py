"""README and docs: short enough to be read, without dead links, and with the numbers of the committed tables."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted((PROJECT / "docs").glob("*.md"))]
DEMO = PROJECT / "figures" / "committed" / "demo"


def _rows(text: str) -> list[list[str]]:
    """Cells of all rows of Markdown tables."""
    text = re.sub(r"\[([^][]*)\]\([^()]*\)", r"\1", text.replace("\xa0", " "))  # without links
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_readme_is_short():
    assert len((PROJECT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_pages_are_reached_from_the_readme():
    readme = (PROJECT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"({page.relative_to(PROJECT)})" not in readme] == []


@pytest.mark.parametrize(("number", "task"), [(1, "classification"), (2, "segmentation"), (3, "depth")])
def test_numbers_of_the_readme_are_those_of_the_committed_tables(number, task):
    rows = _rows((PROJECT / "README.md").read_text())
    first = next(i for i, row in enumerate(rows) if row[0].startswith(f"{task}, "))
    shown = [row[1:] for row in rows[first : first + 2]]
    assert shown == [row[2:] for row in _rows((DEMO / f"table{number}.md").read_text())[2:4]]


def test_verdicts_of_the_readme_are_the_committed_ones():
    said = [[cell.split(": ")[0] for cell in row] for row in _rows((DEMO / "claims.md").read_text())[2:7]]
    assert [row for row in _rows((PROJECT / "README.md").read_text()) if row[0].startswith("(")] == said
