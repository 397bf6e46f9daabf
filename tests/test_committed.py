"""The committed demo: its tables follow from its records byte for byte, and its encoder is worth attacking."""

import pytest
from make_reference import PROJECT

from ssl_robust import metrics, records, report, settings

DEMO = PROJECT / "figures" / "committed" / "demo"
COMMITTED, SKIPPED = report.read("demo", DEMO / "records")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_tables_are_rebuilt_from_the_committed_records(number):
    for suffix, content in report.table_files(number, COMMITTED, SKIPPED).items():
        assert (DEMO / f"table{number}.{suffix}").read_bytes() == content.encode(), suffix


def test_figure_2_data_are_rebuilt_from_the_committed_records(root):
    report.write_figure2("demo", DEMO / "records")
    assert (root / "figures/demo/fig2.csv").read_bytes() == (DEMO / "fig2.csv").read_bytes()


def test_every_file_of_the_demo_is_there_and_the_page_needs_no_other():
    for name in ("fig1.png", "fig1.pdf", "fig2.png", "fig2.pdf", "index.html"):
        assert (DEMO / name).stat().st_size > 1000
    assert 'src="data:image/png;base64,' in (DEMO / "index.html").read_text(encoding="utf-8")


def test_the_times_of_the_stages_are_there():
    times = records.read_json(DEMO / "times.json")
    stages = {path.stem for path in (PROJECT / "notebooks").glob("0[0-7]_*.ipynb")}
    assert stages <= set(times) and all(about["seconds"] > 0 for about in times.values())


def test_the_demo_has_no_row_of_the_paper():
    assert all(report.comparison(task, COMMITTED).empty for task in settings.TASKS)
    assert not (DEMO / "reported.csv").exists()


def test_records_were_made_with_the_demo_parameters():
    demo = settings.check(**settings.read_params(PROJECT / "params" / "demo.yaml"))
    for record in COMMITTED:
        assert record["settings"]["task"] == demo.task(record["task"]).model_dump()
        assert record["settings"]["attack"] == (None if record["attack"] == "clean" else demo.attack.model_dump())
        assert record["max_perturbation"] <= demo.attack.eps + 1e-6 and record["nonfinite"] == 0


def test_the_embedded_encoder_is_worth_attacking():
    clean = {r["task"]: r for r in COMMITTED if (r["defense"], r["attack"]) == ("standard", "clean")}
    assert clean["classification"]["value"] >= 0.70
    assert clean["segmentation"]["value"] >= 0.40
    assert clean["depth"]["value"] <= 0.5 * clean["depth"]["chance"]


def test_attacks_make_every_standard_value_worse():
    cells = {(r["task"], r["defense"], r["attack"]): r for r in COMMITTED}
    for task in settings.TASKS:
        clean = cells[task, "standard", "clean"]
        for attack in ("embed", "task"):
            loss = metrics.BETTER[clean["metric"]] * (clean["value"] - cells[task, "standard", attack]["value"])
            assert loss > 2 * clean["se"], (task, attack)
