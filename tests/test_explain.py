"""What is said of one table cell, on records planted in a temporary folder."""

import shlex
import subprocess

import pytest

from ssl_robust import records
from ssl_robust.ops import explain
from ssl_robust.settings import BadInput
from ssl_robust.show import report
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
    write(record(health={"rising": 3, "flags": ["the loss still rises"]}))
    write(record(0.5, attack="clean"))
    write(record(task="depth", dataset="nyuv2", metric="RMSE"))
    lost = [{"dataset": "voc2012", "encoder": "embedded_vit", "defense": "standard", "why": "voc2012 is not there."}]
    records.write_skipped("demo", "segmentation", lost)
    return root


def told(cell, capsys, *more):
    code = explain.main([cell, *more])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_cell_is_shown_with_all_that_is_known_of_it(project, capsys, monkeypatch):
    write(record(health={"rising": 3, "flags": ["the loss still rises"]}, key="checked"))
    monkeypatch.setattr(evidence, "sanity_flags", lambda folder: {"checked": ["five times the steps take more"]})
    code, out, err = told(CELL, capsys)
    assert code == 0 and not err
    for words in (
        f"{CELL} of profile 'demo', from results/demo", "0.2500 ± 0.0125 (standard error)",
        "8; the majority or mean baseline is 0.1000", "DeACL-Standard +0.2500, 95 % interval [+0.0",
        "PGD: eps 0.03137, steps 20", "|x' - x| of 8.000/255", "paper", f"weights {'w' * 16}, data {'d' * 16}",
        "torch 2", "cpu (x86_64), 1 threads", "2025-01-01 in 2.0 s by commit abc", "bf16", "32", "rising 3",
        "- the loss still rises", "- five times the steps take more", "runs/demo/03_attack_classification.ipynb",
    ):  # fmt: skip
        assert words in out, words
    assert "not here" in out


def test_a_clean_cell_has_no_attack_and_no_flags(project, capsys):
    code, out, _ = told("table1/scenes/embedded_vit/deacl/clean", capsys)
    assert code == 0 and "attack       none" in out and "flags        none" in out and "DeACL-Standard" not in out


def test_the_command_removes_just_this_result(project, capsys):
    name = f"classification__scenes__embedded_vit__deacl__task__{'0' * 16}"
    stored = [records.runs_dir("demo") / "cells" / f"{name}{suffix}" for suffix in (".json", ".safetensors")]
    for path in stored:
        records.write_bytes(b"", path)
    there = set(project.rglob("*.*"))
    said = told(CELL, capsys)[1].splitlines()[-1]
    remove, make = said.strip().split(" && ")
    assert make == "make table1"
    subprocess.run(remove, shell=True, check=True, cwd=project)
    assert there - set(project.rglob("*.*")) == set(stored)


def test_the_command_keeps_profile_and_data_and_quotes_names(root):
    r = record(dataset="my pets; rm -rf *")
    metadata = {"papermill": {"parameters": {"data_root": "/data/my folder"}}}
    records.write_json({"metadata": metadata}, records.runs_dir("samples") / "03_attack_classification.ipynb")
    said = explain.command("samples", r)
    name = f"classification__my pets; rm -rf *__embedded_vit__deacl__task__{'0' * 16}"
    assert shlex.split(said)[2] == f"runs/samples/cells/{name}.json"
    assert shlex.split(said)[-3:] == ["table1", "PROFILE=samples", "DATA=/data/my folder"]
    assert "/.." not in explain.command("samples", record(dataset="../../..", key="../x"))


def test_no_notebook_is_named_that_did_not_make_the_number(project, capsys):
    executed = project / "runs/demo/03_attack_classification.ipynb"
    records.write_bytes(b"{}", executed)

    def said(started=None, **changes):
        write(record(made="2025-01-01T12:00:00+00:00", **changes))
        if started is not None:
            records.write_json({"started": started, "seconds": 60.0}, executed.with_suffix(".time.json"))
        (line,) = [line for line in told(CELL, capsys)[1].splitlines() if line.strip().startswith("notebook")]
        return line.split(maxsplit=1)[1]

    noon = 1735732800
    assert said(noon - 30) == "runs/demo/03_attack_classification.ipynb"
    again = "none: runs/demo/03_attack_classification.ipynb shows it, but an earlier run of it made it"
    assert said(noon + 30) == said(noon - 90) == again
    other = "none: it was made in JupyterLab, by a job or by a script"
    assert said(notebook="") == said(notebook="../../secret.ipynb") == said(notebook="/etc/x.ipynb") == other


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("table4/scenes/embedded_vit/deacl/task", "no table 'table4'"),
        ("table1/scene/embedded_vit/deacl/task", "no data set 'scene' for CELL 'table1/scene/embedded_vit/deacl/task'; "
         "did you mean 'scenes', of the known ones: scenes."),
        ("table1/nyuv2/embedded_vit/deacl/task", "known ones: scenes."),
        ("table1/scenes/embeded_vit/deacl/task", "no encoder 'embeded_vit'"),
        ("table1/scenes/embedded_vit/Standard/task", "did you mean 'standard', of the known ones: deacl, standard."),
        ("table1/scenes/embedded_vit/deacl/pgd", "no attack 'pgd'"),
        ("table1/scenes/embedded_vit/standard/clean", "no attack 'clean' for CELL 'table1/scenes/embedded_vit/standard/"
         "clean'; write one of the known ones: task."),
        ("table1/scenes", "has 2 parts; write TABLE/DATASET/ENCODER/DEFENSE/ATTACK"),
        ("", "has 1 parts; write TABLE/"),
        ("table2/voc2012/embedded_vit/deacl/task", "no defense 'deacl'"),
    ],
)  # fmt: skip
def test_a_wrong_cell_is_one_sentence_with_the_nearest_known_parts(cell, said, project, capsys):
    code, out, err = told(cell, capsys)
    assert code == 2 and not out and said in err and err.count("\n") == 1 and err.endswith(".\n")


def test_a_skipped_cell_says_why(project, capsys):
    code, out, err = told("table2/voc2012/embedded_vit/standard/embed", capsys)
    assert code == 0 and not err
    assert out == "table2/voc2012/embedded_vit/standard of profile 'demo' was not run, because: voc2012 is not there.\n"


def test_a_clone_reads_the_records_that_came_with_it_and_says_so(project, capsys):
    report.copy_records("demo")
    (project / "results").rename(project / "gone")
    code, out, _ = told(CELL, capsys)
    assert code == 0 and "from figures/demo/records" in out
    assert "There are no results in results/demo; this is the copy with the figures.\n" in out
    (project / "figures/committed").mkdir()
    (project / "figures/demo").rename(project / "figures/committed/demo")
    code, out, _ = told(CELL, capsys)
    assert code == 0 and "from figures/committed/demo/records" in out
    assert "There are no results in results/demo; this is the record that came with the project.\n" in out
    assert "- the loss still rises" in out


def test_a_record_is_compared_with_the_one_that_came_with_the_project(project, capsys):
    assert "committed" not in told(CELL, capsys)[1]
    report.copy_records("demo")
    (project / "figures/committed").mkdir()
    (project / "figures/demo").rename(project / "figures/committed/demo")
    assert "committed    none" in told(CELL, capsys)[1]
    write(record(threads=64))
    assert "committed    - They differ in the number of threads: 64 and 1." in told(CELL, capsys)[1]


def test_without_records_or_with_a_damaged_one_there_is_one_sentence(project, capsys):
    code, out, err = told(CELL, capsys, "--profile", "nothing")
    assert code == 2 and not out and "Profile 'nothing' has no records yet" in err
    path = records.record_path("demo", "classification", "scenes", "embedded_vit", "deacl", "task")
    path.write_text(path.read_text()[:100])
    code, _, err = told(CELL, capsys)
    assert code == 2 and path.name in err and err.count("\n") == 1


def test_seeds_and_the_worst_case_are_shown(project, capsys):
    again = record(0.5, seed=1)
    records.write_record(again, project / "results/demo/seeds/1/classification/scenes__embedded_vit__deacl__task.json")
    write(record(0.125, attack="worst", attack_name="worst case", chosen={"clean": 0, "task": 8}))
    assert "seeds        0: 0.2500, 1: 0.5000" in told(CELL, capsys)[1]
    out = told(CELL.replace("/task", "/worst"), capsys)[1]
    assert "worst case: eps" in out and "chosen       (clean 0, task 8)" in out


def test_an_unknown_cell_is_an_error_of_its_own():
    with pytest.raises(BadInput, match="known ones: none"):
        explain.find("table1/a/b/c/d", [], [])
