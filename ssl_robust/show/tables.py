"""Tables 1-3 as data and as text: values beside the paper's, daggers, spread over seeds, and the notes below them."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import quote

import pandas as pd

from .. import records as disk
from ..settings import BadInput, written
from ..tasks import TASKS
from ..trust import paired
from ..trust.claims import claims, sentence
from ..trust.evidence import CELL, reasons
from . import layout

Record = dict[str, Any]

REPORTED = pd.read_csv(disk.PACKAGE / "show" / "reported.csv")  # Tables 1-3 of the paper
KEYS = ["dataset", "encoder", "defense"]
ATTACKS = ["clean", "embed", "task"]  # what the paper reports
REPORTED_COLUMNS = ["table", *KEYS, "attack", "reported", "ours", "se", "n", "difference", "reach", "inside"]
DEFENSE = {"standard": "Standard", "deacl": "DeACL"}
ROUNDING = 0.005  # the paper prints two decimals
CODE_N = 1000  # test images of classification that the released code attacks
TEST_N = {"ade20k": 2000, "cityscapes": 500, "voc2012": 1449, "nyuv2": 654}  # images of the whole test sets
GAP = 0.0005  # of a value to the worst case: smaller ones are rounding
# the paper's names in the paper's order
ORDER = {key: list(REPORTED[key].unique()) for key in ("dataset", "encoder")} | {"defense": list(DEFENSE)}


def _place(row: Record | pd.Series) -> tuple[str, ...]:
    return tuple(row[key] for key in KEYS)


def _rank(row: Record) -> list[tuple[int, str]]:
    """Sorting key of a row: the paper's names in the paper's order, then the others by name."""
    return [(ORDER[key].index(row[key]) if row[key] in ORDER[key] else len(ORDER[key]), row[key]) for key in KEYS]


def in_order(records: Iterable[Record]) -> list[Record]:
    """Records in the order of the tables' rows."""
    return sorted(records, key=_rank)


def _strong(records: Iterable[Record]) -> list[str]:
    """Attack kinds beyond those of the paper and 'worst', by name."""
    return sorted({r["attack"] for r in records} - {*ATTACKS, "worst"})


def _kept(task: str, records: Iterable[Record]) -> list[Record]:
    """Records of the rows of a table, those between DeACL epochs left out, in the order of its rows and columns."""
    kept = [r for r in records if r["task"] == task and r["defense"] in DEFENSE]
    order = [*ATTACKS, *_strong(kept), "worst"]
    return sorted(kept, key=lambda r: (_rank(r), order.index(r["attack"])))


def _columns(strong: Sequence[str], seeds: bool) -> list[str]:
    kinds = [*ATTACKS, *strong, "worst"]
    spread = ["seeds", *(f"{kind}_{what}" for kind in kinds for what in ("seeds", "spread"))] if seeds else []
    reported = [f"reported_{attack}" for attack in ATTACKS]
    return [*KEYS, *kinds, *(f"{kind}_se" for kind in kinds), "n", "metric", *reported, "flags", *spread]


COLUMNS = _columns((), seeds=False)


def _add(row: Record, record: Record) -> None:
    """Put what one record says into its row."""
    kind, values = record["attack"], pd.Series([r["value"] for r in (record, *record.get("over_seeds", ()))])
    row |= {kind: record["value"], f"{kind}_se": record["se"], "n": min(record["n"], row.get("n", record["n"]))}
    row["seeds"] = max(len(values), row.get("seeds", 1))
    if len(values) > 1:
        row |= {f"{kind}_seeds": values.mean(), f"{kind}_spread": values.std()}
    if said := reasons(record):
        row["flags"] = f"{row['flags']} {kind}:{len(said)}".strip()


def table(task: str, records: Iterable[Record], skipped: Sequence[Record] = ()) -> pd.DataFrame:
    """Table of one task, a row for each (dataset, encoder, defense), with COLUMNS and those of further attacks.

    `clean`, `embed`, `task` are values of the metric (accuracy and mIoU in 0..1, RMSE in metres), `worst` that of the
    worst case per image over all attacks, further attacks stand between; `*_se` their standard errors, `n` the number
    of test images, `reported_*` the paper's value where it has that row; NaN: not run. `flags` counts the reasons for a
    dagger, 'task:2'. With several seeds: their number `seeds`, and of each value mean `*_seeds` and standard deviation
    `*_spread`. `skipped` (evidence.read_skipped) gives rows without values.
    """
    kept = _kept(task, records)
    asked = [*kept, *(row for row in skipped if row["task"] == task)]
    empty = {"metric": TASKS[task].metric, "flags": ""}
    rows = {_place(row): dict(zip(KEYS, _place(row), strict=True)) | empty for row in asked}
    for record in kept:
        _add(rows[_place(record)], record)
    wanted = _columns(_strong(kept), seeds=any(row.get("seeds", 1) > 1 for row in rows.values()))
    paper = REPORTED[REPORTED["task"] == task].drop(columns="task")
    found = pd.DataFrame(in_order(rows.values()), columns=[c for c in wanted if not c.startswith("reported_")])
    return found.merge(paper, on=KEYS, how="left")[wanted].astype({c: "Int64" for c in ("n", "seeds") if c in wanted})


def _reach(task: str, row: pd.Series, attack: str) -> float:
    """How far from the paper's value sampling error can take ours in 19 of 20 cases, the paper's own error included.

    Accuracy: from Wilson's intervals of both, put together as Newcombe does; the paper's is of CODE_N images. mIoU and
    RMSE, whose error depends on the images: the paper's is taken as ours, for as many images as the test set has.
    """
    ours, reported, n = row[attack], row[f"reported_{attack}"], row["n"]
    if pd.isna(ours):
        return math.nan
    if task != "classification":
        return paired.SURE * row[f"{attack}_se"] * (1 + n / TEST_N[row["dataset"]]) ** 0.5
    (_, low, high), (_, least, most) = paired.wilson(ours, n), paired.wilson(reported, CODE_N)
    return math.hypot(ours - low, most - reported) if ours > reported else math.hypot(high - ours, reported - least)


def _beside(task: str, row: pd.Series, attack: str) -> Record:
    """One value beside the paper's, as `comparison` has it."""
    ours, reported, reach = row[attack], row[f"reported_{attack}"], _reach(task, row, attack)
    inside = abs(ours - reported) <= reach + ROUNDING + 1e-9 if pd.notna(ours) else None
    judged = {"difference": ours - reported, "reach": reach, "inside": inside}
    return {"attack": attack, "reported": reported, "ours": ours, "se": row[f"{attack}_se"], **judged}


def comparison(task: str, records: Iterable[Record], skipped: Sequence[Record] = ()) -> pd.DataFrame:
    """A row for each value of a task that the paper reports too: REPORTED_COLUMNS; `difference` is ours - reported.

    `reach`: the largest difference that sampling error explains, see _reach; `inside`: the difference is at most that
    + 0.005. What was not run has no `ours`.
    """
    found = [
        {key: row[key] for key in [*KEYS, "n"]} | {"table": TASKS[task].number} | _beside(task, row, attack)
        for _, row in table(task, records, skipped).iterrows()
        for attack in ATTACKS
        if pd.notna(row[f"reported_{attack}"])
    ]
    return pd.DataFrame(found, columns=REPORTED_COLUMNS).astype({"inside": "boolean", "n": "Int64"})


def signed(difference: float, digits: int = 2) -> str:
    """'+0.03', '−0.01', '0.00'."""
    rounded = round(difference, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def _names(task: str, records: Iterable[Record]) -> dict[str, str]:
    """Attack kinds of a table with their headings, in the order of its columns; 'worst' if some record is of it."""
    kept = _kept(task, records)
    titles = {r["attack"]: r["attack_name"] for r in kept}
    worst = {"worst": "Worst"} if "worst" in titles else {}
    paper = {"clean": "Clean", "embed": "EmbedAttack", "task": TASKS[task].attack}
    return paper | {kind: titles[kind] for kind in _strong(kept)} | worst


def _row_name(row: Record) -> str:
    """'scenes/embedded_vit DeACL'."""
    return f"{row['dataset']}/{row['encoder']} {DEFENSE.get(row['defense'], row['defense'])}"


def unique(values: Iterable[Any]) -> list[Any]:
    """The values without repetition, in their order."""
    return list(dict.fromkeys(values))


def daggers(task: str, records: Iterable[Record]) -> list[tuple[Record, str]]:
    """Flagged records of a table with the sentence that gives the reasons; the first has †1, and so on."""
    headings, found = _names(task, records), []
    for record in (r for r in _kept(task, records) if reasons(r)):
        said = "; ".join(unique(reason.rstrip(".") for reason in reasons(record)))
        found.append((record, f"†{len(found) + 1} {_row_name(record)}, {headings[record['attack']]}: {said}."))
    return found


def _cell(task: str, row: pd.Series, attack: str, mark: str) -> str:
    """Value, standard error and dagger; below it the paper's value if it has one, and mean and spread of the seeds.

    '0.91 ± 0.01', '0.91 ± 0.01 †2\n(0.94, −0.03 ≠)\n(seeds: 0.90 ± 0.02, 3)', or 'not run\n(0.94)'.
    """
    reported, run = row.get(f"reported_{attack}"), pd.notna(row[attack])
    lines = [f"{row[attack]:.2f} ± {row[f'{attack}_se']:.2f} {mark}".rstrip() if run else "not run"]
    if pd.notna(reported):
        found = _beside(task, row, attack)
        lines.append(f"({reported:.2f}, {signed(found['difference'])} {'≈' if found['inside'] else '≠'})")
        lines[1] = lines[1] if run else f"({reported:.2f})"
    if pd.notna(mean := row.get(f"{attack}_seeds")):
        lines.append(f"(seeds: {mean:.2f} ± {row[f'{attack}_spread']:.2f}, {row['seeds']})")
    return "\n".join(lines)


def _linked(cell: str, record: Record | None, home: str, profile: str) -> str:
    """A cell whose value links to its record below `home`; pointing at it shows the command that makes it again."""
    if not home or record is None:
        return cell
    value, *more = cell.split("\n")
    names = [str(record[name]) for name in CELL]
    verb, given = "explain" if record["attack"] == "worst" else "remake", f" PROFILE={profile}" * (profile != "demo")
    place = "/".join([f"table{TASKS[names[0]].number}", *names[1:]]).replace('"', "'")
    link = f'[{value}]({quote(home + names[0] + "/" + "__".join(names[1:]))}.json "make {verb} CELL={place}{given}")'
    return "\n".join([link, *more])


def _readable(
    task: str, records: list[Record], numbers: pd.DataFrame, home: str = "", profile: str = ""
) -> pd.DataFrame:
    """The table as text for people: values with their standard errors, headings with the direction of better.

    `home`: the folder of the records, to which values are linked.
    """
    kept = {(*_place(r), r["attack"]): r for r in _kept(task, records)}
    marks = {(*_place(r), r["attack"]): said.split()[0] for r, said in daggers(task, records)}
    text = pd.DataFrame({"Dataset": numbers["dataset"], "Encoder": numbers["encoder"]})
    text["Defense"] = numbers["defense"].map(DEFENSE)
    for kind, name in _names(task, records).items():
        text[f"{name}, {TASKS[task].heading}"] = [
            _linked(_cell(task, row, kind, marks.get(at, "")), kept.get(at), home, profile)
            for _, row in numbers.iterrows()
            for at in [(*_place(row), kind)]
        ]
    return text.assign(n=numbers["n"].astype("string").fillna("–"))


# --- notes ---


def _protocol(record: Record) -> str:
    names = record.get("protocol", "paper")
    if names == "released":
        return "the authors' released code (all differences)"
    given = "" if names in ("paper", []) else f", but as in the authors' released code: {', '.join(names)}"
    return f"the paper's text{given}"


def _attack(record: Record) -> str:
    if record["attack"] not in ("embed", "task"):
        return ""
    attack = record["settings"]["attack"]
    kept = "the iterate of the largest loss" if attack.get("best") else "the last iterate"
    size = f"eps {written(attack['eps'])}, step {written(attack['step'])}, {attack['steps']} steps"
    return f"L-infinity in [0, 1] pixels, {size}, random start, {kept} is evaluated"


def _few(record: Record) -> str:
    there, asked = record.get("n_train", 0), record.get("n_train_asked", 0)
    if there + record["settings"]["task"].get("n_val", 0) >= asked:
        return ""
    return f"the head on {record['dataset']} was trained on {there:,} of {asked:,} images"


def _seeds(record: Record) -> str:
    further = [str(r["seed"]) for r in record.get("over_seeds", ())]
    return ", ".join([str(record["seed"]), *further]) if further else ""


def _older(record: Record) -> str:
    """The loops whose version was another when a record was made that was kept."""
    made = [loop for entry in record.get("kept", ()) for loop in entry["loops"].items()]
    return ", ".join(f"{loop} {n}" for loop, n in made if record["made_from"]["loops"].get(loop) != n)


FACTS: dict[str, Callable[[Record], str]] = {  # sentence: what each record has to put into it
    "Protocol: {}.": _protocol,
    "Attacks: {}.": _attack,
    "Attack steps are computed in {}, values in fp32.": lambda r: "bf16" if r.get("precision") == "bf16" else "",
    "{baseline}, of the training images: {}.": lambda r: f"{r['chance']:.2f} on {r['dataset']}",
    "Predictions that were not finite count as wrong: {}.": lambda r: (
        f"{r['nonfinite']} images of {_row_name(r)}, {r['attack_name']}" if r["nonfinite"] else ""
    ),
    "Rows on parts of the official data sets (counts: any): {}.": lambda r: (
        r["dataset"] if r.get("counts") == "any" else ""
    ),
    "Unreadable test images that were left out: {}.": lambda r: (
        f"{r['damaged']} on {r['dataset']}" if r.get("damaged") else ""
    ),
    "Fewer training images were there than asked for: {}.": _few,
    "Errors count inside the centre crop of Eigen et al. on {}.": lambda r: (
        r["dataset"] if r["settings"]["task"].get("crop") == "eigen" else ""
    ),
    "Seeds {}; in brackets mean ± standard deviation over heads and attacks made anew with each, and their number.": (
        _seeds
    ),
    "Some values were made by earlier versions of the code ({}) and kept (make keep).": _older,
}


def _mixed(kept: list[Record]) -> list[str]:
    """What values of one table were made with, where that is not the same for all: no key holds it."""
    made = pd.json_normalize([{name: r.get(name) for name in ("versions", "device", "threads")} for r in kept])
    found = {name: values.astype(str).unique() for name, values in made.items()}
    mixed = [f"{name} ({', '.join(values)})" for name, values in found.items() if len(values) > 1]
    return [f"Not all values were made with the same: {'; '.join(mixed)}."] if mixed else []


def _worst(task: str, kept: list[Record]) -> list[str]:
    """What Worst is, and how far the task attack's value is from it."""
    values = {(_place(r), r["attack"]): r["value"] for r in kept}
    worst = [r for r in kept if r["attack"] == "worst"]
    if not worst:
        return []
    others = ", ".join(name for kind, name in _names(task, kept).items() if kind != "worst")
    checked = max(r.get("checked", 0) for r in worst)
    words = f"Worst: for each image the worst result of {others}"
    words += f"; of the first {checked} also of the attacks of 07_sanity." if checked else "."
    gaps = {_row_name(r): TASKS[task].sign * (values.get((_place(r), "task"), math.nan) - r["value"]) for r in worst}
    real = {name: gap for name, gap in gaps.items() if gap > GAP}
    if not real:
        return [words]
    most = max(real, key=real.get)
    over = f"overstates robustness in {len(real)} of {len(gaps)} rows, by up to {real[most]:.3f} ({most})"
    return [words, f"{TASKS[task].attack} alone {over}."]


def _comparison_words(task: str, compared: pd.DataFrame) -> list[str]:
    """What the brackets mean and how often the value lies inside; nothing without a row of the paper."""
    if compared.empty:
        return []
    judged, images = compared["inside"].dropna(), f"{CODE_N} images" if task == "classification" else "its test set"
    error = f"if the sampling error of both (the paper's: of {images}) explains it in 19 of 20 cases, or its rounding"
    count = f"{judged.sum()} of {len(judged)} values are ≈"
    return [f"In brackets: the paper's value, then the difference (ours − the paper's), ≈ {error}, ≠ if not; {count}."]


def _skipped_words(task: str, kept: list[Record], skipped: Sequence[Record]) -> list[str]:
    """One sentence for each reason, with the rows it stopped; rows that have values are not among them."""
    run, stopped = {_place(r) for r in kept}, {}
    for row in (row for row in skipped if row["task"] == task and _place(row) not in run):
        stopped.setdefault(row["why"].rstrip("."), []).append(_row_name(row))
    return [f"Not run: {', '.join(names)}, because: {why}." for why, names in stopped.items()]


def _paired_words(task: str, kept: list[Record]) -> list[str]:
    """DeACL against Standard, a sentence for each row."""
    headings, found = _names(task, kept), {}
    for row in paired.differences(kept).itertuples():
        number = f"{headings[row.attack]} {signed(row.difference)} [{signed(row.low)}, {signed(row.high)}]"
        found.setdefault(f"{row.dataset}/{row.encoder}", []).append(number)
    rule = "with 95 % intervals of a bootstrap over the same images"
    return [f"DeACL − Standard on {row}, {rule}: {', '.join(numbers)}." for row, numbers in found.items()]


def notes(task: str, records: list[Record], skipped: Sequence[Record] = ()) -> layout.Notes:
    """What is to be said below a table: daggers, how it was measured, and the claims as they show here."""
    kept, change = _kept(task, records), [r["max_perturbation"] for r in records if r["task"] == task]
    measured = ["Value ± standard error over n test images, the same ones clean and attacked."] if kept else []
    for words, said in FACTS.items():
        if values := unique(filter(None, map(said, kept))):
            measured.append(words.format(", ".join(values), baseline=TASKS[task].baseline))
    if max(change, default=0):
        measured.append(f"Largest change of any pixel: {written(max(change))}.")
    measured += [*_mixed(kept), *_worst(task, kept), *_comparison_words(task, comparison(task, records, skipped))]
    found = {
        "Flagged values": [said for _, said in daggers(task, records)],
        "How it was measured": measured,
        "Not run": _skipped_words(task, kept, skipped),
        "What it says of the claims": [sentence(claim) for claim in claims(in_order(records), task)],
        "DeACL against Standard": _paired_words(task, kept),
    }
    return {heading: sentences for heading, sentences in found.items() if sentences}


def csv(numbers: pd.DataFrame) -> str:
    """A data frame as CSV with six decimals, the same bytes on every system."""
    return numbers.to_csv(index=False, float_format="%.6f", lineterminator="\n")


def table_files(
    number: int, records: list[Record], skipped: Sequence[Record] = (), home: str = "", profile: str = ""
) -> dict[str, str]:
    """Content of table<number> as {'csv', 'md', 'tex', 'notes.tex'}, the same bytes for the same records.

    `home`: where the Markdown finds the records of `profile`, to which it links each value; '': nowhere. Raises
    BadInput if `number` is not 1, 2 or 3 or if its task has neither a record nor a skipped row.
    """
    tasks = {about.number: task for task, about in TASKS.items()}
    if number not in tasks:
        raise BadInput(f"There is no table {number}; ask for 1 (classification), 2 (segmentation) or 3 (depth).")
    task = tasks[number]
    numbers = table(task, records, skipped)
    if numbers.empty:
        raise BadInput(f"Table {number} has no records; run notebook {TASKS[task].notebook} first, or 'make paper'.")
    title, below = f"Table {number}. {TASKS[task].title}", notes(task, records, skipped)
    return {
        "csv": csv(numbers),
        "md": layout.markdown(title, _readable(task, records, numbers, home, profile), below),
        "tex": layout.latex(title, f"tab:{task}", _readable(task, records, numbers)),
        "notes.tex": layout.latex_notes(below),
    }


def effect_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one task as text: the paper's protocol first, then each other's values and their change against it."""
    text, about = pd.DataFrame({"Protocol": rows["protocol"]}), TASKS[rows["task"].iloc[0]]
    for column, name in zip(["clean", "embed", "attack"], ["Clean", "EmbedAttack", about.attack], strict=True):
        cells = zip(rows[column], rows[f"{column}_se"], rows[column] - rows[column].iloc[0], strict=True)
        text[f"{name}, {about.heading}"] = [f"{value:.3f} ± {se:.3f} ({signed(by, 3)})" for value, se, by in cells]
    return text
