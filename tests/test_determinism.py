"""The same seed on the same machine gives the same tables, bit for bit, and records say what differs when it does."""

import torch
from chain import STAGES, numbers, play, tables, undisturbed  # noqa: F401

from ssl_robust.trust import differ


def test_two_fresh_runs_give_the_same_tables_bit_for_bit(undisturbed, tmp_path):  # noqa: F811
    torch.rand(1000)  # what this process drew before must not matter
    for notebook in STAGES:
        play(notebook, tmp_path)
    again = tables(tmp_path)
    assert {"table1.csv", "table2.csv", "table3.csv", "fig2.csv"} <= again.keys()
    assert again == tables(undisturbed)
    assert numbers(tmp_path) == numbers(undisturbed) and len(numbers(tmp_path)) >= 27
    for one, other in zip(*map(_sorted, (tmp_path, undisturbed)), strict=True):
        assert differ.differing(one, other) == {}


def _sorted(root):
    return [record for _, record in sorted(numbers(root).items())]


RECORD = {
    "schema": 2, "value": 0.5, "seed": 0, "attack": "task", "settings": {"attack": {"eps": 0.03, "steps": 20}},
    "hashes": {"weights": "a", "head": "b"}, "git": "1", "versions": {"torch": "2.13", "numpy": "2.0"},
    "device": "cpu (x86_64)", "threads": 1, "numerics": {"instructions": "AVX2", "environment": {}}, "seconds": 1,
}  # fmt: skip


def test_equal_records_do_not_differ_and_the_clock_does_not_count():
    assert differ.differing(RECORD, {**RECORD, "seconds": 9, "made": "later", "value": 0.6}) == {}


def test_differences_are_named():
    other = RECORD | {
        "threads": 2, "device": "cuda (H100)", "versions": {"torch": "2.14", "numpy": "2.0"}, "seed": 1,
        "settings": {"attack": {"eps": 0.03, "steps": 40}}, "hashes": {"weights": "a", "head": "c"},
        "numerics": {"instructions": "AVX512", "environment": {"OMP_NUM_THREADS": "2"}},
    }  # fmt: skip
    assert [*differ.differing(RECORD, other).items()] == [
        ("the setting attack.steps", (20, 40)), ("the seed", (0, 1)), ("the hash of the head", ("b", "c")),
        ("the version of torch", ("2.13", "2.14")), ("the device", ("cpu (x86_64)", "cuda (H100)")),
        ("the number of threads", (1, 2)), ("the CPU's or GPU's instructions", ("AVX2", "AVX512")),
        ("the CPU's or GPU's environment.OMP_NUM_THREADS", ("none", "2")),
    ]  # fmt: skip
