"""Made-up loss curves of which one can see what is wrong, and attacks that show it."""

import json
import math

import planted
import pytest
import torch
from torch import nn

from ssl_robust import attacks
from ssl_robust.settings import Attack
from ssl_robust.trust import evidence, health

STEPS = 20
TIME = torch.arange(STEPS + 1).double()
CONVERGED = 3 * (1 - (-TIME / 3).exp())
RISING = 0.2 * TIME
DAMPED = (-TIME / 3).exp() * (1 + 0.3 * (2.5 * TIME).cos())
SWINGING = 3 + 0.5 * (-1.0) ** TIME


def trace(*curves, zero=(), nan=(), taken=None, steps=STEPS):
    """What pgd would write of images with these losses at iterates 0..T; zero, nan: (image, step) pairs.

    taken: steps that each image takes, whose loss after them is that of the image that is returned.
    """
    taken = taken or [steps] * len(curves)
    found = []
    for t in range(1, steps + 1):
        index = [i for i in range(len(curves)) if taken[i] >= t]
        if index:
            loss = torch.stack([curves[i][t - 1] for i in index]).float()
            dead, bad = (torch.tensor([(i, t) in pairs for i in index]) for pairs in (zero, nan))
            found.append({"step": t, "index": torch.tensor(index), "loss": loss, "zero": dead, "nan": bad})
    last = torch.stack([c[-1] if n == steps else c[n - 1] for c, n in zip(curves, taken, strict=True)]).float()
    return [*found, {"step": None, "index": torch.arange(len(curves)), "loss": last, "zero": None, "nan": None}]


def summary(*curves, kind="task", task="depth", wrong=None, enough=math.inf, **about):
    found = health.summarise([trace(*curves, **about)], kind, task, wrong, enough)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


@pytest.mark.parametrize("curve", [CONVERGED, SWINGING, 3 - DAMPED, 0 * TIME, torch.full_like(TIME, 2.3)])
def test_a_converged_attack_has_no_flag(curve):
    found = summary(*[curve] * 4)
    assert (found["rising"], found["missed"]) == (0, 0) and evidence.flags(found) == []


@pytest.mark.parametrize("curve", [RISING, RISING**0.5, RISING**2, 100 + RISING, 1e-3 * RISING])
def test_a_loss_that_rises_to_the_end_is_flagged(curve):
    found = summary(curve, curve, CONVERGED, CONVERGED, CONVERGED)
    assert found["rising"] == 2 and found["missed"] == 0
    assert evidence.flags(found) == ["the loss of 40 % of the images still rises at the last step (not converged)"]


def test_noise_around_a_level_seldom_counts_as_rising():
    generator = torch.Generator().manual_seed(0)
    curves = 3 + 0.3 * torch.randn(400, STEPS + 1, generator=generator).double()
    found = summary(*curves)
    assert found["rising"] < 0.2 * 400 and not any("rises" in f for f in evidence.flags(found))


def test_rounding_around_a_level_is_not_rising():
    curves = 1e4 * (1 + 1e-7 * torch.randn(50, STEPS + 1, generator=torch.Generator().manual_seed(0)).double())
    assert summary(*curves)["rising"] == 0 and summary(*curves)["missed"] == 0


@pytest.mark.parametrize(("steps", "rising"), [(1, 0), (2, 1), (3, 1), (4, 1), (100, 1)])
def test_short_and_long_attacks_are_judged(steps, rising):
    curve = torch.arange(steps + 1).double()
    assert summary(curve, steps=steps)["rising"] == rising
    assert summary(torch.zeros(steps + 1), steps=steps)["rising"] == 0


def test_a_larger_loss_before_the_returned_image_is_missed():
    peaked = torch.where(TIME == 12, 4.0, CONVERGED)
    found = summary(peaked, CONVERGED, CONVERGED)
    assert found["missed"] == 1 and found["rising"] == 0
    assert evidence.flags(found) == ["33 % of the images had an iterate of clearly larger loss than the one evaluated"]
    assert summary(torch.where(TIME == 12, 3.1, CONVERGED))["missed"] == 0  # by little


def test_an_adversarial_iterate_that_was_not_returned_is_missed():
    enough = math.log(3)
    peaked, wrong = torch.where(TIME == 12, 1.2, 0.3 * CONVERGED), torch.tensor([False, True, False])
    found = summary(peaked, peaked, 0.3 * CONVERGED, task="classification", wrong=wrong, enough=enough)
    assert found["missed_adversarial"] == 1 and found["missed"] == 1  # the second image is lost whatever it returned
    assert "1 image classified rightly had an iterate that was misclassified" in evidence.flags(found)
    for kind, task in (("embed", "classification"), ("task", "segmentation")):  # other losses say nothing of the class
        assert summary(peaked, kind=kind, task=task, wrong=wrong[:1], enough=enough)["missed_adversarial"] == 0


def test_images_that_left_early_have_converged():
    found = summary(RISING, RISING, CONVERGED, task="classification", taken=[5, 9, STEPS],
                    wrong=torch.tensor([True, True, False]), enough=5.0)  # fmt: skip
    assert (found["left"], found["rising"], found["missed"]) == (2, 0, 0) and evidence.flags(found) == []
    assert found["loss_last"] == pytest.approx(float(RISING[4] + RISING[8] + CONVERGED[-1]) / 3, rel=1e-5)
    assert found["loss_first"] == 0


def test_an_image_whose_class_is_lost_has_converged_for_the_task_attack_alone():
    about = {"task": "classification", "wrong": torch.tensor([True, True])}
    assert summary(RISING, RISING, **about)["rising"] == 0
    assert summary(RISING, RISING, kind="embed", **about)["rising"] == 2


def test_zero_gradients_are_counted_and_flagged():
    stuck = [(0, t) for t in range(1, STEPS + 1)]
    found = summary(0 * TIME, CONVERGED, zero=[*stuck, (1, 3)])
    assert found["zero_gradient"] == 2 and found["zero_share"] == pytest.approx(21 / 40)
    expected = "the gradient is exactly zero in 52 % of all steps (2 images of 2), so the attack stands still there"
    assert evidence.flags(found) == [expected]


def test_a_single_step_without_gradient_among_many_is_counted_only():
    found = summary(*[CONVERGED] * 10, zero=[(0, 1)])
    assert found["zero_gradient"] == 1 and evidence.flags(found) == []


def test_gradients_and_predictions_that_are_not_finite_are_flagged():
    broken = torch.where(TIME > 5, torch.nan, CONVERGED)
    found = health.summarise([trace(broken, CONVERGED, nan=[(0, 7), (0, 8)])], "task", "depth", nonfinite=3)
    assert found["nan_gradient"] == 1 and found["loss_last"] == pytest.approx(float(CONVERGED[-1]), rel=1e-5)
    expected = ["the predictions of 3 images are not finite", "the gradients of 1 image are not finite"]
    assert evidence.flags(found) == expected
    json.dumps(found, allow_nan=False)


def test_clean_cells_say_only_whether_predictions_are_finite():
    assert evidence.flags(health.summarise([], "clean", "depth")) == []
    assert evidence.flags(health.summarise([], "clean", "depth", nonfinite=1)) == [
        "the predictions of 1 image are not finite"
    ]
    assert evidence.flags(None) == evidence.flags({}) == []


def test_batches_are_put_together_and_broken_off_ones_left_out():
    whole, short = trace(RISING, CONVERGED), trace(CONVERGED)
    found = health.summarise([whole, whole[:7], short, []], "embed", "depth")
    assert (found["images"], found["steps"], found["rising"]) == (3, STEPS, 1)


def test_steps_that_nobody_took_are_known_from_the_attack():
    early = trace(RISING, taken=[4])
    assert health.summarise([early], "task", "depth", steps=STEPS)["left"] == 1


# --- real attacks ---


def _attacked(model, x, target, steps=STEPS, **changes):
    found = []
    attack = Attack(steps=steps, **changes)
    ids = [f"image-{i}" for i in range(len(x))]
    adv = attacks.attacked("task", model, x, target, ids, attack, 0, trace=found)
    with torch.no_grad():
        wrong = model(adv).argmax(1) != target
    return health.summarise([found], "task", "classification", wrong, steps=steps)


class Rounded(nn.Module):
    """A layer that hides the gradient of what comes before it."""

    def forward(self, x):
        return (8 * x).round() / 8


def test_masked_gradients_are_counted():
    model, x = planted.brightness_model(), planted.images(6, low=0.6, high=0.8)
    target = torch.ones(6, dtype=torch.long)
    assert evidence.flags(_attacked(model, x, target)) == []
    model.encoder.backbone.proj = nn.Sequential(model.encoder.backbone.proj, Rounded())
    found = _attacked(model, x, target)
    assert (found["zero_gradient"], found["zero_share"]) == (6, 1.0)
    assert any("exactly zero" in flag for flag in evidence.flags(found))


def test_too_few_steps_are_seen():
    model, x = planted.brightness_model(), planted.images(6, low=0.6, high=0.8)
    found = _attacked(model, x, torch.ones(6, dtype=torch.long), steps=4, step=1 / 255)
    assert any("not converged" in flag for flag in evidence.flags(found))
    assert found["loss_last"] > found["loss_first"]


def test_the_surely_lost_leave_and_count_as_converged():
    model, x = planted.brightness_model(), planted.images(6, low=0.45, high=0.56)
    target = torch.ones(6, dtype=torch.long)
    found = _attacked(model, x, target, eps=0.2, step=0.05)
    assert found["left"] == 6 and evidence.flags(found) == []


def test_the_growing_weight_of_segpgd_is_not_taken_for_a_rising_loss():
    model, x = planted.brightness_model("segmentation"), planted.images(4, low=0.45, high=0.56)
    mask, found = torch.ones(4, 16, 16, dtype=torch.long), []
    attacks.attacked("task", model, x, mask, ["a", "b", "c", "d"], Attack(eps=0.1, step=0.025), 0, trace=found)
    assert evidence.flags(health.summarise([found], "task", "segmentation", None)) == []
