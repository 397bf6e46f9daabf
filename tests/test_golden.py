"""Golden numbers: what loops compute moves neither with the machine nor with what is added, but with arithmetic."""

import os
import subprocess
import sys
from pathlib import Path

import golden
import planted
import pytest
import torch

from ssl_robust import attacks, datasets, deacl, encoders, heads, metrics, parts, records, training, vit
from ssl_robust.embedded import scenes
from ssl_robust.protocols import released
from ssl_robust.settings import BadInput
from ssl_robust.strong import apgd
from ssl_robust.trust import sanity


def test_nothing_has_moved_and_every_loop_has_golden_numbers():
    assert golden.moved() == []
    assert set(golden.golden()) == set(records.VERSIONS) == set(golden.PROBES)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instructions_and_threads_give_the_same_numbers(capability):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    program = "import torch; import golden; print(torch.get_num_threads(), golden.moved())"
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment, cwd=Path(__file__).parent)
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
    "training": lambda m: m.setattr(training, "_order", lambda n, batch, seed: list(range(n))),
    "metrics": lambda m: m.setattr(metrics, "valid_depth", lambda depth: depth >= 0),
    "pgd": lambda m: m.setattr(attacks, "random_start", lambda x, eps, ids, seed: x),
    "embed": lambda m: m.setattr(attacks, "embed_loss", lambda model, x, *more: lambda adv, t: adv.flatten(1).sum(1)),
    "task": lambda m: m.setattr(attacks, "segpgd", lambda parts, weight: parts.sum(-1)),
    "strong": lambda m: m.setattr(apgd, "MOMENTUM", 0.0),
    "deacl": lambda m: m.setattr(deacl, "learning_rate", _scaled(deacl.learning_rate)),
    "released": lambda m: m.setattr(released, "SCALES", (1, 2, 4, 8)),
    "checks": lambda m: m.setattr(sanity, "gain", lambda b, weaker, stronger: (0.0, 0.0)),
}


@pytest.mark.parametrize("name", MOVES)
def test_arithmetic_that_changes_is_named(name, monkeypatch):
    MOVES[name](monkeypatch)
    monkeypatch.setattr(records, "VERSIONS", {name: records.VERSIONS[name]})  # the others take their time
    said = golden.moved()
    assert (
        len(said) == 1
        and said[0].startswith(f"What '{name}' computes has changed (")
        and f"raise VERSIONS['{name}'] in ssl_robust/records.py" in said[0]
    )


def test_another_version_needs_numbers_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(golden, "FILE", tmp_path / "golden.json")
    monkeypatch.setattr(records, "VERSIONS", {"encoders": 1, "heads": 1})
    stored = golden.write()
    assert set(stored) == set(records.VERSIONS) and golden.write() == [] == golden.moved()
    monkeypatch.setattr(vit, "resample", _scaled(vit.resample))
    with pytest.raises(BadInput, match="What 'encoders' computes has changed"):
        golden.write()
    monkeypatch.setitem(records.VERSIONS, "encoders", 2)
    assert golden.moved() == ["Version 2 of 'encoders' has no golden numbers; run python tests/golden.py."]
    assert golden.write() == ["encoders"] and golden.moved() == []


def test_what_is_added_moves_nothing(monkeypatch):
    monkeypatch.setitem(encoders.KNOWN, "one_more", encoders.Known("resnet18", 64))
    monkeypatch.setitem(datasets.DATASETS, "toys", planted.TOYS)
    monkeypatch.setitem(parts.table("strong", "ATTACKS"), "another", attacks.Kind("Another", lambda model, x, *_: x))
    assert golden.moved() == []


def test_probes_leave_the_random_state_alone():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    for name in golden.PROBES:
        golden.probe(name)
    assert torch.equal(torch.random.get_rng_state(), before)
