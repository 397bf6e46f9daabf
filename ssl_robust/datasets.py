"""Data sets, one entry each in DATASETS: where the files lie, classes, how an image and its target are read.

Every image is uint8 (3, H, W) until it is batched as float in [0,1]. Targets: a class index, a mask uint8 (H, W) whose
value 255 (IGNORE) counts nowhere, or a depth map float32 (H, W) in metres whose value 0 is invalid.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision import datasets as tv_datasets
from torchvision import tv_tensors
from torchvision.transforms import v2

from . import records, scenes
from .progress import track
from .settings import TASKS, BadInput, Settings

IGNORE = 255
MAX_DEPTH = 10.0  # metres; the depth heads predict 0.001 .. 10 m (section 4.1)
SPLITS = ("train", "val", "test")
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Item(NamedTuple):
    """One image before it is read: an identifier, the picture (file or uint8 tensor) and its target."""

    id: str
    image: Path | Tensor
    target: int | Path | Tensor | None


@dataclass(frozen=True)
class Dataset:
    """One data set: `items(root, task, split, n)` lists a split: train, test, or val if it has its own."""

    tasks: tuple[str, ...]
    layout: str  # what must lie in the data folder, for the sentence that says it is missing
    items: Callable[[Path, str, str, int], list[Item]]
    classes: dict[str, tuple[str, ...]]  # task -> class names
    own_val: bool = False


def _scenes(root: Path, task: str, split: str, n: int) -> list[Item]:
    rendered = scenes.cached(records.ROOT / "runs" / "scenes", split, n, progress=track)
    targets = {"classification": rendered.labels, "segmentation": rendered.masks, "depth": rendered.depths}.get(task)
    ids = [f"scenes-{scenes.VERSION}-{split}-{i}" for i in range(n)]
    if task == "classification":
        targets = [int(t) for t in targets]
    return [Item(ids[i], rendered.images[i], None if targets is None else targets[i]) for i in range(n)]


def _image_folder(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        folder = tv_datasets.ImageFolder(root / name / split)
        wrong = sorted(set(folder.classes) ^ set(DATASETS[name].classes["classification"]))
        if wrong:  # labels are numbers of sorted folders, so one folder more or less would shift them silently
            raise BadInput(
                f"{name}/{split} has class folders missing or too many: {', '.join(wrong[:5])}; correct them."
            )
        return [Item(str(Path(path).relative_to(root)), Path(path), label) for path, label in folder.samples]

    return items


def _voc(root: Path, task: str, split: str, n: int) -> list[Item]:
    data = tv_datasets.VOCSegmentation(str(root), year="2012", image_set={"train": "train", "test": "val"}[split])
    return [Item(Path(i).stem, Path(i), Path(m)) for i, m in zip(data.images, data.masks, strict=True)]


def _depth_folder(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        part = {"train": "train", "test": "val"}[split]
        images = sorted((root / name / "images" / part).glob("*.*"))
        pairs = [(i, root / name / "depth" / part / f"{i.stem}.png") for i in images]
        missing = [d.name for _, d in pairs if not d.is_file()]
        if missing:
            raise BadInput(f"{name}/depth/{part} lacks {missing[0]} ({len(missing)} missing); restore the depth maps.")
        return [Item(f"{name}/{part}/{i.stem}", i, d) for i, d in pairs]

    return items


def _flat_folder(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        files = sorted(p for p in (root / name).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        return [Item(p.name, p, None) for p in files]

    return items


DATASETS = {
    "scenes": Dataset(
        (*TASKS, "deacl"), "", _scenes,
        {"classification": scenes.CATEGORIES, "segmentation": ("background", *scenes.CATEGORIES)}, own_val=True,
    ),
    "cifar10": Dataset(
        ("classification", "deacl"), "cifar10/{train,test}/CLASS/*.png", _image_folder("cifar10"),
        {"classification": CIFAR10_CLASSES},
    ),
    "voc2012": Dataset(
        ("segmentation", "deacl"), "VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}", _voc,
        {"segmentation": VOC_CLASSES},
    ),
    "sevenscenes": Dataset(
        ("depth", "deacl"), "sevenscenes/{images,depth}/{train,val} and sevenscenes/meta.json",
        _depth_folder("sevenscenes"), {},
    ),
    "imagenet_samples": Dataset(
        ("deacl",), "imagenet_samples/*.jpg", _flat_folder("imagenet_samples"), {},
    ),
}  # fmt: skip


def entry(name: str, task: str) -> Dataset:
    """The data set `name` if it serves `task`; raises BadInput listing those that do."""
    able = [n for n, d in DATASETS.items() if task in d.tasks]
    if name not in able:
        raise BadInput(f"There is no data set '{name}' for {task}; choose one of: {', '.join(able)}.")
    return DATASETS[name]


def class_names(name: str, task: str) -> tuple[str, ...]:
    """Class names of a task, index = label; empty for depth."""
    return entry(name, task).classes.get(task, ())


def list_items(name: str, task: str, split: str, n: int, root: str) -> list[Item]:
    """All items of a split (the scenes: the first n); raises BadInput if the data set is not in the data folder."""
    data = entry(name, task)
    try:
        items = data.items(Path(root), task, split, n)
    except (FileNotFoundError, NotADirectoryError, RuntimeError):
        items = []
    if not items:
        where = f"the data folder '{root}'" if root else "no data folder: DATA is not set"
        raise BadInput(
            f"Data set '{name}' ({split}) was not found in {where}; it should hold {data.layout} "
            f"(give the folder as make ... DATA=FOLDER or as data_root)."
        )
    return items


def select(name: str, task: str, split: str, n: int, n_val: int, seed: int, root: str) -> list[Item]:
    """The subset of `split` that is used: n images drawn by seed; 'val' is held out of train, never of test."""
    if DATASETS[name].own_val:
        return list_items(name, task, split, n, root)
    items = list_items(name, task, "test" if split == "test" else "train", n, root)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    start = n_val if split == "train" else 0
    chosen = [items[i] for i in order[start : start + n]]
    if not chosen:
        raise BadInput(f"Data set '{name}' has {len(items)} training images and n_val takes them all; lower n_val.")
    return chosen


class Subset(torch.utils.data.Dataset):
    """The images of one split of one data set, read, resized and augmented one by one.

    `subset[i]` is (image uint8 (3, H, W), target). Augmentation is drawn from (seed, view, image), so it does not
    depend on the order in which images are asked for. `hash` says exactly which images and files these are.
    """

    def __init__(self, name: str, task: str, items: list[Item], transform: v2.Transform, seed: int = 0) -> None:
        self.name, self.task, self.items, self.transform, self.seed = name, task, items, transform, seed
        self.ids = [item.id for item in items]
        self.classes = class_names(name, task)
        self.view = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, target = read(self.items[i], self.task)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(image_seed(self.seed + self.view, self.ids[i]))
            image, target = self.transform(image, target)
        return image, torch.as_tensor(target)

    @cached_property
    def hash(self) -> str:
        hasher = hashlib.sha256(json.dumps(self.ids).encode())
        for item in self.items:
            for part in (item.image, item.target):
                hasher.update(part.read_bytes() if isinstance(part, Path) else b"")
        return hasher.hexdigest()[:16]


def image_seed(seed: int, image_id: str) -> int:
    """A seed of its own for each image, so that results do not depend on batches or on the other images."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{image_id}".encode()).digest()[:7], "big")


def _picture(path: Path, mode: str | None) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except (UnidentifiedImageError, OSError):
        raise BadInput(f"The image file {path} cannot be read (damaged or empty); replace or remove it.") from None
    return picture.convert(mode) if mode else picture


def read(item: Item, task: str) -> tuple[tv_tensors.Image, int | tv_tensors.Mask]:
    """Image uint8 (3, H, W) and target of one item; raises BadInput naming a damaged file or a target of other size."""
    image = item.image if isinstance(item.image, Tensor) else v2.functional.pil_to_tensor(_picture(item.image, "RGB"))
    target = item.target if item.target is not None else 0
    if isinstance(target, Path):
        pixels = np.array(_picture(target, None))
        target = torch.from_numpy(pixels / depth_scale(target) if task == "depth" else pixels)
    if isinstance(target, Tensor):
        if target.shape[-2:] != image.shape[-2:]:
            sizes = f"{tuple(target.shape[-2:])} but its image {tuple(image.shape[-2:])}"
            raise BadInput(f"The {task} target of {item.id} has size {sizes}; replace the file {item.target}.")
        target = tv_tensors.Mask(target.float() if task == "depth" else target.to(torch.uint8))
    return tv_tensors.Image(image), target


def depth_scale(depth_file: Path) -> float:
    """Stored units per metre, from meta.json three folders up (layout NAME/depth/SPLIT/FILE.png)."""
    meta = depth_file.parents[2] / "meta.json"
    if not meta.is_file():
        raise BadInput(f"{meta.parent.name}/meta.json is missing; write one with 'depth_scale' (units per metre).")
    return float(records.read_json(meta)["depth_scale"])


def transform(task: str, split: str, size: int | str, native: int) -> v2.Compose:
    """Resizing by the short side to `size` (px, 'native' or 'original'), and for train the paper's augmentation.

    Classification ends in a square of the short side. Segmentation trains on crops of `native` px, the window of the
    sliding-window evaluation; its held-out images are cropped alike. Masks and depth maps are resized by nearest value.
    """
    side = {"native": native, "original": None}.get(size, size)
    if task == "segmentation" and split == "train" and (side or native) < native:
        raise BadInput(f"segmentation.size is {side} px, less than the encoder's window of {native} px; raise it.")
    steps: list[v2.Transform] = [_AtLeast(native)] if side is None else [v2.Resize(side, antialias=True)]
    if task in ("classification", "deacl"):
        steps.append(v2.CenterCrop(side or native))
    if task == "segmentation" and split == "val":
        steps.append(v2.CenterCrop(native))
    augment = {
        "classification": [v2.RandomHorizontalFlip()],
        "segmentation": [v2.RandomCrop(native), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()],
        "depth": [v2.RandomHorizontalFlip()],
        "deacl": [v2.RandomResizedCrop(native, (0.5, 1)), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()],
    }
    return v2.Compose(steps + (augment[task] if split == "train" else []))


class _AtLeast(v2.Transform):
    """Leaves an image as it is unless its short side is below `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        small = min(image.shape[-2:]) < self.side
        return v2.Resize(self.side, antialias=True)(image, target) if small else (image, target)


def load(task: str, name: str, split: str, settings: Settings, native: int) -> Subset:
    """The subset of data set `name` that `settings` asks for, for an encoder of `native` px.

    task: one of TASKS, or 'deacl' (images only). Raises BadInput if the data set is missing or does not serve the task.
    """
    if task == "deacl":
        n, n_val, size = getattr(settings.deacl, f"n_{split}"), settings.deacl.n_val, "native"
    else:
        section = settings.task(task)
        n, n_val, size = getattr(section, f"n_{split}"), section.n_val, section.size
    items = select(name, task, split, n, n_val, settings.seed, settings.data_root)
    return Subset(name, task, items, transform(task, split, size, native), settings.seed)


def batches(subset: Subset, size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of images of equal shape: (indices, images float (B, 3, H, W) in [0,1], targets (B, ...))."""
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor, Tensor]]] = {}
    for i in range(len(subset)):
        image, target = subset[i]
        same = waiting.setdefault(tuple(image.shape), [])
        same.append((i, image, target))
        if len(same) == size:
            yield _stack(waiting.pop(tuple(image.shape)))
    for same in waiting.values():
        yield _stack(same)


def _stack(rows: list[tuple[int, Tensor, Tensor]]) -> tuple[list[int], Tensor, Tensor]:
    indices, images, targets = zip(*rows, strict=True)
    images = torch.stack([i.as_subclass(Tensor) for i in images]).float() / 255
    return list(indices), images, torch.stack([t.as_subclass(Tensor) for t in targets])


def peek(task: str, name: str, settings: Settings, count: int, side: int = 64) -> tuple[Tensor, Tensor]:
    """The first `count` test images of one size, (k, 3, H, W) in [0,1], and their targets; `side`: short side in px."""
    _, images, targets = next(batches(load(task, name, "test", settings, side), count))
    return images, targets


def overview(settings: Settings) -> pd.DataFrame:
    """What each task uses: images, classes and hash of every data set and split.

    Every image and target is read once, so a missing data set, a damaged file or a mask of another size than its image
    is found (BadInput names it) before any long work.
    """
    used = [(t, name) for t in TASKS if getattr(settings, t) for name in settings.task(t).datasets]
    wanted = [(task, name, split) for task, name in used for split in SPLITS]
    wanted += [("deacl", settings.deacl.dataset, split) for split in ("train", "val")] if settings.deacl else []
    rows = []
    for task, name, split in wanted:
        subset = load(task, name, split, settings, native=8)  # files are read as they are, so any size will do
        for item in track(subset.items, desc=f"reading {name} ({split})"):
            read(item, task)
        sizes = {"images": len(subset), "classes": len(subset.classes), "hash": subset.hash}
        rows.append({"task": task, "dataset": name, "split": split, **sizes})
    return pd.DataFrame(rows)


def check(settings: Settings) -> list[str]:
    """One sentence for each data set that `settings` asks for and that is not there; empty if all are."""
    wanted = [(t, name) for t in TASKS if getattr(settings, t) for name in settings.task(t).datasets]
    wanted += [("deacl", settings.deacl.dataset)] if settings.deacl else []
    problems = []
    for task, name in wanted:
        for split in ("train",) if task == "deacl" else ("train", "test"):
            try:
                entry(name, task) if name == "scenes" else list_items(name, task, split, 1, settings.data_root)
            except BadInput as problem:
                problems.append(str(problem))
    return list(dict.fromkeys(problems))
