"""ImageNet and Imagenette, for DeACL."""

import os
from functools import partial
from pathlib import Path

from ..items import Archive, Dataset, Item
from .pictures import IMAGES, folders


def _items(homes: tuple[str, ...], root: Path, task: str, split: str, n: int) -> list[Item]:
    """Images in train/WNID or val/WNID of the first of these folders that is there."""
    home = next((root / h for h in homes if (root / h).is_dir()), root / homes[0])
    folder = home / ("train" if split == "train" else "val")
    found = []
    for wnid in folders(folder):  # flat and with few Paths made, as ImageNet has 1.3 million files
        files = sorted(f for f in os.listdir(folder / wnid) if f[0] != "." and f.lower().endswith(IMAGES))
        found += [Item(f"{wnid}/{f}", Path(f"{folder}/{wnid}/{f}"), None) for f in files]
    return found


DATASETS = {
    "imagenet": Dataset(
        ("deacl",), "imagenet/train/WNID/*.JPEG", partial(_items, ("imagenet",)), {}, counts={"train": (1_281_167,)},
        shape=(375, 500), gigabytes=148,
        by_hand=(
            "sign in at https://image-net.org/download.php, get ILSVRC2012_img_train.tar (138 GB, md5 "
            "1d675b47d978889d74fa0da5fadfb00e), unpack it in {root}/imagenet/train and each of its 1000 tar files "
            "there in a folder of its name (n01440764.tar in n01440764)"
        ),
    ),
    "imagenette": Dataset(
        ("deacl",), "imagenette2-320/train/WNID/*.JPEG (or imagenette2)",
        partial(_items, ("imagenette2", "imagenette2-320")), {}, counts={"train": (9_469,), "test": (3_925,)},
        shape=(375, 500), gigabytes=0.4,
        archives=(Archive(
            "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", "imagenette2-320", 342_000_000,
            "md5:3df6f0d01a2c9592104656642f5e78a3",
        ),),
    ),
}  # fmt: skip
