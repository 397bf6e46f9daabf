"""Whether the data sets that settings ask for are there, whole and undamaged, and mean what they should."""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from ..datasets import (
    DATASETS,
    SPLITS,
    Unreadable,
    asked,
    class_names,
    entry,
    file_state,
    list_items,
    load,
    select,
    spread,
    wanted,
)
from ..items import IGNORE, Archive, Dataset
from ..metrics import MAX_DEPTH
from ..progress import track
from ..settings import BadInput, Settings, listed

NEAR = 0.15  # metres; depths of half the pixels are larger in any scene, and smaller if they are in other units
LOOK, FEW = 40, 8  # images of a split that are read before anything long: at most, and where nothing is doubtful


NO_ENTRY = Dataset((), "", lambda *_: [], {})  # of folders of the user's own: no official numbers, nothing to fetch


def known(name: str) -> Dataset:
    """What is known of a data set before it is there."""
    return DATASETS.get(name, NO_ENTRY)


def archives(name: str, settings: Settings) -> tuple[Archive, ...]:
    """What is fetched of one data set for all that `settings` uses it for."""
    return known(name).fetched(max(asked(task, used, settings) for task, used in wanted(settings) if used == name))


def bytes_of(name: str, settings: Settings) -> float:
    """Bytes of one data set, unpacked or as its archives are; nothing of a folder of the user's own."""
    files = archives(name, settings)
    as_it_is = bool(files) and all(a.as_it_is for a in files)
    return (0.0 if as_it_is else known(name).gigabytes * 1e9) + sum(a.size for a in files)


def shortage(task: str, name: str, settings: Settings) -> tuple[int, int] | None:
    """(training images that are used, those asked for) where fewer are there than asked for; None where none are."""
    section, most = settings.deacl if task == "deacl" else settings.task(task), asked(task, name, settings)
    try:
        data = entry(name, task)
        if data.own_val or (settings.counts == "official" and len(data.counts.get("train", ())) == 1):
            return None  # rendered, or of another number refused
        has = len(list_items(name, task, "train", 1, settings.data_root, settings.counts))
    except BadInput:  # which `problems` says
        return None
    return (max(0, has - section.n_val), most) if has < most else None


def shortages(settings: Settings) -> list[str]:
    """A sentence for each head, and for DeACL, that is trained on fewer images than `settings` asks for."""
    found = []
    for task, name in wanted(settings):
        if short := shortage(task, name, settings):
            what = "DeACL" if task == "deacl" else f"The {task} head"
            larger = sum(a.size for a in known(name).larger)
            remedy = f"make data fetches them ({larger / 1e9:.1f} GB)" if larger else "add images"
            images = f"{short[0]:,} of {short[1]:,} images, as no more are there"
            found.append(f"{what} on {name} is trained on {images}; {remedy}, or lower {task}.n_train.")
    return found


def usable(task: str, settings: Settings) -> list[str]:
    """The data sets of a task or of 'deacl'; with missing: skip, those of them that are there and complete."""
    return [name for used, name in wanted(settings) if used == task and not _absent(task, name, settings)]


def _absent(task: str, name: str, settings: Settings) -> str:
    """With missing: skip, why a data set is left out, '' if it is there."""
    return next(iter(problems(task, name, settings)), "") if settings.missing == "skip" else ""


def overview(settings: Settings) -> pd.DataFrame:
    """What each task uses: images, classes and hash of every data set and split.

    Every image and target is read once (of large subsets, evenly spread ones), and official files are compared with
    their checksums, so a missing data set, a damaged file, a mask of another size than its image, or targets that
    cannot be meant are found (BadInput names them) before any long work; remarks on them are printed, see _judged.
    With missing: skip, a data set that is not there is a row of 0 images with the reason in place of the hash. With
    damaged: skip, a column 'damaged' counts the images left out.
    """
    rows = []
    for task, name in wanted(settings):
        if absent := _absent(task, name, settings):
            none = {"split": "", "images": 0, "classes": 0, "hash": absent, "damaged": 0}
            rows.append({"task": task, "dataset": name, **none})
            continue
        if settings.counts == "official":
            verify(name, settings.data_root)
        held = {}
        for split in SPLITS[:2] if task == "deacl" else SPLITS:
            subset = load(task, name, split, settings, native=8)  # files are read as they are, so any size will do
            indices = track(spread(range(len(subset))), desc=f"reading {name} ({split})")
            held[split] = [_held(subset.read(i)[1], task) for i in indices]
            sizes = {"images": len(subset), "classes": len(subset.classes), "hash": subset.hash}
            rows.append({"task": task, "dataset": name, "split": split, **sizes, "damaged": len(subset.damaged)})
        for remark in _judged(task, name, subset.classes, held):
            print(remark)
    found = pd.DataFrame(rows)
    return found if settings.damaged == "skip" else found.drop(columns="damaged", errors="ignore")


def hashes(settings: Settings) -> dict[str, str]:
    """Hash of the images of every task, data set and split, 'depth scenes test'; with missing: skip, why there is none.

    Raises BadInput as `load` does.
    """
    return {
        f"{task} {name} {split}": _absent(task, name, settings) or load(task, name, split, settings, native=8).hash
        for task, name in wanted(settings)
        for split in (SPLITS[:2] if task == "deacl" else SPLITS)
    }


def _held(target: int | Tensor, task: str) -> Tensor:
    """What is kept of a target to judge it: pixels of each value (256,), or median in m and share of valid pixels."""
    if task == "segmentation":
        return torch.bincount(target.flatten().long(), minlength=IGNORE + 1)
    if task == "depth":
        known = target[target > 0]
        return torch.stack([known.nanmedian(), (known <= MAX_DEPTH).sum() / target.numel()])
    return torch.empty(0)


def _judged(task: str, name: str, classes: Sequence[str], held: dict[str, list[Tensor]]) -> list[str]:
    """Remarks, a sentence each, on what the targets of each split of a data set hold, as given by _held.

    Raises BadInput where they cannot be meant: a split without a single valid pixel, masks of 0 and 255 for two
    classes or more, depths that are in other units.
    """
    judge = {"segmentation": _judge_masks, "depth": _judge_depths}.get(task)
    held = {split: rows for split, rows in held.items() if rows}
    return judge(name, classes, {split: torch.stack(rows) for split, rows in held.items()}) if judge and held else []


def _judge_masks(name: str, classes: Sequence[str], held: dict[str, Tensor]) -> list[str]:
    for split, rows in held.items():
        if not rows[:, :IGNORE].any():
            what = f"No pixel of the {len(rows)} masks of {name} ({split}) that were read has a class"
            raise BadInput(f"{what}, all are 255, which means none; store class numbers from 0.")
    read, pixels = sum(map(len, held.values())), sum(rows.sum(0) for rows in held.values())
    absent = [label for label in range(len(classes)) if not pixels[label]]
    if absent == [*range(1, len(classes))] and absent and pixels[IGNORE]:
        what = f"The {read} masks of {name} that were read hold 0 and 255 only, and 255 means that a pixel has no class"
        raise BadInput(f"{what}; store class 1, '{classes[1]}', as 1.")
    if name in DATASETS or not absent:
        return []
    some = listed([f"{label} ({classes[label]})" for label in absent])
    return [f"No pixel of the {read} masks of {name} that were read is of class {some}."]


def _judge_depths(name: str, classes: Sequence[str], held: dict[str, Tensor]) -> list[str]:
    median, valid = torch.cat([*held.values()]).nanmedian(0).values.tolist()
    ours = f"correct depth_scale in {name}/meta.json (stored units per metre)"
    remedy = "restore the official files" if name in DATASETS else ours
    if not (math.isnan(median) or NEAR <= median <= MAX_DEPTH):
        said = f"the median of the maps that were read is {median:.3g} m, heads give up to {MAX_DEPTH:g} m"
        raise BadInput(f"The depths of {name} are in other units, or too far: {said}; {remedy}.")
    for split, rows in held.items():
        if not rows[:, 1].any():
            what = f"No pixel of the {len(rows)} depth maps of {name} ({split}) that were read is valid"
            raise BadInput(f"{what}, that is above 0 and at most {MAX_DEPTH:g} m; {remedy}.")
    few = f"Hardly a pixel of the depth maps of {name} is valid (above 0 and at most {MAX_DEPTH:g} m)"
    return [f"{few}: {100 * valid:.2g} % of the map in the middle."] if valid < 0.01 else []


def remarks(task: str, name: str, settings: Settings) -> list[str]:
    """What `_judged` says of FEW evenly spread images of each split, of up to LOOK where in doubt."""
    if entry(name, task).own_val:
        return []
    splits = {"deacl": ("train",), "classification": ("train", "test")}.get(task, SPLITS)
    held: dict[str, list[Tensor]] = {split: [] for split in splits}
    for split, rows in held.items():
        subset = load(task, name, split, settings.model_copy(update={"damaged": "stop"}), native=8)
        for count, i in enumerate(spread(range(len(subset)), LOOK)):
            if count >= FEW and _enough(rows, task, 2 if name in DATASETS else len(subset.classes)):
                break
            try:
                rows.append(_held(subset.read(i)[1], task))
            except Unreadable:
                if settings.damaged != "skip":
                    raise
    return _judged(task, name, subset.classes, held)


def _enough(rows: list[Tensor], task: str, classes: int) -> bool:
    """Whether they show that their numbers are classes or metres: as many classes occur, or a depth is valid."""
    seen = sum(rows, torch.zeros(1))
    if task == "segmentation":
        return int((seen[:IGNORE] > 0).sum()) >= classes
    return task != "depth" or bool(seen[-1] > 0)


def look(settings: Settings) -> tuple[list[str], list[str]]:
    """Sentences on the content of the data sets that `settings` asks for: what cannot be used, and remarks."""
    wrong, said = {}, {}  # each is said once
    for task, name in wanted(settings):
        try:
            said |= dict.fromkeys(remarks(task, name, settings))
        except BadInput as problem:
            wrong[str(problem)] = None
    return list(wrong), list(said)


def verify(name: str, root: str) -> None:
    """Compares the files of a data set that have an official MD5 with it; raises BadInput naming one that differs."""
    for place, expected in known(name).md5.items():
        file = Path(root) / place
        if file.is_file() and _md5(file, json.dumps(file_state(file))) != expected:
            raise BadInput(f"{file} differs from the official file (its MD5 is not {expected}); fetch it again.")


@cache
def _md5(file: Path, state: str) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "md5").hexdigest()


def problems(task: str, name: str, settings: Settings) -> list[str]:
    """What is wrong with one data set for one task: one sentence or none, found without reading a picture."""
    section = settings.deacl if task == "deacl" else settings.task(task)
    for split in ("train",) if task == "deacl" else ("train", "test"):
        try:
            if not entry(name, task).own_val:
                select(name, task, split, 1, section.n_val, settings.seed, settings.data_root, settings.counts)
                class_names(name, task, settings.data_root)
        except BadInput as problem:
            return [str(problem)]  # what is missing for train is mostly missing for test, too: said once
    return []


def check(settings: Settings) -> list[str]:
    """One sentence for each thing wrong with the data sets that `settings` asks for; empty if all are complete."""
    return list(dict.fromkeys(problem for task, name in wanted(settings) for problem in problems(task, name, settings)))
