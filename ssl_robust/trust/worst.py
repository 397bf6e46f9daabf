"""The worst case of a row of a table: what its attacks leave of each image together."""

import time
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import attacks, evaluate, metrics, records
from ..evaluate import Cell
from ..settings import BadInput
from ..tasks import TASKS

CHECKS = "checks"  # what it may be made of besides the attacks of the table


class Worst(Cell):
    """The worst case of a row: each image under that of its attacks that hurts it most, made from what they left.

    Where the row has had its sanity checks, the attacks inside the table's ball that these made on its first images
    (noise, more steps and starts, transfer) count as one more.
    """

    @property
    def kind(self) -> attacks.Kind:
        return attacks.KINDS["task"]._replace(title="worst case")

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """The row's cells by attack."""
        row = {name: getattr(self, name) for name in ("model", "test", "settings", "defense", "epoch")}
        return {name: Cell(attack=name, **row) for name in attacks.kinds(self.model.task, self.settings)}

    @cached_property
    def about(self) -> dict[str, Any]:
        cells, checked = {name: records.digest(cell.made) for name, cell in self.cells.items()}, self._checked()
        made = records.made_from((), cells=cells | ({CHECKS: checked[0]} if checked else {}))
        return super().about | {"made_from": made, "key": records.digest(made)}

    def run(self, part: str = "") -> dict[str, Any] | None:
        """As of every cell; None while one of the attacks is not there."""
        return super().run(part) if all(cell.stored() for cell in self.cells.values()) else None

    def measured(self) -> tuple[dict[str, Any], Tensor]:
        """The numbers that follow from the row's cells, which must be there."""
        start, cells, checked = time.perf_counter(), self.cells, self._checked()
        made, found = zip(*(cell.stored() for cell in cells.values()), strict=True)
        stats = dict(zip(cells, found, strict=True))
        if checked:  # of images that were not checked one of the others, which is no news
            stats[CHECKS] = torch.cat([checked[1], found[-1][len(checked[1]) :]])
        chosen = self._chosen([*stats.values()])
        taken = torch.stack([*stats.values()])[chosen, torch.arange(len(chosen))]
        return self._numbers(taken) | {
            "max_perturbation": max(record["max_perturbation"] for record in made),
            "nonfinite": sum(record["nonfinite"] for record in made), "health": {}, "batch": 0,
            "chosen": {name: int((chosen == i).sum()) for i, name in enumerate(stats)},
            "checked": len(checked[1]) if checked else 0, "seconds": round(time.perf_counter() - start, 2),
        }, taken  # fmt: skip

    def _checked(self) -> tuple[str, Tensor] | None:
        """Key and statistics (n, ..) of the sanity checks of the task attack's cell, None without them."""
        try:
            result = records.read_record(records.checks_path(self.settings.profile, *self.names[:4]))
        except BadInput:
            return None
        if result["cell"] != records.digest(self.cells["task"].made):
            return None
        place = evaluate.checks_place(self.settings.profile, result, ".safetensors")
        found = records.reusable_tensors(place, result["made_from"])
        return found and (result["key"], records.unpacked(found[0]))

    def _chosen(self, found: list[Tensor]) -> Tensor:
        """Which of K attacks, given by their statistics (N, ..), each image (N,) is taken from.

        The candidates are each attack alone, and image by image the one that hurts it most: by its metric, and in
        segmentation by its wrong pixels, as some wrong pixels of an absent class halve an image's mIoU but not that of
        all.
        """
        task, reduce, n = self.model.task, evaluate.reduction(self.model, self.test), len(found[0])
        sign = TASKS[task].sign
        scores = [sign * torch.tensor([metrics.per_image(task, stats, reduce) for stats in found])]  # (K, N) each
        if task == "segmentation":
            scores.append(torch.stack([stats[..., 0].sum(1) for stats in found]))
        chosen = [score.argmin(0) for score in scores] + [torch.full((n,), k) for k in range(len(found))]
        values = [metrics.value(task, torch.stack(found)[c, torch.arange(n)], reduce) for c in chosen]
        return chosen[min(range(len(chosen)), key=lambda i: sign * values[i])]
