"""Records with what speaks for and against them: reasons for a dagger, and the same cell under further seeds."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from .. import records as disk
from ..settings import BadInput
from ..tasks import TASKS

Record = dict[str, Any]

CELL = ("task", "dataset", "encoder", "defense", "attack")
# flags are raised beyond
ZERO_STEPS = 0.01  # share of image-steps without a gradient
RISING = 0.25  # share of images whose loss still rises
MISSED = 0.25  # share of images with a better iterate before; PGD's last steps go up and down around a maximum


def read_skipped(folder: Path) -> list[Record]:
    """Rows that were asked for but could not be run: {task, dataset, encoder, defense, why}, from */skipped.json.

    `folder` is results/<profile> or figures/<profile>/records; empty if nothing was skipped.
    """
    return [{"task": task, **row} for task in TASKS for row in disk.read_skipped(folder / task / "skipped.json")]


def paths(folder: Path) -> list[Path]:
    """All files below `folder` that tables are made of: records, those of further seeds, skipped rows, and checks."""
    cell = "*__*__*__*.json"
    names = [f"{task}/{name}" for task in TASKS for name in (cell, "skipped.json")]
    names += [f"seeds/*/{task}/{cell}" for task in TASKS] + ["sanity/**/*.json"]
    return [path for name in names for path in folder.glob(name)]


def read(folder: Path) -> list[Record]:
    """The records of the tables below `folder` (results/<profile> or figures/<profile>/records), sorted by path.

    Each has two fields more: `reasons`, the sentences that flag its value (its own health record's; for the task attack
    also those of the sanity checks of that very cell, which also tell whether a loss that still rises matters), and
    `over_seeds`, the records of the same cell under further seeds, in their order.
    """

    def cell(record: Record) -> tuple[str, ...]:
        return tuple(record[name] for name in CELL)

    checked, further, found = sanity_checks(folder), defaultdict(list), []
    records = (record for path in folder.glob("seeds/*") for record in disk.read_records(path))
    for record in sorted(records, key=lambda r: r["seed"]):
        further[cell(record)].append(record)
    for record in disk.read_records(folder):
        if record.get("task") in TASKS and "value" in record:
            row = checked.get(record["key"], {"checks": {}, "flags": []})
            settled = row["checks"].get("more_steps", {}).get("converged", False)
            said = [*flags(record.get("health"), settled), *row["flags"]]
            found.append(record | {"reasons": said, "over_seeds": further[cell(record)]})
    return found


def reasons(record: Record) -> list[str]:
    """The sentences that flag a record's value: all of them if it comes from `read`, else those of its own health."""
    return record.get("reasons", flags(record.get("health")))


def flags(health: Record | None, settled: bool = False) -> list[str]:
    """One sentence for each thing that is wrong with an attack beyond its threshold; none: it worked as it should.

    settled: more steps have been tried and take hardly more, so that a loss that still rises is no reason for doubt.
    """
    health = health or {}
    images, found = health.get("images", 0), []
    if bad := health.get("nonfinite"):
        found.append(f"the predictions of {_images(bad)} are not finite")
    if bad := health.get("nan_gradient"):
        found.append(f"the gradients of {_images(bad)} are not finite")
    if share := health.get("nan_share"):
        found.append(f"{_percent(share)} of the gradients are not finite")
    if (share := health.get("zero_share", 0)) > ZERO_STEPS:
        where = f"in {_percent(share)} of all steps"
        where += f" ({_images(health['zero_gradient'])} of {images})" if images else ""
        found.append(f"the gradient is exactly zero {where}, so the attack stands still there")
    if images and not settled and (share := health["rising"] / images) > RISING:
        found.append(f"the loss of {_percent(share)} of the images still rises at the last step (not converged)")
    if images and (share := health["missed"] / images) > MISSED:
        found.append(f"{_percent(share)} of the images had an iterate of clearly larger loss than the one evaluated")
    if bad := health.get("missed_adversarial"):
        found.append(f"{_images(bad)} classified rightly had an iterate that was misclassified")
    return found


def _images(count: int) -> str:
    return f"{count} image{'s' if count != 1 else ''}"


def _percent(share: float) -> str:
    return "less than 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def sanity_checks(folder: Path) -> dict[str, Record]:
    """The sanity checks below `folder` by the key of the cell that they judge; empty without any.

    A cell that was made anew from something else has another key, so that old flags are never shown at it.
    """
    rows = [disk.read_record(path) for path in sorted(folder.glob("sanity/*/*.json"))]
    return {row["cell"]: row for row in rows if "cell" in row}


def current_examples(profile: str) -> dict[str, Path]:
    """The images of Figure 1 that there are, task -> file in runs/<profile>/examples.

    Raises BadInput if what names them is damaged.
    """
    found = {}
    for task in TASKS:
        pointer, folder = disk.examples_path(profile, task), disk.runs_dir(profile) / "examples"
        if pointer.is_file():
            name = disk.read_json(pointer)
            if name not in {path.name for path in folder.glob("*.safetensors")}:  # and so in no other folder
                raise BadInput(f"{pointer} names no file of {folder}; delete it and run its notebook again.")
            found[task] = folder / name
    return found
