"""Accuracy, mIoU and RMSE with standard errors, all from one small statistic per image.

A statistic is what has to be added up over images: correct (1,), (hits, union) of each class (C, 2), or (sum of
squares, pixels). So a value over any set of images, its bootstrap over images and its per-image values are the same
function. A prediction that is not a finite number is wrong, whatever the truth is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .datasets import IGNORE, MAX_DEPTH

RESAMPLES = 1000
Reduction = Callable[[str, Tensor, Tensor], Tensor]  # (task, sums (R, ...), images n (R,)) -> metric (R,)


def valid_depth(depth: Tensor) -> Tensor:
    """Where a true depth (metres) counts: 0 marks pixels that the sensor did not see."""
    return (depth > 0) & (depth <= MAX_DEPTH)


def finite(prediction: Tensor) -> Tensor:
    """Where all scores (B, C, ...) of a prediction are finite numbers, (B, ...)."""
    low, high = prediction.aminmax(dim=1)  # a NaN is both
    return low.isfinite() & high.isfinite()


def statistics(task: str, prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """One statistic per image, float64 (B, 1), (B, C, 2) or (B, 2).

    prediction: logits (B, C), logits (B, C, H, W), or depth (B, H, W) in metres; target as in datasets.py.
    """
    if task == "classification":
        right = (prediction.argmax(1) == target) & finite(prediction)
        return right.double().unsqueeze(1).cpu()
    if task == "depth":
        return depth_statistics(prediction, target, valid_depth(target))
    labels = prediction.max(1).indices  # argmax over the second of four axes takes ten times as long on a CPU
    labels = torch.where(finite(prediction), labels, classes)  # a class that nothing is of
    pairs = zip(labels, target.long(), strict=True)
    return torch.stack([_overlap(p, t, classes) for p, t in pairs]).double().cpu()


def depth_statistics(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """(sum of squared errors, pixels) of each image (B, 2) over its `valid` pixels, depths (B, H, W) in metres."""
    error = torch.where(prediction.isfinite(), prediction - target, MAX_DEPTH)  # NaN is as wrong as can be
    squares = torch.where(valid, error.double() ** 2, 0.0)
    return torch.stack([squares.flatten(1).sum(1), valid.flatten(1).sum(1).double()], 1).cpu()


def _overlap(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    """Pixels of intersection and union of each class, (C, 2), from two masks (H, W); labels may be `classes`: none."""
    # here, because it takes seconds, which the other tasks and all that evaluates nothing need not wait
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts = multiclass_confusion_matrix(labels, target, classes + 1, ignore_index=IGNORE, validate_args=False)
    hits = counts.diagonal()
    return torch.stack([hits, counts.sum(0) + counts.sum(1) - hits], 1)[:classes]


def value_of_sums(task: str, sums: Tensor, n: Tensor) -> Tensor:
    """Metric of each of R summed statistics (R, ...) over n (R,) images -> (R,)."""
    if task == "classification":
        return sums[:, 0] / n
    if task == "depth":
        return (sums[:, 0] / sums[:, 1].clamp(min=1)).sqrt()
    return mean_iou(sums)


def mean_iou(sums: Tensor) -> Tensor:
    """Mean IoU (R,) of sums (R, C, 2) over the classes that occur in target or prediction."""
    hits, union = sums.unbind(2)
    return (hits / union.clamp(min=1)).sum(1) / (union > 0).sum(1).clamp(min=1)


def value(task: str, stats: Tensor, reduce: Reduction = value_of_sums) -> float:
    """The metric of these images. mIoU: mean over classes in target or prediction; RMSE: over all valid pixels."""
    return float(reduce(task, stats.sum(0, keepdim=True), torch.tensor([float(len(stats))])))


def standard_error(task: str, stats: Tensor, seed: int = 0, reduce: Reduction = value_of_sums) -> float:
    """Wilson's for accuracy, else the spread of 1000 bootstrap resamples over images.

    Wilson's is half the width of his interval at z = 1, sqrt(p (1 - p) / n + 1 / (4 n^2)) / (1 + 1 / n), which is not 0
    for p of 0 or 1. Where all resamples agree, as in a single image, it stands in for mIoU, too: that is the most that
    numbers from 0 to 1 spread. RMSE is then as uncertain as mean squares that spread by their own size would make it,
    RMSE / (2 sqrt(n)).
    """
    n, whole = len(stats), value(task, stats, reduce)
    wilson = (whole * (1 - whole) / n + 1 / (4 * n**2)) ** 0.5 / (1 + 1 / n) if task != "depth" else 0.0
    if task == "classification":
        return wilson
    draws = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(1, dtype=torch.float64).expand(RESAMPLES, n)
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, draws, ones)
    sums = (counts @ stats.flatten(1)).reshape(RESAMPLES, *stats.shape[1:])
    spread = float(reduce(task, sums, torch.full((RESAMPLES,), float(n))).std())
    if spread > 1e-9:
        return spread
    return whole / (2 * n**0.5) if task == "depth" else wilson


def per_image(task: str, stats: Tensor, reduce: Reduction = value_of_sums) -> list[float]:
    """The metric of every single image."""
    ones = torch.ones(len(stats), dtype=torch.float64)
    return [round(v, 6) for v in reduce(task, stats, ones).tolist()]


def listed(task: str, stats: Tensor) -> list[Any]:
    """Statistics as records keep them and paired.py adds them up, an entry for each image.

    0 or 1; [sum of squares, pixels]; or number, hits and union of each class that occurs, one after the other.
    """
    if task == "classification":
        return [int(right) for (right,) in stats.tolist()]
    if task == "depth":
        return [[float(f"{squares:.9g}"), int(pixels)] for squares, pixels in stats.tolist()]
    return [[n for c in (image[:, 1] > 0).nonzero()[:, 0].tolist() for n in (c, *image[c].int().tolist())]
            for image in stats]  # fmt: skip


def constant_value(task: str, targets: list[Tensor], classes: int) -> float:
    """The metric of the best constant prediction on these targets: what a model that sees nothing reaches.

    The share of the most frequent class; the mIoU of a mask of one class; the RMSE of the mean depth, its spread.
    """
    if task == "depth":
        depths = torch.cat([t[valid_depth(t)] for t in targets]).double()
        return float(depths.std(correction=0))
    if task == "segmentation":
        targets = [t[t != IGNORE] for t in targets]
    # counted one by one: all masks of a large data set as int64 would be many gigabytes
    share = sum(torch.bincount(t.flatten().long(), minlength=classes) for t in targets).double()
    share = share / share.sum().clamp(min=1)
    if task == "classification":
        return float(share.max())
    # predicting class c everywhere: IoU share_c for c, 0 for every other class that occurs
    return float(share.max() / (share > 0).sum().clamp(min=1))
