"""Clean and attacked evaluation through one path, one record per table cell."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from . import attacks, compute, datasets, deacl, encoders, heads, metrics, records, strong
from .datasets import Subset
from .encoders import Encoder
from .heads import TaskModel, skipping
from .progress import track
from .protocols import released
from .settings import Attack, BadInput, EncoderRow, Settings
from .tasks import TASKS
from .trust import evidence, health

KINDS = ("clean", "embed", "task")
EXAMPLES = 4  # images of Figure 1, of each task
WORST, CHECKS = "worst", "checks"  # what the first may be made of besides the attacks of the table
Loader = Callable[[EncoderRow, str], Encoder]  # (row, data folder) -> its Standard encoder
Variant = tuple[str, int, Path | None]  # defense, epochs of DeACL, weight file


class Cell(NamedTuple):
    """One place in a table, or on Figure 2."""

    dataset: str
    row: EncoderRow
    variant: Variant
    kind: str


class Outcome(NamedTuple):
    """What `evaluate` found: statistics (N, ..) of each image (metrics.py), and what happened on the way."""

    stats: Tensor
    largest: float  # |x_adv - x| that occurred
    nonfinite: int  # images with a non-finite prediction
    traces: list[attacks.Trace]
    wrong: Tensor  # (N,) bool in the order of the traces: whether the class is lost; empty for dense tasks
    batch: int  # images that were attacked at a time


def kinds(task: str, settings: Settings) -> tuple[str, ...]:
    """The attacks that are run: those of the paper, and with strong: true those of strong.py."""
    return (*KINDS, *(strong.NAMES[task] if settings.strong else ()))


def attack_name(task: str, kind: str) -> str:
    """Name of the attack in tables."""
    names = {"clean": "none", "embed": "EmbedAttack", "task": TASKS[task].attack, WORST: "worst case"}
    return names.get(kind) or strong.TITLES[kind]


def perturbed(
    kind: str, model: TaskModel, x: Tensor, target: Tensor, ids: list[str], attack: Attack, seed: int,
    precision: str, trace: attacks.Trace | None = None,
) -> Tensor:  # fmt: skip
    """x (B, 3, H, W) under the attack `kind`: one of KINDS, or of strong.NAMES."""
    if kind in strong.NAMES[model.task]:
        return strong.attacked(kind, model, x, target, ids, attack, seed, precision, trace)
    return attacks.attacked(kind, model, x, target, ids, attack, seed, precision, trace)


def evaluate(
    model: TaskModel, test: Subset, kind: str, attack: Attack | None, batch: int | str, seed: int, device: str,
    precision: str = "fp32",
) -> Outcome:  # fmt: skip
    """Every test image under `kind` (see perturbed): attacked in `precision`, `batch` at a time, predicted in fp32."""
    rows, traces, wrong, largest, nonfinite = {}, [], [], 0.0, 0
    statistics = released.statistics(model.task, kind, model.protocol)
    name = f"{attack_name(model.task, kind)} on {model.encoder.name}, {test.name}"
    size = at_once(model, test, batch, device)
    parts = datasets.batches(test, size)
    for indices, x, target in track(parts, total=len(test), desc=name, size=lambda part: len(part[0])):
        x, target, ids = x.to(device), target.to(device), [test.ids[i] for i in indices]

        def attacked(rows: slice, x: Tensor = x, target: Tensor = target, ids: list[str] = ids) -> Tensor:
            traces.append([])
            return perturbed(
                kind, model, x[rows], target[rows], ids[rows], attack, seed, precision, traces[-1]
            )  # fmt: skip

        adv, size = compute.in_parts(attacked, len(x), size)
        with torch.no_grad():
            prediction, size = compute.in_parts(lambda rows, adv=adv: judged(kind, model, adv[rows]), len(adv), size)
        largest = max(largest, float((adv - x).abs().max()))
        nonfinite += int((~prediction.flatten(1).isfinite()).any(1).sum())
        stats = statistics(model.task, prediction, target, len(test.classes))
        if model.task == "classification":
            wrong.append(stats[:, 0] == 0)
        rows.update(zip(indices, stats, strict=True))
    stats = torch.stack([rows[i] for i in range(len(test))])
    return Outcome(stats, largest, nonfinite, traces, torch.cat([torch.zeros(0).bool(), *wrong]), size)


def judged(kind: str, model: TaskModel, adv: Tensor) -> Tensor:
    """The model's prediction for images (B, 3, H, W) under the attack `kind`, as its protocol looks at them; fp32."""
    return model(released.as_judged(kind, model, adv))


def at_once(model: TaskModel, test: Subset, setting: int | str, device: str) -> int:
    """Images of `test` that are attacked at a time, see compute.batch_for."""
    size, windows = tuple(test[0][0].shape[-2:]), 1
    if model.task == "segmentation":
        native = model.encoder.native
        windows = math.prod(len(heads.window_starts(side, native, model.stride)) for side in size)
        size = tuple(min(side, native) for side in size)
    return compute.batch_for(compute.tokens_of(model.encoder.patch, size, windows), device, setting)


def measured(model: TaskModel, test: Subset, kind: str, settings: Settings) -> tuple[dict[str, Any], Tensor]:
    """The numbers of one table cell, in the model's protocol, and its images' statistics; nothing on disk changes."""
    task, device, start = model.task, records.pick_device(settings.device), time.perf_counter()
    precision = compute.precision(settings.precision, device)
    batch = settings.task(task).attack_batch
    out = evaluate(model, test, kind, settings.attack, batch, settings.seed, device, precision)
    found = health.summarise(
        out.traces, kind, task, out.wrong if task == "classification" else None, _enough(kind, model, settings),
        settings.attack.steps if settings.attack else None, out.nonfinite,
    )  # fmt: skip
    return {
        **_numbers(model, test, kind, out.stats, settings.seed),
        "max_perturbation": out.largest, "nonfinite": out.nonfinite, "health": found | {"flags": evidence.flags(found)},
        "batch": out.batch, "seconds": round(time.perf_counter() - start, 2),
    }, out.stats  # fmt: skip


def _enough(kind: str, model: TaskModel, settings: Settings) -> float:
    """The loss above which an image was lost on the way: infinite where it would have left the attack for it."""
    if model.task != "classification" or kind == "clean" or attacks.leaves(kind, model, settings.attack):
        return math.inf
    return attacks.enough(model)


def _numbers(model: TaskModel, test: Subset, kind: str, stats: Tensor, seed: int) -> dict[str, Any]:
    """What follows from the images' statistics."""
    task, names, reduce = model.task, model.protocol, released.reduction(model.task, test.classes, model.protocol)
    return {
        "value": metrics.value(task, stats, reduce), "se": metrics.standard_error(task, stats, seed, reduce),
        "n": len(test), "damaged": len(getattr(test, "damaged", [])),
        "chance": model.chances[released.way(task, kind, test.classes, names)],
        "statistics": released.listed(task, stats, test.classes, names),
    }  # fmt: skip


def _attack(kind: str, settings: Settings) -> dict[str, Any] | None:
    """The attack setting that a record depends on: none if it is clean."""
    if kind == "clean":
        return None
    if settings.attack is None:
        raise BadInput("The settings have no section 'attack'; add one (params/demo.yaml shows how).")
    return settings.attack.model_dump()


# --- one cell on disk: its record, and beside it the statistics of its images, from which `worst` is made; both under
# its key in runs/<profile>/cells, and a copy of the record where tables find those of the current settings ---


def cell(
    model: TaskModel, test: Subset, variant: tuple[str, int], kind: str, settings: Settings, part: str = ""
) -> dict[str, Any]:
    """The record of one table cell: read if it was made from exactly these inputs, else evaluated and written.

    `variant`: the defense and its epochs of DeACL; `part`: a folder within the profile's, for what no table shows.
    Raises BadInput if an attack is asked for without settings of it.
    """
    about = _about(model, test, variant, kind, settings)
    found = _read(about, settings)
    if found is None:
        numbers, stats = measured(model, test, kind, settings)
        found = _write(about | numbers, stats, settings)
    return _show(found[0], settings, part)


def stored(
    model: TaskModel, test: Subset, variant: tuple[str, int], kind: str, settings: Settings
) -> tuple[dict[str, Any], Tensor] | None:
    """The record of a cell and its images' statistics (N, ..), in the order of `test`; None if `cell` would compute."""
    return _read(_about(model, test, variant, kind, settings), settings)


def place(
    model: TaskModel, test: Subset, variant: tuple[str, int], kind: str, settings: Settings
) -> tuple[Path, records.Made]:
    """Where the record of a cell is stored, and what it is made from."""
    about = _about(model, test, variant, kind, settings)
    return _path(about, settings), about["made_from"]


def worst(model: TaskModel, test: Subset, variant: tuple[str, int], settings: Settings) -> dict[str, Any] | None:
    """The record of the worst case: each image under that of the attacks run on this row that hurts it most.

    Made from what `cell` left; None while one of the attacks is not there. Where the row has had its sanity checks, the
    attacks inside the table's ball that these made on its first images (noise, more steps and starts, transfer) count
    as one more.
    """
    about, start = worst_place(model, test, variant, settings), time.perf_counter()
    if found := _read(about, settings):
        return _show(found[0], settings)
    cells = {kind: stored(model, test, variant, kind, settings) for kind in kinds(model.task, settings)}
    if not all(cells.values()):
        return None
    checked = _checked(model, test, variant, settings)
    stats = {kind: stats for kind, (_, stats) in cells.items()}
    if checked:
        rest = next(reversed(stats.values()))  # of images that were not checked one of the others, which is no news
        stats[CHECKS] = torch.cat([checked[1], rest[len(checked[1]) :]])
    chosen, made = _worst(model, test, [*stats.values()]), [record for record, _ in cells.values()]
    taken = torch.stack([*stats.values()])[chosen, torch.arange(len(chosen))]
    about |= _numbers(model, test, "task", taken, settings.seed) | {
        "max_perturbation": max(record["max_perturbation"] for record in made),
        "nonfinite": sum(record["nonfinite"] for record in made), "health": {"flags": []}, "batch": 0,
        "chosen": {kind: int((chosen == i).sum()) for i, kind in enumerate(stats)},
        "checked": len(checked[1]) if checked else 0, "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip
    return _show(_write(about, taken, settings)[0], settings)


def worst_place(model: TaskModel, test: Subset, variant: tuple[str, int], settings: Settings) -> dict[str, Any]:
    """What the record of the worst case says before it is made: it follows from cells, and from checks if any."""
    cells = {k: records.digest(place(model, test, variant, k, settings)[1]) for k in kinds(model.task, settings)}
    checked = _checked(model, test, variant, settings)
    about = _about(model, test, variant, WORST, settings)
    about["made_from"] = records.made_from((), cells=cells | ({CHECKS: checked[0]} if checked else {}))
    return about | {"key": records.digest(about["made_from"])}


def _checked(model: TaskModel, test: Subset, variant: tuple[str, int], settings: Settings) -> tuple[str, Tensor] | None:
    """Key and statistics (n, ..) of the sanity checks of the task attack's cell, None without them."""
    try:
        names = model.task, test.name, model.encoder.name, variant[0]
        result = records.read_record(evidence.checks_path(settings.profile, *names))
    except BadInput:
        return None
    if result["cell"] != records.digest(place(model, test, variant, "task", settings)[1]):
        return None
    about, made = dict(zip(("task", "dataset", "encoder", "defense"), names, strict=True)), result["made_from"]
    path = checks_place(settings.profile, about | {"made_from": made}, ".safetensors")
    found = records.reusable_tensors(path, made)
    return found and (result["key"], unpacked(found[0]))


def checks_place(profile: str, about: dict[str, Any], suffix: str = ".json") -> Path:
    """Where the sanity checks of a row are stored, or the statistics of their images."""
    name = "__".join(about[key] for key in ("task", "dataset", "encoder", "defense"))
    return records.place(records.runs_dir(profile) / "checks", name, about["made_from"], suffix)


def _worst(model: TaskModel, test: Subset, found: list[Tensor]) -> Tensor:
    """Which of K attacks, given by their statistics (N, ..), each image (N,) is taken from to make the metric worst.

    The candidates are each attack alone, and image by image the one that hurts it most: by its metric, and in
    segmentation by its wrong pixels, as some wrong pixels of an absent class halve an image's mIoU but not that of all.
    """
    task, reduce = model.task, released.reduction(model.task, test.classes, model.protocol)
    sign, n = TASKS[task].sign, len(found[0])
    scores = [sign * torch.tensor([metrics.per_image(task, stats, reduce) for stats in found])]  # (K, N) each
    if task == "segmentation":
        scores.append(torch.stack([stats[..., 0].sum(1) for stats in found]))
    chosen = [score.argmin(0) for score in scores] + [torch.full((n,), k) for k in range(len(found))]
    values = [metrics.value(task, torch.stack(found)[c, torch.arange(n)], reduce) for c in chosen]
    return chosen[min(range(len(chosen)), key=lambda i: sign * values[i])]


def _about(model: TaskModel, test: Subset, variant: tuple[str, int], kind: str, settings: Settings) -> dict[str, Any]:
    """What a record says of its cell before anything is computed, and the key of all that its numbers depend on."""
    task, (defense, epoch), attack = model.task, variant, _attack(kind, settings)
    section, protocol = released.adjusted(settings, model.encoder.native).task(task), released.label(model.protocol)
    device = records.pick_device(settings.device)
    precision = "fp32" if kind in ("clean", *strong.ALWAYS_FP32) else compute.precision(settings.precision, device)
    hashes = {
        "weights": model.encoder.hash, "head": records.state_hash(model.head.state_dict()), "data": test.hash,
    }  # fmt: skip
    used = section.model_dump(include={"size", "crop"}) | {"stride": model.stride}
    made = records.made_from(
        loops(model, test, kind), task=task, attack=kind, settings={"attack": attack, "task": used},
        protocol=protocol, seed=settings.seed, precision=precision, hashes=hashes,
    )  # fmt: skip
    return {
        "schema": records.SCHEMA, "key": records.digest(made), "made_from": made,
        "task": task, "dataset": test.name, "encoder": model.encoder.name,
        "defense": defense, "epoch": epoch, "attack": kind, "attack_name": attack_name(task, kind),
        "metric": TASKS[task].metric, "protocol": protocol, "counts": settings.counts, "precision": precision,
        "settings": {"attack": attack, "task": section.model_dump()}, "seed": settings.seed, "hashes": hashes,
        "n_train": model.trained[0], "n_train_asked": model.trained[1],
        "notebook": records.notebook(),
    }  # fmt: skip


def loops(model: TaskModel, test: Subset, kind: str) -> list[str]:
    """What computes a cell, of records.VERSIONS."""
    attack = [] if kind == "clean" else ["pgd", kind if kind in KINDS else "strong"]
    return ["data", "encoders", "heads", "metrics", *attack, *(["released"] if model.protocol else [])]


def _path(about: dict[str, Any], settings: Settings, suffix: str = ".json") -> Path:
    name = "__".join(about[key] for key in ("task", "dataset", "encoder", "defense", "attack"))
    return records.place(records.runs_dir(settings.profile) / "cells", name, about["made_from"], suffix)


def _write(record: dict[str, Any], stats: Tensor, settings: Settings) -> tuple[dict[str, Any], Tensor]:
    """Writes statistics first and the record last, so that a record never lacks them."""
    record |= records.provenance(records.pick_device(settings.device))
    records.write_tensors(packed(stats), records.about(record["made_from"]), _path(record, settings, ".safetensors"))
    records.write_record(record, _path(record, settings))
    return record, stats


def _show(record: dict[str, Any], settings: Settings, part: str = "") -> dict[str, Any]:
    """Put a copy of a record where the tables of the current settings find it."""
    names = (record[key] for key in ("task", "dataset", "encoder", "defense", "attack"))
    path, content = records.record_path(f"{settings.profile}/{part}", *names), _path(record, settings).read_bytes()
    if not path.is_file() or path.read_bytes() != content:
        records.write_bytes(content, path)
    return record


def packed(stats: Tensor) -> dict[str, Tensor]:
    """Statistics as they are stored: without zeros, as confusion matrices of many classes are nearly empty."""
    index = stats.nonzero()
    return {"index": index.int(), "values": stats[tuple(index.T)], "shape": torch.tensor(stats.shape)}


def unpacked(parts: dict[str, Tensor]) -> Tensor:
    """The statistics that `packed` was given."""
    stats = torch.zeros(parts["shape"].tolist(), dtype=torch.float64)
    stats[tuple(parts["index"].long().T)] = parts["values"]
    return stats


def _read(about: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], Tensor] | None:
    """Record and statistics of a cell if both are whole and were made from exactly what it says, else None."""
    record = records.reusable(_path(about, settings), about["made_from"])
    found = records.reusable_tensors(_path(about, settings, ".safetensors"), about["made_from"])
    return (record, unpacked(found[0])) if record and found else None


# --- all cells of a task ---


def wanted_cells(task: str, settings: Settings, row: EncoderRow, variant: Variant) -> list[Cell]:
    """The cells of one variant of a row: checkpoints between are evaluated on the first data set only."""
    names = settings.task(task).datasets
    places = names if variant[0] in row.defenses else names[:1]
    return [Cell(dataset, row, variant, kind) for dataset in places for kind in kinds(task, settings)]


def run_task(task: str, settings: Settings) -> list[dict[str, Any]]:
    """All records of one task: each data set, encoder, defense and attack, and for Figure 2 the DeACL epochs between.

    Cells on disk that were made from the same settings, weights, data and versions of the code are kept, and
    results/<profile> shows those that are asked for and no others. With settings.seeds everything but the DeACL
    fine-tuning is repeated, into results/<profile>/seeds/<seed>; the records of settings.seed are returned. Raises
    BadInput if something that an earlier notebook makes is missing, or a data set or weights; with missing: skip, such
    rows are left out instead, see records.read_skipped.
    """
    _attack("task", settings)
    records.pick_device(settings.device)
    found = _run_seed(task, settings, settings.profile)
    for seed in settings.more_seeds:
        _run_seed(task, settings.again(seed), settings.profile)
    for path in (records.results_dir(settings.profile) / "seeds").glob(f"*/{task}"):
        if path.parent.name not in map(str, settings.more_seeds):
            shutil.rmtree(path)
    return found


def _run_seed(task: str, settings: Settings, profile: str) -> list[dict[str, Any]]:
    """All records of one task and seed; `profile`: whose DeACL checkpoints are evaluated."""
    names, found, lost = settings.task(task).datasets, [], []
    for row in settings.encoders:
        for defense in (d for d in ("standard", "deacl") if d in row.defenses):
            only = row.model_copy(update={"defenses": [defense]})
            with skipping(settings, lost, [_place(dataset, row, defense) for dataset in names]):
                for variant in deacl.variants(only, profile, settings.data_root):
                    found += _variant(task, row, variant, settings, lost)
    found.sort(key=lambda record: names.index(record["dataset"]))
    show_only(task, found, settings.profile)
    records.write_skipped(settings.profile, task, lost)
    return found


def _place(dataset: str, row: EncoderRow, defense: str) -> dict[str, str]:
    return {"dataset": dataset, "encoder": row.name, "defense": defense.split("-")[0]}


def _variant(
    task: str, row: EncoderRow, variant: Variant, settings: Settings, lost: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Records of one variant of a row on all its data sets; the encoder is loaded once."""
    (defense, epoch, weights), found = variant, []
    cells = wanted_cells(task, settings, row, variant)
    encoder = encoders.load(row, settings.data_root, weights)
    for dataset in dict.fromkeys(c.dataset for c in cells):
        with skipping(settings, lost, [_place(dataset, row, defense)]):
            made = prepared(task, dataset, encoder, settings, defense)
            chosen = [c.kind for c in cells if c.dataset == dataset]
            found += [cell(*made, (defense, epoch), kind, settings) for kind in chosen]
            found.append(worst(*made, (defense, epoch), settings))
    return found


def prepare(
    task: str, dataset: str, row: EncoderRow, settings: Settings, defense: str = "standard", weights: Path | None = None
) -> tuple[TaskModel, Subset]:
    """Model and test images of one row, in the protocol of `settings`; the head is trained if it is not on disk.

    `weights` replaces the encoder's own, as in encoders.load. Raises BadInput if a data set or weights are missing.
    """
    return prepared(task, dataset, encoders.load(row, settings.data_root, weights), settings, defense)


def prepared(task: str, dataset: str, encoder: Encoder, settings: Settings, defense: str) -> tuple[TaskModel, Subset]:
    model, _ = heads.fitted(task, dataset, encoder, settings, defense)
    settings = released.adjusted(settings, encoder.native)
    test = datasets.load(task, dataset, "test", settings, encoder.native)
    return model, released.test_images(test, model.protocol)


def show_only(task: str, shown: list[dict[str, Any]], profile: str) -> None:
    """Take rows that the settings no longer ask for out of results/<profile>; they stay where they are stored."""
    names = [
        records.record_path(profile, task, *(r[k] for k in ("dataset", "encoder", "defense", "attack"))) for r in shown
    ]
    for path in records.results_dir(profile).glob(f"{task}/*__*__*__*.json"):
        if path not in names:
            path.unlink()


def examples(task: str, settings: Settings, count: int = EXAMPLES) -> list[Path]:
    """Attack `count` test images of the first data set on the first encoder (Standard) and keep them for pictures.

    With missing: skip, these are the first that can be used. Those that were made from the same inputs are kept. Raises
    BadInput without attack settings. Returns the file in runs/<profile>/examples, which plots.load_example reads and
    Figure 1 is drawn from, or [] if every row is skipped; results/<profile>/examples/<task>.json names it. In the file:
    images, adv_embed, adv_task (k, 3, H, W) in [0,1]; target, pred_clean, pred_embed, pred_task as in datasets.py.
    """
    found, pointer = _first_usable(task, settings, encoders.load), evidence.examples_path(settings.profile, task)
    if found is None:
        pointer.unlink(missing_ok=True)  # no old pictures either
        return []
    path, made = examples_place(*found, settings, count)
    if not records.reusable_tensors(path, made):
        _make_examples(*found, settings, count, path, made)
    records.write_json(path.name, pointer)
    return [path]


def examples_stored(task: str, settings: Settings, load: Loader) -> tuple[Path, records.Made, bool] | None:
    """Where the examples of a task lie, what they are made from and whether they are there; None: every row is skipped.

    `load`: what loads an encoder in place of encoders.load.
    """
    found = _first_usable(task, settings, load)
    if found is None:
        return None
    path, made = examples_place(*found, settings, EXAMPLES)
    return path, made, records.reusable_tensors(path, made) is not None


def examples_place(model: TaskModel, test: Subset, settings: Settings, count: int) -> tuple[Path, records.Made]:
    """Where examples lie, and what they are made from: that of the cells of their attacks."""
    cells = {kind: place(model, test, ("", 0), kind, settings)[1] for kind in KINDS}
    used = dict.fromkeys(name for made in cells.values() for name in made["loops"])
    made = records.made_from(used, count=count, cells={kind: made["inputs"] for kind, made in cells.items()})
    return records.place(records.runs_dir(settings.profile) / "examples", model.task, made, ".safetensors"), made


def _make_examples(
    model: TaskModel, test: Subset, settings: Settings, count: int, path: Path, made: records.Made
) -> None:
    device = records.pick_device(settings.device)
    indices, x, target = next(datasets.batches(test, count))
    x, target, ids = x.to(device), target.to(device), [test.ids[i] for i in indices]
    shown, precision = {"images": x, "target": target}, compute.precision(settings.precision, device)
    for kind in KINDS:
        adv = attacks.attacked(kind, model, x, target, ids, settings.attack, settings.seed, precision)
        with torch.no_grad():
            shown |= {f"adv_{kind}": adv, f"pred_{kind}": heads.labels(model.task, judged(kind, model, adv))}
    del shown["adv_clean"]
    about = records.about(made) | {
        "classes": json.dumps(test.classes),
        "eps": str(settings.attack.eps),
        "dataset": test.name,
        "encoder": model.encoder.name,
    }
    records.write_tensors(shown, about, path)


def _first_usable(task: str, settings: Settings, load: Loader) -> tuple[TaskModel, Subset] | None:
    """Standard model and test images of the first row that is not skipped; None if all are."""
    lost: list[dict[str, str]] = []
    standard = [row for row in settings.encoders if "standard" in row.defenses] or settings.encoders
    for dataset in settings.task(task).datasets:
        for row in standard:
            with skipping(settings, lost, [_place(dataset, row, "standard")]):
                return prepared(task, dataset, load(row, settings.data_root), settings, "standard")
    return None


def effects(settings: Settings) -> pd.DataFrame:
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
            cells = _in_protocol(task, protocol, settings, paper)
            paper = paper or cells
            rows.append(_effect(protocol, cells))
    return pd.DataFrame(rows)


def _in_protocol(
    task: str, protocol: str, settings: Settings, paper: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Records by attack; those that a single difference cannot touch are taken from `paper`."""
    whole = protocol in ("paper", "released")
    settings = settings.model_copy(update={"protocol": protocol if whole else [protocol]})
    defense = f"standard-{protocol}" if protocol in {"released", *released.OTHER_HEADS} else "standard"
    model, test = prepare(task, settings.task(task).datasets[0], settings.encoders[0], settings, defense)
    touched = released.TOUCHES.get(protocol, KINDS)
    place = (f"standard-{protocol}", 0)
    return paper | {kind: cell(model, test, place, kind, settings, "protocols") for kind in touched}


def _effect(protocol: str, cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One row of effects from the records of its three attacks."""
    shown = {key: cells["clean"][key] for key in ("task", "dataset", "encoder")} | {"protocol": protocol}
    shown |= {key: cells["clean"][key] for key in ("metric", "n")}
    for kind, name in zip(KINDS, ("clean", "embed", "attack"), strict=True):
        shown |= {name: cells[kind]["value"], f"{name}_se": cells[kind]["se"]}
    return shown
