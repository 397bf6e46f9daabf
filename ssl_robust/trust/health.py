"""Whether an attack worked as it should: what the traces of attacks.pgd say, in numbers and in sentences.

An image's curve is its loss at the iterates 0..T-1, before each of the T steps (of SegPGD, whose loss changes with the
step, both of its parts alike). All thresholds are relative to the range of the curve, so that they mean the same for
cross-entropy, distances of embeddings and depth losses.
"""

import math
from typing import Any

import torch
from torch import Tensor

Trace = list[dict[str, Any]]  # as attacks.pgd fills it

TAIL, LEAST_TAIL = 0.1, 2  # the last steps that are compared with as many before: this share of all, at least so many
RISE = 0.02  # of the range: a tail that lies higher than the one before by more still rises
FALL = 0.1  # of the range: an earlier iterate whose loss is higher than the returned one's by more was better


def summarise(
    traces: list[Trace], kind: str, task: str, wrong: Tensor | None = None, enough: float = math.inf,
    steps: int | None = None, nonfinite: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Health of the attack `kind` on all images of a cell, ready for JSON; the sentences are made by evidence.flags.

    traces: one of attacks.pgd for each batch; one that does not end in step None was broken off and does not count.
    wrong (N,) bool, in the order of the traces: classification, whether the returned image is misclassified. enough:
    the cross-entropy above which an image surely is. steps: those of the attack; default: the most that were seen.
    nonfinite: images with a non-finite prediction. Without traces (clean images) that number is all there is; of
    AutoAttack, which keeps its steps to itself, there are besides "gradients", how many it asked for, and the shares of
    them that were exactly 0 and not finite, "zero_share" and "nan_share".

    "images", "steps"; "left": images that were finished early, as their class was surely lost; "zero_gradient": images
    with an exactly zero gradient in some step, "zero_share": share of such image-steps; "nan_gradient": images with a
    gradient that is not finite; "rising": images whose loss still rises over the last steps (images whose class is lost
    have converged), "missed": images with an earlier iterate of clearly larger loss, "missed_adversarial": images
    classified rightly although an earlier iterate surely was not; "loss_first", "loss_last": mean loss of the first
    iterate and of the returned image.
    """
    traces = [trace for trace in traces if trace and trace[-1]["step"] is None]
    counts = [trace[-1]["counted"] for trace in traces if "counted" in trace[-1]]
    if counts:
        seen, zero, nan = (sum(c[name] for c in counts) for name in ("gradients", "zero", "nan"))
        shares = {"zero_share": zero / max(1, seen), "nan_share": nan / max(1, seen)}
        return {"nonfinite": nonfinite, "gradients": seen, **shares}
    if not traces:
        return {"nonfinite": nonfinite}
    taken = max([steps or 0, *(entry["step"] or 0 for trace in traces for entry in trace)])
    parts = [_columns(trace, taken) for trace in traces]
    losses, took, zero, nan, returned = (torch.cat(column) for column in zip(*parts, strict=True))
    on_class = wrong is not None and (kind, task) == ("task", "classification")
    lost = wrong.cpu().bool() if on_class else torch.zeros(len(losses), dtype=torch.bool)
    left = ~took.all(1)
    return {
        "images": len(losses), "steps": taken, "left": int(left.sum()), "nonfinite": nonfinite,
        "zero_gradient": int(zero.any(1).sum()), "zero_share": float(zero.sum() / took.sum().clamp(min=1)),
        "nan_gradient": int(nan.any(1).sum()),
        "rising": int((rises(losses) & ~left & ~lost).sum()),
        "missed": int((falls(losses, returned) & ~lost).sum()),
        "missed_adversarial": int(((losses > enough).any(1) & ~lost).sum()) if on_class else 0,
        "loss_first": _mean(torch.where(took[:, 0], losses[:, 0], returned)), "loss_last": _mean(returned),
    }  # fmt: skip


def _columns(trace: Trace, steps: int) -> tuple[Tensor, ...]:
    """Losses (B, steps), NaN for steps not taken; steps taken, zero and NaN gradients; loss of returned images (B,)."""
    returned = trace[-1]["loss"].double()
    losses = torch.full((len(returned), steps), torch.nan, dtype=torch.float64)
    took, zero, nan = (torch.zeros(losses.shape, dtype=torch.bool) for _ in range(3))
    for entry in trace[:-1]:
        place = (entry["index"], entry["step"] - 1)
        losses[place], took[place] = entry["loss"].double(), True
        zero[place], nan[place] = entry["zero"], entry["nan"]
    return losses, took, zero, nan, returned


def _range(losses: Tensor) -> Tensor:
    """Largest minus smallest loss (N,) of each curve (N, T); steps that were not taken (NaN) do not count."""
    high, low = (losses.nan_to_num(nan=side, posinf=side, neginf=side) for side in (-torch.inf, torch.inf))
    return (high.amax(1) - low.amin(1)).clamp(min=0)


def rises(losses: Tensor) -> Tensor:
    """Which curves (N, T) still rise at their end, (N,) bool: the mean of the tail lies above that of the tail before.

    The difference must exceed RISE of the range, rounding, and the typical change from step to step, which is what
    tells a slope from going up and down. Curves with steps that were not taken, or of one step, do not rise.
    """
    steps = losses.shape[1]
    tail = min(max(LEAST_TAIL, round(TAIL * steps)), steps // 2)
    if not tail:
        return torch.zeros(len(losses), dtype=torch.bool)
    end = losses[:, -2 * tail :]
    gain = end[:, tail:].mean(1) - end[:, :tail].mean(1)
    unsure = torch.maximum(end.diff(dim=1).abs().mean(1), 1e-6 * end.abs().amax(1))
    return (gain > RISE * _range(losses)) & (gain >= unsure * (1 - 1e-9)) & (gain > 0)


def falls(losses: Tensor, returned: Tensor) -> Tensor:
    """Which curves (N, T) were clearly above the returned image's loss (N,) before: by more than FALL of the range."""
    whole = torch.cat([losses, returned[:, None]], 1)
    top = losses.nan_to_num(nan=-torch.inf).amax(1)
    return top - returned > torch.maximum(FALL * _range(whole), 1e-6 * returned.abs())


def _mean(values: Tensor) -> float | None:
    """Mean of the finite values; None without one, as JSON knows no NaN."""
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else None
