"""Clean and attacked evaluation through one path, one record per table cell."""

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from . import attacks, datasets, deacl, encoders, heads, metrics, records, released
from .datasets import Subset
from .encoders import Encoder
from .heads import TaskModel, skipping
from .progress import track
from .settings import TASKS, Attack, BadInput, EncoderRow, Settings

KINDS = ("clean", "embed", "task")
CODE = (*heads.CODE, "attacks", "released", "evaluate")


def attack_name(task: str, kind: str) -> str:
    """Name of the attack in the paper."""
    return {"clean": "none", "embed": "EmbedAttack", "task": attacks.NAMES[task]}[kind]


def evaluate(
    model: TaskModel, test: Subset, kind: str, attack: Attack, batch: int, seed: int, device: str
) -> tuple[Tensor, float, int]:
    """Statistics of every test image (see metrics.py) under `kind`: 'clean', 'embed' or 'task'.

    Returns them with the largest |x_adv - x| that occurred and the number of images with a non-finite prediction.
    """
    rows, largest, nonfinite = {}, 0.0, 0
    statistics = released.statistics(model.task, kind, model.protocol)
    name = f"{attack_name(model.task, kind)} on {model.encoder.name}, {test.name}"
    parts = datasets.batches(test, batch)
    for indices, x, target in track(parts, total=len(test), desc=name, size=lambda part: len(part[0])):
        x, target = x.to(device), target.to(device)
        adv = attacks.attacked(kind, model, x, target, [test.ids[i] for i in indices], attack, seed)
        with torch.no_grad():
            prediction = model(adv)
        largest = max(largest, float((adv - x).abs().max()))
        nonfinite += int((~prediction.flatten(1).isfinite()).any(1).sum())
        stats = statistics(model.task, prediction, target, len(test.classes))
        rows.update(zip(indices, stats, strict=True))
    return torch.stack([rows[i] for i in range(len(test))]), largest, nonfinite


def measured(model: TaskModel, test: Subset, kind: str, settings: Settings) -> dict[str, Any]:
    """The numbers of one table cell, in the model's protocol: what `cell` writes, without anything on disk."""
    task, device, start = model.task, records.pick_device(settings.device), time.perf_counter()
    batch = settings.task(task).attack_batch
    stats, largest, nonfinite = evaluate(model, test, kind, settings.attack, batch, settings.seed, device)
    reduce = released.reduction(task, test.classes, model.protocol)
    return {
        "value": metrics.value(task, stats, reduce), "se": metrics.standard_error(task, stats, settings.seed, reduce),
        "n": len(test), "chance": _chance(test, released.unmasked(kind, model.protocol), model.protocol),
        "max_perturbation": largest, "nonfinite": nonfinite, "per_image": metrics.per_image(task, stats, reduce),
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


@lru_cache(maxsize=2)
def _chance(test: Subset, everywhere: bool, names: released.Names) -> float:
    """Metric of the best constant prediction; kept, as it reads all targets and the next attack asks for it again."""
    targets = [test[i][1] for i in range(len(test))]
    return released.constant_value(test.task, targets, len(test.classes), everywhere, names)


def _attack(kind: str, settings: Settings) -> dict[str, Any] | None:
    """The attack setting that a record depends on: none if it is clean."""
    if kind == "clean":
        return None
    if settings.attack is None:
        raise BadInput("The settings have no section 'attack'; add one (params/demo.yaml shows how).")
    return settings.attack.model_dump()


def cell(
    model: TaskModel, test: Subset, variant: tuple[str, int], kind: str, settings: Settings, notebook: str,
    part: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The record of one table cell: read if it was made from exactly these inputs, else evaluated and written.

    `variant`: the defense and its epochs of DeACL; `part`: a folder within the profile's, for what no table shows.
    Raises BadInput if an attack is asked for without settings of it.
    """
    task, (defense, epoch), attack = model.task, variant, _attack(kind, settings)
    section, protocol = released.adjusted(settings, model.encoder.native).task(task), released.label(model.protocol)
    hashes = {
        "weights": model.encoder.hash,
        "head": records.state_hash(model.head.state_dict()),
        "data": test.hash,
        "code": records.code_hash(*CODE),
    }
    used = section.model_dump(include={"size", "n_test", "crop"}) | {"stride": model.stride}
    key = records.digest([task, kind, attack, used, protocol, settings.seed, hashes])
    path = records.record_path(f"{settings.profile}/{part}", task, test.name, model.encoder.name, defense, kind)
    record = records.reusable(path, key)
    if record:
        return record
    record = {
        "schema": records.SCHEMA, "key": key, "task": task, "dataset": test.name, "encoder": model.encoder.name,
        "defense": defense, "epoch": epoch, "attack": kind, "attack_name": attack_name(task, kind),
        "metric": metrics.METRIC[task], "protocol": protocol, "counts": settings.counts,
        **measured(model, test, kind, settings),
        "settings": {"attack": attack, "task": section.model_dump()}, "seed": settings.seed, "hashes": hashes,
        "notebook": f"runs/{settings.profile}/{notebook}.ipynb",
        **records.provenance(records.pick_device(settings.device)),
    }  # fmt: skip
    records.write_json(record, path)
    return record


def run_task(task: str, settings: Settings, notebook: str) -> list[dict[str, Any]]:
    """All records of one task: each data set, encoder, defense and attack, and for Figure 2 the DeACL epochs between.

    Cells already on disk that were made from the same settings, weights, data and code are kept. Checkpoints between
    are evaluated on the first data set only. Raises BadInput if something that an earlier notebook makes is missing, or
    a data set or weights; with missing: skip, such rows are left out instead, see records.read_skipped.
    """
    names, found, lost = settings.task(task).datasets, [], []
    _attack("task", settings)
    records.pick_device(settings.device)
    for row in settings.encoders:
        for defense in (d for d in ("standard", "deacl") if d in row.defenses):
            only = row.model_copy(update={"defenses": [defense]})
            with skipping(settings, lost, [_place(dataset, row, defense) for dataset in names]):
                for variant in deacl.variants(only, settings.profile, settings.data_root):
                    found += _variant(task, row, variant, settings, notebook, lost)
    found.sort(key=lambda record: names.index(record["dataset"]))
    remove_other(task, found, settings.profile)
    records.write_skipped(settings.profile, task, lost)
    return found


def _place(dataset: str, row: EncoderRow, defense: str) -> dict[str, str]:
    return {"dataset": dataset, "encoder": row.name, "defense": defense.split("-")[0]}


def _variant(
    task: str, row: EncoderRow, variant: tuple[str, int, Path | None], settings: Settings, notebook: str,
    lost: list[dict[str, str]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Records of one (defense, epochs, weights) of a row on all its data sets; the encoder is loaded once."""
    defense, epoch, weights = variant
    names, found = settings.task(task).datasets, []
    encoder = encoders.load(row, settings.data_root, weights)
    for dataset in names if defense in row.defenses else names[:1]:
        with skipping(settings, lost, [_place(dataset, row, defense)]):
            made = _prepared(task, dataset, encoder, settings, defense)
            found += [cell(*made, (defense, epoch), kind, settings, notebook) for kind in KINDS]
    return found


def prepare(
    task: str, dataset: str, row: EncoderRow, settings: Settings, defense: str = "standard", weights: Path | None = None
) -> tuple[TaskModel, Subset]:
    """Model and test images of one row, in the protocol of `settings`; the head is trained if it is not on disk.

    `weights` replaces the encoder's own, as in encoders.load. Raises BadInput if a data set or weights are missing.
    """
    return _prepared(task, dataset, encoders.load(row, settings.data_root, weights), settings, defense)


def _prepared(task: str, dataset: str, encoder: Encoder, settings: Settings, defense: str) -> tuple[TaskModel, Subset]:
    model, _ = heads.fitted(task, dataset, encoder, settings, defense)
    settings = released.adjusted(settings, encoder.native)
    test = datasets.load(task, dataset, "test", settings, encoder.native)
    return model, released.test_images(test, model.protocol)


def remove_other(task: str, kept: list[dict[str, Any]], profile: str) -> None:
    """Delete records of rows that the settings no longer ask for, so that tables show one set of settings."""
    names = [
        records.record_path(profile, task, *(r[k] for k in ("dataset", "encoder", "defense", "attack"))) for r in kept
    ]
    for path in records.results_dir(profile).glob(f"{task}/*__*__*__*.json"):
        if path not in names:
            path.unlink()


def examples(task: str, settings: Settings, count: int = 4) -> list[Path]:
    """Attack `count` test images of the first data set on the first encoder (Standard) and keep them for pictures.

    With missing: skip, these are the first that can be used. Raises BadInput without attack settings.
    Returns [runs/<profile>/examples/<task>.safetensors], which plots.load_example reads and Figure 1 is drawn from, or
    [] if every row is skipped. In the file:
    images, adv_embed, adv_task (k, 3, H, W) in [0,1]; target, pred_clean, pred_embed, pred_task as in datasets.py.
    """
    _attack("task", settings)
    path = records.runs_dir(settings.profile) / "examples" / f"{task}.safetensors"
    path.unlink(missing_ok=True)
    found = _first_usable(task, settings)
    if found is None:
        return []
    model, test = found
    device = records.pick_device(settings.device)
    indices, x, target = next(datasets.batches(test, count))
    x, target, ids = x.to(device), target.to(device), [test.ids[i] for i in indices]
    shown = {"images": x, "target": target}
    for kind in KINDS:
        adv = attacks.attacked(kind, model, x, target, ids, settings.attack, settings.seed)
        with torch.no_grad():
            shown |= {f"adv_{kind}": adv, f"pred_{kind}": heads.labels(task, model(adv))}
    del shown["adv_clean"]
    about = {
        "classes": json.dumps(test.classes),
        "eps": str(settings.attack.eps),
        "dataset": test.name,
        "encoder": model.encoder.name,
    }
    shown = {k: v.detach().cpu().contiguous() for k, v in shown.items()}
    records.write_bytes(heads.tensor_file(shown, about), path)
    return [path]


def _first_usable(task: str, settings: Settings) -> tuple[TaskModel, Subset] | None:
    """Standard model and test images of the first row that is not skipped; None if all are."""
    lost: list[dict[str, str]] = []
    standard = [row for row in settings.encoders if "standard" in row.defenses] or settings.encoders
    for dataset in settings.task(task).datasets:
        for row in standard:
            with skipping(settings, lost, [_place(dataset, row, "standard")]):
                return prepare(task, dataset, row, settings)
    return None


def effects(settings: Settings, notebook: str) -> pd.DataFrame:
    """What each difference of the released code does, on the first data set of each task and the first encoder.

    One row for the paper's protocol, each difference that concerns the task, and all together ('released'): task,
    dataset, encoder, protocol, metric, n, then clean, embed, attack (the task attack) with their standard errors
    *_se. Records go to results/<profile>/protocols; those there are kept. Raises BadInput as run_task does.
    """
    _attack("task", settings)
    rows = []
    for task in (task for task in TASKS if getattr(settings, task)):
        paper: dict[str, dict[str, Any]] = {}
        concerned = [name for name, d in released.DIFFERENCES.items() if task in d["tasks"]]
        for protocol in ("paper", *concerned, "released"):
            cells = _in_protocol(task, protocol, settings, notebook, paper)
            paper = paper or cells
            rows.append(_effect(protocol, cells))
    return pd.DataFrame(rows)


def _in_protocol(
    task: str, protocol: str, settings: Settings, notebook: str, paper: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Records by attack; those that a single difference cannot touch are taken from `paper`."""
    whole = protocol in ("paper", "released")
    settings = settings.model_copy(update={"protocol": protocol if whole else [protocol]})
    defense = f"standard-{protocol}" if protocol in {"released", *released.OTHER_HEADS} else "standard"
    model, test = prepare(task, settings.task(task).datasets[0], settings.encoders[0], settings, defense)
    touched = released.TOUCHES.get(protocol, KINDS)
    place = (f"standard-{protocol}", 0)
    return paper | {kind: cell(model, test, place, kind, settings, notebook, "protocols") for kind in touched}


def _effect(protocol: str, cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One row of effects from the records of its three attacks."""
    shown = {key: cells["clean"][key] for key in ("task", "dataset", "encoder")} | {"protocol": protocol}
    shown |= {key: cells["clean"][key] for key in ("metric", "n")}
    for kind, name in zip(KINDS, ("clean", "embed", "attack"), strict=True):
        shown |= {name: cells[kind]["value"], f"{name}_se": cells[kind]["se"]}
    return shown
