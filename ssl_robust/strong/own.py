"""An attack of one's own: a Python callable, whose images are looked at before they count."""

import inspect
from typing import Any

from torch import Tensor

from .. import attacks, parts, records
from ..heads import TaskModel
from ..settings import Attack, AttackRow, BadInput


def kind(own: AttackRow) -> attacks.Kind:
    """The attack, called with the names of Kind.run's arguments; it is filed under a hash of the file it stands in."""
    function = parts.part("formats.callables").named(own.call, f"Attack '{own.name}'")

    def run(model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int, *_: Any) -> Tensor:
        start = attacks.random_start(x, attack.eps, ids, seed)
        adv = function(model=model, x=x, target=target, ids=ids, attack=attack, seed=seed, start=start)
        low, high = (x - attack.eps).clamp(min=0), (x + attack.eps).clamp(max=1)
        fits = isinstance(adv, Tensor) and adv.shape == x.shape and adv.isfinite().all()
        if not fits or (adv < low - 1e-5).any() or (adv > high + 1e-5).any():
            raise BadInput(
                f"Attack '{own.name}': {own.call} must return finite images of the shape of x, {tuple(x.shape)}, in "
                f"[0,1] and within eps of x; clamp what it returns."
            )
        return adv.detach().to(x).clamp(low, high)

    source = records.digest(inspect.getsource(inspect.getmodule(function)))
    return attacks.Kind(own.name, run, (), tuple(own.tasks), True, source)
