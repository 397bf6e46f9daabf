"""What lies in figures/<profile>: tables, figures, times, a copy of the records, and 06_figures as a page.

`python -m ssl_robust.show.report demo` makes all of it anew from what is on disk.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .. import records as disk
from ..progress import any_terminal
from ..settings import BadInput
from ..tasks import TASKS
from ..trust import claims, evidence, paired
from . import committed, layout
from .tables import ATTACKS, DEFENSE, comparison, csv, effect_rows, in_order, table_files, unique

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

Record = dict[str, Any]

FIG2_COLUMNS = ["task", "dataset", "epoch", "attack", "metric", "value", "n"]
RESULTS = [*evidence.CELL, "metric", "value", "se", "n", "chance", "seed", "precision", "key"]
FILES = ("index.html", "results.csv", "claims.md", "reported.csv", "paired.csv", "fig1.png", "fig2.png", "sanity.png")
SMALL = ("demo", "samples", "test")
LINK = re.compile(r'\[([^][]*)\]\(records/\S*\.json "[^"]*"\)')  # of a value, as tables write it


def read(profile: str, folder: Path | None = None) -> tuple[list[Record], list[Record]]:
    """Records (evidence.read) and skipped rows of `profile`, or those below `folder`; BadInput if there are none."""
    folder = folder or disk.results_dir(profile)
    records, skipped = evidence.read(folder), evidence.read_skipped(folder)
    if not records and not skipped:
        raise BadInput(f"Profile '{profile}' has no records yet; run the notebooks first, or 'make paper'.")
    return records, skipped


def folder_of(profile: str) -> Path:
    """Where records of `profile` are: results/<profile>, else the copy with its figures, else the committed ones.

    Parameters that are tried, '<profile>/lab', fall back on those of the profile; results/<profile> if there are none.
    """
    copies = (folder / "records" for folder in (disk.figures_dir(profile), disk.committed_dir(profile)))
    places = (disk.results_dir(profile), disk.results_dir(profile.partition("/")[0]), *copies)
    return next((p for p in places if disk.read_records(p) or evidence.read_skipped(p)), places[0])


def _save(profile: str, name: str, content: str | pd.DataFrame) -> None:
    """Write figures/<profile>/<name>, a data frame as CSV; of what is empty there is no file, and an old one goes."""
    path = disk.figures_dir(profile) / name
    text = content if isinstance(content, str) else csv(content) * (not content.empty)
    if text:
        disk.write_bytes(text.encode(), path)
    else:
        path.unlink(missing_ok=True)


def _save_table(number: int, profile: str, folder: Path | None = None) -> str:
    """Write figures/<profile>/table<number>.{csv,md,tex,notes.tex}; the Markdown for a notebook, see shown.

    Raises BadInput as table_files does.
    """
    files = table_files(number, *read(profile, folder), "records/" * ("/" not in profile), profile)
    for suffix, content in files.items():
        _save(profile, f"table{number}.{suffix}", content)
    if disk.notebook():
        return files["md"].replace("](records/", f"]({_from_runs(profile)}records/")
    return LINK.sub(r"\1", files["md"])


def _from_runs(profile: str) -> str:
    """figures/<profile>, as a link in an executed notebook says it."""
    return f"../../figures/{profile}/"


def shown(number: int, profile: str, folder: Path | None = None) -> "Markdown":
    """Table `number` and its notes for a notebook, from the records of `profile` or below `folder`; all its files, and
    those of write_comparisons, are written. Executed by make, its values link to their records. Raises BadInput as
    table_files does.
    """
    from IPython.display import Markdown  # here, as only notebooks need it

    text = _save_table(number, profile, folder)
    write_comparisons(profile, folder)
    return Markdown(text)


def facts(profile: str) -> str:
    """How the records of `profile` were made, as Markdown: hardware, seeds, time, commit and versions."""
    records, _ = read(profile)
    made = {
        "Profile": [profile],
        "Hardware": [f"{r['device']}, {r['threads']} threads" for r in records],
        "Seed": [str(s["seed"]) for r in records for s in [r, *r["over_seeds"]]],
        "Notebooks": [f"{sum(stage['seconds'] for stage in _times(profile).values()):.0f} s"],
        "Code": [r["git"] for r in records],
        "Versions": [f"{name} {number}" for r in records for name, number in r["versions"].items()],
    }
    return "\n".join(f"- **{name}**: {', '.join(unique(found))}" for name, found in made.items())


def _times(profile: str) -> dict[str, dict[str, float]]:
    """When each executed notebook of `profile` was started and how many seconds it took."""
    paths = sorted(disk.runs_dir(profile).glob("*.time.json"))
    found = ((path.name.removesuffix(".time.json"), disk.read_json(path)) for path in paths)
    return {name: {key: about[key] for key in ("started", "seconds")} for name, about in found}


def write_comparisons(profile: str, folder: Path | None = None) -> str:
    """Write results.csv, all values of the tables, and what compares them: reported.csv with the paper's, paired.csv
    DeACL with Standard, claims.csv and claims.md with the claims; returns the last. No file for what has no row.
    """
    records, skipped = read(profile, folder)
    judged = claims.judge(in_order(records))
    rules = {"How to read it": claims.RULES}
    text = layout.markdown("The paper's claims", claims.matrix(judged), rules) if judged else ""
    by_task = sorted(records, key=lambda r: TASKS[r["task"]].number)
    _save(profile, "results.csv", _all_values(by_task))
    _save(profile, "reported.csv", pd.concat([comparison(task, records, skipped) for task in TASKS], ignore_index=True))
    _save(profile, "paired.csv", paired.differences(by_task))
    _save(profile, "claims.csv", claims.numbers(judged))
    _save(profile, "claims.md", text)
    return text


def _all_values(records: list[Record]) -> pd.DataFrame:
    """The values of all tables, one a row, with what its attack was allowed."""
    shown = [r for r in in_order(records) if r["defense"] in DEFENSE]
    found = pd.DataFrame([{name: r.get(name) for name in RESULTS} for r in shown], columns=RESULTS)
    found["table"] = [TASKS[r["task"]].number for r in shown]
    found["flagged"] = [bool(evidence.reasons(r)) for r in shown]
    for name in ("eps", "step", "steps"):
        found[name] = [(r["settings"]["attack"] or {}).get(name) for r in shown]
    return found.sort_values("table", kind="stable").astype({"steps": "Int64"})


def write_effects(effects: pd.DataFrame, profile: str) -> str:
    """Write figures/<profile>/protocols.csv and .md from evaluate.effects; returns the Markdown, a table a task."""
    note = "Value ± standard error, in brackets the change against the paper's protocol; each difference alone."
    parts = []
    for task, rows in sorted(effects.groupby("task"), key=lambda part: TASKS[part[0]].number):
        encoder, dataset, n = rows[["encoder", "dataset", "n"]].iloc[0]
        title = f"Protocols, {task}: {encoder} (Standard) on {dataset}, n = {n}"
        parts.append(layout.markdown(title, effect_rows(rows), {"": [note]}))
    text = "\n".join(parts)
    _save(profile, "protocols.csv", effects)
    _save(profile, "protocols.md", text)
    return text


def _curve(record: Record) -> tuple[str, str, str]:
    return record["task"], record["dataset"], record["encoder"]


def _drawn(records: list[Record]) -> list[Record]:
    """The records that Figure 2 shows: the paper's attacks at known epochs of fine-tuned encoders."""
    known = [r for r in records if r["epoch"] >= 0 and r["attack"] in ATTACKS]
    tuned = [r for r in known if r["defense"] != "standard"]
    between = {_curve(r) for r in tuned if r["defense"] != "deacl"}
    # without epochs in between a line would be straight by construction, so such ones stay out if others have some
    drawn = between or {_curve(r) for r in tuned}
    return [r for r in known if _curve(r) in drawn]


def figure2_table(records: list[Record]) -> pd.DataFrame:
    """Metrics along DeACL fine-tuning, epoch 0 being Standard: FIG2_COLUMNS, then se, chance, encoder and flagged.

    Encoders without DeACL, or with a given DeACL checkpoint of unknown epoch, are left out; if several are left, the
    data set's name says which one a row belongs to. `flagged`: there are reasons to doubt the value.
    """
    columns = [*FIG2_COLUMNS, "se", "chance", "encoder"]
    rows = [{c: r[c] for c in columns} | {"flagged": bool(evidence.reasons(r))} for r in _drawn(records)]
    tidy = pd.DataFrame(rows, columns=[*columns, "flagged"])
    if tidy["encoder"].nunique() > 1:
        tidy["dataset"] += " (" + tidy["encoder"] + ")"
    order = {name: f"{i} {name}" for i, name in enumerate([*TASKS, *ATTACKS])}
    by = ["task", "dataset", "attack", "epoch"]
    return tidy.sort_values(by, key=lambda c: c.replace(order), ignore_index=True)


def write_figure2(profile: str, folder: Path | None = None) -> pd.DataFrame:
    """Write figures/<profile>/fig2.csv, columns FIG2_COLUMNS; returns figure2_table, empty if no DeACL was followed."""
    tidy = figure2_table(read(profile, folder)[0])
    disk.write_bytes(csv(tidy[FIG2_COLUMNS]).encode(), disk.figures_dir(profile) / "fig2.csv")
    return tidy


def draw_figure2(profile: str, folder: Path | None = None) -> "Figure | None":
    """Figure 2, with its fig2.csv, fig2.png and fig2.pdf in figures/<profile>; without a followed DeACL run there is no
    picture, and an old one goes.
    """
    from . import plots  # here, because matplotlib takes seconds that tables do not need

    tidy, path = write_figure2(profile, folder), disk.figures_dir(profile) / "fig2"
    if tidy.empty:
        for suffix in (".png", ".pdf"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        return None
    figure = plots.figure2(tidy)
    plots.save(figure, path)
    return figure


def copy_records(profile: str) -> int:
    """Make figures/<profile>/records an exact copy of the records of `profile`; returns how many there are.

    Lists of skipped rows, records of further seeds and the sanity checks are copied too; when the stages started and
    how long they took become figures/<profile>/times.json. Raises BadInput, and leaves an old copy alone, if there is
    nothing to copy.
    """
    source, target = disk.results_dir(profile), disk.figures_dir(profile) / "records"
    records, _ = read(profile)
    paths = {p.relative_to(source) for p in evidence.paths(source)}
    for path in paths:
        disk.write_bytes((source / path).read_bytes(), target / path)
    for stale in {p.relative_to(target) for p in target.rglob("*.json")} - paths:
        (target / stale).unlink()
    disk.write_json(_times(profile), target.with_name("times.json"))
    return len(records)


def draw_figure1(profile: str) -> "Figure":
    """Figure 1 from the examples that the attack notebooks left, also written to figures/<profile>/fig1.png and .pdf.

    Attacks that there are reasons to doubt have a dagger. Raises BadInput for a damaged example.
    """
    from . import plots  # here, because matplotlib takes seconds that tables do not need

    examples = {task: plots.load_example(path) for task, path in evidence.current_examples(profile).items()}
    if not examples:
        raise BadInput(f"There are no images for Figure 1 in runs/{profile}/examples; 'make paper' makes them.")
    places = {(task, shown["dataset"], shown["encoder"], "standard") for task, shown in examples.items()}
    rows = [r for r in read(profile)[0] if (*_curve(r), r["defense"]) in places and r["reasons"]]
    figure = plots.figure1(examples, [(r["task"], r["attack"]) for r in rows if r["attack"] in ("embed", "task")])
    plots.save(figure, disk.figures_dir(profile) / "fig1")
    return figure


def captions(profile: str) -> str:
    """Why points of Figure 2 are flagged (†) that stand in no table, as Markdown; '' if none is."""
    doubted = [r for r in _drawn(read(profile)[0]) if r["defense"] not in DEFENSE and r["reasons"]]
    return "\n".join(
        f"- †: {r['dataset']}/{r['encoder']}, {r['attack_name']} at epoch {r['epoch']}: {'; '.join(r['reasons'])}."
        for r in doubted
    )


def write_page(profile: str) -> Path | None:
    """Write figures/<profile>/index.html: 06_figures as it was executed, without its code; None if it was not.

    The page needs no other file and nothing from the network.
    """
    notebook, path = disk.runs_dir(profile) / "06_figures.ipynb", disk.figures_dir(profile) / "index.html"
    if not notebook.is_file():
        return None
    import nbformat  # here, as tables do without them
    from nbconvert import HTMLExporter

    names = ("mathjax_url", "require_js_url", "jquery_url", "mermaid_js_url", "jupyter_widgets_base_url")
    exporter = HTMLExporter(exclude_input=True, embed_images=True, **dict.fromkeys(names, ""))
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    page, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4))
    page = page.replace(_from_runs(profile), "")  # it lies there itself
    page = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)  # of widgets and formulas, which it has none
    disk.write_bytes(page.encode(), path)
    return path


def rewrite(profile: str) -> None:
    """Make tables and figures in figures/<profile> anew from what is on disk.

    The same records give the same bytes. Without results the copied records are used, and Figure 1, whose images are
    not among them, stays as it is. Raises BadInput if there are no records at all.
    """
    folder = folder_of(profile)
    if folder == disk.results_dir(profile):
        copy_records(profile)
    there = {r["task"] for rows in read(profile, folder) for r in rows}
    for number in (about.number for task, about in TASKS.items() if task in there):
        _save_table(number, profile, folder)
    write_comparisons(profile, folder)
    draw_figure2(profile, folder)
    if evidence.current_examples(profile):
        draw_figure1(profile)


def summary(profile: str) -> str:
    """Closing lines of a run: the tables and figures there are and, for a small profile, how to run a larger one.

    Raises BadInput if nothing has been made.
    """
    folder = disk.figures_dir(profile)
    names = (*FILES, *(f"table{about.number}.md" for about in TASKS.values()))
    there = [(folder / name).relative_to(disk.ROOT).as_posix() for name in names if (folder / name).is_file()]
    if not there:
        raise BadInput(f"Profile '{profile}' has no tables or figures yet; run 'make paper PROFILE={profile}'.")
    lines = [f"Made for profile '{profile}' (tables also as .csv and .tex, figures as .pdf):"]
    lines += [f"  {path}" for path in there]
    if profile in SMALL:
        before = "'make plan PROFILE=quick DATA=FOLDER' and 'make data PROFILE=quick DATA=FOLDER'"
        larger = "'make paper PROFILE=quick DATA=FOLDER' (under an hour by the plan) or PROFILE=paper (all of it)"
        lines.append(f"This is the small profile '{profile}'; on a GPU, after {before}, run {larger}.")
    return "\n".join(lines)


def main(profile: str) -> str:
    """What `make paper` says at its end, after everything was made anew."""
    disk.keep_inside()
    rewrite(profile)
    write_page(profile)
    return "\n\n".join(filter(None, [summary(profile), committed.verdict(profile)]))


if __name__ == "__main__":
    any_terminal()
    try:
        print(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except BadInput as error:
        sys.exit(str(error))
