"""Attacks on the dense tasks: APGD on several losses, CosPGD (Agnihotri et al. 2024), SEA (Croce et al. 2024)."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import attacks, compute
from ..datasets import IGNORE, MAX_DEPTH
from ..heads import MIN_DEPTH, TaskModel, depth_loss
from ..metrics import valid_depth
from ..settings import Attack
from . import STEPS
from .apgd import Objective, apgd, shrinking

Loss = Callable[[Tensor, Tensor], Tensor]  # (prediction, target) -> (B,)


def run(
    name: str, model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int,
    precision: str = "fp32", trace: attacks.Trace | None = None,
) -> Tensor:  # fmt: skip
    """x (B, 3, H, W) in [0,1] under the attack `name`, of STEPS times attack.steps for each of its losses.

    A `trace` gets what attacks.pgd says of its own steps, the loss being the score that iterates are judged by: of
    several losses the steps of the one that the returned image comes from, of SEA those in the last of its balls.
    """
    steps, start = STEPS * attack.steps, attacks.random_start(x, attack.eps, ids, seed)
    target = target.long() if model.task == "segmentation" else target
    if name == "cospgd":
        loss_fn = _objective(model, target, cosine_weighted)
        return attacks.pgd(x, loss_fn, attack.model_copy(update={"steps": steps}), start, precision, trace=trace)
    losses = (towards_class(model, x, target),) if name == "apgd_class" else LOSSES[name]
    objectives = [_objective(model, target, loss, SCORES[model.task], precision) for loss in losses]
    climb, traces = shrinking if name == "sea" else apgd, [[] for _ in objectives]
    found = [climb(x, o, attack.eps, steps, start, own) for o, own in zip(objectives, traces, strict=True)]
    adv, chosen = _worst(model, target, found)
    if trace is not None:
        trace += _of_chosen(traces, chosen.cpu())
    return adv


def _objective(
    model: TaskModel, target: Tensor, loss: Loss, score: Loss | None = None, precision: str = "fp32"
) -> Objective:
    """The loss of the model's prediction, with the score of the same prediction if one is given."""

    def objective(adv: Tensor, t: int) -> Tensor | tuple[Tensor, Tensor]:
        with compute.steps_in(precision, adv.device):
            prediction = model(adv)
        value = loss(prediction, target)
        return (value, score(prediction.detach(), target)) if score else value

    return objective


@torch.no_grad()
def _worst(model: TaskModel, target: Tensor, found: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of several attacked versions of each image the one of the largest score, and which it is, (B,)."""
    scores = torch.stack([SCORES[model.task](model(adv), target) for adv in found])  # (attacks, B)
    chosen = scores.nan_to_num(torch.inf).argmax(0)  # a prediction that is not a number is as wrong as can be
    return torch.stack(found)[chosen, torch.arange(len(target), device=target.device)], chosen


def _of_chosen(traces: list[attacks.Trace], chosen: Tensor) -> attacks.Trace:
    """One trace of several attacks: of each image the steps of the attack that it was taken from."""
    joined, everyone = [], torch.arange(len(chosen))
    for k, trace in enumerate(traces):
        for entry in trace[:-1]:
            mine = chosen[entry["index"]] == k
            joined.append({n: part[mine] if isinstance(part, Tensor) else part for n, part in entry.items()})
    last = torch.stack([trace[-1]["loss"] for trace in traces])  # (attacks, B)
    attacks.note(joined, None, everyone, last[chosen, everyone])
    return joined


def _mean(pixels: Tensor, counted: Tensor) -> Tensor:
    """Mean of pixel values (B, H, W) over those that count, (B,)."""
    return torch.where(counted, pixels, 0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


# --- segmentation: logits (B, C, H, W) and mask (B, H, W) -> (B,); pixels with IGNORE never count ---


def _own(scores: Tensor, mask: Tensor) -> Tensor:
    """Of scores (B, C, H, W) the one of each pixel's true class (B, H, W); of class 0 where the pixel is ignored."""
    return scores.gather(1, mask.masked_fill(mask == IGNORE, 0)[:, None])[:, 0]


def mean_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    return _mean(attacks.pixel_cross_entropy(logits, mask)[0], mask != IGNORE)


def masked_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """SEA's masked cross-entropy: wrong pixels, which have nothing left to lose, weigh nothing."""
    pixel, right = attacks.pixel_cross_entropy(logits, mask)
    return _mean(pixel * right, mask != IGNORE)


def balanced_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """SEA's balanced masked cross-entropy: every class of the image weighs the same, however few pixels it has."""
    pixel, right = attacks.pixel_cross_entropy(logits, mask)
    sizes = _own(_counts(mask, logits.shape[1])[..., None, None].expand_as(logits), mask)
    return _mean(pixel * right / sizes.clamp(min=1), mask != IGNORE)


def _counts(mask: Tensor, classes: int) -> Tensor:
    """Pixels of each class, (B, C)."""
    return torch.stack([torch.bincount(m[m != IGNORE], minlength=classes) for m in mask])


def jensen_shannon(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence of the softmax from the true class: bounded, so wrong pixels soon weigh little.

    From a one-hot distribution it depends on the probability p of the true class alone: log 2 + (p log p - (1 + p)
    log(1 + p)) / 2.
    """
    log_p = -attacks.pixel_cross_entropy(logits, mask)[0]
    p = log_p.exp()
    return _mean(math.log(2) + (p * log_p - (1 + p) * p.log1p()) / 2, mask != IGNORE)


def masked_margin(logits: Tensor, mask: Tensor) -> Tensor:
    """The largest other logit minus the true one, over right pixels: no softmax, so nothing saturates.

    Takes the place of the spherical loss of SEA's first version, which is constant with two classes.
    """
    label = mask.masked_fill(mask == IGNORE, 0)[:, None]
    other = logits.scatter(1, label, -torch.inf).amax(1)
    return _mean(torch.where(logits.max(1).indices == mask, other - _own(logits, mask), 0), mask != IGNORE)


def cosine_weighted(logits: Tensor, mask: Tensor) -> Tensor:
    """CosPGD: cross-entropy times the cosine of softmax and one-hot truth, which gets no gradient."""
    probability = logits.detach().softmax(1)
    cosine = _own(probability, mask) / torch.linalg.vector_norm(probability, dim=1)
    return _mean(attacks.pixel_cross_entropy(logits, mask)[0] * cosine, mask != IGNORE)


@torch.no_grad()
def towards_class(model: TaskModel, x: Tensor, mask: Tensor) -> Loss:
    """Minus the mean cross-entropy of one class for each image: the likeliest one that its mask does not contain.

    Where the mask contains all classes it is the rarest. When this succeeds every pixel is wrong, or nearly so.
    """
    logits = model(x)
    counts = _counts(mask, logits.shape[1])
    likely = torch.where((mask != IGNORE)[:, None], logits.log_softmax(1), 0).flatten(2).sum(2)  # (B, C)
    absent = likely.masked_fill(counts > 0, -torch.inf)
    aim = torch.where((counts > 0).all(1, keepdim=True), -counts.to(likely), absent).argmax(1)  # (B,)
    return lambda logits, mask: -mean_cross_entropy(logits, torch.where(mask == IGNORE, mask, aim[:, None, None]))


def wrongness(logits: Tensor, mask: Tensor) -> Tensor:
    """Share of wrong pixels, float64 in [0,1]; where it is the same, a larger cross-entropy is worse.

    Not the mIoU of the image, which falls to almost nothing for few wrong pixels if they are of many absent classes.
    """
    pixels = (mask != IGNORE).flatten(1).sum(1).clamp(min=1).double()
    wrong = ((logits.max(1).indices != mask) & (mask != IGNORE)).flatten(1).sum(1)
    loss = attacks.comparable(mean_cross_entropy(logits, mask), logits, mask).double()
    within = 1 - 1 / (1 + (loss + 0.2).clamp(min=0))  # the loss of certain pixels lies a little below 0
    return (wrong + within) / (pixels + 1)


# --- depth: depths (B, H, W) in metres -> (B,); only pixels with a true depth count ---


def squared_error(prediction: Tensor, depth: Tensor) -> Tensor:
    """Mean squared error of each image: the metric itself, before its root."""
    return _mean((prediction - depth) ** 2, valid_depth(depth))


def towards(prediction: Tensor, depth: Tensor, end: float) -> Tensor:
    """Minus the mean distance of the prediction from an end of the range."""
    return -_mean((prediction - end).abs(), valid_depth(depth))


LOSSES: dict[str, tuple[Loss, ...]] = {
    "apgd_seg": (mean_cross_entropy,),
    "sea": (jensen_shannon, masked_cross_entropy, balanced_cross_entropy, masked_margin),
    "apgd_depth": (depth_loss,),
    "apgd_rmse": (squared_error,),
    "apgd_far": (partial(towards, end=MAX_DEPTH),),
    "apgd_near": (partial(towards, end=MIN_DEPTH),),
}
SCORES: dict[str, Loss] = {"segmentation": wrongness, "depth": squared_error}
TITLES = {
    "segmentation": {"apgd_seg": "APGD", "cospgd": "CosPGD", "sea": "SEA", "apgd_class": "APGD to one class"},
    "depth": {
        "apgd_depth": "APGD", "apgd_rmse": "APGD on RMSE", "apgd_far": "APGD to far", "apgd_near": "APGD to near",
    },
}  # fmt: skip
ATTACKS = {
    name: attacks.Kind(title, partial(run, name), tasks=(task,))
    for task, titles in TITLES.items()
    for name, title in titles.items()
}
