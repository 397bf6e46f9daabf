"""STL-10: raw pixels."""

from pathlib import Path

import numpy as np
from torchvision.datasets import STL10

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
        archives=(Archive(STL10.url, STL10.base_folder, 2_640_397_119, f"md5:{STL10.tgz_md5}"),),
        md5={f"{STL10.base_folder}/{file}": md5 for file, md5 in (*STL10.train_list[:2], *STL10.test_list)},
    ),
}  # fmt: skip
