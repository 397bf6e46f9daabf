"""CIFAR-10 and CIFAR-100: pickled batches, of which nothing is executed, or an image folder."""

import codecs
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..items import Archive, Dataset, Item, Part
from ..settings import BadInput
from .own import class_folders, image_folder
from .pictures import damaged, demand_labels, once

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR = {  # what is fetched, key of the labels, MD5 of each file
    "cifar10": (
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "cifar-10-batches-py", 170_498_071,
            "md5:c58f30108f718f92721af3b95e74349a",
        ),
        "labels",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": (
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "cifar-100-python", 169_001_437,
            "md5:eb9058c3a382ffc7106e4002c42a8d85",
        ),
        "fine_labels",
        {
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}  # fmt: skip


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
    return not (root / CIFAR[name][0].place).is_dir() and (root / name / "train").is_dir()


def _items(name: str, root: Path, task: str, split: str, n: int) -> list[Item]:
    archive, key, files = CIFAR[name]
    if _is_image_folder(root, name):
        if name == "cifar10" and (*class_folders(root / name),) != CIFAR10_CLASSES:
            raise BadInput(f"{root / name} must have the class folders {', '.join(CIFAR10_CLASSES)}; correct them.")
        return image_folder(name, root, task, split, n)
    found = []
    for part in (file for file in files if file != "meta" and file.startswith("test") == (split == "test")):
        file = root / archive.place / part
        content = _content(file)
        labels = np.asarray(content.get(key, [])).ravel().tolist()
        if not labels or len(labels) != len(content.get("data", [])):
            raise damaged(file)
        demand_labels(labels, int(name.removeprefix("cifar")), file)
        found += [Item(f"{archive.place}/{part}/{i}", Part(_image, file, i), int(y)) for i, y in enumerate(labels)]
    return found


def _classes(name: str, root: Path, task: str) -> tuple[str, ...]:
    if name == "cifar10":
        return CIFAR10_CLASSES
    if _is_image_folder(root, name):
        return tuple(class_folders(root / name))
    return tuple(_content(root / CIFAR[name][0].place / "meta")["fine_label_names"])


DATASETS = {
    name: Dataset(
        ("classification", "deacl"), f"{archive.place} (or {name}/{{train,test}}/CLASS/*.png)", partial(_items, name),
        partial(_classes, name), counts={"train": (50_000,), "test": (10_000,)}, many=int(name[5:]), shape=(32, 32),
        gigabytes=0.2,
        archives=(archive,), md5={f"{archive.place}/{file}": md5 for file, md5 in files.items()},
    )
    for name, (archive, _, files) in CIFAR.items()
}  # fmt: skip
