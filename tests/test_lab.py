"""Trying other parameters in JupyterLab: a place of its own, nothing of the profile's tables changed, nothing lost."""

import json
import shutil

import nbformat
import pytest
import yaml
from jupyterlab_server.config import get_page_config
from test_stages import _load

from ssl_robust import deacl, encoders, evaluate, records, settings, training
from ssl_robust.ops import lab, run
from ssl_robust.settings import BadInput
from ssl_robust.show import examples, report

PROFILE = {"profile": "toy", "seed": 0, "device": "cpu", "precision": "fp32", "attack": {"steps": 2, "eps": 0.03},
           "encoders": [{"name": "planted", "timm": "embedded_vit", "defenses": ["standard", "deacl"]}],
           "depth": {"datasets": ["toys"], "n_train": 6, "n_val": 2, "n_test": 4, "epochs": 1, "batch": 4, "lr": 0.05},
           "deacl": {"dataset": "toys", "n_train": 6, "n_val": 2, "epochs": 1, "warmup_epochs": 0, "batch": 4,
                     "steps": 1}}  # fmt: skip


@pytest.fixture
def project(toys, monkeypatch):
    """The profile 'toy' in a params folder of its own, its notebooks run as far as Table 3."""
    monkeypatch.setattr(settings, "PARAMS", toys / "params")
    (toys / "params").mkdir()
    (toys / "params" / "toy.yaml").write_text(yaml.safe_dump(PROFILE))
    monkeypatch.setattr(encoders, "load", _load)
    return toys


def _tables(changes=()):
    """What 02 and 05 do in a kernel, with parameters of PROFILE and changes to them."""
    s = settings.of_notebook(**PROFILE | dict(changes))
    if "deacl" in dict(changes) or not changes:
        deacl.finetune_all(s)
        records.finish(s.profile, "02_deacl")
    records.need(s.profile, "02_deacl")
    examples.make("depth", s)
    found = evaluate.run_task("depth", s)
    report.shown(3, s.profile)
    records.finish(s.profile, "05_attack_depth", records=len(found))
    return s, found


def _bytes(*folders):
    return {p: p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file() and "lab" not in p.parts}


def test_the_profiles_own_parameters_are_the_profile(project, capsys):
    assert settings.of_notebook(**PROFILE).profile == "toy" and capsys.readouterr().out == ""
    assert settings.of_notebook(**PROFILE | {"data_root": "/data", "device": "auto"}).profile == "toy"
    part = {name: PROFILE[name] for name in ("profile", "encoders", "depth")}
    assert settings.of_notebook(**part).profile == "toy"
    assert settings.of_notebook(**PROFILE | {"profile": "mine"}).profile == "mine"  # no file: as it is given


def test_other_parameters_have_a_place_of_their_own_and_one_line_says_so(project, capsys):
    tried = settings.of_notebook(**PROFILE | {"seed": 1, "attack": {"steps": 2, "eps": 0.06}})
    assert tried.profile == "toy/lab" and tried.again(3).profile == "toy/lab/seeds/3"
    assert capsys.readouterr().out == (
        "Not the parameters of params/toy.yaml (seed, attack.eps): results go to results/toy/lab and figures/toy/lab; "
        "heads and checkpoints of 'toy' are used again.\n"
    )
    assert records.runs_dir("toy/lab") == records.runs_dir("toy")
    assert records.runs_dir("toy/lab/seeds/3") == records.runs_dir("toy/seeds/3")
    with pytest.raises(BadInput, match="'lab' is what parameters that are tried are filed under"):
        settings.of_notebook(**PROFILE | {"profile": "lab"})


def test_eps_that_is_tried_changes_no_table_and_trains_nothing(project, monkeypatch):
    _tables()
    places = records.results_dir("toy"), records.figures_dir("toy"), records.runs_dir("toy")
    before = _bytes(*places)
    monkeypatch.setattr(training, "fit", None)
    monkeypatch.setattr(deacl, "train_epoch", None)
    s, found = _tables({"attack": {"steps": 2, "eps": 0.06}})
    assert {r["settings"]["attack"]["eps"] for r in found if r["attack"] != "clean"} == {0.06}
    after = _bytes(*places)
    assert {path: after[path] for path in before} == before
    assert {p.parent.name for p in after.keys() - before.keys()} <= {"cells", "examples"}  # each under its own key
    here, there = ((records.figures_dir(name) / "table3.csv").read_text() for name in ("toy", s.profile))
    assert here != there
    assert all(r["notebook"] == "" for r in found)  # no executed notebook made them
    monkeypatch.setattr(evaluate, "evaluate", None)
    _tables({"attack": {"steps": 2, "eps": 0.06}})  # a second time all is there
    assert _tables({"attack": PROFILE["attack"]})[0].profile == "toy"


def test_another_deacl_that_is_tried_leaves_the_profiles_alone(project):
    _, found = _tables()
    tuned = {r["attack"]: r["hashes"]["weights"] for r in found if r["defense"] == "deacl"}
    before = _bytes(records.results_dir("toy"), records.runs_dir("toy"))
    s, other = _tables({"deacl": {**PROFILE["deacl"], "gamma": 0.0}})
    assert s.profile == "toy/lab"
    assert all(r["hashes"]["weights"] != tuned[r["attack"]] for r in other if r["defense"] == "deacl")
    after = _bytes(records.results_dir("toy"), records.runs_dir("toy"))
    assert {path: after[path] for path in before} == before
    evaluate.run_task("depth", settings.of_notebook(**PROFILE))
    shown = records.record_path("toy", "depth", "toys", "planted", "deacl", "task")
    assert records.read_record(shown)["hashes"]["weights"] == tuned["task"]


@pytest.mark.parametrize("path", sorted(settings.PARAMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_headless_run_of_a_profile_goes_to_the_lab(path, tmp_path):
    asked = run.read_profile(path.stem, str(tmp_path))
    for notebook in sorted(run.NOTEBOOKS.glob("*.ipynb")):
        if "of_notebook" not in notebook.read_text():
            continue
        try:
            given = json.loads(json.dumps(run.parameters_for(notebook.stem, asked)))
        except BadInput:  # the profile has no such section
            continue
        assert settings.of_notebook(**given).profile == path.stem, notebook.stem


# --- the copies that make lab opens ---


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    shutil.copytree(run.NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path / "notebooks")
    return tmp_path


def test_make_lab_opens_copies_and_loses_no_edit(notebooks):
    before = _bytes(notebooks / "notebooks")
    first = lab.copies(notebooks / "lab")[0]
    assert len(list((notebooks / "lab").iterdir())) == len(list((notebooks / "notebooks").glob("*.ipynb")))
    edited = json.loads(first.read_text())
    edited["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["tried"]}]
    first.write_text(json.dumps(edited))
    lab.copies(notebooks / "lab")
    assert "tried" in first.read_text() and _bytes(notebooks / "notebooks") == before
    original = notebooks / "notebooks" / first.name
    original.write_text(original.read_text().replace("seed = 0", "seed = 5"))
    lab.copies(notebooks / "lab")
    assert "tried" in first.with_suffix(".before.ipynb").read_text() and "tried" not in first.read_text()
    assert "seed = 5" in first.read_text()


def test_make_lab_shows_the_project_and_takes_options(notebooks, monkeypatch):
    monkeypatch.setenv("LAB", "--allow-root --port 8899 'a b'")
    command = lab.command(notebooks / "lab" / "00_data.ipynb")
    assert f"--ServerApp.root_dir={notebooks}" in command
    assert "--LabApp.default_url=/lab/tree/lab/00_data.ipynb" in command
    assert command[-4:] == ["--allow-root", "--port", "8899", "a b"]


def test_lab_asks_nothing_about_news_and_keeps_the_users_own_settings(notebooks, monkeypatch, tmp_path):
    records.write_json({"disabledExtensions": {"own": True}}, tmp_path / "mine" / "labconfig" / "page_config.json")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path / "mine"))
    found = lab.environment(notebooks / "lab")
    assert found["SSL_ROBUST_ROOT"] == str(notebooks) and found.items() >= run.CHILDREN.items()
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", found["JUPYTER_CONFIG_PATH"])
    disabled = get_page_config([])["disabledExtensions"]
    assert {"@jupyterlab/apputils-extension:announcements", "own"} <= set(disabled)


def test_outputs_prose_and_parameters_that_are_saved_run_no_stage_again(tmp_path, root, monkeypatch):
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)
    for name in ("00_data", "03_attack_classification"):
        shutil.copy(settings.PARAMS.parent / "notebooks" / f"{name}.ipynb", tmp_path)
    asked = run.read_profile("test")
    target = run.executed_path("test", "00_data")
    made = nbformat.read(tmp_path / "00_data.ipynb", as_version=4)
    made.metadata["papermill"] = {"parameters": json.loads(json.dumps(run.parameters_for("00_data", asked)))}
    records.write_bytes(nbformat.writes(made).encode(), target)
    records.finish("test", "00_data")
    records.write_json({"started": 0, "seconds": 1, "notebook": run.file_hash(target)}, run._times(target))
    assert run.not_executed("00_data", asked) == ""
    saved = nbformat.read(tmp_path / "00_data.ipynb", as_version=4)
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    saved.cells[0].source += " More words."
    code[0].source = code[0].source.replace("seed = 0", "seed = 5")
    code[1].outputs, code[1].execution_count = [nbformat.v4.new_output("stream", text="x")], 7
    nbformat.write(saved, tmp_path / "00_data.ipynb")
    assert run.not_executed("00_data", asked) == ""
    code[1].source += "\nprint(1)"
    nbformat.write(saved, tmp_path / "00_data.ipynb")
    assert run.not_executed("00_data", asked) == "the notebook was edited"
    nbformat.write(made, tmp_path / "00_data.ipynb")
    other = asked.model_copy(update={"seed": 3, "data_root": "/elsewhere"})
    assert run.not_executed("00_data", other) == "it was run with other parameters (seed)"
