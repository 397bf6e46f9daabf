"""What is stored is used if and only if it is what is asked for: by changing everything, one after the other.

All results of a small grid are made once; each test works on a copy of them.
"""

import shutil
from collections import namedtuple
from dataclasses import replace

import planted
import pytest
from safetensors.torch import load_file

from ssl_robust import attacks, datasets, deacl, encoders, evaluate, parts, records, training
from ssl_robust.ops import plan, run, stages, wanted
from ssl_robust.settings import EncoderRow, Sanity
from ssl_robust.show import examples, report, tables
from ssl_robust.tasks import TASKS
from ssl_robust.trust import data, evidence, sanity

QUICK = {"n_train": 6, "n_val": 2, "n_test": 4, "epochs": 1}
CHECKS = Sanity(n=2, more_steps=2, restarts=1, eps=[0.0, 0.25])
ROWS = [{"name": name, "timm": "embedded_vit", "defenses": d} for name, d in
        (("planted", ["standard", "deacl"]), ("other", ["standard"]))]  # fmt: skip


def _load(row, data_root="", weights=None):
    encoder = planted.encoder(seed=len(row.name))
    encoder.name = row.name
    if weights:
        encoder.backbone.load_state_dict(load_file(weights))
    return encoder


def _settings(**changes):
    tuning = {"n_train": 6, "n_val": 2, "epochs": 2, "warmup_epochs": 0, "checkpoints": [1]}
    base = {"deacl": tuning, "encoders": ROWS, "attack": {"steps": 2}} | dict.fromkeys(TASKS, QUICK)
    sections = {k: {**base[k], **v} if isinstance(v, dict) else v for k, v in changes.items() if k in base}
    return planted.settings(**{**base, **changes, **sections}).model_copy(update={"sanity": CHECKS})


def _make(settings):
    """What the notebooks 01 to 05 and 07 do."""
    deacl.finetune_all(settings)
    training.fit_all(settings)
    for task in TASKS:
        examples.make(task, settings)
        evaluate.run_task(task, settings)
    sanity.run_all(settings)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A project folder with all results of _settings()."""
    root = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "ROOT", root)
        patch.setitem(datasets.DATASETS, "toys", planted.TOYS)
        patch.setattr(encoders, "load", _load)
        _make(_settings())
    return root


@pytest.fixture
def made(everything, toys, monkeypatch):
    """A copy of it, in which no result is computed and every notebook counts as executed."""
    shutil.copytree(everything, toys, dirs_exist_ok=True)
    monkeypatch.setattr(encoders, "load", _load)
    monkeypatch.setattr(run, "not_executed", lambda notebook, settings: "")
    monkeypatch.setattr(run, "shown_by", lambda notebook, profile: run.shown(profile))
    monkeypatch.setattr(stages, "FILES", {})
    records.finish("toy", "00_data", hashes=data.hashes(_settings()))
    return toys


def _absent(settings):
    return [w for w in wanted.results(settings)[0] if not w.there]


def _steps(settings):
    return {w.job["step"] for w in _absent(settings)}


def _undone(settings):
    return [name[:2] for name in stages.undone(settings, wanted.results(settings)[0])]


def _bytes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".home" not in path.parts}


def test_everything_is_there_and_asking_writes_nothing(made):
    before = _bytes(made)
    assert _absent(_settings()) == [] and _undone(_settings()) == []
    assert stages.text(_settings(), wanted.results(_settings())[0]).endswith("and every notebook has been run.")
    assert _bytes(made) == before


# --- what is asked for differs: it is made, and what was there stays ---


@pytest.mark.parametrize(
    ("change", "steps", "why"),
    [
        ({"attack": {"steps": 3}}, {"cell", "checks", "examples"}, "the setting attack.steps (2, now 3)"),
        ({"attack": {"eps": 0.0625}}, {"cell", "checks", "examples"}, "the setting attack.eps (0.0314, now 0.0625)"),
        ({"deacl": {"gamma": 0.0}}, {"deacl", "head", "cell", "checks"}, "the setting gamma (2, now 0)"),
        ({"depth": {"lr": 0.01}}, {"head", "cell", "checks", "examples"}, "the setting lr (0.05, now 0.01)"),
        ({"depth": {"n_test": 3}}, {"cell", "checks", "examples"}, "the hash of the data"),
        ({"seed": 1}, {"deacl", "head", "cell", "checks", "examples"}, "the seed (0, now 1)"),
        ({"precision": "bf16"}, {"deacl", "head", "cell", "checks", "examples"}, "the precision (fp32, now bf16)"),
    ],
    ids=str,
)  # fmt: skip
def test_parameters_that_numbers_depend_on_make_what_depends_on_them(change, steps, why, made):
    settings = _settings(**change)
    found = _absent(settings)
    assert {w.job["step"] for w in found} == steps
    assert any(why in words for w in found for words in w.why), [w.why for w in found]
    said = stages.text(settings, wanted.results(settings)[0])
    total = len(wanted.results(settings)[0])
    assert said.startswith(f"toy: {total - len(found)} of {total} results are there; about ") and why in said
    assert "make keep" not in said
    assert _absent(_settings()) == []  # there and back


@pytest.mark.parametrize(
    "change", [{"classification": {"attack_batch": 1}}, {"deacl": {"processes": 1}}, {"deacl": {"checkpoints": []}},
               {"missing": "skip"}, {"counts": "any"}, {"encoders": ROWS[:1]}], ids=str,
)  # fmt: skip
def test_parameters_that_no_number_depends_on_make_nothing(change, made):
    found = _absent(_settings(**change))
    assert {w.job["step"] for w in found} <= {"checks"}  # without the other row images are transferred from elsewhere


def test_trying_something_and_going_back_computes_nothing_and_changes_no_stored_file(made, monkeypatch):
    stored, shown = _bytes(made / "runs"), _bytes(made / "results")
    _make(_settings(attack={"steps": 1}, deacl={"gamma": 0.0}, encoders=ROWS[:1]))
    assert {path: _bytes(made / "runs")[path] for path in stored} == stored
    for module, name in ((evaluate, "evaluate"), (training, "fit"), (deacl, "train_epoch"), (sanity, "checks")):
        monkeypatch.setattr(module, name, None)
    _make(_settings())
    assert _bytes(made / "results") == shown


# --- what is there is not what it was, or not what was asked for ---


def test_other_weights_under_the_same_name_make_everything_of_the_row(made, monkeypatch):
    def load(row, *rest):
        encoder = _load(row, *rest)
        if row.name == "other":
            encoder.backbone.proj.bias += 1e-3
        return encoder

    monkeypatch.setattr(encoders, "load", load)
    found = _absent(_settings())
    rows = {w.job["encoder"] for w in found if w.job["step"] in ("head", "cell")}
    assert rows == {"other"} and any("the hash of the weights" in why for w in found for why in w.why)
    assert {"01", "03", "04", "05", "06", "07"} <= set(_undone(_settings()))


def test_other_labels_make_everything_of_the_task(made, monkeypatch):
    def swapped(root, task, split, n):
        items = planted.TOYS.items(root, task, split, n)
        return [i._replace(target=(i.target + 1) % 3) for i in items] if task == "classification" else items

    monkeypatch.setitem(datasets.DATASETS, "toys", replace(planted.TOYS, items=swapped))
    found = _absent(_settings())
    assert {w.job["task"] for w in found} == {"classification"} and {"head", "cell"} <= {w.job["step"] for w in found}
    assert {"00", "01", "03"} <= set(_undone(_settings()))


@pytest.mark.parametrize("task", TASKS)
def test_a_record_that_is_gone_or_another_ones_is_put_back_without_computing(task, made, monkeypatch):
    path = records.record_path("toy", task, "toys", "planted", "standard", "task")
    before = path.read_bytes()
    for spoil in (path.unlink, lambda: shutil.copy(path.with_name(path.name.replace("task", "embed")), path)):
        spoil()
        assert _absent(_settings()) == [] and _undone(_settings()) == [TASKS[task].notebook[:2], "06"]
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "evaluate", None)
            evaluate.run_task(task, _settings())
        assert path.read_bytes() == before and _undone(_settings()) == []


def test_a_folder_of_records_that_is_gone_is_made_again(made):
    shutil.rmtree(records.results_dir("toy") / "depth")
    assert _undone(_settings()) == ["05", "06"]


def test_rows_that_are_not_asked_for_are_not_shown(made):
    assert _undone(_settings(encoders=ROWS[:1]))[:3] == ["03", "04", "05"]
    path = records.record_path("toy", "depth", "toys", "planted", "standard", "task")
    shutil.copy(path, path.with_name("toys__gone__standard__task.json"))
    assert _undone(_settings()) == ["05", "06"]


def test_a_deleted_result_is_made_again_and_nothing_else(made):
    path = planted.stored("cells/depth__toys__planted__standard__task__*.json")
    path.unlink()
    assert [w.job["name"] for w in _absent(_settings())] == ["cell depth toys planted standard task"]


@pytest.mark.parametrize("name", ["table1.csv", "index.html"])
def test_a_deleted_table_has_its_notebook_run_again(name, made, monkeypatch):
    monkeypatch.setattr(stages, "FILES", {"03_attack_classification": ("table1.csv",), "06_figures": ("index.html",)})
    for other in {"table1.csv", "index.html"} - {name}:
        records.write_bytes(b"", records.figures_dir("toy") / other)
    assert _undone(_settings()) == (["03", "06"] if name == "table1.csv" else ["06"])


@pytest.mark.parametrize(("rows", "undone"), [("", []), ("depth,toys,0,clean,RMSE,1.0,4\n", ["06"])])
def test_figure_2_needs_a_picture_only_where_its_table_has_rows(rows, undone, made, monkeypatch):
    monkeypatch.setattr(stages, "FILES", {"06_figures": ("fig2.csv", "fig2.png")})
    records.write_bytes(
        f"task,dataset,epoch,attack,metric,value,n\n{rows}".encode(), records.figures_dir("toy") / "fig2.csv"
    )
    assert _undone(_settings()) == undone


def test_a_sanity_check_of_another_cell_flags_no_value(made):
    (path,) = (records.results_dir("toy") / "sanity" / "depth").glob("toys__planted__standard.json")
    row = records.read_record(path)
    records.write_record({**row, "cell": "0" * 16, "flags": ["bad"]}, path)
    assert all("bad" not in r["reasons"] for r in evidence.read(records.results_dir("toy")))


# --- what is added or worded otherwise keeps everything ---


def test_what_is_added_keeps_every_result(made, monkeypatch):
    monkeypatch.setitem(encoders.KNOWN, "one_more", encoders.Known("resnet18", 64))
    monkeypatch.setitem(datasets.DATASETS, "more", planted.TOYS)
    monkeypatch.setitem(parts.table("strong", "ATTACKS"), "another", attacks.Kind("Another", lambda model, x, *_: x))
    monkeypatch.setitem(TASKS, "depth", TASKS["depth"]._replace(attack="DepthPGD, in other words"))
    monkeypatch.setitem(records.VERSIONS, "a_new_loop", 1)
    assert _absent(_settings()) == []


def test_keys_are_the_same_in_every_version_of_python():
    made = records.made_from(("pgd", "data"), seed=0, settings={"eps": 8 / 255, "size": (1, 2), "none": None}, a="ä")
    assert records.digest(made) == "f17bd852d7d4660e"


# --- versions, and keeping what they made ---


def test_another_version_makes_what_it_computes_and_keep_keeps_it(made, monkeypatch, capsys):
    monkeypatch.setitem(records.VERSIONS, "pgd", 2)
    assert _steps(_settings()) == {"deacl", "head", "cell", "checks", "examples"}
    assert any("the code's version of pgd (1, now 2)" in why for w in _absent(_settings()) for why in w.why)
    assert "are accepted by: make keep" in stages.text(_settings(), wanted.results(_settings())[0])
    before = _bytes(made / "runs")
    assert stages.keep(_settings()) == 0
    assert "toy: 0 of" not in capsys.readouterr().out and _absent(_settings()) == []
    assert {path: _bytes(made / "runs")[path] for path in before} == before  # for when the version is put back
    for module, name in ((evaluate, "evaluate"), (training, "fit"), (deacl, "train_epoch"), (sanity, "checks")):
        monkeypatch.setattr(module, name, None)
    _make(_settings())
    cell = records.read_record(records.record_path("toy", "depth", "toys", "planted", "deacl", "task"))
    assert (
        cell["kept"] == [{"loops": cell["made_from"]["loops"] | {"pgd": 1}}] and cell["made_from"]["loops"]["pgd"] == 2
    )
    assert any("(pgd 1) and kept" in said for said in tables.notes("depth", *report.read("toy"))["How it was measured"])
    assert _absent(_settings(attack={"steps": 3})) != []  # nothing else was kept by it


def test_keep_takes_nothing_that_differs_in_more_than_a_version(made, monkeypatch):
    monkeypatch.setitem(records.VERSIONS, "task", 2)
    settings = _settings(attack={"steps": 3})
    before = len(_absent(settings))
    stages.keep(settings)
    assert len(_absent(settings)) == before


# --- disk ---


def test_what_is_there_needs_no_room_on_the_disk(made, monkeypatch):
    disk = namedtuple("disk", "total used free")
    free = {"bytes": 11e6}
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: disk(1e12, 0, free["bytes"]))
    monkeypatch.setattr(plan, "bytes_of", lambda module: 20e6 * isinstance(module, encoders.Encoder))
    assert plan._disk_problems(_settings()) == []  # everything is there
    for run_ in (records.runs_dir("toy") / "deacl" / "planted").iterdir():
        (run_ / "deacl.json").unlink()
    (said,) = plan._disk_problems(_settings())
    assert " has 11 MB free but weights and checkpoints still need about " in said and " MB; free some space." in said
    shutil.rmtree(records.runs_dir("toy") / "deacl")
    needed = 20e6 * (2 + 2 + 2)  # two checkpoints, the state with its momentum, and a new one beside it
    for free["bytes"], fits in ((0.9 * needed, False), (1.1 * needed, True)):
        assert (plan._disk_problems(_settings()) == []) is fits


def test_before_anything_was_computed_nothing_is_looked_for(toys, monkeypatch):
    monkeypatch.setattr(encoders, "load", None)
    assert plan.looked_for(_settings()) is None
    assert stages.text(_settings(), None).startswith("toy: no results are there; about ")
    assert list(stages.undone(_settings(), None)) == list(plan.STAGES)


def test_no_weights_are_fetched_to_see_what_is_there(made, monkeypatch):
    monkeypatch.setattr(encoders, "load", None)
    monkeypatch.setattr(plan, "cached", lambda model: False)
    monkeypatch.setattr(plan, "fetched", lambda settings: [EncoderRow(name="dino_vits16")])
    assert plan.looked_for(_settings()) is None


def test_the_plan_says_what_is_there(made, monkeypatch):
    monkeypatch.setattr(run, "everything_wrong", lambda settings: ([], []))
    monkeypatch.setattr(plan, "text", lambda settings, missing: "the plan")
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **kwargs: printed.append(" ".join(map(str, words))))
    assert run._plan(_settings(attack={"steps": 3})) == 0
    assert "results are there; about" in printed[0] and "table cells to be made" in printed[0]
