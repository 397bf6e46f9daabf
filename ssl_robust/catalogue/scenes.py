"""The rendered scenes, which need no files; every task finds its targets in them."""

from pathlib import Path

from .. import records
from ..items import Dataset, Item
from ..parts import part
from ..progress import track
from ..tasks import TASKS

SCENES = "scenes-0b62ae1f46"  # begins their names, from which random numbers are drawn: another word, other numbers


def _scenes(root: Path, task: str, split: str, n: int) -> list[Item]:
    rendered = part("embedded.scenes").cached(records.ROOT / "runs" / "scenes", split, n, progress=track)
    targets = {"segmentation": rendered.masks, "depth": rendered.depths, "deacl": [None] * n}
    targets = targets.get(task, rendered.labels.tolist())
    return [Item(f"{SCENES}-{split}-{i}", rendered.images[i], targets[i]) for i in range(n)]


def _classes(root: Path, task: str) -> tuple[str, ...]:
    categories = part("embedded.scenes").CATEGORIES
    return {"classification": categories, "segmentation": ("background", *categories)}.get(task, ())


DATASETS = {"scenes": Dataset((*TASKS, "deacl"), "", _scenes, _classes, own_val=True, shape=(64, 64))}
