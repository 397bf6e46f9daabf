"""One PGD loop (section 3.1); every attack is a loss of it.

Threat model: L-infinity ball of radius eps around x in [0,1] pixel space, white box, untargeted. The normalisation is
part of the model. A loss maps (x_adv, step 1..T) to one number per image; PGD makes each of them larger.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compute, released
from .datasets import IGNORE, image_seed
from .heads import PixelLoss, TaskModel, depth_loss, pixel_loss
from .settings import Attack

LossFn = Callable[[Tensor, int], Tensor]
PairLoss = Callable[[Tensor, Tensor], Tensor]  # (embedding or logits, clean embedding or label) -> (B,)
Trace = list[dict[str, Any]]  # what pgd saw, see there
NAMES = {"classification": "PGD", "segmentation": "SegPGD", "depth": "DepthPGD"}
# More than any image loses that is still classified rightly: of C classes the right one then has less than 1/C. The
# margin is for bf16, whose cross-entropy may be wrong in the second digit.
MARGIN = 0.1


def random_start(x: Tensor, eps: float, ids: list[str], seed: int) -> Tensor:
    """x + U(-eps, eps), clipped to [0,1]; drawn per image from (seed, id), so batches do not matter."""
    noise = [torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(image_seed(seed, i))) for i in ids]
    return (x + eps * (2 * torch.stack(noise).to(x) - 1)).clamp(0, 1)


def pgd(
    x: Tensor, loss_fn: LossFn, attack: Attack, start: Tensor | None = None, precision: str = "fp32",
    enough: float = math.inf, loss_of: Callable[[Tensor], LossFn] | None = None, trace: Trace | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient ascent on `loss_fn` inside the ball of `attack.eps` around x.

    x, start: (B, 3, H, W) in [0,1]. loss_fn(x_adv, t) -> (B,) for t = 1..steps, computed in `precision`; or (B, 2), of
    which the first column is climbed and the second compares iterates. Returns x_adv of the shape of x with
    |x_adv - x| <= eps and values in [0,1]: the last iterate, or with `attack.best` each image's of largest loss. Images
    whose loss exceeds `enough` are finished and leave the batch as they are; `loss_of` then gives the loss of those
    that go on, from their positions (b,) in x.

    A `trace` gets {"step": t, "index": positions of the images in the batch, "loss": their loss before the step,
    "zero", "nan": whether their gradient is 0 everywhere, or not finite}, (b,) each, and at the end the loss of all
    returned images under "step": None.
    """
    low, high = (x - attack.eps).clamp(min=0), (x + attack.eps).clamp(max=1)
    adv, whole = (x if start is None else start).clamp(low, high), loss_fn
    best, best_loss = adv, x.new_full((len(x),), -torch.inf)
    going, result = torch.arange(len(x), device=x.device), x.clone()
    for t in range(1, attack.steps + 1):
        if attack.best:
            best, best_loss = _better(adv, loss_fn, attack.steps, precision, best, best_loss)
        adv = adv.detach().requires_grad_(True)
        with compute.steps_in(precision, x.device):
            loss, judged = _columns(loss_fn(adv, t))
        (gradient,) = torch.autograd.grad(loss.sum(), adv)
        note(trace, t, going, judged, gradient)
        adv = adv.detach()
        if enough < math.inf and (done := loss.detach() > enough).any():
            result[going[done]] = adv[done]
            going, adv, gradient, low, high, best, best_loss = (
                part[~done] for part in (going, adv, gradient, low, high, best, best_loss)
            )
            if not len(going):
                break
            loss_fn = loss_of(going)
        adv = (adv + attack.step * gradient.sign()).clamp(low, high)
    if attack.best and len(going):
        adv = _better(adv, loss_fn, attack.steps, precision, best, best_loss)[0]
    result[going] = adv
    if trace is not None:
        with torch.no_grad(), compute.steps_in(precision, x.device):
            note(trace, None, torch.arange(len(x)), _columns(whole(result, attack.steps))[1])
    return result


def _columns(loss: Tensor) -> tuple[Tensor, Tensor]:
    """What is climbed and what compares iterates, (B,) each."""
    return loss.unbind(1) if loss.ndim == 2 else (loss, loss)


def note(trace: Trace | None, t: int | None, going: Tensor, loss: Tensor, gradient: Tensor | None = None) -> None:
    """Add what one step saw to the trace, if there is one, as `pgd` describes it."""
    if trace is None:
        return
    entry = {"step": t, "index": going, "loss": loss.detach().float(), "zero": None, "nan": None}
    if gradient is not None:
        flat = gradient.flatten(1)
        entry |= {"zero": (flat == 0).all(1), "nan": ~flat.isfinite().all(1)}
    trace.append({name: value.cpu() if isinstance(value, Tensor) else value for name, value in entry.items()})


@torch.no_grad()
def _better(
    adv: Tensor, loss_fn: LossFn, steps: int, precision: str, best: Tensor, best_loss: Tensor
) -> tuple[Tensor, Tensor]:
    """Per image the iterate of the larger loss."""
    with compute.steps_in(precision, adv.device):
        loss = _columns(loss_fn(adv, steps))[1]  # (B,)
    won = loss > best_loss
    return torch.where(won[:, None, None, None], adv, best), torch.where(won, loss, best_loss)


def l2(embedding: Tensor, clean: Tensor) -> Tensor:
    """L2 distance of embeddings (B, F) -> (B,)."""
    return torch.linalg.vector_norm(embedding - clean, dim=1)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy (B,) of logits (B, C) and labels (B,)."""
    return F.cross_entropy(logits, label, reduction="none")


def embed_loss(model: TaskModel, x: Tensor, distance: PairLoss = l2) -> LossFn:
    """EmbedAttack: || f(x') - f(x) ||_2 in the CLS token (classification) or the patch tokens (dense tasks)."""
    with torch.no_grad():
        clean = model.embed(x)
    return lambda adv, t: distance(model.embed(adv), clean)


def cross_entropy_loss(model: TaskModel, label: Tensor, loss: PairLoss = cross_entropy) -> LossFn:
    """PGD for classification: the cross-entropy of the true label (B,)."""
    return lambda adv, t: loss(model(adv), label)


class _Parts(torch.autograd.Function):
    """The sums of segpgd_parts, with their gradient in a third of the passes over the logits that autograd makes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor) -> Tensor:
        seen = mask != IGNORE
        label = torch.where(seen, mask, 0)[:, None]  # (B, 1, H, W)
        top, picked = logits.amax(1, keepdim=True), logits.gather(1, label)
        e = (logits - top).exp_()
        total = e.sum(1, keepdim=True)
        pixel = ((total.log() + top - picked)[:, 0] * seen).flatten(1)  # cross-entropy, 0 where ignored
        right = (picked >= top)[:, 0] & seen
        ctx.save_for_backward(e, total, label, seen, right)
        parts = (pixel * right.flatten(1)).mean(1)
        return torch.stack([parts, pixel.mean(1) - parts], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        e, total, label, seen, right = ctx.saved_tensors
        weight = torch.where(right, gradient[:, 0, None, None], gradient[:, 1, None, None]) * seen / right[0].numel()
        out = e * (weight[:, None] / total)  # softmax minus one-hot, weighted
        return out.scatter_add_(1, label, -weight[:, None]), None


def segpgd_parts(logits: Tensor, mask: Tensor) -> Tensor:
    """The two sums of eq. 1 over HW, (B, 2): cross-entropy of the right pixels, and of the wrong ones.

    logits (B, C, H, W), mask (B, H, W) with IGNORE where a pixel counts in neither set. A tie counts as right.
    """
    return _Parts.apply(logits, mask)


def segpgd(parts: Tensor, weight: float) -> Tensor:
    """Eq. 1 from its two parts (B, 2): (1 - weight) * right pixels + weight * wrong ones -> (B,)."""
    return (1 - weight) * parts[:, 0] + weight * parts[:, 1]


def segpgd_loss(
    model: TaskModel, mask: Tensor, steps: int, parts_of: Callable[[Tensor, Tensor], Tensor] = segpgd_parts
) -> LossFn:
    """SegPGD: eq. 1 with lambda(t) = (t-1)/(2T), first the right pixels alone, later nearly both alike.

    As lambda changes from step to step, the loss has a second column (B, 2): both parts alike, which can be compared.
    """
    mask = mask.long()

    def loss(adv: Tensor, t: int) -> Tensor:
        parts = parts_of(model(adv), mask)
        return torch.stack([segpgd(parts, (t - 1) / (2 * steps)), parts.detach().mean(1)], 1)

    return loss


def depth_pgd_loss(model: TaskModel, depth: Tensor, early: PixelLoss = pixel_loss) -> LossFn:
    """DepthPGD: the training loss of the depth head, eq. 3 and 4; `early`: L_pixel of the first 100 steps."""
    return lambda adv, t: depth_loss(model(adv), depth, early if t <= released.WARM_UP else pixel_loss)


def loss_for(kind: str, model: TaskModel, x: Tensor, target: Tensor, steps: int) -> LossFn:
    """Loss of the attack `kind` ('embed' or 'task') on the model's task, in the model's protocol."""
    other = released.attack_loss(kind, model.task, model.protocol)
    if kind == "embed":
        return embed_loss(model, x, *other)
    if model.task == "classification":
        return cross_entropy_loss(model, target, *other)
    if model.task == "segmentation":
        return segpgd_loss(model, target, steps, *other)
    return depth_pgd_loss(model, target, *other)


def attacked(
    kind: str, model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int,
    precision: str = "fp32", trace: Trace | None = None,
) -> Tensor:  # fmt: skip
    """x under attack: 'clean' returns x itself, 'embed' EmbedAttack, 'task' PGD, SegPGD or DepthPGD."""
    if kind == "clean":
        return x
    start = random_start(x, attack.eps, ids, seed)
    with compute.steps_in(precision, x.device):  # the clean embedding, too: its distance to itself is then 0
        loss_fn = loss_for(kind, model, x, target, attack.steps)
    early = {}
    if kind == "task" and model.task == "classification" and attack.stop_when_broken and not model.protocol:
        classes = model.head.linear.out_features
        early = {"enough": math.log(classes) + MARGIN}
        early["loss_of"] = lambda rows: loss_for(kind, model, x[rows], target[rows], attack.steps)
    return pgd(x, loss_fn, attack, start, precision, trace=trace, **early)
