"""Two rows compared on the same test images: a difference, or a share, with a 95 % bootstrap interval over images.

What makes an image easy or hard is the same for both rows, so the interval of their difference is narrower than the
standard errors of the two values would say. All is of the tables' own statistic: records keep what has to be added up
over images ("statistics", an entry for each image), so that any set of them gives its accuracy, its mIoU, or its RMSE:
a number, of which the mean is taken (accuracy; RMSE where a protocol takes the mean of images; None: no pixel counts);
sum of squares and pixels (RMSE); or number, hits and union of each class, one after the other (mIoU).
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

Record = dict[str, Any]

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # per cent
SURE = 1.96  # standard errors on either side of a value that make the same interval
COLUMNS = ["task", "dataset", "encoder", "attack", "metric", "standard", "deacl", "difference", "low", "high", "n"]


class Estimate(NamedTuple):
    """A quantity and the ends of its interval."""

    value: float
    low: float
    high: float


def wilson(share: float, n: float, z: float = SURE) -> Estimate:
    """A share of n with Wilson's interval: ((p + z^2 / 2n) -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return Estimate(share, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))


def interval(record: Record) -> Estimate:
    """A record's own value with its 95 % interval: Wilson's for accuracy, else SURE standard errors."""
    value, reach = record["value"], SURE * record["se"]
    if record["metric"] == "accuracy":
        return wilson(value, record["n"])
    return Estimate(value, value - reach, value + reach)


@lru_cache(maxsize=2)
def _draws(n: int) -> np.ndarray:
    """How often each of n images is in each resample, (RESAMPLES, n), the same for all rows; the first row: once."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
    return np.concatenate([np.ones((1, n)), drawn])


def comparable(*records: Record) -> bool:
    """Whether records have statistics of the same images, of more than one."""
    counts = {len(r.get("statistics", ())) for r in records}
    return len(counts) == 1 and counts.pop() > 1 and len({r["hashes"].get("data") for r in records}) == 1


def _ratios(record: Record) -> tuple[np.ndarray, bool]:
    """What is summed over images and then divided, (n, C, 2), and whether the metric is the root of that."""
    entries = record["statistics"]
    if record["metric"] == "mIoU":
        parts = [np.reshape(entry, (-1, 3)) for entry in entries]
        found = np.unique(np.concatenate(parts)[:, 0])
        sums = np.zeros((len(parts), len(found), 2))
        for image, part in zip(sums, parts, strict=True):
            image[np.searchsorted(found, part[:, 0])] = part[:, 1:]
        return sums, False
    pairs = [e if isinstance(e, list) else (e or 0, e is not None) for e in entries]
    return np.array(pairs, float)[:, None], isinstance(entries[0], list)


def _values(record: Record) -> np.ndarray:
    """A record's metric on all its images (first) and on RESAMPLES resamples of them, (1 + RESAMPLES,)."""
    sums, root = _ratios(record)
    over, under = (_draws(len(sums)) @ sums[:, :, i] for i in (0, 1))  # (1 + RESAMPLES, C) each
    mean = (over / np.maximum(under, 1)).sum(1) / np.maximum((under > 0).sum(1), 1)
    return np.sqrt(mean) if root else mean


def resampled(*records: Record) -> np.ndarray | None:
    """Each record's metric on all its images (first row) and on the same RESAMPLES resamples, (1 + RESAMPLES, k).

    None if they are not `comparable`.
    """
    return np.stack([_values(record) for record in records], 1) if comparable(*records) else None


def _change(before: np.ndarray, after: np.ndarray, record: Record) -> np.ndarray:
    """after - before; where all resamples agree, as no image changes, with what so few images may not have shown.

    The true shares of images that get better and that get worse are then drawn from Beta(1/2, n + 1/2) (Jeffreys), so
    that 0 of 48 against 0 of 48 is 0.00 [-0.05, 0.05] and not [0.00, 0.00].
    """
    change, n, draw = after - before, len(record["statistics"]), np.random.default_rng(1)
    if record["metric"] != "RMSE" and np.ptp(change) < 1e-12:
        better, worse = draw.beta(0.5, n + 0.5, (2, RESAMPLES))
        change[1:] = np.clip(change[1:] + better - worse, -1, 1)
    return change


def _estimate(quantity: np.ndarray) -> Estimate:
    """The value (first entry) with the interval of the resamples; those where it is not defined do not count."""
    low, high = np.nanpercentile(quantity[1:], INTERVAL)
    return Estimate(float(quantity[0]), float(low), float(high))


def difference(before: Record, after: Record) -> Estimate | None:
    """after - before in the units of the metric, with its 95 % interval; None without the same images."""
    found = resampled(before, after)
    return None if found is None else _estimate(_change(*found.T, before))


def share(start: Record, part: Record, whole: Record) -> Estimate | None:
    """(part - start) / (whole - start) with its 95 % interval; None without the same images."""
    found = resampled(start, part, whole)
    if found is None:
        return None
    gained, total = (_change(found[:, 0], column, start) for column in found.T[1:])
    if not total[0]:
        return Estimate(np.nan, np.nan, np.nan)
    return _estimate(gained / np.where(total == 0, np.nan, total))


def differences(records: Iterable[Record]) -> pd.DataFrame:
    """DeACL against Standard: a row of COLUMNS for each (task, dataset, encoder, attack) that both have.

    `standard` and `deacl` are the tables' values, `difference` is deacl - standard, `low` and `high` its 95 % interval.
    RMSE: a negative difference is better.
    """
    names = ("task", "dataset", "encoder", "attack")
    cells = {(*(r[name] for name in names), r["defense"]): r for r in records}
    rows = []
    for (*place, defense), robust in cells.items():
        standard = cells.get((*place, "standard"))
        found = difference(standard, robust) if defense == "deacl" and standard else None
        if found is not None:
            about = dict(zip(names, place, strict=True)) | {"metric": robust["metric"], "n": robust["n"]}
            rows.append(about | {"standard": standard["value"], "deacl": robust["value"]} | found._asdict())
    return pd.DataFrame(rows).rename(columns={"value": "difference"}).reindex(columns=COLUMNS)
