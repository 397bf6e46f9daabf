"""Tables 1-3 beside the paper's values, the data of Figure 2, the page that shows everything, the effects of protocols
and the closing lines: all made from the records.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import layout
from . import records as disk
from .claims import TASK_ATTACK, claims
from .settings import TASKS, BadInput

Record = dict[str, Any]

REPORTED = pd.read_csv(disk.PACKAGE / "reported.csv")  # Tables 1-3 of the paper
KEYS = ["dataset", "encoder", "defense"]
ATTACKS = ["clean", "embed", "task"]
MEASURED = [*KEYS, *ATTACKS, *(f"{attack}_se" for attack in ATTACKS), "n", "metric"]
COLUMNS = [*MEASURED, *(f"reported_{attack}" for attack in ATTACKS)]
REPORTED_COLUMNS = ["table", *KEYS, "attack", "reported", "ours", "se", "n", "difference", "inside"]
FIG2_COLUMNS = ["task", "dataset", "epoch", "attack", "metric", "value", "n"]
# RMSE is better when lower, so each heading says where better is
METRIC = {"classification": "accuracy ↑", "segmentation": "mIoU ↑", "depth": "RMSE [m] ↓"}
TITLE = {
    "classification": "Table 1. Linear classification under attack",
    "segmentation": "Table 2. Semantic segmentation under attack",
    "depth": "Table 3. Depth estimation under attack",
}
CAPTION = {
    "fig1": "What the attacks do: image, perturbation amplified to full range, clean and attacked prediction.",
    "fig2": "The metrics along DeACL fine-tuning. Epoch 0: Standard; bars: standard errors; dots: best constant.",
}
DEFENSE = {"standard": "Standard", "deacl": "DeACL"}
SMALL = ("demo", "samples", "test")
ROUNDING = 0.005  # the paper prints two decimals


def _rank(column: pd.Series) -> pd.Series:
    """Sorting keys of a column: the paper's names in the paper's order, then the others by name."""
    order = list(DEFENSE) if column.name == "defense" else list(REPORTED[column.name].unique())
    return column.map(lambda name: f"{order.index(name) if name in order else len(order):02d} {name}")


def _ordered(records: list[Record]) -> list[Record]:
    """Records in the order of the tables' rows, so that sentences name them in that order."""
    rows = pd.DataFrame([[r[key] for key in KEYS] for r in records], columns=KEYS)
    return [records[i] for i in rows.sort_values(KEYS, key=_rank, kind="stable").index]


def read_skipped(folder: Path) -> list[Record]:
    """Rows that were asked for but could not be run: {task, dataset, encoder, defense, why}, from */skipped.json.

    `folder` is results/<profile> or figures/<profile>/records; empty if nothing was skipped.
    """
    return [{"task": path.parent.name, **row} for path in _skipped_paths(folder) for row in disk.read_skipped(path)]


def _skipped_paths(folder: Path) -> list[Path]:
    return [path for path in (folder / task / "skipped.json" for task in TASKS) if path.is_file()]


def table(task: str, records: Iterable[Record], skipped: Sequence[Record] = ()) -> pd.DataFrame:
    """Table of one task, a row for each (dataset, encoder, defense), with exactly the columns COLUMNS.

    `clean`, `embed`, `task` are values of the metric (accuracy and mIoU in 0..1, RMSE in metres), `*_se` their standard
    errors, `n` the number of test images, `reported_*` the paper's value where it has that row; NaN: not run.
    `skipped` (read_skipped) gives rows without values.
    """
    rows: dict[tuple[str, ...], Record] = {}
    for record in records:
        if record["task"] == task and record["defense"] in DEFENSE:
            row = rows.setdefault(tuple(record[key] for key in KEYS), {key: record[key] for key in [*KEYS, "metric"]})
            row |= {record["attack"]: record["value"], f"{record['attack']}_se": record["se"]}
            row["n"] = min(record["n"], row.get("n", record["n"]))
    for row in (row for row in skipped if row["task"] == task):
        empty = {key: row[key] for key in KEYS} | {"metric": METRIC[task].split()[0], "n": None}
        rows.setdefault(tuple(row[key] for key in KEYS), empty)
    measured = pd.DataFrame(list(rows.values()), columns=MEASURED).astype({"n": "Int64"})
    values = [c for c in MEASURED if c.removesuffix("_se") in ATTACKS]
    measured[values] = measured[values].astype(float)
    paper = REPORTED[REPORTED["task"] == task].drop(columns="task")
    paper.columns = [*KEYS, *(f"reported_{attack}" for attack in ATTACKS)]
    return measured.merge(paper, on=KEYS, how="left").sort_values(KEYS, key=_rank, ignore_index=True)[COLUMNS]


def _inside(difference: Any, se: Any) -> Any:
    """Whether a difference from the paper lies within 2 standard errors of ours, the paper's rounding allowed."""
    return abs(difference) <= 2 * se + ROUNDING + 1e-9


def comparison(task: str, records: Iterable[Record], skipped: Sequence[Record] = ()) -> pd.DataFrame:
    """A row for each value of a task that the paper reports too: REPORTED_COLUMNS; `difference` is ours - reported.

    `inside`: the difference is at most 2 standard errors of ours + 0.005. What was not run has no `ours`.
    """
    numbers = table(task, records, skipped)
    parts = [
        numbers[[*KEYS, "n"]].assign(
            attack=attack, reported=numbers[f"reported_{attack}"], ours=numbers[attack], se=numbers[f"{attack}_se"]
        )
        for attack in ATTACKS
    ]
    tidy = pd.concat(parts).sort_index(kind="stable").dropna(subset="reported")
    tidy = tidy.assign(table=TASKS.index(task) + 1, difference=tidy["ours"] - tidy["reported"])
    inside = _inside(tidy["difference"], tidy["se"]).astype("boolean")
    return tidy.assign(inside=inside.where(tidy["ours"].notna())).reset_index(drop=True)[REPORTED_COLUMNS]


def _signed(difference: float, digits: int = 2) -> str:
    """'+0.03', '−0.01', '0.00'."""
    rounded = round(difference, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def _cell(row: pd.Series, attack: str) -> str:
    """Value and standard error; on a second line the paper's value, the difference and whether it is inside (≈) or not.

    '0.91 ± 0.01', or where the paper has the row '0.91 ± 0.01\\n(0.94, −0.03 ≠)', or 'not run\\n(0.94)'.
    """
    run, reported = not pd.isna(row[attack]), row[f"reported_{attack}"]
    value = f"{row[attack]:.2f} ± {row[f'{attack}_se']:.2f}" if run else "not run"
    if pd.isna(reported):
        return value
    if not run:
        return f"{value}\n({reported:.2f})"
    difference = row[attack] - reported
    sign = "≈" if _inside(difference, row[f"{attack}_se"]) else "≠"
    return f"{value}\n({reported:.2f}, {_signed(difference)} {sign})"


def _readable(numbers: pd.DataFrame, task: str) -> pd.DataFrame:
    """The table as text for people: values with their standard errors, headings with the direction of better."""
    text = numbers[["dataset", "encoder"]].assign(defense=numbers["defense"].map(DEFENSE))
    text.columns = ["Dataset", "Encoder", "Defense"]
    for attack, name in zip(ATTACKS, ["Clean", "EmbedAttack", TASK_ATTACK[task]], strict=True):
        text[f"{name}, {METRIC[task]}"] = [_cell(row, attack) for _, row in numbers.iterrows()]
    return text.assign(n=["–" if pd.isna(n) else str(n) for n in numbers["n"]])


def _pixels(budget: float) -> str:
    """A change of a pixel in the usual unit: 0.031372 -> '8/255'."""
    return f"{budget * 255:.3g}/255"


def _attack_words(attack: dict[str, Any]) -> str:
    kept = "the iterate of the largest loss" if attack.get("best") else "the last iterate"
    size = f"eps {_pixels(attack['eps'])}, step {_pixels(attack['step'])}, {attack['steps']} steps"
    return f"Attacks: L-infinity in [0, 1] pixels, {size}, random start, {kept} is evaluated."


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _protocol_words(protocol: str | list[str]) -> str:
    if protocol == "released":
        return "Protocol: the authors' released code (all differences)."
    if protocol == "paper" or not protocol:
        return "Protocol: the paper's text."
    return f"Protocol: the paper's text, but as in the authors' released code: {', '.join(protocol)}."


def _data_words(kept: list[Record]) -> list[str]:
    """What sets the images apart from the whole official test set."""
    parts = ", ".join(_unique(r["dataset"] for r in kept if r.get("counts") == "any"))
    cropped = ", ".join(_unique(r["dataset"] for r in kept if r["settings"]["task"].get("crop") == "eigen"))
    words = [f"Rows on parts of the official data sets (counts: any): {parts}."] if parts else []
    return words + ([f"Errors count inside the centre crop of Eigen et al. on {cropped}."] if cropped else [])


def _comparison_words(compared: pd.DataFrame) -> str:
    """What the brackets mean and how often the value lies inside."""
    if compared.empty:
        return "The paper has none of these rows."
    rule = f"≈ if it is at most 2 standard errors of ours (+ {ROUNDING}, as the paper rounds to 0.01), ≠ if it is more"
    judged = compared["inside"].dropna()
    count = f"{judged.sum()} of {len(judged)} values are ≈" if len(judged) else "none of them was run"
    return f"In brackets: the paper's value, then the difference (ours − the paper's), {rule}; {count}."


def _skipped_words(task: str, kept: list[Record], skipped: Sequence[Record]) -> list[str]:
    """One sentence for each reason, with the rows it stopped; rows that have values are not among them."""
    run = {tuple(r[key] for key in KEYS) for r in kept}
    stopped: dict[str, list[str]] = {}
    for row in skipped:
        if row["task"] == task and tuple(row[key] for key in KEYS) not in run:
            name = f"{row['dataset']}/{row['encoder']} {DEFENSE.get(row['defense'], row['defense'])}"
            stopped.setdefault(row["why"].rstrip("."), []).append(name)
    return [f"Not run: {', '.join(names)}, because: {why}." for why, names in stopped.items()]


def notes(task: str, records: list[Record], skipped: Sequence[Record] = ()) -> list[str]:
    """Sentences below a table: how it was measured, what to compare with, and the claims as they show here."""
    records = _ordered(records)
    kept = [r for r in records if r["task"] == task and r["defense"] in DEFENSE]
    attacked = [r for r in kept if r["attack"] != "clean"]
    sentences = ["Value ± standard error over n test images, the same ones clean and attacked."]
    if chances := ", ".join(_unique(f"{r['chance']:.2f} on {r['dataset']}" for r in kept)):
        sentences.append(f"The best constant prediction scores {chances}.")
    sentences += _unique(_protocol_words(r.get("protocol", "paper")) for r in kept)
    sentences += _unique(_attack_words(r["settings"]["attack"]) for r in attacked)
    if attacked:
        sentences.append(f"Largest change of any pixel: {_pixels(max(r['max_perturbation'] for r in attacked))}.")
    if nonfinite := sum(r["nonfinite"] for r in kept):
        sentences.append(f"Warning: {nonfinite} values were not finite.")
    sentences += _data_words(kept)
    sentences.append(_comparison_words(comparison(task, records, skipped)))
    sentences += _skipped_words(task, kept, skipped)
    return sentences + [f"({letter}) {sentence}" for letter, sentence in claims(records, task)]


def _csv(numbers: pd.DataFrame) -> str:
    return numbers.to_csv(index=False, float_format="%.6f", lineterminator="\n")


def table_files(number: int, records: list[Record], skipped: Sequence[Record] = ()) -> dict[str, str]:
    """Content of table<number> as {'csv', 'md', 'tex'}, the same bytes for the same records.

    Raises BadInput if `number` is not 1, 2 or 3 or if its task has neither a record nor a skipped row.
    """
    if number not in (1, 2, 3):
        raise BadInput(f"There is no table {number}; ask for 1 (classification), 2 (segmentation) or 3 (depth).")
    task = TASKS[number - 1]
    numbers = table(task, records, skipped)
    if numbers.empty:
        raise BadInput(
            f"Table {number} has no records; run notebook 0{number + 2}_attack_{task} first, or 'make paper'."
        )
    shown = TITLE[task], _readable(numbers, task), notes(task, records, skipped)
    return {"csv": _csv(numbers), "md": layout.markdown(*shown), "tex": layout.latex(*shown)}


def _read(profile: str, folder: Path | None = None) -> tuple[list[Record], list[Record]]:
    """Records and skipped rows of `profile`, or those below `folder`."""
    folder = folder or disk.results_dir(profile)
    records, skipped = disk.read_records(folder), read_skipped(folder)
    if not records and not skipped:
        raise BadInput(f"Profile '{profile}' has no records yet; run the notebooks first, or 'make paper'.")
    return records, skipped


def write_table(number: int, profile: str, folder: Path | None = None) -> pd.DataFrame:
    """Write figures/<profile>/table<number>.{csv,md,tex} from the records of `profile`, or below `folder`; the table.

    Also writes reported.csv (write_reported). Raises BadInput as table_files does.
    """
    records, skipped = _read(profile, folder)
    for suffix, content in table_files(number, records, skipped).items():
        disk.write_bytes(content.encode(), disk.figures_dir(profile) / f"table{number}.{suffix}")
    write_reported(profile, folder)
    return table(TASKS[number - 1], records, skipped)


def write_reported(profile: str, folder: Path | None = None) -> pd.DataFrame:
    """Write figures/<profile>/reported.csv, each value of the three tables beside the paper's: see `comparison`.

    Without a row that the paper has there is no such file, and an old one is removed.
    """
    records, skipped = _read(profile, folder)
    tidy = pd.concat([comparison(task, records, skipped) for task in TASKS], ignore_index=True)
    path = disk.figures_dir(profile) / "reported.csv"
    if tidy.empty:
        path.unlink(missing_ok=True)
    else:
        disk.write_bytes(_csv(tidy).encode(), path)
    return tidy


def _effect_rows(effects: pd.DataFrame, task: str) -> pd.DataFrame:
    """Rows of one task as text: the paper's protocol first, then each other's values and their change against it."""
    rows = effects[effects["task"] == task]
    text = pd.DataFrame({"Protocol": rows["protocol"]})
    for column, name in zip(["clean", "embed", "attack"], ["Clean", "EmbedAttack", TASK_ATTACK[task]], strict=True):
        changes = rows[column] - rows[column].iloc[0]
        pairs = zip(rows[column], rows[f"{column}_se"], changes, strict=True)
        text[f"{name}, {METRIC[task]}"] = [
            f"{value:.3f} ± {se:.3f} ({_signed(change, 3)})" for value, se, change in pairs
        ]
    return text


def write_effects(effects: pd.DataFrame, profile: str) -> str:
    """Write figures/<profile>/protocols.csv and .md from evaluate.effects; returns the Markdown, a table a task."""
    parts = []
    for task in (task for task in TASKS if task in set(effects["task"])):
        first = effects[effects["task"] == task].iloc[0]
        title = f"Protocols, {task}: {first['encoder']} (Standard) on {first['dataset']}, n = {first['n']}"
        note = "Value ± standard error, in brackets the change against the paper's protocol; each difference alone."
        parts.append(layout.markdown(title, _effect_rows(effects, task), [note]))
    text, folder = "\n".join(parts), disk.figures_dir(profile)
    disk.write_bytes(_csv(effects).encode(), folder / "protocols.csv")
    disk.write_bytes(text.encode(), folder / "protocols.md")
    return text


def _curve(record: Record) -> tuple[str, str, str]:
    return record["task"], record["dataset"], record["encoder"]


def figure2_table(records: list[Record]) -> pd.DataFrame:
    """Metrics along DeACL fine-tuning, epoch 0 being Standard: FIG2_COLUMNS, then `se` and `chance` for the picture.

    Encoders without DeACL, or with a given DeACL checkpoint of unknown epoch, are left out; if several are left, the
    data set's name says which one a row belongs to.
    """
    known = [r for r in records if r["epoch"] >= 0]
    tuned = [r for r in known if r["defense"] != "standard"]
    between = {_curve(r) for r in tuned if r["defense"] != "deacl"}
    # without epochs in between a line would be straight by construction, so such ones stay out if others have some
    drawn = between or {_curve(r) for r in tuned}
    columns = [*FIG2_COLUMNS, "se", "chance", "encoder"]
    tidy = pd.DataFrame([{c: r[c] for c in columns} for r in known if _curve(r) in drawn], columns=columns)
    if tidy["encoder"].nunique() > 1:
        tidy["dataset"] += " (" + tidy["encoder"] + ")"
    order = {name: f"{i} {name}" for i, name in enumerate([*TASKS, *ATTACKS])}
    by = ["task", "dataset", "attack", "epoch"]
    return tidy.sort_values(by, key=lambda c: c.replace(order), ignore_index=True).drop(columns="encoder")


def write_figure2(profile: str, folder: Path | None = None) -> pd.DataFrame:
    """Write figures/<profile>/fig2.csv, columns FIG2_COLUMNS; returns figure2_table, empty if no DeACL was followed."""
    tidy = figure2_table(_read(profile, folder)[0])
    disk.write_bytes(_csv(tidy[FIG2_COLUMNS]).encode(), disk.figures_dir(profile) / "fig2.csv")
    return tidy


def copy_records(profile: str) -> int:
    """Make figures/<profile>/records an exact copy of the records of `profile`; returns how many there are.

    Lists of skipped rows are copied too; the stages' seconds become figures/<profile>/times.json. Raises BadInput, and
    leaves an old copy alone, if there is nothing to copy.
    """
    source, target = disk.results_dir(profile), disk.figures_dir(profile) / "records"
    records, _ = _read(profile)
    paths = {p.relative_to(source) for p in source.glob("*/*__*__*__*.json")}
    paths |= {p.relative_to(source) for p in _skipped_paths(source)}
    for path in paths:
        disk.write_bytes((source / path).read_bytes(), target / path)
    for stale in {p.relative_to(target) for p in target.glob("*/*.json")} - paths:
        (target / stale).unlink()
    disk.write_json(_times(profile), target.with_name("times.json"))
    return len(records)


def _times(profile: str) -> dict[str, float]:
    """Seconds that the runner measured for each notebook; empty if they were run by hand."""
    paths = sorted(disk.runs_dir(profile).glob("*.time.json"))
    return {path.name.split(".")[0]: disk.read_json(path)["seconds"] for path in paths}


def _facts(profile: str, records: list[Record]) -> dict[str, str]:
    """How the records of a page were made."""
    return {
        "Profile": profile,
        "Hardware": ", ".join(_unique(f"{r['device']}, {r['threads']} threads" for r in records)),
        "Seed": ", ".join(_unique(str(r["seed"]) for r in records)),
        "Time": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in _times(profile).items()) or "not measured",
        "Code": ", ".join(_unique(r["git"] for r in records)),
        "Versions": ", ".join(_unique(f"{name} {number}" for r in records for name, number in r["versions"].items())),
    }


def write_index(profile: str) -> Path:
    """Write figures/<profile>/index.html, one self-contained page: the figures and tables there are, and their making.

    Raises BadInput if `profile` has no records.
    """
    (records, skipped), folder = _read(profile), disk.figures_dir(profile)
    pictures = {name: folder / f"{name}.png" for name in CAPTION}
    sections = [
        layout.html_figure(f"Figure {name[-1]}", path.read_bytes(), CAPTION[name])
        for name, path in pictures.items()
        if path.is_file()
    ]
    for task in (task for task in TASKS if any(r["task"] == task for r in [*records, *skipped])):
        shown = _readable(table(task, records, skipped), task)
        sections.append(layout.html_table(TITLE[task], shown, notes(task, records, skipped)))
    names = ["task", *KEYS, "attack"]
    links = _unique((" ".join(r[name] for name in names), f"../../{r['notebook']}") for r in records)
    sections.append(layout.html_links("The executed notebook behind each value", links))
    lead = "Tables and figures regenerated by the notebooks, each value from its record."
    title = "Adversarial robustness of frozen self-supervised encoders"
    page = layout.html_page(title, lead, _facts(profile, records), sections)
    disk.write_bytes(page.encode(), folder / "index.html")
    return folder / "index.html"


def summary(profile: str) -> str:
    """Closing lines of a run: the tables and figures there are and, for a small profile, how to run a larger one.

    Raises BadInput if nothing has been made.
    """
    folder = disk.figures_dir(profile)
    names = ("index.html", "reported.csv", "fig1.png", "fig2.png", "table1.md", "table2.md", "table3.md")
    there = [(folder / name).relative_to(disk.ROOT).as_posix() for name in names if (folder / name).is_file()]
    if not there:
        raise BadInput(f"Profile '{profile}' has no tables or figures yet; run 'make paper PROFILE={profile}'.")
    lines = [f"Made for profile '{profile}' (tables also as .csv and .tex, figures as .pdf):"]
    lines += [f"  {path}" for path in there]
    if profile in SMALL:
        before = "'make plan PROFILE=quick DATA=FOLDER' and 'make data PROFILE=quick DATA=FOLDER'"
        larger = "'make paper PROFILE=quick DATA=FOLDER' (one GPU, about an hour) or PROFILE=paper (all of the paper)"
        lines.append(f"This is the small profile '{profile}'; on a GPU, after {before}, run {larger}.")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(summary(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except BadInput as error:
        sys.exit(str(error))
