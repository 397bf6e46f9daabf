"""AutoAttack (Croce & Hein 2020) for classification, by the package pyautoattack; always in fp32."""

import logging
import sys
from collections import Counter

import torch
from torch import Tensor

from .. import attacks
from ..datasets import image_seed
from ..heads import TaskModel
from ..settings import Attack
from . import STEPS

QUERIES = 50  # of Square for each of these steps: 5000 for 100, as in AutoAttack
TARGETS = 9  # classes at most that AutoAttack aims at

logging.getLogger("auto-attack").setLevel(logging.ERROR)  # it warns of what `health` counts


def parts(classes: int) -> list[str]:
    """The attacks that AutoAttack consists of: standard's from 4 classes on, none of a single class.

    The targeted DLR loss divides by a difference of the third and fourth largest logits: with 3 classes the untargeted
    one, which needs three, takes its place, and with 2 classes none is defined.
    """
    if classes < 2:
        return []
    dlr = {2: [], 3: ["apgd-dlr"]}.get(classes, ["apgd-t"])
    return ["apgd-ce", *dlr, "fab-t", "square"]


def run(
    model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int, precision: str = "fp32",
    trace: attacks.Trace | None = None,
) -> Tensor:  # fmt: skip
    """AutoAttack by the package pyautoattack: images (B, 3, H, W) that are misclassified if one of its parts succeeds.

    Each part attacks the images that are still right. APGD and FAB take STEPS * attack.steps steps for each target
    class, Square QUERIES times as many queries: 100 steps are the standard version. Images that stay right, or are
    wrong already, come back as they are. Noise is drawn from the seed and the batch's first identifier; the global
    random state is left alone. A `trace` gets one entry: how many gradients the package asked for, and how many were 0
    everywhere, or not finite.
    """
    from pyautoattack import AutoAttack

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    if attack.eps == 0 or not parts(classes):
        return x
    eps, steps, seed = attack.eps, STEPS * attack.steps, image_seed(seed, ids[0])
    counts = Counter(gradients=0, zero=0, nan=0)

    def watched(images: Tensor) -> Tensor:
        if images.requires_grad:
            images.register_hook(lambda gradient: counts.update(_counted(gradient)))
        return model(images)

    auto = AutoAttack(watched, attacks=parts(classes), device=x.device, eps=eps, seed=seed, version="custom")
    for part in (auto.apgd, auto.apgd_targeted):  # all that the package derives from the number of steps
        part.n_restarts, part.n_iter = 1, steps
        part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    auto.fab.n_restarts, auto.fab.n_iter, auto.square.n_queries = 1, steps, QUERIES * steps
    auto.fab.n_target_classes = auto.apgd_targeted.n_target_classes = min(TARGETS, classes - 1)
    tracing = sys.gettrace()
    with torch.random.fork_rng(devices=[x.get_device()] if x.is_cuda else []):
        adv, _ = auto.run_standard_evaluation(x, target.long(), batch_size=len(x))
    sys.settrace(tracing)  # which the package ends
    if trace is not None:
        trace.append({"step": None, "counted": {name: int(count) for name, count in counts.items()}})
    return adv.clamp((x - eps).clamp(min=0), (x + eps).clamp(max=1))  # FAB's images may be off by a rounding


def _counted(gradient: Tensor) -> dict[str, int | Tensor]:
    flat = gradient.flatten(1)
    nan = (~flat.isfinite()).any(1).sum()  # a tensor, for which nothing waits
    return {"gradients": len(flat), "zero": (flat == 0).all(1).sum(), "nan": nan}


ATTACKS = {"autoattack": attacks.Kind("AutoAttack", run, tasks=("classification",), fp32=True)}
