"""Stronger and independent attacks, in the same ball as the paper's: run with `strong: true` in any profile.

Classification: AutoAttack (Croce & Hein 2020). Segmentation: APGD on the cross-entropy, CosPGD (Agnihotri et al. 2024),
the ensemble SEA (Croce, Singh & Hein 2024) and APGD towards one class. Depth: APGD on the training loss, on the squared
error itself, and towards the far and the near end of the range. All attack the model as it is evaluated, whatever the
protocol of the paper's own attacks is, and get STEPS times the steps of the profile's attack.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import attacks, compute
from ..datasets import IGNORE, MAX_DEPTH, image_seed
from ..heads import MIN_DEPTH, TaskModel, depth_loss
from ..metrics import valid_depth
from ..settings import Attack, BadInput

STEPS = 5  # times the steps of the profile's attack: 100 for the paper's 20, which is what AutoAttack takes
QUERIES = 50  # of Square for each of these steps: 5000 for 100, as in AutoAttack
TARGETS = 9  # classes at most that AutoAttack aims at
RHO, MOMENTUM = 0.75, 0.75  # APGD: share of steps that have to improve; weight of the new step against the last move
RADII = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # SEA: radius in eps, and its share of the steps

ALWAYS_FP32 = ("autoattack",)  # whatever precision is asked for
NAMES = {
    "classification": ("autoattack",),
    "segmentation": ("apgd_seg", "cospgd", "sea", "apgd_class"),
    "depth": ("apgd_depth", "apgd_rmse", "apgd_far", "apgd_near"),
}
TITLES = {
    "autoattack": "AutoAttack", "apgd_seg": "APGD", "cospgd": "CosPGD", "sea": "SEA",
    "apgd_class": "APGD to one class", "apgd_depth": "APGD", "apgd_rmse": "APGD on RMSE", "apgd_far": "APGD to far",
    "apgd_near": "APGD to near",
}  # fmt: skip

Loss = Callable[[Tensor, Tensor], Tensor]  # (prediction, target) -> (B,)
# (x_adv, step) -> what APGD ascends (B,), or that and what it judges iterates by, (B,) each
Objective = Callable[[Tensor, int], Tensor | tuple[Tensor, Tensor]]


def attacked(
    name: str, model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int,
    precision: str = "fp32", trace: attacks.Trace | None = None,
) -> Tensor:  # fmt: skip
    """x (B, 3, H, W) in [0,1] under the attack `name` of NAMES[model.task], with |x_adv - x| <= attack.eps, in [0,1].

    Takes STEPS * attack.steps steps, of each loss where there are several, computed in `precision`; AutoAttack is
    always fp32, as it looks for images just beyond the boundary. Random starts are drawn per image from (seed, id), so
    batches do not matter; AutoAttack's noise is drawn from the seed and the batch's first id, so for it they do. A
    `trace` gets what attacks.pgd says of its own steps, the loss being the score that iterates are judged by: of
    several losses the steps of the one that the returned image comes from, of SEA those in the last of its balls; of
    AutoAttack one entry "counted", see _Watched. Raises BadInput for a name that the task does not have.
    """
    if name not in NAMES[model.task]:
        known = ", ".join(NAMES[model.task])
        raise BadInput(f"There is no strong attack '{name}' on {model.task}; choose one of: {known}.")
    if attack.eps == 0:
        return x
    steps = STEPS * attack.steps
    if name == "autoattack":
        return autoattack(model, x, target, attack.eps, steps, image_seed(seed, ids[0]), trace)
    target = target.long() if model.task == "segmentation" else target
    start = attacks.random_start(x, attack.eps, ids, seed)
    if name == "cospgd":
        loss_fn = _objective(model, target, cosine_weighted)
        return attacks.pgd(x, loss_fn, attack.model_copy(update={"steps": steps}), start, precision, trace=trace)
    losses = (towards_class(model, x, target),) if name == "apgd_class" else LOSSES[name]
    objectives = [_objective(model, target, loss, SCORES[model.task], precision) for loss in losses]
    run, traces = shrinking if name == "sea" else apgd, [[] for _ in objectives]
    found = [run(x, o, attack.eps, steps, start, own) for o, own in zip(objectives, traces, strict=True)]
    adv, chosen = _worst(model, target, found)
    if trace is not None:
        trace += _of_chosen(traces, chosen.cpu())
    return adv


def _objective(
    model: TaskModel, target: Tensor, loss: Loss, score: Loss | None = None, precision: str = "fp32"
) -> Objective:
    """The loss of the model's prediction as attacks take it, with the score of the same prediction if one is given."""

    def objective(adv: Tensor, t: int) -> Tensor | tuple[Tensor, Tensor]:
        with compute.steps_in(precision, adv.device):
            prediction = model(adv)
        value = loss(prediction, target)
        return (value, score(prediction.detach(), target)) if score else value

    return objective


@torch.no_grad()
def _worst(model: TaskModel, target: Tensor, found: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of several attacked versions of each image the one of the largest score, and which it is, (B,)."""
    if len(found) == 1:
        return found[0], torch.zeros(len(target), dtype=torch.long)
    scores = torch.stack([SCORES[model.task](model(adv), target) for adv in found])  # (attacks, B)
    chosen = scores.nan_to_num(torch.inf).argmax(0)  # a prediction that is not a number is as wrong as can be
    return torch.stack(found)[chosen, torch.arange(len(target), device=target.device)], chosen


def _of_chosen(traces: list[attacks.Trace], chosen: Tensor) -> attacks.Trace:
    """One trace of several attacks: of each image the steps of the attack that it was taken from."""
    joined = []
    for k, trace in enumerate(traces):
        for entry in trace[:-1]:
            mine = chosen[entry["index"]] == k
            joined.append({n: part[mine] if isinstance(part, Tensor) else part for n, part in entry.items()})
    last = torch.stack([trace[-1]["loss"] for trace in traces])  # (attacks, B)
    everyone = torch.arange(len(chosen))
    attacks.note(joined, None, everyone, last[chosen, everyone])
    return joined


# --- APGD ---


def checkpoints(steps: int) -> set[int]:
    """Steps after which APGD may halve its step size: 22% of all, then ever shorter parts, down to 6%."""
    last, share, marks = 0.0, 0.22, set()
    while share <= 1:
        marks.add(math.ceil(round(share * steps, 6)))
        last, share = share, share + max(share - last - 0.03, 0.06)
    return marks


def apgd(
    x: Tensor, loss_fn: Objective, eps: float, steps: int, start: Tensor | None = None,
    trace: attacks.Trace | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD (Croce & Hein 2020) in the L-infinity ball: gradient signs with momentum, its step size its own affair.

    x, start: (B, 3, H, W) in [0,1]. loss_fn(x_adv, t) -> (B,) for t = 1..steps is made large; it may return a pair
    (loss, score), and then progress and the best iterate are judged by the score. The step size starts at 2 eps and is
    halved, per image, at those of `checkpoints` where fewer than RHO of the steps since the last one improved the
    score, or where neither the best score nor the step size has changed since; the image then goes on from its best
    iterate. Returns each image's iterate of the largest score, the start among them; |x_adv - x| <= eps, in [0,1].
    `trace`: as attacks.pgd fills it, with the scores.
    """
    everyone = torch.arange(len(x))
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    adv = previous = (x if start is None else start).clamp(low, high)
    size, marks, mark = x.new_full((len(x), 1, 1, 1), 2 * eps), checkpoints(steps), 0
    for k in range(steps):
        gradient, score = _ascent(adv, loss_fn, k + 1)
        attacks.note(trace, k + 1, everyone, score, gradient)
        gradient = gradient.nan_to_num()  # where it is not a number nothing moves
        if k == 0:
            best, at_mark, before = (adv, gradient, score), score, score
            rises, halved = torch.zeros_like(score), torch.zeros_like(score, dtype=torch.bool)
        rises, before = rises + (score > before), score
        best = _chosen(score > best[2], (adv, gradient, score), best)
        if k in marks:
            halved = (rises < RHO * (k - mark)) | (~halved & (best[2] <= at_mark))
            size = torch.where(halved[:, None, None, None], size / 2, size)
            adv, gradient, before = _chosen(halved, best, (adv, gradient, score))
            rises, at_mark, mark = torch.zeros_like(rises), best[2], k
        weight = 1 if k == 0 else MOMENTUM
        step = (adv + size * gradient.sign()).clamp(low, high) - adv
        previous, adv = adv, (adv + weight * step + (1 - weight) * (adv - previous)).clamp(low, high)
    with torch.no_grad():
        _, score = _pair(loss_fn(adv, steps))
    attacks.note(trace, None, everyone, torch.maximum(score, best[2]))
    return torch.where((score > best[2])[:, None, None, None], adv, best[0])


def _pair(found: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return found if isinstance(found, tuple) else (found, found.detach())


def _ascent(adv: Tensor, loss_fn: Objective, t: int) -> tuple[Tensor, Tensor]:
    """Gradient (B, 3, H, W) and score (B,) at an iterate."""
    adv = adv.detach().requires_grad_(True)
    loss, score = _pair(loss_fn(adv, t))
    (gradient,) = torch.autograd.grad(loss.sum(), adv)
    return gradient, score


def _chosen(which: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each part of `new` where `which` (B,) says so, else of `old`."""
    pairs = zip(new, old, strict=True)
    return tuple(torch.where(which.view(-1, *[1] * (part.ndim - 1)), part, other) for part, other in pairs)


def shrinking(
    x: Tensor, loss_fn: Objective, eps: float, steps: int, start: Tensor | None = None,
    trace: attacks.Trace | None = None,
) -> Tensor:  # fmt: skip
    """APGD as SEA runs it: in a ball of 2 eps, then of 1.5 eps, then of eps, each from where the last ended."""
    for radius, share in RADII:
        own = trace if radius == 1 else None  # iterates of a larger ball are no candidates
        start = apgd(x, loss_fn, radius * eps, max(1, round(share * steps)), start, own)
    return start


# --- classification ---


def parts(classes: int) -> list[str]:
    """The attacks that AutoAttack consists of: standard's from 4 classes on, none of a single class.

    The targeted DLR loss divides by a difference of the third and fourth largest logits: with 3 classes the untargeted
    one, which needs three, takes its place, and with 2 classes none is defined.
    """
    if classes < 2:
        return []
    dlr = {2: [], 3: ["apgd-dlr"]}.get(classes, ["apgd-t"])
    return ["apgd-ce", *dlr, "fab-t", "square"]


def autoattack(
    model: TaskModel, x: Tensor, label: Tensor, eps: float, steps: int, seed: int, trace: attacks.Trace | None = None
) -> Tensor:
    """AutoAttack by the package pyautoattack: images (B, 3, H, W) that are misclassified if one of its parts succeeds.

    Each part attacks the images that are still right. APGD and FAB take `steps` steps for each target class, Square
    QUERIES * steps queries: with 100 steps this is the standard version. Images that stay right, or are wrong already,
    come back as they are. The same seed gives the same images; the global random state is left alone. A `trace` gets
    one entry with the gradients that the package asked for, see _Watched.
    """
    from pyautoattack import AutoAttack

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    if not parts(classes):
        return x
    watched = _Watched(model)
    auto = AutoAttack(watched, attacks=parts(classes), device=x.device, eps=eps, seed=seed, version="custom")
    for part in (auto.apgd, auto.apgd_targeted):  # all that the package derives from the number of steps
        part.n_restarts, part.n_iter = 1, steps
        part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    auto.fab.n_restarts, auto.fab.n_iter, auto.square.n_queries = 1, steps, QUERIES * steps
    auto.fab.n_target_classes = auto.apgd_targeted.n_target_classes = min(TARGETS, classes - 1)
    with _contained(x):
        adv, _ = auto.run_standard_evaluation(x, label.long(), batch_size=len(x))
    if trace is not None:
        trace.append({"step": None, "counted": watched.counted()})
    return adv.clamp((x - eps).clamp(min=0), (x + eps).clamp(max=1))  # FAB's images may be off by a rounding


class _Watched(nn.Module):
    """A model that counts the gradients which are asked of it, one for each image and step."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model, self.seen, self.zero, self.nan = model, 0, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self._look)
        return self.model(x)

    def _look(self, gradient: Tensor) -> None:
        flat = gradient.flatten(1)
        self.seen += len(flat)
        self.zero += (flat == 0).all(1).sum()
        self.nan += (~flat.isfinite()).any(1).sum()

    def counted(self) -> dict[str, int]:
        """How many gradients there were, and how many of them were 0 everywhere, or not finite."""
        return {"gradients": self.seen, "zero": int(self.zero), "nan": int(self.nan)}


@contextmanager
def _contained(x: Tensor) -> Iterator[None]:
    """Keeps the package's side effects inside: global random state, warnings in the log, an end to any tracing."""
    log, trace = logging.getLogger("auto-attack"), sys.gettrace()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[x.get_device()] if x.is_cuda else []):
            yield
    finally:
        log.setLevel(level)
        sys.settrace(trace)


# --- segmentation: logits (B, C, H, W) and mask (B, H, W) -> (B,); pixels with IGNORE never count ---


def _mean(pixels: Tensor, mask: Tensor) -> Tensor:
    """Mean of pixel values (B, H, W) over the pixels that count."""
    counted = mask != IGNORE
    return torch.where(counted, pixels, 0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def _own(scores: Tensor, mask: Tensor) -> Tensor:
    """Of scores (B, C, H, W) the one of each pixel's true class (B, H, W); of class 0 where the pixel is ignored."""
    return scores.gather(1, mask.masked_fill(mask == IGNORE, 0)[:, None])[:, 0]


def mean_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return _mean(attacks.pixel_cross_entropy(logits, mask)[0], mask)


def masked_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """SEA's masked cross-entropy: wrong pixels, which have nothing left to lose, weigh nothing."""
    pixel, right = attacks.pixel_cross_entropy(logits, mask)
    return _mean(pixel * right, mask)


def balanced_cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """SEA's balanced masked cross-entropy: every class of the image weighs the same, however few pixels it has."""
    pixel, right = attacks.pixel_cross_entropy(logits, mask)
    counts = _own(_counts(mask, logits.shape[1])[..., None, None].expand_as(logits), mask)
    return _mean(pixel * right / counts.clamp(min=1), mask)


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
    return _mean(math.log(2) + (p * log_p - (1 + p) * p.log1p()) / 2, mask)


def masked_margin(logits: Tensor, mask: Tensor) -> Tensor:
    """The largest other logit minus the true one, over right pixels: no softmax, so nothing saturates.

    Takes the place of the spherical loss of SEA's first version, which is constant with two classes.
    """
    label = mask.masked_fill(mask == IGNORE, 0)[:, None]
    other = logits.scatter(1, label, -torch.inf).amax(1)
    return _mean(torch.where(logits.max(1).indices == mask, other - _own(logits, mask), 0), mask)


def cosine_weighted(logits: Tensor, mask: Tensor) -> Tensor:
    """CosPGD: cross-entropy times the cosine of softmax and one-hot truth, which gets no gradient."""
    probability = logits.detach().softmax(1)
    cosine = _own(probability, mask) / torch.linalg.vector_norm(probability, dim=1)
    return _mean(attacks.pixel_cross_entropy(logits, mask)[0] * cosine, mask)


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


def _valid_mean(pixels: Tensor, depth: Tensor) -> Tensor:
    valid = valid_depth(depth)
    return torch.where(valid, pixels, 0).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def squared_error(prediction: Tensor, depth: Tensor) -> Tensor:
    """Mean squared error of each image: the metric itself, before its root."""
    return _valid_mean((prediction - depth) ** 2, depth)


def farther(prediction: Tensor, depth: Tensor) -> Tensor:
    """Minus the mean distance of the prediction from the far end of the range."""
    return -_valid_mean((prediction - MAX_DEPTH).abs(), depth)


def nearer(prediction: Tensor, depth: Tensor) -> Tensor:
    """Minus the mean distance of the prediction from the near end of the range."""
    return -_valid_mean((prediction - MIN_DEPTH).abs(), depth)


LOSSES: dict[str, tuple[Loss, ...]] = {
    "apgd_seg": (mean_cross_entropy,),
    "sea": (jensen_shannon, masked_cross_entropy, balanced_cross_entropy, masked_margin),
    "apgd_depth": (depth_loss,),
    "apgd_rmse": (squared_error,),
    "apgd_far": (farther,),
    "apgd_near": (nearer,),
}
SCORES: dict[str, Loss] = {"segmentation": wrongness, "depth": squared_error}
