"""Strong attacks: the ball, what they are called, that they break what PGD cannot, and APGD's schedule by hand."""

import logging
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from planted import brightness_model, images, model, strong_attacks, target
from pyautoattack import AutoAttack

from ssl_robust import attacks
from ssl_robust.datasets import IGNORE, image_seed
from ssl_robust.settings import Attack, BadInput
from ssl_robust.strong import apgd, autoattack, dense
from ssl_robust.tasks import TASKS
from ssl_robust.trust import evidence, health

SHORT = Attack(steps=2)
NAMES = {task: strong_attacks(task) for task in TASKS}
EACH = pytest.mark.parametrize(("task", "name"), [(task, name) for task in TASKS for name in NAMES[task]])
OWN = pytest.mark.parametrize(
    ("task", "name"), [(task, name) for task in TASKS for name in NAMES[task] if name != "autoattack"]
)
PIXEL_LOSSES = [dense.mean_cross_entropy, dense.cosine_weighted, dense.wrongness, *dense.LOSSES["sea"]]


@pytest.fixture(autouse=True)
def queries(monkeypatch):
    """Few of them: what Square would still find takes most of AutoAttack's time."""
    monkeypatch.setattr(autoattack, "QUERIES", 5)


def _ids(count):
    return [f"image-{i}" for i in range(count)]


def _run(name, planted, x, truth, attack=SHORT, seed=0, **more):
    return attacks.attacked(name, planted, x, truth, _ids(len(x)), attack, seed, **more)


def _saturated(task, factor=1e5):
    """The brightness model with logits so large that softmax and its gradient are exactly 0 or 1."""
    planted = brightness_model(task)
    layer = planted.head.linear if task == "classification" else planted.head.conv
    layer.weight *= factor
    layer.bias *= factor
    return planted


def _around_half(margins):
    x = (0.5 + torch.tensor(margins))[:, None, None, None].expand(-1, 3, 16, 16).clone()
    return x, (torch.tensor(margins) > 0).long()


# --- all of them ---


@EACH
def test_budget_and_box_are_exact(task, name, capfd):
    planted, x = model(task), images(3).mul(3).sub(1).clamp(0, 1)  # a third of the pixels at each border
    truth = planted(x).argmax(1) if task == "classification" else target(task, x)
    adv = _run(name, planted, x, truth)
    assert adv.shape == x.shape and not adv.requires_grad and capfd.readouterr() == ("", "")
    assert (adv >= (x - 8 / 255).clamp(min=0)).all() and (adv <= (x + 8 / 255).clamp(max=1)).all()
    assert (adv - x).abs().max() == pytest.approx(8 / 255, abs=1e-4) or name == "autoattack"  # the nearest will do
    assert not torch.equal(adv, x)
    assert torch.equal(_run(name, planted, x, truth, Attack(eps=0.0, steps=2)), x)  # bit for bit


@EACH
def test_the_seed_decides_and_global_randomness_does_not(task, name):
    planted, x = model(task), images(2)
    truth = planted(x).argmax(1) if task == "classification" else target(task, x)
    log, trace = logging.getLogger("auto-attack").level, sys.gettrace()
    torch.manual_seed(1)
    first, state = _run(name, planted, x, truth), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(_run(name, planted, x, truth), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("auto-attack").level == log and sys.gettrace() is trace


@OWN
@pytest.mark.parametrize("seed", [0, 7])
def test_starts_are_drawn_from_seed_and_image(task, name, seed, monkeypatch):
    drawn, draw = [], attacks.random_start

    def seen(x, eps, ids, seed):
        drawn.append((eps, list(ids), seed))
        return draw(x, eps, ids, seed)

    x = images(2)
    monkeypatch.setattr(attacks, "random_start", seen)
    _run(name, model(task), x, target(task, x), seed=seed)
    assert (8 / 255, _ids(2), seed) in drawn and {s for *_, s in drawn} == {seed}


@pytest.mark.parametrize("seed", [0, 7])
def test_autoattack_draws_from_seed_and_image(seed, monkeypatch):
    given = []
    monkeypatch.setattr(autoattack, "image_seed", lambda *about: given.append(about) or image_seed(*about))
    x = images(2)
    _run("autoattack", model("classification"), x, target("classification", x), seed=seed)
    assert given == [(seed, "image-0")]


@OWN
def test_an_image_is_attacked_alike_in_any_batch(task, name):
    planted, x = model(task), images(3)
    truth, ids = target(task, x), _ids(3)
    together = attacks.attacked(name, planted, x, truth, ids, SHORT, 0)
    alone = [
        attacks.attacked(name, planted, x[i : i + 1], truth[i : i + 1], ids[i : i + 1], SHORT, 0) for i in range(3)
    ]
    # rounding turns the sign of a gradient that is all but zero, hence not every pixel
    assert torch.isclose(torch.cat(alone), together, atol=1e-6).float().mean() > 0.99


@EACH
def test_steps_in_bf16_stay_in_the_ball(task, name):
    x = images(2, 16)
    adv = _run(name, model(task), x, target(task, x), Attack(steps=1), precision="bf16")
    assert adv.dtype == torch.float32 and (adv - x).abs().max() <= 8 / 255 + 1e-6


def test_an_attack_of_another_task_is_refused():
    with pytest.raises(BadInput, match="no attack 'sea' on depth; choose one of: clean, embed, task, apgd"):
        _run("sea", model("depth"), images(1), None)


# --- what they say of themselves ---


@EACH
def test_every_attack_says_how_its_gradients_were(task, name):
    planted, x = model(task), images(3)
    truth = planted(x).argmax(1) if task == "classification" else target(task, x)
    trace, before = [], _run(name, planted, x, truth)
    assert torch.equal(_run(name, planted, x, truth, trace=trace), before)  # looking changes nothing
    found = health.summarise([trace], name, task)
    assert found["zero_share"] == 0 and not any("gradient" in flag for flag in evidence.flags(found))
    if name == "autoattack":
        assert found["gradients"] > SHORT.steps and found["nan_share"] == 0
    else:
        assert found["images"] == 3 and found["steps"] >= SHORT.steps and found["nan_gradient"] == 0


@pytest.mark.parametrize(("task", "name"), [("classification", "autoattack"), ("segmentation", "apgd_seg")])
def test_gradients_that_are_zero_or_not_finite_are_flagged(task, name, monkeypatch):
    x, truth = _around_half([0.05, -0.05])
    planted = _saturated(task)
    truth = truth[:, None, None].expand(-1, 16, 16) if task == "segmentation" else truth
    trace, forward = [], type(planted).forward
    # no gradient at all, whatever the loss; AutoAttack's own parts have none in a saturated softmax either
    monkeypatch.setattr(type(planted), "forward", lambda self, x: forward(self, x.detach()) + 0 * x.sum())
    _run(name, planted, x, truth, Attack(steps=2), trace=trace)
    found = health.summarise([trace], name, task)
    assert found["zero_share"] > 0.01 and any("exactly zero in" in flag for flag in evidence.flags(found))
    monkeypatch.setattr(type(planted), "forward", lambda self, x: forward(self, x) + (0 * x.sum()).sqrt())
    planted, trace = model(task), []
    truth = planted(x).argmax(1).detach()  # the root's gradient at 0, times 0, is no number
    _run(name, planted, x, truth, Attack(steps=2), trace=trace)
    assert any("not finite" in flag for flag in evidence.flags(health.summarise([trace], name, task)))


def test_of_several_losses_the_trace_is_of_the_one_that_was_taken():
    def trace(*losses):
        found = []
        for t, loss in enumerate(losses, 1):
            attacks.note(
                found, t, torch.arange(2), torch.tensor(loss), torch.zeros(2, 3) + torch.tensor([[0.0], [1.0]])
            )
        attacks.note(found, None, torch.arange(2), torch.tensor(losses[-1]))
        return found

    joined = dense._of_chosen([trace([1.0, 2.0], [3.0, 4.0]), trace([5.0, 6.0])], torch.tensor([1, 0]))
    assert [(e["step"], e["index"].tolist(), e["loss"].tolist()) for e in joined] == [
        (1, [1], [2.0]), (2, [1], [4.0]), (1, [0], [5.0]), (None, [0, 1], [5.0, 4.0])
    ]  # fmt: skip
    assert [e["zero"].tolist() for e in joined[:3]] == [[False], [False], [True]]
    assert health.summarise([joined], "sea", "segmentation")["zero_gradient"] == 1


# --- where PGD fails ---


def test_a_classifier_whose_softmax_is_saturated_falls_as_far_as_it_can():
    x, truth = _around_half([0.02, -0.02, 0.01, -0.01, 0.06, -0.06])
    planted = _saturated("classification")
    (gradient,) = torch.autograd.grad(F.cross_entropy(planted(x.requires_grad_(True)), truth), x)
    assert not gradient.any()  # of the cross-entropy itself
    adv = _run("autoattack", planted, x.detach_(), truth, Attack(steps=4))
    assert torch.equal(adv[4:], x[4:])
    for attacked in (adv, attacks.attacked("task", planted, x, truth, _ids(6), Attack(), 0)):
        assert (planted(attacked).argmax(1) != truth).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("name", ["task", *NAMES["segmentation"]])
def test_every_attack_breaks_pixels_whose_softmax_is_saturated(name):
    x, _ = _around_half([0.02, 0.06])
    planted, mask = _saturated("segmentation"), torch.ones(2, 16, 16, dtype=torch.uint8)
    wrong = planted(attacks.attacked(name, planted, x, mask, _ids(2), Attack(steps=16), 0)).argmax(1) != mask
    assert wrong[0].all() and not wrong[1].any()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("task", "name"), [("segmentation", "sea"), ("depth", "apgd_rmse"), ("depth", "apgd_depth"), ("depth", "apgd_far")]
)
def test_at_least_as_strong_as_pgd_in_what_is_judged(task, name, seed):
    planted, x = model(task, seed), images(2, 16, seed)
    truth = target(task, x)
    if name == "apgd_far":  # where the scene is near, towards the far end is the way
        truth = truth * 0.1
    pgd = attacks.attacked("task", planted, x, truth, _ids(2), Attack(), 0)
    adv = _run(name, planted, x, truth, Attack(steps=6))
    truth = truth.long() if task == "segmentation" else truth
    judged = [dense.SCORES[task](planted(images), truth).mean() for images in (adv, pgd)]
    assert judged[0] >= judged[1] * (1 - 1e-4)


# --- AutoAttack ---


def test_its_parts_are_those_that_are_defined():
    assert autoattack.parts(2) == ["apgd-ce", "fab-t", "square"]
    assert autoattack.parts(3) == ["apgd-ce", "apgd-dlr", "fab-t", "square"]
    assert autoattack.parts(4) == autoattack.parts(1000) == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("classes", [2, 3, 4, 12])
def test_it_runs_with_any_number_of_classes(classes):
    weight = torch.randn(classes, 48, generator=torch.Generator().manual_seed(classes))
    x = images(4, 4, low=0.3, high=0.7)

    def linear(x):
        return (x - 0.5).flatten(1) @ weight.T

    for scale in (0.5, 2.0):  # of the ball, against the distance at which a linear model gives way
        gap = linear(x).topk(2).values.diff().abs().flatten()
        order = linear(x).argsort(1, descending=True)
        reach = gap / (weight[order[:, 0]] - weight[order[:, 1]]).abs().sum(1)
        attack = Attack(eps=float(reach.max() * scale), step=0.1, steps=1)
        adv = autoattack.run(linear, x, order[:, 0], _ids(len(x)), attack, 0)
        if scale > 1:
            assert (linear(adv).argmax(1) != order[:, 0]).all()
        assert (adv - x).abs().max() <= reach.max() * scale + 1e-6


def _attributes(auto):
    apgd = ("n_restarts", "n_iter", "n_iter_2", "n_iter_min", "size_decr", "thr_decr", "eps", "norm")
    fab = ("n_restarts", "n_iter", "eps", "alpha_max", "eta", "beta", "n_target_classes")
    square = ("n_restarts", "n_queries", "p_init", "eps", "rescale_schedule", "loss")
    found = [getattr(part, name) for part in (auto.apgd, auto.apgd_targeted) for name in apgd]
    found += [getattr(auto.fab, name) for name in fab] + [getattr(auto.square, name) for name in square]
    return [*found, auto.apgd_targeted.n_target_classes, auto.attacks_to_run]


def test_with_the_papers_steps_it_is_the_standard_version(monkeypatch):
    made = []
    monkeypatch.setattr(autoattack, "QUERIES", 50)
    monkeypatch.setattr(
        AutoAttack, "run_standard_evaluation", lambda self, x, y, batch_size: made.append(self) or (x, y)
    )
    x, planted = images(2), model("classification")
    planted.head = torch.nn.Linear(planted.encoder.dim, 10)
    planted.forward = lambda x: planted.head(planted.encoder(x)[0])
    _run("autoattack", planted, x, torch.zeros(2), Attack())
    standard = AutoAttack(planted, eps=8 / 255, version="standard", device="cpu")
    assert _attributes(made[0]) == _attributes(standard)


def test_images_that_are_wrong_already_come_back_as_they_are():
    planted, x = model("classification"), images(4)
    truth = (planted(x).argmax(1) + 1) % 3
    assert torch.equal(_run("autoattack", planted, x, truth), x)


# --- APGD ---


def test_checkpoints_by_hand():
    assert apgd.checkpoints(100) == {22, 41, 57, 70, 80, 87, 93, 99}
    assert apgd.checkpoints(4) == {1, 2, 3, 4} and apgd.checkpoints(1) == {1}


def _followed(peaks, starts, steps, eps=0.1):
    """Iterates of APGD on -(x - peak)^2 for one-pixel images at 0.5, one row per step, and what is returned."""
    seen, peaks = [], torch.tensor(peaks, dtype=torch.float64)
    x = torch.full((len(peaks), 3, 1, 1), 0.5, dtype=torch.float64)

    def loss_fn(adv, t):
        seen.append(adv.detach()[:, 0, 0, 0].tolist())
        return -((adv[:, 0, 0, 0] - peaks) ** 2)

    adv = apgd.apgd(x, loss_fn, eps, steps, torch.tensor(starts).double()[:, None, None, None].expand_as(x))
    return torch.tensor(seen), adv[:, 0, 0, 0].tolist()


def test_steps_by_hand():
    seen, adv = _followed([0.5, 0.6], [0.45, 0.4], 4)
    # first image: 0.45 + 2 eps ends at the border, which is worse: halved, back to 0.45; 0.75 of a step of 0.1; that is
    # better, so the step stays: 0.525 - 0.75 * 0.1 + 0.25 * (0.525 - 0.45), worse: halved, back; 0.75 of a step of 0.05
    assert seen[:, 0].tolist() == pytest.approx([0.45, 0.6, 0.525, 0.46875, 0.4875])
    assert seen[:, 1].tolist() == pytest.approx([0.4, 0.6, 0.6, 0.6, 0.6])
    assert adv == pytest.approx([0.4875, 0.6])


def test_the_step_is_halved_where_the_best_has_not_changed():
    x, seen = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64), []

    def loss_fn(adv, t):  # the first score is the largest, all others rise, so only the second condition can hold
        seen.append(float(adv[0, 0, 0, 0].detach()))
        return adv.flatten(1).sum(1), torch.tensor([1000.0 if len(seen) == 1 else len(seen)])

    adv = apgd.apgd(x, loss_fn, 0.1, 100)
    assert torch.equal(adv, x)
    # at 22 back to 0.5, with steps of 0.1 and momentum from 0.6; not at 41, as it was halved at 22; at 57 again
    assert seen[22:24] == pytest.approx([0.6, 0.5 + 0.75 * 0.1 - 0.25 * 0.1])
    assert seen[41:43] == pytest.approx([0.6, 0.6])
    assert seen[57:59] == pytest.approx([0.6, 0.5 + 0.75 * 0.05 - 0.25 * 0.1])


def _waves(adv, t=0):
    return (60 * adv).sin().flatten(1).sum(1)  # hilly: steps jump over the tops


def test_best_iterate_is_never_worse_than_the_start_or_the_other_iterates():
    x, start, last_is_worse = images(4), attacks.random_start(images(4), 0.2, _ids(4), 0), 0
    for steps in (1, 2, 3, 5, 8, 12):
        seen = []
        adv = apgd.apgd(x, lambda a, t, seen=seen: seen.append(_waves(a).detach()) or _waves(a), 0.2, steps, start)
        assert len(seen) == steps + 1 and torch.equal(_waves(adv), torch.stack(seen).amax(0))
        last_is_worse += int((seen[-1] < _waves(adv)).sum())
    assert last_is_worse  # so the last iterate alone would not do
    assert (_waves(adv) >= _waves(start)).all()
    top = start.clamp(x - 0.2, x + 0.2)
    assert torch.equal(apgd.apgd(x, lambda a, t: -((a - top) ** 2).flatten(1).sum(1), 0.2, 5, start), top)


def test_a_gradient_that_is_no_number_moves_nothing():
    x = images(2)
    x[0] = 0

    def loss_fn(adv, t):
        return adv.flatten(1).sum(1).sqrt() - adv.flatten(1).sum(1).sqrt()  # the first image: infinity minus infinity

    adv = apgd.apgd(x, loss_fn, 0.1, 3)
    assert adv.isfinite().all() and torch.equal(adv[0], x[0])


# --- losses ---


@pytest.fixture
def scored():
    """Logits of 4 classes on 2 images of 6 x 5 pixels, and masks without class 3 and with ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(3, (2, 6, 5), generator=generator)
    mask[torch.rand(2, 6, 5, generator=generator) < 0.3] = IGNORE
    return 3 * torch.randn(2, 4, 6, 5, generator=generator), mask


@pytest.mark.parametrize("loss", PIXEL_LOSSES)
def test_ignored_pixels_have_no_influence(loss, scored):
    logits, mask = scored
    other = torch.where((mask == IGNORE)[:, None], 50 * logits.flip(1), logits).requires_grad_(True)
    assert torch.equal(loss(other, mask), loss(logits, mask))
    if loss is not dense.wrongness:
        loss(other, mask).sum().backward()
        assert (other.grad.movedim(1, -1)[mask == IGNORE] == 0).all() and (other.grad != 0).any()


@pytest.mark.parametrize(("task", "name"), [(task, name) for task in ("segmentation", "depth") for name in NAMES[task]])
def test_an_image_without_a_target_stays_where_it_starts(task, name):
    planted, x = model(task), images(2)
    nothing = torch.full((2, 16, 16), float(IGNORE) if task == "segmentation" else 0.0)
    nothing = nothing.to(torch.uint8) if task == "segmentation" else nothing
    start = attacks.random_start(x, 8 / 255, _ids(2), 0)
    adv = _run(name, planted, x, nothing)
    assert adv.isfinite().all() and (name == "sea" or torch.allclose(adv, start, atol=1e-6))


def _by_hand(name, scores, label):
    """One pixel's loss from its logits, a list."""
    top = max(scores)
    p = [math.exp(s - top) for s in scores]
    p = [value / sum(p) for value in p]
    right = scores.index(top) == label
    if name == "jensen_shannon":
        half = [(value + (c == label)) / 2 for c, value in enumerate(p)]
        return (sum(q * math.log(q / m) for q, m in zip(p, half, strict=True)) - math.log(half[label])) / 2
    return {
        "mean_cross_entropy": -math.log(p[label]),
        "masked_cross_entropy": -math.log(p[label]) * right,
        "masked_margin": (max(s for c, s in enumerate(scores) if c != label) - scores[label]) * right,
        "cosine_weighted": -math.log(p[label]) * p[label] / math.sqrt(sum(q * q for q in p)),
        "balanced_cross_entropy": -math.log(p[label]) * right,
    }[name]


@pytest.mark.parametrize("loss", [loss for loss in PIXEL_LOSSES if loss is not dense.wrongness])
def test_pixel_losses_by_hand(loss, scored):
    logits, mask = scored
    for found, scores, labels in zip(loss(logits, mask), logits, mask, strict=True):
        pixels = [(r, c) for r in range(6) for c in range(5) if labels[r, c] != IGNORE]
        total = 0.0
        for r, c in pixels:
            weight = 1 / int((labels == labels[r, c]).sum()) if loss is dense.balanced_cross_entropy else 1
            total += weight * _by_hand(loss.__name__, scores[:, r, c].tolist(), int(labels[r, c]))
        assert float(found) == pytest.approx(total / len(pixels), rel=1e-4)


def test_a_further_wrong_pixel_outweighs_any_cross_entropy(scored):
    logits, mask = scored
    r, c = (mask[0] != IGNORE).nonzero()[0].tolist()
    label = int(mask[0, r, c])
    fewer, more = (torch.nn.functional.one_hot(mask % IGNORE, 4).movedim(-1, 1).float() for _ in range(2))
    more[0, label, r, c], more[0, 3, r, c] = 0, 1  # one pixel wrong, by little
    fewer *= 0.01  # none wrong, all nearly
    assert dense.wrongness(more, mask)[0] > dense.wrongness(fewer, mask)[0] > dense.wrongness(100 * fewer, mask)[0]
    assert dense.wrongness(-1e30 * fewer, mask).max() <= 1


def test_the_aimed_class_is_the_likeliest_that_the_mask_lacks(scored):
    logits, mask = scored
    mask[1, 0, 0], mask[1, 5] = 3, 2  # the second image has all classes; class 3 is its rarest
    mask[0][mask[0] == 2] = 1  # the first lacks 2 and 3
    logits[0, 2] += 5
    loss = dense.towards_class(lambda x: x, logits, mask)
    aim = torch.where(mask == IGNORE, mask, torch.tensor([2, 3])[:, None, None])
    assert torch.allclose(loss(logits, mask), -dense.mean_cross_entropy(logits, aim))


def test_far_and_near_move_the_depth_to_their_sides():
    planted, x = model("depth"), images(3)
    truth = target("depth", x)
    score = dense.squared_error
    far, near = (_run(name, planted, x, 0 * truth + end, Attack(steps=6)) for name, end in
                 (("apgd_far", dense.MIN_DEPTH), ("apgd_near", dense.MAX_DEPTH)))  # fmt: skip
    assert (planted(far).mean((1, 2)) > planted(x).mean((1, 2))).all()
    assert (planted(near).mean((1, 2)) < planted(x).mean((1, 2))).all()
    prediction = torch.tensor([[[1.0, 2.0], [3.0, 9.0]]])
    depth = torch.tensor([[[2.0, 2.0], [5.0, 0.0]]])  # the last pixel was not seen
    assert float(score(prediction, depth)) == pytest.approx(5 / 3)
    assert float(dense.towards(prediction, depth, dense.MAX_DEPTH)) == pytest.approx(-(9 + 8 + 7) / 3)
    assert float(dense.towards(prediction, depth, dense.MIN_DEPTH)) == pytest.approx(-2, abs=0.01)


@pytest.mark.parametrize("order", [1, -1])
def test_the_ensemble_is_as_strong_as_its_strongest_member(order, monkeypatch):
    planted, x = model("segmentation", 1), images(3)
    mask, attack = target("segmentation", x), Attack(steps=1)
    losses = dense.LOSSES["sea"][::order]
    start = attacks.random_start(x, attack.eps, _ids(3), 0)
    singly = []
    for loss in losses:
        objective = dense._objective(planted, mask, loss, dense.wrongness)
        singly.append(dense.wrongness(planted(apgd.shrinking(x, objective, attack.eps, 5, start)), mask))
    monkeypatch.setitem(dense.LOSSES, "sea", losses)
    together = dense.wrongness(planted(_run("sea", planted, x, mask, attack)), mask)
    assert torch.allclose(together, torch.stack(singly).amax(0))
    assert not torch.allclose(singly[0], singly[-1])
