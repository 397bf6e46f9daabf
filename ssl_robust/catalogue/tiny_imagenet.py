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


def _zipped(path: Path, member: str) -> np.ndarray:
    return rgb(Image.open(BytesIO(_zip(path).read(member))), f"{member} of {path}")


def _files(home: Path) -> dict[str, Path | Part]:
    """Every file of Tiny-ImageNet by its official name (train/WNID/images/..), unpacked or inside zip archives."""
    found: dict[str, Path | Part] = {}
    for archive in sorted(home.glob("*.zip")) if not (home / "train").is_dir() else ():
        names = _zip(archive).namelist()
        found |= {name.removeprefix("tiny-imagenet-200/"): Part(_zipped, archive, name) for name in names}
    plain = [p for part in ("train", "val") if (home / part).is_dir() for p in pictures(home / part)]
    return found | {p.relative_to(home).as_posix(): p for p in (*plain, *home.glob("*.txt"), *home.glob("val/*.txt"))}


def _text(files: dict[str, Path | Part], name: str) -> str:
    file = files.get(name)
    if file is None:
        raise BadInput(f"tiny-imagenet-200 lacks {name}; restore it.")
    if isinstance(file, Path):
        return text_of(file)
    try:
        return text_of(file.file, _zip(file.file).read(file.key))
    except (zipfile.BadZipFile, zlib.error):
        raise damaged(file.file) from None


def _tiny_imagenet(root: Path, task: str, split: str, n: int) -> list[Item]:
    files = _files(root / "tiny-imagenet-200")
    if not any(name.lower().endswith(IMAGES) for name in files):
        return []
    labels = {wnid: label for label, wnid in enumerate(sorted(_text(files, "wnids.txt").split()))}
    if split == "train":
        images = [name for name in files if name.startswith("train/") and name.lower().endswith(IMAGES)]
        named = {name: name.split("/")[1] for name in images}
    else:
        rows = [line.split("\t") for line in _text(files, "val/val_annotations.txt").splitlines()]
        named = {f"val/images/{row[0]}": row[1] for row in rows if len(row) > 1}
    lost = [name for name in named if name not in files]
    wrong = sorted(set(named.values()) ^ set(labels))
    if lost or wrong:
        what = f"lacks {lost[0]} ({len(lost)} missing)" if lost else f"differs from wnids.txt in the class {wrong[0]}"
        raise BadInput(f"tiny-imagenet-200 ({split}) {what}; restore it.")
    return [Item(f"tiny-imagenet-200/{name}", files[name], labels[named[name]]) for name in sorted(named)]


def _tiny_classes(root: Path, task: str) -> tuple[str, ...]:
    files = _files(root / "tiny-imagenet-200")
    rows = (line.split("\t", 1) for line in _text(files, "words.txt").splitlines() if "\t" in line)
    words = {wnid: names.split(",")[0] for wnid, names in rows}
    return tuple(words.get(wnid, wnid) for wnid in sorted(_text(files, "wnids.txt").split()))


DATASETS = {
    "tiny_imagenet": Dataset(
        ("classification", "deacl"), "tiny-imagenet-200/{train,val,wnids.txt,words.txt}, unpacked or as zip archives",
        _tiny_imagenet, _tiny_classes, counts={"train": (100_000,), "test": (10_000,)}, many=200, shape=(64, 64),
        gigabytes=0.3,
        archives=(Archive(  # read as it is
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "tiny-imagenet-200/tiny-imagenet-200.zip", 248_100_043,
            "md5:90528d7ca1a48142e341f4ef8d21d0de",
        ),),
    ),
}  # fmt: skip
