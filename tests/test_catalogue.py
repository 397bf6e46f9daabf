"""Each data set in its official layout: what is listed, read and refused; on the real files too, where they are."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
import trees
from PIL import Image
from torchvision.datasets.voc import DATASET_YEAR_DICT

from ssl_robust import datasets
from ssl_robust.catalogue import nyuv2
from ssl_robust.datasets import DATASETS, Subset
from ssl_robust.items import IGNORE
from ssl_robust.settings import BadInput
from ssl_robust.trust import data

DATA = Path(__file__).parents[2] / "shared" / "data"


def _subset(root, name, task, split="test", counts="any"):
    items = datasets.list_items(name, task, split, 0, str(root), counts)
    return Subset(name, task, items, lambda image, target: (image, target), root=str(root))


def _refused(root, name, task, words, split="test"):
    with pytest.raises(BadInput, match=words) as refusal:
        _subset(root, name, task, split)
    assert "\n" not in str(refusal.value)


# --- every entry ---


@pytest.mark.parametrize("name", [n for n in DATASETS if n != "scenes"])
def test_entries_say_how_they_are_obtained(name):
    data = DATASETS[name]
    assert data.layout and data.counts["train"] and data.gigabytes > 0 and "deacl" in data.tasks
    assert bool(data.archives) != bool(data.by_hand)
    assert all(a.url.startswith("http") and a.size > 1000 and ":" in a.checksum for a in data.archives)
    assert all("test" in data.counts for task in data.tasks if task != "deacl")
    for task in data.tasks:
        with pytest.raises(BadInput, match=f"'{name}' .train. was not found in the data folder"):
            datasets.list_items(name, task, "train", 0, "nowhere")


def test_addresses_and_checksums_are_torchvisions():
    (ours,), theirs = DATASETS["voc2012"].archives, DATASET_YEAR_DICT["2012"]
    assert (ours.checksum, ours.place) == (f"md5:{theirs['md5']}", theirs["base_dir"])
    assert len(DATASETS["stl10"].md5) == 4  # without the unlabelled images, which nothing reads


# --- classification ---


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_batches(tmp_path, name):
    trees.cifar(tmp_path, name)
    train, test = (_subset(tmp_path, name, "classification", split) for split in ("train", "test"))
    assert len(train) == (20 if name == "cifar10" else 4) and len(test) == 4 and len(set(train.ids)) == len(train)
    image, label = test[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label == 9
    assert (image[0] == 3).all() and image[1, :, 5].tolist() == list(range(32)) and not image[2].any()
    image.zero_()  # what is done to an image leaves the file's content as it was
    assert (test[3][0][0] == 3).all()
    assert test.classes[9] == {"cifar10": "truck", "cifar100": "class9"}[name]
    assert _subset(tmp_path, name, "deacl", "train")[1][0].shape == (3, 32, 32)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", ["junk", "list", "bomb", "half"])
def test_cifar_files_are_never_executed(tmp_path, monkeypatch, content):
    trees.cifar(tmp_path)
    monkeypatch.chdir(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "test_batch"
    half = batch.read_bytes()[:5000]
    kinds = {"junk": b"junk", "list": pickle.dumps([1]), "bomb": pickle.dumps(_Bomb()), "half": half}
    batch.write_bytes(kinds[content])
    _refused(tmp_path, "cifar10", "classification", f"file {batch} cannot be read .*fetch it again")
    assert not (tmp_path / "exploded").exists()


def test_cifar_as_image_folder_unless_the_batches_are_there(tmp_path):
    trees.image_folder(tmp_path, "cifar10")
    assert _subset(tmp_path, "cifar10", "classification").ids[0] == "cifar10/test/airplane/0.png"
    trees.image_folder(tmp_path, "cifar100", ("bear", "apple"))
    subset = _subset(tmp_path, "cifar100", "classification")
    assert subset.classes == ("apple", "bear") and [t for _, t in subset] == [0] * 3 + [1] * 3
    for split in ("train", "test"):
        (tmp_path / "cifar10" / split / "zebra").mkdir()
    _refused(tmp_path, "cifar10", "classification", "cifar10 must have the class folders airplane, .*; correct them")
    trees.cifar(tmp_path)
    assert _subset(tmp_path, "cifar10", "classification").ids[0] == "cifar-10-batches-py/test_batch/0"


def test_stl10_binaries(tmp_path):
    trees.stl10(tmp_path)
    subset = _subset(tmp_path, "stl10", "classification")
    image, label = subset[4]
    assert image.shape == (3, 96, 96) and label == 4 and subset.classes[label] == "deer"
    assert (image[0] == 4).all() and image[1, :, 7].tolist() == image[2, 7].tolist() == list(range(96))


@pytest.mark.parametrize("zipped", [False, True])
def test_tiny_imagenet_unpacked_or_zipped(tmp_path, zipped):
    trees.tiny_imagenet(tmp_path, zipped)
    train, test = (_subset(tmp_path, "tiny_imagenet", "classification", split) for split in ("train", "test"))
    assert train.classes == ("goldfish", "bullfrog", "n03")  # sorted by wnid; one without words
    assert [label for _, label in train] == [0] * 4 + [1] * 4 + [2] * 4 and "train/n02/images/n02_0" in train.ids[4]
    assert [label for _, label in test] == [2, 0, 1, 2, 0] and test[0][0].shape == (3, 16, 16)
    assert len({train.hash, test.hash}) == 2 and len(_subset(tmp_path, "tiny_imagenet", "deacl", "train")) == 12


def test_zipped_images_are_read_in_workers_too(tmp_path):
    trees.tiny_imagenet(tmp_path, zipped=True)
    subset = _subset(tmp_path, "tiny_imagenet", "classification", "train")
    here = [image for image, _ in subset]  # opens the archive in this process before the workers are forked
    loader = torch.utils.data.DataLoader(subset, 2, num_workers=2)
    assert torch.equal(torch.cat([images for images, _ in loader]), torch.stack(here))


# --- segmentation ---


def test_voc_lists_decide(tmp_path):
    trees.voc(tmp_path)
    assert len(_subset(tmp_path, "voc2012", "segmentation", "train")) == 8


def test_ade20k_labels_shift_by_one(tmp_path):
    trees.ade20k(tmp_path)
    subset = _subset(tmp_path, "ade20k", "segmentation")
    mask = subset[0][1]
    assert len(subset) == 3 and mask.dtype == torch.uint8
    assert mask[1].tolist() == [IGNORE, *range(25)] and mask[0, 0] == 149
    assert len(subset.classes) == 150 and subset.classes[0] == "thing 1" and subset.classes[149] == "thing 150"
    assert len(_subset(tmp_path, "ade20k", "segmentation", "train")) == 6
    info = tmp_path / "ADEChallengeData2016" / "objectInfo150.txt"
    whole = info.read_text()
    info.write_text(whole.replace("\t", "   "))
    assert datasets.class_names("ade20k", "segmentation", str(tmp_path)) == subset.classes


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    trees.cityscapes(tmp_path)
    subset = _subset(tmp_path, "cityscapes", "segmentation")
    assert len(subset) == 2 and len(subset.classes) == 19 and subset.ids[0] == "ulm_000000_000019"
    train_ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected = [train_ids.index(i) if i in train_ids else IGNORE for i in range(34)]
    assert subset[0][1][0].tolist() == expected and subset.classes[expected[26]] == "car"


# --- depth ---


def test_nyu_mat_file_with_the_official_split(tmp_path):
    trees.nyuv2(tmp_path)
    train, test = (_subset(tmp_path, "nyuv2", "depth", split) for split in ("train", "test"))
    assert train.ids == [f"nyuv2/{i}" for i in (2, 3, 4, 5)] and test.ids == ["nyuv2/0", "nyuv2/1"]  # counted from 0
    image, depth = test[1]
    assert image.shape == (3, 12, 16) and depth.shape == (12, 16) and depth.dtype == torch.float32
    assert (
        (image[0] == 1).all() and image[1, :, 3].tolist() == list(range(12)) and image[2, 3].tolist() == list(range(16))
    )
    assert depth[3, 5] == pytest.approx(1.0305) and test.classes == ()
    loader = torch.utils.data.DataLoader(train, 2, num_workers=1)
    assert torch.equal(next(iter(loader))[1][0], train[0][1])


# --- DeACL ---


@pytest.mark.parametrize(
    ("name", "home"), [("imagenet", "imagenet"), ("imagenette", "imagenette2-320"), ("imagenette", "imagenette2")]
)
def test_wnid_folders(tmp_path, name, home):
    trees.wnids(tmp_path, home)
    (tmp_path / home / "train" / "n01" / "._hidden.JPEG").write_bytes(b"")
    subset = _subset(tmp_path, name, "deacl", "train")
    assert len(subset) == 12 and subset.ids[0] == "n01/n01_0.JPEG" and subset[0][0].shape == (3, 20, 26)
    with pytest.raises(BadInput, match="has 12 images .* complete it .make data.*counts: any"):
        _subset(tmp_path, name, "deacl", "train", "official")


# --- what is missing or damaged ---

TINY, CITY = "tiny-imagenet-200", "cityscapes/gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png"
VAL = "val/val_annotations.txt"
ADE, VOC = "ADEChallengeData2016", "VOCdevkit/VOC2012"
HURT = [  # a file that is removed (None), cut or overwritten, and what is said
    ("cifar10", trees.cifar, "cifar-10-batches-py/test_batch", None, "'cifar10' .test. was not found"),
    ("cifar100", trees.cifar100, "cifar-100-python/meta", None, "'cifar100' .class names. was not found"),
    ("stl10", trees.stl10, "stl10_binary/test_X.bin", None, "'stl10' .test. was not found"),
    ("stl10", trees.stl10, "stl10_binary/test_X.bin", -1, "file .*/test_X.bin cannot be read"),
    ("tiny_imagenet", trees.tiny_imagenet, f"{TINY}/val/images/val_3.JPEG", None, r"lacks .*val_3.JPEG \(1 missing\)"),
    ("tiny_imagenet", trees.tiny_imagenet, f"{TINY}/wnids.txt", None, "lacks wnids.txt; restore it"),
    ("tiny_imagenet", trees.tiny_imagenet, f"{TINY}/wnids.txt", 8, "differs from wnids.txt in the class n02"),
    ("tiny_imagenet", trees.tiny_zipped, f"{TINY}/{TINY}.zip", -9, f"file .*/{TINY}.zip cannot be read"),
    ("voc2012", trees.voc, f"{VOC}/JPEGImages/2007_val0.jpg", None, r"JPEGImages lacks 2007_val0.jpg \(1 missing\)"),
    ("voc2012", trees.voc, f"{VOC}/SegmentationClass/2007_val1.png", None, r"lacks .*; restore what val.txt names"),
    ("ade20k", trees.ade20k, f"{ADE}/annotations/validation/ADE_validation_1.png", None, "lacks ADE_validation_1.png"),
    ("ade20k", trees.ade20k, f"{ADE}/images/validation/ADE_validation_1.jpg", None, "no image for .*validation_1.png"),
    ("ade20k", trees.ade20k, f"{ADE}/objectInfo150.txt", None, "'ade20k' .class names. was not found"),
    ("ade20k", trees.ade20k, f"{ADE}/objectInfo150.txt", 500, "objectInfo150.txt cannot be read"),
    ("cityscapes", trees.cityscapes, CITY, None, "lacks ulm_000001_.*_labelIds.png .*restore the labels"),
    ("nyuv2", trees.nyuv2, "nyuv2/splits.mat", None, "'nyuv2' .test. was not found .* and nyuv2/splits.mat"),
    ("nyuv2", trees.nyuv2, "nyuv2/splits.mat", 20, "file .*/splits.mat cannot be read .damaged or half a download"),
    (
        "street",
        trees.mask_folder,
        "street/images/val/2.png",
        None,
        "val has no image for .*/2.png .1 missing.; restore",
    ),
    (
        "street",
        trees.mask_folder,
        "street/masks/val/1.png",
        None,
        r"masks/val lacks 1.png \(1 missing\); restore it or",
    ),
    ("street", trees.mask_folder, "street/classes.txt", None, "street/classes.txt lists 0 classes; list 1 to 255"),
]


@pytest.mark.parametrize(("name", "make", "file", "size", "words"), HURT)
def test_what_is_missing_or_damaged_is_said(tmp_path, name, make, file, size, words):
    make(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if size:
        (tmp_path / file).write_bytes(content[:size])
    task = DATASETS[name].tasks[0] if name in DATASETS else "segmentation"
    _refused(tmp_path, name, task, words)


# --- folders of the user's own ---


@pytest.mark.parametrize("held", ["test", "val"])
def test_own_image_folder(tmp_path, held):
    trees.image_folder(tmp_path, "pets", ("dog", "cat"), held)
    subset = _subset(tmp_path, "pets", "classification", counts="official")  # of which there is none
    assert subset.classes == ("cat", "dog") and [label for _, label in subset] == [0] * 3 + [1] * 3
    assert all(f"pets/{held}/" in i for i in subset.ids) and len(_subset(tmp_path, "pets", "deacl", "train")) == 12
    for suffix in ("jpg", "PNG", "JPG"):
        trees.picture(tmp_path / "pets" / held / "cat" / f"0.{suffix}", (8, 8))
    assert len(set(_subset(tmp_path, "pets", "classification").ids)) == 9
    shutil.rmtree(tmp_path / "pets" / held / "cat")
    _refused(tmp_path, "pets", "classification", "The parts of .*pets differ in class folders: cat", "train")
    for name in "abcd":
        trees.picture(tmp_path / "pets" / held / name / "0.png", (8, 8))
    _refused(tmp_path, "pets", "classification", "differ in class folders: a, b, c, and 2 more; give them the same")
    shutil.rmtree(tmp_path / "pets" / held)
    _refused(tmp_path, "pets", "classification", "no data set 'pets' .test. .* pets/{train,test}/CLASS")


def test_own_mask_folder(tmp_path):
    trees.mask_folder(tmp_path)
    subset = _subset(tmp_path, "street", "segmentation")
    assert subset.classes == ("sky", "road", "car") and subset.ids[1] == "street/val/1"
    assert (
        set(subset[1][1].unique().tolist()) == {1, IGNORE} and len(_subset(tmp_path, "street", "deacl", "train")) == 8
    )


# --- identifiers ---


def _scenes_of_folders(root, targets, classes=("a", "b")):
    """Images of the same names in folders of their own, image i of scene s with the target 2 * s + i everywhere."""
    for split in ("train", "val"):
        for scene in range(3):
            for i in range(2):
                where = f"{split}/seq-{scene}/frame-{i:06}.png"
                trees.picture(root / "rooms" / "images" / where)
                trees.stored(root / "rooms" / targets / where, np.full((20, 26), 2 * scene + i, np.uint16))
    (root / "rooms" / "classes.txt").write_text("\n".join("abcdef"))
    (root / "rooms" / "meta.json").write_text('{"depth_scale": 1}')


@pytest.mark.parametrize(("task", "targets"), [("segmentation", "masks"), ("depth", "depth")])
def test_images_of_one_name_in_several_folders_are_several(tmp_path, task, targets):
    _scenes_of_folders(tmp_path, targets)
    subset = _subset(tmp_path, "rooms", task)
    assert subset.ids == [f"rooms/val/seq-{s}/frame-{i:06}" for s in range(3) for i in range(2)]
    assert [int(subset[k][1][0, 0]) for k in range(6)] == list(range(6))


def test_images_of_one_identifier_are_refused(tmp_path):
    trees.voc(tmp_path)
    listed = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
    listed.write_text(listed.read_text() + "\n2007_val2\n")
    _refused(tmp_path, "voc2012", "segmentation", "'voc2012' .test. has 2 images '2007_val2'; list or name each")
    trees.mask_folder(tmp_path)
    trees.picture(tmp_path / "street" / "images" / "val" / "1.jpg")  # which would share the mask of 1.png
    _refused(tmp_path, "street", "segmentation", "has 2 images 'street/val/1'; list or name each of them once")


# --- what official files cannot hold ---


@pytest.mark.parametrize(
    ("make", "name", "value", "last"),
    [
        (trees.ade20k, "ade20k", 255, 150), (trees.ade20k, "ade20k", 151, 150),  # 255: 'other' where classes start at 0
        (trees.cityscapes, "cityscapes", 255, 33), (trees.cityscapes, "cityscapes", 34, 33),
    ],
)  # fmt: skip
def test_masks_that_were_converted_are_refused(tmp_path, make, name, value, last):
    make(tmp_path)
    subset = _subset(tmp_path, name, "segmentation")
    file = subset.items[0].target.file
    official = np.array(Image.open(file))
    trees.stored(file, np.where(official == 0, value, official).astype(np.uint8))
    with pytest.raises(BadInput, match=f"{file} has the value {value} but official masks end at {last}; restore"):
        subset[0]
    trees.stored(file, official.astype(np.uint16))  # of more bits, and official
    assert subset[0][1].max() == IGNORE


def test_the_full_ade20k_is_said_to_be_in_colour(tmp_path, root):
    trees.ade20k(tmp_path)
    for file in (tmp_path / "ADEChallengeData2016" / "annotations").rglob("*.png"):
        trees.stored(file, np.zeros((20, 26, 3), np.uint8))
    settings = planted.settings(data_root=str(tmp_path), counts="any", damaged="skip", deacl=None, depth=None,
                                classification=None, segmentation={"datasets": ["ade20k"], "n_val": 1})  # fmt: skip
    with pytest.raises(BadInput, match="is a colour picture .mode RGB.; store one number a pixel"):
        datasets.load("segmentation", "ade20k", "test", settings, 8)  # where damage is looked for, which it is not
    with pytest.raises(BadInput, match="is a colour picture .mode RGB.; store one number a pixel"):
        data.overview(settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({"labels": np.array([0, 1, 2, y])}, f"has the label {y} but labels are 0 to 9; get the") for y in (10, 1.5)),
        ({"data": np.zeros((4, 3072))}, "is float64 .32, 32, 3.; get the file whose images are uint8"),
    ],
)
def test_cifar_files_of_other_numbers_are_refused(tmp_path, change, words):
    trees.cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes()) | change, protocol=2))
    with pytest.raises(BadInput, match=f"{file} {words}"):
        _subset(tmp_path, "cifar10", "classification")[0]


@pytest.mark.parametrize("label", [0, 11])
def test_stl10_labels_count_from_1_to_10(tmp_path, label):
    trees.stl10(tmp_path)
    file = tmp_path / "stl10_binary" / "test_y.bin"
    np.array([1, 2, 3, 4, label], np.uint8).tofile(file)
    _refused(tmp_path, "stl10", "classification", f"{file} has the label {label - 1} but labels are 0 to 9; get")


def test_nyu_depths_beyond_its_range_are_refused(tmp_path):
    import h5py

    trees.nyuv2(tmp_path)
    mat = tmp_path / "nyuv2" / "nyu_depth_v2_labeled.mat"
    with h5py.File(mat, "r+") as file:
        file["depths"][...] = file["depths"][...] * 1000  # millimetres
    with pytest.raises(BadInput, match=f"{mat} holds depths of 1112 but official ones end at 10 m; store metres"):
        _subset(tmp_path, "nyuv2", "depth")[1]


# --- archives and text files ---


def test_an_image_that_is_damaged_in_its_archive_is_named(tmp_path):
    trees.tiny_zipped(tmp_path)
    subset = _subset(tmp_path, "tiny_imagenet", "classification")
    file = tmp_path / TINY / f"{TINY}.zip"
    content, name = file.read_bytes(), subset.items[0].image.key
    start = content.index(name.encode()) + len(name)
    file.write_bytes(content[:start] + bytes(100) + content[start + 100 :])
    with pytest.raises(BadInput, match=f"image file {name} in {file} cannot be read .damaged or empty.; replace"):
        subset[0]


@pytest.mark.parametrize(("encoding", "lines"), [("utf-8-sig", "\n"), ("utf-8", "\r\n")])
@pytest.mark.parametrize(
    ("name", "make", "files"),
    [
        ("street", trees.mask_folder, ["street/classes.txt"]), ("rooms", trees.rooms, ["rooms/meta.json"]),
        ("voc2012", trees.voc, [f"{VOC}/ImageSets/Segmentation/val.txt"]),
        ("ade20k", trees.ade20k, [f"{ADE}/objectInfo150.txt"]),
        ("tiny_imagenet", trees.tiny_imagenet, [f"{TINY}/{f}" for f in ("wnids.txt", "words.txt", VAL)]),
    ],
)  # fmt: skip
def test_text_files_as_other_systems_write_them_are_read(tmp_path, name, make, files, encoding, lines):
    make(tmp_path)
    task = {"street": "segmentation", "rooms": "depth"}.get(name) or DATASETS[name].tasks[0]
    before = _subset(tmp_path, name, task)
    for file in files:
        (tmp_path / file).write_bytes((tmp_path / file).read_text().replace("\n", lines).encode(encoding))
    after = _subset(tmp_path, name, task)
    assert (after.classes, after.items) == (before.classes, before.items)


@pytest.mark.parametrize(
    "content", ["h\u00e4user\n".encode("latin-1"), "road\n".encode("utf-16-le"), "\u00e4".encode("utf-16")]
)
def test_text_of_an_encoding_that_is_not_said_is_refused(tmp_path, content):
    trees.mask_folder(tmp_path)
    (tmp_path / "street" / "classes.txt").write_bytes(content)
    with pytest.raises(BadInput, match=f"{tmp_path}/street/classes.txt is not text in UTF-8; save it in that encoding"):
        datasets.class_names("street", "segmentation", str(tmp_path))


@pytest.mark.parametrize("count", [0, 256])
def test_as_many_classes_as_a_mask_can_hold(tmp_path, count):
    trees.mask_folder(tmp_path)
    (tmp_path / "street" / "classes.txt").write_text("\n".join(f"class {i}" for i in range(count)))
    with pytest.raises(BadInput, match=f"street/classes.txt lists {count} classes; list 1 to 255, one a line"):
        datasets.class_names("street", "segmentation", str(tmp_path))


@pytest.mark.parametrize(
    "content", ["{", "[" * 100_000, "[1000]", *(f'{{"depth_scale": {v}}}' for v in ("true", '"1"', 0, -1, "Infinity"))]
)
def test_a_meta_json_without_a_scale_is_to_be_corrected(tmp_path, content):
    trees.depth_folder(tmp_path)
    (tmp_path / "sevenscenes" / "meta.json").write_text(content)
    _refused(tmp_path, "sevenscenes", "depth", "sevenscenes/meta.json must give the stored units per metre; for mm wr")


def test_palettes_are_no_depth(tmp_path):
    trees.depth_folder(tmp_path)
    subset = _subset(tmp_path, "sevenscenes", "depth")
    file = subset.items[0].target.file
    Image.fromarray(np.zeros((20, 26), np.uint8)).convert("P").save(file)
    with pytest.raises(BadInput, match=f"{file} is a colour picture .mode P.; store one number a pixel"):
        subset[0]


def test_deacl_takes_any_folder_of_images(tmp_path):
    trees.flat_folder(tmp_path, "flat")
    trees.picture(tmp_path / "flat" / "more" / "x.PNG")
    subset = _subset(tmp_path, "flat", "deacl", "train")
    assert len(subset) == 17 and subset.ids[-1] == "more/x.PNG" and "n0.jpg" in subset.ids
    assert subset[3][1] == 0


# --- the real files beside the project ---


def _real(*places):
    if not all((DATA / place).exists() for place in places):
        pytest.skip(f"{places[0]} is not in {DATA.parent.name}/data beside the project")
    return str(DATA)


@pytest.mark.parametrize(
    ("name", "task", "place", "train", "test", "classes"),
    [
        ("cifar10", "classification", "cifar10", 4000, 600, 10),
        ("cifar100", "classification", "cifar100", 900, 600, 100),
        ("voc2012", "segmentation", "VOCdevkit", 300, 120, 21),
        ("camvid", "segmentation", "camvid", 0, 0, 11),
        ("sevenscenes", "depth", "sevenscenes", 150, 67, 0),
        ("tiny_imagenet", "classification", "tiny-imagenet-200", 45_000, 3_000, 200),
        ("imagenet_samples", "deacl", "imagenet_samples", 1000, None, 0),
    ],
)
def test_real_data_sets(name, task, place, train, test, classes):
    root = _real(place)
    for split, count in (("train", train), ("test", test)):
        if count is None:
            continue
        subset = _subset(root, name, task, split)
        assert len(subset) == count or count == 0
        assert len(subset.classes) == classes and len(set(subset.ids)) == len(subset)
        image, target = subset.read(len(subset) // 2)
        assert image.dtype == torch.uint8 and image.float().std() > 5
        if task == "depth":
            assert 0.3 < float(target[target > 0].median()) < 5
        elif task == "classification":
            assert len({item.target for item in subset.items}) == classes


def test_real_tiny_imagenet_labels(tmp_path):
    subset = _subset(_real("tiny-imagenet-200"), "tiny_imagenet", "classification")
    (archive,) = (DATA / "tiny-imagenet-200").glob("val*.zip")
    text = zipfile.ZipFile(archive).read("tiny-imagenet-200/val/val_annotations.txt").decode()
    wnid = {row.split("\t")[0]: row.split("\t")[1] for row in text.splitlines()}
    order = sorted((DATA / "tiny-imagenet-200" / "wnids.txt").read_text().split())
    assert all(order[item.target] == wnid[Path(item.id).name] for item in subset.items[::50])


def test_real_ade20k_pairs():
    subset = _subset(_real("ADEChallengeData2016"), "ade20k", "segmentation")
    assert len(subset) == 3 and subset.classes[0] == "wall" and subset.classes[2] == "sky"
    for i in range(3):
        image, mask = subset.read(i)
        raw = np.array(Image.open(subset.items[i].target.file))
        assert image.shape[1:] == mask.shape and ((mask == IGNORE).numpy() == (raw == 0)).all()
        assert (mask.numpy()[raw > 0] == raw[raw > 0] - 1).all()


def test_real_nyu_split(tmp_path):
    shutil.copy(Path(_real("nyuv2/splits.mat")) / "nyuv2" / "splits.mat", tmp_path)
    (tmp_path / "nyu_depth_v2_labeled.mat").touch()
    train, test = ([i.target.key for i in nyuv2._nyu_labelled(tmp_path, split)] for split in ("train", "test"))
    assert (len(train), len(test)) == (DATASETS["nyuv2"].counts["train"][0], 654)
    assert sorted(train + test) == list(range(1449)) and test[:3] == [0, 1, 8]
