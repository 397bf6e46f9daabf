"""Golden numbers: what loops compute moves neither with the machine nor with what is added, but with arithmetic."""

import os
import subprocess
import sys

import planted
import pytest
import torch

from ssl_robust import attacks, datasets, deacl, encoders, heads, metrics, records, strong, vit  # fmt: skip
from ssl_robust.embedded import scenes  # fmt: skip
from ssl_robust.ops import versions  # fmt: skip
from ssl_robust.protocols import released  # fmt: skip
from ssl_robust.settings import BadInput
from ssl_robust.trust import sanity  # fmt: skip


def test_nothing_has_moved_and_every_loop_has_golden_numbers():
    assert versions.moved() == []
    assert set(versions.golden()) == set(records.VERSIONS) == set(versions.PROBES)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instructions_and_threads_give_the_same_numbers(capability):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    program = "import torch; from ssl_robust.ops import versions; print(torch.get_num_threads(), versions.moved())"
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "2 []\n"


def _without_sign(x, loss_fn, attack, start=None, *args, **kwargs):
    return (x if start is None else start).clone()


def _scaled(function, factor=1.01):
    """A function whose numbers are a hundredth larger."""
    return lambda *args, **kwargs: factor * function(*args, **kwargs)


def _nearest(positions, grid, *how):
    square = positions.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(square, grid).flatten(2).transpose(1, 2)


MOVES = {
    "scenes": lambda m: m.setattr(scenes, "SPLITS", {**scenes.SPLITS, "train": 102}),
    "data": lambda m: m.setattr(datasets, "image_seed", lambda seed, name: 1),
    "encoders": lambda m: m.setattr(vit, "resample", _nearest),
    "heads": lambda m: m.setattr(heads, "MIN_DEPTH", 0.1),
    "training": lambda m: m.setattr(heads, "_order", lambda n, batch, seed: list(range(n))),
    "metrics": lambda m: m.setattr(metrics, "valid_depth", lambda depth: depth >= 0),
    "pgd": lambda m: m.setattr(attacks, "random_start", lambda x, eps, ids, seed: x),
    "embed": lambda m: m.setattr(attacks, "embed_loss", lambda model, x, *more: lambda adv, t: adv.flatten(1).sum(1)),
    "task": lambda m: m.setattr(attacks, "segpgd", lambda parts, weight: parts.sum(-1)),
    "strong": lambda m: m.setattr(strong, "MOMENTUM", 0.0),
    "deacl": lambda m: m.setattr(deacl, "learning_rate", _scaled(deacl.learning_rate)),
    "released": lambda m: m.setattr(released, "SCALES", (1, 2, 4, 8)),
    "checks": lambda m: m.setattr(sanity, "gain", lambda b, weaker, stronger: (0.0, 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_arithmetic_that_changes_is_named(name, monkeypatch):
    MOVES[name](monkeypatch)
    monkeypatch.setattr(records, "VERSIONS", {name: records.VERSIONS[name]})  # the others take their time
    said = versions.moved()
    assert (
        len(said) == 1
        and said[0].startswith(f"What '{name}' computes has changed (")
        and f"raise VERSIONS['{name}'] in ssl_robust/records.py" in said[0]
    )


def test_another_version_needs_numbers_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "FILE", tmp_path / "versions.json")
    monkeypatch.setattr(records, "VERSIONS", {"encoders": 1, "heads": 1})
    stored = versions.write()
    assert set(stored) == set(records.VERSIONS) and versions.write() == [] == versions.moved()
    monkeypatch.setattr(vit, "resample", _scaled(vit.resample))
    with pytest.raises(BadInput, match="What 'encoders' computes has changed"):
        versions.write()
    monkeypatch.setitem(records.VERSIONS, "encoders", 2)
    assert versions.moved() == ["Version 2 of 'encoders' has no golden numbers; run python -m ssl_robust.ops.versions."]
    assert versions.write() == ["encoders"] and versions.moved() == []


def test_what_is_added_moves_nothing(monkeypatch):
    monkeypatch.setitem(encoders.KNOWN, "one_more", encoders.Known("resnet18", 64))
    monkeypatch.setitem(datasets.DATASETS, "toys", planted.TOYS)
    monkeypatch.setitem(strong.NAMES, "segmentation", (*strong.NAMES["segmentation"], "another"))
    original = strong.attacked
    monkeypatch.setattr(
        strong, "attacked", lambda name, model, x, *rest: x if name == "another" else original(name, model, x, *rest)
    )
    assert versions.moved() == []


def test_probes_leave_the_random_state_alone():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    for name in versions.PROBES:
        versions.probe(name)
    assert torch.equal(torch.random.get_rng_state(), before)
