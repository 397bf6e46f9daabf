"""The paper's claims (a)-(e), judged on whatever was run: each verdict is computed from the records, none is typed.

A quantity is compared with its threshold give or take its uncertainty; inside that margin it is left undecided. Where
the records hold values of the same images, the margin of a difference or share is its 95 % interval of a paired
bootstrap (paired.py; mIoU is then the mean over images); elsewhere it is one standard error, the runs taken as
independent. RMSE counts with its sign turned, so that a gain is always an improvement.
"""

from math import hypot
from typing import Any, NamedTuple

from . import paired
from .paired import Estimate

Record = dict[str, Any]
Cells = dict[tuple[str, str, str, str], Record]

TASK_ATTACK = {"classification": "PGD", "segmentation": "SegPGD", "depth": "DepthPGD"}
WORST = "the worst case over all attacks"
PART = 1 / 3  # recovering more than this share of what an attack took is 'much', less is 'hardly'
MOST = 1 / 2
FEW = 6  # so many cases are listed with their numbers, more are counted
EARLY = 10  # epochs; of a run shorter than twice that, the first half is looked at instead


class Row(NamedTuple):
    """One judged case: whether the claim holds in it (None: undecided), its name, the numbers or the reason."""

    holds: bool | None
    name: str
    words: str


def _sign(record: Record) -> int:
    return -1 if record["metric"] == "RMSE" else 1


def _show(record: Record) -> str:
    return f"{record['value']:.2f} ± {record['se']:.2f}"


def _gain(before: Record, after: Record) -> Estimate:
    """Improvement from `before` to `after` in the units of the metric, and its interval."""
    sign, same = _sign(before), paired.difference(before, after)
    if same is not None:
        return Estimate(sign * same.value, *sorted((sign * same.low, sign * same.high)))
    gain, se = sign * (after["value"] - before["value"]), hypot(before["se"], after["se"])
    return Estimate(gain, gain - se, gain + se)


def _above(found: Estimate, threshold: float) -> bool | None:
    """Whether a quantity lies above `threshold`; None if its interval holds the threshold."""
    return None if found.low <= threshold <= found.high else found.value > threshold


def _undecided(holds: bool | None) -> str:
    return ", undecided" if holds is None else ""


def _share(start: Record, part: Record, whole: Record) -> Estimate | None:
    """(part - start) / (whole - start) and its interval, by the delta method where the images are not the same ones.

    None if whole - start is noise.
    """
    same = paired.share(start, part, whole)
    if same is not None:
        return same if _gain(start, whole).low > 0 else None
    total, total_se = _sign(start) * (whole["value"] - start["value"]), hypot(start["se"], whole["se"])
    if total <= 2 * total_se:
        return None
    share = _sign(start) * (part["value"] - start["value"]) / total
    se = hypot(part["se"], share * whole["se"], (1 - share) * start["se"]) / total
    return Estimate(share, share - se, share + se)


def _percent(share: Estimate) -> str:
    """'33% [12%, 54%]'."""
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]".replace("-", "−")


def _broken(clean: Record, attacked: Record) -> bool:
    """No better than a constant prediction, 2 standard errors allowed, or an RMSE of at least twice the clean one."""
    lead = _sign(clean) * (attacked["value"] - attacked["chance"])
    return lead <= 2 * attacked["se"] or (clean["metric"] == "RMSE" and attacked["value"] >= 2 * clean["value"])


def _breaks(cells: Cells, attacks: dict[str, str]) -> list[Row]:
    """Per Standard row and attack (kind: name): whether it leaves no more than a constant prediction has."""
    rows = []
    cleans = [(key, record) for key, record in cells.items() if key[2:] == ("standard", "clean")]
    for (dataset, encoder, *_), clean in cleans:
        for attack, name in attacks.items():
            row, attacked = f"{dataset}/{encoder} {name}", cells.get((dataset, encoder, "standard", attack))
            if attacked is None:
                rows.append(Row(None, row, " has not been run"))
            elif _sign(clean) * (clean["value"] - clean["chance"]) <= 2 * clean["se"]:
                rows.append(Row(None, row, f": the clean value {_show(clean)} is no better than a constant"))
            else:
                words = f" {clean['value']:.2f} to {_show(attacked)}, best constant {clean['chance']:.2f}"
                rows.append(Row(_broken(clean, attacked), row, words))
    return rows


def _recovers(cells: Cells, attack: str, name: str, much: bool) -> list[Row]:
    """Per DeACL row: whether the share of what the attack took from Standard that DeACL keeps is `much`, or not."""
    rows = []
    for dataset, encoder, defense, kind in cells:
        if (defense, kind) != ("deacl", attack):
            continue
        keys = [("standard", "clean"), ("standard", attack), ("deacl", attack)]
        clean, hit, robust = (cells.get((dataset, encoder, *key)) for key in keys)
        row = f"{dataset}/{encoder}"
        if clean is None or hit is None:
            rows.append(Row(None, row, " has no complete Standard row"))
        elif (share := _share(hit, robust, clean)) is None:
            rows.append(Row(None, row, f": {name} takes nothing measurable, {_show(clean)} to {_show(hit)}"))
        else:
            words = f" {_show(hit)} to {_show(robust)}, {_percent(share)} of the loss recovered"
            above = _above(share, PART)
            rows.append(Row(above if above is None else above == much, row, words + _undecided(above)))
    return rows


def _costs(cells: Cells) -> list[Row]:
    rows = []
    for (dataset, encoder, *kind), robust in cells.items():
        clean = cells.get((dataset, encoder, "standard", "clean"))
        if kind == ["deacl", "clean"] and clean is not None:
            loss = Estimate(*(-end for end in _gain(clean, robust)))
            loss = Estimate(loss.value, loss.high, loss.low)
            holds = _above(loss, 0)
            numbers = f"{loss.value:.2f} [{loss.low:.2f}, {loss.high:.2f}]".replace("-", "−")
            change = f" {_show(clean)} to {_show(robust)}, worse by {numbers}"
            rows.append(Row(holds, f"{dataset}/{encoder}", change + _undecided(holds)))
    return rows


def _early(cells: Cells) -> list[Row]:
    rows, unfollowed = [], []
    for (dataset, encoder, *kind), last in cells.items():
        start = cells.get((dataset, encoder, "standard", "embed"))
        if kind != ["deacl", "embed"] or start is None:
            continue
        limit, row = min(EARLY, last["epoch"] / 2), f"{dataset}/{encoder}"
        if limit < 0:
            unfollowed.append(Row(None, row, " comes from a given checkpoint, its epochs are unknown"))
            continue
        path = [r for key, r in cells.items() if key[:2] == (dataset, encoder) and key[3] == "embed"]
        soon = max((r for r in path if 0 < r["epoch"] <= limit), key=lambda r: r["epoch"], default=None)
        if soon is None:
            unfollowed.append(Row(None, row, f" has no checkpoint in the first {limit:g} epochs"))
        elif (share := _share(start, soon, last)) is None:
            rows.append(Row(None, row, f" gains nothing measurable, {_show(start)} to {_show(last)}"))
        else:
            holds = _above(share, MOST)
            when = f"after {soon['epoch']} of {last['epoch']} epochs"
            rows.append(Row(holds, row, f" {_percent(share)} of the gain {when}{_undecided(holds)}"))
    return rows or unfollowed  # epochs between are evaluated on some data sets only


def _details(rows: list[Row]) -> str:
    """Every case with its numbers; of more than FEW their count and the names of the exceptions."""
    if len(rows) <= FEW:
        return "; ".join(row.name + row.words for row in rows) or "the rows it needs were not run"
    against, undecided = ([row.name for row in rows if row.holds is kind] for kind in (False, None))
    if len(undecided) == len(rows):
        return f"undecided in all {len(rows)} cases"
    words = [f"in {len(rows) - len(against) - len(undecided)} of {len(rows)} cases"]
    if 0 < len(against) < len(rows):
        words.append(f"not in {', '.join(against)}")
    if undecided:
        words.append(f"undecided in {', '.join(undecided)}")
    return "; ".join(words)


def _verdict(rows: list[Row]) -> str:
    """Over all rows: 'shows' needs every one, 'does not show' at least one against and none for."""
    judged = [row.holds for row in rows if row.holds is not None]
    if not judged:
        return f"cannot be judged ({_details(rows)})"
    verdict = "shows" if len(judged) == len(rows) and all(judged) else "shows in part"
    return f"{verdict if any(judged) else 'does not show'} ({_details(rows)})"


def _word(rows: list[Row]) -> str:
    return _verdict(rows).partition(" (")[0]


def _with_worst(rows: list[Row], worst: list[Row]) -> str:
    """What becomes of a verdict if the worst case over all attacks takes the task attack's place."""
    same = _word(rows) == _word(worst)
    return f" With {WORST} in the task attack's place: {'the same' if same else _verdict(worst)}."


def claims(records: list[Record], task: str) -> list[tuple[str, str]]:
    """The five claims as (letter, sentence 'claim: verdict (numbers).') for one task.

    The verdict is 'shows', 'shows in part' (in some rows, or some stay undecided), 'does not show' or 'cannot be
    judged'. Criteria, per row of the table:
    (a) the attacked value is no better than the best constant prediction, 2 se allowed; for RMSE also if it is at
    least twice the clean error;
    (b) DeACL recovers more than a third of what EmbedAttack takes from Standard; (c) less than a third of what the task
    attack takes; (d) the clean value gets worse; (e) more than half of the gain is there at the last checkpoint within
    10 epochs, or within the first half if fewer than 20 epochs were trained.
    Where there are records of the kind 'worst', a second sentence says what becomes of (a) and (c) if the worst case
    over all attacks takes the task attack's place, with its numbers if the verdict differs.
    """
    cells = {(r["dataset"], r["encoder"], r["defense"], r["attack"]): r for r in records if r["task"] == task}
    attack = TASK_ATTACK[task]
    breaks = _breaks(cells, {"embed": "EmbedAttack", "task": attack})
    helps = _recovers(cells, "task", attack, much=False)
    judged = [
        ("a", f"EmbedAttack and {attack} both break every Standard encoder", breaks),
        ("b", "DeACL recovers much of what EmbedAttack takes", _recovers(cells, "embed", "EmbedAttack", much=True)),
        ("c", f"DeACL hardly helps against {attack}", helps),
        ("d", "DeACL costs clean performance", _costs(cells)),
        ("e", "Most of the gain against EmbedAttack comes early in DeACL", _early(cells)),
    ]
    extra = {}
    if any(kind == "worst" for *_, kind in cells):
        extra["a"] = _with_worst(breaks, _breaks(cells, {"embed": "EmbedAttack", "worst": "Worst"}))
        extra["c"] = _with_worst(helps, _recovers(cells, "worst", "Worst", much=False))
    return [(letter, f"{text}: {_verdict(rows)}.{extra.get(letter, '')}") for letter, text, rows in judged]
