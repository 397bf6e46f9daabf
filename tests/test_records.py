"""Files are written whole or not at all, and hashes change with what a result was made from and nothing else."""

import errno
import os

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
    (folder / "module.py").write_text(text)
    monkeypatch.setattr(records, "PACKAGE", folder)
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


def test_git_revision_is_unknown_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PACKAGE", tmp_path)
    assert records.git_revision.__wrapped__() == "unknown"


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
