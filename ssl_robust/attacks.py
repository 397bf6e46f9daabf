"""One PGD loop (section 3.1); every attack is a loss of it.

Threat model: L-infinity ball of radius eps around x in [0,1] pixel space, white box, untargeted. The normalisation is
part of the model. A loss maps (x_adv, step 1..T) to one number per image; PGD makes each of them larger.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compute, parts, protocol
from .datasets import IGNORE, image_seed
from .heads import TaskModel, depth_loss
from .settings import Attack, BadInput, Settings
from .tasks import TASKS

LossFn = Callable[[Tensor, int], Tensor]
PairLoss = Callable[[Tensor, Tensor], Tensor]  # (embedding or logits, clean embedding or label) -> (B,)
Trace = list[dict[str, Any]]  # what pgd saw, see there
# added to what an image has lost for sure before it leaves, so that the rounding of another batch turns none back
MARGIN = 0.1
TINY = 1e-6  # below this mean cross-entropy images are compared by its logarithm
FAINT = 1e-3  # share of its weight that a pixel has to lose: below it everywhere the gradient of an image is rescaled


def random_start(x: Tensor, eps: float, ids: list[str], seed: int) -> Tensor:
    """x + U(-eps, eps), clipped to [0,1]; drawn per image from (seed, id), so batches do not matter."""
    noise = torch.empty(x.shape, pin_memory=x.is_cuda)  # from pinned memory a GPU copies while it computes
    for one, name in zip(noise, ids, strict=True):
        torch.rand(one.shape, generator=torch.Generator().manual_seed(image_seed(seed, name)), out=one)
    return (x + eps * (2 * noise.to(x, non_blocking=True) - 1)).clamp(0, 1)


def pgd(
    x: Tensor, loss_fn: LossFn, attack: Attack, start: Tensor | None = None, precision: str = "fp32",
    finished: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    loss_of: Callable[[Tensor], LossFn] | None = None, trace: Trace | None = None,
    direction: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient ascent on `loss_fn` inside the ball of `attack.eps` around x.

    x, start: (B, 3, H, W) in [0,1]. loss_fn(x_adv, t) -> (B,) for t = 1..steps, computed in `precision`; or (B, 2), of
    which the first column is climbed and the second compares iterates. Returns x_adv of the shape of x with
    |x_adv - x| <= eps and values in [0,1]: the last iterate, or with `attack.best` each image's of largest loss. Images
    that are `finished`(iterates, positions in x, losses) leave the batch as they are; `loss_of`(positions) then gives
    the loss of those that go on. A step is the sign of the gradient, or of `direction`(gradient, its last answer).

    A `trace` gets {"step": t, "index": positions of the images in the batch, "loss": their loss before the step,
    "zero", "nan": whether their gradient is 0 everywhere, or not finite}, (b,) each, and at the end the loss of all
    returned images under "step": None.
    """
    low, high = (x - attack.eps).clamp(min=0), (x + attack.eps).clamp(max=1)
    adv, whole = (x if start is None else start).clamp(low, high), loss_fn
    best, best_loss = adv, x.new_full((len(x),), -torch.inf)
    going, result, moved = torch.arange(len(x), device=x.device), x.clone(), torch.zeros_like(x)
    for t in range(1, attack.steps + 1):
        if attack.best:
            best, best_loss = _better(adv, loss_fn, attack.steps, precision, best, best_loss)
        adv = adv.detach().requires_grad_(True)
        with compute.steps_in(precision, x.device):
            loss, judged = _columns(loss_fn(adv, t))
        (gradient,) = torch.autograd.grad(loss.sum(), adv)
        note(trace, t, going, judged, gradient)
        adv = adv.detach()
        if finished and (done := finished(adv, going, judged.detach())).any():
            result[going[done]] = adv[done]
            going, adv, gradient, low, high, best, best_loss, moved = (
                part[~done] for part in (going, adv, gradient, low, high, best, best_loss, moved)
            )
            if not len(going):
                break
            loss_fn = loss_of(going)
        moved = direction(gradient, moved) if direction else gradient
        adv = (adv + attack.step * moved.sign()).clamp(low, high)
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
    if trace is not None:
        entry = {"step": t, "index": going.cpu(), "loss": loss.detach().float().cpu(), "zero": None, "nan": None}
        if gradient is not None:
            flat = gradient.flatten(1)
            entry |= {"zero": (flat == 0).all(1).cpu(), "nan": (~flat.isfinite().all(1)).cpu()}
        trace.append(entry)


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


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """logsumexp of the other logits minus the true one, (B, ..) from logits (B, C, ..) and labels (B, ..).

    It is log((1 - p) / p) of the true class's probability p, so the gradient of cross-entropy, -log p, is this one's
    times 1 - p: a positive factor per image, which the sign of PGD does not see. But of a certain classifier (heads
    trained with the paper's learning rate of 0.5 have margins of hundreds) 1 - p is 0 in floating point, and with it
    the whole gradient of cross-entropy; this one never vanishes.
    """
    label = label.unsqueeze(1)
    return (logits.scatter(1, label, -math.inf).logsumexp(1, keepdim=True) - logits.gather(1, label)).squeeze(1)


def embed_loss(model: TaskModel, x: Tensor, distance: PairLoss = l2) -> LossFn:
    """EmbedAttack: || f(x') - f(x) ||_2 in the CLS token (classification) or the patch tokens (dense tasks)."""
    with torch.no_grad():
        clean = model.embed(x)
    return lambda adv, t: distance(model.embed(adv), clean)


def pgd_loss(model: TaskModel, label: Tensor, loss: PairLoss = margin) -> LossFn:
    """PGD for classification: the cross-entropy of the true label (B,), climbed by its margin."""
    return lambda adv, t: loss(model(adv), label)


class _PixelCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each pixel, with its gradient in a third of the passes over the logits that autograd makes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen = mask != IGNORE
        label = torch.where(seen, mask, 0)[:, None]  # (B, 1, H, W)
        top, picked = logits.amax(1, keepdim=True), logits.gather(1, label)
        e = (logits - top).exp_()
        total = e.sum(1, keepdim=True)
        right = (picked >= top)[:, 0] & seen
        ctx.save_for_backward(logits, e, total, label, seen)
        ctx.mark_non_differentiable(right)
        return (total.log() + top - picked)[:, 0] * seen, right

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, e, total, label, seen = ctx.saved_tensors
        weight = (gradient * seen)[:, None]  # (B, 1, H, W)
        left = 1 - e.gather(1, label) / total  # 1 - p: what pixels have to lose, the size of their gradient
        faint = (weight * left).abs().flatten(1).amax(1) < FAINT * weight.abs().flatten(1).amax(1)
        out = e * (weight / total)  # softmax minus one-hot, weighted
        out.scatter_add_(1, label, -weight)
        if faint.any():
            out[faint] = _rescaled(logits[faint], label[faint], weight[faint])
        return out, None


def _rescaled(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weighted cross-entropies (B, C, H, W) of certain pixels, but for a positive factor per image.

    Each pixel's is weight * (1 - p) times that of its margin, see `margin`; of the factors, which floating point takes
    for 0, only the ratios matter within an image, so they are taken relative to the largest, in logarithms.
    """
    log_left = F.logsigmoid(margin(logits, label[:, 0]))[:, None]  # log(1 - p)
    size = weight.abs().log() + log_left
    top = size.flatten(1).amax(1).nan_to_num(neginf=0)[:, None, None, None]  # without any weight all stays 0
    factor = weight.sign() * (size - top).exp()
    return (factor * logits.scatter(1, label, -math.inf).softmax(1)).scatter_add_(1, label, -factor)


def pixel_cross_entropy(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each pixel (B, H, W), 0 where ignored, and whether it is classified rightly (a tie counts so).

    logits (B, C, H, W), mask (B, H, W) of class numbers and IGNORE. For attacks, which take signs: where every pixel of
    an image is so certain that floating point leaves no gradient or a rough one (less than FAINT of the weights), it
    comes multiplied by a positive factor per image; one such loss for each prediction.
    """
    return _PixelCrossEntropy.apply(logits, mask)


def segpgd_parts(logits: Tensor, mask: Tensor) -> Tensor:
    """The two sums of eq. 1 over HW, (B, 2): cross-entropy of the right pixels, and of the wrong ones.

    logits (B, C, H, W), mask (B, H, W) with IGNORE where a pixel counts in neither set.
    """
    pixel, right = pixel_cross_entropy(logits, mask)
    parts = (pixel * right).flatten(1).mean(1)
    return torch.stack([parts, pixel.flatten(1).mean(1) - parts], 1)


def comparable(loss: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """`loss` (B,), a mean cross-entropy, continued below TINY by its logarithm, where floating point soon has but 0.

    So images of certain pixels can be compared, too. logits and mask as in pixel_cross_entropy.
    """
    small = loss < TINY
    if small.any():
        scores, seen = logits[small], mask[small] != IGNORE
        apart = margin(scores, mask[small].long().where(seen, 0))
        log_pixel = torch.where(apart < -15, apart, F.softplus(apart).log()).masked_fill(~seen, -math.inf)
        log_loss = log_pixel.flatten(1).logsumexp(1) - math.log(seen[0].numel())
        loss = loss.masked_scatter(small, TINY * (1 + log_loss.clamp(min=-1e5) - math.log(TINY)))
    return loss


def segpgd(parts: Tensor, weight: float) -> Tensor:
    """Eq. 1 from its two parts (B, 2): (1 - weight) * right pixels + weight * wrong ones -> (B,)."""
    return (1 - weight) * parts[:, 0] + weight * parts[:, 1]


def _segpgd_loss(
    model: TaskModel, mask: Tensor, steps: int, parts_of: Callable[[Tensor, Tensor], Tensor] = segpgd_parts
) -> LossFn:
    """SegPGD: eq. 1 with lambda(t) = (t-1)/(2T), first the right pixels alone, later nearly both alike.

    As lambda changes from step to step, the loss has a second column (B, 2): both parts alike, which can be compared.
    """
    mask = mask.long()

    def loss(adv: Tensor, t: int) -> Tensor:
        logits = model(adv)
        parts = parts_of(logits, mask)
        alike = comparable(parts.detach().mean(1), logits.detach(), mask)
        return torch.stack([segpgd(parts, (t - 1) / (2 * steps)), alike], 1)

    return loss


def loss_for(kind: str, model: TaskModel, x: Tensor, target: Tensor, steps: int) -> LossFn:
    """Loss of the attack `kind` ('embed' or 'task') on the model's task, in the model's protocol.

    DepthPGD climbs the training loss of the depth head, eq. 3 and 4.
    """
    other = protocol.ask(model.protocol, "attack_loss", [], kind, model.task)
    if kind == "embed":
        return embed_loss(model, x, *other)
    if model.task == "classification":
        return pgd_loss(model, target, *other)
    if model.task == "segmentation":
        return _segpgd_loss(model, target, steps, *other)
    (of_depth,) = other or [lambda said, depth, t: depth_loss(said, depth)]
    return lambda adv, t: of_depth(model(adv), target, t)


def _paper(
    kind: str, model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int,
    precision: str = "fp32", trace: Trace | None = None,
) -> Tensor:  # fmt: skip
    """x (B, 3, H, W) in [0,1] under the paper's attacks: 'embed' EmbedAttack, 'task' PGD, SegPGD or DepthPGD."""
    start, early = random_start(x, attack.eps, ids, seed), {}
    with compute.steps_in(precision, x.device):  # the clean embedding, too: its distance to itself is then 0
        loss_fn = loss_for(kind, model, x, target, attack.steps)
    if leaves(kind, model, attack):
        early["finished"] = lambda adv, rows, loss: _misclassified(model, adv, target[rows], loss > enough(model))
        early["loss_of"] = lambda rows: loss_for(kind, model, x[rows], target[rows], attack.steps)
    return pgd(x, loss_fn, attack, start, precision, trace=trace, **early)


def leaves(kind: str, model: TaskModel, attack: Attack) -> bool:
    """Whether images leave this attack once their class is lost, which is all that PGD on classes wants."""
    return kind == "task" and model.task == "classification" and attack.stop_when_broken and not model.protocol


def enough(model: TaskModel) -> float:
    """The loss of PGD above which an image is misclassified: its class then has less than 1 / C of the probability."""
    classes = model.head.linear.out_features
    return MARGIN + math.log(classes if "pgd_scaled_logits" in model.protocol else max(1, classes - 1))


@torch.no_grad()
def _misclassified(model: TaskModel, adv: Tensor, label: Tensor, likely: Tensor) -> Tensor:
    """Which images (B,) the model misclassifies in fp32, as they will be judged; only the `likely` ones are tried."""
    lost = torch.zeros_like(likely)
    if likely.any():
        lost[likely] = model(adv[likely]).argmax(1) != label[likely]
    return lost


# --- all attacks by name: a column of the tables each ---


class Kind(NamedTuple):
    """One attack, or none."""

    title: str  # in tables; '' if it is the task's own attack, see tasks.Task
    run: Callable[..., Tensor]  # (model, x, target, ids, attack, seed, precision, trace) -> x_adv, as `attacked`
    loops: tuple[str, ...] = ("pgd", "strong")  # what computes it, of records.VERSIONS
    tasks: tuple[str, ...] = tuple(TASKS)
    fp32: bool = False  # whatever precision is asked for
    source: str = ""  # of one's own: a hash of the file that it stands in


KINDS = {
    "clean": Kind("none", lambda model, x, *_: x, ()),
    "embed": Kind("EmbedAttack", partial(_paper, "embed"), ("pgd", "embed")),
    "task": Kind("", partial(_paper, "task"), ("pgd", "task")),
}


def known() -> dict[str, Kind]:
    """All attacks by the names that YAML calls them, those of files in ssl_robust/strong among them."""
    return KINDS | parts.table("strong", "ATTACKS")


def attacked(
    kind: str, model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int,
    precision: str = "fp32", trace: Trace | None = None,
) -> Tensor:  # fmt: skip
    """x (B, 3, H, W) in [0,1] under the attack `kind` of `known`; 'clean' returns x itself.

    |x_adv - x| <= attack.eps and x_adv in [0,1]. Random starts are drawn per image from (seed, id), so batches do not
    matter (but to AutoAttack). Steps are computed in `precision`; a `trace` gets what `pgd` says of its own.
    """
    there = {name: found for name, found in known().items() if model.task in found.tasks}
    if kind not in there:
        raise BadInput(f"There is no attack '{kind}' on {model.task}; choose one of: {', '.join(there)}.")
    return there[kind].run(model, x, target, ids, attack, seed, precision, trace)


def kinds(task: str, settings: Settings) -> dict[str, Kind]:
    """Clean images and the attacks of `settings.attacks` that serve `task`, in their order.

    Raises BadInput for an attack that is neither here nor in a file of ssl_robust/strong nor has a `call`.
    """
    there, found = known(), {"clean": KINDS["clean"]}
    for own in settings.attacks:
        if isinstance(own, str) and own not in there:
            raise BadInput(f"There is no attack '{own}'; choose from: {', '.join(n for n in there if n != 'clean')}.")
        found |= {own: there[own]} if isinstance(own, str) else {own.name: parts.part("strong.own").kind(own)}
    return {name: kind for name, kind in found.items() if task in kind.tasks}


def title(task: str, name: str, kind: Kind) -> str:
    """Name of an attack in tables."""
    return kind.title or (TASKS[task].attack if name == "task" else name)
