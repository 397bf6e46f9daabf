"""Whatever is wrong with a parameter, the command line or a file: one sentence, exit code 2, nothing lost."""

import shutil
import time

import nbformat
import numpy as np
import pytest
import torch
import trees
import yaml
from chain import PROJECT, files

from ssl_robust import records
from ssl_robust.ops import fetch, run

SECTION = {"datasets": ["scenes"], "n_train": 8, "n_val": 4, "n_test": 4, "epochs": 1, "batch": 4, "lr": 0.01}
GOOD = {
    "profile": "tiny",
    "encoders": [{"name": "embedded_vit", "defenses": ["standard", "deacl"]}],
    "classification": SECTION,
    "segmentation": SECTION,
    "depth": SECTION,
    "attack": {"eps": 0.03, "step": 0.01, "steps": 2},
    "deacl": {"dataset": "scenes", "n_train": 8, "n_val": 4, "epochs": 2, "batch": 4},
    "sanity": {"n": 2},
}
CHECK, RUN = ("--check",), ("03_attack_classification",)
IMAGE = "<img src=x onerror=alert(1)>"


def one(**row):
    """A change of the only encoder."""
    return {"encoders": [{"name": "embedded_vit", **row}]}


def text(content):
    """A parameter file of these bytes."""
    return lambda root: (root / "params" / "tiny.yaml").write_bytes(content)


def weights(content):
    """A weight file of these bytes, which the only encoder names."""

    def change(root):
        (root / "w.pth").write_bytes(content)
        write(root, one(checkpoint=str(root / "w.pth")))

    return change


def pickled(root):
    torch.save({"weight": nbformat.NotebookNode(a=1)}, root / "w.pth")
    write(root, one(checkpoint=str(root / "w.pth")))


def data(task, make, change=lambda home: None):
    """A profile whose `task` reads the data set that `make` writes, with what `change` does to its folder."""

    def made(root):
        make(root / "data")
        name = {"segmentation": "street", "depth": "sevenscenes", "classification": "pets"}[task]
        change(root / "data" / name)
        write(root, {task: {"datasets": [name]}, "data_root": str(root / "data")})

    return made


def each(pattern, pixels):
    """A change of all pictures of a folder whose path ends so."""

    def change(home):
        for path in home.glob(pattern):
            trees.stored(path, pixels)

    return change


def pets(root):
    trees.image_folder(root, "pets", ("cat", "dog"))


def binary(home):
    each("masks/*/*.png", np.repeat(np.uint8([[0], [255]]), [10, 10], 0).repeat(26, 1))(home)


def half_a_data_set(root):
    trees.image_folder(root / "data")
    shutil.rmtree(root / "data" / "cifar10" / "test")
    write(root, {"classification": {"datasets": ["cifar10"]}, "data_root": str(root / "data")})


def committed(root):
    """A profile with the name of the folder of the committed examples."""
    (root / "params" / "committed.yaml").write_text("profile: committed\nencoders: [{name: embedded_vit}]\n")


def notebook(edit):
    """The notebook that is run with other cells or bytes."""
    return lambda root: edit(root / "notebooks" / f"{RUN[0]}.ipynb")


def write(root, change):
    """The profile 'tiny': the good one, with values of its sections replaced."""
    content = {**GOOD}
    for name, value in change.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    (root / "params" / "tiny.yaml").write_text(yaml.safe_dump(content))


# what is changed (parameters, or a function that changes files), what is asked for, words of the sentence
CASES = {
    "unknown parameter": ({"epsilon": 0.1}, CHECK, "Unknown parameter 'epsilon'"),
    "unknown value in a section": ({"attack": {"epss": 0.1}}, CHECK, "Unknown parameter 'attack.epss'"),
    "no fraction": ({"attack": {"eps": "8/0"}}, CHECK, "is the text '8/0'; write it as a plain decimal"),
    "fraction of no pixels": ({"deacl": {"lr": "1/20"}}, CHECK, "is the text '1/20'; write 0.05 instead"),
    "negative radius": ({"attack": {"eps": -0.1}}, CHECK, "'attack.eps' is -0.1"),
    "radius in 0..255": ({"attack": {"eps": 8}}, CHECK, "'attack.eps' is 8"),
    "no number": ({"attack": {"eps": float("nan")}}, CHECK, "'attack.eps' is nan"),
    "infinite": ({"deacl": {"lr": float("inf")}}, CHECK, "'deacl.lr' is inf"),
    "no steps": ({"attack": {"steps": 0}}, CHECK, "'attack.steps' is 0"),
    "half a step": ({"attack": {"steps": 20.5}}, CHECK, "'attack.steps' is 20.5"),
    "too many steps": ({"attack": {"steps": 10**9}}, CHECK, "'attack.steps' is 1000000000"),
    "text for yes": ({"attack": {"best": "yes"}}, CHECK, "'attack.best' is 'yes'"),
    "negative seed": ({"seed": -1}, CHECK, "'seed' is -1"),
    "seed as text": ({"seed": "0"}, CHECK, "'seed' must be a number but is the text '0'"),
    "negative further seed": ({"seeds": [1, -1]}, CHECK, "'seeds.1' is -1"),
    "unknown device": ({"device": "gpu"}, CHECK, "'device' is 'gpu'"),
    "a GPU that is not there": ({"device": "cuda"}, CHECK, "no CUDA GPU is usable here"),
    "unknown precision": ({"precision": "fp16"}, CHECK, "'precision' is 'fp16'"),
    "attacks without the task's": ({"attacks": ["embed", "apgd"]}, CHECK, "must hold embed and task"),
    "unknown rule for damage": ({"damaged": "ignore"}, CHECK, "'damaged' is 'ignore'"),
    "unknown rule for missing": ({"missing": "ignore"}, CHECK, "'missing' is 'ignore'"),
    "unknown counts": ({"counts": "some"}, CHECK, "'counts' is 'some'"),
    "unknown protocol": ({"protocol": "realeased"}, CHECK, "'protocol' is 'realeased'"),
    "unknown difference": ({"protocol": ["mse"]}, CHECK, "'protocol"),
    "other profile's name": ({"profile": "other"}, CHECK, "must say 'profile: tiny'"),
    "no encoder": ({"encoders": []}, CHECK, "'encoders' is []"),
    "name with a folder": (one(name="../a"), CHECK, "'encoders.0.name' is '../a'"),
    "name with HTML": (one(name=IMAGE), CHECK, "'encoders.0.name' is '<img"),
    "name twice": ({"encoders": GOOD["encoders"] * 2}, CHECK, "are not unique"),
    "unknown model": (one(name="a", timm="vit_gigantic"), CHECK, "timm has no model 'vit_gigantic'"),
    "model without public weights": (one(name="simclr_resnet50"), CHECK, "no public weights"),
    "callable without function": (one(name="a", call="my_encoder"), CHECK, "my_encoder cannot be imported"),
    "callable of no module": (one(name="a", call="no_such_module:f"), CHECK, "no_such_module"),
    "unknown normalisation": (one(normalise="imagnet"), CHECK, "'encoders.0.normalise' is 'imagnet'"),
    "tiny native side": (one(native=4), CHECK, "'encoders.0.native' is 4"),
    "unknown defense": (one(defenses=["trades"]), CHECK, "'encoders.0.defenses.0' is 'trades'"),
    "DeACL file without DeACL": (one(deacl_checkpoint="r.pth"), CHECK, "not the defense deacl"),
    "no such weights": (one(checkpoint="/not/there.pth"), CHECK, "/not/there.pth cannot be read (No such file"),
    "empty weights": (weights(b""), CHECK, "w.pth "),
    "weights that are a page": (weights(b"<html>404</html>"), CHECK, "w.pth "),
    "weights with objects": (pickled, CHECK, "could run code"),
    "no data set": ({"depth": {"datasets": []}}, CHECK, "'depth.datasets' is []"),
    "unknown data set": ({"depth": {"datasets": ["nyu"]}}, CHECK, "There is no data set 'nyu'"),
    "data set of another task": ({"depth": {"datasets": ["cifar10"]}}, CHECK, "no data set 'cifar10' for depth"),
    "data set with a folder": ({"depth": {"datasets": ["../a"]}}, CHECK, "'../a' cannot be a data set"),
    "data set with HTML": ({"depth": {"datasets": [IMAGE]}}, CHECK, "cannot be a data set"),
    "half a data set": (half_a_data_set, CHECK, "cifar10"),
    "masks of 0 and 255": (data("segmentation", trees.mask_folder, binary), CHECK, "hold 0 and 255 only"),
    "masks without a label": (
        data("segmentation", trees.mask_folder, each("masks/*/*.png", np.full((20, 26), 255, np.uint8))), CHECK,
        "has a class, all are 255",
    ),
    "masks in colour": (
        data("segmentation", trees.mask_folder, each("masks/*/*.png", np.zeros((20, 26, 3), np.uint8))), CHECK,
        "is a colour picture",
    ),
    "two images of one mask": (
        data("segmentation", trees.mask_folder, lambda home: trees.picture(home / "images" / "val" / "0.jpg")), CHECK,
        "has 2 images 'street/val/0'",
    ),
    "class names in latin-1": (
        data("segmentation", trees.mask_folder, lambda home: (home / "classes.txt").write_bytes(b"h\xe4user\na\nb")),
        CHECK, "is not text in UTF-8",
    ),
    "depths in metres per unit": (
        data("depth", lambda root: trees.depth_folder(root, scale=0.001)), CHECK, "are in other units",
    ),
    "no valid depth": (
        data("depth", trees.depth_folder, each("depth/*/*.png", np.zeros((20, 26), np.uint16))), CHECK, "is valid",
    ),
    "depth scale in a list": (
        data("depth", trees.depth_folder, lambda home: (home / "meta.json").write_text("[1000]")), CHECK,
        "must give the stored units per metre",
    ),
    "images of 12 bits": (
        data("classification", pets, each("*/*/*.png", np.full((8, 8), 4095, np.uint16))), CHECK, "16 bits a value",
    ),
    "damaged images": (
        data("classification", pets, lambda home: [p.write_bytes(b"") for p in home.rglob("*.png")]), CHECK,
        "cannot be read (damaged or empty)",
    ),
    "no test image": ({"classification": {"n_test": 0}}, CHECK, "'classification.n_test' is 0"),
    "no learning rate": ({"classification": {"lr": 0}}, CHECK, "'classification.lr' is 0"),
    "unknown size": ({"depth": {"size": "natve"}}, CHECK, "'natve' is no size"),
    "stride above a window": ({"segmentation": {"stride": 1.5}}, CHECK, "'segmentation.stride' is 1.5"),
    "views of depth": ({"depth": {"views": 2}}, CHECK, "Unknown parameter 'depth.views'"),
    "unknown crop": ({"depth": {"crop": "garg"}}, CHECK, "'depth.crop' is 'garg'"),
    "empty batches": ({"depth": {"attack_batch": 0}}, CHECK, "'depth.attack_batch'"),
    "epoch that is not reached": ({"deacl": {"checkpoints": [3]}}, CHECK, "lie outside 1..2"),
    "unknown target of DeACL": ({"deacl": {"attack_on": "both"}}, CHECK, "'deacl.attack_on' is 'both'"),
    "one radius to compare": ({"sanity": {"eps": [0.1]}}, CHECK, "'sanity.eps' is [0.1]"),
    "section that is no section": ({"depth": [1]}, CHECK, "'depth' is [1]"),
    "no attack": ({"attack": None}, CHECK, "needs the section 'attack'"),
    "no attack for a notebook": ({"attack": None}, RUN, "needs the section 'attack'"),
    "no data folder": ({"data_root": "not/there"}, CHECK, "data folder 'not/there' does not exist"),
    "no data folder on the command line": ({}, (*RUN, "--data", "not/there"), "data folder 'not/there' does not exist"),
    "file as data folder": ({}, (*RUN, "--data", str(PROJECT / "Makefile")), "does not exist"),
    "unknown profile": ({}, (*RUN, "--profile", "tinny"), "no profile 'tinny'"),
    "profile outside": ({}, (*CHECK, "--profile", "../params/tiny"), "cannot be a profile"),
    "unknown notebook": ({}, ("03_attack",), "no notebook '03_attack'"),
    "notebook outside": ({}, (f"../notebooks/{RUN[0]}",), "no notebook '03_attack_classification' in notebooks/"),
    "notebook of 5000 letters": ({}, ("x" * 5000,), "no notebook 'xxx"),
    "profile of 5000 letters": ({}, (*CHECK, "--profile", "x" * 5000), "no profile 'xxx"),
    "profile that is a pattern": ({}, (*CHECK, "--profile", "ti*"), "no profile 'ti*'"),
    "damaged notebook": (notebook(lambda path: path.write_text('{"cells": [')), RUN, "is damaged"),
    "notebook without parameters": (
        notebook(lambda path: nbformat.write(nbformat.v4.new_notebook(), path)), RUN, "0 cells tagged",
    ),
    "no YAML": (text(b"attack: {eps: 0.1"), CHECK, "not valid YAML near line"),
    "no text": (text(b"\xff\xfe\x00"), CHECK, "is not valid YAML (no text"),
    "a name twice": (text(b"profile: tiny\nseed: 1\nseed: 2\n"), CHECK, "line 3 ('seed' stands there twice)"),
    "seed beyond its bound": ({"seed": 2**64 - 1}, CHECK, "'seed' is 18446744073709551615"),
    "learning rate beyond sense": ({"deacl": {"lr": 1e300}}, CHECK, "'deacl.lr' is 1e+300"),
    "more images than there can be": ({"depth": {"n_test": 10**12}}, CHECK, "'depth.n_test' is 1000000000000"),
    "profile with the name of a folder": (committed, (*CHECK, "--profile", "committed"), "committed examples"),
    "data folder of 5000 letters": ({"data_root": "x" * 5000}, CHECK, "does not exist"),
    "data folder of nobody": ({"data_root": "~nobody-at-all/data"}, CHECK, "'~nobody-at-all/data' does not exist"),
    "empty file": (text(b""), CHECK, "holds no parameters"),
    "a list": (text(b"- 1\n"), CHECK, "holds no parameters"),
    "results that are a file": (lambda root: (root / "runs").write_text(""), RUN, "cannot be written"),
    "fetch of an unknown profile": ({}, ("fetch", "--profile", "tinny"), "no profile 'tinny'"),
    "fetch into a file": ({}, ("fetch", "--data", str(PROJECT / "Makefile" / "data")), "cannot be made"),
    "fetch without a folder": ({"depth": {"datasets": ["nyuv2"]}}, ("fetch",), "no folder to put data sets into"),
}  # fmt: skip


@pytest.fixture
def project(root, monkeypatch):
    """A project whose profile 'tiny' is good, with a record of an earlier run."""
    for name in ("notebooks", "params"):
        (root / name).mkdir()
    for path in (PROJECT / "notebooks").glob("0*.ipynb"):
        shutil.copy(path, root / "notebooks")
    monkeypatch.setattr(run, "NOTEBOOKS", root / "notebooks")
    for module in (run, fetch):
        monkeypatch.setattr(module, "PARAMS", root / "params")
    records.write_record({"key": "0"}, records.record_path("tiny", "depth", "a", "b", "standard", "clean"))
    write(root, {})
    return root


def outcome(*arguments):
    """Exit code of the runner, or of fetch where that is the first word."""
    wanted = () if "--profile" in arguments else ("--profile", "tiny")
    if arguments[0] == "fetch":
        return fetch.main([*arguments[1:], *wanted])
    return run.main([*arguments, *wanted])


def test_the_good_profile_is_accepted(project, capfd):
    assert outcome(*CHECK) == 0, capfd.readouterr().err


def test_there_are_enough_cases():
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_costs_nothing(case, project, capfd, monkeypatch):
    change, arguments, words = CASES[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change(project) if callable(change) else write(project, change)
    before, start = files(project), time.process_time()
    code = outcome(*arguments)
    said = capfd.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    assert words in said and said.endswith(".\n") and "Traceback" not in said, said
    assert "; " in said or " must say " in said, f"no remedy in: {said}"
    assert time.process_time() - start < 10
    assert files(project) == before
