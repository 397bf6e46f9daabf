"""NYU-Depth-v2 in its two forms: tar archives of the hub, read where they lie, and the labelled .mat."""

import dataclasses

import numpy as np
import planted
import pytest
import torch
import trees

from ssl_robust import datasets, evaluate
from ssl_robust.catalogue import nyuv2
from ssl_robust.datasets import DATASETS, Subset
from ssl_robust.settings import BadInput
from ssl_robust.show import tables
from ssl_robust.trust import data


def _subset(root, split="train", counts="any"):
    items = datasets.list_items("nyuv2", "depth", split, 0, str(root), counts)
    return Subset("nyuv2", "depth", items, lambda image, target: (image, target), root=str(root))


@pytest.fixture
def official(monkeypatch):
    """Official numbers of these small files: 4 labelled and 5 of the hub to train on, 2 for the test."""
    small = dataclasses.replace(DATASETS["nyuv2"], counts={"train": (4, 5), "test": (2,)})
    monkeypatch.setitem(DATASETS, "nyuv2", small)


# --- the archives ---


@pytest.mark.parametrize("place", ["data", "."])
def test_archives_are_read_where_they_lie(tmp_path, place):
    trees.nyu_archives(tmp_path, place=place)
    before = sorted(tmp_path.rglob("*"))
    train, test = _subset(tmp_path), _subset(tmp_path, "test")
    assert train.ids == [f"nyuv2/train-{i // 3:06}/train/den_0001a/{i + 1:05}.h5" for i in range(5)]
    assert test.ids == [f"nyuv2/val-000000/val/official/{i + 1:05}.h5" for i in range(2)]
    for i in (3, 0, 4):
        image, depth = train[i]
        assert image.dtype == torch.uint8 and image.shape == (3, 12, 16)
        assert (image[0] == i).all()
        assert image[1, :, 3].tolist() == list(range(12)) and image[2, 3].tolist() == list(range(16))
        assert depth.dtype == torch.float32 and depth.shape == (12, 16)
        assert float(depth[7, 5]) == pytest.approx(1 + i + 0.07 + 0.0005)
    assert float(test[1][1][0, 0]) == pytest.approx(2)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", 3000])
def test_what_is_no_archive_is_refused_by_name(tmp_path, content):
    trees.nyu_archives(tmp_path)
    file = tmp_path / "nyuv2" / "data" / "train-000000.tar"
    file.write_bytes(file.read_bytes()[:content] if content == 3000 else content)  # within the second pair
    with pytest.raises(BadInput, match=f"^The file {file} cannot be read .damaged or half a download.; fetch it again"):
        _subset(tmp_path)


@pytest.mark.parametrize("arrays", [{}, {"rgb": np.zeros((3, 12, 16), np.uint8)}])
def test_a_damaged_pair_names_its_archive_and_can_be_left_out(root, arrays):
    trees.nyu_archives(root, train=(3, 2))
    file = root / "nyuv2" / "data" / "train-000001.tar"
    offset, size = nyuv2._tar_index(file)["train/den_0001a/00005.h5"]
    content, pair = file.read_bytes(), trees.hdf5(**arrays)[:size] if arrays else b"?" * size
    file.write_bytes(content[:offset] + pair.ljust(size, b"\0") + content[offset + size :])
    with pytest.raises(BadInput, match=f"{file} cannot be read .*; replace or remove it, or set damaged: skip"):
        _subset(root)[4]
    used = planted.settings(
        data_root=str(root), counts="any", damaged="skip", depth={"datasets": ["nyuv2"], "n_train": 9, "n_val": 2}
    )
    train, val = (datasets.load("depth", "nyuv2", split, used, 16) for split in ("train", "val"))
    assert len(train) + len(val) == 4 and [*train.damaged, *val.damaged] == [str(file)]


# --- which form is used ---


def test_the_large_training_set_is_taken_where_it_is_whole(tmp_path, official):
    trees.nyuv2(tmp_path)
    assert len(_subset(tmp_path, counts="official")) == 4
    trees.nyu_archives(tmp_path)
    train, test = (_subset(tmp_path, split, "official") for split in ("train", "test"))
    assert len(train) == 5 and "train-000000" in train.ids[0]
    assert len(test) == 2 and "val-000000" in test.ids[0]
    for file in (tmp_path / "nyuv2" / "data").glob("val-*"):
        file.unlink()
    assert _subset(tmp_path, "test", "official").ids == ["nyuv2/0", "nyuv2/1"]  # the same images of the .mat file
    (tmp_path / "nyuv2" / "data" / "train-000001.tar").unlink()
    assert _subset(tmp_path, counts="official").ids == [f"nyuv2/{i}" for i in (2, 3, 4, 5)]


def test_a_part_of_the_archives_is_refused_unless_any_will_do(tmp_path, official):
    trees.nyu_archives(tmp_path, train=(2,))
    assert len(_subset(tmp_path)) == 2
    with pytest.raises(BadInput, match="has 2 images .* official one has 4 or 5; complete it .make data.*counts: any"):
        _subset(tmp_path, counts="official")


# --- what is fetched ---


def test_archives_of_the_hub():
    data = DATASETS["nyuv2"]
    names = [f"train-{i:06}.tar" for i in range(12)] + ["val-000000.tar", "val-000001.tar"]
    assert [a.name for a in data.larger] == names and all(a.as_it_is for a in data.larger)
    assert all(a.place == f"nyuv2/data/{a.name}" for a in data.larger)
    assert sum(a.size for a in data.larger) == pytest.approx(35_151_124_480, rel=1e-5)  # as its data card says
    sums = [a.checksum for a in data.larger if a.checksum]
    assert len({*sums}) == 13 and all(len(s) == len("sha256:") + 64 for s in sums)


@pytest.mark.parametrize(("n_train", "larger"), [(600, False), (795, False), (796, True), (47_584, True)])
def test_the_larger_archives_are_for_those_who_ask_for_more(n_train, larger):
    data = DATASETS["nyuv2"]
    assert data.fetched(n_train) is (data.larger if larger else data.archives)
    assert DATASETS["cifar10"].fetched(n_train) is DATASETS["cifar10"].archives


# --- fewer training images than asked for ---


def _settings(root, n_train, **depth):
    size = {"datasets": ["nyuv2"], "n_val": 1, "n_test": 2, "size": 16, "epochs": 1, "batch": 2}
    return planted.settings(
        data_root=str(root), counts="official", classification=None, segmentation=None, deacl=None,
        encoders=[{"name": "planted", "timm": "embedded_vit"}], depth={**size, "n_train": n_train, **depth},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n_train", "n_asked", "short"), [(3, 3, False), (4, 4, False), (5, 5, True), (47_584, 5, True)]
)
def test_record_and_notes_say_on_how_many_of_the_images_the_head_was_trained(root, official, n_train, n_asked, short):
    trees.nyuv2(root)
    used = _settings(root, n_train)
    model, test = evaluate.prepared("depth", "nyuv2", planted.encoder(), used, "standard")
    record = evaluate.Cell(model, test, "clean", used).run()
    assert (record["n_train"], record["n_train_asked"]) == (3, n_asked)  # one is held out
    said = tables.table_files(3, [record])["md"]
    words = "Fewer training images were there than asked for: the head on nyuv2 was trained on 3 of 5 images."
    assert said.count("was trained on") == said.count(words) == short
    head = "The depth head on nyuv2 is trained on 3 of 5 images, as no more are there; make data fetches them (35.2 GB)"
    assert data.shortages(used) == ([f"{head}, or lower depth.n_train."] if short else [])


def test_a_folder_of_ones_own_with_fewer_images_is_said_too(tmp_path):
    trees.rooms(tmp_path)
    few, more = (_settings(tmp_path, n, datasets=["rooms"]) for n in (8, 1000))
    assert data.shortages(few) == []  # all 8 are there, of which one is held out
    said = "The depth head on rooms is trained on 7 of 1,000 images, as no more are there; add images, or lower"
    assert data.shortages(more) == [f"{said} depth.n_train."]


def test_official_sets_that_are_smaller_than_n_train_are_whole(tmp_path):
    trees.voc(tmp_path)
    cut = {"datasets": ["voc2012"], "n_train": 20_210, "n_val": 1}
    used = planted.settings(
        data_root=str(tmp_path), counts="any", classification=None, depth=None, deacl=None, segmentation=cut
    )
    assert datasets.asked("segmentation", "voc2012", used) == 1464  # all there are, whatever other sets have
    (said,) = data.shortages(used)
    assert said.startswith("The segmentation head on voc2012 is trained on 7 of 1,464 images, as no more are there")
