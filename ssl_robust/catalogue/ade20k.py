"""ADE20k, the 150 classes of its scene parsing benchmark."""

import re
from pathlib import Path

from ..items import IGNORE, Archive, Dataset, Item, Part
from .pictures import damaged, pairs, recoded, text_of, within

ADE_TABLE = (IGNORE, *range(150))  # label 0 is 'other', so the 150 classes shift by one


def _ade20k(root: Path, task: str, split: str, n: int) -> list[Item]:
    home, part = root / "ADEChallengeData2016", {"train": "training", "test": "validation"}[split]
    found = pairs(home / "images" / part, home / "annotations" / part)
    return [Item(within(home / "images" / part, i), i, Part(recoded, m, ADE_TABLE)) for i, m in found]


def _ade20k_classes(root: Path, task: str) -> tuple[str, ...]:
    """The first name of each of the 150 classes, from the data set's own objectInfo150.txt."""
    listed = root / "ADEChallengeData2016" / "objectInfo150.txt"
    if task != "segmentation":
        return ()
    # a row: numbers, then the names of one class
    rows = re.findall(r"^\s*\d+\s+(?:[\d.]+\s+)+([^,\n]+)", text_of(listed), re.MULTILINE)
    if len(rows) != 150:
        raise damaged(listed)
    return tuple(name.strip() for name in rows)


DATASETS = {
    "ade20k": Dataset(
        ("segmentation", "deacl"), "ADEChallengeData2016/{images,annotations}/{training,validation}", _ade20k,
        _ade20k_classes, counts={"train": (20_210,), "test": (2_000,)}, many=150, shape=(512, 683), gigabytes=1.2,
        archives=(Archive(
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip", "ADEChallengeData2016",
            967_000_000, "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        ),),
    ),
}  # fmt: skip
