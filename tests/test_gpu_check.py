"""The first hour on a GPU, with the CPU in the place of the GPU: every step is tried, and what did not hold is said."""

import math
from collections.abc import Iterator

import gpu_check
import pytest
import torch

from ssl_robust import records
from ssl_robust.settings import BadInput

SMALL = gpu_check.Check("cpu", small=True)


def _text() -> str:
    return (records.runs_dir(gpu_check.HOME) / "report.md").read_text(encoding="utf-8")


def test_every_step_is_tried_and_the_file_says_what_held(root, monkeypatch, capsys):
    def lost(c: gpu_check.Check) -> Iterator[gpu_check.Point]:
        yield gpu_check.Point("a first point", "", "", True)
        raise BadInput("nothing here.")

    monkeypatch.setattr(gpu_check.contenders, "LEAST", 0.0)  # seconds that each contender is timed for
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "GOLDEN", -1.0)
        patch.setitem(gpu_check.STEPS, "memory", gpu_check.STEPS["memory"]._replace(work=lost))
        results = gpu_check.run(SMALL, one=gpu_check.take)
    assert [*results] == [*gpu_check.STEPS]
    assert {name: r["failed"] for name, r in results.items() if r["failed"]} == {"memory": "BadInput: nothing here."}
    held = {name: {p["held"] for p in r["points"]} for name, r in results.items()}
    assert held == {
        "unit_tests": {True}, "golden": {False}, "test_profile": {True, None}, "bench": {True, None},
        "quick_row": {True, None}, "memory": {True},
    }  # fmt: skip
    assert not gpu_check.fine(results)
    text = _text()
    assert "FAILED: BadInput: nothing here." in text and "5 of 6 steps are done" in text
    assert "| golden numbers of 'heads' | within -1 |" in text
    assert text.count("DID NOT HOLD") == len(results["golden"]["points"])
    assert "largest difference 0" in text and "values, none differs by more than 0.002" in text

    # what failed is tried again, and nothing else
    capsys.readouterr()
    results = gpu_check.run(SMALL, one=gpu_check.take)
    assert capsys.readouterr().out.count("done before") == len(gpu_check.STEPS) - 1
    assert not results["memory"]["failed"] and "6 of 6 steps are done" in _text() and "FAILED" not in _text()
    assert not gpu_check.fine(results)  # the golden numbers' bound was kept with their result


def test_a_step_has_its_own_process_and_its_time(root, monkeypatch):
    found = gpu_check.in_process("memory", SMALL)
    assert found == gpu_check.stored("memory", SMALL) and len(found["points"]) == len(gpu_check.SMALL)
    monkeypatch.setitem(gpu_check.STEPS, "memory", gpu_check.STEPS["memory"]._replace(minutes=0.001))
    late = gpu_check.in_process("memory", SMALL)
    assert late["failed"] == "not done after 0.001 minutes" and gpu_check.stored("memory", SMALL) is None


def test_another_run_of_the_gpu_that_differs_is_a_point_that_did_not_hold():
    point = gpu_check._apart("again", {"a": 0.5, "b": 0.25}, {"a": 0.5, "b": 0.251}, 0.0)
    assert point.held is False and point.seen == "largest difference 0.001 (b)"
    assert gpu_check._apart("fp32", {"a": 0.5}, {"a": 0.501}, 0.002).held
    assert not gpu_check._apart("no number", {"a": 0.5, "b": math.nan}, {"a": 0.5, "b": 0.5}, 0.002).held
    assert gpu_check._farthest([1.0, math.nan], [1.0, 2.0]) == math.inf


def test_a_machine_without_a_gpu_is_told_so(root, monkeypatch, capsys):
    def start(*_: object, **__: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch, "zeros", start)
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("No CUDA GPU is usable here (The NVIDIA driver on your system is")
    assert not records.runs_dir(gpu_check.HOME).exists()


@pytest.mark.parametrize("name", ["unit_tests", "golden"])
def test_what_it_names_is_there(name):
    import golden

    files = {path.stem.removeprefix("test_") for path in (gpu_check.PROJECT / "tests").glob("test_*.py")}
    assert set(gpu_check.TESTS) <= files if name == "unit_tests" else set(gpu_check.PROBES) <= set(golden.PROBES)
