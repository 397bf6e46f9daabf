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
    ({"attack": {"eps": "300/255"}}, "'attack.eps' is 1.176"),
    (
        {"attack": {"eps": "-8/255"}},
        "'attack.eps' must be a number but is the text '-8/255'; write -0.031372549 instead",
    ),
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
    ({"profile": "-n"}, "'profile' is '-n'"),
    ({"profile": "Committed"}, "'Committed' is the folder of the committed examples"),
    ({"epochs-1": 1}, "Unknown parameter 'epochs-1'"),
    ({"a\nb": 1}, r"Unknown parameter 'a\nb'"),
    ({"x" * 9999: 1}, "Unknown parameter 'xxx"),
    ({"attack": {"best": "yes"}}, "'attack.best' is 'yes': input should be a valid boolean; write true or false"),
    ({"attacks": ["embed"]}, "'attacks': ['embed'] must hold embed and task"),
    ({"attacks": ["embed", "task", "embed"]}, "no name twice"),
    ({"attacks": ["embed", "task", {"name": "task", "call": "a:b"}]}, "no name twice"),
    ({"seed": "9" * 9999}, "'seed' must be a number but is the text '999"),
    ({"seed": 2**64 - 1}, "'seed' is 18446744073709551615"),
    ({"seeds": [2**63]}, "'seeds.0' is 9223372036854775808"),
    ({"data_seed": 2**63}, "'data_seed' is 9223372036854775808"),
    ({"depth": {**TASK, "lr": 1e300}}, "'depth.lr' is 1e+300"),
    ({"depth": {**TASK, "weight_decay": 1e12}}, "'depth.weight_decay' is 1"),
    ({"depth": {**TASK, "n_test": 10**12}}, "'depth.n_test' is 1000000000000"),
    ({"depth": {**TASK, "epochs": 10**15}}, "'depth.epochs' is 1000000000000000"),
    ({"depth": {**TASK, "size": 10**6}}, "'depth.size': 1000000 is no size"),
    ({"sanity": {"n": 10**9}}, "'sanity.n' is 1000000000"),
    ({"deacl": {"gamma": 1e308}}, "'deacl.gamma' is 1e+308"),
    ({"deacl": {"lr": 1e12}}, "'deacl.lr' is 1"),
]


@pytest.mark.parametrize("text", ["8/255", " 8 / 255 ", "0.5/255", "1/32", "0/255"])
def test_pixels_are_read_as_people_write_them_to_the_last_bit(text):
    top, bottom = map(float, text.split("/"))
    settings = check(
        profile="x", encoders=[{"name": "a"}], attack={"eps": text}, deacl={"step": text}, sanity={"eps": [0.0, text]}
    )
    assert settings.attack.eps == settings.deacl.step == settings.sanity.eps[1] == top / bottom


def test_pixels_are_written_so_where_that_says_the_same():
    exact = check(
        profile="x", encoders=[{"name": "a"}], attack={"eps": 8 / 255, "step": 0.01}, sanity={"eps": [0.0, 2.5 / 255]}
    )
    numbers, texts = exact.model_dump(), exact.model_dump(context="written")
    assert numbers["attack"]["eps"] == 8 / 255 and texts["attack"] == numbers["attack"] | {"eps": "8/255"}
    assert texts["sanity"]["eps"] == [0.0, "2.5/255"] and check(**texts) == exact


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


BOMB = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
HEAD = "profile: mine\nencoders: [{name: a}]\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("profile: other\n", "must say 'profile: mine'"),
        ("profile: mine\nseed: [1,\n", "not valid YAML near line 3"),
        ("profile: mine\n\nseed: \a\n", "not valid YAML (no text"),
        (b"profile: mine\nname: m\xe9ne\n", "not valid YAML (no text"),
        ("", "holds no parameters"),
        ("- profile\n", "holds no parameters"),
        ("profile: mine\nseed: 1\nseed: 2\n", "near line 3 ('seed' stands there twice); correct it"),
        ("profile: mine\nattack:\n  eps: 0.1\n  eps: 0.2\n", "near line 4 ('eps' stands there twice)"),
        ("profile: mine\n1: 2\n", "near line 2 ('1' is no name)"),
        ("profile: mine\n? [a]\n: 2\n", "near line 2"),
        ("profile: mine\nseed: " + "[" * 2000, "nested too far"),
        ("profile: mine\nseed: !!python/object/apply:os.getpid []\n", "not valid YAML near line 2"),
    ],
)
def test_bad_parameter_files(tmp_path, content, words):
    (tmp_path / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match="^params/mine.yaml") as refusal:
        read_params(tmp_path / "mine.yaml")
    assert words in str(refusal.value) and str(refusal.value).endswith(".") and len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("10", 10), ("-1", -1), ("+7", 7), ("0", 0), ("1.5", 1.5), (".5", 0.5), ("1.", 1.0), ("1e-3", 0.001),
        ("1E+2", 100.0), ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
        ("[1, 2e-1]", [1, 0.2]),
        # texts, though YAML 1.1 takes them for 8, 90, 16, 1000, truths and a date
        ("010", "010"), ("1:30", "1:30"), ("0x10", "0x10"), ("1_000", "1_000"), ("yes", "yes"), ("no", "no"),
        ("on", "on"), ("Off", "Off"), ("2024-01-01", "2024-01-01"), ("8/255", "8/255"), ("'1'", "1"), ("0o17", "0o17"),
        ("{<<: {eps: 1, steps: 2}, eps: 3}", {"eps": 3, "steps": 2}),
    ],
)  # fmt: skip
def test_values_are_read_as_people_mean_them(written, read, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"\ufeffprofile: mine\non: 1\nvalue: {written}\n", encoding="utf-8")
    found = read_params(tmp_path / "mine.yaml")
    assert found == {"profile": "mine", "on": 1, "value": read} and type(found["value"]) is type(read)


def test_what_is_read_as_text_is_refused_where_a_number_is_wanted(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{HEAD}seed: 010\n")
    with pytest.raises(BadInput, match="'seed' must be a number but is the text '010'; write 10 instead"):
        check(**read_params(tmp_path / "mine.yaml"))


def test_a_file_that_grows_when_it_is_written_out_is_refused_in_one_short_sentence(tmp_path):
    (tmp_path / "mine.yaml").write_text("\n".join([HEAD, *BOMB, "seeds: *a11", "device: *a11", "attack: {eps: *a11}"]))
    parameters = read_params(tmp_path / "mine.yaml")
    for name in ("a11", "seeds", "device", "attack"):
        with pytest.raises(BadInput) as refusal:
            check(profile="mine", encoders=[{"name": "a"}], **{name: parameters[name]})
        assert len(str(refusal.value)) < 200


def test_a_parameter_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(HEAD)

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(BadInput, match=r"^params/mine.yaml cannot be read \(Permission denied\); make it readable.$"):
        read_params(tmp_path / "mine.yaml")


def test_a_missing_profile_file_lists_the_others(tmp_path):
    (tmp_path / "demo.yaml").touch()
    (tmp_path / "quick.yaml").touch()
    with pytest.raises(BadInput, match="no profile 'papr'.*choose one of: demo, quick"):
        read_params(tmp_path / "papr.yaml")


def test_an_exact_size_is_for_depth_alone():
    base = {"profile": "x", "encoders": [{"name": "embedded_vit"}]}
    section = {"epochs": 1, "batch": 1, "lr": 0.1}
    assert check(**base, depth={**section, "size": [480, 640]}).depth.size == (480, 640)
    for task, size in (("segmentation", [480, 640]), ("depth", [480]), ("depth", [4, 640]), ("depth", [480, "x"])):
        with pytest.raises(BadInput, match="size"):
            check(**base, **{task: {**section, "size": size}})
