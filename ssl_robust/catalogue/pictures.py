"""Reading picture files and folders of them: what all data sets share. Nothing that a data file holds is executed."""

import codecs
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
    """The refusal of a file that cannot be read."""
    return BadInput(f"The file {path} cannot be read (damaged or half a download); fetch it again.")


def text_of(content: bytes, place: object) -> str:
    """The text of a file at `place`: UTF-8 or, where it begins with their mark, UTF-16; else BadInput."""
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadInput(f"{place} is not text in UTF-8; save it in that encoding.")
    return text


def rgb(picture: Image.Image, place: object, shape: tuple[int, ...] = ()) -> np.ndarray:
    """A picture as uint8 (H, W, 3), turned upright by its orientation tag unless its map of `shape` is not.

    16 bits become the upper 8 of them, transparency is left out. Raises BadInput naming `place` where that would lose
    the picture, where the value of white is unknown, and where too many pixels are claimed.
    """
    _demand_readable(picture, place, shape)
    deep = ";16" in f"{picture.mode} {picture.tile}"
    if picture.mode.startswith("I;16"):
        pixels, largest = _gray_of_16_bits(picture)
    else:
        pixels = _opaque(picture, place)
        largest = 256 * int(pixels.max(initial=0)) + 1  # if of 16 bits, the library has left out the lower 8
    if deep and 0 < largest < 1 << 14:  # 12 bits of a camera, say, would be nearly black
        raise BadInput(f"{place} has 16 bits a value of which it uses the lower ones only; save it with 8.")
    tag = _orientation(picture)  # now, as damaged pixels that it comes across would be no error a second time
    return pixels if tag == 1 else _upright(pixels, tag, place, shape)


def _demand_readable(picture: Image.Image, place: object, shape: tuple[int, ...]) -> None:
    """Refuses what the header of a picture says cannot be taken as it is."""
    if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        raise BadInput(f"{place} has {picture.width} x {picture.height} pixels, too many to read; make it smaller.")
    if picture.mode in ("I", "F", "LAB"):
        what = "colours as LAB" if picture.mode == "LAB" else "32-bit numbers, of which white is unknown"
        raise BadInput(f"{place} stores {what}; save it as 8-bit gray or RGB.")
    tag = getattr(picture, "tag_v2", {}).get(ExifTags.Base.Orientation, 1)
    if shape and tag != 1:  # a TIFF, which the library turns whether its map is or not
        raise BadInput(f"{place} is to be turned (orientation {tag}); save it upright.")


def _gray_of_16_bits(picture: Image.Image) -> tuple[np.ndarray, int]:
    """The upper 8 bits, uint8 (H, W, 3), and the largest value of all 16."""
    gray = np.array(picture)
    largest = int(gray.max(initial=0))
    if getattr(picture, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:  # a TIFF whose 0 is white
        gray = ~gray
    return np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, 2), largest


def _opaque(picture: Image.Image, place: object) -> np.ndarray:
    """A picture of 8 bits a value as uint8 (H, W, 3), without its transparency."""
    if "transparency" not in picture.info and picture.mode[-1] not in "Aa":
        return np.array(picture.convert("RGB"))
    whole = picture.convert(picture.mode.upper()) if picture.mode[-1] == "a" else picture
    pixels = np.array(whole.convert("RGBA"))
    flat = (pixels == pixels[:1, :1]).all((0, 1))  # of each channel, whether it has one value everywhere
    if flat[:3].all() and not flat[3]:
        raise BadInput(f"{place} has one colour and its picture in the transparency; save it without transparency.")
    return pixels[..., :3].copy()


def _orientation(picture: Image.Image) -> int:
    """How a picture is to be turned, 1 to 8 (1: it is upright)."""
    try:
        tag = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what is damaged here says nothing of the pixels
        return 1
    return tag if tag in range(2, 9) else 1


def _upright(pixels: np.ndarray, tag: int, place: object, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels turned as `tag` says; where they have a map, as its shape says, or BadInput if it fits either way."""
    picture = Image.fromarray(pixels)
    picture.getexif()[ExifTags.Base.Orientation] = tag
    turned = np.array(ImageOps.exif_transpose(picture))
    fits = [way.shape[:2] == tuple(shape) for way in (pixels, turned)]
    if all(fits):
        raise BadInput(f"{place} is to be turned (EXIF orientation {tag}), its map or not; save both upright.")
    return pixels if fits[0] else turned


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
    """Images and the PNG files of the same name; raises BadInput unless each has one partner."""
    found = [(i, targets / i.relative_to(images).with_suffix(".png")) for i in pictures(images)]
    demand((t for _, t in found), "restore it or remove its image")
    images_of: dict[Path, Path] = {}
    for image, target in found:
        if image is not images_of.setdefault(target, image):
            raise BadInput(f"{images_of[target]} and {image.name} share {target}; give each image one of its own.")
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
        raise BadInput(
            f"{path} has the value {wrong[0]} but official masks end at {len(table) - 1}, so it was converted; restore "
            f"the official file, or give the masks in a folder of your own with classes.txt."
        )
    return np.array(table, np.uint8)[mask.astype(int)]


def demand_labels(labels: list[Any], count: int, file: Path) -> None:
    """Refuses labels that are not 0 .. count - 1."""
    wrong = set(labels) - set(range(count))
    if wrong:
        raise BadInput(f"{file} has the label {min(wrong)} but labels are 0 to {count - 1}; get the official file.")
