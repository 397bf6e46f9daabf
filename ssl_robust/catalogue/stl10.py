"""STL-10: raw pixels."""

from pathlib import Path

import numpy as np

from ..items import Archive, Dataset, Item, Part
from .pictures import damaged, demand_labels, once

STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@once
def _bytes_of(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)


def _stl_image(path: Path, i: int) -> np.ndarray:
    return np.array(_bytes_of(path).reshape(-1, 3, 96, 96)[i].transpose(2, 1, 0))  # columns first in the file


def _stl10(root: Path, task: str, split: str, n: int) -> list[Item]:
    file = root / "stl10_binary" / f"{split}_X.bin"
    pixels, labels = _bytes_of(file), _bytes_of(file.with_name(f"{split}_y.bin"))
    if len(pixels) != len(labels) * 3 * 96 * 96:
        raise damaged(file)
    labels = (labels.astype(int) - 1).tolist()  # in the file from 1
    demand_labels(labels, len(STL10_CLASSES), file.with_name(f"{split}_y.bin"))
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
