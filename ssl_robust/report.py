"""Tables 1-3, the data of Figure 2, the page that shows everything and the closing lines, all made from the records."""

import sys
from collections.abc import Iterable
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


def _rank(column: pd.Series) -> pd.Series:
    """Sorting keys of a column: the paper's names in the paper's order, then the others by name."""
    order = list(DEFENSE) if column.name == "defense" else list(REPORTED[column.name].unique())
    return column.map(lambda name: f"{order.index(name) if name in order else len(order):02d} {name}")


def table(task: str, records: Iterable[Record]) -> pd.DataFrame:
    """Table of one task, a row for each (dataset, encoder, defense) that was run, with exactly the columns COLUMNS.

    `clean`, `embed`, `task` are values of the metric (accuracy and mIoU in 0..1, RMSE in metres), `*_se` their standard
    errors, `n` the number of test images, `reported_*` the paper's value where it has that row; NaN: not run.
    """
    rows: dict[tuple[str, ...], Record] = {}
    for record in records:
        if record["task"] == task and record["defense"] in DEFENSE:
            row = rows.setdefault(tuple(record[key] for key in KEYS), {key: record[key] for key in [*KEYS, "metric"]})
            row |= {record["attack"]: record["value"], f"{record['attack']}_se": record["se"]}
            row["n"] = min(record["n"], row.get("n", record["n"]))
    measured = pd.DataFrame(list(rows.values()), columns=MEASURED)
    paper = REPORTED[REPORTED["task"] == task].drop(columns="task")
    paper.columns = [*KEYS, *(f"reported_{attack}" for attack in ATTACKS)]
    return measured.merge(paper, on=KEYS, how="left").sort_values(KEYS, key=_rank, ignore_index=True)[COLUMNS]


def _cell(row: pd.Series, attack: str) -> str:
    """'0.71 ± 0.04 (0.94)': value, standard error, the paper's value if it has one; '–' if not run."""
    if pd.isna(row[attack]):
        return "–"
    reported = row[f"reported_{attack}"]
    return f"{row[attack]:.2f} ± {row[f'{attack}_se']:.2f}" + ("" if pd.isna(reported) else f" ({reported:.2f})")


def _readable(numbers: pd.DataFrame, task: str) -> pd.DataFrame:
    """The table as text for people: values with their standard errors, headings with the direction of better."""
    text = numbers[["dataset", "encoder"]].assign(defense=numbers["defense"].map(DEFENSE))
    text.columns = ["Dataset", "Encoder", "Defense"]
    for attack, name in zip(ATTACKS, ["Clean", "EmbedAttack", TASK_ATTACK[task]], strict=True):
        text[f"{name}, {METRIC[task]}"] = [_cell(row, attack) for _, row in numbers.iterrows()]
    return text.assign(n=numbers["n"].astype(str))


def _pixels(budget: float) -> str:
    """A change of a pixel in the usual unit: 0.031372 -> '8/255'."""
    return f"{budget * 255:.3g}/255"


def _attack_words(attack: dict[str, Any]) -> str:
    kept = "the iterate of the largest loss" if attack.get("best") else "the last iterate"
    size = f"eps {_pixels(attack['eps'])}, step {_pixels(attack['step'])}, {attack['steps']} steps"
    return f"Attacks: L-infinity in [0, 1] pixels, {size}, random start, {kept} is evaluated."


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def notes(task: str, records: list[Record]) -> list[str]:
    """Sentences below a table: how it was measured, what to compare with, and the claims as they show here."""
    kept = [r for r in records if r["task"] == task and r["defense"] in DEFENSE]
    attacked = [r for r in kept if r["attack"] != "clean"]
    chances = ", ".join(_unique(f"{r['chance']:.2f} on {r['dataset']}" for r in kept))
    sentences = [
        "Value ± standard error over n test images, the same ones clean and attacked.",
        f"The best constant prediction scores {chances}.",
        *_unique(_attack_words(r["settings"]["attack"]) for r in attacked),
    ]
    if attacked:
        sentences.append(f"Largest change of any pixel: {_pixels(max(r['max_perturbation'] for r in attacked))}.")
    if nonfinite := sum(r["nonfinite"] for r in kept):
        sentences.append(f"Warning: {nonfinite} values were not finite.")
    paper = table(task, kept)["reported_clean"].notna().any()
    sentences.append("In brackets: the paper's value." if paper else "The paper has none of these rows.")
    return sentences + [f"({letter}) {sentence}" for letter, sentence in claims(records, task)]


def _csv(numbers: pd.DataFrame) -> str:
    return numbers.to_csv(index=False, float_format="%.6f", lineterminator="\n")


def table_files(number: int, records: list[Record]) -> dict[str, str]:
    """Content of table<number> as {'csv', 'md', 'tex'}, the same bytes for the same records.

    Raises BadInput if `number` is not 1, 2 or 3 or if its task has no record.
    """
    if number not in (1, 2, 3):
        raise BadInput(f"There is no table {number}; ask for 1 (classification), 2 (segmentation) or 3 (depth).")
    task = TASKS[number - 1]
    numbers = table(task, records)
    if numbers.empty:
        raise BadInput(
            f"Table {number} has no records; run notebook 0{number + 2}_attack_{task} first, or 'make paper'."
        )
    shown = TITLE[task], _readable(numbers, task), notes(task, records)
    return {"csv": _csv(numbers), "md": layout.markdown(*shown), "tex": layout.latex(*shown)}


def _records(profile: str, folder: Path | None = None) -> list[Record]:
    records = disk.read_records(folder or disk.results_dir(profile))
    if not records:
        raise BadInput(f"Profile '{profile}' has no records yet; run the notebooks first, or 'make paper'.")
    return records


def write_table(number: int, profile: str, folder: Path | None = None) -> pd.DataFrame:
    """Write figures/<profile>/table<number>.{csv,md,tex} from the records of `profile`, or below `folder`; the table.

    Raises BadInput as table_files does.
    """
    records = _records(profile, folder)
    for suffix, content in table_files(number, records).items():
        disk.write_bytes(content.encode(), disk.figures_dir(profile) / f"table{number}.{suffix}")
    return table(TASKS[number - 1], records)


def figure2_table(records: list[Record]) -> pd.DataFrame:
    """Metrics along DeACL fine-tuning, epoch 0 being Standard: FIG2_COLUMNS, then `se` and `chance` for the picture.

    Encoders without DeACL are left out; if several have it, the data set's name says which one a row belongs to.
    """
    tuned = [r for r in records if r["defense"] != "standard"]
    encoders = {r["encoder"] for r in tuned}
    between = {(r["task"], r["dataset"]) for r in tuned if r["defense"] != "deacl"}
    # without epochs in between a line would be straight by construction, so such data sets stay out if others have some
    drawn = between or {(r["task"], r["dataset"]) for r in tuned}
    kept = [r for r in records if r["encoder"] in encoders and (r["task"], r["dataset"]) in drawn]
    columns = [*FIG2_COLUMNS, "se", "chance", "encoder"]
    tidy = pd.DataFrame([{c: r[c] for c in columns} for r in kept], columns=columns)
    if len(encoders) > 1:
        tidy["dataset"] += " (" + tidy["encoder"] + ")"
    order = {name: f"{i} {name}" for i, name in enumerate([*TASKS, *ATTACKS])}
    by = ["task", "dataset", "attack", "epoch"]
    return tidy.sort_values(by, key=lambda c: c.replace(order), ignore_index=True).drop(columns="encoder")


def write_figure2(profile: str, folder: Path | None = None) -> pd.DataFrame:
    """Write figures/<profile>/fig2.csv, columns FIG2_COLUMNS; returns figure2_table. BadInput if it has no row."""
    tidy = figure2_table(_records(profile, folder))
    if tidy.empty:
        raise BadInput("Figure 2 has no DeACL records; give an encoder 'defenses: [standard, deacl]' and run again.")
    disk.write_bytes(_csv(tidy[FIG2_COLUMNS]).encode(), disk.figures_dir(profile) / "fig2.csv")
    return tidy


def copy_records(profile: str) -> int:
    """Make figures/<profile>/records an exact copy of the records of `profile`; returns how many there are.

    Raises BadInput, and leaves an old copy alone, if there is none.
    """
    source, target = disk.results_dir(profile), disk.figures_dir(profile) / "records"
    _records(profile)
    paths = {p.relative_to(source) for p in source.glob("*/*__*__*__*.json")}
    for path in paths:
        disk.write_bytes((source / path).read_bytes(), target / path)
    for stale in {p.relative_to(target) for p in target.glob("*/*.json")} - paths:
        (target / stale).unlink()
    return len(paths)


def _time(profile: str) -> str:
    """'01_heads 80 s, ...': what the runner measured for each notebook; empty if they were run by hand."""
    paths = sorted(disk.runs_dir(profile).glob("*.time.json"))
    return ", ".join(f"{path.name.split('.')[0]} {disk.read_json(path)['seconds']:.0f} s" for path in paths)


def _facts(profile: str, records: list[Record]) -> dict[str, str]:
    """How the records of a page were made."""
    return {
        "Profile": profile,
        "Hardware": ", ".join(_unique(f"{r['device']}, {r['threads']} threads" for r in records)),
        "Seed": ", ".join(_unique(str(r["seed"]) for r in records)),
        "Time": _time(profile) or "not measured",
        "Code": ", ".join(_unique(r["git"] for r in records)),
        "Versions": ", ".join(f"{name} {number}" for name, number in records[0]["versions"].items()),
    }


def write_index(profile: str) -> Path:
    """Write figures/<profile>/index.html, one self-contained page: the figures and tables there are, and their making.

    Raises BadInput if `profile` has no records.
    """
    records, folder = _records(profile), disk.figures_dir(profile)
    pictures = {name: folder / f"{name}.png" for name in CAPTION}
    sections = [
        layout.html_figure(f"Figure {name[-1]}", path.read_bytes(), CAPTION[name])
        for name, path in pictures.items()
        if path.is_file()
    ]
    for task in _unique(r["task"] for r in sorted(records, key=lambda r: TASKS.index(r["task"]))):
        shown = _readable(table(task, records), task)
        sections.append(layout.html_table(TITLE[task], shown, notes(task, records)))
    names = [*KEYS, "attack"]
    links = _unique((" ".join([r["task"], *(r[name] for name in names)]), f"../../{r['notebook']}") for r in records)
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
    made = [folder / name for name in ("index.html", "fig1.png", "fig2.png", *(f"table{i}.md" for i in (1, 2, 3)))]
    there = [path.relative_to(disk.ROOT).as_posix() for path in made if path.is_file()]
    if not there:
        raise BadInput(f"Profile '{profile}' has no tables or figures yet; run 'make paper PROFILE={profile}'.")
    lines = [
        f"Made for profile '{profile}' (tables also as .csv and .tex, figures as .pdf):",
        *(f"  {p}" for p in there),
    ]
    if profile in SMALL:
        larger = "write params/<name>.yaml and run 'make paper PROFILE=<name> DATA=...' on a machine with a CUDA GPU"
        lines.append(f"This is the small profile '{profile}'; GPU profiles use the same schema: {larger}.")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(summary(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except BadInput as error:
        sys.exit(str(error))
