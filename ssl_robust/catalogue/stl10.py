"""STL-10: raw pixels."""

from pathlib import Path

import numpy as np

from ..items import Archive, Dataset, Item, Part
from .pictures import damaged, demand_labels, once

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@once
def _pixels(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r").reshape(-1, 3, 96, 96)


def _stl_image(path: Path, i: int) -> np.ndarray:
    return np.array(_pixels(path)[i].transpose(2, 1, 0))  # columns first in the file


def _stl10(root: Path, task: str, split: str, n: int) -> list[Item]:
    file = root / "stl10_binary" / f"{split}_X.bin"
    listed = file.with_name(f"{split}_y.bin")
    labels = [y - 1 for y in listed.read_bytes()]  # in the file from 1
    if file.stat().st_size != len(labels) * 3 * 96 * 96:
        raise damaged(file)
    demand_labels(labels, len(STL10_CLASSES), listed)
    return [Item(f"stl10/{split}/{i}", Part(_stl_image, file, i), y) for i, y in enumerate(labels)]


DATASETS = {
    "stl10": Dataset(
        ("classification", "deacl"), "stl10_binary/{train,test}_{X,y}.bin", _stl10, {"classification": STL10_CLASSES},
        counts={"train": (5_000,), "test": (8_000,)}, shape=(96, 96), gigabytes=3.2,
        archives=(Archive(
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "stl10_binary", 2_640_397_119,
            "md5:91f7769df0f17e558f3565bffb0c7dfb",
        ),),
        md5={
            "stl10_binary/train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
            "stl10_binary/train_y.bin": "5a34089d4802c674881badbb80307741",
            "stl10_binary/test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
            "stl10_binary/test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
        },
    ),
}  # fmt: skip
