"""The committed demo: its tables follow from its records byte for byte, and its encoder is worth attacking.

And how a new run is compared with a committed one, and takes its place.
"""

import json
import re
import shutil

import pytest
import yaml
from chain import Tree, undisturbed  # noqa: F401
from make_reference import PROJECT
from test_explain import record, write

from ssl_robust import records, settings
from ssl_robust.settings import BadInput
from ssl_robust.show import committed, report
from ssl_robust.tasks import TASKS
from ssl_robust.trust import evidence

DEMO = PROJECT / "figures" / "committed" / "demo"
COMMITTED, SKIPPED = report.read("demo", DEMO / "records")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_tables_are_rebuilt_from_the_committed_records(number):
    for suffix, content in report.table_files(number, COMMITTED, SKIPPED, "records/", "demo").items():
        assert (DEMO / f"table{number}.{suffix}").read_bytes() == content.encode(), suffix


def test_figure_2_data_are_rebuilt_from_the_committed_records(root):
    report.write_figure2("demo", DEMO / "records")
    assert (root / "figures/demo/fig2.csv").read_bytes() == (DEMO / "fig2.csv").read_bytes()


def test_executed_notebooks_can_be_read_and_name_no_place_of_a_machine():
    found = sorted((DEMO / "notebooks").glob("*.ipynb"))
    assert [p.name for p in found] == [p.name for p in sorted((PROJECT / "notebooks").glob("0*.ipynb"))]
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert '"image/png"' in text and len(text) < 3_000_000, path.name
        assert (
            not re.search(r"(/home/|/root/|/tmp/|/work/|C:\\\\)", text)
            and "papermill" not in json.loads(text)["metadata"]
        )
        links = re.findall(r"\]\((\.\./[^ )]*)", text)
        assert all((path.parent / link).exists() for link in links)


def test_every_file_of_the_demo_is_there_and_the_page_needs_no_other():
    for name in ("fig1.png", "fig1.pdf", "fig2.png", "fig2.pdf", "index.html"):
        assert (DEMO / name).stat().st_size > 1000
    assert 'src="data:image/png;base64,' in (DEMO / "index.html").read_text(encoding="utf-8")


def test_the_times_of_the_stages_are_there():
    times = records.read_json(DEMO / "times.json")
    stages = {path.stem for path in (PROJECT / "notebooks").glob("0[0-7]_*.ipynb")}
    assert stages <= set(times) and all(about["seconds"] > 0 for about in times.values())


def test_the_demo_has_no_row_of_the_paper():
    assert all(report.comparison(task, COMMITTED).empty for task in TASKS)
    assert not (DEMO / "reported.csv").exists()


def test_records_were_made_with_the_demo_parameters():
    demo = settings.check(**settings.read_params(PROJECT / "params" / "demo.yaml"))
    for r in COMMITTED:
        section = demo.task(r["task"])
        assert type(section)(**r["settings"]["task"]) == section
        assert r["settings"]["attack"] == (None if r["attack"] == "clean" else demo.attack.model_dump())
        assert r["max_perturbation"] <= demo.attack.eps + 1e-6 and r["nonfinite"] == 0


def test_the_embedded_encoder_is_worth_attacking():
    clean = {r["task"]: r for r in COMMITTED if (r["defense"], r["attack"]) == ("standard", "clean")}
    assert clean["classification"]["value"] >= 0.70
    assert clean["segmentation"]["value"] >= 0.40
    assert clean["depth"]["value"] <= 0.5 * clean["depth"]["chance"]


def test_attacks_make_every_standard_value_worse():
    cells = {(r["task"], r["defense"], r["attack"]): r for r in COMMITTED}
    for task in TASKS:
        clean = cells[task, "standard", "clean"]
        for attack in ("embed", "task"):
            loss = TASKS[task].sign * (clean["value"] - cells[task, "standard", attack]["value"])
            assert loss > 2 * clean["se"], (task, attack)


# ---- a new run beside the committed one, and in its place ----


def test_what_a_run_writes_is_not_tracked_and_the_committed_run_is(undisturbed, tmp_path):  # noqa: F811
    tree = Tree(tmp_path)
    for profile in ("test", "mine"):
        for name in ("results", "runs", "figures"):
            shutil.copytree(undisturbed / name / "test", tree.root / name / profile, dirs_exist_ok=True)
    assert (tree.root / "figures/mine/records").is_dir() and tree.git("status", "--porcelain") == ""
    (tree.root / "figures/mine").rename(tree.root / "figures/committed")
    assert tree.git("status", "--porcelain") == "?? figures/\n"


def commit(root, *found, profile="demo", params=""):
    """These records as the committed run of a profile."""
    folder = records.committed_dir(profile)
    for r in found:
        place = records.record_path(profile, *(r[name] for name in evidence.CELL))
        records.write_record(r, folder / "records" / place.relative_to(records.results_dir(profile)))
    if params:
        (folder / "params.yaml").write_text(params)


def demo_params(root, deacl="{gamma: 2.0}"):
    (root / "params").mkdir(exist_ok=True)
    text = yaml.safe_dump({"profile": "demo", "encoders": [{"name": "embedded_vit"}]}) + f"deacl: {deacl}\n"
    (root / "params" / "demo.yaml").write_text(text)
    return text


def cells(**changes):
    return [record(0.25, attack, **changes) for attack in ("clean", "embed", "task")]


def test_nothing_is_said_without_a_committed_run_or_without_results(root):
    write(record())
    assert committed.verdict("demo") == ""
    commit(root, record(profile="other"), profile="other")
    assert committed.verdict("other") == ""


def test_equal_values_are_said_to_be_the_same(root):
    for r in cells():
        write(r)
    commit(root, *cells())
    assert committed.verdict("demo").splitlines() == [
        "Beside the committed run of this profile (figures/committed/demo):",
        "  3 of 3 values of the tables are the same.",
    ]


def test_values_are_compared_by_the_standard_error_of_their_difference(root):
    se = 0.03  # of the difference with 0.04: 0.05
    theirs = [record(0.5, attack, se=0.04) for attack in ("clean", "embed", "task", "worst")]
    ours = [record(value, attack, se=se) for value, attack in ((0.41, "clean"), (0.59, "embed"), (0.62, "task"))]
    for r in ours:
        write(r)
    write(record(0.0, "task", "deacl-epoch1"))  # of Figure 2, in no table
    commit(root, *theirs)
    assert committed.verdict("demo").splitlines()[1:] == [
        "  2 of 3 values of the tables lie within two standard errors of the difference.",
        "  The largest difference, 2.4 standard errors: table1/scenes/embedded_vit/deacl/task, 0.620 ± 0.030 here, "
        "0.500 ± 0.040 there.",
        "  Values in one of the two runs only: 1.",
    ]


def test_what_differs_is_said_once_where_values_differ(root):
    machine = {"numerics": {"instructions": "AVX512"}, "versions": {"torch": "3"}, "precision": "bf16"}
    for i, r in enumerate(cells(**machine)):
        write(r | {"hashes": {"weights": str(i), "data": "d" * 16}})
    commit(root, *cells(numerics={"instructions": "AVX2"}, versions={"torch": "2"}, precision="fp32"))
    assert len(committed.verdict("demo").splitlines()) == 2
    write(record(0.5, **machine))
    assert committed.verdict("demo").splitlines()[-1] == (
        "  The records differ in the precision, the hash of the weights, the version of torch, the CPU's or GPU's "
        "instructions."
    )
    write(record(0.5, settings={"attack": {"eps": 8 / 255, "steps": 40}, "task": {"n_test": 8}}))
    assert "the setting attack.steps" in committed.verdict("demo").splitlines()[-1]


def run_of(root, *found, profile="demo"):
    """A run that left these records, and the pages."""
    demo_params(root)
    for r in found:
        write(r, profile)
    report.copy_records(profile)
    folder = records.figures_dir(profile)
    (folder / "index.html").write_text("a page")
    (folder / "fig1.png").write_bytes(b"picture")
    (folder / "table1.md").write_text("table")
    cell = {"metadata": {"papermill": {}}, "source": [f"](../../figures/{profile}/records/x.json) at {root}/runs/demo"]}
    about = {"papermill": {"input_path": str(root)}, "widgets": {}, "a": 1}
    records.write_json({"cells": [cell], "metadata": about}, records.runs_dir(profile) / "03_try.ipynb")
    return folder


def test_a_run_takes_the_place_of_the_committed_one(root):
    run_of(root, record())
    commit(root, record(attack="old"))
    assert committed.replace("demo").startswith("figures/committed/demo is now what the last run made; look")
    folder = records.committed_dir("demo")
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["fig1.png", "index.html", "notebooks", "params.yaml", "records", "table1.md", "times.json"]
    shown = json.loads((folder / "notebooks" / "03_try.ipynb").read_text())
    assert shown["cells"][0]["source"] == ["](../records/x.json) at runs/demo"] and shown["metadata"] == {"a": 1}
    assert [r["attack"] for r in records.read_records(folder / "records")] == ["task"]
    assert (folder / "index.html").read_text() == "a page"
    assert "1 of 1 values" in committed.verdict("demo")


def test_pages_with_images_of_others_are_not_committed(root):
    run_of(root, record(), record(dataset="cifar10"))
    assert "without fig1.* and index.html, which show images of others" in committed.replace("demo")
    names = sorted(p.name for p in records.committed_dir("demo").iterdir())
    assert names == ["params.yaml", "records", "table1.md", "times.json"]


def test_records_of_changed_code_are_not_committed(root):
    commit(root, record())
    with pytest.raises(BadInput, match="There is no profile 'demo'"):
        committed.replace("demo")
    demo_params(root)
    with pytest.raises(BadInput, match="There is nothing in figures/demo"):
        committed.replace("demo")
    run_of(root, record(), record(attack="clean", git="abc+"))
    with pytest.raises(BadInput, match=r"code that no commit has \(abc\+\); commit it, then repeat 'make clean"):
        committed.replace("demo")
    assert [p.name for p in records.committed_dir("demo").iterdir()] == ["records"]


def test_the_end_of_a_run_is_compared_with_the_committed_one(root, monkeypatch):
    monkeypatch.setattr(report, "rewrite", lambda profile: "")
    run_of(root, record())
    commit(root, record(0.5))
    assert report.main("demo").splitlines()[-1].startswith("  The largest difference, ")
    shutil.rmtree(records.committed_dir("demo"))
    assert "committed" not in report.main("demo")
