"""Small data sets in the official layouts, written into a folder; every pixel says which image it belongs to."""

import json
import pickle
import tarfile
import zipfile
import zlib
from io import BytesIO
from itertools import islice

import numpy as np
from PIL import Image

from ssl_robust.catalogue.cifar import CIFAR10_CLASSES
from ssl_robust.items import IGNORE

RNG = np.random.default_rng(0)
WNIDS = ("n03", "n01", "n02")  # as in wnids.txt: not sorted


def picture(path, size=(20, 26), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == "L" else (*size, 3)
    Image.fromarray(RNG.integers(256, size=shape, dtype=np.uint8), mode).save(path)


def stored(path, pixels, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **more)


def _chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def _png(width, height, bits, rows):
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def png_of_48_bits(pixels):
    """A PNG file of 16 bits in each of three colours, which the library reads and does not write."""
    height, width, _ = pixels.shape
    return _png(width, height, 16, b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))


def png_of_size(width, height):
    """The beginning of a PNG file that says it has so many pixels."""
    return _png(width, height, 8, b"\0" * 100)


def image_folder(root, name="cifar10", classes=CIFAR10_CLASSES, test="test"):
    for split, count in (("train", 6), (test, 3)):
        for label in classes:
            for i in range(count):
                picture(root / name / split / label / f"{i}.png", (8, 8))


def cifar(root, name="cifar10", count=4):
    """Batches of `count` images; image i of a batch is i everywhere in red, row numbers in green."""
    folder, label = ("cifar-10-batches-py", "labels") if name == "cifar10" else ("cifar-100-python", "fine_labels")
    (root / folder).mkdir(parents=True)
    data = np.zeros((count, 3, 32, 32), np.uint8)
    data[:, 0] = np.arange(count)[:, None, None]
    data[:, 1] = np.arange(32)[:, None]
    batch = {"data": data.reshape(count, -1), label: [(3 * i) % 10 for i in range(count)]}
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if name == "cifar10" else ["train", "test"]
    for file in files:
        (root / folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    if name == "cifar100":
        (root / folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{i}" for i in range(100)]}))


def cifar100(root):
    cifar(root, "cifar100")


def stl10(root, count=5):
    """Image i is i everywhere in red, row numbers in green, column numbers in blue; columns first, labels from 1."""
    home = root / "stl10_binary"
    home.mkdir()
    pixels = np.zeros((count, 3, 96, 96), np.uint8)  # (N, C, columns, rows)
    pixels[:, 0] = np.arange(count)[:, None, None]
    pixels[:, 1], pixels[:, 2] = np.arange(96)[None, :], np.arange(96)[:, None]
    for split in ("train", "test"):
        pixels.tofile(home / f"{split}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(home / f"{split}_y.bin")


def voc(root):
    base = root / "VOCdevkit" / "VOC2012"
    for split, count in (("train", 8), ("val", 4)):
        names = [f"2007_{split}{i}" for i in range(count)]
        (base / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            picture(base / "JPEGImages" / f"{name}.jpg")
            mask = np.full((20, 26), 15, np.uint8)
            mask[0], mask[:, 13:] = IGNORE, 3
            palette = Image.fromarray(mask).convert("P")
            palette.putpalette(RNG.integers(256, size=768, dtype=np.uint8).tobytes())
            palette.putdata(mask.flatten().tolist())
            (base / "SegmentationClass").mkdir(exist_ok=True)
            palette.save(base / "SegmentationClass" / f"{name}.png")
    picture(base / "JPEGImages" / "without_mask.jpg")  # as in the official set


def ade20k(root):
    home = root / "ADEChallengeData2016"
    for part, count in (("training", 6), ("validation", 3)):
        for i in range(count):
            picture(home / "images" / part / f"ADE_{part}_{i}.jpg")
            labels = np.tile(np.arange(26, dtype=np.uint8), (20, 1))
            labels[0, 0] = 150
            stored(home / "annotations" / part / f"ADE_{part}_{i}.png", labels)
    rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t1\t1\tthing {i}, object {i}" for i in range(1, 151))]
    (home / "objectInfo150.txt").write_text("\n".join(rows) + "\n")


def cityscapes(root):
    home = root / "cityscapes"
    for part, count in (("train", 4), ("val", 2)):
        for i in range(count):
            name = f"ulm_{i:06}_000019"
            picture(home / "leftImg8bit" / part / "ulm" / f"{name}_leftImg8bit.png", (8, 34))
            ids = np.tile(np.arange(34, dtype=np.uint8), (8, 1))
            stored(home / "gtFine" / part / "ulm" / f"{name}_gtFine_labelIds.png", ids)
            stored(home / "gtFine" / part / "ulm" / f"{name}_gtFine_color.png", np.zeros((8, 34, 3), np.uint8))


def nyuv2(root, height=12, width=16):
    """Six pairs, image i is i in red, rows in green, columns in blue; depth = i + row / 100 + column / 10000."""
    import h5py
    import scipy.io

    home = root / "nyuv2"
    home.mkdir()
    images, depths = np.zeros((6, 3, width, height), np.uint8), np.zeros((6, width, height), np.float32)
    rows, columns = np.arange(height)[None, :], np.arange(width)[:, None]
    for i in range(6):
        images[i] = np.broadcast_arrays(i, rows, columns)
        depths[i] = i + rows / 100 + columns / 10000
    with h5py.File(home / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = images, depths
    train, test = (np.array(v, np.uint16)[:, None] for v in ([3, 4, 5, 6], [1, 2]))  # counted from 1
    scipy.io.savemat(home / "splits.mat", {"trainNdxs": train, "testNdxs": test})


def nyu_archives(root, train=(3, 2), val=(2,), place="data", height=12, width=16):
    """Tar archives of HDF5 files as the hub keeps NYU-Depth-v2, with so many pairs in each.

    Pair i of a split is i in red, rows in green, columns in blue; depth = 1 + i + row / 100 + column / 10000.
    """
    home = root / "nyuv2" / place
    home.mkdir(parents=True, exist_ok=True)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    for split, folder, sizes in (("train", "train/den_0001a", train), ("val", "val/official", val)):
        numbers = iter(range(sum(sizes)))
        for number, size in enumerate(sizes):
            with tarfile.open(home / f"{split}-{number:06}.tar", "w") as archive:
                for i in islice(numbers, size):
                    rgb = np.stack(np.broadcast_arrays(i, rows, columns)).astype(np.uint8)
                    content = hdf5(rgb=rgb, depth=(1 + i + rows / 100 + columns / 10000).astype(np.float32))
                    about = tarfile.TarInfo(f"{folder}/{i + 1:05}.h5")
                    about.size = len(content)
                    archive.addfile(about, BytesIO(content))


def hdf5(**arrays):
    """The bytes of an HDF5 file of these arrays, compressed."""
    import h5py

    buffer = BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
    return buffer.getvalue()


def wnids(root, home="imagenette2-320", count=4):
    for split in ("train", "val"):
        for wnid in WNIDS:
            for i in range(count):
                picture(root / home / split / wnid / f"{wnid}_{i}.JPEG")


def tiny_imagenet(root, zipped=False):
    home = root / "tiny-imagenet-200"
    for wnid in WNIDS:
        for i in range(4):
            picture(home / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", (16, 16))
    rows = []
    for i in range(5):
        picture(home / "val" / "images" / f"val_{i}.JPEG", (16, 16))
        rows.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t9\t9")
    (home / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (home / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (home / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tbullfrog\nn09\tvalley\n")
    if zipped:
        _into_zip(home)


def tiny_zipped(root):
    tiny_imagenet(root, zipped=True)


def _into_zip(home):
    files = [p for p in home.rglob("*") if p.is_file()]
    with zipfile.ZipFile(home / "tiny-imagenet-200.zip", "w") as archive:
        for path in files:
            archive.write(path, f"tiny-imagenet-200/{path.relative_to(home)}")
            path.unlink()
    for folder in sorted((p for p in home.rglob("*") if p.is_dir()), reverse=True):
        folder.rmdir()


def zipped(name, content):
    """The bytes of a zip archive of one file."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def locked(whole):
    """A zip archive of one file that says it is encrypted, in the header of the file and in the directory."""
    content, directory = bytearray(whole), whole.index(b"PK\1\2")
    content[6] = content[directory + 8] = 1
    return bytes(content)


def damaged_inside(whole):
    content, start = bytearray(whole), 30 + len(zipfile.ZipFile(BytesIO(whole)).namelist()[0])
    content[start : start + 4] = b"\xff" * 4
    return bytes(content)


def mask_folder(root, name="street", classes=("sky", "road", "car"), held="val"):
    for split, count in (("train", 8), (held, 4)):
        for i in range(count):
            picture(root / name / "images" / split / f"{i}.png")
            mask = np.full((20, 26), i % len(classes), np.uint8)
            mask[0] = IGNORE
            stored(root / name / "masks" / split / f"{i}.png", mask)
    (root / name / "classes.txt").write_text("\n".join(classes) + "\n")


def depth_folder(root, name="sevenscenes", scale=1000):
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            picture(root / name / "images" / split / f"{i}.jpg")
            depth = np.full((20, 26), 2500, np.uint16)
            depth[0], depth[1] = 0, 65535
            stored(root / name / "depth" / split / f"{i}.png", depth)
    (root / name / "meta.json").write_text(json.dumps({"depth_scale": scale}))


def rooms(root):
    depth_folder(root, "rooms")


def flat_folder(root, name="imagenet_samples"):
    for i in range(16):
        picture(root / name / f"n{i}.jpg", (20, 20 + i))
    (root / name / "README.txt").write_text("no image")
