"""Folders of the user's own in the generic layout, by any name that is no data set's."""

import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np

from ..items import IGNORE, Dataset, Item, Part
from ..settings import BadInput, listed
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
    names = [folders(p) for p in (home / "train", home / _held_out(home)) if p.is_dir()]
    wrong = sorted(set(names[0]) ^ set(names[-1])) if names else []
    if wrong:
        raise BadInput(f"The parts of {home} differ in class folders: {listed(wrong)}; give them the same ones.")
    return names[0] if names else []


def image_folder(name: str, root: Path, task: str, split: str, n: int) -> list[Item]:
    part = root / name / ("train" if split == "train" else _held_out(root / name))
    labelled = enumerate(part / folder for folder in class_folders(root / name))
    return [Item(str(p.relative_to(root)), p, label) for label, folder in labelled for p in pictures(folder)]


def _map_folder(name: str, root: Path, task: str, split: str, n: int) -> list[Item]:
    """Images with masks, or with depth maps that meta.json says the unit of."""
    home = root / name
    part = "train" if split == "train" else _held_out(home / "images")
    place = home / "images" / part
    found = pairs(place, home / ("masks" if task == "segmentation" else "depth") / part)
    scale = _depth_scale(home) if task == "depth" else None
    return [
        Item(f"{name}/{part}/{within(place, image)}", image, Part(_depth_png, target, scale) if scale else target)
        for image, target in found
    ]


def _depth_png(path: Path, scale: float) -> np.ndarray:
    return one_channel(path, palette=False) / scale


def _depth_scale(home: Path) -> float:
    meta = home / "meta.json"
    try:
        scale = json.loads(text_of(meta))["depth_scale"]
        if 0 < scale < math.inf and scale is not True:
            return float(scale)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise BadInput(f'{meta} must give the stored units per metre; for mm write {{"depth_scale": 1000}}.')


def _any_images(name: str, root: Path, task: str, split: str, n: int) -> list[Item]:
    home = root / name  # of a folder that serves a task too, only the training images
    place = next((p for p in (home / "images" / "train", home / "train") if p.is_dir()), home)
    return [Item(p.relative_to(home).as_posix(), p, None) for p in pictures(place)]


def _own_classes(name: str, root: Path, task: str) -> tuple[str, ...]:
    if task == "classification":
        # names of folders need not be UTF-8
        return tuple(os.fsencode(folder).decode(errors="replace") for folder in class_folders(root / name))
    if task != "segmentation":
        return ()
    listed = root / name / "classes.txt"
    lines = text_of(listed).splitlines() if listed.is_file() else []
    found = tuple(line.strip() for line in lines if line.strip())
    if not 0 < len(found) <= IGNORE:
        raise BadInput(f"{listed} lists {len(found)} classes; list 1 to {IGNORE}, one a line, the first for value 0.")
    return found


def own(name: str, task: str) -> Dataset:
    """The entry of a folder of the user's own, in the generic layout OWN of `task`."""
    makers = {"classification": image_folder, "segmentation": _map_folder, "depth": _map_folder, "deacl": _any_images}
    layout = OWN[task].replace("NAME", name)
    return Dataset((task,), layout, partial(makers[task], name), partial(_own_classes, name))
