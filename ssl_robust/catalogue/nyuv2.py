"""NYU-Depth-v2: tar archives of its 47,584 training images, or the labelled .mat with its splits."""

import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..items import Archive, Dataset, Item, Part
from ..settings import BadInput
from .pictures import damaged, once

NYU_DEPTH = 10.0  # metres, where the depth maps of NYU-Depth-v2 end
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


def _nyuv2(root: Path, task: str, split: str, n: int) -> list[Item]:
    """The split from the archives or, if that holds more of it, from the labelled file."""
    return max(_nyu_archives(root / "nyuv2", split), _nyu_labelled(root / "nyuv2", split), key=len)


def _nyu_archives(home: Path, split: str) -> list[Item]:
    """The pairs in train-000000.tar .. or val-000000.tar .., not unpacked."""
    found = []
    for file in sorted(home.rglob("train-*.tar" if split == "train" else "val-*.tar")):
        for member, place in _tar_index(file).items():
            pair = [Part(_nyu_pair, file, (array, *place)) for array in ("rgb", "depth")]
            found.append(Item(f"nyuv2/{file.stem}/{member}", *pair))
    return found


@once
def _tar_index(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each HDF5 file in an archive that is not compressed."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = [m for m in archive if m.isfile() and m.name.endswith(".h5")]
    except (tarfile.TarError, OSError):
        raise damaged(path) from None
    return {m.name.removeprefix("./"): (m.offset_data, m.size) for m in members}


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
        return h5py.File(path, "r")
    except OSError:
        raise damaged(path) from None


def _nyu_image(path: Path, i: int) -> np.ndarray:
    return _hdf5(path)["images"][i].T  # (3, W, H) -> (H, W, 3)


def _nyu_depth(path: Path, i: int) -> np.ndarray:
    return _nyu_metres(_hdf5(path)["depths"][i].T, path)  # the filled-in depth maps, (W, H) -> (H, W)


def _nyu_metres(depth: np.ndarray, path: Path) -> np.ndarray:
    """`depth` itself; BadInput if it is not in metres."""
    far = depth[np.isfinite(depth)].max(initial=0)
    if far > 1.001 * NYU_DEPTH:  # float16 and float32 round
        raise BadInput(f"{path} holds depths of {far:.4g} but official ones end at {NYU_DEPTH:g} m; store metres.")
    return depth


def _nyu_labelled(home: Path, split: str) -> list[Item]:
    import scipy.io

    mat = home / "nyu_depth_v2_labeled.mat"
    if not mat.is_file():
        return []
    splits = home / "splits.mat"
    content = BytesIO(splits.read_bytes())
    try:
        rows = [int(i) - 1 for i in scipy.io.loadmat(content)[f"{split}Ndxs"].ravel()]  # in the file from 1
    except Exception:  # scipy has errors of its own for each kind of damage
        raise damaged(splits) from None
    return [Item(f"nyuv2/{i}", Part(_nyu_image, mat, i), Part(_nyu_depth, mat, i)) for i in rows]


DATASETS = {
    "nyuv2": Dataset(
        ("depth", "deacl"),
        "nyuv2/nyu_depth_v2_labeled.mat and nyuv2/splits.mat (or nyuv2/data/{train,val}-*.tar with the hub's 47,584 "
        "training images)",
        _nyuv2, {}, counts={"train": (795, 47_584), "test": (654,)}, shape=(480, 640), gigabytes=3,
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
}  # fmt: skip
