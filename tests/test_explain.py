"""What is said of one table cell, on records planted in a temporary folder."""

import shlex

import pytest

from ssl_robust import records
from ssl_robust.ops import explain
from ssl_robust.trust import evidence

CELL = "table1/scenes/embedded_vit/deacl/task"


def record(value=0.25, attack="task", defense="deacl", **changes):
    statistics = [int(i < value * 8) for i in range(8)]
    return {
        "schema": 1, "key": "0" * 16, "task": "classification", "dataset": "scenes", "encoder": "embedded_vit",
        "defense": defense, "epoch": 3, "attack": attack, "attack_name": "PGD", "metric": "accuracy", "value": value,
        "se": 0.0125, "n": 8, "chance": 0.1, "protocol": "paper", "precision": "bf16", "batch": 32,
        "settings": {"attack": {"eps": 8 / 255, "steps": 20}, "task": {"n_test": 8}}, "seed": 0,
        "hashes": {"weights": "w" * 16, "data": "d" * 16}, "max_perturbation": 8 / 255, "nonfinite": 0,
        "statistics": statistics, "seconds": 2.0, "notebook": "runs/demo/03_attack_classification.ipynb", "git": "abc",
        "versions": {"torch": "2"}, "device": "cpu (x86_64)", "threads": 1, "made": "2025-01-01", **changes,
    }  # fmt: skip


def write(r, profile="demo"):
    path = records.record_path(profile, *(r[name] for name in evidence.CELL))
    return records.write_record(r, path)


@pytest.fixture
def project(root):
    write(record(0.0, defense="standard"))
    write(record(health={"images": 8, "rising": 3, "missed": 0}))
    write(record(0.5, attack="clean"))
    write(record(task="depth", dataset="nyuv2", metric="RMSE"))
    lost = [{"dataset": "voc2012", "encoder": "embedded_vit", "defense": "standard", "why": "voc2012 is not there."}]
    records.write_skipped("demo", "segmentation", lost)
    return root


def told(cell, capsys, *more):
    code = explain.main([cell, *more])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", ["table1/scenes/embedded_vit/DeACL/PGD", "Table1/scenes/embedded_vit/deacl/task/"])
def test_names_as_tables_have_them_are_understood(name, project, capsys):
    code, out, err = told(name, capsys)
    assert code == 0 and not err and out.startswith(f"{CELL} of profile 'demo'")
    assert "eps: 8/255" in out


def test_a_cell_is_shown_with_all_that_is_known_of_it(project, capsys):
    write(record(health={"images": 8, "rising": 3, "missed": 0}, made_from={"inputs": {}}))
    code, out, err = told(CELL, capsys)
    assert code == 0 and not err and out.startswith(f"{CELL} of profile 'demo', from results/demo")
    for words in (
        "value: 0.25",
        "chance: 0.1",
        "weights: wwww",
        "the loss of 38 % of the images still rises",
        "torch: '2'",
    ):
        assert words in out, words
    assert "statistics" not in out


def test_the_command_makes_it_again_alone(project, capsys):
    assert told(CELL, capsys)[1].splitlines()[-1].strip() == f"make remake CELL={CELL}"


def test_the_command_keeps_profile_and_data_and_quotes_names(root):
    r = record(dataset="my pets; rm -rf *")
    metadata = {"papermill": {"parameters": {"data_root": "/data/my folder"}}}
    records.write_json({"metadata": metadata}, records.runs_dir("samples") / "03_attack_classification.ipynb")
    cell = "CELL=table1/my pets; rm -rf */embedded_vit/deacl/task"
    assert shlex.split(explain.command("samples", r))[1:] == [
        "remake", cell, "PROFILE=samples", "DATA=/data/my folder"
    ]  # fmt: skip


def test_a_wrong_cell_is_one_sentence_that_lists_the_others(project, capsys):
    code, out, err = told("table1/scenes/embedded_vit/deacl/pdg", capsys)
    assert (
        code == 2
        and not out
        and err.startswith("There is no CELL 'table1/scenes/embedded_vit/deacl/pdg'; write one of:")
    )
    assert CELL in err and err.count("\n") == 1


def test_without_records_or_with_a_damaged_one_there_is_one_sentence(project, capsys):
    code, out, err = told(CELL, capsys, "--profile", "nothing")
    assert code == 2 and not out and "Profile 'nothing' has no records yet" in err
    path = records.record_path("demo", "classification", "scenes", "embedded_vit", "deacl", "task")
    path.write_text(path.read_text()[:100])
    code, _, err = told(CELL, capsys)
    assert code == 2 and path.name in err and err.count("\n") == 1
