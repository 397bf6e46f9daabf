"""Who imports whom, and how much the notebooks show."""

import statistics

import house
import pytest

NOTEBOOKS = sorted((house.PROJECT / "notebooks").glob("*.ipynb"))


def test_the_core_imports_itself_alone_and_every_arrow_goes_towards_it():
    assert house.wrong_arrows() == [] and house.circles() == []
    assert {house.folder(house.name(path)) for path in house.modules()} == set(house.ARROWS)


def test_a_wrong_arrow_is_seen(tmp_path, monkeypatch):
    for folder, source in (("", "from .trust import health\n"), ("trust", "from .. import records\n"), ("ops", "")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
        (tmp_path / folder / "health.py").write_text(source)
    (tmp_path / "records.py").write_text("def f():\n    from .ops import health\n")
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    assert set(house.wrong_arrows()) == {
        "health imports trust", "health imports trust.health", "records imports ops", "records imports ops.health",
    }  # fmt: skip


def test_notebooks_show_what_they_do():
    code, words = zip(*map(house.notebook, NOTEBOOKS), strict=True)
    assert statistics.median(code) >= 55 and statistics.median(words) >= 700


@pytest.mark.parametrize("part", ["core", "whole", "tests", "median", "arrows: as they should be"])
def test_the_measures_are_printed(part):
    assert part in house.text()
