"""Reading picture files and folders of them: what all data sets share. Nothing that a data file holds is executed."""

import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..settings import BadInput

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")


def once(open_file: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """`open_file`, called once for each file as it now is, and again in each process, as workers share no handles."""

    @lru_cache(maxsize=64)
    def kept(pid: int, path: Path, size: int, *changed: int) -> Any:
        return open_file(path)

    def opened(path: Path) -> Any:
        state = path.stat()
        return kept(os.getpid(), path, state.st_size, state.st_mtime_ns, state.st_ctime_ns)

    return opened


def damaged(path: Path) -> BadInput:
    return BadInput(f"The file {path} cannot be read (damaged or half a download); fetch it again.")


def text_of(file: Path, content: bytes | None = None) -> str:
    """The text of a file in UTF-8, or of a part of it that has been read; else BadInput."""
    try:
        text = (file.read_bytes() if content is None else content).decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadInput(f"{file} is not text in UTF-8; save it in that encoding.")
    return text


def rgb(picture: Image.Image, place: object, shape: tuple[int, ...] = ()) -> np.ndarray:
    """A picture as uint8 (H, W, 3), turned upright by its orientation tag unless its map of `shape` is not.

    16 bits of gray become the upper 8 of them, transparency is left out. Raises BadInput naming `place` where the value
    of white is unknown, or where picture and map fit either way.
    """
    if picture.mode in ("I", "F", "LAB"):
        raise BadInput(
            f"{place} stores {picture.mode} numbers, of which white is unknown; save it as 8-bit gray or RGB."
        )
    if picture.mode.startswith("I;16"):
        gray = np.array(picture)
        if 0 < gray.max(initial=0) < 1 << 14:  # 12 bits of a camera, say, would be nearly black
            raise BadInput(f"{place} has 16 bits a value of which it uses the lower ones only; save it with 8.")
        stored = Image.fromarray((gray >> 8).astype(np.uint8)).convert("RGB")
    else:
        stored = (picture.convert("RGBA") if picture.has_transparency_data else picture).convert("RGB")
    tag = picture.getexif().get(ExifTags.Base.Orientation, 1)  # now, as reading a TIFF has turned it
    stored.getexif()[ExifTags.Base.Orientation] = tag
    ways = [np.array(stored), np.array(ImageOps.exif_transpose(stored))]
    fits = [way.shape[:2] == tuple(shape) for way in ways]
    if all(fits) and tag in range(2, 9):
        raise BadInput(f"{place} is to be turned (EXIF orientation {tag}), its map or not; save both upright.")
    return ways[0] if fits[0] else ways[1]


def pictures(folder: Path) -> list[Path]:
    """Image files below `folder`, sorted, without hidden ones; raises OSError if a folder cannot be read."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    found = []
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = sorted(f for f in folders if f[0] != ".")
        found += [Path(place, f) for f in sorted(files) if f[0] != "." and f.lower().endswith(IMAGES)]
    return found


def _refuse(error: OSError) -> None:
    raise error


def demand(files: Iterable[Path], remedy: str) -> None:
    """Refuses a data set of which a file is missing."""
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise BadInput(f"{missing[0].parent} lacks {missing[0].name} ({len(missing)} missing); {remedy}.")


def pairs(images: Path, targets: Path) -> list[tuple[Path, Path]]:
    """Images and the PNG files of the same name; raises BadInput for one without the other."""
    found = [(i, targets / i.relative_to(images).with_suffix(".png")) for i in pictures(images)]
    demand((t for _, t in found), "restore it or remove its image")
    alone = sorted(set(pictures(targets)) - {t for _, t in found})
    if alone:
        raise BadInput(f"{images} has no image for {alone[0]} ({len(alone)} missing); restore it or remove the target.")
    return found


def one_channel(path: Path, palette: bool = True) -> np.ndarray:
    """The pixels (H, W) of a mask or depth map; raises BadInput if a pixel has several numbers, or is a colour."""
    with Image.open(path) as picture:
        if picture.mode[:2] not in ("1", "L", "I", "I;", "F", *("P" * palette)):
            raise BadInput(f"{path} is a colour picture (mode {picture.mode}); store one number a pixel.")
        return np.array(picture)


def within(folder: Path, file: Path) -> str:
    """Where a file lies in a folder, without its suffix."""
    return file.relative_to(folder).with_suffix("").as_posix()


def folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def recoded(path: Path, table: tuple[int, ...]) -> np.ndarray:
    """A mask whose every value v is replaced by table[v]; raises BadInput for one that no official mask holds."""
    mask = one_channel(path)
    wrong = mask[~np.isin(mask, range(len(table)))]
    if len(wrong):
        end = len(table) - 1
        raise BadInput(f"{path} has the value {wrong[0]} but official masks end at {end}; restore the official file.")
    return np.array(table, np.uint8)[mask.astype(int)]


def demand_labels(labels: list[Any], count: int, file: Path) -> None:
    wrong = set(labels) - set(range(count))
    if wrong:
        raise BadInput(f"{file} has the label {min(wrong)} but labels are 0 to {count - 1}; get the official file.")
