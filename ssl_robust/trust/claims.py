"""The paper's claims (a)-(e), judged on whatever was run: each verdict is computed from the records, none is typed.

A quantity counts where its whole 95 % interval lies beyond its threshold, of differences and shares that of a paired
bootstrap over the same images (paired.py). In between it is undecided, as it is where an attack is flagged and of
encoders that do no better than a constant prediction on clean images. RMSE counts with its sign turned, so that a gain
is always an improvement.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from ..tasks import TASKS
from . import paired
from .evidence import reasons
from .paired import Estimate

Record = dict[str, Any]
Cells = dict[tuple[str, str, str, str], Record]

NAMES = {"clean": "clean", "embed": "EmbedAttack", "worst": "Worst"}
LEFT = 1 / 10  # an attack that leaves at most this share of the lead over a constant prediction has broken the model
PART = 1 / 3  # recovering more than this share of what an attack took is 'much', less is 'hardly'
MOST = 1 / 2
FEW = 6  # so many cases are listed with their numbers, more are counted
EARLY = 10  # epochs; of a run shorter than twice that, the first half is looked at instead
SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
COLUMNS = ["claim", "task", "row", "verdict", "value", "low", "high", "threshold", "words"]
TEXTS = {
    "a": "EmbedAttack and the task's own attack both break every Standard encoder",
    "b": "DeACL recovers much of what EmbedAttack takes",
    "c": "DeACL hardly helps against the task's own attack",
    "d": "DeACL costs clean performance",
    "e": "Most of the gain against EmbedAttack comes early in DeACL",
}
RULES = (
    "A verdict needs the whole 95 % interval on one side of its threshold; otherwise it is undecided, as it is where "
    "an attack is flagged (†) or an encoder does no better on clean images than the majority or mean baseline. Of "
    "several rows all must support a claim, and one can refute it.",
    "(a) An attack has broken an encoder if it leaves at most a tenth of the lead over the baseline (RMSE: or if the "
    "error at least doubles).",
    "(b) More, (c) less than a third of what the attack takes from Standard must be won back by DeACL; (d) the clean "
    "value must get worse; (e) more than half of the final gain must be there after 10 epochs, or after half of a run "
    "of less than 20.",
    "With Worst: the same of the worst case over all attacks, in the place of the task's own attack.",
)


class Row(NamedTuple):
    """One judged case: its name, whether the claim holds in it (None: undecided), the numbers or the reason."""

    name: str
    holds: bool | None
    words: str
    found: Estimate | None = None
    threshold: float | None = None


class Claim(NamedTuple):
    """A claim about one task with its cases, and those with the worst case in the task attack's place, if known."""

    letter: str
    text: str
    rows: list[Row]
    worst: list[Row]


def verdict(rows: list[Row]) -> str:
    """'supported' if all rows are, 'refuted' if one is, else 'undecided'."""
    if any(row.holds is False for row in rows):
        return REFUTED
    return SUPPORTED if all(row.holds for row in rows) else UNDECIDED


def _counted(rows: list[Row]) -> str:
    """The verdict, of several rows with how many give it: 'refuted (in 2 of 8 rows)'."""
    found, each = verdict(rows), [verdict([row]) for row in rows]
    return found if len(rows) == 1 else f"{found} (in {each.count(found)} of {len(rows)} rows)"


def _details(rows: list[Row]) -> str:
    """Behind a semicolon every case with its numbers; of more than FEW those that are not like most, by name."""
    if len(rows) <= FEW:
        return "; " + "; ".join(row.name + row.words for row in rows)
    kinds = {word: [r.name for r in rows if verdict([r]) == word] for word in (REFUTED, UNDECIDED, SUPPORTED)}
    del kinds[max(kinds, key=lambda word: len(kinds[word]))]
    return "".join(f"; {word} in {', '.join(names)}" for word, names in kinds.items() if names)


def sentence(claim: Claim) -> str:
    """'(b) DeACL recovers ...: supported; its numbers.', and what becomes of it with the worst case if that differs."""
    said = f"({claim.letter}) {claim.text}: {_counted(claim.rows)}{_details(claim.rows)}."
    if not claim.worst:
        return said
    if verdict(claim.worst) == verdict(claim.rows):
        return f"{said} With Worst: {verdict(claim.worst)}, too."
    return f"{said} With Worst: {_counted(claim.worst)}{_details(claim.worst)}."


def _turned(found: Estimate, sign: int) -> Estimate:
    return Estimate(sign * found.value, *sorted((sign * found.low, sign * found.high)))


def _gain(before: Record, after: Record) -> Estimate:
    """Improvement from `before` to `after`, two records of the same images, in the metric's units."""
    return _turned(paired.difference(before, after), TASKS[before["task"]].sign)


def _row(name: str, found: Estimate, threshold: float, words: str, above: bool = True) -> Row:
    """A case that holds if the quantity is larger than `threshold`, without `above` if smaller; undecided between."""
    beyond = True if found.low > threshold else False if found.high < threshold else None  # None: or it is not defined
    return Row(name, beyond if beyond is None else beyond == above, words, found, threshold)


def _number(value: float, form: str) -> str:
    """'0.20', '33%'; a minus is one, and there is none before 0."""
    text = f"{value:{form}}"
    return text.replace("-", "−" if text.strip("-0.%") else "")


def _interval(found: Estimate, form: str = ".2f") -> str:
    """'0.20 [0.10, 0.31]', as per cent '33% [12%, 54%]'."""
    value, low, high = (_number(number, form) for number in found)
    return f"{value} [{low}, {high}]"


def _name(record: Record) -> str:
    own = TASKS[record["task"]].attack if record["attack"] == "task" else record["attack_name"]
    return NAMES.get(record["attack"], own)


def _no_better(clean: Record) -> bool:
    """Whether a clean value is no better than a constant prediction, as far as its interval tells."""
    sign = TASKS[clean["task"]].sign
    return _turned(paired.interval(clean), sign).low <= sign * clean["chance"]


def _doubt(*used: Record | None, useful: tuple[Record | None, ...] = ()) -> str:
    """Why a case must stay undecided, '' if it need not: something is missing or flagged, or an encoder is no use."""
    if any(record is None for record in (*used, *useful)):
        return ": a value that it needs was not run"
    if flagged := " and ".join(dict.fromkeys(name for record in used for name in _flagged(record))):
        return f": it rests on a flagged attack (†), {flagged}"
    for clean in filter(_no_better, useful):
        who = "Standard" if clean["defense"] == "standard" else "DeACL"
        return f": {who} is not clearly better than the baseline ({clean['value']:.2f}, baseline {clean['chance']:.2f})"
    return "" if len(used) < 2 or paired.comparable(*used) else ": its values are not of the same images, or of one"


def _flagged(record: Record) -> list[str]:
    """Names of flagged attacks that a value rests on: its own, or of the worst case all that it is made of."""
    return record.get("rests_on", [_name(record)] if reasons(record) else [])


def _each(cells: Cells, defense: str, attack: str) -> Iterator[tuple[str, dict[tuple[str, str], Record]]]:
    """Name and records, by (defense, attack), of each data set and encoder that has this cell."""
    for dataset, encoder, *kind in cells:
        if kind == [defense, attack]:
            yield f"{dataset}/{encoder}", {key[2:]: r for key, r in cells.items() if key[:2] == (dataset, encoder)}


def _broken(name: str, own: dict[tuple[str, str], Record], attack: str) -> Row:
    """Whether Standard is beyond the limit: LEFT of the lead over the baseline, or twice the clean error."""
    clean, attacked = own["standard", "clean"], own.get(("standard", attack))
    name = f"{name} {NAMES.get(attack, TASKS[clean['task']].attack)}"
    if attacked is None:
        return Row(name, None, ": it was not run")
    if why := _doubt(attacked, useful=(clean,)):
        return Row(name, None, why)
    limit, found = attacked["chance"] + LEFT * (clean["value"] - attacked["chance"]), paired.interval(attacked)
    error = TASKS[clean["task"]].sign < 0
    if error:
        limit = min(limit, 2 * clean["value"])
    words = f" {clean['value']:.2f} to {_interval(found)}, broken {'above' if error else 'below'} {limit:.2f}"
    return _row(name, found, limit, words, above=error)


def _recovered(name: str, own: dict[tuple[str, str], Record], attack: str, much: bool) -> Row:
    """Whether the share of what the attack took from Standard that DeACL keeps is `much`, or not."""
    keys = [("standard", "clean"), ("standard", attack), ("deacl", attack), ("deacl", "clean")]
    clean, hit, robust, plain = map(own.get, keys)
    if why := _doubt(hit, robust, clean, useful=(clean, plain)):
        return Row(name, None, why)
    if _gain(hit, clean).low <= 0:
        words = f": {_name(hit)} takes nothing measurable, {clean['value']:.2f} to {hit['value']:.2f}"
        return Row(name, None, words)
    found = paired.share(hit, robust, clean)
    back = f"{_interval(found, '.0%')} of what {_name(hit)} takes is won back"
    return _row(name, found, PART, f" {hit['value']:.2f} to {robust['value']:.2f}, {back}", above=much)


def _cost(name: str, own: dict[tuple[str, str], Record]) -> Row:
    clean, robust = own.get(("standard", "clean")), own["deacl", "clean"]
    if why := _doubt(clean, robust):
        return Row(name, None, why)
    loss = _turned(_gain(clean, robust), -1)
    words = f" {clean['value']:.2f} to {robust['value']:.2f}, worse by {_interval(loss)}"
    return _row(name, loss, 0, words)


def _early(cells: Cells) -> list[Row]:
    """Per DeACL row: whether MOST of its gain against EmbedAttack is there after the first epochs."""
    rows, unfollowed = [], []
    for name, own in _each(cells, "deacl", "embed"):
        start, last = own.get(("standard", "embed")), own["deacl", "embed"]
        limit = min(EARLY, last["epoch"] / 2)
        path = [r for (_, attack), r in own.items() if attack == "embed" and 0 < r["epoch"] <= limit]
        soon = max(path, key=lambda r: r["epoch"], default=None)
        if limit < 0:
            unfollowed.append(Row(name, None, " comes from a given checkpoint, its epochs are unknown"))
        elif soon is None:
            unfollowed.append(Row(name, None, f" has no checkpoint in the first {limit:g} epochs"))
        elif why := _doubt(start, soon, last, useful=(own.get(("deacl", "clean")),)):
            rows.append(Row(name, None, why))
        elif _gain(start, last).low <= 0:
            words = f" gains nothing measurable, {start['value']:.2f} to {last['value']:.2f}"
            rows.append(Row(name, None, words))
        else:
            found = paired.share(start, soon, last)
            words = f" {_interval(found, '.0%')} of the gain after {soon['epoch']} of {last['epoch']} epochs"
            rows.append(_row(name, found, MOST, words))
    return rows or unfollowed  # epochs between are evaluated on some data sets only


def _rows(cells: Cells, letter: str, attack: str) -> list[Row]:
    """The cases of a claim, `attack` in the place of the task's own."""
    if letter == "a":
        standard = _each(cells, "standard", "clean")
        return [_broken(name, own, kind) for name, own in standard for kind in ("embed", attack)]
    if letter == "d":
        return [_cost(name, own) for name, own in _each(cells, "deacl", "clean")]
    if letter == "e":
        return _early(cells)
    kind = "embed" if letter == "b" else attack
    return [_recovered(name, own, kind, letter == "b") for name, own in _each(cells, "deacl", kind)]


def claims(records: list[Record], task: str) -> list[Claim]:
    """The claims that rows of `task` bear on, in their order; RULES say when one is supported or refuted.

    Where there are records of the kind 'worst', (a) and (c) are judged a second time with them instead of the task
    attack.
    """
    cells = {(r["dataset"], r["encoder"], r["defense"], r["attack"]): r for r in records if r["task"] == task}
    worst = [key for key in cells if key[3] == "worst"]
    for key in worst:
        others = (name for other, r in cells.items() if other[:3] == key[:3] for name in _flagged(r))
        cells[key] = cells[key] | {"rests_on": list(dict.fromkeys(others))}
    rows = {letter: _rows(cells, letter, "task") for letter in TEXTS}
    again = {letter: _rows(cells, letter, "worst") for letter in "ac"} if worst else {}
    texts = {letter: text.replace("the task's own attack", TASKS[task].attack) for letter, text in TEXTS.items()}
    return [Claim(letter, texts[letter], found, again.get(letter, [])) for letter, found in rows.items() if found]


Judged = dict[str, list[Claim]]  # by task


def judge(records: list[Record]) -> Judged:
    """The claims of every task that there are rows of."""
    return {task: found for task in TASKS if (found := claims(records, task))}


def numbers(judged: Judged) -> pd.DataFrame:
    """Every judged case, COLUMNS: the quantity with its interval and threshold, or the reason why there is none.

    Claims with the worst case in the task attack's place are called 'a, worst' and 'c, worst'.
    """
    cases = [
        (name, task, row)
        for task, of_task in judged.items() for claim in of_task
        for name, rows in ((claim.letter, claim.rows), (f"{claim.letter}, worst", claim.worst)) for row in rows
    ]  # fmt: skip
    rows = [
        (name, task, row.name, verdict([row]), *(row.found or [None] * 3), row.threshold, row.words.lstrip(" :"))
        for name, task, row in cases
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def matrix(judged: Judged) -> pd.DataFrame:
    """Claim x task as text: the verdict, and below it the number behind it or how the rows divide; '–': no row."""
    cells = {(claim.letter, task.capitalize()): _cell(claim) for task, of_task in judged.items() for claim in of_task}
    letters = [letter for letter in TEXTS if any(letter == key[0] for key in cells)]
    names = {"Claim": [f"({letter}) {TEXTS[letter]}" for letter in letters]}
    columns = map(str.capitalize, judged)
    return pd.DataFrame(names | {task: [cells.get((letter, task), "–") for letter in letters] for task in columns})


def _cell(claim: Claim) -> str:
    """The verdict, and of one or two cases their numbers, without the name of their row if it is one for all."""
    one = len({row.name.partition(" ")[0] for row in claim.rows}) == 1
    lines = [(row.name.partition(" ")[2] if one else row.name) + row.words for row in claim.rows]
    lines = [line.lstrip(" :") for line in lines] if len(lines) <= 2 else []
    if claim.worst and verdict(claim.worst) != verdict(claim.rows):
        lines.append(f"with Worst: {_counted(claim.worst)}")
    return _counted(claim.rows) + (":\n" if lines else "") + ";\n".join(lines)
