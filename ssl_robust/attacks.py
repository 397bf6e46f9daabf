"""One PGD loop (section 3.1); every attack is a loss of it.

Threat model: L-infinity ball of radius eps around x in [0,1] pixel space, white box, untargeted. The normalisation is
part of the model. A loss maps (x_adv, step 1..T) to one number per image; PGD makes each of them larger.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import released
from .datasets import IGNORE, image_seed
from .heads import PixelLoss, TaskModel, depth_loss, pixel_loss
from .settings import Attack

LossFn = Callable[[Tensor, int], Tensor]
PairLoss = Callable[[Tensor, Tensor], Tensor]  # (embedding or logits, clean embedding or label) -> (B,)
NAMES = {"classification": "PGD", "segmentation": "SegPGD", "depth": "DepthPGD"}


def random_start(x: Tensor, eps: float, ids: list[str], seed: int) -> Tensor:
    """x + U(-eps, eps), clipped to [0,1]; drawn per image from (seed, id), so batches do not matter."""
    noise = [torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(image_seed(seed, i))) for i in ids]
    return (x + eps * (2 * torch.stack(noise).to(x) - 1)).clamp(0, 1)


def pgd(x: Tensor, loss_fn: LossFn, attack: Attack, start: Tensor | None = None) -> Tensor:
    """Projected gradient ascent on `loss_fn` inside the ball of `attack.eps` around x.

    x, start: (B, 3, H, W) in [0,1]. loss_fn(x_adv, t) -> (B,) for t = 1..steps. Returns x_adv of the shape of x with
    |x_adv - x| <= eps and values in [0,1]: the last iterate, or with `attack.best` each image's of largest loss.
    """
    low, high = (x - attack.eps).clamp(min=0), (x + attack.eps).clamp(max=1)
    adv = (x if start is None else start).clamp(low, high)
    best, best_loss = adv, x.new_full((len(x),), -torch.inf)
    for t in range(1, attack.steps + 1):
        if attack.best:
            best, best_loss = _better(adv, loss_fn, attack.steps, best, best_loss)
        adv = adv.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_fn(adv, t).sum(), adv)
        adv = (adv.detach() + attack.step * gradient.sign()).clamp(low, high)
    return _better(adv, loss_fn, attack.steps, best, best_loss)[0] if attack.best else adv


@torch.no_grad()
def _better(adv: Tensor, loss_fn: LossFn, steps: int, best: Tensor, best_loss: Tensor) -> tuple[Tensor, Tensor]:
    """Per image the iterate of the larger loss; each is judged by the loss of the last step, as SegPGD's changes."""
    loss = loss_fn(adv, steps)  # (B,)
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


def segpgd(logits: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Eq. 1: (1-weight)/(HW) * loss over right pixels + weight/(HW) * loss over wrong ones -> (B,).

    logits (B, C, H, W), mask (B, H, W) with IGNORE where a pixel counts in neither set.
    """
    pixel = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none")  # (B, H, W), 0 where ignored
    right = logits.argmax(1) == mask
    return torch.where(right, (1 - weight) * pixel, weight * pixel).flatten(1).mean(1)


def segpgd_loss(model: TaskModel, mask: Tensor, steps: int, loss: Callable[..., Tensor] = segpgd) -> LossFn:
    """SegPGD: eq. 1 with lambda(t) = (t-1)/(2T), first the right pixels alone, later nearly both alike."""
    mask = mask.long()
    return lambda adv, t: loss(model(adv), mask, (t - 1) / (2 * steps))


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
    kind: str, model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int
) -> Tensor:
    """x under attack: 'clean' returns x itself, 'embed' EmbedAttack, 'task' PGD, SegPGD or DepthPGD."""
    if kind == "clean":
        return x
    start = random_start(x, attack.eps, ids, seed)
    return pgd(x, loss_for(kind, model, x, target, attack.steps), attack, start)
