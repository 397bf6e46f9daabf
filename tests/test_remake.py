"""One table cell made again, alone, and how that agrees with what it was."""

import pytest
from test_lab import _tables, project  # noqa: F401, a fixture

from ssl_robust import evaluate, records, settings
from ssl_robust.ops import explain, run
from ssl_robust.settings import BadInput

CELL = "table3/toys/planted/deacl/task"


@pytest.fixture
def made(project):  # noqa: F811
    return _tables()[0]


def stored(name="*"):
    return sorted(records.runs_dir("toy").glob(f"cells/depth__toys__planted__{name}"))


def test_a_cell_made_again_is_the_same_and_nothing_else_is_touched(made):
    before = {p: p.stat().st_mtime_ns for p in stored()}
    said = explain.again("Table3/toys/planted/DeACL/DepthPGD", made)
    assert said.startswith(f"{CELL} of profile 'toy'") and "The same, and so is each of its 4 images." in said
    touched = {p for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert touched == {*stored("deacl__task__*")} and {*stored()} == {*before}


def test_what_it_needs_is_made_too_where_only_records_are_there(made, root):
    for folder in ("deacl", "heads", "cells"):
        for path in records.runs_dir("toy").glob(f"{folder}/**/*.*"):
            path.unlink()
    assert "The same" in explain.again(CELL, made)
    assert len(stored("*.json")) == 1 and stored("deacl__task__*")


def test_another_value_is_measured_in_its_error_and_causes_are_named(made):
    path = records.record_path("toy", "depth", "toys", "planted", "deacl", "task")
    true = records.read_record(path)
    near = true | {"value": true["value"] + true["se"], "statistics": [[0, 0]] + true["statistics"][1:], "threads": 9}
    records.write_record(near, path)
    said = explain.again(CELL, made)
    assert "Within two standard errors of the difference (0.7); 1 of 4 images differ" in said
    assert "because these do: the number of threads" in said
    assert records.read_record(path)["value"] == true["value"]  # what tables show is the new one
    records.write_record(true | {"value": true["value"] + 9 * true["se"], "statistics": []}, path)
    assert "  Differs (6.4)" in explain.again(CELL, made)


def test_a_killed_remake_leaves_what_was_there(made, monkeypatch):
    before = {p: p.read_bytes() for p in stored()}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        explain.again(CELL, made)
    assert {p: p.read_bytes() for p in stored()} == before


def test_cells_that_cannot_be_made_again_are_one_sentence(made):
    with pytest.raises(BadInput, match=r"^Worst follows from the other attacks of its row; write the CELL of one"):
        explain.again("table3/toys/planted/deacl/worst", made)
    rows = [row.model_copy(update={"defenses": ["standard"]}) for row in made.encoders]
    alone = made.model_copy(update={"encoders": rows})
    with pytest.raises(BadInput, match=f"^The profile 'toy' no longer asks for {CELL}; add its row or attack to it."):
        explain.again(CELL, alone)
    rows = [row.model_copy(update={"name": "other"}) for row in made.encoders]
    with pytest.raises(BadInput, match="no longer asks for"):
        explain.again(CELL, made.model_copy(update={"encoders": rows}))


def test_only_its_row_and_task_have_to_be_there(made):
    missing = settings.EncoderRow(name="gone", timm="vit_tiny_patch16_224", checkpoint="nowhere.pth")
    more = {
        "encoders": [missing, *made.encoders],
        "segmentation": made.depth.model_copy(update={"datasets": ["camvid"]}),
    }
    assert "The same" in explain.again(CELL, made.model_copy(update=more))


def test_the_command_line_says_it(made, monkeypatch, capsys):
    monkeypatch.setattr(run, "PARAMS", settings.PARAMS)
    assert explain.main(["--again", "--profile", "toy", CELL]) == 0
    assert "The same" in capsys.readouterr().out
    assert explain.main(["--again", "--profile", "toy", "table3/no"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("There is no CELL 'table3/no'") and said.count("\n") == 1
