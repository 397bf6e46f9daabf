"""Threat model and losses of the attacks, on models whose optimum is known in closed form."""

import math

import pytest
import torch
from planted import brightness_model, images, model, target

from ssl_robust import attacks, datasets
from ssl_robust.settings import Attack
from ssl_robust.tasks import TASKS

PAPER = Attack()
EACH = pytest.mark.parametrize(("task", "kind"), [(t, k) for t in TASKS for k in ("embed", "task")])


def _ids(count):
    return [f"image-{i}" for i in range(count)]


def _run(kind, planted, x, truth, attack=PAPER, seed=0):
    return attacks.attacked(kind, planted, x, truth, _ids(len(x)), attack, seed)


def _around_half(margins):
    """Gray images whose brightness is one half plus the margin, and their classes under brightness_model."""
    x = (0.5 + torch.tensor(margins))[:, None, None, None].expand(-1, 3, 16, 16).clone()
    return x, (torch.tensor(margins) > 0).long()


@EACH
def test_budget_and_box_are_exact(task, kind):
    x = images(3, 24).mul(3).sub(1).clamp(0, 1)  # a third of the pixels at each border
    adv = _run(kind, model(task), x, target(task, x), Attack(steps=4, step=0.02))
    assert adv.isfinite().all()
    assert (adv >= (x - PAPER.eps).clamp(min=0)).all() and (adv <= (x + PAPER.eps).clamp(max=1)).all()
    assert (adv - x).abs().max() == pytest.approx(PAPER.eps, abs=1e-7)


@EACH
def test_radius_zero_is_clean_bit_for_bit(task, kind):
    x = images(2, 24)
    assert torch.equal(_run(kind, model(task), x, target(task, x), Attack(eps=0.0, steps=3)), x)


@EACH
def test_no_weight_ever_gets_a_gradient(task, kind):
    planted, x = model(task), images(2, 24)
    before = {k: v.clone() for k, v in planted.state_dict().items()}
    adv = _run(kind, planted, x, target(task, x), Attack(steps=2, best=True))
    assert not adv.requires_grad and not x.requires_grad
    assert all(not p.requires_grad and p.grad is None for p in planted.parameters())
    assert all(torch.equal(v, before[k]) for k, v in planted.state_dict().items())


@EACH
def test_batch_size_does_not_matter(task, kind):
    planted, x = model(task), images(8, 24)
    truth, ids = target(task, x), _ids(8)
    together = attacks.attacked(kind, planted, x, truth, ids, Attack(steps=3), 0)
    alone = [
        attacks.attacked(kind, planted, x[i : i + 1], truth[i : i + 1], ids[i : i + 1], Attack(steps=3), 0)
        for i in range(8)
    ]
    # rounding turns the sign of a gradient that is all but zero, hence not every pixel
    assert torch.isclose(torch.cat(alone), together, atol=1e-6).float().mean() > 0.999


def test_starts_belong_to_images():
    x = images(8)
    together = attacks.random_start(x, 0.1, _ids(8), 0)
    alone = [attacks.random_start(x[i : i + 1], 0.1, [f"image-{i}"], 0) for i in range(8)]
    assert torch.equal(torch.cat(alone), together)
    noise = together - x
    assert 0.09 < noise.abs().max() <= 0.1 + 1e-6 and not torch.equal(noise[0], noise[1])
    assert not torch.equal(attacks.random_start(x, 0.1, _ids(8), 1), together)


@pytest.mark.parametrize("eps", [0.0, 4 / 255, 8 / 255, 16 / 255, 1.0])
def test_an_image_falls_exactly_when_the_boundary_is_within_reach(eps):
    margins = [s * m for m in (0.005, 0.012, 0.02, 0.03, 0.05, 0.08, 0.3) for s in (1, -1)]
    x, truth = _around_half(margins)
    planted = brightness_model()
    adv = _run("task", planted, x, truth, Attack(eps=eps, step=max(eps, 0.01), steps=5))
    fallen = planted(adv).argmax(1) != truth
    assert fallen.tolist() == [abs(m) < eps for m in margins]  # so radius 1 breaks everything


def test_embed_attack_on_segmentation_sees_all_windows():
    planted, x = model("segmentation"), images(2, 24)
    windows = [x[..., t : t + 16, le : le + 16] for t in (0, 8) for le in (0, 8)]
    expected = torch.cat([planted.encoder(w)[1].flatten(1) for w in windows], 1)
    assert torch.allclose(planted.embed(x), expected, atol=1e-6)


def _waves(adv, t):
    return (60 * adv).sin().flatten(1).sum(1)  # hilly: steps jump over the tops


def test_best_iterate_is_never_weaker_with_more_steps():
    x = images(4)
    start = attacks.random_start(x, 0.2, _ids(4), 0)

    def reached(steps, best):
        attack = Attack(eps=0.2, step=0.04, steps=steps, best=best)
        return _waves(attacks.pgd(x, _waves, attack, start), 0)

    best = torch.stack([reached(n, True) for n in range(1, 9)])
    last = torch.stack([reached(n, False) for n in range(1, 9)])
    assert (best.diff(dim=0) >= 0).all() and (best >= last).all()
    assert (last.diff(dim=0) < 0).any()  # the last iterate alone would not do
    assert (best[0] >= _waves(start, 0)).all()


@pytest.mark.parametrize(("weights", "moved"), [((9, 2, 1), 3), ((-1, 1, 1), 1), ((1, 1, -1), 0)])
def test_best_iterate_is_judged_by_the_loss_of_the_last_step(weights, moved):
    x, attack = images(2, low=0.2, high=0.8), Attack(steps=3, best=True)
    adv = attacks.pgd(x, lambda adv, t: weights[t - 1] * adv.flatten(1).sum(1), attack)
    assert torch.allclose(adv, x + moved * attack.step)


# --- images that are finished, and what the loop saw ---


def test_images_whose_class_is_surely_lost_leave_the_batch():
    x, label = _around_half([0.01, 0.2, -0.01, -0.2])  # two within reach of eps, two far beyond it
    planted, seen = brightness_model(), []
    whole = planted.forward
    planted.forward = lambda images: seen.append(len(images)) or whole(images)
    trace = []
    attack = Attack(steps=8)
    adv = attacks.attacked("task", planted, x, label, _ids(4), attack, 0, trace=trace)
    assert max(seen) == 4 and min(seen) == 2 and trace[-2]["index"].tolist() == [1, 3]
    assert (whole(adv).argmax(1) != label).tolist() == [True, False, True, False]
    assert (adv - x).abs().max() <= attack.eps + 1e-7
    left = trace[-1]["loss"][[0, 2]]
    assert (left > math.log(1) + attacks.MARGIN).all()  # they were finished where they are
    kept = attacks.attacked(
        "task", planted, x, label, _ids(4), attack.model_copy(update={"stop_when_broken": False}), 0
    )
    assert torch.equal(kept[[1, 3]], adv[[1, 3]]) and not torch.equal(kept[[0, 2]], adv[[0, 2]])
    assert torch.equal(whole(kept).argmax(1), whole(adv).argmax(1))


def test_the_margin_is_never_reached_by_an_image_that_is_classified_rightly():
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 3, 10):
        logits = 3 * torch.randn(5000, classes, generator=generator)
        logits[::2] = 0.01 * logits[::2]  # nearly undecided ones come nearest
        label = logits.argmax(1)
        assert (attacks.margin(logits, label) <= math.log(classes - 1) + 1e-6).all()


def test_images_that_only_seem_lost_in_bf16_stay():
    x, label = _around_half([0.2, -0.2, 0.01])  # the first two are beyond any reach
    planted, trace = brightness_model(), []
    whole = planted.forward

    def rounded(images):  # what bf16 would say if its error were as large as the logits of a certain classifier
        logits = whole(images)
        return -logits if torch.is_autocast_enabled("cpu") else logits

    planted.forward = rounded
    adv = attacks.attacked("task", planted, x, label, _ids(3), Attack(steps=4), 0, "bf16", trace)
    assert all({0, 1} <= set(entry["index"].tolist()) for entry in trace)
    assert (whole(adv).argmax(1)[:2] == label[:2]).all()
    assert trace[0]["loss"][:2].min() > attacks.enough(planted)


# --- certain classifiers ---


def _certain(task, factor):
    planted = brightness_model(task)
    layer = planted.head.linear if task == "classification" else planted.head.conv
    layer.weight *= factor
    layer.bias *= factor
    return planted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_head_scaled_by_ten_thousand_falls_as_the_unscaled_one(task, precision):
    x, truth = _around_half([0.01, -0.01, 0.02, 0.06, -0.06])
    truth = truth if task == "classification" else truth[:, None, None].expand(-1, 16, 16).contiguous()
    found, traces = [], [[], []]
    for factor, trace in zip((1, 1e4), traces, strict=True):
        planted = _certain(task, factor)
        adv = attacks.attacked("task", planted, x, truth, _ids(5), Attack(), 0, precision, trace)
        found.append((planted(adv).argmax(1) != truth).flatten(1 if task != "classification" else 0))
        assert not any(entry["zero"].any() for entry in trace[:-1])
    assert torch.equal(*found)
    assert found[0].reshape(5, -1).all(1).tolist() == [True, True, True, False, False]


def test_at_ordinary_logits_one_step_is_that_of_cross_entropy():
    planted, x = model("classification"), images(8, 16)
    label, start = torch.arange(8) % 3, attacks.random_start(images(8, 16), PAPER.eps, _ids(8), 0)
    one = Attack(steps=1)
    other = attacks.pgd_loss(planted, label, lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none"))
    adv, expected = (attacks.pgd(x, loss, one, start) for loss in (attacks.pgd_loss(planted, label), other))
    assert torch.isclose(adv, expected, atol=1e-6).float().mean() > 0.999


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_gradient_of_certain_pixels_is_that_of_exact_arithmetic_but_for_a_factor_per_image(scale, weight):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 4, 4, generator=generator).double()
    mask = logits.argmax(1)  # all right, in fp32 with a gradient of exactly 0 for the larger scales
    mask[2, 0, 0], mask[0, 0] = (mask[2, 0, 0] + 1) % 5, datasets.IGNORE
    logits *= scale
    exact, ours = logits.clone().requires_grad_(True), logits.float().requires_grad_(True)
    pixel = torch.nn.functional.cross_entropy(exact, mask, ignore_index=datasets.IGNORE, reduction="none")
    factor = torch.where(exact.argmax(1) == mask, 1 - weight, weight)
    (expected,) = torch.autograd.grad((pixel * factor).sum(), exact)
    (found,) = torch.autograd.grad(attacks.segpgd(attacks.segpgd_parts(ours, mask), weight).sum(), ours)
    for a, b in zip(found.double(), expected, strict=True):
        assert a.abs().max() > 0 and b.abs().max() > 0
        assert torch.allclose(a / a.abs().max(), b / b.abs().max(), rtol=1e-3, atol=1e-4)


def test_iterates_of_certain_pixels_can_be_compared():
    mask = torch.zeros(4, 2, 2, dtype=torch.long)
    logits = torch.zeros(4, 3, 2, 2)
    logits[:, 0] = torch.tensor([2000.0, 1000.0, 100.0, 1.0])[:, None, None]
    loss = torch.nn.functional.cross_entropy(logits, mask, reduction="none").flatten(1).mean(1)
    assert loss[0] == loss[1] == loss[2] == 0
    found = attacks.comparable(loss, logits, mask)
    assert (found.diff() > 0).all() and found[3] == loss[3]
    at = attacks.TINY * torch.tensor([1 - 1e-3, 1.0])  # the two parts meet, with the same slope
    z = -torch.expm1(at.double()).log().float().view(2, 1, 1, 1).expand(2, 1, 2, 2)
    both = attacks.comparable(at, torch.cat([z, torch.zeros_like(z)], 1), mask[:2])
    assert both.diff().item() == pytest.approx(1e-3 * attacks.TINY, rel=0.05)


@pytest.mark.parametrize("best", [False, True])
def test_all_images_may_be_finished_early(best):
    x, label = _around_half([0.01, -0.01])
    trace = []
    adv = attacks.attacked("task", brightness_model(), x, label, _ids(2), Attack(steps=20, best=best), 0, trace=trace)
    assert len(trace) < 20 and (brightness_model()(adv).argmax(1) != label).all()


def test_nothing_leaves_under_the_released_code_or_embed_attack():
    x, label = _around_half([0.01, -0.01])
    planted = brightness_model()
    planted.protocol = frozenset({"pgd_scaled_logits"})
    for kind in ("task", "embed"):
        trace = []
        attacks.attacked(kind, planted, x, label, _ids(2), Attack(steps=6), 0, trace=trace)
        assert [entry["step"] for entry in trace] == [*range(1, 7), None]
        assert all(len(entry["index"]) == 2 for entry in trace)


@EACH
def test_the_trace_holds_what_every_step_saw(task, kind):
    planted, x, trace = model(task), images(3, 24), []
    truth = target(task, x)
    attack = Attack(steps=3, stop_when_broken=False)
    adv = attacks.attacked(kind, planted, x, truth, _ids(3), attack, 0, trace=trace)
    assert torch.equal(adv, _run(kind, planted, x, truth, attack))
    assert [entry["step"] for entry in trace] == [1, 2, 3, None]
    assert all(entry["loss"].shape == (3,) and entry["loss"].isfinite().all() for entry in trace)
    assert not any(entry["zero"].any() or entry["nan"].any() for entry in trace[:-1])
    loss = attacks.loss_for(kind, planted, x, truth, 3)(adv, 3)
    assert torch.allclose(trace[-1]["loss"], loss[:, 1] if loss.ndim == 2 else loss)


def test_vanishing_and_undefined_gradients_are_noted():
    x, trace = images(3), []

    def loss(adv, t):
        return torch.stack([adv[0].sum(), 0 * adv[1].sum(), (adv[2] - adv[2]).sum().sqrt()])

    attacks.pgd(x, loss, Attack(steps=2), trace=trace)
    assert trace[0]["zero"].tolist() == [False, True, False] and trace[0]["nan"].tolist() == [False, False, True]


def test_the_parts_of_eq_1_and_their_gradient_are_those_of_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 7, 6, generator=generator)).requires_grad_(True)
    mask = torch.randint(5, (2, 7, 6), generator=generator)
    mask[:, :2, :3] = datasets.IGNORE
    pixel = torch.nn.functional.cross_entropy(logits, mask, ignore_index=datasets.IGNORE, reduction="none").flatten(1)
    right = (logits.argmax(1) == mask).flatten(1)
    expected = torch.stack([torch.where(right, pixel, 0).mean(1), torch.where(right, 0, pixel).mean(1)], 1)
    found = attacks.segpgd_parts(logits, mask)
    assert torch.allclose(found, expected, rtol=1e-5)
    for weight in (0.0, 0.3):
        a, b = (
            torch.autograd.grad(attacks.segpgd(p, weight).sum(), logits, retain_graph=True)[0]
            for p in (found, expected)
        )
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)
