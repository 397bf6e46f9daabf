"""Files are written whole or not at all, and hashes change with what a result was made from and nothing else."""

import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from ssl_robust import records
from ssl_robust.ops import run
from ssl_robust.settings import BadInput
from ssl_robust.trust import differ


def test_a_failing_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = records.write_json({"value": 1}, tmp_path / "deep" / "r.json")

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(BadInput, match=r"r.json cannot be written \(No space.*\): free some .*; .* is kept"):
        records.write_json({"value": 2}, path)
    assert records.read_json(path) == {"value": 1}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]  # no half file is left


def test_what_killed_processes_left_is_swept_up_but_not_what_others_are_writing(tmp_path):
    old, new = tmp_path / "deep" / ".r.json.1.part", tmp_path / ".r.json.2.part"
    old.parent.mkdir()
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (1, 1))
    run.sweep(tmp_path)
    assert not old.exists() and new.exists()


def test_values_that_json_lacks_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        records.write_json({"value": float("nan")}, tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("content", [b'{"key": "a', b"", b"\xff\xfe"])
def test_damaged_json_is_named_and_never_reused(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="r.json is damaged.*delete"):
        records.read_json(path)
    assert records.reusable(path, records.made_from(())) is None


def _result(folder, value=1, loops=("pgd",), **inputs):
    """A record of what it is made from, on disk; its place and that."""
    made = records.made_from(loops, **inputs)
    path = records.place(folder, "a__b", made, ".json")
    about = {"schema": records.SCHEMA, "key": records.digest(made), "made_from": made, "value": value}
    return records.write_record(about, path), made


def test_a_record_is_reused_only_for_its_own_key(tmp_path):
    path, made = _result(tmp_path, seed=0)
    other, made_other = _result(tmp_path, value=2, seed=1)
    assert path != other and records.reusable(path, made)["value"] == 1
    shutil.copy(other, path)  # one that does not belong there
    assert records.reusable(path, made) is None and records.reusable(other, made_other)["value"] == 2
    assert records.reusable(tmp_path / "none.json", made) is None


def test_another_version_of_what_computes_makes_another_key_and_of_what_does_not_the_same(tmp_path, monkeypatch):
    path, made = _result(tmp_path, seed=0)
    monkeypatch.setitem(records.VERSIONS, "deacl", 2)
    assert records.made_from(("pgd",), seed=0) == made
    monkeypatch.setitem(records.VERSIONS, "pgd", 2)
    now = records.made_from(("pgd",), seed=0)
    assert records.place(tmp_path, "a__b", now, ".json") != path
    assert differ.why(records.place(tmp_path, "a__b", now, ".json"), now) == ["the code's version of pgd (1, now 2)"]


def test_why_names_what_differs_from_the_nearest_result(tmp_path):
    for seed, eps in ((0, 0.1), (0, 0.2), (1, 0.3)):
        _result(tmp_path, seed=seed, settings={"attack": {"eps": eps}}, hashes={"weights": "a"})
    made = records.made_from(("pgd",), seed=1, settings={"attack": {"eps": 0.25}}, hashes={"weights": "a"})
    path = records.place(tmp_path, "a__b", made, ".json")
    assert differ.why(path, made) == ["the setting attack.eps (0.3, now 0.25)"]
    made = records.made_from(("pgd",), seed=1, settings={"attack": {"eps": 0.3}}, hashes={"weights": "b"})
    assert differ.why(path, made) == ["the hash of the weights"]
    assert differ.why(records.place(tmp_path, "other", made, ".json"), made) == []


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_keep_accepts_what_differs_in_a_version_alone_and_says_so(tmp_path, monkeypatch, suffix):
    path, made = _result(tmp_path, seed=0)
    tensors = {"a": torch.arange(3.0)}
    records.write_tensors(tensors, records.about(made), path.with_suffix(".safetensors"))
    monkeypatch.setitem(records.VERSIONS, "pgd", 2)
    now, other = records.made_from(("pgd",), seed=0), records.made_from(("pgd",), seed=1)
    places = [records.place(tmp_path, "a__b", m, suffix) for m in (now, other)]
    read = records.reusable if suffix == ".json" else records.reusable_tensors
    before = path.read_bytes()
    assert read(places[0], now) is None
    with monkeypatch.context() as keeping:
        keeping.setattr(records, "keeping", True)
        assert read(places[1], other) is None and not places[1].exists()  # another seed is no version
        assert read(places[0], now) is not None
    found = read(places[0], now)
    assert path.read_bytes() == before  # the old one stays, for the old version
    if suffix == ".json":
        assert found["value"] == 1 and found["kept"] == [{"loops": {"pgd": 1}}]
    else:
        assert torch.equal(found[0]["a"], tensors["a"]) and found[1]["kept"] == '[{"loops": {"pgd": 1}}]'


def test_records_are_found_and_stages_are_not_among_them(root):
    path = records.record_path("p", "depth", "scenes", "vit", "standard", "embed")
    assert path == root / "results" / "p" / "depth" / "scenes__vit__standard__embed.json"
    records.write_json({"value": 3}, path)
    records.finish("p", "05_attack_depth", rows=1)
    assert records.read_records(root / "results" / "p") == [{"value": 3}]


def test_state_hash_sees_value_name_type_and_shape():
    state = {"a": torch.zeros(2, 3), "step": torch.tensor(0)}
    others = [
        {**state, "a": torch.zeros(2, 3).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1e-30))},
        {"b": state["a"], "step": state["step"]},
        {**state, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**state, "a": torch.zeros(3, 2)},
        {"a": state["a"]},
    ]
    assert len({records.state_hash(s) for s in [state, *others]}) == 6
    assert records.state_hash({k: v.clone() for k, v in reversed(state.items())}) == records.state_hash(state)


def test_digest_is_independent_of_key_order():
    assert records.digest({"a": 1, "b": 2}) == records.digest({"b": 2, "a": 1}) != records.digest({"a": 1, "b": 3})


def test_provenance_says_where_and_with_what():
    found = records.provenance("cpu")
    assert set(found) == {"git", "versions", "device", "threads", "numerics", "made"}
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] in torch.__version__
    )
    assert set(found["versions"]) == {"python", *records.PACKAGES}
    assert found["device"].startswith("cpu (") and found["threads"] >= 1 and found["made"].endswith("+00:00")


def git(folder, *words):
    run = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A small project in a repository of its own, all of it committed."""
    for name in ("ssl_robust", "notebooks", "params", "figures/committed/demo"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("__init__.py", "records.py", "settings.py", "tasks.py"):
        shutil.copy(records.PACKAGE / name, tmp_path / "ssl_robust")
    for name in ("notebooks/00.ipynb", "params/demo.yaml", "figures/committed/demo/table1.md", "README.md"):
        (tmp_path / name).write_text("as committed")
    (tmp_path / ".gitignore").write_text("__pycache__/\n/results/\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    return tmp_path


def test_git_revision_has_a_plus_for_changed_code_alone(checkout):
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert len(commit) == 12 and records._revision(checkout) == commit
    for name in ("README.md", "figures/committed/demo/table1.md"):
        (checkout / name).write_text("made anew")
    for name in ("results/r.json", "ssl_robust/__pycache__/a.pyc", "figures/demo/table1.md"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("new")
    assert records._revision(checkout) == commit
    for name in ("ssl_robust/settings.py", "notebooks/00.ipynb", "params/demo.yaml"):
        before = (checkout / name).read_text()
        (checkout / name).write_text("changed")
        assert records._revision(checkout) == commit + "+", name
        (checkout / name).write_text(before)
    assert records._revision(checkout) == commit
    (checkout / "params/mine.yaml").write_text("untracked")
    assert records._revision(checkout) == commit + "+"
    git(checkout, "add", "params/mine.yaml")
    assert records._revision(checkout) == commit + "+"
    git(checkout, "commit", "--quiet", "-m", "mine", "params")
    assert records._revision(checkout) == git(checkout, "rev-parse", "--short=12", "HEAD") != commit


def test_git_revision_is_unknown_outside_a_checkout(tmp_path, checkout):
    inside = checkout / "results" / "site-packages"  # of a repository that has nothing to do with it
    (inside / "ssl_robust").mkdir(parents=True)
    assert records._revision(inside) == "unknown"
    shutil.rmtree(checkout / ".git")
    assert records._revision(checkout) == "unknown"


def test_code_that_changes_while_a_process_runs_does_not_count(checkout):
    program = """
import pathlib, sys
from ssl_robust import records
from ssl_robust.ops import run
for name in sys.argv[1:]:
    path = pathlib.Path(name)
    path.write_text(path.read_text().replace('"pgd": 1', '"pgd": 2'))
print(records.digest(records.made_from(("pgd",))), records.REVISION)
"""

    def said(*edited):
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
        run = [sys.executable, "-c", program, *edited]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment, cwd=checkout)
        return done.stdout.split()

    before, during, after = said(), said(checkout / "ssl_robust" / "records.py"), said()
    assert before == during and after[0] != before[0] and after[1] == before[1] + "+"


def test_words_of_the_code_are_part_of_no_key(checkout):
    program = "from ssl_robust import records; print(records.digest(records.made_from(('pgd',), seed=0)))"

    def said():
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
        run = [sys.executable, "-c", program]
        return subprocess.run(run, capture_output=True, text=True, check=True, env=environment, cwd=checkout).stdout

    before = said()
    for name, words, others in (
        ("records.py", "free some space or", "make some room or"),
        ("settings.py", "choose another name", "take another name"),
    ):
        path = checkout / "ssl_robust" / name
        text = path.read_text()
        assert words in text
        path.write_text(text.replace(words, others) + "\n\ndef one_more():\n    return 1  # of no use\n")
    assert said() == before


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert records.pick_device("auto") == records.pick_device("cpu") == "cpu"
    with pytest.raises(BadInput, match="no CUDA GPU"):
        records.pick_device("cuda")


def test_a_gpu_on_which_cuda_does_not_start_is_none(monkeypatch, capsys):
    """As with a driver older than torch's CUDA: the driver names a GPU, and whatever is computed on it fails."""
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(records.CUDA, "to be restored as it was")
    monkeypatch.delenv(records.CUDA)

    def run(command, **about):
        started.append(command[0])
        return subprocess.CompletedProcess(command, 1, "", OLD_DRIVER)

    monkeypatch.setattr(records.subprocess, "run", run)
    assert records.pick_device("auto") == records.pick_device("auto") == "cpu"
    assert started == [sys.executable]  # once, also for the processes that inherit the environment
    why = r"CUDA does not start .*\(The NVIDIA driver on your system is too old \(found version 12020\)\)"
    assert re.fullmatch(rf"{why}, so the CPU computes; update its driver.*\n", capsys.readouterr().err)
    with pytest.raises(BadInput, match=rf"^The setting device is 'cuda' but {why}; update its driver"):
        records.pick_device("cuda")
    monkeypatch.setenv(records.CUDA, "")
    assert records.pick_device("auto") == records.pick_device("cuda") == "cuda"


def test_that_cuda_does_not_start_is_tried(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # also where there is a GPU
    assert re.search("(?i)cuda|nvidia", records._cuda_fails())


OLD_DRIVER = """Traceback (most recent call last):
  File "<string>", line 1, in <module>
RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver
"""


def test_a_notebook_that_has_not_run_is_named(root):
    with pytest.raises(BadInput, match="01_heads has not run for profile 'p'"):
        records.need("p", "01_heads")
    records.finish("p", "01_heads", rows=3)
    assert records.need("p", "01_heads") == {"notebook": "01_heads", "profile": "p", "rows": 3}
