"""Cityscapes, fine annotations, 19 classes."""

from pathlib import Path

from torchvision.datasets import Cityscapes

from ..items import IGNORE, Dataset, Item, Part
from .pictures import demand, pictures, recoded

# label id in *_gtFine_labelIds.png -> class; their order gives the 19 train ids, all other ids are ignored
CITYSCAPES = {c.id: c.name for c in Cityscapes.classes if c.train_id in range(19)}
CITYSCAPES_TABLE = tuple([*CITYSCAPES].index(i) if i in CITYSCAPES else IGNORE for i in range(34))


def _cityscapes(root: Path, task: str, split: str, n: int) -> list[Item]:
    part, home = {"train": "train", "test": "val"}[split], root / "cityscapes"
    found = []
    for image in pictures(home / "leftImg8bit" / part):
        name = image.stem.removesuffix("_leftImg8bit")
        mask = home / "gtFine" / part / image.parent.name / f"{name}_gtFine_labelIds.png"
        found.append(Item(name, image, Part(recoded, mask, CITYSCAPES_TABLE)))
    demand((item.target.file for item in found), "restore the labels of gtFine")
    return found


DATASETS = {
    "cityscapes": Dataset(
        ("segmentation", "deacl"), "cityscapes/{leftImg8bit,gtFine}/{train,val}/CITY", _cityscapes,
        {"segmentation": tuple(CITYSCAPES.values())}, counts={"train": (2_975,), "test": (500,)}, shape=(1024, 2048),
        gigabytes=12,
        by_hand=(
            "register at https://www.cityscapes-dataset.com/downloads/, get leftImg8bit_trainvaltest.zip (11 GB) and "
            "gtFine_trainvaltest.zip (0.25 GB), and unpack both in {root}/cityscapes"
        ),
    ),
}  # fmt: skip
