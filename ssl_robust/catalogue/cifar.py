"""CIFAR-10 and CIFAR-100: pickled batches, of which nothing is executed, or an image folder."""

import codecs
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..items import Archive, Dataset, Item, Part
from ..settings import BadInput
from .own import class_folders, image_folder
from .pictures import damaged, demand, demand_labels, once

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR = {  # folder, files of each split, key of the labels, file and key of the class names
    "cifar10": (
        "cifar-10-batches-py", {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}, "labels",
        "batches.meta", "label_names",
    ),
    "cifar100": ("cifar-100-python", {"train": ["train"], "test": ["test"]}, "fine_labels", "meta", "fine_label_names"),
}  # fmt: skip


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain Python values and numpy arrays; whatever else a pickle may name is refused, never executed."""

    KNOWN = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.KNOWN:
            return self.KNOWN[name]
        raise pickle.UnpicklingError(f"{module}.{name}")


@once
def _cifar_file(path: Path) -> dict[str, Any]:
    """Content of one batch file, its images as uint8 (N, 3, 32, 32)."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        if "data" in dict(content):
            content["data"] = np.asarray(content["data"]).reshape(-1, 3, 32, 32)
        return content
    except Exception:  # a damaged pickle raises nearly anything
        raise damaged(path) from None


def _cifar_image(path: Path, i: int) -> np.ndarray:
    return _cifar_file(path)["data"][i].transpose(1, 2, 0)


def _is_image_folder(root: Path, name: str) -> bool:
    return not (root / CIFAR[name][0]).is_dir() and (root / name / "train").is_dir()


def _cifar(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    folder, parts, key = CIFAR[name][:3]

    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        if _is_image_folder(root, name):
            wrong = sorted(set(class_folders(root / name)) ^ set(_cifar_classes(name)(root, task)))
            if wrong:
                raise BadInput(f"{name} has class folders missing or too many: {', '.join(wrong[:5])}; correct them.")
            return image_folder(name)(root, task, split, n)
        found = []
        for part in parts[split]:
            file = root / folder / part
            content = _cifar_file(file)
            labels = np.asarray(content.get(key, [])).ravel().tolist()
            if not labels or len(labels) != len(content.get("data", [])):
                raise damaged(file)
            demand_labels(labels, int(name.removeprefix("cifar")), file)
            found += [Item(f"{folder}/{part}/{i}", Part(_cifar_image, file, i), int(y)) for i, y in enumerate(labels)]
        return found

    return items


def _cifar_classes(name: str) -> Callable[[Path, str], tuple[str, ...]]:
    folder, _, _, meta, key = CIFAR[name]

    def classes(root: Path, task: str) -> tuple[str, ...]:
        if name == "cifar10":
            return CIFAR10_CLASSES
        if _is_image_folder(root, name):
            return tuple(class_folders(root / name))
        demand([root / folder / meta], "restore it")
        names = _cifar_file(root / folder / meta).get(key)
        if not names:
            raise damaged(root / folder / meta)
        return tuple(names)

    return classes


DATASETS = {
    "cifar10": Dataset(
        ("classification", "deacl"), "cifar-10-batches-py (or cifar10/{train,test}/CLASS/*.png)", _cifar("cifar10"),
        _cifar_classes("cifar10"), counts={"train": (50_000,), "test": (10_000,)}, shape=(32, 32), gigabytes=0.2,
        archives=(Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "cifar-10-batches-py", 170_498_071,
            "md5:c58f30108f718f92721af3b95e74349a",
        ),),
        md5={
            "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
            "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
            "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": Dataset(
        ("classification", "deacl"), "cifar-100-python (or cifar100/{train,test}/CLASS/*.png)", _cifar("cifar100"),
        _cifar_classes("cifar100"), counts={"train": (50_000,), "test": (10_000,)}, shape=(32, 32), gigabytes=0.2,
        archives=(Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "cifar-100-python", 169_001_437,
            "md5:eb9058c3a382ffc7106e4002c42a8d85",
        ),),
        md5={
            "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
            "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}  # fmt: skip
