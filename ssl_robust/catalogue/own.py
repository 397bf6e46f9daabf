"""Folders of the user's own in the generic layout, by any name that is no data set's."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..items import IGNORE, Dataset, Item, Part
from ..settings import BadInput
from .pictures import folders, one_channel, pairs, pictures, text_of, within

OWN = {
    "classification": "NAME/{train,test}/CLASS/*.png (or .jpg ..; val in place of test)",
    "segmentation": "NAME/{images,masks}/{train,val} and NAME/classes.txt (one class a line; mask value 255: ignored)",
    "depth": "NAME/{images,depth}/{train,val} and NAME/meta.json with depth_scale (stored units per metre, 0: invalid)",
    "deacl": "NAME/*.jpg (or .png .., also in folders)",
}


def _held_out(folder: Path) -> str:
    return "test" if (folder / "test").is_dir() else "val"


def class_folders(home: Path) -> list[str]:
    """Class names of an image folder; its parts must agree, as labels are numbers of sorted folders."""
    parts = [p for p in (home / "train", home / _held_out(home)) if p.is_dir()]
    names = [set(folders(p)) for p in parts]
    wrong = sorted(names[0] ^ names[-1]) if names else []
    if wrong:
        both = " and ".join(f"{home.name}/{p.name}" for p in parts)
        raise BadInput(f"{both} differ in class folders: {', '.join(wrong[:5])}; give both the same ones.")
    return sorted(names[0]) if names else []


def image_folder(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        part = root / name / ("train" if split == "train" else _held_out(root / name))
        found = []
        for label, class_name in enumerate(class_folders(root / name)):
            files = pictures(part / class_name)
            if not files:
                place = f"{name}/{part.name}/{class_name}"
                raise BadInput(f"The class folder {place} holds no images; fill it, or remove it everywhere.")
            found += [Item(str(p.relative_to(root)), p, label) for p in files]
        return found

    return items


def _own_pairs(home: Path, targets: str, split: str) -> list[tuple[str, Path, Path]]:
    """Identifier, image and target of each pair in home/images/PART and home/TARGETS/PART."""
    part = "train" if split == "train" else _held_out(home / "images")
    place = home / "images" / part
    found = pairs(place, home / targets / part)
    return [(f"{home.name}/{part}/{within(place, image)}", image, target) for image, target in found]


def _mask_folder(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        return [Item(where, image, mask) for where, image, mask in _own_pairs(root / name, "masks", split)]

    return items


def _depth_png(path: Path, scale: float) -> np.ndarray:
    return one_channel(path, palette=False) / scale


def _depth_scale(home: Path) -> float:
    """Stored units per metre, from meta.json."""
    meta = home / "meta.json"
    try:
        content = json.loads(text_of(meta.read_bytes(), meta)) if meta.is_file() else None
    except (ValueError, RecursionError):
        raise BadInput(f'{meta} is not valid JSON; correct it, for mm it is {{"depth_scale": 1000}}.') from None
    scale = content.get("depth_scale") if isinstance(content, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        lack = "has no positive 'depth_scale'" if meta.is_file() else "is missing"
        raise BadInput(f"{home.name}/meta.json {lack}; write one: depth_scale is stored units per metre.")
    return float(scale)


def _depth_folder(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        found, scale = _own_pairs(root / name, "depth", split), _depth_scale(root / name)
        return [Item(where, image, Part(_depth_png, depth, scale)) for where, image, depth in found]

    return items


def _any_images(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        home = root / name  # of a folder that serves a task too, only the training images
        place = next((p for p in (home / "images" / "train", home / "train") if p.is_dir()), home)
        return [Item(p.relative_to(home).as_posix(), p, None) for p in pictures(place)]

    return items


def _own_classes(name: str) -> Callable[[Path, str], tuple[str, ...]]:
    def classes(root: Path, task: str) -> tuple[str, ...]:
        if task == "classification":
            # names of folders need not be UTF-8
            return tuple(os.fsencode(folder).decode(errors="replace") for folder in class_folders(root / name))
        if task != "segmentation":
            return ()
        listed = root / name / "classes.txt"
        if not listed.is_file():
            raise BadInput(f"{name}/classes.txt is missing; write one class a line, the first is mask value 0.")
        found = tuple(line.strip() for line in text_of(listed.read_bytes(), listed).splitlines() if line.strip())
        if not 0 < len(found) <= IGNORE:
            raise BadInput(f"{name}/classes.txt lists {len(found)} classes; list 1 to {IGNORE}, one a line.")
        return found

    return classes


def own(name: str, task: str) -> Dataset:
    """The entry of a folder of the user's own, in the generic layout OWN of `task`."""
    makers = {"classification": image_folder, "segmentation": _mask_folder, "depth": _depth_folder}
    items = makers.get(task, _any_images)(name)
    return Dataset((task,), OWN[task].replace("NAME", name), items, _own_classes(name))
