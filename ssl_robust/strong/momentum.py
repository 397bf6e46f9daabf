"""PGD with momentum: MI-FGSM (Dong et al. 2018) with a random start, on the loss of the task's own attack."""

from torch import Tensor

from .. import attacks
from ..heads import TaskModel
from ..settings import Attack

DECAY = 1.0


def accumulated(gradient: Tensor, before: Tensor) -> Tensor:
    """The sum of all gradients so far, each divided by its mean size, (B, 3, H, W)."""
    return DECAY * before + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)


def run(
    model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int, precision: str = "fp32",
    trace: attacks.Trace | None = None,
) -> Tensor:  # fmt: skip
    """As attacks.attacked of the kind 'task', but for the direction of its steps; no image leaves early."""
    loss = attacks.loss_for("task", model, x, target, attack.steps)
    start = attacks.random_start(x, attack.eps, ids, seed)
    return attacks.pgd(x, loss, attack, start, precision, trace=trace, direction=accumulated)


ATTACKS = {"mifgsm": attacks.Kind("MI-FGSM", run)}
