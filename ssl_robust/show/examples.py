"""The images of Figure 1: a few test images of each task under the paper's attacks, and what the model says of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import attacks, compute, datasets, evaluate, heads, records
from ..datasets import Subset
from ..heads import TaskModel
from ..settings import Settings

COUNT = 4  # images of each task
KINDS = ("clean", "embed", "task")


@dataclass(frozen=True)
class Examples:
    """The images of one task: of the first data set on the first encoder (Standard); with missing: skip that can be."""

    model: TaskModel
    test: Subset
    settings: Settings
    count: int = COUNT

    @property
    def made(self) -> records.Made:
        """What they are made from: what the cells of their attacks are."""
        cell = evaluate.Cell(self.model, self.test, "clean", self.settings)
        cells = {kind: cell.of(kind).made for kind in KINDS}
        used = dict.fromkeys(name for made in cells.values() for name in made["loops"])
        inputs = {kind: made["inputs"] for kind, made in cells.items()}
        return records.made_from(used, count=self.count, cells=inputs)

    @property
    def path(self) -> Path:
        """Where they lie."""
        folder = records.runs_dir(self.settings.profile) / "examples"
        return records.place(folder, self.model.task, self.made, ".safetensors")

    def there(self) -> bool:
        """Whether they are there, whole and made from `made`."""
        return records.reusable_tensors(self.path, self.made) is not None

    def make(self) -> None:
        """Attack the images and write them: images, adv_embed, adv_task (k, 3, H, W) in [0,1]; target, pred_clean,
        pred_embed, pred_task as in datasets.py.
        """
        model, s, device = self.model, self.settings, records.pick_device(self.settings.device)
        indices, x, target = next(datasets.batches(self.test, self.count))
        x, target, ids = x.to(device), target.to(device), [self.test.ids[i] for i in indices]
        shown, precision = {"images": x, "target": target}, compute.precision(s.precision, device)
        for name in KINDS:
            adv = attacks.attacked(name, model, x, target, ids, s.attack, s.seed, precision)
            with torch.no_grad():
                shown |= {
                    f"adv_{name}": adv,
                    f"pred_{name}": heads.labels(model.task, evaluate.judged(name, model, adv)),
                }
        del shown["adv_clean"]
        about = {"classes": json.dumps(self.test.classes), "eps": str(s.attack.eps)}
        about |= {"dataset": self.test.name, "encoder": model.encoder.name}
        records.write_tensors(shown, records.about(self.made) | about, self.path)


def usable(task: str, settings: Settings, load: evaluate.Loader | None = None, count: int = COUNT) -> Examples | None:
    """The examples of a task, made or not; None if every row is skipped. `load`: what loads an encoder."""
    found = evaluate.first(task, settings, load, fallback=False)
    return found and Examples(*found, settings, count)


def make(task: str, settings: Settings, count: int = COUNT) -> list[Path]:
    """The file of a task's examples, made if it is not there; [] if every row is skipped.

    results/<profile>/examples/<task>.json names it, and Figure 1 is drawn from it. BadInput without attack settings.
    """
    found, pointer = usable(task, settings, count=count), records.examples_path(settings.profile, task)
    if found is None:
        pointer.unlink(missing_ok=True)  # no old pictures either
        return []
    if not found.there():
        found.make()
    records.write_json(found.path.name, pointer)
    return [found.path]
