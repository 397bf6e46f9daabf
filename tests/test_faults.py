"""kill -9 at any moment, full disks, damaged files, two runs at once: nothing is lost and no number is wrong.

Set SSL_ROBUST_FAULTS=all to kill make, papermill and the kernel in every stage (about 10 minutes on one core).
"""

import contextlib
import gc
import io
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import nbformat
import planted
import psutil
import pytest
import torch
import trees
from chain import PROFILE, STAGES, Tree, files, numbers, play_with_kills, tables, undisturbed, wait_for  # noqa: F401
from safetensors import SafetensorError
from test_run import PROFILE as TINY
from test_run import write_notebook, write_profile

from ssl_robust import deacl, evaluate, records, training
from ssl_robust.embedded import scenes
from ssl_robust.formats import checkpoints
from ssl_robust.ops import run
from ssl_robust.settings import BadInput
from ssl_robust.show import plots, report
from ssl_robust.trust import data

ALL = os.environ.get("SSL_ROBUST_FAULTS") == "all"


# ---- kill -9 ----


def test_a_kill_after_any_file_in_any_stage_changes_no_table(undisturbed, tmp_path):  # noqa: F811
    kills = {notebook: play_with_kills(notebook, tmp_path, 3 if ALL else 1) for notebook in STAGES}
    assert sum(kills.values()) >= len(STAGES) - 1, kills
    assert tables(tmp_path) == tables(undisturbed) and numbers(tmp_path) == numbers(undisturbed)


@pytest.fixture
def prepared(undisturbed, tmp_path):  # noqa: F811
    """A copy of the project in which make finds everything before the attacks made."""
    tree = Tree(tmp_path)
    for name in ("results", "runs"):
        shutil.copytree(undisturbed / name, tree.root / name, dirs_exist_ok=True, copy_function=shutil.copy)
    for stage in STAGES[3:]:
        (tree.root / "results" / PROFILE / f"{stage}.json").unlink()
    shutil.rmtree(tree.root / "results" / PROFILE / "classification")
    for path in (tree.root / "runs" / PROFILE / "cells").glob("classification__*"):
        path.unlink()
    return tree


ONLY = "STALE=03_attack_classification"


def killed(tree, target, victim, log):
    """Start make, kill -9 one of its processes once the next record is there; (make, all three processes)."""
    folder = tree.root / "results" / PROFILE
    before = set(folder.glob("*/*__*.json"))
    make = tree.start(target, log, ONLY)
    processes = tree.victims(make)
    assert wait_for(lambda: set(folder.glob("*/*__*.json")) - before), (tree.root / log).read_text()
    processes[victim].kill()
    return make, processes


def gone(process, seconds=20.0):
    """Whether the process ends within that time."""
    return wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, seconds)


def test_kill_of_kernel_papermill_and_make_and_two_runs_at_once(prepared, undisturbed):  # noqa: F811
    target, root = "run-03_attack_classification", prepared.root
    outside = files(prepared.home) | files(prepared.tmp)

    make, _ = killed(prepared, target, "kernel", "1.log")
    assert make.wait(60) != 0
    assert "The kernel of notebook 03_attack_classification died" in (root / "1.log").read_text()

    make, processes = killed(prepared, target, "runner", "2.log")
    assert make.wait(60) != 0 and gone(processes["kernel"])
    assert not (root / f"results/{PROFILE}/03_attack_classification.json").exists()

    make, processes = killed(prepared, target, "make", "3.log")
    assert make.wait(60) == -signal.SIGKILL
    processes["kernel"].suspend()  # the runner lives on and is made to last, so that there are two runs at once
    second = prepared.start(target, "4.log", ONLY)
    try:
        assert wait_for(lambda: "waiting, as another process runs this" in (root / "4.log").read_text())
    finally:
        processes["kernel"].resume()
    assert second.wait(240) == 0, (root / "4.log").read_text()
    assert gone(processes["runner"]) and not list(root.rglob("*.part"))

    made = tables(root)
    assert made and made.items() <= tables(undisturbed).items()
    found, expected = numbers(root), numbers(undisturbed)
    changed = {name: [k for k in record if record[k] != expected[name].get(k)] for name, record in found.items()}
    assert len(found) >= 9 and not any(changed.values()), changed
    left = files(prepared.home) | files(prepared.tmp)
    assert left == outside, f"written outside of the project: {sorted(str(p) for p, _ in left - outside)}"
    assert prepared.git("status", "--porcelain") == ""


@pytest.mark.skipif(not ALL, reason="the whole matrix takes about 10 minutes; set SSL_ROBUST_FAULTS=all")
@pytest.mark.parametrize("victim", ["kernel", "runner", "make"])
def test_make_paper_after_a_kill_in_every_stage(victim, undisturbed, tmp_path):  # noqa: F811
    tree = Tree(tmp_path)
    for stage in STAGES:
        before = files(tree.root)
        make = tree.start(f"run-{stage}", "log", f"STALE={stage}")
        processes = tree.victims(make)
        assert wait_for(lambda: files(tree.root) != before or make.poll() is not None)  # noqa: B023
        processes[victim].kill()
        assert make.wait(240) != 0 and gone(processes["kernel"], 240)
    make = tree.start("paper", "log")
    assert make.wait(600) == 0, (tree.root / "log").read_text()
    assert tables(tree.root) == tables(undisturbed) and numbers(tree.root) == numbers(undisturbed)


@pytest.mark.skipif(not ALL, reason="takes two minutes; set SSL_ROBUST_FAULTS=all")
def test_make_paper_after_make_was_killed_while_two_notebooks_ran(undisturbed, tmp_path):  # noqa: F811
    tree = Tree(tmp_path)
    make = tree.start("paper", "1.log", "AT_ONCE=2")
    folder = tree.root / "results" / PROFILE
    assert wait_for(lambda: list(folder.glob("segmentation/*.json")) and list(folder.glob("depth/*.json")), 240)
    running = [p for p in psutil.Process(make.pid).children(recursive=True) if "ipykernel_launcher" in p.cmdline()]
    make.kill()
    assert make.wait(60) == -signal.SIGKILL and len(running) == 2  # which go on, and are not started a second time
    again = tree.start("paper", "2.log", "AT_ONCE=2")
    assert again.wait(600) == 0, (tree.root / "2.log").read_text()
    assert tables(tree.root) == tables(undisturbed) and numbers(tree.root) == numbers(undisturbed)


# ---- full and read-only disks ----


@contextmanager
def file_limit(size):
    """No file may grow beyond `size` bytes, in this process and those that it starts: a full disk in small."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_privileges():
    """As a user who owns nothing: the rights of root, which is denied no writing, are laid down."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


BIG = {"value": 1, "statistics": list(range(20_000))}
WRITERS = {
    "record": lambda path: records.write_record(BIG, path),
    "tensors": lambda path: records.write_tensors({"w": torch.ones(30_000)}, {}, path),
    "state": lambda path: records.write_sealed(bytes(90_000), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(kind, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with (
        file_limit(50_000),
        pytest.raises(BadInput, match=r"file cannot be written \(File too large\): free") as e,
    ):
        WRITERS[kind](path)
    assert str(e.value).count("\n") == 0 and path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    WRITERS[kind](path)
    assert path.stat().st_size > 50_000


@pytest.mark.parametrize(
    "source", ["print('x' * 300_000)", "records.write_bytes(bytes(300_000), records.ROOT / 'big')"]
)
def test_a_disk_that_fills_while_a_notebook_runs(source, notebooks, capfd):
    """In the runner, which writes the executed copy, and in the kernel, which writes results."""
    write_notebook(notebooks, "from ssl_robust import records", source)
    with file_limit(200_000):
        code = run.main(["00_try", "--profile", "tiny"])
    said = capfd.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "cannot be written (File too large): free" in said
    executed = notebooks / "runs/tiny/00_try.ipynb"
    assert nbformat.read(executed, 4).cells and not list(notebooks.rglob("*.part")) and not (notebooks / "big").exists()


@pytest.fixture
def root(root, monkeypatch):
    """The folder of results in a place that users without privileges can reach, as pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(records, "ROOT", Path(folder))
        monkeypatch.setenv("SSL_ROBUST_ROOT", folder)
        yield Path(folder)


@pytest.fixture
def notebooks(root, monkeypatch):
    """A folder for notebooks and the profile 'tiny'."""
    (root / "notebooks").mkdir()
    write_profile(root, TINY)
    monkeypatch.setattr(run, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(run, "PARAMS", root / "params")
    yield root
    assert not [p for p in psutil.Process().children(recursive=True) if "ipykernel_launcher" in p.cmdline()]
    gc.collect()  # what is left of an interrupted papermill goes now, not while another test reads code


def _refused_without_privileges(capfd):
    """What the runner says, in one sentence, as a user who may not write there."""
    with no_privileges():
        code = run.main(["00_try", "--profile", "tiny"])
    said = capfd.readouterr().err
    assert code == 2 and said.count("\n") == 1
    return said


def test_a_project_folder_that_is_read_only_is_one_sentence(notebooks, capfd):
    write_notebook(notebooks, "raise SystemExit")
    notebooks.chmod(0o555)
    said = _refused_without_privileges(capfd)
    assert "cannot be written (Permission denied): free some space or make its folder writable" in said


def test_a_lock_of_another_user_is_one_sentence(notebooks, capfd):
    write_notebook(notebooks, "raise SystemExit")
    for folder in (notebooks, notebooks / "runs", notebooks / "runs/tiny", notebooks / "runs/.home"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    lock = notebooks / "runs/tiny/.00_try.lock"
    lock.touch()
    lock.chmod(0o600)
    said = _refused_without_privileges(capfd)
    assert "runs/tiny/.00_try.lock cannot be written (Permission denied)" in said


def test_a_failed_run_does_not_make_its_copy_look_changed(notebooks, capfd):
    write_notebook(notebooks, "from ssl_robust import records", "records.finish(profile, '00_try')")
    assert run.main(["00_try", "--profile", "tiny"]) == 0
    write_notebook(notebooks, "1 / 0")
    assert run.main(["00_try", "--profile", "tiny"]) == 1
    assert run.not_executed("00_try", run.read_profile("tiny")) == "it has not been run to its end"


def test_images_of_figure_1_that_were_deleted_are_named(root):
    records.write_record(RECORD, records.record_path("p", "depth", "scenes", "vit", "standard", "embed"))
    with pytest.raises(BadInput, match="no images for Figure 1 in runs/p/examples; 'make paper' makes them"):
        report.draw_figure1("p")


def test_a_data_folder_that_is_read_only_is_enough(root):
    folder = root / "data"
    folder.mkdir()
    trees.image_folder(folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files(folder)
    (root / "runs").mkdir()
    for path in (root, root / "runs"):
        path.chmod(0o777)
    settings = planted.settings(
        data_root=str(folder), counts="any", segmentation=None, depth=None, deacl=None,
        classification={"datasets": ["cifar10"], "n_train": 8, "n_val": 4, "n_test": 4},
        encoders=[{"name": "planted", "timm": "embedded_vit"}],
    )  # fmt: skip
    with no_privileges():
        assert data.check(settings) == [] and len(data.overview(settings)) == 3
        encoder = planted.encoder()
        training.fitted("classification", "cifar10", encoder, settings)
    assert files(folder) == before and list(root.rglob("*.safetensors"))


# ---- damaged files ----


def flipped(data, place, bit):
    """`data` with one bit changed."""
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def damages(data, seed=0, count=150):
    """Nothing, halves, one byte less, and single bits flipped all over."""
    yield from (b"", data[: len(data) // 2], data[:-1], b"\0" * len(data), b"null", b"[]")
    generator = random.Random(seed)
    for _ in range(count):
        yield flipped(data, generator.randrange(len(data)), generator.randrange(8))


MADE = records.made_from(("pgd",), seed=0)
RECORD = {
    "schema": records.SCHEMA,
    "key": records.digest(MADE),
    "value": 0.4375,
    "statistics": [0.25, 1e-9, 3],
    "settings": {"eps": 0.03},
}


def _read_record(path):
    found = records.reusable(path, MADE)
    return found if found is None else {**found, "sha": ""}


def _read_tensors(path):
    try:
        tensors, metadata = records.read_tensors(path)
    except BadInput as problem:
        assert path.name in str(problem)
        return None
    return {k: v.tolist() for k, v in tensors.items()}, metadata.get("key")


def _read_backbone(path):
    try:
        return {k: v.tolist() for k, v in checkpoints.read(path).items()}
    except BadInput:
        return None


TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([7, 8])}
KEPT = {
    "record": (lambda path: records.write_record(RECORD, path), _read_record),
    "tensors": (lambda path: records.write_tensors(TENSORS, {"key": "k"}, path), _read_tensors),
    "DeACL epoch": (lambda path: records.write_tensors(TENSORS, {}, path), _read_backbone),
    "DeACL state": (lambda path: records.write_sealed(bytes(range(200)), path), records.read_sealed),
}


@pytest.mark.parametrize("kind", KEPT)
def test_no_damage_goes_unnoticed(kind, tmp_path):
    write, read = KEPT[kind]
    path = tmp_path / "file.safetensors"
    write(path)
    data = path.read_bytes()
    whole = read(path)
    assert whole is not None
    noticed = 0
    for damaged in damages(data):
        path.write_bytes(damaged)
        found = read(path)
        assert found is None or found == whole  # e.g. a blank that became another kind of blank
        noticed += found is None
    assert noticed > 140


def test_a_digit_changed_in_a_record_is_named_by_tables_too(root):
    path = records.record_path("p", "depth", "scenes", "vit", "standard", "embed")
    records.write_record({**RECORD, "value": 0.4375}, path)
    path.write_text(path.read_text().replace("0.4375", "0.5375"))
    with pytest.raises(BadInput, match="standard__embed.json is damaged .*hash.*; delete .* run its notebook"):
        records.read_records(root / "results" / "p")


def test_a_record_of_another_version_is_not_used_again(tmp_path):
    older, later = ({**RECORD, "schema": records.SCHEMA + step} for step in (-1, 1))
    for record in (older, later):
        records.write_record(record, tmp_path / "r.json")
        assert records.reusable(tmp_path / "r.json", MADE) is None
    with pytest.raises(BadInput, match="a later version"):
        records.read_record(tmp_path / "r.json")


def test_a_head_with_a_flipped_weight_is_trained_again(toys):
    settings, encoder = planted.settings(), planted.encoder()
    model, _ = training.fitted("classification", "toys", encoder, settings)
    path = planted.stored("heads/*")
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) - 6, 7))
    again, _ = training.fitted("classification", "toys", encoder, settings)
    assert torch.equal(model.head.linear.weight, again.head.linear.weight) and path.read_bytes() == data


def _finetuned(settings):
    return deacl.finetune(settings.encoders[0], planted.encoder(), settings)


@pytest.mark.parametrize("name", ["state.pt", "epoch_3.safetensors", "deacl.json"])
def test_damaged_deacl_files_are_made_again(name, toys):
    settings = planted.settings()
    _finetuned(settings)
    home = planted.stored("deacl/planted/*")
    weights = {p.name: records.read_tensors(p)[0] for p in home.glob("*.safetensors")}
    if name == "state.pt":
        (home / "deacl.json").unlink()
    data = (home / name).read_bytes()
    for damaged in (flipped(data, len(data) // 2, 2), data[: len(data) // 2]):
        (home / name).write_bytes(damaged)
        _finetuned(settings)
        for file, expected in weights.items():
            made = records.read_tensors(home / file)[0]
            assert all(torch.equal(made[k], v) for k, v in expected.items()), file


def test_a_damaged_example_is_named(toys):
    path = records.runs_dir("toy") / "examples" / "depth.safetensors"
    records.write_tensors({"images": torch.zeros(1, 3, 4, 4)}, {"classes": "[]", "eps": "0.1"}, path)
    data = path.read_bytes()
    for damaged in (data[:-1], flipped(data, len(data) - 1, 0), b""):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"depth.safetensors"):
            plots.load_example(path)


def test_damaged_copies_and_stage_files_are_noticed(notebooks, capfd):
    write_notebook(notebooks, "from ssl_robust import records", "records.finish(profile, '00_try', n=1)")
    assert run.main(["00_try", "--profile", "tiny"]) == 0
    settings = run.read_profile("tiny")
    assert run.not_executed("00_try", settings) == ""
    executed, stage = run.executed_path("tiny", "00_try"), records.stage_path("tiny", "00_try")
    whole = executed.read_bytes()
    executed.write_bytes(whole[:-9])
    assert run.not_executed("00_try", settings) in ("what it left is damaged", "its executed copy was changed")
    executed.write_bytes(whole)
    stage.write_text("{")
    assert run.not_executed("00_try", settings) == "what it left is damaged"
    with pytest.raises(BadInput, match="00_try.json is damaged"):
        records.need("tiny", "00_try")


# ---- results of other settings, foreign code, foreign names ----


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"attack": {"eps": 0.01}}, {"attack": {"step": 0.001}}, {"attack": {"steps": 2}},
        {"attack": {"best": True}}, {"precision": "bf16"}, {"protocol": ["embed_mse"]},
        {"classification": {"n_test": 6}}, {"classification": {"batch": 6}}, {"classification": {"lr": 0.01}},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_of_other_settings_is_never_used_again(change, toys):
    def computed(settings):
        row = settings.encoders[0]
        model, test = evaluate.prepare("classification", "toys", row, settings)
        record = evaluate.Cell(model, test, "embed", settings).run()
        return record["key"], records.record_path("toy", "classification", "toys", row.name, "standard", "embed")

    key, path = computed(planted.settings(encoders=ROWS))
    shown = path.read_bytes()
    assert computed(planted.settings(encoders=ROWS)) == (key, path) and path.read_bytes() == shown
    other, _ = computed(planted.settings(encoders=ROWS, **change))
    assert other != key and path.read_bytes() != shown
    assert computed(planted.settings(encoders=ROWS)) == (key, path) and path.read_bytes() == shown  # there and back


ROWS = [{"name": "planted", "timm": "embedded_vit"}]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_file_that_is_loaded_runs_code(toys, tmp_path):
    settings = planted.settings()
    made = deacl.made_from(planted.encoder(), settings)
    state = deacl.home("toy", "planted", made) / "state.pt"
    bomb = io.BytesIO()
    torch.save({"key": Payload(tmp_path / "executed"), "student": Payload(tmp_path / "executed")}, bomb)
    places = {
        "checkpoint.pth": lambda p: checkpoints.read(p),
        "checkpoint.safetensors": lambda p: checkpoints.read(p),
        "runs/toy/examples/depth.safetensors": lambda p: plots.load_example(p),
        "runs/toy/heads/depth__toys__planted__standard.safetensors": lambda p: records.reusable_tensors(p, made),
        "results/toy/depth/a__b__c__d.json": lambda p: records.read_record(p),
        state.relative_to(toys): lambda p: _finetuned(settings),
        f"runs/scenes/scenes-train-64x64-{scenes.VERSION}.safetensors": lambda p: scenes.cached(p.parent, "train", 1),
    }
    for place, load in places.items():
        (toys / place).parent.mkdir(parents=True, exist_ok=True)
        for content in (bomb.getvalue(), pickle.dumps(Payload(tmp_path / "executed"))):
            (toys / place).write_bytes(content)
            with contextlib.suppress(BadInput, SafetensorError):
                load(toys / place)
            assert not (tmp_path / "executed").exists(), place
