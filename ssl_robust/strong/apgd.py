"""Auto-PGD (Croce & Hein 2020), and APGD in shrinking balls as SEA (Croce, Singh & Hein 2024) runs it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import attacks

RHO, MOMENTUM = 0.75, 0.75  # share of steps that have to improve; weight of the new step against the last move
RADII = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # SEA: radius in eps, and its share of the steps

# (x_adv, step) -> what APGD ascends (B,), or that and what it judges iterates by, (B,) each
Objective = Callable[[Tensor, int], Tensor | tuple[Tensor, Tensor]]


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
    """Auto-PGD in the L-infinity ball: gradient signs with momentum, its step size its own affair.

    x, start: (B, 3, H, W) in [0,1]. loss_fn(x_adv, t) -> (B,) for t = 1..steps is made large; it may return a pair
    (loss, score), and then progress and the best iterate are judged by the score. The step size starts at 2 eps and is
    halved, per image, at those of `checkpoints` where fewer than RHO of the steps since the last one improved the
    score, or where neither the best score nor the step size has changed since; the image then goes on from its best
    iterate. Returns each image's iterate of the largest score, |x_adv - x| <= eps, in [0,1]. `trace`: as attacks.pgd's.
    """
    everyone = torch.arange(len(x))
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    adv = previous = (x if start is None else start).clamp(low, high)
    size, marks, mark = x.new_full((len(x), 1, 1, 1), 2 * eps), checkpoints(steps), 0
    for k in range(steps):
        adv = adv.detach().requires_grad_(True)
        loss, score = _pair(loss_fn(adv, k + 1))
        (gradient,) = torch.autograd.grad(loss.sum(), adv)
        adv = adv.detach()
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
