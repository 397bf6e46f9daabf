"""Accuracy, mIoU and RMSE with standard errors, all from one small statistic per image.

A statistic is what has to be added up over images: correct (1,), confusion matrix (C, C), (sum of squares, pixels).
So a value over any set of images, its bootstrap over images and its per-image values are the same function.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .datasets import IGNORE, MAX_DEPTH

METRIC = {"classification": "accuracy", "segmentation": "mIoU", "depth": "RMSE"}
BETTER = {"accuracy": 1, "mIoU": 1, "RMSE": -1}  # +1: larger is better
RESAMPLES = 1000
Reduction = Callable[[str, Tensor, Tensor], Tensor]  # (task, sums (R, ...), images n (R,)) -> metric (R,)


def valid_depth(depth: Tensor) -> Tensor:
    """Where a true depth (metres) counts: 0 marks pixels that the sensor did not see."""
    return (depth > 0) & (depth <= MAX_DEPTH)


def statistics(task: str, prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """One statistic per image, float64 (B, 1), (B, C, C) [target, predicted] or (B, 2).

    prediction: logits (B, C), logits (B, C, H, W), or depth (B, H, W) in metres; target as in datasets.py.
    """
    if task == "classification":
        return (prediction.argmax(1) == target).double().unsqueeze(1).cpu()
    if task == "depth":
        return depth_statistics(prediction, target, valid_depth(target))
    labels = prediction.max(1).indices  # argmax over the second of four axes takes ten times as long on a CPU
    pairs = zip(labels, target.long(), strict=True)
    return torch.stack([_confusion(p, t, classes) for p, t in pairs]).double().cpu()


def depth_statistics(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """(sum of squared errors, pixels) of each image (B, 2) over its `valid` pixels, depths (B, H, W) in metres."""
    error = torch.where(prediction.isfinite(), prediction - target, MAX_DEPTH)  # NaN is as wrong as can be
    squares = torch.where(valid, error.double() ** 2, 0.0)
    return torch.stack([squares.flatten(1).sum(1), valid.flatten(1).sum(1).double()], 1).cpu()


def _confusion(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    # here, because it takes seconds, which the other tasks and all that evaluates nothing need not wait
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(labels, target, classes, ignore_index=IGNORE, validate_args=False)


def value_of_sums(task: str, sums: Tensor, n: Tensor) -> Tensor:
    """Metric of each of R summed statistics (R, ...) over n (R,) images -> (R,)."""
    if task == "classification":
        return sums[:, 0] / n
    if task == "depth":
        return (sums[:, 0] / sums[:, 1].clamp(min=1)).sqrt()
    return mean_iou(*overlaps(sums))


def overlaps(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of each class, (R, C) each, from R confusion matrices (R, C, C)."""
    hits = confusion.diagonal(dim1=1, dim2=2)
    return hits, confusion.sum(1) + confusion.sum(2) - hits


def mean_iou(hits: Tensor, union: Tensor) -> Tensor:
    """Mean IoU (R,) over the classes of (R, C) that occur in target or prediction."""
    return (hits / union.clamp(min=1)).sum(1) / (union > 0).sum(1).clamp(min=1)


def value(task: str, stats: Tensor, reduce: Reduction = value_of_sums) -> float:
    """The metric of these images. mIoU: mean over classes in target or prediction; RMSE: over all valid pixels."""
    return float(reduce(task, stats.sum(0, keepdim=True), torch.tensor([float(len(stats))])))


def standard_error(task: str, stats: Tensor, seed: int = 0, reduce: Reduction = value_of_sums) -> float:
    """Binomial for accuracy, else the spread of 1000 bootstrap resamples over images."""
    n = len(stats)
    if task == "classification":
        p = value(task, stats)
        return (p * (1 - p) / n) ** 0.5
    draws = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(
        1, draws, torch.ones(1, dtype=torch.float64).expand(RESAMPLES, n)
    )
    sums = (counts @ stats.flatten(1)).reshape(RESAMPLES, *stats.shape[1:])
    return float(reduce(task, sums, torch.full((RESAMPLES,), float(n))).std()) if n > 1 else 0.0


def per_image(task: str, stats: Tensor, reduce: Reduction = value_of_sums) -> list[float]:
    """The metric of every single image."""
    ones = torch.ones(len(stats), dtype=torch.float64)
    return [round(v, 6) for v in reduce(task, stats, ones).tolist()]


def constant_value(task: str, targets: list[Tensor], classes: int) -> float:
    """The metric of the best constant prediction on these targets: what a model that sees nothing reaches."""
    if task == "depth":
        depths = torch.cat([t[valid_depth(t)] for t in targets]).double()
        return float(depths.std(correction=0))
    # counted one by one: all masks of a large data set as int64 would be many gigabytes
    share = sum(torch.bincount(t[t != IGNORE].long(), minlength=classes) for t in targets).double()
    share = share / share.sum()
    if task == "classification":
        return float(share.max())
    # predicting class c everywhere: IoU share_c for c, 0 for every other class that occurs
    return float(share.max() / (share > 0).sum())
