"""Tables 1-3 as data and as text: values beside the paper's, daggers, spread over seeds, and the notes below them."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from .. import records as disk
from ..settings import BadInput
from ..tasks import TASKS
from ..trust import paired
from ..trust.claims import FEW, claims, sentence
from ..trust.evidence import reasons, seed_values
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


def title(task: str) -> str:
    """'Table 1. Linear classification under attack'."""
    return f"Table {TASKS[task].number}. {TASKS[task].title}"


# the paper's names in the paper's order
ORDER = {key: list(REPORTED[key].unique()) for key in ("dataset", "encoder")} | {"defense": list(DEFENSE)}


def _rank(row: Record) -> list[tuple[int, str]]:
    """Sorting key of a row: the paper's names in the paper's order, then the others by name."""
    return [(ORDER[key].index(row[key]) if row[key] in ORDER[key] else len(ORDER[key]), row[key]) for key in KEYS]


def in_order(records: Iterable[Record]) -> list[Record]:
    """Records in the order of the tables' rows."""
    return sorted(records, key=_rank)


def strong_kinds(records: Iterable[Record]) -> list[str]:
    """Attack kinds beyond those of the paper and 'worst', by name."""
    return sorted({r["attack"] for r in records} - {*ATTACKS, "worst"})


def columns(strong: Sequence[str] = (), seeds: bool = False) -> list[str]:
    """Columns of a table with these further attacks, and with those of the seeds if there are several."""
    kinds = [*ATTACKS, *strong, "worst"]
    spread = ["seeds", *(f"{kind}_{what}" for kind in kinds for what in ("seeds", "spread"))] if seeds else []
    reported = [f"reported_{attack}" for attack in ATTACKS]
    return [*KEYS, *kinds, *(f"{kind}_se" for kind in kinds), "n", "metric", *reported, "flags", *spread]


COLUMNS = columns()


def _kept(task: str, records: Iterable[Record]) -> list[Record]:
    """Records of the rows of a table, those between DeACL epochs left out, in the order of its rows and columns."""
    kept = [r for r in records if r["task"] == task and r["defense"] in DEFENSE]
    order = [*ATTACKS, *strong_kinds(kept), "worst"]
    return sorted(kept, key=lambda r: (_rank(r), order.index(r["attack"])))


def _measured(record: Record) -> dict[str, Any]:
    """What one record puts into its row."""
    kind, values = record["attack"], pd.Series(seed_values(record))
    found = {kind: record["value"], f"{kind}_se": record["se"]}
    if len(values) > 1:
        found |= {f"{kind}_seeds": values.mean(), f"{kind}_spread": values.std()}
    return found


def _rows(task: str, records: Iterable[Record], skipped: Sequence[Record]) -> list[Record]:
    rows: dict[tuple[str, ...], Record] = {}
    for record in records:
        place = {key: record[key] for key in [*KEYS, "metric"]}
        row = rows.setdefault(tuple(record[key] for key in KEYS), place | {"flags": []})
        row |= _measured(record)
        row["n"] = min(record["n"], row.get("n", record["n"]))
        count = len(seed_values(record))
        row["seeds"] = max(count, row.get("seeds", count))
        if said := reasons(record):
            row["flags"].append(f"{record['attack']}:{len(said)}")
    for row in (row for row in skipped if row["task"] == task):
        empty = {key: row[key] for key in KEYS} | {"metric": TASKS[task].heading.split()[0], "n": None, "flags": []}
        rows.setdefault(tuple(row[key] for key in KEYS), empty)
    return [row | {"flags": " ".join(row["flags"])} for row in sorted(rows.values(), key=_rank)]


def table(task: str, records: Iterable[Record], skipped: Sequence[Record] = ()) -> pd.DataFrame:
    """Table of one task, a row for each (dataset, encoder, defense), with COLUMNS or what `columns` gives.

    `clean`, `embed`, `task` are values of the metric (accuracy and mIoU in 0..1, RMSE in metres), `worst` that of the
    worst case per image over all attacks, further attacks stand between; `*_se` their standard errors, `n` the number
    of test images, `reported_*` the paper's value where it has that row; NaN: not run. `flags` counts the reasons for a
    dagger, 'task:2'. With several seeds: their number `seeds`, and of each value mean `*_seeds` and standard deviation
    `*_spread`. `skipped` (evidence.read_skipped) gives rows without values.
    """
    kept = _kept(task, records)
    strong, rows = strong_kinds(kept), _rows(task, kept, skipped)
    wanted = columns(strong, seeds=any(row.get("seeds", 1) > 1 for row in rows))
    text = [*KEYS, "metric", "flags"]
    measured = pd.DataFrame(rows, columns=[c for c in wanted if not c.startswith("reported_")])
    values = [c for c in measured.columns if c not in (*text, "n", "seeds")]
    measured[values] = measured[values].astype(float)
    measured = measured.astype({c: "Int64" for c in ("n", "seeds") if c in measured})
    paper = REPORTED[REPORTED["task"] == task].drop(columns="task")
    paper.columns = [*KEYS, *(f"reported_{attack}" for attack in ATTACKS)]
    return measured.merge(paper, on=KEYS, how="left")[wanted]


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


def _inside(task: str, row: pd.Series, attack: str) -> bool:
    """Whether our value lies within `_reach` of the paper's, its rounding allowed."""
    return abs(row[attack] - row[f"reported_{attack}"]) <= _reach(task, row, attack) + ROUNDING + 1e-9


def comparison(task: str, records: Iterable[Record], skipped: Sequence[Record] = ()) -> pd.DataFrame:
    """A row for each value of a task that the paper reports too: REPORTED_COLUMNS; `difference` is ours - reported.

    `reach`: the largest difference that sampling error explains, see _reach; `inside`: the difference is at most that
    + 0.005. What was not run has no `ours`.
    """
    found = []
    for _, row in table(task, records, skipped).iterrows():
        for attack in (attack for attack in ATTACKS if pd.notna(row[f"reported_{attack}"])):
            about = {key: row[key] for key in [*KEYS, "n"]} | {"table": TASKS[task].number - 1 + 1, "attack": attack}
            about |= {"reported": row[f"reported_{attack}"], "ours": row[attack], "se": row[f"{attack}_se"]}
            about |= {"difference": row[attack] - row[f"reported_{attack}"], "reach": _reach(task, row, attack)}
            found.append(about | {"inside": _inside(task, row, attack) if pd.notna(row[attack]) else None})
    return pd.DataFrame(found, columns=REPORTED_COLUMNS).astype({"inside": "boolean", "n": "Int64"})


def _signed(difference: float, digits: int = 2) -> str:
    """'+0.03', '−0.01', '0.00'."""
    rounded = round(difference, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def names(task: str, records: Iterable[Record]) -> dict[str, str]:
    """Attack kinds of a table with their headings, in the order of its columns; 'worst' if some record is of it."""
    kept = _kept(task, records)
    titles = {r["attack"]: r["attack_name"] for r in kept}
    strong = {kind: titles[kind] for kind in strong_kinds(kept)}
    worst = {"worst": "Worst"} if any(r["attack"] == "worst" for r in kept) else {}
    return {"clean": "Clean", "embed": "EmbedAttack", "task": TASKS[task].attack, **strong, **worst}


def row_name(record: Record) -> str:
    """'scenes/embedded_vit DeACL'."""
    return f"{record['dataset']}/{record['encoder']} {DEFENSE.get(record['defense'], record['defense'])}"


def daggers(task: str, records: Iterable[Record]) -> list[tuple[Record, str]]:
    """Flagged records of a table with the sentence that gives the reasons; the first has †1, and so on."""
    headings, found = names(task, records), []
    for record in (r for r in _kept(task, records) if reasons(r)):
        said = "; ".join(unique(reason.rstrip(".") for reason in reasons(record)))
        number = f"†{len(found) + 1}"
        found.append((record, f"{number} {row_name(record)}, {headings[record['attack']]}: {said}."))
    return found


def _marks(task: str, records: Iterable[Record]) -> dict[tuple[str, ...], str]:
    """(dataset, encoder, defense, attack): '†1'."""
    found = daggers(task, records)
    return {tuple(r[key] for key in [*KEYS, "attack"]): said.split()[0] for r, said in found}


def _brackets(task: str, row: pd.Series, attack: str) -> str:
    """The line below a value: the paper's value, the difference and whether it is inside (≈) or not; '' without one."""
    reported = row.get(f"reported_{attack}")
    if pd.isna(reported):
        return ""
    if pd.isna(row[attack]):
        return f"\n({reported:.2f})"
    return f"\n({reported:.2f}, {_signed(row[attack] - reported)} {'≈' if _inside(task, row, attack) else '≠'})"


def _cell(task: str, row: pd.Series, attack: str, mark: str = "") -> str:
    """Value, standard error and dagger; below it the paper's value if it has one, and mean and spread of the seeds.

    '0.91 ± 0.01', '0.91 ± 0.01 †2\\n(0.94, −0.03 ≠)\\n(seeds: 0.90 ± 0.02, 3)', or 'not run\\n(0.94)'.
    """
    if pd.isna(row[attack]):
        return "not run" + _brackets(task, row, attack)
    value = f"{row[attack]:.2f} ± {row[f'{attack}_se']:.2f}{' ' * bool(mark)}{mark}"
    mean = row.get(f"{attack}_seeds")
    seeds = "" if pd.isna(mean) else f"\n(seeds: {mean:.2f} ± {row[f'{attack}_spread']:.2f}, {row['seeds']})"
    return value + _brackets(task, row, attack) + seeds


def readable(task: str, records: list[Record], skipped: Sequence[Record] = ()) -> pd.DataFrame:
    """The table as text for people: values with their standard errors, headings with the direction of better."""
    numbers, marks = table(task, records, skipped), _marks(task, records)
    text = numbers[["dataset", "encoder"]].assign(defense=numbers["defense"].map(DEFENSE))
    text.columns = ["Dataset", "Encoder", "Defense"]
    for kind, name in names(task, records).items():
        places = numbers[KEYS].itertuples(index=False, name=None)
        pairs = zip(numbers.iterrows(), places, strict=True)
        text[f"{name}, {TASKS[task].heading}"] = [
            _cell(task, row, kind, marks.get((*place, kind), "")) for (_, row), place in pairs
        ]
    return text.assign(n=["–" if pd.isna(n) else str(n) for n in numbers["n"]])


def _pixels(budget: float) -> str:
    """A change of a pixel in the usual unit: 0.031372 -> '8/255'."""
    return f"{budget * 255:.3g}/255"


def _attack_words(attack: dict[str, Any]) -> str:
    kept = "the iterate of the largest loss" if attack.get("best") else "the last iterate"
    size = f"eps {_pixels(attack['eps'])}, step {_pixels(attack['step'])}, {attack['steps']} steps"
    return f"Attacks: L-infinity in [0, 1] pixels, {size}, random start, {kept} is evaluated."


def unique(values: Iterable[Any]) -> list[Any]:
    """The values without repetition, in their order."""
    return list(dict.fromkeys(values))


def _protocol_words(protocol: str | list[str]) -> str:
    if protocol == "released":
        return "Protocol: the authors' released code (all differences)."
    if protocol == "paper" or not protocol:
        return "Protocol: the paper's text."
    return f"Protocol: the paper's text, but as in the authors' released code: {', '.join(protocol)}."


def _data_words(kept: list[Record]) -> list[str]:
    """What sets the images apart from the whole official test set."""
    parts = ", ".join(unique(r["dataset"] for r in kept if r.get("counts") == "any"))
    cropped = ", ".join(unique(r["dataset"] for r in kept if r["settings"]["task"].get("crop") == "eigen"))
    damaged = ", ".join(unique(f"{r['damaged']} on {r['dataset']}" for r in kept if r.get("damaged")))
    words = [f"Rows on parts of the official data sets (counts: any): {parts}."] if parts else []
    words += [f"Unreadable test images that were left out: {damaged}."] if damaged else []
    words += unique(
        f"Fewer training images were there than asked for: the head on {r['dataset']} was trained on "
        f"{r['n_train']:,} of {r['n_train_asked']:,} images."
        for r in kept
        if r.get("n_train", 0) + r["settings"]["task"].get("n_val", 0) < r.get("n_train_asked", 0)
    )
    return words + ([f"Errors count inside the centre crop of Eigen et al. on {cropped}."] if cropped else [])


def _comparison_words(task: str, compared: pd.DataFrame) -> list[str]:
    """What the brackets mean and how often the value lies inside; nothing without a row of the paper."""
    if compared.empty:
        return []
    error = "taken as ours, for as many images as the test set has"
    if task == "classification":
        error = f"that of {CODE_N} images, as many as its code attacks; Wilson's intervals"
    rule = (
        f"≈ if the sampling error of both explains it in 19 of 20 cases (the paper's: {error}) or its rounding does, "
        "≠ if not"
    )
    judged = compared["inside"].dropna()
    count = f"{judged.sum()} of {len(judged)} values are ≈" if len(judged) else "none of them was run"
    return [f"In brackets: the paper's value, then the difference (ours − the paper's), {rule}; {count}."]


def _skipped_words(task: str, kept: list[Record], skipped: Sequence[Record]) -> list[str]:
    """One sentence for each reason, with the rows it stopped; rows that have values are not among them."""
    run = {tuple(r[key] for key in KEYS) for r in kept}
    stopped: dict[str, list[str]] = {}
    for row in skipped:
        if row["task"] == task and tuple(row[key] for key in KEYS) not in run:
            name = f"{row['dataset']}/{row['encoder']} {DEFENSE.get(row['defense'], row['defense'])}"
            stopped.setdefault(row["why"].rstrip("."), []).append(name)
    return [f"Not run: {', '.join(names)}, because: {why}." for why, names in stopped.items()]


def _overstated(task: str, kept: list[Record]) -> list[str]:
    """What Worst is, and how far the task attack's value is from it; for many rows as a range."""
    cells = {(*(r[key] for key in KEYS), r["attack"]): r for r in kept}
    sign, gaps = -1 if task == "depth" else 1, {}
    for (*place, kind), worst in cells.items():
        alone = cells.get((*place, "task"))
        if kind == "worst" and alone:
            gaps[row_name(worst)] = sign * (alone["value"] - worst["value"])
    if not gaps:
        return []
    others = ", ".join(name for kind, name in names(task, kept).items() if kind != "worst")
    n = max(r.get("checked", 0) for r in kept if r["attack"] == "worst")
    further = f"; of the first {n} also of 07_sanity's attacks (noise, more steps and starts, transferred images)"
    return [f"Worst: for each image the worst result of {others}{further if n else ''}. {_gap_words(task, gaps)}"]


def _gap_words(task: str, gaps: dict[str, float]) -> str:
    real = {row: gap for row, gap in gaps.items() if gap > GAP}
    if not real:
        side = "below" if task == "depth" else "above"
        return f"{TASKS[task].attack} alone leaves nothing {side} Worst (all gaps < {GAP})."
    numbers = ", ".join(f"{gap:.3f} in {row}" for row, gap in real.items())
    if len(real) > FEW:
        ranked = sorted(real, key=real.get)
        least, middle, most = (f"{real[row]:.3f} in {row}" for row in (ranked[0], ranked[len(real) // 2], ranked[-1]))
        numbers = f"{least} (the least of {len(real)} rows), {middle} (the middle), {most} (the most)"
    lies = f"its {TASKS[task].heading[:-2]} lies {'below' if task == 'depth' else 'above'} Worst by"
    rest = f"; elsewhere by less than {GAP}" if len(real) < len(gaps) else ""
    return f"{TASKS[task].attack} alone overstates robustness: {lies} {numbers}{rest}."


def _seed_words(kept: list[Record]) -> list[str]:
    seeds = unique(str(s["seed"]) for r in kept for s in [r, *r.get("over_seeds", ())])
    if len(seeds) < 2 or not any(r.get("over_seeds") for r in kept):
        return []
    rule = "mean ± standard deviation over heads and attacks made anew with each seed, and how many there are"
    return [f"Seeds {', '.join(seeds)}; in brackets {rule}."]


def _paired_words(task: str, kept: list[Record]) -> list[str]:
    """DeACL against Standard, a sentence for each row."""
    found, headings = paired.differences(kept), names(task, kept)
    sentences = []
    for (dataset, encoder), row in found.groupby(["dataset", "encoder"], sort=False):
        row = row.assign(order=row["attack"].map(list(headings).index)).sort_values("order")
        numbers = [
            f"{headings[r.attack]} {_signed(r.difference)} [{_signed(r.low)}, {_signed(r.high)}]"
            for r in row.itertuples()
        ]
        sentences.append(f"DeACL − Standard on {dataset}/{encoder}: {', '.join(numbers)}.")
    if sentences:
        how = "; a negative one is a gain" if task == "depth" else ""
        rule = "Differences of the table's values with their 95 % interval: paired bootstrap over the same images"
        sentences.insert(0, f"{rule}{how}.")
    return sentences


def notes(task: str, records: list[Record], skipped: Sequence[Record] = ()) -> layout.Notes:
    """What is to be said below a table: daggers, how it was measured, and the claims as they show here."""
    kept = _kept(task, records)
    found = {
        "Flagged values": [sentence for _, sentence in daggers(task, records)],
        "How it was measured": _measured_words(task, kept, comparison(task, records, skipped)),
        "Not run": _skipped_words(task, kept, skipped),
        "What it says of the claims": [sentence(c) for c in claims(in_order(records), task)],
        "DeACL against Standard": _paired_words(task, kept),
    }
    return {heading: sentences for heading, sentences in found.items() if sentences}


def _measured_words(task: str, kept: list[Record], compared: pd.DataFrame) -> list[str]:
    """One sentence of protocol, then what it takes to read the values."""
    attacked = [r for r in kept if r["attack"] != "clean"]
    protocol = ["Value ± standard error over n test images, the same ones clean and attacked."] if kept else []
    protocol += unique(_protocol_words(r.get("protocol", "paper")) for r in kept)
    protocol += unique(_attack_words(r["settings"]["attack"]) for r in attacked if r["attack"] in ATTACKS)
    if any(r.get("precision") == "bf16" for r in attacked):
        protocol.append("Attack steps are computed in bf16, values in fp32.")
    if attacked:
        protocol.append(f"Largest change of any pixel: {_pixels(max(r['max_perturbation'] for r in attacked))}.")
    sentences = [" ".join(protocol)] if protocol else []
    if chances := ", ".join(unique(f"{r['chance']:.2f} on {r['dataset']}" for r in kept)):
        sentences.append(f"{TASKS[task].baseline}, of the training images: {chances}.")
    if nonfinite := sum(r["nonfinite"] for r in kept):
        sentences.append(f"Warning: predictions for {nonfinite} images were not finite and count as wrong.")
    return sentences + [
        *_mixed_words(kept), *_data_words(kept), *_overstated(task, kept), *_seed_words(kept),
        *_comparison_words(task, compared),
    ]  # fmt: skip


def _mixed_words(kept: list[Record]) -> list[str]:
    """What values of one table were made with, where that is not the same for all: no key holds it."""
    names = dict.fromkeys(name for r in kept for name in r.get("versions", {}))
    found = {f"versions of {name}": [r.get("versions", {}).get(name) for r in kept] for name in names}
    found |= {"devices": [r.get("device") for r in kept], "numbers of threads": [r.get("threads") for r in kept]}
    mixed = {what: Counter(map(str, values)) for what, values in found.items() if len(set(values)) > 1}
    said = [
        f"Values were made with different {what}: {', '.join(f'{value} ({n})' for value, n in counted.most_common())}."
        for what, counted in mixed.items()
    ]
    older = [sorted(f"{loop} {n}" for entry in r["kept"] for loop, n in _before(entry, r)) for r in kept if "kept" in r]
    if older := [words for words in older if words]:
        versions = ", ".join(unique(word for words in older for word in words))
        said.append(f"{len(older)} values were made by earlier versions of the code ({versions}) and kept (make keep).")
    return said


def _before(entry: dict[str, Any], record: Record) -> list[tuple[str, int]]:
    """The loops whose version was another when a record was made that was kept."""
    return [(loop, n) for loop, n in entry["loops"].items() if record["made_from"]["loops"].get(loop) != n]


def csv(numbers: pd.DataFrame) -> str:
    """A data frame as CSV with six decimals, the same bytes on every system."""
    return numbers.to_csv(index=False, float_format="%.6f", lineterminator="\n")


def table_files(number: int, records: list[Record], skipped: Sequence[Record] = ()) -> dict[str, str]:
    """Content of table<number> as {'csv', 'md', 'tex'}, the same bytes for the same records (evidence.read).

    Raises BadInput if `number` is not 1, 2 or 3 or if its task has neither a record nor a skipped row.
    """
    if number not in (1, 2, 3):
        raise BadInput(f"There is no table {number}; ask for 1 (classification), 2 (segmentation) or 3 (depth).")
    task = [*TASKS][number - 1]
    numbers = table(task, records, skipped)
    if numbers.empty:
        raise BadInput(
            f"Table {number} has no records; run notebook 0{number + 2}_attack_{task} first, or 'make paper'."
        )
    shown = title(task), readable(task, records, skipped), notes(task, records, skipped)
    return {"csv": csv(numbers), "md": layout.markdown(*shown), "tex": layout.latex(*shown)}


def effect_rows(effects: pd.DataFrame, task: str) -> pd.DataFrame:
    """Rows of one task as text: the paper's protocol first, then each other's values and their change against it."""
    rows = effects[effects["task"] == task]
    text = pd.DataFrame({"Protocol": rows["protocol"]})
    for column, name in zip(["clean", "embed", "attack"], ["Clean", "EmbedAttack", TASKS[task].attack], strict=True):
        changes = rows[column] - rows[column].iloc[0]
        pairs = zip(rows[column], rows[f"{column}_se"], changes, strict=True)
        text[f"{name}, {TASKS[task].heading}"] = [
            f"{value:.3f} ± {se:.3f} ({_signed(change, 3)})" for value, se, change in pairs
        ]
    return text
