"""Every layout from small files made here: what is read, split, resized and augmented, and what is refused."""

import dataclasses
import hashlib
import os
import pickle
import re
import types
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
import trees
from PIL import Image

from ssl_robust import datasets, records, training
from ssl_robust.catalogue import pictures, reading
from ssl_robust.catalogue.cifar import CIFAR10_CLASSES
from ssl_robust.datasets import IGNORE, Item, Subset
from ssl_robust.items import Part
from ssl_robust.ops import plan
from ssl_robust.settings import BadInput
from ssl_robust.trust import data

DATA = Path(__file__).parents[2] / "shared" / "data"

REAL = {
    "classification": ("cifar10", trees.image_folder),
    "segmentation": ("voc2012", trees.voc),
    "depth": ("sevenscenes", trees.depth_folder),
    "deacl": ("imagenet_samples", trees.flat_folder),
}
EACH = pytest.mark.parametrize("task", REAL)


def _settings(root, seed=0, counts="any", **section):
    section = {"n_train": 4, "n_val": 3, "n_test": 3, **section}
    tasks = {t: {**section, "datasets": [REAL[t][0]]} for t in ("classification", "segmentation", "depth")}
    sizes = {"n_train": section["n_train"], "n_val": section["n_val"], "dataset": "imagenet_samples"}
    tasks["segmentation"] = {"size": "native"} | tasks["segmentation"]
    return planted.settings(data_root=str(root), seed=seed, counts=counts, deacl=sizes, **tasks)


def _load(task, split, root, native=8, seed=0, **section):
    return datasets.load(task, REAL[task][0], split, _settings(root, seed, **section), native)


# --- reading ---


def test_image_folder(tmp_path):
    trees.image_folder(tmp_path)
    subset = _load("classification", "test", tmp_path, n_test=30)
    assert subset.classes == CIFAR10_CLASSES and len(subset) == 30
    for i in range(30):
        image, label = subset[i]
        path = tmp_path / subset.ids[i]
        assert path.parent.name == subset.classes[label] and path.parent.parent.name == "test"
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(Image.open(path)))


def test_voc_layout_keeps_the_ignored_pixels(tmp_path):
    trees.voc(tmp_path)
    subset = _load("segmentation", "test", tmp_path, size="original")
    image, mask = subset[0]
    assert image.shape == (3, 20, 26) and image.dtype == torch.uint8
    assert mask.shape == (20, 26) and mask.dtype == torch.uint8
    assert (mask[0, :13] == IGNORE).all() and (mask[1:, :13] == 15).all() and (mask[:, 13:] == 3).all()
    assert all("_val" in i for i in subset.ids) and len(subset.classes) == 21
    resized = _load("segmentation", "test", tmp_path, size=13)[0][1]
    assert set(resized.unique().tolist()) <= {3, 15, IGNORE}  # nothing between


@pytest.mark.parametrize(("scale", "metres"), [(1000, 2.5), (250, 10.0)])
def test_depth_folder_in_metres(tmp_path, scale, metres):
    trees.depth_folder(tmp_path, scale=scale)
    image, depth = _load("depth", "test", tmp_path, size="original")[0]
    assert image.shape == (3, 20, 26) and depth.shape == (20, 26) and depth.dtype == torch.float32
    assert (depth[0] == 0).all() and torch.allclose(depth[2:], torch.tensor(metres))
    assert depth[1, 0] == pytest.approx(65535 / scale)  # 16 bits, unsigned
    resized = _load("depth", "test", tmp_path, size=9)[0][1]
    assert resized.shape == (9, 11) and set(resized.unique().tolist()) <= set(depth.unique().tolist())


def test_flat_folder(tmp_path):
    trees.flat_folder(tmp_path)
    subset = _load("deacl", "train", tmp_path)
    assert len(subset) == 4 and all(i.endswith(".jpg") for i in subset.ids)
    assert subset[0][0].shape == (3, 8, 8) and subset[0][1] == 0


def test_gray_images_become_colour(tmp_path):
    trees.picture(tmp_path / "g.png", mode="L")
    image, _ = datasets.read(Item("g", tmp_path / "g.png", 0), "classification")
    assert image.shape == (3, 20, 26) and torch.equal(image[0], image[2])


RAMP = np.tile(np.arange(64, dtype=np.uint16) * 1040, (16, 1))  # 0 .. 65520 of 16 bits
GRAY = (RAMP >> 8).astype(np.uint8)


def _looks(path):
    return datasets.read(Item("i", path, 0), "classification")[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_keeps_its_upper_bits(tmp_path, suffix):
    trees.stored(tmp_path / f"a.{suffix}", RAMP)
    assert np.array_equal(_looks(tmp_path / f"a.{suffix}"), np.dstack([GRAY] * 3))


def test_48_bit_colour_keeps_its_upper_bits(tmp_path):
    rows = np.stack([RAMP, RAMP[:, ::-1], RAMP], -1).astype(">u2")
    (tmp_path / "a.png").write_bytes(trees.png_of_48_bits(rows))
    assert np.array_equal(_looks(tmp_path / "a.png"), np.dstack([GRAY, GRAY[:, ::-1], GRAY]))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (RAMP // 16, "uses the lower ones only; save it with 8"),  # 12 bits
        (RAMP // 4, "uses the lower ones only; save it with 8"),  # 14 bits
        (RAMP // 257, "uses the lower ones only; save it with 8"),  # 8 bits in 16
        (RAMP.astype(np.int32), "stores I numbers, of which white is unknown; save it as 8-bit gray or RGB"),
        (RAMP / np.float32(65535), "stores F numbers, of which white is unknown"),
    ],
)
def test_pictures_whose_white_is_unknown_are_refused(tmp_path, pixels, words):
    trees.stored(tmp_path / "a.tif", pixels)
    with pytest.raises(BadInput, match=f"^{tmp_path}/a.tif .*{words}") as refusal:
        _looks(tmp_path / "a.tif")
    assert not isinstance(refusal.value, datasets.Unreadable)  # damaged: skip does not pass over it


def test_black_is_black_in_16_bits_too(tmp_path):
    trees.stored(tmp_path / "a.png", RAMP * 0)
    assert not _looks(tmp_path / "a.png").any()


COLOURS = np.dstack([np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))] * 2 + [np.full((16, 32), 200, np.uint8)])
FADING = np.tile(np.arange(32, dtype=np.uint8) * 8, (16, 1))


def _with_alpha(mode):
    picture = Image.fromarray(np.dstack([COLOURS, FADING]))
    return picture if mode == "RGBA" else picture.convert(mode)


@pytest.mark.parametrize(
    ("picture", "seen"),
    [
        (Image.fromarray(COLOURS), COLOURS),
        (_with_alpha("RGBA"), COLOURS),
        (Image.fromarray(np.dstack([GRAY, GRAY[:, ::-1]]), "LA"), np.dstack([GRAY] * 3)),
        (Image.fromarray(GRAY > 99), np.dstack([255 * (GRAY > 99)] * 3)),
        (Image.fromarray(COLOURS).convert("CMYK"), COLOURS),
    ],
    ids=["RGB", "RGBA", "LA", "1", "CMYK"],
)
def test_pictures_of_other_modes(tmp_path, picture, seen):
    picture.save(tmp_path / "a.tif")
    assert np.array_equal(_looks(tmp_path / "a.tif"), seen)


@pytest.mark.parametrize("mode", ["RGBa", "PA", "HSV", "YCbCr"])
def test_pictures_of_rare_modes(mode):
    smooth = Image.fromarray(np.dstack([GRAY] * 3))
    whole = smooth.convert("RGBA" if mode == "RGBa" else "RGB")
    rare = smooth.convert("L").convert("P").convert("PA") if mode == "PA" else whole.convert(mode)
    rare.tile = ()  # as a picture that was opened has
    assert np.abs(pictures.rgb(rare, "it").astype(int) - GRAY[..., None]).max() <= 2  # YCbCr rounds


def test_palettes_with_transparent_entries(tmp_path):
    picture = Image.fromarray((GRAY > 99).astype(np.uint8), "P")
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.save(tmp_path / "a.png", transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = _looks(tmp_path / "a.png")
    assert np.array_equal(seen, np.where((GRAY > 99)[..., None], [200, 100, 0], [10, 20, 30]))


def test_lab_is_refused_by_name(tmp_path):
    Image.fromarray(COLOURS, "LAB").save(tmp_path / "a.tif")
    with pytest.raises(
        BadInput, match="a.tif stores LAB numbers, of which white is unknown; save it as 8-bit gray or RGB"
    ):
        _looks(tmp_path / "a.tif")


def test_pictures_of_too_many_pixels_are_refused_before_they_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(trees.png_of_size(20_000, 20_000))
    with pytest.raises(BadInput, match=f"{tmp_path}/a.png has .* to read; make it smaller"):
        _looks(tmp_path / "a.png")


@pytest.mark.parametrize("stored", ["uint16", "float32"])
def test_arrays_of_images_that_are_not_of_8_bits_are_refused(tmp_path, stored):
    part = Part(lambda path, key: np.zeros((4, 4, 3), stored), tmp_path / "images.mat")
    with pytest.raises(BadInput, match=f"images.mat is {stored} .4, 4, 3.; get the file whose images are uint8"):
        datasets.read(Item("i", part, 0), "classification")


def _turned(path, pixels, tag):
    exif = Image.Exif()
    exif[274] = tag
    trees.stored(path, pixels, exif=exif)


TURNS = {  # what a viewer shows of stored pixels, by orientation tag
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.swapaxes(np.rot90(x, 2), 0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("tag", TURNS)
def test_pictures_stand_upright(tmp_path, tag):
    _turned(tmp_path / "a.png", COLOURS, tag)
    assert np.array_equal(_looks(tmp_path / "a.png"), TURNS[tag](COLOURS))


@pytest.mark.parametrize("tag", TURNS)
def test_a_turned_picture_and_its_mask_match_or_are_refused(tmp_path, tag):
    image, mask = tmp_path / "a.png", tmp_path / "m.png"
    _turned(image, COLOURS, tag)
    for drawn_on in (COLOURS, TURNS[tag](COLOURS)):
        trees.stored(mask, drawn_on[..., 0].copy())
        if 1 < tag < 5:  # either may be meant, as both are of one size
            with pytest.raises(BadInput, match=f"a.png is to be turned .EXIF orientation {tag}.*; save both upright"):
                datasets.read(Item("i", image, mask), "segmentation")
            continue
        seen, target = datasets.read(Item("i", image, mask), "segmentation")
        assert torch.equal(seen[0], target)


def test_tiffs_stand_upright(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.tif", tiffinfo={274: 3})
    assert np.array_equal(_looks(tmp_path / "a.tif"), TURNS[3](COLOURS))


def test_scenes_serve_all_tasks_with_their_own_splits(root):
    found = {}
    for task in ("classification", "segmentation", "depth"):
        settings = planted.settings(
            **{task: {"datasets": ["scenes"], "n_train": 2, "n_val": 1, "n_test": 1, "size": 64}}
        )
        found[task] = {s: datasets.load(task, "scenes", s, settings, 64) for s in ("train", "val", "test")}
    train = found["segmentation"]["train"]
    assert len(train) == 2 and train[0][0].shape == (3, 64, 64) and train[0][1].shape == (64, 64)
    assert found["classification"]["val"][0][1].ndim == 0 and len(found["classification"]["val"].classes) == 10
    assert found["segmentation"]["val"].classes[0] == "background" and len(train.classes) == 11
    assert found["depth"]["test"][0][1].dtype == torch.float32 and found["depth"]["test"].classes == ()
    assert len({i for subset in found["depth"].values() for i in subset.ids}) == 4


@pytest.mark.parametrize("task", ["classification", "segmentation", "depth"])
def test_real_files(task):
    name = REAL[task][0]
    problems = [p for p in data.check(_settings(DATA)) if f"'{name}'" in p]
    if problems:
        pytest.skip(f"{name} is not in {DATA.parent.name}/data beside the project")
    subset = _load(task, "test", DATA, native=32, n_test=5)
    images, targets = zip(*(subset[i] for i in range(5)), strict=True)
    assert all(min(i.shape[1:]) == 32 and i.float().std() > 5 for i in images)
    if task == "classification":
        assert {Path(i).parent.name for i in subset.ids} == {subset.classes[t] for t in targets}
    elif task == "segmentation":
        assert all(
            int(m[m != IGNORE].max()) <= 20 and m.shape == i.shape[1:] for i, m in zip(images, targets, strict=True)
        )
    else:
        assert all(0.3 < float(d[d > 0].median()) < 5 for d in targets)


# --- splits ---


@EACH
def test_splits_are_disjoint_and_drawn_by_seed(task, tmp_path):
    REAL[task][1](tmp_path)
    splits = ("train", "val") if task == "deacl" else ("train", "val", "test")
    ids = {split: _load(task, split, tmp_path).ids for split in splits}
    everything = sum(ids.values(), [])
    assert len(everything) == len(set(everything)) == sum({"train": 4}.get(s, 3) for s in splits)
    assert {split: _load(task, split, tmp_path).ids for split in splits} == ids
    assert all(_load(task, split, tmp_path, seed=1).ids != ids[split] for split in splits)


def test_held_out_images_come_from_train_whatever_n_train_is(tmp_path):
    trees.voc(tmp_path)
    train, val = (_load("segmentation", s, tmp_path, n_train=100).ids for s in ("train", "val"))
    assert len(train) == 5 and len(val) == 3 and all("train" in i for i in train + val)


def test_hash_names_the_images_and_their_content(tmp_path):
    trees.depth_folder(tmp_path)
    subset = _load("depth", "test", tmp_path)
    first = subset.hash
    assert _load("depth", "test", tmp_path).hash == first
    assert _load("depth", "test", tmp_path, n_test=2).hash != first
    trees.picture(subset.items[0].image, (20, 27))
    second = _load("depth", "test", tmp_path).hash
    trees.stored(subset.items[0].target.file, np.full((20, 27), 7, np.uint16))
    assert len({first, second, _load("depth", "test", tmp_path).hash}) == 3


def test_files_are_read_once_for_all_hashes(tmp_path, monkeypatch):
    trees.voc(tmp_path)
    subset, again, reads = _load("segmentation", "test", tmp_path), _load("segmentation", "test", tmp_path), []
    whole = datasets._digest
    monkeypatch.setattr(datasets, "_digest", lambda path: reads.append(path) or whole(path))
    assert subset.hash == subset.hash == again.hash
    assert len(reads) == 6  # three images and their masks
    for known in (records.home() / "hashes").iterdir():
        known.write_bytes(known.read_bytes()[:-1])
    assert _load("segmentation", "test", tmp_path).hash == subset.hash and len(reads) == 12  # what was kept is damaged


def test_a_file_of_the_same_size_and_an_older_time_is_another_one(tmp_path):
    trees.voc(tmp_path)
    subset = _load("segmentation", "test", tmp_path)
    path, before = subset.items[1].image, subset.hash
    content, state = bytearray(path.read_bytes()), path.stat()
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # as cp -p, rsync -a and tar leave it
    assert path.stat().st_mtime_ns == state.st_mtime_ns
    assert _load("segmentation", "test", tmp_path).hash != before


def _cifar(root, change):
    """Hash of 1,000 test images of CIFAR-10 whose batch, {"data", "labels"}, was changed."""
    generator = np.random.default_rng(0)
    data = generator.integers(256, size=(1000, 3 * 32 * 32), dtype=np.uint8)
    batch = {"data": data, "labels": [i % 10 for i in range(1000)]}
    change(batch)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    settings = planted.settings(
        data_root=str(root), counts="any", classification={"datasets": ["cifar10"], "n_test": 1000}
    )
    return datasets.load("classification", "cifar10", "test", settings, 8).hash


def test_every_image_and_every_label_is_part_of_the_hash(tmp_path):
    trees.cifar(tmp_path)
    changes = [
        lambda batch: None,
        lambda batch: batch.update(labels=[(y + 1) % 10 for y in batch["labels"]]),
        lambda batch: batch["labels"].__setitem__(999, 0),
        lambda batch: batch.update(data=batch["data"] ^ (255 * (np.arange(1000) % 5 > 0)[:, None]).astype(np.uint8)),
        lambda batch: batch["data"].__setitem__((998, 7), 0),
    ]
    found = [_cifar(tmp_path, change) for change in changes]
    assert len(set(found)) == 5 and _cifar(tmp_path, changes[0]) == found[0]


def test_a_class_more_makes_another_hash(tmp_path, toys, monkeypatch):
    first = datasets.load("segmentation", "toys", "test", planted.settings(), 16).hash
    more = replace(planted.TOYS, classes={"segmentation": (*planted.CLASSES, "black")})
    monkeypatch.setitem(datasets.DATASETS, "toys", more)
    assert datasets.load("segmentation", "toys", "test", planted.settings(), 16).hash != first


def test_other_pixels_of_rendered_images_make_another_hash(toys):
    subset = datasets.load("depth", "toys", "test", planted.settings(), 16)
    other = datasets.load("depth", "toys", "test", planted.settings(), 16)
    assert subset.hash == other.hash
    items = [*other.items[:-1], other.items[-1]._replace(target=other.items[-1].target + 1)]
    other.items = items
    assert subset.hash != other.hash


def test_adding_a_data_set_or_another_address_changes_no_hash(tmp_path, monkeypatch):
    trees.image_folder(tmp_path)
    first = _load("classification", "test", tmp_path).hash
    monkeypatch.setitem(datasets.DATASETS, "more", planted.TOYS)
    moved = [a._replace(url="http" + a.url) for a in datasets.DATASETS["cifar10"].archives]
    monkeypatch.setitem(datasets.DATASETS, "cifar10", replace(datasets.DATASETS["cifar10"], archives=tuple(moved)))
    assert _load("classification", "test", tmp_path).hash == first


def test_of_large_subsets_evenly_spread_images_are_looked_at():
    assert datasets.spread(list(range(3999))) == list(range(3999))
    chosen = datasets.spread(list(range(50_001)))
    assert 2000 <= len(chosen) < 4000 and chosen[-1] > 49_000 and len(set(np.diff(chosen))) == 1


# --- sizes and augmentation ---


def _item(size=(24, 40), seed=0):
    """An image whose every channel equals its mask."""
    mask = torch.randint(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Item(f"item-{seed}", mask.expand(3, -1, -1).clone(), mask)


@pytest.mark.parametrize(
    ("task", "split", "size", "shape"),
    [
        ("classification", "test", "native", (16, 16)),  # a square of the short side
        ("classification", "train", 20, (20, 20)),
        ("classification", "test", "original", (16, 16)),
        ("segmentation", "test", "native", (16, 26)),
        ("segmentation", "test", "original", (24, 40)),
        ("segmentation", "train", 20, (16, 16)),  # a window of native px
        ("segmentation", "val", 20, (16, 16)),
        ("depth", "test", 12, (12, 20)),
        ("depth", "train", "original", (24, 40)),
        ("deacl", "train", "native", (16, 16)),
    ],
)
def test_sizes(task, split, size, shape, toys):
    item = _item() if task in ("segmentation", "depth") else _item()._replace(target=1)
    subset = Subset("toys", task, [item], datasets.transform(task, split, size, 16))
    image, target = subset[0]
    assert image.shape == (3, *shape) and target.shape == (shape if task in ("segmentation", "depth") else ())


def test_small_originals_are_enlarged_to_the_window():
    image, mask = datasets.transform("segmentation", "test", "original", 48)(*datasets.read(_item(), "segmentation"))
    assert image.shape == (3, 48, 80) and mask.shape == (48, 80)


@pytest.mark.parametrize("size", [(480, 640), (240, 320), (48, 64)])
def test_eigen_crop_makes_the_border_of_test_depths_invalid(size, toys):
    item = Item("d", torch.zeros(3, *size, dtype=torch.uint8), torch.ones(size))
    for split, crop in (("test", "eigen"), ("val", "eigen"), ("test", "none")):
        depth = Subset("toys", "depth", [item], datasets.transform("depth", split, "original", 8, crop))[0][1]
        rows, columns = depth.any(1).nonzero()[:, 0], depth.any(0).nonzero()[:, 0]
        box = [int(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)]
        assert depth.shape == size and depth.sum() == (box[1] - box[0]) * (box[3] - box[2])
        scale = size[0] / 480
        inside = [round(scale * v) for v in (45, 471, 41, 601)]
        assert box == (inside if split == "test" and crop == "eigen" else [0, size[0], 0, size[1]])


def test_eigen_crop_is_a_setting(tmp_path):
    trees.depth_folder(tmp_path)
    whole, cropped = (_load_depth(tmp_path, crop) for crop in ("none", "eigen"))
    assert (whole[:, 0] > 0).any() and not (cropped[:, 0] > 0).any() and (cropped[2:18, 3:20] > 0).all()


def _load_depth(root, crop):
    settings = planted.settings(
        data_root=str(root),
        depth={"datasets": ["sevenscenes"], "n_val": 1, "n_test": 1, "size": "original", "crop": crop},
    )
    return datasets.load("depth", "sevenscenes", "test", settings, 8)[0][1]


def test_training_crops_larger_than_the_images_are_refused():
    with pytest.raises(BadInput, match="segmentation.size is 32 px, less than the encoder's window of 64 px"):
        datasets.transform("segmentation", "train", 32, 64)


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_augmentation_moves_image_and_target_alike(task, toys):
    items = [_item((16, 24), seed) for seed in range(8)]
    subset = Subset("toys", task, items, datasets.transform(task, "train", "original", 16))
    subset.flip = None if task == "depth" else False
    moved = 0
    for i, item in enumerate(items):
        image, target = subset[i]
        assert torch.equal(image[0].float(), target.float())
        moved += not torch.equal(target.float(), item.target[:, : target.shape[1]].float())
    assert moved >= 2


def test_augmentation_depends_on_image_and_view_not_on_order(toys):
    subset = datasets.load("deacl", "toys", "train", planted.settings(), 16)
    state = torch.random.get_rng_state()
    forward = [subset[i][0] for i in range(6)]
    backward = [subset[i][0] for i in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    subset.view = 1
    assert sum(not torch.equal(subset[i][0], forward[i]) for i in range(6)) == 6
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("task", ["classification", "depth"])
def test_flips_are_drawn_for_each_image_and_view_or_told(task, toys):
    train = datasets.load(task, "toys", "train", planted.settings(), 24)
    assert train.flip is None and all(
        datasets.load(t, "toys", split, planted.settings(), 24).flip is False
        for t, split in ((task, "val"), (task, "test"), ("segmentation", "train"))
    )
    drawn = []
    for train.view in range(4):
        for i in range(12):
            whole = train.items[i].image
            expected = whole.flip(2) if train.flipped(i) else whole
            assert torch.equal(train[i][0], expected)
            assert task == "classification" or train[i][1].argmin() == (23 if train.flipped(i) else 0)  # invalid corner
        drawn += [train.flipped(i) for i in range(12)]
    assert 12 < sum(drawn) < 36 and drawn[:12] != drawn[12:24]
    assert drawn == [datasets.image_seed(v, i) % 2 for v in range(4) for i in train.ids]
    for train.flip in (False, True):
        assert all(train.flipped(i) == train.flip for i in range(12))


def test_test_images_are_not_augmented(toys):
    subset = datasets.load("segmentation", "toys", "test", planted.settings(), 16)
    first = subset[3]
    subset.view = 7
    assert torch.equal(subset[3][0], first[0]) and torch.equal(subset[3][1], first[1])
    assert torch.equal(first[0], subset.items[3].image)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_batches_hold_every_image_once_among_equal_shapes(size, toys):
    items = [_item((16, 16 + 4 * (i % 3)), i) for i in range(10)]
    subset = Subset("toys", "segmentation", items, datasets.transform("segmentation", "test", "original", 8))
    seen = []
    for indices, images, targets in datasets.batches(subset, size):
        assert len(indices) == len(images) == len(targets) <= size
        assert images.dtype == torch.float32 and images.max() <= 1
        for i, image, target in zip(indices, images, targets, strict=True):
            assert torch.equal(image, items[i].image.float() / 255) and torch.equal(target, items[i].target)
        seen += indices
    assert sorted(seen) == list(range(10))


def test_reading_ahead_changes_nothing(tmp_path, monkeypatch):
    trees.voc(tmp_path)
    subset = _load("segmentation", "train", tmp_path, n_train=5)
    here = [*datasets.batches(subset, 2)]
    monkeypatch.setattr(datasets, "workers", lambda subset: 2)
    ahead = [*datasets.batches(subset, 2)]
    assert len(here) == len(ahead) == 3
    for (i, x, target), (j, y, other) in zip(here, ahead, strict=True):
        assert i == j and torch.equal(x, y) and torch.equal(target, other)
    subset.items[1].image.write_bytes(b"")
    with pytest.raises(BadInput, match=f"^The image file {subset.items[1].image} cannot be .*; replace or .*: skip.$"):
        [*datasets.batches(subset, 2)]


def test_few_images_and_rendered_ones_are_read_in_this_process(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.os, "sched_getaffinity", lambda pid: range(16), raising=False)
    toy = datasets.load("depth", "toys", "test", planted.settings(), 16)
    many = Subset("toys", "depth", [Item(str(i), tmp_path / "a.png", 0) for i in range(300)], toy.transform)
    assert (datasets.workers(toy), datasets.workers(many)) == (0, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")  # of DeACL's processes each has its share of the cores
    assert datasets.workers(many) == 3 and not datasets.cramped()
    small = [Item(str(i), toy.items[0].image, 0) for i in range(300)]  # as CIFAR-10 is, which DINOv2 sees at 518 px
    for side, expected in ((224, 0), (518, 3)):
        resized = datasets.transform("classification", "test", side, side)
        assert datasets.workers(Subset("toys", "classification", small, resized)) == expected
    container_has = types.SimpleNamespace(total=64 * 2**20)
    with monkeypatch.context() as container:
        container.setattr(datasets.shutil, "disk_usage", lambda path: container_has)
        assert datasets.workers(many) == 0
        assert re.fullmatch(r"/dev/shm has 67 MB, so no images are read ahead.*--shm-size=2g.", datasets.cramped())
    monkeypatch.setattr(datasets.os, "sched_getaffinity", lambda pid: range(2), raising=False)
    assert datasets.workers(many) == 0


# --- refusals ---


def test_a_missing_data_folder_is_said_with_the_remedy(tmp_path):
    for root, words in (("", "as no data folder is given"), (tmp_path / "gone", f"data folder '{tmp_path}/gone'")):
        with pytest.raises(BadInput) as refusal:
            _load("segmentation", "test", root)
        assert "'voc2012' (test) was not found" in str(refusal.value) and words in str(refusal.value)
        assert "VOCdevkit/VOC2012" in str(refusal.value) and "DATA=FOLDER" in str(refusal.value)


def test_check_lists_everything_that_is_missing(tmp_path):
    assert len(data.check(_settings(tmp_path))) == 4  # one of each task and of DeACL
    for task in REAL:
        REAL[task][1](tmp_path)
    assert data.check(_settings(tmp_path)) == []
    assert data.overview(_settings(tmp_path))["images"].tolist() == [4, 3, 3] * 3 + [4, 3]
    (tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt").unlink()
    (problem,) = data.check(_settings(tmp_path))
    assert "'voc2012' (test)" in problem


def test_data_sets_that_are_not_there_are_skipped_where_that_is_wanted(tmp_path):
    REAL["depth"][1](tmp_path)
    settings = _settings(tmp_path).model_copy(update={"missing": "skip"})
    assert data.usable("depth", settings) == settings.depth.datasets
    assert data.usable("segmentation", settings) == [] == data.usable("deacl", settings)
    overview = data.overview(settings)
    assert overview["images"].tolist() == [0, 0, 4, 3, 3, 0]
    assert "was not found" in overview["hash"][1]
    with pytest.raises(BadInput, match="was not found"):
        data.overview(_settings(tmp_path))


def test_no_data_of_deacl_are_wanted_where_no_row_is_fine_tuned(tmp_path):
    given = {"name": "planted", "defenses": ["standard", "deacl"], "deacl_checkpoint": "robust.pth"}
    for rows, wanted in (([given], 0), ([{"name": "planted"}], 0), ([given, {"name": "b", "defenses": ["deacl"]}], 1)):
        settings = planted.settings(encoders=rows)
        assert datasets.wanted(settings).count(("deacl", "toys")) == wanted


def test_unknown_names_list_what_there_is():
    words = "no data set 'cifar' .* for classification; choose one of: cifar10, .*scenes, .*; or give a folder"
    with pytest.raises(BadInput, match=f"{words} of your own, cifar/{{train,test}}/CLASS"):
        datasets.list_items("cifar", "classification", "train", 0, "")
    for name in ("", "a/b", "..", "a__b", "_a", "a b"):
        with pytest.raises(BadInput, match="cannot be a data set; choose one of: .*scenes.* name a folder by letters"):
            datasets.entry(name, "depth")
    with pytest.raises(BadInput, match="no data set 'cifar10' for depth"):
        datasets.entry("cifar10", "depth")


def test_no_image_left_for_training_is_said(tmp_path):
    trees.voc(tmp_path)
    with pytest.raises(BadInput, match="'voc2012' has 8 training images and n_val takes them all; lower n_val"):
        _load("segmentation", "train", tmp_path, n_val=8)


def test_a_mask_of_another_size_is_named(tmp_path):
    trees.voc(tmp_path)
    subset = _load("segmentation", "test", tmp_path)
    trees.picture(subset.items[1].target, (26, 20), "L")
    with pytest.raises(BadInput, match=rf"target of {subset.ids[1]} has size \(26, 20\) but its image \(20, 26\)"):
        subset[1]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_damaged_images_are_named(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    trees.picture(path, (40, 40))
    whole = path.read_bytes()
    hurt = [b"", b"text", whole[: len(whole) // 2], whole[:300]]
    for content in hurt:
        path.write_bytes(content)
        with pytest.raises(BadInput, match=f"{path} cannot be read"):
            datasets.read(Item("i", path, 0), "classification")


HURT = {"empty": lambda whole: b"", "text": lambda whole: b"no picture\n", "truncated": lambda whole: whole[:-400]}


@pytest.mark.parametrize("hurt", HURT.values(), ids=HURT)
@pytest.mark.parametrize("task", REAL)
def test_unreadable_images_are_left_out_where_that_is_wanted(task, hurt, tmp_path, root):
    REAL[task][1](tmp_path)
    settings = _settings(tmp_path, n_train=3, n_val=3, n_test=3).model_copy(update={"damaged": "skip"})
    name, native = REAL[task][0], 8
    split = "train" if task == "deacl" else "test"
    whole = datasets.load(task, name, split, settings, native)
    victim = next(part for part in whole.items[1][1:] if isinstance(part, Path))
    trees.picture(victim, (200, 260))  # of some kilobytes, so that a part of it is missing
    victim.write_bytes(hurt(victim.read_bytes()))
    left = datasets.load(task, name, split, settings, native)
    assert whole.damaged == [] and left.damaged == [str(victim)]
    assert left.ids == [whole.ids[0], *whole.ids[2:]] and len(left) == 2 and left.hash != whole.hash
    assert torch.equal(left[1][0], whole[2][0])  # with its own augmentation
    assert sum(len(batch[0]) for batch in datasets.batches(left, 2)) == 2
    stopping = datasets.load(task, name, split, settings.model_copy(update={"damaged": "stop"}), native)
    with pytest.raises(BadInput, match=f"^The image file {victim} cannot be read .*; replace or remove it, or set"):
        [*datasets.batches(stopping, 2)]


def test_unreadable_targets_are_left_out_too(tmp_path, root):
    trees.voc(tmp_path)
    settings = _settings(tmp_path, size="original").model_copy(update={"damaged": "skip"})
    victim = datasets.load("segmentation", "voc2012", "test", settings, 8).items[0].target
    victim.write_bytes(victim.read_bytes()[:60])
    left = datasets.load("segmentation", "voc2012", "test", settings, 8)
    assert left.damaged == [str(victim)] and len(left) == 2
    overview = data.overview(settings.model_copy(update={"classification": None, "depth": None, "deacl": None}))
    assert overview["images"].tolist() == [4, 3, 2] and overview["damaged"].tolist() == [0, 0, 1]
    trees.picture(victim, (26, 20), "L")  # it can be read again, and is wrong
    with pytest.raises(BadInput, match="has size"):
        datasets.load("segmentation", "voc2012", "test", settings, 8)


def test_images_are_looked_through_once_until_one_changes(tmp_path, root, monkeypatch):
    trees.voc(tmp_path)
    settings, reads, read = _settings(tmp_path).model_copy(update={"damaged": "skip"}), [], datasets.read
    monkeypatch.setattr(datasets, "read", lambda item, task: reads.append(item.id) or read(item, task))
    found = [datasets.load("segmentation", "voc2012", "test", settings, 8) for _ in range(3)]
    assert sorted(reads) == sorted(found[0].ids) and found[1].ids == found[2].ids == found[0].ids
    found[0].items[2].image.write_bytes(b"")
    assert len(datasets.load("segmentation", "voc2012", "test", settings, 8)) == 2
    reads.clear()
    datasets.load("segmentation", "voc2012", "test", settings.model_copy(update={"damaged": "stop"}), 8)
    assert reads == []  # nothing is read where the first damaged image stops the run


def test_rendered_images_are_not_looked_through(toys, monkeypatch):
    monkeypatch.setattr(datasets, "read", lambda *_: pytest.fail("tensors are never damaged"))
    assert len(datasets.load("depth", "toys", "test", planted.settings(damaged="skip"), 16)) == 8


def test_a_set_without_a_readable_image_is_refused(tmp_path, root):
    trees.voc(tmp_path)
    for path in (tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages").iterdir():
        path.write_bytes(b"")
    settings = _settings(tmp_path).model_copy(update={"damaged": "skip"})
    with pytest.raises(BadInput, match=r"None of the 3 images of voc2012 \(test\) can be read; restore the data set"):
        datasets.load("segmentation", "voc2012", "test", settings, 8)


def test_scrambled_images_never_raise_anything_else(tmp_path):
    path = tmp_path / "image.png"
    trees.picture(path, (16, 16))
    whole, refused = path.read_bytes(), 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            datasets.read(Item("i", path, 0), "classification")
        except BadInput:
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("kind", [b"iCCP", b"tRNS", b"gAMA", b"PLTE", b"zTXt", b"eXIf", b"acTL"])
@pytest.mark.parametrize("content", [b"", b"\0", b"a\0\0\xff\xff"])
@pytest.mark.parametrize("role", ["image", "mask"])
def test_chunks_without_sense_never_raise_anything_else(tmp_path, kind, content, role):
    trees.picture(tmp_path / "good.png", (16, 16))
    trees.picture(tmp_path / "x.png", (16, 16), "L" if role == "mask" else "RGB")
    whole = (tmp_path / "x.png").read_bytes()
    end = whole.index(b"IEND") - 4
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    for place in (33, end):
        (tmp_path / "x.png").write_bytes(whole[:place] + chunk + whole[place:])
        parts = ("good.png", "x.png") if role == "mask" else ("x.png", "good.png")
        item = Item("i", tmp_path / parts[0], tmp_path / parts[1] if role == "mask" else 0)
        try:
            datasets.read(item, "segmentation" if role == "mask" else "classification")
        except datasets.Unreadable as problem:
            assert problem.file == tmp_path / "x.png"


@pytest.mark.parametrize("error", [IndexError("x"), EOFError(), RuntimeError("x"), AttributeError("x")])
def test_whatever_the_library_raises_is_a_damaged_image(tmp_path, root, monkeypatch, error):
    trees.voc(tmp_path)
    settings = _settings(tmp_path, size="original").model_copy(update={"damaged": "skip"})
    victim, rgb = datasets.load("segmentation", "voc2012", "test", settings, 8).items[0].image, pictures.rgb

    def broken(picture, place, shape=()):
        if place == victim:
            raise error
        return rgb(picture, place, shape)

    monkeypatch.setattr(reading, "rgb", broken)
    victim.touch()
    left = datasets.load("segmentation", "voc2012", "test", settings, 8)
    assert left.damaged == [str(victim)] and len(left) == 2


def test_files_that_may_not_be_read_are_said(tmp_path, monkeypatch):
    trees.voc(tmp_path)
    subset = _load("segmentation", "test", tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "VOCdevkit"))

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        with pytest.raises(BadInput, match=f"{subset.items[0].target} cannot be read .Permission denied.; replace"):
            subset[0]
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BadInput, match="VOCdevkit cannot be read .Permission denied.; make it readable for 'voc2012'"):
        _load("segmentation", "test", tmp_path)


def test_folders_that_may_not_be_read_are_not_passed_over(tmp_path, monkeypatch):
    trees.mask_folder(tmp_path)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("val"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadInput, match="street/images/val cannot be read .Permission denied.; make it readable"):
        datasets.list_items("street", "segmentation", "test", 0, str(tmp_path))


def test_folder_names_that_are_too_long_are_said():
    with pytest.raises(BadInput, match="^a{100,200}.. cannot be read .File name too long."):
        datasets.list_items("street", "segmentation", "test", 0, "a" * 5000)


def test_names_need_not_be_utf_8(tmp_path, root):
    for split in ("train", "test"):
        for label in (b"caf\xe9", b"th\xe9"):
            folder = tmp_path / os.fsdecode(b"drinks") / split / os.fsdecode(label)
            for i in range(6):
                trees.picture(folder / os.fsdecode(b"\xe9%d.png" % i), (8, 8))
    settings = planted.settings(data_root=str(tmp_path), classification={"datasets": ["drinks"]}, deacl=None,
                                segmentation=None, depth=None, damaged="skip")  # fmt: skip
    test = datasets.load("classification", "drinks", "test", settings, 8)
    assert len({datasets.image_seed(0, i) for i in test.ids}) == len(test) == 8
    assert test.classes == ("caf\ufffd", "th\ufffd") and test[0][0].shape == (3, 8, 8) and len(test.hash) == 16
    assert data.overview(settings)["images"].tolist() == [6, 6, 8]


# --- targets that cannot be meant ---


def _segmentation(root, name="street", **section):
    section = {"datasets": [name], "n_val": 2, "n_train": 6, "n_test": 4, **section}
    return planted.settings(data_root=str(root), segmentation=section, classification=None, depth=None, deacl=None)


def _depth(root, **section):
    section = {"datasets": ["sevenscenes"], "n_val": 2, "n_train": 6, "n_test": 4, **section}
    return planted.settings(data_root=str(root), depth=section, classification=None, segmentation=None, deacl=None)


def _refused_everywhere(settings, task, name, words):
    """In 00_data, by --check, and before a head is trained."""
    with pytest.raises(BadInput, match=words) as refusal:
        data.overview(settings)
    assert "\n" not in str(refusal.value)
    (wrong,), remarks = data.look(settings)
    assert re.search(words, wrong) and remarks == [] and wrong in plan.problems(settings)[0]
    with pytest.raises(BadInput, match=words):
        training.fitted(task, name, planted.encoder(), settings)
    assert not [*Path(records.runs_dir(settings.profile)).rglob("*.safetensors")]


def _masks(root, make, splits=("train", "val")):
    for split in splits:
        for i, path in enumerate(sorted((root / "street" / "masks" / split).iterdir())):
            trees.stored(path, np.asarray(make(i)))


def test_masks_of_0_and_255_are_refused(tmp_path, root):
    trees.mask_folder(tmp_path, classes=("background", "object"))
    half = np.zeros((20, 26), np.uint8)
    half[:, 13:] = 255
    _masks(tmp_path, lambda i: half)
    words = "masks of street that were read hold 0 and 255 only, .* has no class; store class 1, 'object', as 1"
    _refused_everywhere(_segmentation(tmp_path), "segmentation", "street", words)
    _masks(tmp_path, lambda i: half // 255)
    assert data.look(_segmentation(tmp_path)) == ([], [])
    _masks(tmp_path, lambda i: half > 0)  # 1 bit: black and white are 0 and 1
    assert data.look(_segmentation(tmp_path)) == ([], [])


def test_one_object_anywhere_makes_0_and_255_possible(tmp_path, root):
    trees.mask_folder(tmp_path, classes=("background", "object"))
    rare = np.zeros((20, 26), np.uint8)
    rare[0] = 255
    for i in range(8, 40):
        trees.picture(tmp_path / "street" / "images" / "train" / f"{i}.png")
        trees.stored(tmp_path / "street" / "masks" / "train" / f"{i}.png", rare)
    settings = _segmentation(tmp_path, n_train=38)
    _masks(tmp_path, lambda i: rare)
    assert "hold 0 and 255 only" in data.look(settings)[0][0]
    with_object = rare.copy()
    with_object[5, 5] = 1
    last = datasets.load("segmentation", "street", "train", settings, 8).items[-1].target
    trees.stored(last, with_object)
    assert data.look(settings) == ([], [])


def test_one_class_needs_no_second_one(tmp_path, root):
    trees.mask_folder(tmp_path, classes=("road",))
    assert data.look(_segmentation(tmp_path)) == ([], [])


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_without_a_labelled_pixel_are_refused(tmp_path, root, split):
    trees.mask_folder(tmp_path)
    _masks(tmp_path, lambda i: np.full((20, 26), 255, np.uint8), [split])
    part = {"val": "test"}.get(split, split)
    words = f"No pixel of the [46] masks of street .{part}. that were read has a class, all are 255, .*; store class"
    _refused_everywhere(_segmentation(tmp_path), "segmentation", "street", words)


def test_classes_that_occur_in_no_mask_are_remarked_on(tmp_path, root, capsys):
    trees.mask_folder(tmp_path, classes=("sky", "road", "car"))
    _masks(tmp_path, lambda i: np.full((20, 26), 2 * (i % 2), np.uint8))
    settings = _segmentation(tmp_path)
    (remark,) = data.look(settings)[1]
    assert remark == "No pixel of the 12 masks of street that were read is of class 1 (road)."
    assert remark in plan.problems(settings)[1] and plan.problems(settings)[0] == []
    data.overview(settings)
    assert remark in capsys.readouterr().out
    (tmp_path / "street" / "classes.txt").write_text("\n".join("abcdefgh"))
    (remark,) = data.look(settings)[1]
    assert remark.endswith("is of class 1 (b), 3 (d), 4 (e), and 3 more.")
    trees.voc(tmp_path)  # of official data sets the numbers are known, and a few images hold few classes
    assert data.look(_segmentation(tmp_path, "voc2012").model_copy(update={"counts": "any"})) == ([], [])


@pytest.mark.parametrize(
    ("pixels", "value"),
    [
        (np.full((20, 26), -1, np.int32), "-1"),
        (np.full((20, 26), 70_000, np.int32), "70000"),
        (np.full((20, 26), -1, np.float32), "-1"),
        (np.full((20, 26), np.nan, np.float32), "nan"),
        (np.full((20, 26), np.inf, np.float32), "inf"),
        (np.full((20, 26), 1.7, np.float32), "1.7"),
    ],
)
def test_masks_of_other_numbers_are_refused(tmp_path, pixels, value):
    trees.mask_folder(tmp_path)
    settings = _segmentation(tmp_path)
    path = datasets.load("segmentation", "street", "test", settings, 8).items[0].target
    Image.fromarray(pixels).save(path, "tiff")  # PNG holds none of them
    with pytest.raises(BadInput, match=f"mask {path} has the value {value}; store class numbers from 0 to 255"):
        data.overview(settings)


def test_masks_of_whole_floats_are_class_numbers(tmp_path):
    trees.mask_folder(tmp_path)
    subset = datasets.load("segmentation", "street", "test", _segmentation(tmp_path, size="original"), 8)
    Image.fromarray(np.full((20, 26), 2, np.float32)).save(subset.items[0].target, "tiff")
    assert (subset[0][1] == 2).all()


@pytest.mark.parametrize(
    ("scale", "median"),
    [(1, "2.5e.03"), (0.001, "2.5e.06"), (256, None), (100, "25"), (1e6, "0.0025"), (1000, None), (5000, None)],
)
def test_depths_in_other_units_are_refused(tmp_path, root, scale, median):
    trees.depth_folder(tmp_path, scale=scale)  # 2500, stored
    if median is None:
        assert data.look(_depth(tmp_path)) == ([], [])
        return
    words = f"depths of sevenscenes are in other units.* {median} m, .*; correct depth_scale in sevenscenes/meta.json"
    _refused_everywhere(_depth(tmp_path), "depth", "sevenscenes", words)


def test_8_bit_depths_of_millimetres_are_refused(tmp_path, root):
    trees.depth_folder(tmp_path)
    for path in (tmp_path / "sevenscenes" / "depth").rglob("*.png"):
        trees.stored(path, np.tile(np.arange(26, dtype=np.uint8) * 10, (20, 1)))
    _refused_everywhere(_depth(tmp_path), "depth", "sevenscenes", "is 0.13 m, .*; correct depth_scale")


@pytest.mark.parametrize("split", ["train", "val"])
def test_splits_without_a_valid_depth_are_refused(tmp_path, root, split):
    trees.depth_folder(tmp_path)
    for path in (tmp_path / "sevenscenes" / "depth" / split).iterdir():
        trees.stored(path, np.zeros((20, 26), np.uint16))
    part = {"val": "test"}.get(split, split)
    words = f"No pixel of the [46] depth maps of sevenscenes .{part}. that were read is valid, .*; correct depth_scale"
    _refused_everywhere(_depth(tmp_path), "depth", "sevenscenes", words)


def test_sparse_depths_are_remarked_on(tmp_path, root):
    trees.depth_folder(tmp_path)
    for path in (tmp_path / "sevenscenes" / "depth").rglob("*.png"):
        sparse = np.zeros((20, 26), np.uint16)
        sparse[3, 3] = 2500
        trees.stored(path, sparse)
    wrong, (remark,) = data.look(_depth(tmp_path))
    assert wrong == [] and remark.startswith("Hardly a pixel of the depth maps of sevenscenes is valid")


def test_damage_stops_the_look_unless_it_is_skipped(tmp_path, root):
    trees.mask_folder(tmp_path)
    settings = _segmentation(tmp_path)
    victim = datasets.load("segmentation", "street", "train", settings, 8).items[0].image
    victim.write_bytes(b"")
    (wrong,), _ = data.look(settings)
    assert f"{victim} cannot be read" in wrong
    assert data.look(settings.model_copy(update={"damaged": "skip"})) == ([], [])
    assert not (records.runs_dir(settings.profile)).exists()  # nothing is written by looking


def test_rendered_scenes_are_not_looked_at(root, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("they are as they should be"))
    assert data.remarks("depth", "scenes", planted.settings()) == []


def test_pictures_are_looked_at_before_anything_long(tmp_path, root):
    trees.image_folder(tmp_path, "deep", ("a", "b"))
    for path in (tmp_path / "deep").rglob("*.png"):
        trees.stored(path, np.full((8, 8), 4000, np.uint16))
    settings = planted.settings(data_root=str(tmp_path), classification={"datasets": ["deep"]}, segmentation=None,
                                depth=None, deacl=None)  # fmt: skip
    (wrong,), _ = data.look(settings)
    assert "has 16 bits a value of which it uses the lower ones only" in wrong


def test_the_hash_names_the_labels(tmp_path):
    trees.cifar(tmp_path)
    items = datasets.list_items("cifar10", "classification", "test", 0, str(tmp_path))
    first = Subset("cifar10", "classification", items, None)
    other = Subset("cifar10", "classification", [item._replace(target=9 - item.target) for item in items], None)
    assert other.ids == first.ids and other.hash != first.hash


def test_missing_depth_files_are_named(tmp_path):
    trees.depth_folder(tmp_path)
    (tmp_path / "sevenscenes" / "depth" / "val" / "2.png").unlink()
    with pytest.raises(BadInput, match=r"sevenscenes/depth/val lacks 2.png \(1 missing\)"):
        _load("depth", "test", tmp_path)
    (tmp_path / "sevenscenes" / "meta.json").unlink()
    with pytest.raises(BadInput, match="sevenscenes/meta.json must give the stored units per metre"):
        _load("depth", "train", tmp_path)[0]


def test_an_image_that_went_away_is_named(tmp_path):
    trees.voc(tmp_path)
    subset = _load("segmentation", "test", tmp_path)
    subset.items[0].image.unlink()
    for use in (lambda: subset[0], lambda: subset.hash):
        with pytest.raises(BadInput, match=f"{subset.items[0].image.name} cannot be read"):
            use()


def test_masks_that_are_no_class_numbers_are_named(tmp_path):
    trees.voc(tmp_path)
    subset = _load("segmentation", "test", tmp_path, size="original")
    path = subset.items[0].target
    trees.stored(path, np.full((20, 26), 21, np.uint8))
    with pytest.raises(BadInput, match=f"mask of {subset.ids[0]} has the value 21 but voc2012 has 21 classes; correct"):
        subset[0]
    trees.stored(path, np.full((20, 26, 3), 1, np.uint8))
    with pytest.raises(BadInput, match=f"{path} is a colour picture .mode RGB.; store one number a pixel"):
        subset[0]
    trees.stored(path, np.full((20, 26), 300, np.uint16))
    with pytest.raises(BadInput, match=f"mask {path} has the value 300; store class numbers from 0 to 255"):
        subset[0]
    trees.stored(path, np.full((20, 26), 2, np.uint16))
    assert (subset[0][1] == 2).all()  # 16 bits are no matter


def test_official_counts_are_demanded_unless_any_will_do(tmp_path):
    trees.voc(tmp_path)
    with pytest.raises(
        BadInput, match=r"'voc2012' \(test\) has 4 images in .* official one has 1,449; complete it \(make data"
    ):
        datasets.load("segmentation", "voc2012", "test", _settings(tmp_path, counts="official"), 8)
    found = [p for p in data.check(_settings(tmp_path, counts="official")) if "'voc2012'" in p]
    assert len(found) == 1 and "counts: any" in found[0]
    assert len(_load("segmentation", "test", tmp_path)) == 3


def test_files_with_an_official_checksum_are_compared(tmp_path, monkeypatch):
    trees.cifar(tmp_path)
    with pytest.raises(BadInput, match="data_batch_1 differs from the official file .* fetch it again"):
        data.verify("cifar10", str(tmp_path))
    content = (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()
    sums = {"cifar-10-batches-py/test_batch": hashlib.md5(content).hexdigest()}
    right = dataclasses.replace(datasets.DATASETS["cifar10"], md5=sums)
    monkeypatch.setitem(datasets.DATASETS, "cifar10", right)
    data.verify("cifar10", str(tmp_path))
    data.verify("folder_of_mine", str(tmp_path))


def test_check_names_data_sets_without_training_images(tmp_path):
    trees.voc(tmp_path)
    (problem,) = data.problems("segmentation", "voc2012", _settings(tmp_path, n_val=8))
    assert "n_val takes them all" in problem


def test_peek_gives_the_first_test_images(toys):
    images, targets = datasets.peek("depth", "toys", planted.settings(), 3, side=24)
    subset = datasets.load("depth", "toys", "test", planted.settings(), 24)
    assert images.shape == (3, 3, 24, 24) and torch.equal(targets[2], subset[2][1])


def test_eigen_crop_is_resized_with_the_image():
    item = Item("d", torch.zeros(3, 480, 640, dtype=torch.uint8), torch.ones(480, 640))
    image, depth = Subset("toys", "depth", [item], datasets.transform("depth", "test", 48, 8, "eigen"))[0]
    assert depth.shape == image.shape[1:] == (48, 64)
    assert depth[0].sum() == 0 and depth[24, 32] == 1 and depth.mean() < 1
