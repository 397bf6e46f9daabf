"""From files to pixels: images and targets of a data set as they are stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from ..items import IGNORE, Item, Part, file_of, unreadable
from ..settings import BadInput
from .pictures import one_channel, rgb


@contextmanager
def _reading(part: Path | Part) -> Iterator[None]:
    """Raises BadInput naming a file that cannot be read."""
    try:
        yield
    except BadInput:
        raise
    except Image.DecompressionBombError:
        raise BadInput(f"{file_of(part)} has too many pixels to read; make it smaller.") from None
    except Exception as error:  # a damaged picture makes the libraries raise nearly anything
        raise unreadable(part, error) from None


def _pixels(part: Path | Part) -> np.ndarray:
    with _reading(part):
        return part.read(part.file, part.key) if isinstance(part, Part) else one_channel(part)


def _colours(part: Path | Part, shape: tuple[int, ...]) -> Tensor:
    """A picture as uint8 (3, H, W); `shape` of its map, if it has one."""
    if isinstance(part, Part):
        pixels = _pixels(part)
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
            stored = f"{pixels.dtype} {pixels.shape}"
            raise BadInput(f"An image in {part.file} is {stored}; get the file whose images are uint8 (H, W, 3).")
    else:
        with _reading(part), Image.open(part) as picture:
            pixels = rgb(picture, part, shape)
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # a copy: files stay open


def _target(part: Path | Part, task: str) -> Tensor:
    """A stored mask uint8 (H, W) or depth map float32 (H, W); palettes and gray values stand for class numbers."""
    pixels = _pixels(part)
    if task == "depth":
        return torch.from_numpy(np.nan_to_num(pixels.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0))
    wrong = pixels[~np.isin(pixels, range(IGNORE + 1))] if pixels.dtype.itemsize > 1 else ()
    if len(wrong):
        said = f"has the value {wrong[0]:g}; store class numbers from 0 to 255 (255: none)"
        raise BadInput(f"The mask {file_of(part)} {said}.")
    return torch.from_numpy(pixels.astype(np.uint8))


def read(item: Item, task: str) -> tuple[tv_tensors.Image, int | tv_tensors.Mask]:
    """Image uint8 (3, H, W) and target of one item; raises BadInput naming a damaged file or a target of other size."""
    image, target = item.image, item.target if item.target is not None else 0
    plain = task in ("classification", "deacl")
    if not plain and isinstance(target, Path | Part):
        target = _target(target, task)
    if isinstance(image, Path | Part):
        image = _colours(image, () if plain else tuple(target.shape[-2:]))
    if plain:
        return tv_tensors.Image(image), target if isinstance(target, int) else 0
    if target.shape[-2:] != image.shape[-2:]:
        sizes = f"{tuple(target.shape[-2:])} but its image {tuple(image.shape[-2:])}"
        raise BadInput(f"The {task} target of {item.id} has size {sizes}; replace the file {file_of(item.target)}.")
    return tv_tensors.Image(image), tv_tensors.Mask(target.float() if task == "depth" else target.to(torch.uint8))
