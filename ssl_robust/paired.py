"""Two rows compared on the same test images: a difference, or a share, with a 95 % bootstrap interval over images.

What makes an image easy or hard is the same for both rows, so the interval of their difference is narrower than the
standard errors of the two values would say. It is computed from the per-image values of the records; over several
images accuracy and mIoU are their mean and RMSE is the root of their mean square (every image counts the same).
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

Record = dict[str, Any]

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # per cent
COLUMNS = ["task", "dataset", "encoder", "attack", "metric", "standard", "deacl", "difference", "low", "high", "n"]


class Estimate(NamedTuple):
    """A quantity and the ends of its interval."""

    value: float
    low: float
    high: float


@lru_cache(maxsize=2)
def _draws(n: int) -> np.ndarray:
    """How often each of n images is in each resample, (RESAMPLES, n), the same for all rows; the first row: once."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
    return np.concatenate([np.ones((1, n)), drawn])


def _same_images(records: tuple[Record, ...]) -> bool:
    counts = {len(r.get("per_image", ())) for r in records}
    return len(counts) == 1 and counts.pop() > 1 and len({r["hashes"].get("data") for r in records}) == 1


def _root(record: Record) -> bool:
    """Whether the record's value is a root of a mean square: of RMSE unless its protocol takes the mean of images."""
    values = np.asarray(record["per_image"])
    closer = abs(np.sqrt((values**2).mean()) - record["value"]) <= abs(values.mean() - record["value"])
    return record["metric"] == "RMSE" and bool(closer)


def resampled(*records: Record) -> np.ndarray | None:
    """Each record's metric on all its images (first row) and on the same RESAMPLES resamples, (1 + RESAMPLES, k).

    None if the records have no per-image values of the same images.
    """
    if not _same_images(records):
        return None
    draws, columns = _draws(len(records[0]["per_image"])), []
    for record in records:
        values, root = np.asarray(record["per_image"], float), _root(record)
        mean = draws @ (values**2 if root else values) / len(values)
        columns.append(np.sqrt(mean) if root else mean)
    return np.stack(columns, 1)


def _estimate(quantity: np.ndarray) -> Estimate:
    """The value (first entry) with the interval of the resamples; those where it is not defined do not count."""
    low, high = np.nanpercentile(quantity[1:], INTERVAL)
    return Estimate(float(quantity[0]), float(low), float(high))


def difference(before: Record, after: Record) -> Estimate | None:
    """after - before in the units of the metric, with its 95 % interval; None without the same images."""
    found = resampled(before, after)
    return None if found is None else _estimate(found[:, 1] - found[:, 0])


def share(start: Record, part: Record, whole: Record) -> Estimate | None:
    """(part - start) / (whole - start) with its 95 % interval; None without the same images."""
    found = resampled(start, part, whole)
    if found is None:
        return None
    total = found[:, 2] - found[:, 0]
    if not total[0]:
        return Estimate(np.nan, np.nan, np.nan)
    return _estimate((found[:, 1] - found[:, 0]) / np.where(total == 0, np.nan, total))


def differences(records: Iterable[Record]) -> pd.DataFrame:
    """DeACL against Standard: a row of COLUMNS for each (task, dataset, encoder, attack) that both have.

    `standard` and `deacl` are the values that are compared (per-image values put together as the module says; of mIoU
    this is not the value of the table), `difference` is deacl - standard, `low` and `high` its 95 % interval. RMSE: a
    negative difference is better.
    """
    names = ("task", "dataset", "encoder", "attack")
    cells = {(*(r[name] for name in names), r["defense"]): r for r in records}
    rows = []
    for (*place, defense), robust in cells.items():
        standard = cells.get((*place, "standard"))
        found = resampled(standard, robust) if defense == "deacl" and standard else None
        if found is not None:
            about = dict(zip(names, place, strict=True)) | {"metric": robust["metric"], "n": len(robust["per_image"])}
            values = dict(zip(("standard", "deacl"), found[0].tolist(), strict=True))
            rows.append(about | values | _estimate(found[:, 1] - found[:, 0])._asdict())
    return pd.DataFrame(rows).rename(columns={"value": "difference"}).reindex(columns=COLUMNS)
