"""From the catalogue to tensors: which images of a data set are used, how they are resized, augmented and batched.

Every image is uint8 (3, H, W) until it is batched as float in [0,1]. Targets: a class index, a mask uint8 (H, W) whose
value 255 (IGNORE) counts nowhere, or a depth map float32 (H, W) in metres whose value 0 is invalid.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from . import parts, records
from .items import IGNORE, Dataset, Item, Part, Unreadable, file_of, unreadable
from .progress import track
from .settings import BadInput, Settings
from .tasks import TASKS

DATASETS = parts.table("catalogue", "DATASETS")  # by name; any other is a folder of the user's own
MAX_DEPTH = 10.0  # metres; the depth heads predict 0.001 .. 10 m (section 4.1)
SPLITS = ("train", "val", "test")
SAMPLE = 2000  # images of a large subset that are read through before long work
SHARED = 2**30  # bytes of shared memory: 8 processes hold 0.3 GB of images ahead for DeACL at 224 px, or of Cityscapes
ENLARGED = 3 * 384 * 384  # values of an image from which resizing a tensor (0.6 ms to 518 px) is worth a process
FLIPPED = ("classification", "depth")  # tasks whose only augmentation is a flip, left to right
EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)  # rows and columns of the crop by Eigen et al., as fractions


def _able(task: str) -> str:
    return ", ".join(name for name, data in DATASETS.items() if task in data.tasks)


def entry(name: str, task: str) -> Dataset:
    """The data set `name` for `task`: the catalogue's, or a folder of that name in the generic layout.

    Raises BadInput, with the names to choose from, if the catalogue's does not serve the task or if no folder of the
    user's own can be called so: record files carry the name, its parts joined by two underscores.
    """
    if name in DATASETS and task not in DATASETS[name].tasks:
        raise BadInput(f"There is no data set '{name}' for {task}; choose one of: {_able(task)}.")
    if not re.fullmatch(r"[A-Za-z0-9](_?[A-Za-z0-9.-])*", name):
        rule = "letters, digits and single underscores"
        raise BadInput(f"'{name}' cannot be a data set; choose one of: {_able(task)}; or name a folder by {rule}.")
    return DATASETS.get(name) or parts.part("catalogue.own").own(name, task)


def class_names(name: str, task: str, root: str = "") -> tuple[str, ...]:
    """Class names of a task, index = label; empty for depth. root: data folder, where some data sets list them."""
    classes = entry(name, task).classes
    with _looking_for(name, task, "class names", root):
        return classes(Path(root), task) if callable(classes) else classes.get(task, ())


@contextmanager
def _looking_for(name: str, task: str, what: str, root: str) -> Iterator[None]:
    """Says in one sentence that files of a data set are not there or cannot be read."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise _not_found(name, task, what, root) from None
    except OSError as error:
        place = str(error.filename or root)
        place = place if len(place) < 200 else f"{place[:200]}.."
        raise BadInput(f"{place} cannot be read ({error.strerror}); make it readable for '{name}' ({what}).") from None


def _not_found(name: str, task: str, what: str, root: str) -> BadInput:
    where = f"in the data folder '{root}'" if root else "as no data folder is given"
    layout = entry(name, task).layout
    if name not in DATASETS:
        own = f"or give a folder of your own, {layout}; none was found {where}"
        return BadInput(f"There is no data set '{name}' ({what}) for {task}; choose one of: {_able(task)}; {own}.")
    return BadInput(
        f"Data set '{name}' ({what}) was not found {where}; it should hold {layout} "
        f"(give the folder as make ... DATA=FOLDER or as data_root; make data fills it)."
    )


def list_items(name: str, task: str, split: str, n: int, root: str, counts: str = "any") -> list[Item]:
    """All items of a split (the scenes: the first n), found without reading a picture.

    Raises BadInput if the data set is not in the data folder, if files that belong to it are missing, if two images
    have one identifier, or, for counts = 'official', if it has fewer or more images than the official one.
    """
    data = entry(name, task)
    with _looking_for(name, task, split, root):
        items = data.items(Path(root), task, split, n)
    if not items:
        raise _not_found(name, task, split, root)
    if len({item.id for item in items}) < len(items):
        ((twice, times),) = Counter(item.id for item in items).most_common(1)
        raise BadInput(f"Data set '{name}' ({split}) has {times} images '{twice}'; list or name each of them once.")
    official = data.counts.get(split, ())
    if counts == "official" and official and len(items) not in official:
        expected = " or ".join(f"{count:,}" for count in official)
        raise BadInput(
            f"Data set '{name}' ({split}) has {len(items):,} images in '{root}' but the official one has {expected}; "
            "complete it (make data), or accept what is there by 'counts: any'."
        )
    return items


def select(
    name: str, task: str, split: str, n: int, n_val: int, seed: int, root: str, counts: str = "any"
) -> list[Item]:
    """The subset of `split` that is used: n images drawn by seed; 'val' is held out of train, never of test."""
    if entry(name, task).own_val:
        return list_items(name, task, split, n, root)
    items = list_items(name, task, "test" if split == "test" else "train", n, root, counts)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    start = n_val if split == "train" else 0
    chosen = [items[i] for i in order[start : start + n]]
    if not chosen:
        raise BadInput(f"Data set '{name}' has {len(items)} training images and n_val takes them all; lower n_val.")
    return chosen


class Subset(torch.utils.data.Dataset):
    """The images of one split of one data set, read, resized and augmented one by one.

    `subset[i]` is (image uint8 (3, H, W), target). Augmentation is drawn from (seed, view, image), so it does not
    depend on the order in which images are asked for. `flip`: whether images are turned left to right, None: drawn
    for each like any augmentation. `hash` says which images and files these are; `damaged` names files left out.
    """

    def __init__(
        self, name: str, task: str, items: list[Item], transform: v2.Transform, seed: int = 0, root: str = "",
        classes: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.task, self.items, self.transform, self.seed = name, task, items, transform, seed
        self.ids = [item.id for item in items]
        self.classes = class_names(name, task, root) if classes is None else classes
        self.view = 0
        self.flip: bool | None = False
        self.damaged: list[str] = []
        self._hashed: tuple[list[Item], str] = ([], "")  # of which items, as copies get others

    def __len__(self) -> int:
        return len(self.items)

    def read(self, i: int) -> tuple[tv_tensors.Image, int | tv_tensors.Mask]:
        """Image and target i as stored; raises BadInput for a mask with a value that is no class."""
        image, target = read(self.items[i], self.task)
        if self.task == "segmentation" and (target[target != IGNORE] >= len(self.classes)).any():
            worst = int(target[target != IGNORE].max())
            raise BadInput(
                f"The mask of {self.ids[i]} has the value {worst} but {self.name} has {len(self.classes)} classes; "
                "correct the mask (255: ignored) or the list of classes."
            )
        return image, target

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, target = self.read(i)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which takes half a millisecond to note where it was called, for GPUs
            torch.default_generator.manual_seed(image_seed(self.seed + self.view, self.ids[i]))
            image, target = self.transform(image, target)
        if self.flipped(i):
            image, target = (_mirrored(part) for part in (image, target))
        return image, torch.as_tensor(target)

    def flipped(self, i: int) -> bool:
        """Whether image i is turned left to right in this view."""
        return bool(image_seed(self.seed + self.view, self.ids[i]) % 2) if self.flip is None else self.flip

    @property
    def hash(self) -> str:
        """Short hash of identifiers, classes, labels, and of the content of all files or tensors, whole."""
        if self._hashed[0] is not self.items:
            self._hashed = self.items, _hash(self)
        return self._hashed[1]


def _hash(subset: Subset) -> str:
    stored = [part for item in subset.items for part in (item.image, item.target)]
    inside = [part if isinstance(part, int) else repr(part.key) for part in stored if isinstance(part, int | Part)]
    hasher = hashlib.sha256(json.dumps([subset.ids, subset.classes, inside]).encode())
    for part in (part for part in stored if isinstance(part, Tensor)):
        hasher.update(part.numpy().tobytes())
    hasher.update(_content(list(dict.fromkeys(file_of(part) for part in stored if isinstance(part, Path | Part)))))
    return hasher.hexdigest()[:16]


def _mirrored(part: Tensor | int) -> Tensor | int:
    """An image or a map turned left to right; a class stays what it is."""
    return v2.functional.horizontal_flip(part) if isinstance(part, Tensor) else part


def spread(items: Sequence[Any], count: int = SAMPLE) -> Sequence[Any]:
    """All items, or of 2 `count` and more at least `count` evenly spread ones."""
    return items[:: max(1, len(items) // count)]


def _content(files: list[Path]) -> bytes:
    """Digest of the content of files; those that the file system says are the same as before are not read again."""
    known = records.home() / "hashes" / records.digest([file_state(file) for file in files])
    found = records.read_sealed(known) if files else b""
    if found is None:
        with ThreadPoolExecutor(min(8, _cores())) as pool:
            each = track(pool.map(_digest, files), total=len(files), desc="reading files to know them again")
            found = hashlib.sha256(b"".join(each)).digest()
        records.write_sealed(found, known)
    return found


def _digest(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise unreadable(file, error) from None


def image_seed(seed: int, image_id: str) -> int:
    """A seed of its own for each image, so that results do not depend on batches or on the other images."""
    name = f"{seed}/{image_id}".encode(errors="surrogateescape")  # names of files need not be UTF-8
    return int.from_bytes(hashlib.sha256(name).digest()[:7], "big")


def read(item: Item, task: str) -> tuple[tv_tensors.Image, int | tv_tensors.Mask]:
    """Image uint8 (3, H, W) and target of one item; raises BadInput naming a damaged file or a target of other size."""
    return parts.part("catalogue.reading").read(item, task)


def transform(
    task: str, split: str, size: int | str | tuple[int, int], native: int, crop: str = "none"
) -> v2.Compose:  # fmt: skip
    """Resizing by the short side to `size` (px, 'native' or 'original'), and for train the paper's augmentation.

    A `size` (H, W) is the very size of images that are not smaller; those that are stay as they are. The flip of the
    tasks that are FLIPPED and no more is not part of it: see Subset.

    Classification ends in a square of the short side. Segmentation trains on crops of `native` px, the window of the
    sliding-window evaluation; its held-out images are cropped alike. Masks and depth maps are resized by nearest value.
    crop: 'eigen' makes the depth of test images invalid outside the centre crop by Eigen et al.
    """
    side = {"native": native, "original": None}.get(size, size)
    if task == "segmentation" and split == "train" and (side or native) < native:
        raise BadInput(f"segmentation.size is {side} px, less than the encoder's window of {native} px; raise it.")
    exact = isinstance(side, tuple)
    steps: list[v2.Transform] = [_AtLeast(native)] if side is None or exact else [v2.Resize(side, antialias=True)]
    steps += [_AtMost(side)] if exact else []
    if crop == "eigen" and split == "test":
        steps.insert(0, _EigenCrop())
    if task in ("classification", "deacl"):
        steps.append(v2.CenterCrop(side or native))
    if task == "segmentation" and split == "val":
        steps.append(v2.CenterCrop(native))
    augment = {
        "segmentation": [v2.RandomCrop(native), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()],
        "deacl": [v2.RandomResizedCrop(native, (0.5, 1)), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()],
    }
    return v2.Compose(steps + (augment.get(task, []) if split == "train" else []))


class _AtLeast(v2.Transform):
    """Leaves an image as it is unless its short side is below `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        small = min(image.shape[-2:]) < self.side
        return v2.Resize(self.side, antialias=True)(image, target) if small else (image, target)


class _AtMost(v2.Transform):
    """Brings an image to `size` (H, W) unless one of its sides is smaller."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        fits = all(own >= wanted for own, wanted in zip(image.shape[-2:], self.size, strict=True))
        return v2.Resize(self.size, antialias=True)(image, target) if fits else (image, target)


class _EigenCrop(v2.Transform):
    """Sets depth to 0 (invalid) outside rows 45:471 and columns 41:601 of 480x640, scaled for other sizes."""

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        height, width = target.shape
        top, bottom, left, right = (round(f * s) for f, s in zip(EIGEN, (height, height, width, width), strict=True))
        inside = torch.zeros_like(target)
        inside[top:bottom, left:right] = target[top:bottom, left:right]
        return image, tv_tensors.Mask(inside)  # a plain tensor would not be resized and flipped with the image


def load(task: str, name: str, split: str, settings: Settings, native: int) -> Subset:
    """The subset of data set `name` that `settings` asks for, for an encoder of `native` px.

    task: one of TASKS, or 'deacl' (images only). Raises BadInput if the data set is missing or does not serve the task.
    With damaged: skip, images that cannot be read, or whose target cannot, are left out after all else is drawn.
    """
    if task == "deacl":
        n, n_val, size = getattr(settings.deacl, f"n_{split}"), settings.deacl.n_val, "native"
    else:
        section = settings.task(task)
        n, n_val, size = getattr(section, f"n_{split}"), section.n_val, section.size
    crop = settings.depth.crop if task == "depth" else "none"
    drawn = settings.seed if settings.data_seed is None else settings.data_seed
    items = select(name, task, split, n, n_val, drawn, settings.data_root, settings.counts)
    damaged = _damaged(task, name, split, items, settings) if settings.damaged == "skip" else {}
    items = [item for item in items if item.id not in damaged]
    made = transform(task, split, size, native, crop)
    subset = Subset(name, task, items, made, settings.seed, settings.data_root)
    subset.flip, subset.damaged = None if task in FLIPPED and split == "train" else False, list(damaged.values())
    return subset


def _damaged(task: str, name: str, split: str, items: list[Item], settings: Settings) -> dict[str, str]:
    """Those of `items` that cannot be read, {identifier: file}; found by reading all once, and again if one changes.

    Raises BadInput if no image would be left, or for a target that can be read and is wrong.
    """
    stored = [item for item in items if not isinstance(item.image, Tensor)]
    made = records.made_from((), state=records.digest([[item.id, *map(file_state, item[1:])] for item in stored]))
    folder = records.runs_dir(settings.profile) / "damaged"
    path = records.place(folder, f"{task}__{name}__{split}", made, ".json")
    found = records.reusable(path, made) if stored else {"damaged": {}}
    if found is None:
        with ThreadPoolExecutor(1 if isinstance(stored[0].image, Part) else min(8, _cores())) as pool:
            whys = pool.map(lambda item: _why_unreadable(item, task), stored)
            whys = list(track(whys, total=len(stored), desc=f"looking for damage in {name} ({split})"))
        found = {
            "key": records.digest(made),
            "made_from": made,
            "damaged": {i.id: why for i, why in zip(stored, whys, strict=True) if why},
        }
        records.write_record(found, path)
    if len(found["damaged"]) == len(items):
        raise BadInput(f"None of the {len(items)} images of {name} ({split}) can be read; restore the data set.")
    return found["damaged"]


def file_state(part: object) -> object:
    """What changes when a file does (its ctime cannot be put back); parts of a file and labels stand for themselves."""
    file = file_of(part)
    if not isinstance(file, Path):
        return None if isinstance(part, Tensor) else part
    state = file.stat() if file.is_file() else None
    facts = state and (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    return [str(file), repr(part[2:]) if isinstance(part, Part) else "", facts]


def _why_unreadable(item: Item, task: str) -> str:
    """The file that keeps an item from being read; empty if there is none."""
    try:
        read(item, task)
    except Unreadable as problem:
        return str(problem.file)
    return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead() -> int:
    """Processes that read ahead for this one: none on two cores; the processes of DeACL share those of the machine."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torch.distributed.run
    return 0 if _cores() <= 2 or cramped() else min(8, (_cores() - 1) // sharing)


def cramped() -> str:
    """Why images cannot be read ahead, and the remedy; '' where they can. Containers often have 64 MB for that."""
    try:
        there = shutil.disk_usage("/dev/shm").total
    except OSError:  # this system shares memory in another way
        return ""
    return "" if there >= SHARED else (
        f"/dev/shm has {records.size(there)}, so no images are read ahead, which is slower; start the container with "
        f"--shm-size=2g."
    )  # fmt: skip


def workers(subset: Subset) -> int:
    """Processes that read a subset's images ahead: none for a few, for tensors that stay small, or on two cores."""
    few = len(subset) < 200 or (isinstance(subset.items[0].image, Tensor) and subset[0][0].numel() < ENLARGED)
    return 0 if few else ahead()


def _each(subset: Subset) -> Iterator[tuple[Tensor, Tensor]]:
    """All images and targets in their order, read ahead where that pays."""
    count = workers(subset)
    if not count:
        yield from (subset[i] for i in range(len(subset)))
        return
    loader = torch.utils.data.DataLoader(subset, batch_size=None, num_workers=count, prefetch_factor=4)
    for image, target in plainly(loader):
        yield image.clone(), target.clone()  # not the shared memory itself, of which there is not enough for all


def plainly(loader: torch.utils.data.DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """What `loader` gives; a BadInput of one of its workers stays the one sentence that it was."""
    try:
        yield from loader
    except BadInput as problem:  # from a worker: its whole traceback, with the sentence at its end
        last = str(problem).strip().splitlines()[-1]
        raise BadInput(re.sub(r"^[\w.]*(BadInput|Unreadable): ", "", last)) from None


def batches(subset: Subset, size: int, device: str = "cpu") -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of images of equal shape: (indices, images float (B, 3, H, W) in [0,1], targets (B, ...)) on `device`."""
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor, Tensor]]] = {}
    for i, (image, target) in enumerate(_each(subset)):
        same = waiting.setdefault(tuple(image.shape), [])
        same.append((i, image, target))
        if len(same) == size:
            yield _stack(waiting.pop(tuple(image.shape)), device)
    for same in waiting.values():
        yield _stack(same, device)


def _stack(rows: list[tuple[int, Tensor, Tensor]], device: str) -> tuple[list[int], Tensor, Tensor]:
    indices, *parts = zip(*rows, strict=True)
    images, targets = (torch.stack([one.as_subclass(Tensor) for one in part]) for part in parts)
    return list(indices), pixels(images, device), targets.to(device)


def pixels(images: Tensor, device: str | torch.device) -> Tensor:
    """Images uint8 as floats in [0,1] on `device`, the same on all: they get there with a quarter of the bytes."""
    whole = images.to(device, non_blocking=True).float()
    return whole / torch.full((), 255.0, device=device)  # by a number, GPUs would multiply by a rounded 1 / 255


def peek(task: str, name: str, settings: Settings, count: int, side: int = 64) -> tuple[Tensor, Tensor]:
    """The first `count` test images of one size, (k, 3, H, W) in [0,1], and their targets; `side`: short side in px.

    For 'deacl', which has no test split and no targets, augmented training images.
    """
    split, section = "train" if task == "deacl" else "test", getattr(settings, task)
    if entry(name, task).own_val:  # no more than are shown need be rendered
        settings = settings.model_copy(update={task: section.model_copy(update={f"n_{split}": count})})
    _, images, targets = next(batches(load(task, name, split, settings, side), count))
    return images, targets


def wanted(settings: Settings) -> list[tuple[str, str]]:
    """The data sets that `settings` asks for: (task, name), 'deacl' being a task too unless no row is fine-tuned."""
    used = [(t, name) for t in TASKS if getattr(settings, t) for name in settings.task(t).datasets]
    tuned = settings.deacl and any(row.tuned for row in settings.encoders)
    return used + ([("deacl", settings.deacl.dataset)] if tuned else [])


def asked(task: str, name: str, settings: Settings) -> int:
    """Training images that `settings` asks for: n_train, or all that the official data set has."""
    section = settings.deacl if task == "deacl" else settings.task(task)
    official = DATASETS[name].counts.get("train") if name in DATASETS else None
    return min(section.n_train, max(official or (section.n_train,)))
