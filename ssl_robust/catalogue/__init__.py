"""The data sets: where the files of each lie, how they are read, splits, classes, official counts, how to get them.

DATASETS has one entry a data set, in its official layout; any other name is a folder of the user's own (see `own`).
Nothing here executes what a data file holds, and nothing is read before it is asked for: `items` only lists.
"""

import codecs
import json
import math
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .. import records
from ..embedded import scenes
from ..progress import track
from ..settings import BadInput
from ..tasks import TASKS

IGNORE = 255
NYU_DEPTH = 10.0  # metres, where the depth maps of NYU-Depth-v2 end
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# label id in *_gtFine_labelIds.png -> class; their order gives the 19 train ids, all other ids are ignored
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


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


class Archive(NamedTuple):
    """A public file: `place` is what it becomes in the data folder, unpacked or (a file name) as it is."""

    url: str
    place: str
    size: int  # bytes, about
    checksum: str = ""  # 'md5:...', 'sha1:...' or 'sha256:...'

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
    gigabytes: float = 0  # on disk, unpacked
    archives: tuple[Archive, ...] = ()  # what is fetched; none if it must be obtained by hand
    larger: tuple[Archive, ...] = ()  # in their place where more training images are asked for than they hold
    by_hand: str = ""  # what to get where, and where to put it
    md5: dict[str, str] = field(default_factory=dict)  # of official files, by path in the data folder

    def fetched(self, n_train: int) -> tuple[Archive, ...]:
        """What is fetched for so many training images."""
        return self.larger if self.larger and n_train > min(self.counts["train"]) else self.archives


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


def _demand(files: Iterable[Path], remedy: str) -> None:
    """Refuses a data set of which a file is missing."""
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise BadInput(f"{missing[0].parent} lacks {missing[0].name} ({len(missing)} missing); {remedy}.")


def _pairs(images: Path, targets: Path) -> list[tuple[Path, Path]]:
    """Images and the PNG files of the same name; raises BadInput unless each has one partner."""
    pairs = [(i, targets / i.relative_to(images).with_suffix(".png")) for i in pictures(images)]
    _demand((t for _, t in pairs), "restore it or remove its image")
    images_of: dict[Path, Path] = {}
    for image, target in pairs:
        if image is not images_of.setdefault(target, image):
            raise BadInput(f"{images_of[target]} and {image.name} share {target}; give each image one of its own.")
    alone = sorted(set(pictures(targets)) - {t for _, t in pairs})
    if alone:
        raise BadInput(f"{images} has no image for {alone[0]} ({len(alone)} missing); restore it or remove the target.")
    return pairs


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


# --- folders of the user's own ---

OWN = {
    "classification": "NAME/{train,test}/CLASS/*.png (or .jpg ..; val in place of test)",
    "segmentation": "NAME/{images,masks}/{train,val} and NAME/classes.txt (one class a line; mask value 255: ignored)",
    "depth": "NAME/{images,depth}/{train,val} and NAME/meta.json with depth_scale (stored units per metre, 0: invalid)",
    "deacl": "NAME/*.jpg (or .png .., also in folders)",
}


def _held_out(folder: Path) -> str:
    return "test" if (folder / "test").is_dir() else "val"


def _class_folders(home: Path) -> list[str]:
    """Class names of an image folder; its parts must agree, as labels are numbers of sorted folders."""
    parts = [p for p in (home / "train", home / _held_out(home)) if p.is_dir()]
    names = [set(_folders(p)) for p in parts]
    wrong = sorted(names[0] ^ names[-1]) if names else []
    if wrong:
        both = " and ".join(f"{home.name}/{p.name}" for p in parts)
        raise BadInput(f"{both} differ in class folders: {', '.join(wrong[:5])}; give both the same ones.")
    return sorted(names[0]) if names else []


def _image_folder(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        part = root / name / ("train" if split == "train" else _held_out(root / name))
        found = []
        for label, class_name in enumerate(_class_folders(root / name)):
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
    pairs = _pairs(place, home / targets / part)
    return [(f"{home.name}/{part}/{_within(place, image)}", image, target) for image, target in pairs]


def _within(folder: Path, file: Path) -> str:
    """Where a file lies in a folder, without its suffix."""
    return file.relative_to(folder).with_suffix("").as_posix()


def _mask_folder(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        return [Item(where, image, mask) for where, image, mask in _own_pairs(root / name, "masks", split)]

    return items


def _depth_png(path: Path, scale: float) -> np.ndarray:
    return one_channel(path, palette=False) / scale


def one_channel(path: Path, palette: bool = True) -> np.ndarray:
    """The pixels (H, W) of a mask or depth map; raises BadInput if a pixel has several numbers, or is a colour."""
    with Image.open(path) as picture:
        if picture.mode[:2] not in ("1", "L", "I", "I;", "F", *("P" * palette)):
            raise BadInput(f"{path} is a colour picture (mode {picture.mode}); store one number a pixel.")
        return np.array(picture)


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
        pairs, scale = _own_pairs(root / name, "depth", split), _depth_scale(root / name)
        return [Item(where, image, Part(_depth_png, depth, scale)) for where, image, depth in pairs]

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
            return tuple(os.fsencode(folder).decode(errors="replace") for folder in _class_folders(root / name))
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
    makers = {"classification": _image_folder, "segmentation": _mask_folder, "depth": _depth_folder}
    items = makers.get(task, _any_images)(name)
    return Dataset((task,), OWN[task].replace("NAME", name), items, _own_classes(name))


# --- CIFAR: pickled batches, or an image folder ---

CIFAR = {  # folder, files of each split, key of the labels, file and key of the class names
    "cifar10": (
        "cifar-10-batches-py", {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}, "labels",
        "batches.meta", "label_names",
    ),
    "cifar100": ("cifar-100-python", {"train": ["train"], "test": ["test"]}, "fine_labels", "meta", "fine_label_names"),
}  # fmt: skip


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain Python values and numpy arrays; whatever else a pickle may name is refused, never executed."""

    KNOWN = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.KNOWN:
            return self.KNOWN[name]
        raise pickle.UnpicklingError(f"{module}.{name}")


@once
def _cifar_file(path: Path) -> dict[str, Any]:
    """Content of one batch file, its images as uint8 (N, 3, 32, 32)."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        if "data" in dict(content):
            content["data"] = np.asarray(content["data"]).reshape(-1, 3, 32, 32)
        return content
    except Exception:  # a damaged pickle raises nearly anything
        raise damaged(path) from None


def _cifar_image(path: Path, i: int) -> np.ndarray:
    return _cifar_file(path)["data"][i].transpose(1, 2, 0)


def _is_image_folder(root: Path, name: str) -> bool:
    return not (root / CIFAR[name][0]).is_dir() and (root / name / "train").is_dir()


def _cifar(name: str) -> Callable[[Path, str, str, int], list[Item]]:
    folder, parts, key = CIFAR[name][:3]

    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        if _is_image_folder(root, name):
            wrong = sorted(set(_class_folders(root / name)) ^ set(_cifar_classes(name)(root, task)))
            if wrong:
                raise BadInput(f"{name} has class folders missing or too many: {', '.join(wrong[:5])}; correct them.")
            return _image_folder(name)(root, task, split, n)
        found = []
        for part in parts[split]:
            file = root / folder / part
            content = _cifar_file(file)
            labels = np.asarray(content.get(key, [])).ravel().tolist()
            if not labels or len(labels) != len(content.get("data", [])):
                raise damaged(file)
            _demand_labels(labels, int(name.removeprefix("cifar")), file)
            found += [Item(f"{folder}/{part}/{i}", Part(_cifar_image, file, i), int(y)) for i, y in enumerate(labels)]
        return found

    return items


def _demand_labels(labels: list[Any], count: int, file: Path) -> None:
    """Refuses labels that are not 0 .. count - 1."""
    wrong = set(labels) - set(range(count))
    if wrong:
        raise BadInput(f"{file} has the label {min(wrong)} but labels are 0 to {count - 1}; get the official file.")


def _cifar_classes(name: str) -> Callable[[Path, str], tuple[str, ...]]:
    folder, _, _, meta, key = CIFAR[name]

    def classes(root: Path, task: str) -> tuple[str, ...]:
        if name == "cifar10":
            return CIFAR10_CLASSES
        if _is_image_folder(root, name):
            return tuple(_class_folders(root / name))
        _demand([root / folder / meta], "restore it")
        names = _cifar_file(root / folder / meta).get(key)
        if not names:
            raise damaged(root / folder / meta)
        return tuple(names)

    return classes


# --- STL10: raw pixels ---


@once
def _bytes_of(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)


def _stl_image(path: Path, i: int) -> np.ndarray:
    return np.array(_bytes_of(path).reshape(-1, 3, 96, 96)[i].transpose(2, 1, 0))  # columns first in the file


def _stl10(root: Path, task: str, split: str, n: int) -> list[Item]:
    file = root / "stl10_binary" / f"{split}_X.bin"
    pixels, labels = _bytes_of(file), _bytes_of(file.with_name(f"{split}_y.bin"))
    if len(pixels) != len(labels) * 3 * 96 * 96:
        raise damaged(file)
    labels = (labels.astype(int) - 1).tolist()  # in the file from 1
    _demand_labels(labels, len(STL10_CLASSES), file.with_name(f"{split}_y.bin"))
    return [Item(f"stl10/{split}/{i}", Part(_stl_image, file, i), y) for i, y in enumerate(labels)]


# --- segmentation ---


def _voc(root: Path, task: str, split: str, n: int) -> list[Item]:
    home = root / "VOCdevkit" / "VOC2012"
    listed = home / "ImageSets" / "Segmentation" / {"train": "train.txt", "test": "val.txt"}[split]
    names = text_of(listed.read_bytes(), listed).split()
    items = [Item(i, home / "JPEGImages" / f"{i}.jpg", home / "SegmentationClass" / f"{i}.png") for i in names]
    _demand((p for item in items for p in item[1:]), f"restore what {listed.name} names")
    return items


def _recoded(path: Path, table: tuple[int, ...]) -> np.ndarray:
    """A mask whose every value v is replaced by table[v]; raises BadInput for one that no official mask holds."""
    mask = one_channel(path)
    wrong = mask[~np.isin(mask, range(len(table)))]
    if len(wrong):
        raise BadInput(
            f"{path} has the value {wrong[0]} but official masks end at {len(table) - 1}, so it was converted; restore "
            f"the official file, or give the masks in a folder of your own with classes.txt."
        )
    return np.array(table, np.uint8)[mask.astype(int)]


ADE_TABLE = (IGNORE, *range(150))  # label 0 is 'other', so the 150 classes shift by one
CITYSCAPES_TABLE = tuple([*CITYSCAPES].index(i) if i in CITYSCAPES else IGNORE for i in range(34))


def _ade20k(root: Path, task: str, split: str, n: int) -> list[Item]:
    home, part = root / "ADEChallengeData2016", {"train": "training", "test": "validation"}[split]
    pairs = _pairs(home / "images" / part, home / "annotations" / part)
    return [Item(_within(home / "images" / part, i), i, Part(_recoded, m, ADE_TABLE)) for i, m in pairs]


def _ade20k_classes(root: Path, task: str) -> tuple[str, ...]:
    """The first name of each of the 150 classes, from the data set's own objectInfo150.txt."""
    listed = root / "ADEChallengeData2016" / "objectInfo150.txt"
    if task != "segmentation":
        return ()
    _demand([listed], "restore it, it names the 150 classes")
    # a row: numbers, then the names of one class
    rows = re.findall(r"^\s*\d+\s+(?:[\d.]+\s+)+([^,\n]+)", text_of(listed.read_bytes(), listed), re.MULTILINE)
    if len(rows) != 150:
        raise damaged(listed)
    return tuple(name.strip() for name in rows)


def _cityscapes(root: Path, task: str, split: str, n: int) -> list[Item]:
    part, home = {"train": "train", "test": "val"}[split], root / "cityscapes"
    found = []
    for image in pictures(home / "leftImg8bit" / part):
        name = image.stem.removesuffix("_leftImg8bit")
        mask = home / "gtFine" / part / image.parent.name / f"{name}_gtFine_labelIds.png"
        found.append(Item(name, image, Part(_recoded, mask, CITYSCAPES_TABLE)))
    _demand((item.target.file for item in found), "restore the labels of gtFine")
    return found


# --- NYU-Depth-v2: tar archives of its 47,584 training images, parquet files, or the labelled .mat with its splits ---


def _nyuv2(root: Path, task: str, split: str, n: int) -> list[Item]:
    """The split in the first form that holds the whole of it; where none does, in the one that holds most."""
    found = []
    for form in (_nyu_archives, _parquet_items, _nyu_labelled):
        found.append(form(root / "nyuv2", split))
        if len(found[-1]) in DATASETS["nyuv2"].counts[split]:
            return found[-1]
    return max(found, key=len)


def _nyu_archives(home: Path, split: str) -> list[Item]:
    """The pairs in train-000000.tar .. or val-000000.tar .., not unpacked; of archives of one name, one."""
    files = {f.name: f for f in home.rglob("train-*.tar" if split == "train" else "val-*.tar")}
    found = []
    for file in (files[name] for name in sorted(files)):
        for member, place in _tar_index(file).items():
            pair = [Part(_nyu_pair, file, (array, *place)) for array in ("rgb", "depth")]
            found.append(Item(f"nyuv2/{file.stem}/{member}", *pair))
    return found


@once
def _tar_index(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each HDF5 file in an archive that is not compressed."""
    try:
        with tarfile.open(path, "r:") as archive:
            files = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in archive if m.isfile()}
    except (tarfile.TarError, OSError):
        raise damaged(path) from None
    return {name: place for name, place in files.items() if re.search(r"(^|/)[^./][^/]*\.h5$", name)}


def _nyu_pair(path: Path, key: tuple[str, int, int]) -> np.ndarray:
    """One array of the HDF5 file that lies at (array, offset, size): the picture, or depth (H, W) in metres."""
    import h5py  # here, because only this data set needs it

    array, offset, size = key
    with path.open("rb") as file:
        file.seek(offset)
        content = BytesIO(file.read(size))
    with h5py.File(content, "r") as pair:
        pixels = pair[array][()]
    return pixels.transpose(1, 2, 0) if array == "rgb" else _nyu_metres(pixels, path)  # (3, H, W) -> (H, W, 3)


@once
def _hdf5(path: Path) -> Any:
    import h5py

    try:
        file = h5py.File(path, "r")
        if file["images"].ndim == 4 and file["depths"].ndim == 3:
            return file
    except (OSError, KeyError):
        pass
    raise damaged(path)


def _nyu_image(path: Path, i: int) -> np.ndarray:
    return _hdf5(path)["images"][i].transpose(2, 1, 0)  # (3, W, H) -> (H, W, 3)


def _nyu_depth(path: Path, i: int) -> np.ndarray:
    return _nyu_metres(_hdf5(path)["depths"][i].T, path)  # the filled-in depth maps, (W, H) -> (H, W)


def _nyu_metres(depth: np.ndarray, path: Path) -> np.ndarray:
    """`depth` itself; raises BadInput if it cannot be in metres, as it goes beyond NYU_DEPTH."""
    far = depth[np.isfinite(depth)].max(initial=0)
    if far > 1.001 * NYU_DEPTH:  # float16 and float32 round
        raise BadInput(f"{path} holds depths of {far:.4g} but official ones end at {NYU_DEPTH:g} m; store metres.")
    return depth


def _nyu_split(path: Path, split: str) -> list[int]:
    """0-based rows of the official split, which splits.mat counts from 1."""
    import scipy.io

    try:
        return [int(i) - 1 for i in scipy.io.loadmat(path)[f"{split}Ndxs"].ravel()]
    except Exception:  # scipy has errors of its own for each kind of damage
        raise damaged(path) from None


def _nyu_labelled(home: Path, split: str) -> list[Item]:
    mat, splits = home / "nyu_depth_v2_labeled.mat", home / "splits.mat"
    if not mat.is_file():
        return []
    _demand([splits], "get the official one (make data)")
    rows, count = _nyu_split(splits, split), len(_hdf5(mat)["images"])
    if not rows or max(rows) >= count:
        raise BadInput(f"{mat} has {count} images but {splits.name} names others too; fetch the file again.")
    return [Item(f"nyuv2/{i}", Part(_nyu_image, mat, i), Part(_nyu_depth, mat, i)) for i in rows]


def _parquet_items(home: Path, split: str) -> list[Item]:
    """Rows of the parquet files whose names begin as the split's do: train, else test or val."""
    begin = ("train",) if split == "train" else ("test", "val")
    found = []
    # train-00000-of-00008.parquet, or as the hub converts it train/0000.parquet, partial-train/0000.parquet
    named = [(f, (f.name, f.parent.name.removeprefix("partial-"))) for f in home.rglob("*.parquet")]
    for file in sorted(f for f, names in named if any(name.startswith(begin) for name in names)):
        groups = _parquet(file).metadata
        for group in range(groups.num_row_groups):
            for row in range(groups.row_group(group).num_rows):
                where = [Part(_parquet_cell, file, (group, row, column)) for column in ("image", "depth_map")]
                place = file.relative_to(home).with_suffix("").as_posix()
                found.append(Item(f"nyuv2/{place}/{group}/{row}", *where))
    return found


@once
def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid):
        raise damaged(path) from None
    if {"image", "depth_map"} <= set(file.schema_arrow.names):
        return file
    raise BadInput(f"{path} has no columns image and depth_map; get the parquet files of NYU-Depth-v2.")


@once
def _last_group(path: Path) -> dict[int, Any]:
    return {}


def _parquet_cell(path: Path, key: tuple[int, int, str]) -> np.ndarray:
    """A picture stored in a cell; depth in metres, whole numbers being millimetres."""
    group, row, column = key
    kept = _last_group(path)  # a row group is read whole, so the last one is kept
    if group not in kept:
        kept.clear()
        kept[group] = _parquet(path).read_row_group(group, columns=["image", "depth_map"])
    cell = kept[group][column][row].as_py()
    picture = Image.open(BytesIO(cell["bytes"] if isinstance(cell, dict) else cell))
    if column == "image":
        return rgb(picture, f"Image {row} of {path}")
    pixels = np.array(picture)
    if picture.mode[0] not in "FI":
        raise BadInput(f"Depth {row} of {path} is of mode {picture.mode}; store metres or 16-bit millimetres.")
    return _nyu_metres(pixels if picture.mode == "F" else pixels / 1000, path)


# --- ImageNet and its smaller kin ---


def _wnid_folders(*homes: str) -> Callable[[Path, str, str, int], list[Item]]:
    """Images in train/WNID or val/WNID of the first of these folders that is there."""

    def items(root: Path, task: str, split: str, n: int) -> list[Item]:
        home = next((root / h for h in homes if (root / h).is_dir()), root / homes[0])
        folder = home / ("train" if split == "train" else "val")
        found = []
        for wnid in _folders(folder):  # flat and with few Paths made, as ImageNet has 1.3 million files
            files = sorted(f for f in os.listdir(folder / wnid) if f[0] != "." and f.lower().endswith(IMAGES))
            found += [Item(f"{wnid}/{f}", Path(f"{folder}/{wnid}/{f}"), None) for f in files]
        return found

    return items


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


# --- rendered scenes ---


SCENES = "scenes-0b62ae1f46"  # begins their names, from which random numbers are drawn: another word, other numbers


def _scenes(root: Path, task: str, split: str, n: int) -> list[Item]:
    rendered = scenes.cached(records.ROOT / "runs" / "scenes", split, n, progress=track)
    targets = {"classification": rendered.labels, "segmentation": rendered.masks, "depth": rendered.depths}.get(task)
    ids = [f"{SCENES}-{split}-{i}" for i in range(n)]
    if task == "classification":
        targets = [int(t) for t in targets]
    return [Item(ids[i], rendered.images[i], None if targets is None else targets[i]) for i in range(n)]


# The archives of the hub, read as they are: about how many bytes, and what the hub says of their content
NYU_HUB = "https://huggingface.co/datasets/sayakpaul/nyu_depth_v2/resolve/main/data"
NYU = {
    "train-000000": (3_003_300_000, "sha256:9a6a59407fa909a8ae70ffa8495893ef818bf6f349d0d2e486dd10333ddf256a"),
    "train-000001": (3_003_300_000, "sha256:717ea0c58afdd747dfaf73e592f87fcf0261c62c39a5c2b39dd10f67952ca1e3"),
    "train-000002": (3_003_300_000, "sha256:2530c35ecb55e64bb7fdfae9e1ddddfaa339555e37dc19d74d98048c896ec409"),
    "train-000003": (3_003_300_000, ""),  # not known: what is missing in it is seen in the number of images
    "train-000004": (3_003_300_000, "sha256:942896ecb705f3f791d1d313121f8700a192e54dfbf091312cacbd6adbeb5563"),
    "train-000005": (3_003_300_000, "sha256:c6363a837492be5325a1d8e2989fa2947f588949b0f5a9818bb65504907cad64"),
    "train-000006": (3_003_300_000, "sha256:77500df4b84d8af2aa87ba503a767ce0a8a693bfd32486d9b688b66cdfb172b4"),
    "train-000007": (3_003_300_000, "sha256:b1aa7e0787d6fe9b160de213815566a40288da40106be8d5099e301936e347d1"),
    "train-000008": (3_003_300_000, "sha256:ef9fa6bfeee9a8b150cd28837261e879ed1075c4b11d06c31792af0079861610"),
    "train-000009": (3_003_300_000, "sha256:8cd051a16f763a0c40f3a5c7e5d720d6eb6566fb9553bd58ddeb9ae7923cad39"),
    "train-000010": (3_003_300_000, "sha256:602109f56d08318ec20e496fc161c5ba1b5a25a506b048a54f5778e19194e0a6"),
    "train-000011": (1_100_000_000, "sha256:4ef8723b66e1c09010f8c5305b5c7b9c526d455cd943aeac0280556fc3c5ede3"),
    "val-000000": (1_000_000_000, "sha256:a75d57458afe063e6d9158a6cb3f41eabd859699f46043b0b8def2e2995049bb"),
    "val-000001": (14_800_000, "sha256:92dc10ad1b799fb810011fcf5e85b017f949baae919903d66612e32d37e40bf2"),
}

DATASETS = {
    "scenes": Dataset(
        (*TASKS, "deacl"), "", _scenes,
        {"classification": scenes.CATEGORIES, "segmentation": ("background", *scenes.CATEGORIES)}, own_val=True,
    ),
    "cifar10": Dataset(
        ("classification", "deacl"), "cifar-10-batches-py (or cifar10/{train,test}/CLASS/*.png)", _cifar("cifar10"),
        _cifar_classes("cifar10"), counts={"train": (50_000,), "test": (10_000,)}, gigabytes=0.2,
        archives=(Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "cifar-10-batches-py", 170_498_071,
            "md5:c58f30108f718f92721af3b95e74349a",
        ),),
        md5={
            "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
            "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
            "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": Dataset(
        ("classification", "deacl"), "cifar-100-python (or cifar100/{train,test}/CLASS/*.png)", _cifar("cifar100"),
        _cifar_classes("cifar100"), counts={"train": (50_000,), "test": (10_000,)}, gigabytes=0.2,
        archives=(Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "cifar-100-python", 169_001_437,
            "md5:eb9058c3a382ffc7106e4002c42a8d85",
        ),),
        md5={
            "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
            "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
    "stl10": Dataset(
        ("classification", "deacl"), "stl10_binary/{train,test}_{X,y}.bin", _stl10, {"classification": STL10_CLASSES},
        counts={"train": (5_000,), "test": (8_000,)}, gigabytes=3.2,
        archives=(Archive(
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "stl10_binary", 2_640_397_119,
            "md5:91f7769df0f17e558f3565bffb0c7dfb",
        ),),
        md5={
            "stl10_binary/train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
            "stl10_binary/train_y.bin": "5a34089d4802c674881badbb80307741",
            "stl10_binary/test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
            "stl10_binary/test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
        },
    ),
    "voc2012": Dataset(
        ("segmentation", "deacl"), "VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}", _voc,
        {"segmentation": VOC_CLASSES}, counts={"train": (1_464,), "test": (1_449,)}, gigabytes=2.1,
        archives=(Archive(
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar", "VOCdevkit/VOC2012",
            1_999_639_040, "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ),),
    ),
    "ade20k": Dataset(
        ("segmentation", "deacl"), "ADEChallengeData2016/{images,annotations}/{training,validation}", _ade20k,
        _ade20k_classes, counts={"train": (20_210,), "test": (2_000,)}, gigabytes=1.2,
        archives=(Archive(
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip", "ADEChallengeData2016",
            967_000_000, "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        ),),
    ),
    "cityscapes": Dataset(
        ("segmentation", "deacl"), "cityscapes/{leftImg8bit,gtFine}/{train,val}/CITY", _cityscapes,
        {"segmentation": tuple(CITYSCAPES.values())}, counts={"train": (2_975,), "test": (500,)}, gigabytes=12,
        by_hand=(
            "register at https://www.cityscapes-dataset.com/downloads/, get leftImg8bit_trainvaltest.zip (11 GB) and "
            "gtFine_trainvaltest.zip (0.25 GB), and unpack both in {root}/cityscapes"
        ),
    ),
    "nyuv2": Dataset(
        ("depth", "deacl"),
        "nyuv2/nyu_depth_v2_labeled.mat and nyuv2/splits.mat (or nyuv2/data/{train,val}-*.tar with the hub's 47,584 "
        "training images, or nyuv2/{train,val}*.parquet with image and depth_map)",
        _nyuv2, {}, counts={"train": (795, 47_584), "test": (654,)}, gigabytes=3,
        archives=(
            Archive(
                "http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
                "nyuv2/nyu_depth_v2_labeled.mat", 2_972_037_809,
                "sha256:2d724b0c0ab358aa1ce5df855e5bd14a2279ab7202efe22f32a30d612dcb86aa",
            ),
            Archive(
                "http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat", "nyuv2/splits.mat", 2_626,
                "sha256:6e081404491a8bfba2f066beaa9713ef6046f9007aa5f799f2a350506a580cee",
            ),
        ),
        larger=tuple(Archive(f"{NYU_HUB}/{name}.tar", f"nyuv2/data/{name}.tar", *about) for name, about in NYU.items()),
    ),
    "imagenet": Dataset(
        ("deacl",), "imagenet/train/WNID/*.JPEG", _wnid_folders("imagenet"), {}, counts={"train": (1_281_167,)},
        gigabytes=148,
        by_hand=(
            "sign in at https://image-net.org/download.php, get ILSVRC2012_img_train.tar (138 GB, md5 "
            "1d675b47d978889d74fa0da5fadfb00e), unpack it in {root}/imagenet/train and each of its 1000 tar files "
            "there in a folder of its name (n01440764.tar in n01440764)"
        ),
    ),
    "imagenette": Dataset(
        ("deacl",), "imagenette2-320/train/WNID/*.JPEG (or imagenette2)",
        _wnid_folders("imagenette2", "imagenette2-320"), {}, counts={"train": (9_469,), "test": (3_925,)},
        gigabytes=0.4,
        archives=(Archive(
            "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", "imagenette2-320", 342_000_000,
            "md5:3df6f0d01a2c9592104656642f5e78a3",
        ),),
    ),
    "tiny_imagenet": Dataset(
        ("classification", "deacl"), "tiny-imagenet-200/{train,val,wnids.txt,words.txt}, unpacked or as zip archives",
        _tiny_imagenet, _tiny_classes, counts={"train": (100_000,), "test": (10_000,)}, gigabytes=0.3,
        archives=(Archive(  # read as it is
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "tiny-imagenet-200/tiny-imagenet-200.zip", 248_100_043,
            "md5:90528d7ca1a48142e341f4ef8d21d0de",
        ),),
    ),
}  # fmt: skip
