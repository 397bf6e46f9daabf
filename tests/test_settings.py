"""Every parameter is checked before any work, and each refusal is one sentence with the name and the remedy."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from ssl_robust.settings import Attack, BadInput, DeACL, Segmentation, check, read_params

TASK = {"epochs": 1, "batch": 1, "lr": 0.1}
PARAMS = sorted((Path(__file__).parents[1] / "params").glob("*.yaml"))

REFUSED = [
    ({"epz": 1}, "Unknown parameter 'epz'"),
    ({"attack": {"epss": 0.1}}, "Unknown parameter 'attack.epss'"),
    ({"attack": {"eps": "8/255"}}, "'attack.eps' must be a number but is the text '8/255'; write 0.031372549 instead"),
    ({"deacl": {"lr": "1e-3"}}, "'deacl.lr' must be a number but is the text '1e-3'; write 0.001 instead"),
    ({"attack": {"eps": "8/0"}}, "'attack.eps' must be a number but is the text '8/0'; write it as a plain decimal"),
    ({"attack": {"eps": -0.1}}, "'attack.eps' is -0.1"),
    ({"attack": {"eps": 8}}, "'attack.eps' is 8"),
    ({"attack": {"eps": float("nan")}}, "'attack.eps' is nan"),
    ({"deacl": {"lr": float("inf")}}, "'deacl.lr' is inf"),
    ({"attack": {"steps": 20.5}}, "'attack.steps' is 20.5"),
    ({"attack": {"steps": 20.0}}, "'attack.steps' is 20.0"),
    ({"attack": {"steps": True}}, "'attack.steps' is True"),
    ({"attack": {"steps": 0}}, "'attack.steps' is 0"),
    ({"deacl": {"epochs": 5, "checkpoints": [2, 6]}}, "'deacl': checkpoints [6] lie outside 1..5"),
    ({"deacl": {"attack_on": "both"}}, "'deacl.attack_on' is 'both'"),
    ({"encoders": []}, "'encoders' is []"),
    ({"encoders": [{"name": "a"}, {"name": "a"}]}, "encoder names ['a', 'a'] are not unique"),
    ({"encoders": [{"name": "a/b"}]}, "'encoders.0.name' is 'a/b'"),
    ({"encoders": [{"name": "a", "normalise": {"mean": [0.5], "std": [1.0] * 3}}]}, "'encoders.0.normalise.mean'"),
    ({"encoders": [{"name": "a", "normalise": "imagnet"}]}, "'encoders.0.normalise' is 'imagnet'"),
    (
        {"encoders": [{"name": "a", "call": "m:f", "timm": "resnet18"}]},
        "'encoders.0': 'a' has a 'call'; remove its timm",
    ),
    ({"encoders": [{"name": "a", "deacl_checkpoint": "r.pth"}]}, "'a' has a deacl_checkpoint but not the defense"),
    ({"protocol": "realeased"}, "'protocol' is 'realeased'"),
    ({"protocol": ["no_such_difference"]}, "'protocol"),
    ({"encoders": [{"name": "a", "defenses": ["trades"]}]}, "'encoders.0.defenses.0' is 'trades'"),
    ({"classification": {"epochs": 1, "batch": 1}}, "'classification.lr' is missing"),
    ({"classification": {**TASK, "lr": 0}}, "'classification.lr' is 0"),
    ({"classification": {**TASK, "datasets": []}}, "'classification.datasets' is []"),
    ({"depth": {**TASK, "size": "natve"}}, "'depth.size': 'natve' is no size"),
    ({"depth": {**TASK, "size": 0}}, "'depth.size': 0 is no size"),
    ({"segmentation": {**TASK, "stride": 1.5}}, "'segmentation.stride' is 1.5"),
    ({"device": "gpu"}, "'device' is 'gpu'"),
    ({"profile": "my profile"}, "'profile' is 'my profile'"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[w for _, w in REFUSED])
def test_refusals_are_one_sentence(change, words):
    with pytest.raises(BadInput) as refusal:
        check(**{"profile": "x", "encoders": [{"name": "a"}]} | change)
    message = str(refusal.value)
    assert words in message
    assert ";" in message and message.endswith(".") and ". " not in message and "\n" not in message


def test_a_missing_profile_is_named():
    with pytest.raises(BadInput, match="'profile' is missing"):
        check(encoders=[{"name": "a"}])


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError):
        Attack().eps = 0.5


def test_defaults_are_the_papers():
    attack, deacl = Attack(), DeACL()
    assert (attack.eps, attack.step, attack.steps, attack.best) == (8 / 255, 2 / 255, 20, False)
    assert (deacl.lr, deacl.momentum, deacl.weight_decay, deacl.epochs, deacl.warmup_epochs) == (0.05, 0.9, 0, 100, 10)
    assert (deacl.batch, deacl.gamma, deacl.eps, deacl.step, deacl.steps) == (128, 2, 4 / 255, 2 / 255, 5)
    assert deacl.attack_on == "trained"
    assert Segmentation(**TASK).stride == 341 / 518


def test_sections_by_name():
    settings = check(profile="x", encoders=[{"name": "a"}], depth={**TASK, "size": "original"})
    assert settings.task("depth").size == "original"
    for name in ("segmentation", "attack"):  # not set; no task
        with pytest.raises(BadInput, match=f"no section '{name}'"):
            settings.task(name)


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_parameter_files_are_valid(path):
    assert check(**read_params(path)).profile == path.stem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"profile: other\n", "must say 'profile: mine'"),
        (b"profile: mine\nseed: [1,\n", "not valid YAML near line 3"),
        (b"profile: m\xe9ne\n", "not valid YAML"),
        (b"", "holds no parameters"),
        (b"- profile\n", "holds no parameters"),
    ],
)
def test_bad_parameter_files(tmp_path, content, words):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(BadInput, match="mine.yaml") as refusal:
        read_params(tmp_path / "mine.yaml")
    assert words in str(refusal.value)


def test_a_missing_profile_file_lists_the_others(tmp_path):
    (tmp_path / "demo.yaml").touch()
    (tmp_path / "quick.yaml").touch()
    with pytest.raises(BadInput, match="no profile 'papr'.*choose one of: demo, quick"):
        read_params(tmp_path / "papr.yaml")
