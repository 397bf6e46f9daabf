"""Clean and attacked evaluation through one path, one record per table cell."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from . import attacks, datasets, deacl, encoders, heads, metrics, records
from .datasets import Subset
from .heads import TaskModel
from .progress import track
from .settings import Attack, EncoderRow, Settings

KINDS = ("clean", "embed", "task")
CODE = (*heads.CODE, "attacks", "evaluate")


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
    name = f"{attack_name(model.task, kind)} on {model.encoder.name}, {test.name}"
    parts = datasets.batches(test, batch)
    for indices, x, target in track(parts, total=len(test), desc=name, size=lambda part: len(part[0])):
        x, target = x.to(device), target.to(device)
        adv = attacks.attacked(kind, model, x, target, [test.ids[i] for i in indices], attack, seed)
        with torch.no_grad():
            prediction = model(adv)
        largest = max(largest, float((adv - x).abs().max()))
        nonfinite += int((~prediction.flatten(1).isfinite()).any(1).sum())
        stats = metrics.statistics(model.task, prediction, target, len(test.classes))
        rows.update(zip(indices, stats, strict=True))
    return torch.stack([rows[i] for i in range(len(test))]), largest, nonfinite


def cell(
    model: TaskModel, test: Subset, variant: tuple[str, int], kind: str, settings: Settings, notebook: str
) -> dict[str, Any]:
    """The record of one table cell: read if it was made from exactly these inputs, else evaluated and written."""
    task, (defense, epoch), section = model.task, variant, settings.task(model.task)
    attack = None if kind == "clean" else settings.attack.model_dump()
    used = section.model_dump(include={"size", "stride", "n_test"})
    hashes = {
        "weights": model.encoder.hash,
        "head": records.state_hash(model.head.state_dict()),
        "data": test.hash,
        "code": records.code_hash(*CODE),
    }
    key = records.digest([task, kind, attack, used, settings.seed, hashes])
    path = records.record_path(settings.profile, task, test.name, model.encoder.name, defense, kind)
    record = records.reusable(path, key)
    if record:
        return record
    device, start = records.pick_device(settings.device), time.perf_counter()
    stats, largest, nonfinite = evaluate(
        model, test, kind, settings.attack, section.attack_batch, settings.seed, device
    )
    record = {
        "schema": records.SCHEMA, "key": key, "task": task, "dataset": test.name, "encoder": model.encoder.name,
        "defense": defense, "epoch": epoch, "attack": kind, "attack_name": attack_name(task, kind),
        "metric": metrics.METRIC[task], "value": metrics.value(task, stats),
        "se": metrics.standard_error(task, stats, settings.seed), "n": len(test),
        "chance": metrics.constant_value(task, [test[i][1] for i in range(len(test))], len(test.classes)),
        "settings": {"attack": attack, "task": section.model_dump()}, "seed": settings.seed, "hashes": hashes,
        "max_perturbation": largest, "nonfinite": nonfinite, "per_image": metrics.per_image(task, stats),
        "seconds": round(time.perf_counter() - start, 2), "notebook": f"runs/{settings.profile}/{notebook}.ipynb",
        **records.provenance(device),
    }  # fmt: skip
    records.write_json(record, path)
    return record


def run_task(task: str, settings: Settings, notebook: str) -> list[dict[str, Any]]:
    """All records of one task: each data set, encoder, defense and attack, and for Figure 2 the DeACL epochs between.

    Cells already on disk that were made from the same settings, weights, data and code are kept. Checkpoints between
    are evaluated on the first data set only. Raises BadInput if something that an earlier notebook makes is missing.
    """
    found = []
    for position, dataset in enumerate(settings.task(task).datasets):
        for row in settings.encoders:
            for defense, epoch, weights in deacl.variants(row, settings.profile):
                if position == 0 or defense in row.defenses:
                    model, test = prepare(task, dataset, row, settings, defense, weights)
                    found += [cell(model, test, (defense, epoch), kind, settings, notebook) for kind in KINDS]
    remove_other(task, found, settings.profile)
    return found


def prepare(
    task: str, dataset: str, row: EncoderRow, settings: Settings, defense: str = "standard", weights: Path | None = None
) -> tuple[TaskModel, Subset]:
    """Model and test images of one row; the head is trained if it is not on disk."""
    encoder = encoders.load(row, settings.data_root, weights)
    model, _ = heads.fitted(task, dataset, encoder, settings, defense)
    return model, datasets.load(task, dataset, "test", settings, encoder.native)


def remove_other(task: str, kept: list[dict[str, Any]], profile: str) -> None:
    """Delete records of rows that the settings no longer ask for, so that tables show one set of settings."""
    names = [
        records.record_path(profile, task, *(r[k] for k in ("dataset", "encoder", "defense", "attack"))) for r in kept
    ]
    for path in records.results_dir(profile).glob(f"{task}/*__*__*__*.json"):
        if path not in names:
            path.unlink()


def examples(task: str, settings: Settings, count: int = 4) -> Path:
    """Attack `count` test images of the first data set on the first encoder (Standard) and keep them for pictures.

    Returns runs/<profile>/examples/<task>.safetensors, which plots.load_example reads and Figure 1 is drawn from:
    images, adv_embed, adv_task (k, 3, H, W) in [0,1]; target, pred_clean, pred_embed, pred_task as in datasets.py.
    """
    row, dataset = settings.encoders[0], settings.task(task).datasets[0]
    model, test = prepare(task, dataset, row, settings)
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
        "dataset": dataset,
        "encoder": row.name,
    }
    shown = {k: v.detach().cpu().contiguous() for k, v in shown.items()}
    path = records.runs_dir(settings.profile) / "examples" / f"{task}.safetensors"
    records.write_bytes(save(shown, about), path)
    return path
