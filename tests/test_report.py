"""Tables, claims and the page, on records planted in a temporary folder."""

import base64
import json
import re

import pandas as pd
import pytest

from ssl_robust import claims, records, report
from ssl_robust.settings import BadInput

METRIC = {"classification": "accuracy", "segmentation": "mIoU", "depth": "RMSE"}
CHANCE = {"classification": 0.1, "segmentation": 0.06, "depth": 1.3}
NAMES = {"task": "task attack", "embed": "EmbedAttack", "clean": "none"}
HOSTILE = '<script>alert("x")</script>'


def record(value, attack="clean", defense="standard", task="classification", **changes):
    """A record as evaluate writes it; `changes` replace its fields."""
    return {
        "schema": 1, "key": "0" * 16, "task": task, "dataset": "scenes", "encoder": "embedded_vit", "defense": defense,
        "epoch": {"standard": 0, "deacl": 8}.get(defense, 4), "attack": attack, "attack_name": NAMES[attack],
        "metric": METRIC[task], "value": value, "se": 0.02, "n": 128, "chance": CHANCE[task],
        "settings": {"attack": {"eps": 8 / 255, "step": 2 / 255, "steps": 20, "best": False}, "task": {}}, "seed": 0,
        "hashes": {}, "max_perturbation": 8 / 255, "nonfinite": 0, "per_image": [], "seconds": 2.0,
        "notebook": f"runs/test/0{3 + list(METRIC).index(task)}_attack_{task}.ipynb", "git": "abc",
        "versions": {"torch": "2"}, "device": "cpu (x86_64)", "threads": 1, "made": "2025-01-01", **changes,
    }  # fmt: skip


def rows(standard, deacl=(), early=None, **changes):
    """Records of a Standard row, a DeACL row (clean, embed, task) and the EmbedAttack value of a checkpoint between."""
    found = [record(v, a, "standard", **changes) for v, a in zip(standard, report.ATTACKS, strict=False)]
    found += [record(v, a, "deacl", **changes) for v, a in zip(deacl, report.ATTACKS, strict=False)]
    return found + ([record(early, "embed", "deacl-epoch4", **changes)] if early is not None else [])


PAPER = {  # what the paper finds: broken, EmbedAttack recovered, task attack not, clean lower, gain early
    "classification": rows((0.8, 0.05, 0.0), (0.7, 0.5, 0.03), 0.45),
    "segmentation": rows((0.6, 0.03, 0.01), (0.5, 0.3, 0.03), 0.28, task="segmentation"),
    "depth": rows((0.5, 1.5, 2.6), (0.7, 0.9, 2.4), 0.95, task="depth"),
}
OPPOSITE = {
    "classification": rows((0.8, 0.5, 0.4), (0.9, 0.51, 0.75), 0.5),
    "depth": rows((0.5, 0.7, 0.8), (0.4, 0.72, 0.55), 0.72, task="depth"),
}


def verdicts(found, task="classification"):
    sentences = dict(claims.claims(found, task))
    pattern = r": (shows in part|shows|does not show|cannot be judged) \("
    return {letter: re.search(pattern, sentence)[1] for letter, sentence in sentences.items()}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder whose profile 'test' has the paper-like records of the three tasks."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    for task, found in PAPER.items():
        write(found, task)
    return tmp_path


def write(found, task):
    for r in found:
        records.write_json(r, records.record_path("test", task, "scenes", "embedded_vit", r["defense"], r["attack"]))


def test_table_has_the_columns_and_values_at_their_places():
    found = report.table("classification", PAPER["classification"])
    first = [
        "dataset",
        "encoder",
        "defense",
        "clean",
        "embed",
        "task",
        "clean_se",
        "embed_se",
        "task_se",
        "n",
        "metric",
    ]
    assert list(found.columns) == [*first, "reported_clean", "reported_embed", "reported_task"]
    assert found["defense"].tolist() == ["standard", "deacl"]  # the checkpoint between is not a row
    assert found.loc[1, ["clean", "embed", "task", "clean_se", "n"]].tolist() == [0.7, 0.5, 0.03, 0.02, 128]
    assert found["reported_clean"].isna().all()


def test_reported_values_stand_at_the_papers_rows():
    voc = rows((0.5, 0.1, 0.0), (0.4, 0.2, 0.1), task="segmentation", dataset="voc2012", encoder="dino_vitb16")
    other = rows((0.5, 0.1, 0.0), task="segmentation", dataset="voc2012", encoder="embedded_vit")
    found = report.table("segmentation", other + voc).set_index(["encoder", "defense"])
    reported = ["reported_clean", "reported_embed", "reported_task"]
    assert found.loc[("dino_vitb16", "standard"), reported].tolist() == [0.56, 0.06, 0.0]
    assert found.loc[("dino_vitb16", "deacl"), reported].tolist() == [0.51, 0.3, 0.02]
    assert found.loc[("embedded_vit", "standard"), reported].isna().all()
    assert "| 0.50 ± 0.02 (0.56) |" in report.table_files(2, voc)["md"]


def test_reported_data_are_the_papers_28_rows():
    counts = report.REPORTED.groupby("task").size().to_dict()
    assert counts == {"classification": 12, "segmentation": 12, "depth": 4}
    assert not report.REPORTED.duplicated(["task", *report.KEYS]).any()
    sums = report.REPORTED.groupby("task")[["clean", "embed", "task_attack"]].sum().round(2)
    assert sums.loc["classification"].tolist() == [10.85, 2.43, 0.28]  # columns of the printed tables, added by hand
    assert sums.loc["segmentation"].tolist() == [6.25, 0.94, 0.18]
    assert sums.loc["depth"].tolist() == [2.24, 5.03, 8.84]


def test_rows_come_in_the_papers_order_and_unknown_ones_last():
    names = ["aaa", "stl10", "cifar10"]
    found = [record(0.5, dataset=d, encoder=e) for d in names for e in ("embedded_vit", "dino_vitb16", "dinov2_vits14")]
    assert report.table("classification", found)["dataset"].unique().tolist() == ["cifar10", "stl10", "aaa"]
    encoders = report.table("classification", found)["encoder"].unique().tolist()
    assert encoders == ["dinov2_vits14", "dino_vitb16", "embedded_vit"]


def test_cells_that_were_not_run_are_missing_and_shown_as_a_dash():
    found = report.table("depth", [record(0.5, task="depth")])
    assert found[["embed", "task", "embed_se", "task_se"]].isna().all(axis=None)
    assert "| 0.50 ± 0.02 | – | – | 128 |" in report.table_files(3, [record(0.5, task="depth")])["md"]


@pytest.mark.parametrize("task", PAPER)
def test_every_claim_shows_on_records_like_the_papers(task):
    assert set(verdicts(PAPER[task], task).values()) == {"shows"}


@pytest.mark.parametrize("task", OPPOSITE)
def test_no_claim_shows_on_opposite_records(task):
    found = verdicts(OPPOSITE[task], task)
    assert {letter: found[letter] for letter in "abcd"} == dict.fromkeys("abcd", "does not show")
    late = rows((0.8, 0.05, 0.0), (0.7, 0.5, 0.0), early=0.1)
    assert verdicts(late)["e"] == "does not show"


def test_claims_that_hold_in_some_rows_show_in_part():
    late = rows((0.8, 0.05, 0.0), (0.7, 0.5, 0.0), early=0.1, dataset="other")
    found = PAPER["classification"] + late
    against = [{**r, "dataset": "third"} for r in OPPOSITE["classification"]]
    assert set(verdicts(found + against).values()) == {"shows in part"}
    assert verdicts(rows((0.8, 0.05)))["a"] == "shows in part"  # the task attack has not been run


@pytest.mark.parametrize("letter", "abcde")
def test_claims_without_their_rows_cannot_be_judged(letter):
    assert verdicts([])[letter] == "cannot be judged"


def test_differences_within_their_standard_error_are_said_to_be_so():
    noisy = rows((0.8, 0.05, 0.0), (0.79, 0.3, 0.26), early=0.175, se=0.08)
    sentences = dict(claims.claims(noisy, "classification"))
    for letter in "bcde":
        assert verdicts(noisy)[letter] == "cannot be judged"
        assert "undecided within its standard error" in sentences[letter]


def test_an_attack_that_takes_nothing_leaves_nothing_to_recover():
    nothing = rows((0.8, 0.79, 0.78), (0.8, 0.8, 0.8), early=0.79)
    found = verdicts(nothing)
    assert [found[letter] for letter in "bce"] == ["cannot be judged"] * 3
    assert "takes nothing measurable" in dict(claims.claims(nothing, "classification"))["b"]
    assert found["a"] == "does not show"


def test_a_model_no_better_than_a_constant_cannot_be_broken():
    assert verdicts(rows((0.12, 0.0, 0.0)))["a"] == "cannot be judged"
    assert verdicts(rows((1.29, 2.0, 2.0), task="depth"), "depth")["a"] == "cannot be judged"


def test_rmse_counts_downwards():
    shared = {"task": "depth"}
    assert verdicts(rows((0.5, 1.5, 2.6), (0.7, 0.6, 2.5), **shared), "depth")["b"] == "shows"
    assert verdicts(rows((0.5, 1.5, 2.6), (0.7, 1.6, 2.5), **shared), "depth")["b"] == "does not show"
    assert verdicts(rows((0.5, 1.5, 2.6), (0.4, 0.6, 2.5), **shared), "depth")["d"] == "does not show"
    # twice the clean error counts as broken although predicting the mean would be worse
    assert verdicts(rows((0.5, 1.01, 1.02), **shared), "depth")["a"] == "shows"
    assert verdicts(rows((0.5, 0.95, 0.99), **shared), "depth")["a"] == "does not show"
    assert "RMSE [m] ↓" in report.table_files(3, PAPER["depth"])["md"]


def test_the_recovered_share_and_its_standard_error_are_right_by_hand():
    noisy = rows((0.8, 0.05, 0.0), (0.7, 0.5, 0.03), se=0.1)
    # (0.5 - 0.05) / (0.8 - 0.05) = 60 %; 0.1 * sqrt(1 + 0.6^2 + 0.4^2) / 0.75 = 16 %
    assert "60% ± 16% of the loss recovered" in dict(claims.claims(noisy, "classification"))["b"]


def test_the_early_gain_looks_at_ten_epochs_of_a_long_run():
    found = rows((0.8, 0.0, 0.0), (0.7, 0.5, 0.0))
    for r in found[3:]:
        r["epoch"] = 100
    path = [record(v, "embed", f"deacl-epoch{e}", epoch=e) for e, v in ((5, 0.1), (10, 0.2), (20, 0.45), (50, 0.5))]
    assert "40% ± " in dict(claims.claims(found + path, "classification"))["e"]
    assert "after 10 of 100 epochs" in dict(claims.claims(found + path, "classification"))["e"]
    assert verdicts(found + path)["e"] == "does not show"
    assert verdicts(found + path[2:])["e"] == "cannot be judged"
    # data sets whose checkpoints between were not evaluated do not count against the claim
    ends_only = rows((0.8, 0.0, 0.0), (0.7, 0.5, 0.0), dataset="other")
    assert verdicts(PAPER["classification"] + ends_only)["e"] == "shows"


def test_tables_are_the_same_bytes_from_a_copy_of_the_records(project):
    first = report.write_table(1, "test")
    made = {s: (project / f"figures/test/table1.{s}").read_bytes() for s in ("csv", "md", "tex")}
    assert report.copy_records("test") == 21
    report.write_table(1, "test", folder=project / "figures/test/records")
    assert made == {s: (project / f"figures/test/table1.{s}").read_bytes() for s in made}
    shuffled = records.read_records(project / "figures/test/records")[::-1]
    assert report.table_files(1, shuffled)["csv"].encode() == made["csv"]
    again = pd.read_csv(project / "figures/test/table1.csv")
    assert list(again.columns) == report.COLUMNS and again["clean"].tolist() == first["clean"].tolist() == [0.8, 0.7]


def test_notes_name_budget_sample_size_and_every_claim(project):
    report.write_table(2, "test")
    text = (project / "figures/test/table2.md").read_text()
    assert "eps 8/255, step 2/255, 20 steps" in text and "| 128 |" in text and "0.06 on scenes" in text
    assert all(f"- ({letter}) " in text for letter in "abcde")
    assert "Warning" not in text
    bad = [record(0.5), record(0.1, "embed", nonfinite=3)]
    assert any("Warning: 3 " in note for note in report.notes("classification", bad))


def test_latex_escapes_names():
    text = report.table_files(1, [record(0.5, encoder="a_b&c%")])["tex"]
    assert r"a\_b\&c\%" in text and r"0.50 $\pm$ 0.02" in text and "±" not in text and "↑" not in text
    assert r" & a\_b\&c\% & " in text


def test_figure2_csv_has_its_columns_and_follows_the_epochs(project):
    tidy = report.write_figure2("test")
    saved = pd.read_csv(project / "figures/test/fig2.csv")
    assert list(saved.columns) == ["task", "dataset", "epoch", "attack", "metric", "value", "n"]
    assert saved["task"].unique().tolist() == ["classification", "segmentation", "depth"]
    line = saved[(saved["task"] == "depth") & (saved["attack"] == "embed")]
    assert line[["epoch", "value"]].values.tolist() == [[0, 1.5], [4, 0.95], [8, 0.9]]
    assert tidy["se"].eq(0.02).all() and set(tidy["chance"]) == set(CHANCE.values())


def test_figure2_leaves_out_what_was_not_followed():
    followed = PAPER["classification"]
    plain = rows((0.9, 0.1, 0.0), encoder="vit_tiny")
    ends_only = rows((0.9, 0.1, 0.0), (0.8, 0.5, 0.1), dataset="other")
    tidy = report.figure2_table(followed + plain + ends_only)
    assert set(tidy["dataset"]) == {"scenes"} and len(tidy) == len(followed)
    assert set(report.figure2_table(ends_only)["dataset"]) == {"other"}
    two = report.figure2_table(followed + rows((0.9, 0.1, 0.0), (0.8, 0.5, 0.1), 0.4, encoder="b"))
    assert set(two["dataset"]) == {"scenes (embedded_vit)", "scenes (b)"}


def test_copied_records_are_exact_and_stale_ones_go(project):
    stale = project / "figures/test/records/depth/gone__embedded_vit__deacl__task.json"
    records.write_json({}, stale)
    report.copy_records("test")
    names = sorted(p.relative_to(project / "results/test") for p in (project / "results/test").glob("*/*.json"))
    copied = project / "figures/test/records"
    assert sorted(p.relative_to(copied) for p in copied.glob("*/*.json")) == names
    assert all((copied / n).read_bytes() == (project / "results/test" / n).read_bytes() for n in names)


def test_without_records_an_old_copy_stays(project):
    report.copy_records("test")
    for path in (project / "results/test").glob("*/*.json"):
        path.unlink()
    with pytest.raises(BadInput, match="no records"):
        report.copy_records("test")
    assert len(records.read_records(project / "figures/test/records")) == 21


def test_the_page_is_self_contained_and_escapes_names(project):
    found = [record(0.5, encoder=HOSTILE, dataset=HOSTILE), record(0.1, "embed", encoder=HOSTILE, dataset=HOSTILE)]
    for r in found:
        path = project / f"results/test/classification/x__y__standard__{r['attack']}.json"
        records.write_json({**r, "device": HOSTILE, "notebook": f"runs/{HOSTILE}.ipynb"}, path)
    (project / "figures/test").mkdir(parents=True)
    (project / "figures/test/fig1.png").write_bytes(b"\x89PNG picture")
    page = report.write_index("test").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|\.\./\.\./runs/)([^"]*)"', page) == []
    assert "url(" not in page and "@import" not in page and "<link" not in page and "http" not in page
    assert base64.b64encode(b"\x89PNG picture").decode() in page
    assert page == report.write_index("test").read_text()


def test_the_page_shows_tables_claims_and_how_it_was_made(project):
    records.write_json({"seconds": 81.4}, records.runs_dir("test") / "01_heads.time.json")
    page = report.write_index("test").read_text()
    for words in ("Table 1.", "Table 2.", "Table 3.", "0.80 ± 0.02", "cpu (x86_64), 1 threads", "01_heads 81 s"):
        assert words in page
    assert page.count("hardly helps against") == 3
    assert 'href="../../runs/test/04_attack_segmentation.ipynb"' in page


def test_markdown_keeps_its_columns_with_a_hostile_name():
    lines = report.table_files(1, [record(0.5, dataset="a|b<i>")])["md"].splitlines()
    grid = [line for line in lines if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in grid}) == 1
    assert "a\\|b&lt;i&gt;" in grid[2]


def test_summary_names_what_there_is_and_how_to_go_on(project, capsys):
    with pytest.raises(BadInput, match="no tables or figures"):
        report.summary("test")
    report.write_table(3, "test")
    text = report.summary("test")
    assert "figures/test/table3.md" in text and "table1" not in text
    assert "small profile 'test'" in text and "PROFILE=<name>" in text
    (project / "figures/paper").mkdir()
    (project / "figures/paper/table1.md").write_text("")
    assert "small profile" not in report.summary("paper")


@pytest.mark.parametrize("number", [0, 4])
def test_there_are_three_tables(number, project):
    with pytest.raises(BadInput, match=f"no table {number}"):
        report.write_table(number, "test")


def test_a_table_without_records_names_its_notebook(project):
    for path in (project / "results/test/depth").glob("*.json"):
        path.unlink()
    with pytest.raises(BadInput, match="05_attack_depth"):
        report.write_table(3, "test")
    with pytest.raises(BadInput, match="no records yet"):
        report.write_table(3, "empty")


def test_a_damaged_record_is_named(project):
    path = records.record_path("test", "depth", "scenes", "embedded_vit", "deacl", "task")
    path.write_text(json.dumps(PAPER["depth"][0])[:50])
    with pytest.raises(BadInput, match="scenes__embedded_vit__deacl__task.json is damaged"):
        report.write_table(3, "test")
