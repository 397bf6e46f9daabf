"""Tiny-ImageNet, unpacked or as zip archives."""

import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ..items import Archive, Dataset, Item, Part
from ..settings import BadInput
from .pictures import IMAGES, damaged, once, pictures, rgb, text_of


@once
def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError):
        raise damaged(path) from None


def _member(path: Path, name: str) -> bytes:
    """Content of a file in a zip archive; raises BadInput if it is locked, or packed in a way Python cannot read."""
    try:
        return _zip(path).read(name)
    except NotImplementedError:
        raise BadInput(f"{path} is packed in a way that is not read here; unpack it.") from None
    except RuntimeError:
        raise BadInput(f"{path} is locked by a password; unpack it.") from None


def _zipped(path: Path, member: str) -> np.ndarray:
    return rgb(Image.open(BytesIO(_member(path, member))), f"{member} of {path}")


def _tiny_files(home: Path) -> dict[str, Path | Part]:
    """Every file of Tiny-ImageNet by its official name (train/WNID/images/..), unpacked or inside zip archives."""
    if (home / "train").is_dir():
        return {p.relative_to(home).as_posix(): p for part in ("train", "val") for p in pictures(home / part)}
    found: dict[str, Path | Part] = {}
    for archive in sorted(home.glob("*.zip")):
        names = [name for name in _zip(archive).namelist() if name.lower().endswith(IMAGES)]
        found |= {name.removeprefix("tiny-imagenet-200/"): Part(_zipped, archive, name) for name in names}
    return found


def _tiny_text(home: Path, name: str) -> str:
    """A text file of Tiny-ImageNet, plain or inside one of its archives."""
    if (home / name).is_file():
        return text_of((home / name).read_bytes(), home / name)
    for archive in sorted(home.glob("*.zip")):
        if f"tiny-imagenet-200/{name}" in _zip(archive).namelist():
            try:
                content = _member(archive, f"tiny-imagenet-200/{name}")
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
                raise damaged(archive) from None
            return text_of(content, f"{name} of {archive}")
    raise BadInput(f"tiny-imagenet-200 lacks {name}; restore it.")


def _tiny_imagenet(root: Path, task: str, split: str, n: int) -> list[Item]:
    home = root / "tiny-imagenet-200"
    files = _tiny_files(home)
    if not files:
        return []
    labels = {wnid: label for label, wnid in enumerate(sorted(_tiny_text(home, "wnids.txt").split()))}
    if split == "train":
        named = {name: name.split("/")[1] for name in files if name.startswith("train/")}
    else:
        rows = [line.split("\t") for line in _tiny_text(home, "val/val_annotations.txt").splitlines()]
        named = {f"val/images/{row[0]}": row[1] for row in rows if len(row) > 1}
    lost = [name for name in named if name not in files]
    if lost:
        raise BadInput(f"tiny-imagenet-200 lacks {lost[0]} ({len(lost)} missing); restore what val_annotations names.")
    wrong = sorted(set(named.values()) ^ set(labels))
    if wrong:
        raise BadInput(f"tiny-imagenet-200 ({split}) differs from wnids.txt in the class {wrong[0]}; restore it.")
    return [Item(f"tiny-imagenet-200/{name}", files[name], labels[named[name]]) for name in sorted(named)]


def _tiny_classes(root: Path, task: str) -> tuple[str, ...]:
    home = root / "tiny-imagenet-200"
    rows = (line.split("\t", 1) for line in _tiny_text(home, "words.txt").splitlines() if "\t" in line)
    words = {wnid: names.split(",")[0] for wnid, names in rows}
    return tuple(words.get(wnid, wnid) for wnid in sorted(_tiny_text(home, "wnids.txt").split()))


DATASETS = {
    "tiny_imagenet": Dataset(
        ("classification", "deacl"), "tiny-imagenet-200/{train,val,wnids.txt,words.txt}, unpacked or as zip archives",
        _tiny_imagenet, _tiny_classes, counts={"train": (100_000,), "test": (10_000,)}, shape=(64, 64), gigabytes=0.3,
        archives=(Archive(  # read as it is
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "tiny-imagenet-200/tiny-imagenet-200.zip", 248_100_043,
            "md5:90528d7ca1a48142e341f4ef8d21d0de",
        ),),
    ),
}  # fmt: skip
