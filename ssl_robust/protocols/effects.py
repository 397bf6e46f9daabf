"""What each difference of the released code does to the numbers: the rows of appendix_protocols."""

from typing import Any

import pandas as pd

from .. import evaluate
from ..settings import Settings
from ..tasks import TASKS
from . import released

KINDS = {"clean": "clean", "embed": "embed", "task": "attack"}  # attack: its column


def effects(settings: Settings) -> pd.DataFrame:
    """What each difference of the released code does, on the first data set of each task and the first encoder.

    One row for the paper's protocol, each difference that concerns the task, and all together ('released'): task,
    dataset, encoder, protocol, metric, n, then clean, embed, attack (the task attack) with their standard errors
    *_se. Records go to results/<profile>/protocols; those there are kept. Raises BadInput as evaluate.cells does.
    """
    settings.section("attack")
    rows = []
    for task in (task for task in TASKS if getattr(settings, task)):
        paper: dict[str, dict[str, Any]] = {}
        concerned = [name for name, d in released.DIFFERENCES.items() if task in d["tasks"]]
        for protocol in ("paper", *concerned, "released"):
            found = paper | _records(task, protocol, settings)
            paper, clean = paper or found, found["clean"]
            row = {key: clean[key] for key in ("task", "dataset", "encoder")} | {"protocol": protocol}
            row |= {key: clean[key] for key in ("metric", "n")}
            for kind, name in KINDS.items():
                row |= {name: found[kind]["value"], f"{name}_se": found[kind]["se"]}
            rows.append(row)
    return pd.DataFrame(rows)


def _records(task: str, protocol: str, settings: Settings) -> dict[str, dict[str, Any]]:
    """Records by attack: all three, or of a single difference those of the attacks that it can touch."""
    whole = protocol in ("paper", "released")
    settings = settings.model_copy(update={"protocol": protocol if whole else [protocol]})
    defense = f"standard-{protocol}" if protocol in {"released", *released.OTHER_HEADS} else "standard"
    row = evaluate.prepare(task, settings.task(task).datasets[0], settings.encoders[0], settings, defense)
    cell = evaluate.Cell(*row, "clean", settings, f"standard-{protocol}")
    return {kind: cell.of(kind).run("protocols") for kind in released.TOUCHES.get(protocol, KINDS)}
