"""Fetching from a server in this process: resuming, checksums, unpacking, and what is said where it cannot be done."""

import dataclasses
import hashlib
import re
import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import planted
import pytest
import timm
import trees

from ssl_robust import datasets
from ssl_robust.items import Archive
from ssl_robust.ops import fetch
from ssl_robust.settings import BadInput, check
from ssl_robust.trust import data


@pytest.fixture
def server(monkeypatch):
    """Files by name; asked: their names. limit: bytes after which the connection is dropped."""
    told = SimpleNamespace(files={}, asked=[], limit=None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[-1]
            told.asked.append(name)
            if self.path.startswith("/moved/"):  # as the hub sends on to where large files lie
                self.send_response(302)
                self.send_header("Location", f"/{name}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if name not in told.files:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(told.files[name])))
            self.end_headers()
            self.wfile.write(told.files[name][: told.limit])

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    told.url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(fetch, "CHUNK", 1000)
    yield told
    httpd.shutdown()
    httpd.server_close()
    thread.join()


CONTENT = bytes(range(256)) * 40  # 10,240 bytes
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


# --- one file ---


def test_a_file_is_downloaded_whole_wherever_the_server_sends_it(server, tmp_path):
    server.files["a.bin"] = CONTENT
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.bin.part").write_bytes(b"left by a killed process" * 1000)
    fetch.download(f"{server.url}/moved/a.bin", tmp_path / "deep" / "a.bin", MD5)
    assert (tmp_path / "deep" / "a.bin").read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.bin"]


def test_lost_connections_and_missing_files_and_servers_are_said(server, tmp_path):
    server.files["a.bin"], server.limit, words = CONTENT, 2500, "could not be downloaded"
    for place, said in (("a.bin", "the connection was lost"), ("none.bin", "HTTP Error 404: Not Found")):
        with pytest.raises(BadInput, match=rf"{place} {words} \({said}\); repeat make data, or get"):
            fetch.download(f"{server.url}/{place}", tmp_path / place, MD5)
        assert not (tmp_path / place).exists()
    with pytest.raises(BadInput, match=rf"127.0.0.1:9/a.bin {words} \(.*refused.*\)"):
        fetch.download("http://127.0.0.1:9/a.bin", tmp_path / "downloads" / "a.bin")


def test_wrong_checksums_are_refused(server, tmp_path):
    server.files["a.bin"] = CONTENT[:-1] + b"x"
    with pytest.raises(BadInput, match=f"a.bin came with a wrong checksum .not {MD5}.; repeat"):
        fetch.download(f"{server.url}/a.bin", tmp_path / "a.bin", MD5)
    assert not (tmp_path / "a.bin").exists()


# --- unpacking ---


def _packed(folder, file):
    """Everything in `folder` as a zip or tar archive, as bytes."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder))
    else:
        with tarfile.open(file, "w:gz") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
    return file.read_bytes()


@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
def test_an_archive_appears_only_when_it_is_whole(tmp_path, suffix, monkeypatch):
    trees.picture(tmp_path / "source" / "base" / "inner" / "a.png")
    file, root = tmp_path / f"x{suffix}", tmp_path / "data"
    whole = _packed(tmp_path / "source", file)
    (root / f".unpacking-x{suffix}" / "base").mkdir(parents=True)  # left by a killed process
    (root / f".unpacking-x{suffix}" / "base" / "old").write_text("")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch.unpack(file, root, "base/inner")
    assert [*root.rglob("*")] == [root / "base"]
    fetch.unpack(file, root, "base/inner")
    assert [p.name for p in (root / "base" / "inner").iterdir()] == ["a.png"] and len([*root.iterdir()]) == 1
    shutil.rmtree(root)
    for content in (whole[: len(whole) // 2], b"no archive", *_unreadable_zips()):
        file.write_bytes(content)
        with pytest.raises(BadInput, match=f"{file} could not be unpacked .*; delete it and repeat make data"):
            fetch.unpack(file, root, "base/inner")
        assert not [*root.rglob("*.png")] and not [*root.glob(".unpack*")]


def _unreadable_zips():
    """Zip archives whose only file is locked, or damaged inside."""
    whole = trees.zipped("base/inner/a.png", b"ssl" * 1000)
    return trees.locked(whole), trees.damaged_inside(whole)


def test_archives_cannot_write_elsewhere(tmp_path):
    (tmp_path / "evil").write_text("")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "evil", "../../evil2")
    with pytest.raises(BadInput, match="could not be unpacked"):
        fetch.unpack(tmp_path / "x.tar", tmp_path / "data" / "deep", "base")
    assert not (tmp_path / "evil2").exists() and not (tmp_path / "data" / "evil2").exists()


# --- data sets ---


@pytest.fixture
def small(server, tmp_path, monkeypatch):
    """Small archives of CIFAR10, VOC, NYU-Depth-v2 and Tiny-ImageNet on the server, and entries that ask for them."""
    source = tmp_path / "source"
    makers = {"cifar10": (trees.cifar, "c.tar.gz"), "voc2012": (trees.voc, "v.zip")}
    counts = {"cifar10": (20, 4), "voc2012": (8, 4), "nyuv2": (4, 2), "tiny_imagenet": (12, 5)}
    archives = {}
    for name, (make, file) in makers.items():
        make(source / name)
        server.files[file] = _packed(source / name, tmp_path / file)
        archives[name] = [(file, datasets.DATASETS[name].archives[0].place)]
    trees.nyuv2(source)
    trees.tiny_imagenet(source, zipped=True)
    archives["nyuv2"] = [(f, f"nyuv2/{f}") for f in ("nyu_depth_v2_labeled.mat", "splits.mat")]
    archives["tiny_imagenet"] = [("tiny-imagenet-200.zip", "tiny-imagenet-200/tiny-imagenet-200.zip")]
    for file, place in archives["nyuv2"] + archives["tiny_imagenet"]:
        server.files[file] = (source / place).read_bytes()
    for name, files in archives.items():
        rows = tuple(
            Archive(f"{server.url}/{f}", p, len(server.files[f]), f"sha1:{hashlib.sha1(server.files[f]).hexdigest()}")
            for f, p in files
        )
        train, test = counts[name]
        official = {"train": (train,), "test": (test,)}
        entry = dataclasses.replace(datasets.DATASETS[name], archives=rows, counts=official, gigabytes=1e-3, md5={})
        monkeypatch.setitem(datasets.DATASETS, name, entry)
    return server


def _settings(root, deacl="tiny_imagenet", counts="official", **names):
    names = {"classification": "cifar10", "segmentation": "voc2012", "depth": "nyuv2"} | names
    tasks = {task: {"datasets": [name], "n_val": 1} for task, name in names.items()}
    return planted.settings(data_root=str(root), counts=counts, deacl={"dataset": deacl, "n_val": 1}, **tasks)


def test_everything_is_fetched_once(small, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    assert fetch.fetch(_settings(root)) == []
    told = capsys.readouterr().out
    for line in (
        "cifar10: complete, 20 train and 4 test images",
        "voc2012: complete, 8 train and 4 test images",
        "nyuv2: complete, 4 train and 2 test images",
        "tiny_imagenet: complete, 12 train images",
    ):
        assert line in told.splitlines()
    assert data.check(_settings(root)) == [] and not any((root / "downloads").iterdir())
    assert data.overview(_settings(root))["images"].tolist() == [12, 1, 4, 7, 1, 4, 3, 1, 2, 11, 1]
    requests = len(small.asked)
    assert requests == 5 and fetch.fetch(_settings(root)) == [] and len(small.asked) == requests


def test_a_failed_data_set_does_not_stop_the_others(small, tmp_path):
    del small.files["v.zip"]
    small.files["splits.mat"] += b"x"
    found = fetch.fetch(_settings(tmp_path))
    assert len(found) == 2 and "404" in found[0] and "splits.mat came with a wrong checksum" in found[1]
    assert (tmp_path / "cifar-10-batches-py").is_dir() and (tmp_path / "tiny-imagenet-200").is_dir()


def test_what_is_there_in_part_is_not_overwritten(small, tmp_path):
    trees.cifar(tmp_path, count=3)
    found = fetch.fetch(_settings(tmp_path))
    assert len(found) == 2 and "(train) has 15 images" in found[0]  # what is wrong with test is not said as well
    assert f"cifar10 was there in part; move {tmp_path}/cifar-10-batches-py away and repeat make data" in found[1]
    assert not [name for name in small.asked if name == "c.tar.gz"]
    assert fetch.fetch(_settings(tmp_path, counts="any")) == []


def test_a_changed_file_is_found(small, tmp_path, monkeypatch):
    trees.cifar(tmp_path)
    wrong = dataclasses.replace(datasets.DATASETS["cifar10"], md5={"cifar-10-batches-py/test_batch": "0"})
    monkeypatch.setitem(datasets.DATASETS, "cifar10", wrong)
    found = fetch.fetch(_settings(tmp_path))
    assert "test_batch differs from the official file" in found[0] and "move" in found[1]
    assert fetch.fetch(_settings(tmp_path, counts="any")) == []


def test_a_full_disk_is_said_before(small, tmp_path, monkeypatch):
    free = SimpleNamespace(total=0, used=0, free=500_000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: free)
    found = fetch.fetch(_settings(tmp_path, deacl="scenes", depth="scenes"))
    assert len(found) == 2 and not small.asked
    assert re.search(r"takes [\d.]+ MB, but the disk of \S+ has 0\.5 MB free; free some space", found[0])
    have = fetch.needed_bytes("nyuv2", tmp_path, datasets.DATASETS["nyuv2"].archives)
    assert have == len(small.files["nyu_depth_v2_labeled.mat"]) + len(small.files["splits.mat"])


def test_what_must_be_got_by_hand_is_said_exactly(small, tmp_path):
    found = fetch.fetch(_settings(tmp_path, deacl="imagenet", segmentation="cityscapes", depth="rooms"))
    told = "\n".join(found)
    assert "cityscapes-dataset.com/downloads" in told and f"unpack both in {tmp_path}/cityscapes" in told
    assert "ILSVRC2012_img_train.tar (138 GB" in told and f"{tmp_path}/imagenet/train" in told
    assert "no data set 'rooms'" in told and "rooms/{images,depth}/{train,val}" in told
    assert len(found) == 3  # one for the folder of one's own too, though it has neither train nor test
    trees.cityscapes(tmp_path)
    found = fetch.fetch(_settings(tmp_path, segmentation="cityscapes"))
    assert any("has 4 images" in sentence for sentence in found)
    assert fetch.fetch(_settings(tmp_path, segmentation="cityscapes", counts="any")) == []


# --- a training set of two sizes ---


@pytest.fixture
def two_sizes(small, tmp_path, monkeypatch):
    """NYU-Depth-v2 with 4 labelled training images, and 5 in archives on the same server."""
    trees.nyu_archives(tmp_path / "hub")
    files = sorted((tmp_path / "hub" / "nyuv2" / "data").iterdir())
    small.files |= {f.name: f.read_bytes() for f in files}
    larger = tuple(Archive(f"{small.url}/{f.name}", f"nyuv2/data/{f.name}", f.stat().st_size) for f in files)
    counts = {"train": (4, 5), "test": (2,)}
    monkeypatch.setitem(
        datasets.DATASETS, "nyuv2", dataclasses.replace(datasets.DATASETS["nyuv2"], larger=larger, counts=counts)
    )
    return small


def _nyu(root, n_train, counts="official"):
    depth = {"datasets": ["nyuv2"], "n_train": n_train, "n_val": 1}
    return planted.settings(
        data_root=str(root), counts=counts, depth=depth, classification=None, segmentation=None, deacl=None
    )


LABELLED, HUB = ["nyu_depth_v2_labeled.mat", "splits.mat"], ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
SHORT = "The depth head on nyuv2 is trained on 3 of 5 images, as no more are there; make data fetches them"


def _asked(server):
    return list(server.asked)


def test_the_larger_training_set_is_got_only_by_those_who_ask_for_it(two_sizes, tmp_path, capsys):
    assert fetch.fetch(_nyu(tmp_path, 4)) == [] and _asked(two_sizes) == LABELLED
    told = capsys.readouterr().out
    assert "nyuv2: complete, 4 train and 2 test images" in told and "SMALL" not in told and "head" not in told
    assert fetch.fetch(_nyu(tmp_path, 47_584)) == [] and _asked(two_sizes)[2:] == HUB
    told = capsys.readouterr().out.splitlines()
    small = r"With SMALL=1 make data gets 4 training images of nyuv2 instead \([\d.]+ MB\)\."
    assert re.fullmatch(rf"nyuv2: 3 files, [\d.]+ MB\. {small}", told[0])
    assert "nyuv2: complete, 5 train and 2 test images" in told and not any("head" in line for line in told)
    two_sizes.asked.clear()
    for n_train in (4, 47_584):
        assert fetch.fetch(_nyu(tmp_path, n_train)) == [] == two_sizes.asked


def test_small_does_with_the_smaller_training_set_and_says_so(two_sizes, tmp_path, monkeypatch, capsys):
    depth = "depth: {datasets: [nyuv2], n_train: 47584, epochs: 1, batch: 1, lr: 1.0, n_val: 1}\n"
    _profile(monkeypatch, tmp_path, depth)
    folder = tmp_path / "data"
    for _ in range(2):
        assert fetch.main(["--profile", "small", "--data", str(folder), "--small"]) == 0
        told = capsys.readouterr().out
        assert "nyuv2: complete, 4 train" in told and SHORT in told and _asked(two_sizes) == LABELLED
    assert fetch.main(["--profile", "small", "--data", str(folder)]) == 0
    assert "nyuv2: complete, 5 train" in capsys.readouterr().out and _asked(two_sizes) == LABELLED + HUB


def test_where_the_larger_training_set_cannot_be_had_the_smaller_is_offered(two_sizes, tmp_path):
    del two_sizes.files["train-000001.tar"]
    (said,) = fetch.fetch(_nyu(tmp_path, 5))
    assert "404" in said
    assert re.search(r"With SMALL=1 make data gets 4 training images of nyuv2 instead \([\d.]+ MB\)\.$", said)
    assert "\n" not in said and (tmp_path / "nyuv2" / "data" / "train-000000.tar").is_file()
    assert fetch.fetch(_nyu(tmp_path, 5), small=True) == []  # the archive that has come is not in its way


def test_the_larger_training_set_is_completed_where_it_is_there_in_part(two_sizes, tmp_path):
    trees.nyuv2(tmp_path)  # labelled images alone would do
    trees.nyu_archives(tmp_path)
    part = tmp_path / "nyuv2" / "data" / "train-000001.tar"
    whole = part.read_bytes()
    part.unlink()
    assert fetch.fetch(_nyu(tmp_path, 5)) == []
    assert two_sizes.asked == ["train-000001.tar"] and part.read_bytes() == whole


def test_archives_that_hold_too_few_images_are_said(two_sizes, tmp_path):
    trees.nyuv2(tmp_path)
    trees.nyu_archives(tmp_path, train=(3, 1))
    found = fetch.fetch(_nyu(tmp_path, 5))
    assert found[0] == "The archives of nyuv2 hold fewer images than the 5 that they should."
    assert f"move what is damaged of it, or all of {tmp_path}/nyuv2/data, away and repeat make data" in found[1]


# --- command line ---


def _profile(monkeypatch, tmp_path, text):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "small.yaml").write_text(f"profile: small\nencoders: [{{name: embedded_vit}}]\n{text}")
    monkeypatch.setattr(fetch, "PARAMS", tmp_path / "params")
    monkeypatch.setattr("ssl_robust.ops.run.PARAMS", tmp_path / "params")


SECTION = "classification: {datasets: [%s], epochs: 1, batch: 1, lr: 1.0, n_val: 1}\n"


def test_command_line(small, tmp_path, monkeypatch, capsys):
    _profile(monkeypatch, tmp_path, SECTION % "cifar10")
    folder = tmp_path / "new" / "data"
    assert fetch.main(["--profile", "smal", "--data", str(folder)]) == 2 and not folder.exists()
    assert fetch.main(["--profile", "small"]) == 2
    assert "name one: make data DATA=FOLDER" in capsys.readouterr().err
    assert fetch.main(["--profile", "small", "--data", str(folder)]) == 0
    assert "Profile small: all data sets and encoder weights are there." in capsys.readouterr().out
    shutil.rmtree(folder)
    small.files.clear()
    assert fetch.main(["--profile", "small", "--data", str(folder)]) == 2
    assert "404" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert fetch.main(["--profile", "small", "--data", str(tmp_path / "file")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_interruption_is_said(small, tmp_path, monkeypatch, capsys):
    _profile(monkeypatch, tmp_path, SECTION % "cifar10")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "download", stop)
    assert fetch.main(["--profile", "small", "--data", str(tmp_path / "data")]) == 130
    assert "repeat the command, files that are whole are kept" in capsys.readouterr().err


def test_the_scenes_need_nothing(tmp_path, monkeypatch, capsys):
    _profile(monkeypatch, tmp_path, SECTION % "scenes")
    assert fetch.main(["--profile", "small"]) == 0
    assert "scenes: rendered here, nothing to fetch" in capsys.readouterr().out


# --- weights of encoders ---


def _hub_rows(**more):
    rows = [{"name": "dino_vits16"}, {"name": "small", "timm": "vit_small_patch16_224.dino"}, {"name": "embedded_vit"}]
    return check(profile="small", encoders=rows, data_root="", **more)


def test_weights_that_are_not_cached_are_fetched_by_what_loads_them(monkeypatch, capsys):
    loaded, cache = [], set()

    def load(row, data_root, weights=None):
        if row.name != "embedded_vit":  # which comes along
            loaded.append(row.name)
            cache.add("vit_small_patch16_224.dino")

    monkeypatch.setattr(fetch.encoders, "load", load)
    monkeypatch.setattr(fetch.plan, "cached", lambda model: model in cache)
    assert fetch.fetch(_hub_rows()) == [] and len(loaded) == 1  # two rows, one model
    said = capsys.readouterr().out
    assert "encoder weights: 1 to fetch, about 87 MB, into the local cache of timm's hub" in said
    assert "fetching vit_small_patch16_224.dino (about 87 MB)" in said
    assert fetch.fetch(_hub_rows()) == [] and len(loaded) == 1 and capsys.readouterr().out == ""


def test_weights_that_cannot_be_had_are_one_sentence_each(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(fetch.plan, "cached", lambda model: False)
    monkeypatch.setattr("timm.create_model", lambda *a, pretrained=False, _make=timm.create_model, **k: (
        offline() if pretrained else _make(*a, **k)))  # fmt: skip
    left = fetch.fetch(_hub_rows())
    assert len(left) == 1 and "the weights of vit_small_patch16_224.dino could not be fetched (OSError)" in left[0]
    rows = [{"name": "mine", "timm": "vit_tiny_patch16_224", "checkpoint": "gone.pth"}]
    left = fetch.fetch(check(profile="small", encoders=rows, data_root=str(tmp_path)))
    assert len(left) == 1 and "gone.pth" in left[0] and str(tmp_path) in left[0]
