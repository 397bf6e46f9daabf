"""CIFAR-10 and CIFAR-100: pickled batches, of which nothing is executed, or an image folder."""

import codecs
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from ..items import Archive, Dataset, Item, Part
from ..settings import BadInput
from .own import class_folders, image_folder
from .pictures import damaged, demand_labels, once

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR = {  # torchvision's class, which knows address, files and checksums; bytes of what is fetched; key of the labels
    "cifar10": (CIFAR10, 170_498_071, "labels"),
    "cifar100": (CIFAR100, 169_001_437, "fine_labels"),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain Python values and numpy arrays; whatever else a pickle may name is refused, never executed."""

    KNOWN = {f.__name__: f for f in (np.empty(0).__reduce__()[0], np.ndarray, np.dtype, codecs.encode)}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.KNOWN:
            return self.KNOWN[name]
        raise pickle.UnpicklingError(f"{module}.{name}")


@once
def _content(path: Path) -> dict[str, Any]:
    """Content of one batch file, its images as uint8 (N, 3, 32, 32)."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        if "data" in dict(content):
            content["data"] = np.asarray(content["data"]).reshape(-1, 3, 32, 32)
        return content
    except Exception:  # a damaged pickle raises nearly anything
        raise damaged(path) from None


def _image(path: Path, i: int) -> np.ndarray:
    return _content(path)["data"][i].transpose(1, 2, 0)


def _is_image_folder(root: Path, name: str) -> bool:
    return not (root / CIFAR[name][0].base_folder).is_dir() and (root / name / "train").is_dir()


def _items(name: str, root: Path, task: str, split: str, n: int) -> list[Item]:
    if _is_image_folder(root, name):
        if name == "cifar10" and (*class_folders(root / name),) != CIFAR10_CLASSES:
            raise BadInput(f"{root / name} must have the class folders {', '.join(CIFAR10_CLASSES)}; correct them.")
        return image_folder(name, root, task, split, n)
    found, (official, _, key) = [], CIFAR[name]
    for part, _ in official.train_list if split == "train" else official.test_list:
        file = root / official.base_folder / part
        content = _content(file)
        labels = np.asarray(content.get(key, [])).ravel().tolist()
        if not labels or len(labels) != len(content.get("data", [])):
            raise damaged(file)
        demand_labels(labels, int(name.removeprefix("cifar")), file)
        place = f"{official.base_folder}/{part}"
        found += [Item(f"{place}/{i}", Part(_image, file, i), int(y)) for i, y in enumerate(labels)]
    return found


def _classes(name: str, root: Path, task: str) -> tuple[str, ...]:
    if name == "cifar10":
        return CIFAR10_CLASSES
    if _is_image_folder(root, name):
        return tuple(class_folders(root / name))
    return tuple(_content(root / CIFAR100.base_folder / CIFAR100.meta["filename"])[CIFAR100.meta["key"]])


def _md5(official: type[CIFAR10]) -> dict[str, str]:
    meta = official.meta["filename"], official.meta["md5"]
    return {f"{official.base_folder}/{file}": md5 for file, md5 in (*official.train_list, *official.test_list, meta)}


DATASETS = {
    name: Dataset(
        ("classification", "deacl"), f"{official.base_folder} (or {name}/{{train,test}}/CLASS/*.png)",
        partial(_items, name), partial(_classes, name), counts={"train": (50_000,), "test": (10_000,)},
        many=int(name[5:]), shape=(32, 32), gigabytes=0.2,
        archives=(Archive(official.url, official.base_folder, size, f"md5:{official.tgz_md5}"),), md5=_md5(official),
    )
    for name, (official, size, _) in CIFAR.items()
}  # fmt: skip
