"""DeACL: the schedule, the two terms of eq. 2, one step, interrupted work, and what is evaluated of it."""

import copy
import math
import shutil

import planted
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ssl_robust import attacks, compute, datasets, deacl, encoders, evaluate, records
from ssl_robust.encoders import Encoder
from ssl_robust.ops import plan
from ssl_robust.settings import Attack, BadInput, DeACL, EncoderRow

ROW = EncoderRow(name="planted", defenses=["standard", "deacl"])


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0), (0.5, 0.0025), (5, 0.025), (10, 0.05), (32.5, 0.025 * (1 + math.sqrt(0.5))), (55, 0.025), (100, 0)],
)
def test_learning_rate_warms_up_and_falls_along_a_cosine(epoch, rate):
    assert deacl.learning_rate(epoch, DeACL()) == pytest.approx(rate, abs=1e-12)


def test_learning_rate_without_warm_up_starts_at_the_top():
    assert deacl.learning_rate(0, DeACL(warmup_epochs=0)) == 0.05
    assert deacl.learning_rate(1, DeACL(epochs=1, warmup_epochs=1)) == 0.05  # all warm-up, no division by zero


class _PairEncoder:
    def cls(self, x):
        return x.flatten(1)[:, :2]  # the first two pixels are the embedding


def _pairs(*rows):
    return torch.tensor(rows).reshape(len(rows), 1, 1, 2).expand(-1, 3, 1, 2)


def test_loss_terms_by_hand():
    x, x_adv = _pairs([1.0, 0.0], [3.0, 4.0]), _pairs([0.0, 2.0], [4.0, 3.0])
    target = torch.tensor([[1.0, 1.0], [3.0, 4.0]])
    preserve, robust = deacl.loss_terms(_PairEncoder(), target, x, x_adv)
    assert float(preserve) == pytest.approx(-(math.sqrt(0.5) + 1))
    assert float(robust) == pytest.approx(-(0 + 24 / 25))


def test_adversarial_images_turn_the_embedding_within_the_ball():
    encoder, x, cfg = planted.encoder(), planted.images(3), DeACL(eps=0.1, step=0.05, steps=4)
    target = encoder(x)[0]
    adv = deacl.adversarial_images(encoder, target, x, ["a", "b", "c"], cfg, 0)
    cosine = torch.cosine_similarity(encoder(adv)[0], target)
    noisy = deacl.attacks.random_start(x, 0.1, ["a", "b", "c"], 0)
    assert (adv - x).abs().max() <= 0.1 + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    assert (cosine < torch.cosine_similarity(encoder(noisy)[0], target)).all()


@pytest.mark.parametrize(("precision", "agree"), [("fp32", 0.999), ("bf16", 0.8)])
def test_the_cosine_has_its_gradient_where_student_and_teacher_are_still_the_same(precision, agree):
    encoder = encoders.load(EncoderRow(name="embedded_vit"))
    exact, x, ids = copy.deepcopy(encoder).double(), planted.images(3, 64), ["a", "b", "c"]
    start = attacks.random_start(x, DeACL().eps, ids, 0)
    adv = start.double().requires_grad_(True)
    cosine = torch.cosine_similarity(exact.cls(adv), exact.cls(x.double()))
    (gradient,) = torch.autograd.grad(cosine.sum(), adv)
    with compute.steps_in(precision, "cpu"):
        target = deacl.embed(encoder, x)
    trace = []
    moved = attacks.pgd(
        x, lambda a, t: -torch.cosine_similarity(deacl.embed(encoder, a), target), Attack(eps=1.0, step=1e-3, steps=1),
        start, precision, trace=trace,
    )  # fmt: skip
    assert not trace[0]["zero"].any()
    inside = (start > 0.01) & (start < 0.99)
    assert ((moved - start).sign() == -gradient.sign())[inside].float().mean() > agree


def test_a_loss_that_is_no_number_ends_the_run_in_one_sentence(monkeypatch):
    run = _tuning(DeACL(batch=4, lr=0.5, gamma=3.0, epochs=2))
    train, stored = datasets.load("deacl", "scenes", "val", planted.settings(deacl={"n_val": 4}), 16), []
    monkeypatch.setattr(deacl, "train_step", lambda *args: torch.tensor([math.nan, -1.0]))
    with pytest.raises(BadInput, match=r"DeACL diverged in epoch 2 .*deacl.lr, which is 0.5, or .*gamma, which is 3"):
        deacl.train_epoch(run, train, 1, store=lambda *args: stored.append(args))
    monkeypatch.setattr(deacl, "SAVE_SECONDS", 0)
    with pytest.raises(BadInput, match="DeACL diverged"):
        deacl.train_epoch(run, train, 1, store=lambda *args: stored.append(args))
    assert not stored


@pytest.fixture(autouse=True)
def no_processes():
    """Nothing of one test's Accelerator is left to the next."""
    yield
    assert not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=True)


def _tuning(cfg, precision="fp32"):
    return deacl.tuning(planted.encoder(), Accelerator(cpu=True), cfg, precision)


def _step(cfg, monkeypatch, shift=0.0, precision="fp32"):
    """One training step; `shift` sets the student apart from its teacher. Returns both and what was attacked."""
    run = _tuning(cfg, precision)
    with torch.no_grad():
        run.student.backbone.proj.weight += shift
    run.optimizer.param_groups[0]["lr"] = 0.1
    attacked, original = [], deacl.adversarial_images
    monkeypatch.setattr(deacl, "adversarial_images", lambda enc, *args: attacked.append(enc) or original(enc, *args))
    terms = deacl.train_step(run, planted.images(4), list("abcd"), True, 4, 0)
    return run.student, run.teacher, attacked, (terms / 4).tolist()


def test_a_step_changes_the_student_and_never_the_teacher(monkeypatch):
    student, teacher, _, (preserve, robust) = _step(DeACL(eps=0.02, step=0.01), monkeypatch)
    assert teacher.hash == planted.encoder().hash
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().sum() > 0 for p in student.backbone.parameters())
    assert not torch.equal(student.backbone.proj.weight, teacher.backbone.proj.weight)
    assert preserve == pytest.approx(-1, abs=1e-5) and -1 < robust < -0.2  # the student began as the teacher


def test_a_batch_that_memory_does_not_hold_is_computed_in_parts(monkeypatch):
    """The gradient is that of the whole batch, and what a failed part has added to none."""
    cfg, original, asked = DeACL(eps=0.02, step=0.01, batch=4), torch.autograd.grad, []

    def hungry(loss, inputs, *rest, **about):
        if isinstance(inputs, list):  # weights, not the images of the attack
            asked.append(run.size)
            if len(asked) in (1, 2):
                raise torch.OutOfMemoryError("x")
        return original(loss, inputs, *rest, **about)

    gradients = {}
    for size in (4, 1):
        run = _tuning(cfg)
        with torch.no_grad():
            run.student.backbone.proj.weight += 0.1
        run.optimizer.param_groups[0]["lr"] = 0.1
        if size == 1:
            monkeypatch.setattr(torch.autograd, "grad", hungry)
        for _ in range(2):
            terms = deacl.train_step(run, planted.images(4), list("abcd"), True, 4, 0)
        assert run.size == size
        gradients[size] = [terms, *(p.grad for p in run.student.backbone.parameters())]
    assert len(asked) == 2 + 4 + 4  # 4 and 2 images are too many, and are not tried again
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients[4], gradients[1], strict=True))


def test_compiled_encoders_are_another_rounding_and_another_key(monkeypatch, toys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda cls: compiled.append(cls) or (lambda x: cls(x)))
    found = [
        deacl.train_step(_tuning(DeACL(compiled=c)), planted.images(4), list("abcd"), True, 4, 0) for c in (False, True)
    ]
    assert torch.equal(*found) and [cls.__name__ for cls in compiled] == ["cls", "cls"]
    settings, teacher = planted.settings(), planted.encoder()
    sections = [settings.deacl.model_copy(update={"compiled": c}) for c in (False, True)]
    plain, other = (deacl.made_from(teacher, settings.model_copy(update={"deacl": section})) for section in sections)
    assert "compiled" not in plain["inputs"]["settings"] and other["inputs"]["settings"]["compiled"] is True


def test_gamma_weighs_the_robustness_term(monkeypatch):
    steps = {}
    for gamma in (0.0, 1.0, 2.0):
        student, teacher, *_ = _step(DeACL(gamma=gamma, eps=0.1, step=0.05), monkeypatch)
        steps[gamma] = student.backbone.proj.weight.detach() - teacher.backbone.proj.weight
    assert steps[0.0].abs().max() < 1e-6  # nothing but the term of the teacher, which is at its optimum
    assert torch.allclose(steps[2.0], 2 * steps[1.0], atol=1e-6) and steps[1.0].abs().max() > 1e-4


def test_bf16_is_mixed_precision(monkeypatch):
    cfg, seen = DeACL(eps=0.1, step=0.05), set()
    monkeypatch.setattr(
        planted.Backbone, "forward_features", lambda self, x, whole=planted.Backbone.forward_features: (
            seen.add(whole(self, x).dtype) or whole(self, x)
        ),
    )  # fmt: skip
    rounded, _, _, terms = _step(cfg, monkeypatch, precision="bf16")
    assert seen == {torch.bfloat16}
    exact, _, _, expected = _step(cfg, monkeypatch)
    assert rounded.backbone.proj.weight.dtype == rounded.backbone.proj.weight.grad.dtype == torch.float32
    assert terms == pytest.approx(expected, abs=0.05) and terms != expected
    began = planted.encoder().backbone.proj.weight
    steps = [(student.backbone.proj.weight - began).flatten() for student in (rounded, exact)]
    assert torch.cosine_similarity(*steps, dim=0) > 0.9


@pytest.mark.parametrize("attack_on", ["trained", "original"])
def test_the_attacked_encoder_can_be_chosen(attack_on, monkeypatch):
    cfg = DeACL(attack_on=attack_on)
    student, teacher, attacked, _ = _step(cfg, monkeypatch, shift=0.3)
    assert attacked == [student if attack_on == "trained" else teacher]


def _finetune(profile, **changes):
    settings = planted.settings(profile=profile, deacl={"eps": 0.1, "step": 0.05, "checkpoints": [1], **changes})
    return deacl.finetune(ROW, planted.encoder(), settings)


def _path(profile, index, epoch):
    return deacl.checkpoint_path(profile, "planted", index["folder"], epoch)


def _files(profile):
    home = planted.stored("deacl/planted/*", profile)
    return {p.name: p.read_bytes() for p in home.iterdir() if p.name != "state.pt"}


@pytest.fixture
def epochs(toys, monkeypatch):
    """The numbers of the epochs that are trained."""
    found, original = [], deacl.train_epoch
    monkeypatch.setattr(deacl, "train_epoch", lambda *args: found.append(args[2]) or original(*args))
    return found


def test_finetune_moves_the_encoder_and_writes_what_was_asked(epochs):
    index = _finetune("a")
    assert epochs == [0, 1, 2]
    assert index["epochs"] == [1, 3] and [h["epoch"] for h in index["history"]] == [0, 1, 2, 3]
    assert set(_files("a")) == {"deacl.json", "epoch_1.safetensors", "epoch_3.safetensors"}
    first, last = (load_file(_path("a", index, n))["proj.weight"] for n in (1, 3))
    original = planted.encoder().backbone.proj.weight
    assert not torch.equal(first, last) and not torch.equal(first, original)
    assert index["history"][-1]["held_out_cosine"] > index["history"][0]["held_out_cosine"]


def test_finished_work_is_not_repeated(epochs):
    index, before = _finetune("a"), _files("a")
    assert _finetune("a") == index and len(epochs) == 3
    other = _finetune("a", lr=0.01)
    assert other != index and len(epochs) == 6
    assert _finetune("a") == index and len(epochs) == 6  # there and back
    _path("a", other, 1).unlink()
    assert _finetune("a", lr=0.01) == other and len(epochs) == 9 and _path("a", other, 1).is_file()
    shutil.rmtree(_path("a", other, 1).parent)
    assert _files("a") == before  # which no other run has touched


def test_epochs_that_a_finished_run_has_not_kept_are_made_beside_it(epochs):
    index, before = _finetune("a"), _files("a")
    assert _finetune("a", checkpoints=[])["epochs"] == [3] and len(epochs) == 3  # fewer: nothing is to be done
    more = _finetune("a", checkpoints=[1, 2])
    assert more["epochs"] == [1, 2, 3] and len(epochs) == 6 and more["folder"] != index["folder"]
    assert _finetune("a") == index and len(epochs) == 6
    shutil.rmtree(_path("a", more, 1).parent)
    assert _files("a") == before


def _kill(profile, step, monkeypatch):
    """Fine-tuning of three steps an epoch that is killed in its step number `step`, from 0 on."""
    original, taken = deacl.train_step, []

    def train_step(*args):
        if len(taken) == step:
            raise KeyboardInterrupt
        taken.append(step)
        return original(*args)

    with monkeypatch.context() as killed:
        killed.setattr(deacl, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            _finetune(profile)
    assert not (planted.stored("deacl/planted/*", profile) / "deacl.json").exists()


@pytest.fixture
def steps(toys, monkeypatch):
    """The training steps that are made: the identifiers of the images of each."""
    found, original = [], deacl.train_step
    monkeypatch.setattr(
        deacl, "train_step", lambda run, x, ids, *rest: found.append(ids) or original(run, x, ids, *rest)
    )
    return found


@pytest.mark.parametrize(("seconds", "left"), [(600, 6), (0, 5)])
def test_killed_and_resumed_equals_uninterrupted(steps, monkeypatch, seconds, left):
    monkeypatch.setattr(deacl, "SAVE_SECONDS", seconds)
    whole = _finetune("a")
    order = list(steps)
    _kill("b", 4, monkeypatch)  # the second step of epoch 1
    steps.clear()
    assert _finetune("b") == whole and steps == order[-left:]
    assert _files("a") == _files("b")


def test_damaged_state_starts_anew(steps, monkeypatch):
    whole = _finetune("a")
    _kill("b", 8, monkeypatch)
    state = planted.stored("deacl/planted/*/state.pt", "b")
    state.write_bytes(state.read_bytes()[:100])
    steps.clear()
    assert _finetune("b") == whole and len(steps) == 9


def test_the_key_knows_the_precision_and_not_the_processes(steps, monkeypatch):
    first = _finetune("a")
    assert first["processes"] == 1 and _finetune("a", processes=1) == first
    settings = planted.settings(profile="a", deacl={"eps": 0.1, "step": 0.05, "checkpoints": [1]}, precision="bf16")
    assert deacl.finetune(ROW, planted.encoder(), settings)["key"] != first["key"]


def test_each_epoch_has_its_own_augmentation(toys, monkeypatch):
    settings, seen = planted.settings(), []
    train, run = datasets.load("deacl", "toys", "train", settings, 16), _tuning(settings.deacl)
    monkeypatch.setattr(deacl, "train_step", lambda r, x, ids, *rest: seen.append((x, ids)) or torch.zeros(2))
    for epoch in (0, 1):
        deacl.train_epoch(run, train, epoch)
    views = [dict(zip(sum((ids for _, ids in part), []), torch.cat([x for x, _ in part]), strict=True))
             for part in (seen[:3], seen[3:])]  # fmt: skip
    assert set(views[0]) == set(views[1]) == set(train.ids) and list(views[0]) != list(views[1])
    assert sum(not torch.equal(views[0][i], views[1][i]) for i in train.ids) == 12
    assert run.optimizer.param_groups[0]["lr"] == deacl.learning_rate(1 + 2 / 3, settings.deacl)


def test_terms_are_means_over_images_also_with_a_smaller_last_batch(toys, monkeypatch):
    settings = planted.settings(deacl={"batch": 5})
    train, run = datasets.load("deacl", "toys", "train", settings, 16), _tuning(settings.deacl)
    monkeypatch.setattr(deacl, "train_step", lambda r, x, *rest: torch.tensor([len(x) ** 2, 1.0]))
    assert deacl.train_epoch(run, train, 0) == pytest.approx(((25 + 25 + 4) / 12, 3 / 12))


def test_variants_are_standard_then_deacl_by_epoch(toys):
    with pytest.raises(BadInput, match="02_deacl has not run"):
        deacl.variants(ROW, "a")
    records.finish("a", "02_deacl")
    with pytest.raises(BadInput, match="deacl.json is missing"):
        deacl.variants(ROW, "a")
    index = _finetune("a")
    records.write_record(index, deacl.current_path("a", "planted"))
    expected = [
        ("standard", 0, None),
        ("deacl-epoch1", 1, _path("a", index, 1)),
        ("deacl", 3, _path("a", index, 3)),
    ]
    assert deacl.variants(ROW, "a") == expected
    assert deacl.variants(EncoderRow(name="planted", defenses=["deacl"]), "a") == expected[1:]
    assert deacl.variants(EncoderRow(name="other"), "a") == [("standard", 0, None)]


# --- all rows, given checkpoints, other architectures ---


def _load(row, data_root="", weights=None):
    encoder = planted.encoder()
    if row.name == "gone":
        raise BadInput("The checkpoint gone.pth does not exist; correct the path.")
    if weights:
        encoder.backbone.load_state_dict(load_file(weights))
    return encoder


@pytest.fixture
def given(toys, monkeypatch):
    """A row with a robust checkpoint in the data folder, and the settings of it and two others."""
    monkeypatch.setattr(deacl.encoders, "load", _load)
    deacl.save_backbone(planted.encoder(seed=1), toys / "robust.safetensors")
    both = ["standard", "deacl"]
    rows = [{"name": "given", "defenses": both, "deacl_checkpoint": "robust.safetensors"}, {"name": "plain"}]
    return planted.settings(encoders=[*rows, {"name": "planted", "defenses": both}], data_root=str(toys))


def test_finetune_all_takes_given_checkpoints_as_they_are(given, epochs, toys):
    runs = deacl.finetune_all(given)
    assert list(runs) == ["given", "planted"] and epochs == [0, 1, 2]
    assert runs["planted"] == deacl.finetune(given.encoders[2], planted.encoder(), given)
    assert (runs["given"]["epochs"], runs["given"]["history"]) == ([], [])
    assert runs["given"]["origin"] == "robust.safetensors"
    found = deacl.variants(given.encoders[0], "toy", given.data_root)
    assert found == [("standard", 0, None), ("deacl", deacl.GIVEN, toys / "robust.safetensors")]
    absolute = given.encoders[0].model_copy(update={"deacl_checkpoint": "/else/where.pt", "defenses": ["deacl"]})
    assert [str(path) for *_, path in deacl.variants(absolute, "toy", given.data_root)] == ["/else/where.pt"]


def test_a_run_that_is_given_is_followed_like_ones_own(given, toys):
    tuning = given.model_copy(update={"deacl": given.deacl.model_copy(update={"checkpoints": [1]})})
    made = deacl.finetune(given.encoders[2], planted.encoder(), tuning)
    shutil.copytree(records.runs_dir("toy") / "deacl" / "planted" / made["folder"], toys / "robust")
    row = given.encoders[0].model_copy(update={"deacl_checkpoint": "robust"})
    used = given.model_copy(update={"encoders": [row], "deacl": None})
    (found,) = deacl.finetune_all(used).values()
    assert (found["epochs"], found["history"], found["origin"]) == (made["epochs"], made["history"], "robust")
    paths = [toys / "robust" / f"epoch_{n}.safetensors" for n in (1, 3)]
    assert deacl.variants(row, "toy", given.data_root)[1:] == [("deacl-epoch1", 1, paths[0]), ("deacl", 3, paths[1])]
    assert plan._defenses(row, used, first=True) == ["standard", "deacl-epoch1", "deacl"]
    assert plan._defenses(row, used, first=False) == ["standard", "deacl"]


def test_given_checkpoints_need_no_settings_of_deacl(given):
    alone = given.model_copy(update={"encoders": given.encoders[:2], "deacl": None})
    assert list(deacl.finetune_all(alone)) == ["given"]
    with pytest.raises(BadInput, match="no section 'deacl'; add one"):
        deacl.finetune_all(given.model_copy(update={"deacl": None}))


def test_rows_without_weights_are_skipped_with_the_reason(given):
    gone = given.encoders[2].model_copy(update={"name": "gone"})
    settings = given.model_copy(update={"encoders": [gone, given.encoders[0]], "missing": "skip"})
    path = records.results_dir("toy") / "deacl" / "skipped.json"
    assert list(deacl.finetune_all(settings)) == ["given"]
    assert [(r["encoder"], r["defense"]) for r in records.read_json(path)] == [("gone", "deacl")]
    with pytest.raises(BadInput, match="gone.pth does not exist"):
        deacl.variants(gone, "toy")
    with pytest.raises(BadInput, match="gone.pth does not exist"):
        deacl.finetune_all(settings.model_copy(update={"missing": "stop"}))
    deacl.finetune_all(given)
    assert not path.exists()


class _Normalised(planted.Backbone):
    """A backbone with batch norm, as a ResNet has it."""

    def __init__(self):
        super().__init__(6, 4, 16)
        self.norm = torch.nn.BatchNorm1d(6)

    def forward_features(self, x):
        return self.norm(super().forward_features(x).transpose(1, 2)).transpose(1, 2)


def test_batch_norm_keeps_its_statistics_while_its_weights_are_tuned(toys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Encoder(_Normalised(), "planted", 16, (0.5,) * 3, (0.25,) * 3)
    teacher.backbone.norm.running_mean += 0.1
    index = deacl.finetune(ROW, teacher, planted.settings(deacl={"eps": 0.1, "step": 0.05}))
    tuned = load_file(_path("toy", index, 3))
    own = teacher.backbone.state_dict()
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(tuned[name], own[name])
    for name in ("norm.weight", "norm.bias", "proj.weight"):
        assert not torch.equal(tuned[name], own[name])


OWN = """
import torch

class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.proj = torch.nn.Conv2d(3, 6, 4, 4)

    def forward(self, x):
        patches = self.proj(x).tanh()
        return patches.mean((2, 3)), patches

encode = Tokens()
plain = lambda x: encode(x)
"""


def test_a_module_of_ones_own_is_fine_tuned_and_a_function_is_not(toys):
    (toys / "notebooks").mkdir()
    (toys / "notebooks" / "own_tokens.py").write_text(OWN)
    row = {"name": "mine", "call": "own_tokens:encode", "native": 16, "defenses": ["standard", "deacl"]}
    settings = planted.settings(encoders=[row])
    index = deacl.finetune_all(settings)["mine"]
    assert index["epochs"][-1] == settings.deacl.epochs
    found = {r["defense"]: r for r in evaluate.run_task("depth", settings) if r["attack"] == "clean"}
    assert {"standard", "deacl"} <= set(found)
    hashes = {defense: r["hashes"]["weights"] for defense, r in found.items()}
    assert len(set(hashes.values())) == len(hashes)  # each variant has weights, and so numbers, of its own
    assert evaluate.run_task("depth", settings)[0]["made"] == evaluate.run_task("depth", settings)[0]["made"]
    function = planted.settings(encoders=[row | {"call": "own_tokens:plain"}])
    with pytest.raises(BadInput, match="^Encoder 'mine': own_tokens:plain is a function, and DeACL tunes weights; let"):
        deacl.finetune_all(function)
    assert encoders.check(function)[0].startswith("Encoder 'mine': own_tokens:plain is a function")
