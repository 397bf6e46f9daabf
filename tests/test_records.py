"""Files are written whole or not at all, and hashes change with what a result was made from and nothing else."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch

from ssl_robust import records
from ssl_robust.settings import BadInput

MODULE = '"""About."""\n\n\ndef double(x):\n    """Twice x."""\n    return 2 * x  # as said\n'


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, r"^The disk of .*deep is full \(r.json: No space.*\); free some space there and repeat"),
        (errno.EDQUOT, "The disk of .*deep is full"),
        (errno.EROFS, "deep cannot be written to .*Read-only.*; make it writable or use a copy"),
        (errno.EACCES, "deep cannot be written to .*denied.*; make it writable"),
        (errno.EIO, "r.json cannot be written .*; put that right and repeat"),
    ],
)
def test_a_failing_write_leaves_the_old_file_alone(code, words, tmp_path, monkeypatch):
    path = records.write_json({"value": 1}, tmp_path / "deep" / "r.json")

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(BadInput, match=words):
        records.write_json({"value": 2}, path)
    assert records.read_json(path) == {"value": 1}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]  # no half file is left


def test_what_killed_processes_left_is_swept_up_but_not_what_others_are_writing(tmp_path):
    old, new = tmp_path / "deep" / ".r.json.1.part", tmp_path / ".r.json.2.part"
    old.parent.mkdir()
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (1, 1))
    records.sweep(tmp_path)
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
    assert records.reusable(path, "a") is None


def test_a_record_is_reused_only_for_its_own_key(tmp_path):
    path = records.write_json({"key": "a", "value": 1}, tmp_path / "r.json")
    assert records.reusable(path, "a") == {"key": "a", "value": 1}
    assert records.reusable(path, "b") is None
    assert records.reusable(tmp_path / "none.json", "a") is None


def test_records_are_found_and_stages_are_not_among_them(root):
    path = records.record_path("p", "depth", "scenes", "vit", "standard", "embed")
    assert path == root / "results" / "p" / "depth" / "scenes__vit__standard__embed.json"
    records.write_json({"value": 3}, path)
    records.finish("p", "05_attack_depth", rows=1)
    assert records.read_records(root / "results" / "p") == [{"value": 3}]


def _code_hash(folder, text, monkeypatch):
    monkeypatch.setitem(records.SOURCES, "module", text)
    return records.code_hash.__wrapped__("module")


def test_code_hash_counts_code_alone(tmp_path, monkeypatch):
    before = _code_hash(tmp_path, MODULE, monkeypatch)
    words = (
        MODULE.replace("About", "Other").replace("Twice x", "Two x").replace("  # as said", "").replace("\n\n", "\n")
    )
    assert _code_hash(tmp_path, words, monkeypatch) == before
    assert _code_hash(tmp_path, MODULE.replace("2 * x", "3 * x"), monkeypatch) != before
    assert _code_hash(tmp_path, MODULE + 'name = "a text that is no docstring"\n', monkeypatch) != before


def test_code_hash_names_different_modules_differently():
    assert records.code_hash("metrics") != records.code_hash("metrics", "heads")
    assert records.code_hash("metrics", "heads") == records.code_hash("heads", "metrics")


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
    for name in ("__init__.py", "records.py", "settings.py"):
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
for name in sys.argv[1:]:
    pathlib.Path(name).write_text(records.SOURCES["settings"] + "FURTHER = 1")
print(records.code_hash("settings"), records.REVISION)
"""

    def said(*edited):
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
        run = [sys.executable, "-c", program, *edited]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment, cwd=checkout)
        return done.stdout.split()

    before, during, after = said(), said(checkout / "ssl_robust" / "settings.py"), said()
    assert before == during and after[0] != before[0] and after[1] == before[1] + "+"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert records.pick_device("auto") == records.pick_device("cpu") == "cpu"
    with pytest.raises(BadInput, match="no CUDA GPU"):
        records.pick_device("cuda")


def test_a_notebook_that_has_not_run_is_named(root):
    with pytest.raises(BadInput, match="01_heads has not run for profile 'p'"):
        records.need("p", "01_heads")
    records.finish("p", "01_heads", rows=3)
    assert records.need("p", "01_heads") == {"notebook": "01_heads", "profile": "p", "rows": 3}
