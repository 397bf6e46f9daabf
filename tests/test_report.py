"""Tables, claims and the page, on records planted in a temporary folder."""

import base64
import json
import re

import pandas as pd
import pytest

from ssl_robust import claims, layout, records, report
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


CHANCES = {"cifar10": 0.1, "cifar100": 0.01, "stl10": 0.1, "ade20k": 0.01, "cityscapes": 0.02, "voc2012": 0.04}
WHY = "Data set 'cityscapes' is not below DATA; get it by hand."
SKIPPED = [  # as read_skipped gives them
    {"task": "segmentation", "dataset": "cityscapes", "encoder": e, "defense": d, "why": WHY}
    for e, d in (("dinov2_vits14", "standard"), ("dino_vitb16", "standard"), ("dino_vitb16", "deacl"))
]


def paper_grid(off=0.0):
    """Records of all rows of Tables 1-3, `off` above the paper's values, and DeACL's epochs 1, 10 and 50."""
    found = []
    for row in report.REPORTED.itertuples():
        same = {"dataset": row.dataset, "encoder": row.encoder, "n": 1000, "chance": CHANCES.get(row.dataset, 1.3)}
        values = [min(v, 1) if row.task != "depth" else v for v in (row.clean, row.embed, row.task_attack)]
        for attack, value in zip(report.ATTACKS, values, strict=True):
            epoch = {"standard": 0, "deacl": 100}[row.defense]
            found.append(record(value + off, attack, row.defense, row.task, epoch=epoch, **same))
            for between in (1, 10, 50) if epoch else ():
                found.append(record(value, attack, f"deacl-epoch{between}", row.task, epoch=between, **same))
    return found


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
    # 2 standard errors and the paper's rounding are 0.045
    text = report.table_files(2, voc)["md"]
    assert "| 0.50 ± 0.02 (0.56, −0.06 ≠) | 0.10 ± 0.02 (0.06, +0.04 ≈) | 0.00 ± 0.02 (0.00, 0.00 ≈) |" in text


def test_the_difference_is_judged_by_two_standard_errors_and_the_rounding():
    shared = {"dataset": "cifar10", "encoder": "dino_vitb16"}  # the paper: 0.94
    for value, se, inside in (
        (0.945, 0.0, True), (0.935, 0.0, True), (0.946, 0.0, False), (0.964, 0.01, True), (0.916, 0.01, True),
        (0.966, 0.01, False), (0.914, 0.01, False),
    ):  # fmt: skip
        found = report.comparison("classification", [record(value, se=se, **shared)])
        assert found["inside"].dropna().tolist() == [inside], value
        assert found.loc[0, "difference"] == pytest.approx(value - 0.94)
    assert "(0.94, 0.00 ≈)" in report.table_files(1, [record(0.937, **shared)])["md"]  # not -0.00


def test_the_paper_grid_stands_beside_its_values(project):
    for r in paper_grid(off=0.05):
        place = [r[key] for key in ("task", "dataset", "encoder", "defense", "attack")]
        records.write_json(r, records.record_path("grid", *place))
    for number, count in ((1, 12), (2, 12), (3, 4)):
        made = report.write_table(number, "grid")
        assert len(made) == count and list(made.columns) == report.COLUMNS
        text = (project / f"figures/grid/table{number}.md").read_text()
        assert text.count(", +0.05 ≠)") == 3 * count and f"0 of {3 * count} values are ≈" in text
        tex = (project / f"figures/grid/table{number}.tex").read_text()
        assert tex.count(r", +0.05 $\neq$)") == 3 * count and "≠" not in tex and "≤" not in tex
    saved = pd.read_csv(project / "figures/grid/reported.csv")
    names = ["table", "dataset", "encoder", "defense", "attack", "reported", "ours", "se", "n", "difference", "inside"]
    assert list(saved.columns) == names and len(saved) == 84 and not saved["inside"].any()
    assert saved["difference"].round(6).eq(0.05).all() and saved.groupby("table").size().tolist() == [36, 36, 12]
    page = report.write_index("grid").read_text()
    assert page.count("<b>≠</b>)</small></td>") == 84 and page.count("<tbody>") == 3
    curves = report.figure2_table(records.read_records(project / "results/grid"))
    assert curves.groupby("task")["dataset"].nunique().to_dict() == {"classification": 3, "segmentation": 3, "depth": 1}


def test_without_the_papers_rows_there_is_no_comparison(project):
    stale = project / "figures/test/reported.csv"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    report.write_table(1, "test")
    text = (project / "figures/test/table1.md").read_text()
    assert not stale.exists() and "The paper has none of these rows." in text
    assert "| scenes | embedded_vit | Standard | 0.80 ± 0.02 | 0.05 ± 0.02 | 0.00 ± 0.02 | 128 |" in text


def test_rows_that_could_not_be_run_are_there_and_say_why(project):
    records.write_json([{k: v for k, v in row.items() if k != "task"} for row in SKIPPED],
                       records.results_dir("test") / "segmentation" / "skipped.json")  # fmt: skip
    made = report.write_table(2, "test")
    assert made["dataset"].tolist() == ["cityscapes"] * 3 + ["scenes"] * 2
    assert made.loc[:2, [*report.ATTACKS, "clean_se", "n"]].isna().all(axis=None)
    folder = project / "figures/test"
    lines = (folder / "table2.csv").read_text().splitlines()
    assert lines[2] == "cityscapes,dino_vitb16,standard,,,,,,,,mIoU,0.450000,0.060000,0.060000"
    assert lines[4].split(",")[9] == "128"
    text = (folder / "table2.md").read_text()
    assert "| not run (0.45) | not run (0.06) | not run (0.06) | – |" in text
    rows = "cityscapes/dinov2_vits14 Standard, cityscapes/dino_vitb16 Standard, cityscapes/dino_vitb16 DeACL"
    assert f"- Not run: {rows}, because: {WHY}\n" in text and text.count("by hand") == 1
    assert "none of them was run" in text
    compared = pd.read_csv(folder / "reported.csv")
    assert len(compared) == 9 and compared[["ours", "difference", "inside", "n"]].isna().all(axis=None)
    assert "Not run: cityscapes/dinov2_vits14" in report.write_index("test").read_text()
    first = {s: (folder / f"table2.{s}").read_bytes() for s in ("csv", "md", "tex")}
    records.write_json([], records.results_dir("test") / "heads" / "skipped.json")  # no table shows these
    assert report.copy_records("test") == 21
    assert [p.parent.name for p in (folder / "records").glob("*/skipped.json")] == ["segmentation"]
    report.write_table(2, "test", folder=folder / "records")
    assert first == {s: (folder / f"table2.{s}").read_bytes() for s in first}


def test_a_row_that_was_run_is_not_skipped_and_a_table_may_be_skipped_as_a_whole(project):
    ran = rows((0.4, 0.1, 0.1), task="segmentation", dataset="cityscapes", encoder="dinov2_vits14")
    assert report.table("segmentation", ran, SKIPPED)["clean"].notna().tolist() == [True, False, False]
    assert not any("dinov2_vits14 Standard" in note for note in report.notes("segmentation", ran, SKIPPED))
    assert set(report.table_files(2, [], SKIPPED)) == {"csv", "md", "tex"}
    with pytest.raises(BadInput, match="04_attack_segmentation"):
        report.table_files(2, [])
    records.write_json([], records.results_dir("none") / "depth" / "skipped.json")
    with pytest.raises(BadInput, match="no records yet"):
        report.write_table(3, "none")
    (records.results_dir("none") / "depth" / "skipped.json").write_text("[{")
    with pytest.raises(BadInput, match="skipped.json is damaged"):
        report.write_table(3, "none")


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ("paper", "the paper's text."),
        ([], "the paper's text."),
        ("released", "the authors' released code (all differences)."),
        (["embed_mse", "depth_flipped"],
         "the paper's text, but as in the authors' released code: embed_mse, depth_flipped."),
    ],
)  # fmt: skip
def test_notes_name_the_protocol(protocol, said):
    assert f"Protocol: {said}" in report.notes("classification", [record(0.5, protocol=protocol)])
    assert "Protocol: the paper's text." in report.notes("classification", [record(0.5)])
    both = report.notes("classification", [record(0.5, protocol=protocol), record(0.5, "embed", protocol="released")])
    assert len([note for note in both if note.startswith("Protocol")]) == (1 if protocol == "released" else 2)


def test_notes_say_what_sets_the_images_apart():
    cut = [record(0.5, dataset="voc2012", task="segmentation", counts="any"), record(0.5, task="segmentation")]
    assert "Rows on parts of the official data sets (counts: any): voc2012." in report.notes("segmentation", cut)
    assert not any("parts of" in note for note in report.notes("segmentation", cut[1:]))
    eigen = record(0.5, task="depth", settings={"attack": None, "task": {"crop": "eigen"}})
    assert any("crop of Eigen et al. on scenes" in note for note in report.notes("depth", [eigen]))


def test_notes_name_rows_in_the_order_of_the_table():
    found = [record(0.5, dataset=d, encoder="dino_vitb16") for d in ("aaa", "cifar100", "cifar10")]
    assert any("0.10 on cifar10, 0.10 on cifar100, 0.10 on aaa" in n for n in report.notes("classification", found))


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


def test_cells_that_were_not_run_are_missing_and_said_to_be_so():
    found = report.table("depth", [record(0.5, task="depth")])
    assert found[["embed", "task", "embed_se", "task_se"]].isna().all(axis=None)
    assert "| 0.50 ± 0.02 | not run | not run | 128 |" in report.table_files(3, [record(0.5, task="depth")])["md"]


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


def test_many_cases_are_counted_and_the_exceptions_named():
    sentences = dict(claims.claims(paper_grid(), "classification"))
    assert sentences["a"].endswith("shows in part (in 17 of 18 cases; not in stl10/dinov2_vitb14 EmbedAttack).")
    assert (
        "cifar10/dino_vitb16 0.01 ± 0.02 to 0.73 ± 0.02, 77% ± " in sentences["b"]
    )  # three cases: listed with their numbers
    lost = [r for r in paper_grid() if (r["dataset"], r["attack"]) != ("stl10", "task")]
    some = dict(claims.claims(lost, "classification"))["a"]
    assert "in 14 of 18 cases; not in stl10/dinov2_vitb14 EmbedAttack; undecided in stl10/dinov2_vits14 PGD, " in some
    assert dict(claims.claims(paper_grid(), "segmentation"))["a"].endswith(": shows (in 18 of 18 cases).")
    robust = [{**r, "value": 0.9} for r in paper_grid()]
    assert dict(claims.claims(robust, "classification"))["a"].endswith("does not show (in 0 of 18 cases).")
    noise = [{**r, "chance": 0.99} for r in paper_grid()]
    assert dict(claims.claims(noise, "classification"))["a"].endswith("cannot be judged (undecided in all 18 cases).")


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


def test_given_checkpoints_are_in_the_table_but_not_in_figure_2(project):
    given = rows((0.9, 0.1, 0.0), (0.8, 0.5, 0.1), encoder="given")
    for r in given[3:]:
        r["epoch"] = -1
    assert report.table("classification", given)["defense"].tolist() == ["standard", "deacl"]
    assert set(report.figure2_table(PAPER["classification"] + given)["dataset"]) == {"scenes"}
    assert "comes from a given checkpoint" in dict(claims.claims(given, "classification"))["e"]
    for path in (project / "results/test").glob("*/*__deacl*.json"):
        path.unlink()
    assert report.write_figure2("test").empty
    assert (project / "figures/test/fig2.csv").read_text() == "task,dataset,epoch,attack,metric,value,n\n"


def test_copied_records_are_exact_and_stale_ones_go(project):
    stale = project / "figures/test/records/depth/gone__embedded_vit__deacl__task.json"
    records.write_json({}, stale)
    report.copy_records("test")
    names = sorted(p.relative_to(project / "results/test") for p in (project / "results/test").glob("*/*.json"))
    copied = project / "figures/test/records"
    assert sorted(p.relative_to(copied) for p in copied.glob("*/*.json")) == names
    assert all((copied / n).read_bytes() == (project / "results/test" / n).read_bytes() for n in names)


def test_times_of_the_stages_are_copied_with_the_records(project):
    report.copy_records("test")
    assert records.read_json(project / "figures/test/times.json") == {}
    records.write_json({"seconds": 81.4}, records.runs_dir("test") / "01_heads.time.json")
    records.write_json({"seconds": 3.0}, records.runs_dir("test") / "00_data.time.json")
    report.copy_records("test")
    copied = records.read_json(project / "figures/test/times.json")
    assert list(copied.items()) == [("00_data", 3.0), ("01_heads", 81.4)]
    for path in records.runs_dir("test").glob("*.time.json"):
        path.unlink()
    report.copy_records("test")  # records that were made by hand do not keep the times of others
    assert records.read_json(project / "figures/test/times.json") == {}


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


def test_wide_figures_are_marked_for_narrow_screens():
    def picture(width, height):
        header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
        return layout.html_figure("Figure 2", header + width.to_bytes(4, "big") + height.to_bytes(4, "big"), "")

    assert 'class="wide"' in picture(1000, 300) and 'class="wide"' not in picture(300, 1000)
    assert ".wide" in layout.STYLE and "@media (max-width" in layout.STYLE


def test_a_second_line_of_a_cell_is_small_in_html_and_below_in_latex():
    text = pd.DataFrame([["a", "0.5\n(0.6 ≠)"], ["<b>", "0.4"]], columns=["name", "value"])
    assert "<td>a</td><td>0.5<br><small>(0.6 <b>≠</b>)</small></td>" in layout.html_table("T", text, [])
    assert "<td>&lt;b&gt;</td><td>0.4</td>" in layout.html_table("T", text, [])
    assert "<thead><tr><th>name</th><th>value</th></tr></thead>" in layout.html_table("T", text, [])
    assert "a & 0.5 \\\\\n & (0.6 $\\neq$) \\\\\n" in layout.latex("T. t", text, [])
    assert "| a | 0.5 (0.6 ≠) |" in layout.markdown("T", text, [])
    assert r"\textbar{}x\textbar{} $\approx$ $-$1" in layout.latex("T. t", text, ["|x| ≈ −1"])


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
    assert "small profile 'test'" in text and "run 'make paper PROFILE=quick DATA=FOLDER'" in text
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


def test_effects_of_protocols_are_written_as_changes_against_the_papers(root):
    common = {"task": "depth", "dataset": "scenes", "encoder": "e", "metric": "RMSE", "n": 8}
    values = {"clean": 0.5, "clean_se": 0.01, "embed": 0.7, "embed_se": 0.02, "attack": 1.0, "attack_se": 0.03}
    other = values | {"attack": 0.8}
    effects = pd.DataFrame([common | {"protocol": n} | v for n, v in (("paper", values), ("depth_warmup", other))])
    text = report.write_effects(effects, "mine")
    assert "| depth_warmup | 0.500 ± 0.010 (0.000) | 0.700 ± 0.020 (0.000) | 0.800 ± 0.030 (−0.200) |" in text
    assert (root / "figures/mine/protocols.md").read_text(encoding="utf-8") == text
    assert list(pd.read_csv(root / "figures/mine/protocols.csv")["protocol"]) == ["paper", "depth_warmup"]
