"""What a data set is: images before they are read, and an entry of the catalogue."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .settings import BadInput

IGNORE = 255  # of masks: the pixel counts nowhere


class Part(NamedTuple):
    """An image or target that is more than a picture file: `read(file, key)` gives its pixels.

    An image is uint8 (H, W, 3), a mask holds class numbers (H, W), a depth map metres (H, W).
    """

    read: Callable[[Path, Any], np.ndarray]
    file: Path
    key: Any = None


class Item(NamedTuple):
    """One image before it is read: an identifier, the picture and its target."""

    id: str
    image: Path | Part | Tensor
    target: int | Path | Part | Tensor | None


def file_of(part: object) -> object:
    """The file of a stored image or target; a label or tensor stands for itself."""
    return part.file if isinstance(part, Part) else part


class Unreadable(BadInput):
    """`file` of a data set cannot be read: it is damaged, empty, no picture, or not ours to read."""

    file: Path | None = None


def unreadable(part: Path | Part, error: Exception) -> Unreadable:
    """The refusal of a stored image or target."""
    file, within = file_of(part), getattr(part, "key", None)
    what = f"{within} in {file}" if isinstance(within, str) else file
    why = error.strerror if isinstance(error, OSError) and error.strerror else "damaged or empty"
    problem = Unreadable(f"The image file {what} cannot be read ({why}); replace or remove it, or set damaged: skip.")
    problem.file = file
    return problem


class Archive(NamedTuple):
    """A public file: `place` is what it becomes in the data folder, unpacked or (a file name) as it is."""

    url: str
    place: str
    size: int  # bytes, about
    checksum: str = ""  # 'md5:...', 'sha1:...' or 'sha256:...'
    inside: str = ""  # the folder in the archive that becomes `place`; '': the one of its name

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def as_it_is(self) -> bool:
        """Whether the file itself is what belongs in the data folder, not what is packed in it."""
        return self.place.endswith(self.name)


@dataclass(frozen=True)
class Dataset:
    """One data set: `items(root, task, split, n)` lists a split: train, test, or val if it has its own.

    `n` counts only where images are rendered. What is not there is an empty list, FileNotFoundError or
    NotADirectoryError; what is there in part or damaged is BadInput.
    """

    tasks: tuple[str, ...]
    layout: str  # what must lie in the data folder, for the sentence that says it is missing
    items: Callable[[Path, str, str, int], list[Item]]
    classes: dict[str, tuple[str, ...]] | Callable[[Path, str], tuple[str, ...]]  # of a task
    own_val: bool = False
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)  # split -> official numbers of images
    many: int = 0  # classes, where their names stand in its files
    shape: tuple[int, int] = (375, 500)  # (H, W) of its images, as far as one is typical
    gigabytes: float = 0  # on disk, unpacked
    archives: tuple[Archive, ...] = ()  # what is fetched; none if it must be obtained by hand
    larger: tuple[Archive, ...] = ()  # in their place where more training images are asked for than they hold
    by_hand: str = ""  # what to get where, and where to put it
    md5: dict[str, str] = field(default_factory=dict)  # of official files, by path in the data folder

    def fetched(self, n_train: int) -> tuple[Archive, ...]:
        """What is fetched for so many training images."""
        return self.larger if self.larger and n_train > min(self.counts["train"]) else self.archives
