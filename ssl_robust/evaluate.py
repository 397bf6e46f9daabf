"""One cell of a table: a model, its test images and an attack; clean and attacked evaluation through one path."""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import attacks, compute, datasets, deacl, encoders, heads, metrics, protocol, records, training
from .datasets import Subset
from .encoders import Encoder
from .heads import TaskModel
from .parts import part
from .progress import track
from .settings import Attack, EncoderRow, Settings, skipping
from .tasks import TASKS

WORST = "worst"  # the worst case of a row, see trust/worst.py
PLACE = ("task", "dataset", "encoder", "defense")  # of a row
Variant = tuple[str, int, Path | None]  # defense, epochs of DeACL, weight file
Loader = Callable[[EncoderRow, str], Encoder]  # (row, data folder) -> its Standard encoder


class _Outcome(NamedTuple):
    """What `evaluate` found: statistics (N, ..) of each image (metrics.py), and what happened on the way."""

    stats: Tensor
    largest: float  # |x_adv - x| that occurred
    nonfinite: int  # images with a non-finite prediction
    traces: list[attacks.Trace]
    wrong: Tensor  # (N,) bool in the order of the traces: whether the class is lost; empty for dense tasks
    batch: int  # images that were attacked at a time


def evaluate(
    model: TaskModel, test: Subset, name: str, attack: Attack | None, batch: int | str, seed: int, device: str,
    precision: str = "fp32", kind: attacks.Kind | None = None,
) -> _Outcome:  # fmt: skip
    """Every test image under the attack `name`: `batch` at a time in `precision`, then predicted in fp32.

    `kind`: what the name stands for if it is not of attacks.known.
    """
    kind = kind or attacks.known()[name]
    rows, traces, wrong, largest, nonfinite = {}, [], [], 0.0, 0
    statistics = protocol.ask(model.protocol, "statistics", metrics.statistics, model.task, name)
    said = f"{attacks.title(model.task, name, kind)} on {model.encoder.name}, {test.name}"
    size = whole = at_once(model, test, batch, device)
    parts = datasets.batches(test, size, device)
    for indices, x, target in track(parts, total=len(test), desc=said, size=lambda part: len(part[0])):
        ids = [test.ids[i] for i in indices]

        def perturbed(rows: slice, x: Tensor = x, target: Tensor = target, ids: list[str] = ids) -> Tensor:
            traces.append([])
            return kind.run(model, x[rows], target[rows], ids[rows], attack, seed, precision, traces[-1])

        adv, size = compute.in_parts(perturbed, len(x), size)
        with torch.no_grad():
            prediction, size = compute.in_parts(lambda rows, adv=adv: judged(name, model, adv[rows]), len(adv), size)
        largest = max(largest, float((adv - x).abs().max()))
        nonfinite += int((~prediction.flatten(1).isfinite()).any(1).sum())
        stats = statistics(model.task, prediction, target, len(test.classes))
        if model.task == "classification":
            wrong.append(stats[:, 0] == 0)
        rows.update(zip(indices, stats, strict=True))
    model.fits = size if size < whole else model.fits
    stats = torch.stack([rows[i] for i in range(len(test))])
    return _Outcome(stats, largest, nonfinite, traces, torch.cat([torch.zeros(0).bool(), *wrong]), size)


def judged(name: str, model: TaskModel, adv: Tensor) -> Tensor:
    """The model's prediction for images (B, 3, H, W) under the attack `name`, as its protocol looks at them; fp32."""
    return model(protocol.ask(model.protocol, "as_judged", adv, name, model, adv))


def at_once(model: TaskModel, test: Subset, setting: int | str, device: str) -> int:
    """Images of `test` that are attacked at a time, see compute.batch_for; no more than memory held before."""
    many = batch_of(model, tuple(test[0][0].shape[-2:]), len(test.classes), setting, device)
    return min(many, model.fits or many)


def batch_of(model: TaskModel, size: tuple[int, int], classes: int, setting: int | str, device: str) -> int:
    """Images of `size` (H, W) that are attacked at a time where memory suffices."""
    windows, logits = 1, 0
    if model.task == "segmentation":
        native, logits = model.encoder.native, classes * math.prod(size)
        windows = math.prod(len(heads.window_starts(side, native, model.stride)) for side in size)
        size = tuple(min(side, native) for side in size)
    return compute.batch_for(compute.tokens_of(model.encoder.patch, size, windows), device, setting, logits)


def reduction(model: TaskModel, test: Subset) -> metrics.Reduction:
    """How sums of statistics over images become the metric, in the model's protocol."""
    return protocol.ask(model.protocol, "reduction", metrics.value_of_sums, model.task, test.classes)


def chance(model: TaskModel, test: Subset, name: str = "task") -> float:
    """What a constant prediction reaches in the metric under the attack `name`."""
    return model.chances[protocol.ask(model.protocol, "way", "", model.task, name, test.classes)]


@dataclass(frozen=True)
class Cell:
    """One place in a table or on Figure 2: a row's model and test images under one attack.

    Record and statistics of its images lie under the key of all that its numbers depend on in runs/<profile>/cells; a
    copy of the record lies where tables find those of the current settings.
    """

    model: TaskModel
    test: Subset
    attack: str  # 'clean', or of settings.attacks
    settings: Settings
    defense: str = "standard"
    epoch: int = 0  # of DeACL
    lost: list[dict[str, str]] = field(default_factory=list)  # rows that missing: skip leaves out

    @property
    def names(self) -> tuple[str, str, str, str, str]:
        """Task, data set, encoder, defense, attack."""
        return self.model.task, self.test.name, self.model.encoder.name, self.defense, self.attack

    @property
    def kind(self) -> attacks.Kind:
        return attacks.kinds(self.model.task, self.settings)[self.attack]

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the record says before anything is computed; BadInput for an attack without the section 'attack'."""
        model, settings, task, kind = self.model, self.settings, self.model.task, self.kind
        attack, precision = None, "fp32"
        if self.attack != "clean":
            attack = settings.section("attack").model_dump()
            precision = "fp32" if kind.fp32 else compute.precision(settings.precision, self.device)
        label = protocol.label(model.protocol)
        section = protocol.adjusted(settings.of(model.encoder.name), model.encoder.native).task(task)
        hashes = {
            "weights": model.encoder.hash, "head": records.state_hash(model.head.state_dict()), "data": self.test.hash,
        }  # fmt: skip
        made = records.made_from(
            ["data", "encoders", "heads", "metrics", *kind.loops, *["released"] * bool(model.protocol)],
            task=task, attack=self.attack, seed=settings.seed, precision=precision,
            settings={"attack": attack,
                      "task": section.model_dump(include={"size", "crop"}) | {"stride": model.stride}},
            protocol=label, hashes=hashes, **({"call": kind.source} if kind.source else {}),
        )  # fmt: skip
        return {
            "schema": records.SCHEMA, "key": records.digest(made), "made_from": made,
            **dict(zip(PLACE, self.names, strict=False)), "epoch": self.epoch,
            "attack": self.attack, "attack_name": attacks.title(task, self.attack, kind),
            "metric": TASKS[task].metric, "protocol": label, "counts": settings.counts, "precision": precision,
            "settings": {"attack": attack, "task": section.model_dump()}, "seed": settings.seed, "hashes": hashes,
            "n_train": model.trained[0], "n_train_asked": model.trained[1], "notebook": records.notebook(),
        }  # fmt: skip

    @property
    def device(self) -> str:
        return records.pick_device(self.settings.device)

    @property
    def made(self) -> records.Made:
        """What the cell is made from."""
        return self.about["made_from"]

    def path(self, suffix: str = ".json") -> Path:
        """Where its record, or with another suffix its statistics, are stored."""
        folder = records.runs_dir(self.settings.profile) / "cells"
        return records.place(folder, "__".join(self.names), self.made, suffix)

    def shown(self, part: str = "") -> Path:
        """Where tables find its record; `part`: a folder within the profile's, for what no table shows."""
        return records.record_path(f"{self.settings.profile}/{part}", *self.names)

    def of(self, attack: str) -> "Cell":
        """The cell of another attack in the same row."""
        return replace(self, attack=attack)

    def stored(self) -> tuple[dict[str, Any], Tensor] | None:
        """Record and statistics (N, ..), in the order of `test`; None unless both are whole and made from `made`."""
        record = records.reusable(self.path(), self.made)
        found = records.reusable_tensors(self.path(".safetensors"), self.made)
        return (record, records.unpacked(found[0])) if record and found else None

    def run(self, part: str = "") -> dict[str, Any] | None:
        """The record: read if it was made from exactly these inputs, else computed and written; see `shown`.

        None if missing: skip leaves the row out.
        """
        with skipping(self.settings, self.lost, [_place(self.test.name, self.model.encoder.name, self.defense)]):
            found = self.stored() or self.write(*self.measured())
            path, content = self.shown(part), self.path().read_bytes()
            if not path.is_file() or path.read_bytes() != content:
                records.write_bytes(content, path)
            return found[0]
        self.shown(part).unlink(missing_ok=True)
        return None

    def measured(self) -> tuple[dict[str, Any], Tensor]:
        """The numbers of the cell, in the model's protocol, and its images' statistics; nothing on disk changes."""
        model, attack, s, start = self.model, self.settings.attack, self.settings, time.perf_counter()
        precision, on_class = compute.precision(s.precision, self.device), model.task == "classification"
        batch = s.task(model.task).attack_batch
        out = evaluate(
            model, self.test, self.attack, attack, batch, s.seed, self.device, precision, self.kind
        )  # fmt: skip
        # the loss above which an image was lost on the way, where it would not have left the attack for it
        stays = on_class and self.attack != "clean" and not attacks.leaves(self.attack, model, attack)
        health = part("trust.health").summarise(
            out.traces, self.attack, model.task, out.wrong if on_class else None,
            attacks.enough(model) if stays else math.inf, attack.steps if attack else None, out.nonfinite,
        )  # fmt: skip
        return self._numbers(out.stats) | {
            "max_perturbation": out.largest, "nonfinite": out.nonfinite, "health": health,
            "batch": out.batch, "seconds": round(time.perf_counter() - start, 2),
        }, out.stats  # fmt: skip

    def _numbers(self, stats: Tensor) -> dict[str, Any]:
        """What follows from the images' statistics."""
        model, test, name = self.model, self.test, "task" if self.attack == WORST else self.attack
        task, reduce = model.task, reduction(model, test)
        listed = protocol.ask(model.protocol, "listed", metrics.listed(task, stats), task, stats, test.classes)
        return {
            "value": metrics.value(task, stats, reduce),
            "se": metrics.standard_error(task, stats, self.settings.seed, reduce),
            "n": len(test), "damaged": len(getattr(test, "damaged", [])), "chance": chance(model, test, name),
            "statistics": listed,
        }  # fmt: skip

    def write(self, numbers: dict[str, Any], stats: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Writes statistics first and the record last, so that a record never lacks them."""
        record = self.about | numbers | records.provenance(self.device)
        records.write_tensors(records.packed(stats), records.about(self.made), self.path(".safetensors"))
        records.write_record(record, self.path())
        return record, stats


def checks_place(profile: str, about: dict[str, Any], suffix: str = ".json") -> Path:
    """Where the sanity checks of a row are stored, or the statistics of their images."""
    name = "__".join(about[key] for key in PLACE)
    return records.place(records.runs_dir(profile) / "checks", name, about["made_from"], suffix)


# --- rows ---


def prepare(
    task: str, dataset: str, row: EncoderRow, settings: Settings, defense: str = "standard", weights: Path | None = None
) -> tuple[TaskModel, Subset]:
    """Model and test images of one row, in the protocol of `settings`; the head is trained if it is not on disk.

    `weights` replaces the encoder's own, as in encoders.load. Raises BadInput if a data set or weights are missing.
    """
    return prepared(task, dataset, encoders.load(row, settings.data_root, weights), settings, defense)


def prepared(task: str, dataset: str, encoder: Encoder, settings: Settings, defense: str) -> tuple[TaskModel, Subset]:
    """The same of an encoder that is loaded."""
    model, _ = training.fitted(task, dataset, encoder, settings, defense)
    settings = settings.of(encoder.name)
    test = datasets.load(task, dataset, "test", protocol.adjusted(settings, encoder.native), encoder.native)
    return model, protocol.ask(model.protocol, "test_images", test, test)


def first(
    task: str, settings: Settings, load: Loader | None = None, fallback: bool = True
) -> tuple[TaskModel, Subset] | None:
    """Model and test images that notebooks show: the first Standard row and data set; with missing: skip that can be.

    Where none can be, those of the embedded encoder on the rendered scenes; None without this `fallback`. `load`: what
    loads an encoder.
    """
    rows = [row for row in settings.encoders if "standard" in row.defenses] or settings.encoders
    for dataset, row in itertools.product(settings.task(task).datasets, rows):
        with skipping(settings, [], []):
            encoder = (load or encoders.load)(row, settings.data_root)
            return prepared(task, dataset, encoder, settings, "standard")
    return prepare(task, "scenes", EncoderRow(name="embedded_vit"), settings) if fallback else None


def data_sets(task: str, settings: Settings, row: EncoderRow, variant: Variant) -> list[str]:
    """Where one variant of a row is evaluated: DeACL epochs between, which Figure 2 shows, on the first data set."""
    names = settings.task(task).datasets
    return names if variant[0] in row.defenses else names[:1]


def cells(task: str, settings: Settings) -> Iterator[Cell]:
    """Every cell of one task, the worst case of a row after its attacks: data sets, encoders, defenses, DeACL epochs.

    With settings.seeds everything but the DeACL fine-tuning comes again, for results/<profile>/seeds/<seed>. After the
    last cell results/<profile> shows these cells and no others; what is taken out of it stays stored. With missing:
    skip, rows whose data, weights or DeACL are missing are left out, see records.read_skipped; else BadInput.
    """
    settings.section("attack")
    records.pick_device(settings.device)
    yield from _of_seed(task, settings, settings.profile)
    for seed in settings.more_seeds:
        yield from _of_seed(task, settings.again(seed), settings.profile)
    for path in (records.results_dir(settings.profile) / "seeds").glob(f"*/{task}"):
        if path.parent.name not in map(str, settings.more_seeds):
            shutil.rmtree(path)


def _of_seed(task: str, settings: Settings, profile: str) -> Iterator[Cell]:
    """The cells of one seed; `profile`: whose DeACL checkpoints are evaluated."""
    names, shown, lost = settings.task(task).datasets, [], []
    for row in settings.encoders:
        for defense in (d for d in ("standard", "deacl") if d in row.defenses):
            only = row.model_copy(update={"defenses": [defense]})
            with skipping(settings, lost, [_place(dataset, row.name, defense) for dataset in names]):
                for variant in deacl.variants(only, profile, settings.data_root):
                    for cell in _of_variant(task, row, variant, settings, lost):
                        shown.append(cell.shown())
                        yield cell
    for path in records.results_dir(settings.profile).glob(f"{task}/*__*__*__*.json"):
        if path not in shown:
            path.unlink()
    records.write_skipped(settings.profile, task, lost)


def _place(dataset: str, encoder: str, defense: str) -> dict[str, str]:
    return {"dataset": dataset, "encoder": encoder, "defense": defense.split("-")[0]}


def _of_variant(
    task: str, row: EncoderRow, variant: Variant, settings: Settings, lost: list[dict[str, str]]
) -> Iterator[Cell]:
    """The cells of one variant of a row on all its data sets; the encoder is loaded once."""
    defense, epoch, weights = variant
    encoder = encoders.load(row, settings.data_root, weights)
    for dataset in data_sets(task, settings, row, variant):
        with skipping(settings, lost, [_place(dataset, row.name, defense)]):
            model, test = prepared(task, dataset, encoder, settings, defense)
            about = {"settings": settings, "defense": defense, "epoch": epoch, "lost": lost}
            for attack in attacks.kinds(task, settings):
                yield Cell(model, test, attack, **about)
            yield part("trust.worst").Worst(model, test, WORST, **about)


def run_task(task: str, settings: Settings) -> list[dict[str, Any]]:
    """The records of all `cells` of a task, those of settings.seed are returned, data set by data set."""
    names = settings.task(task).datasets
    found = [record for cell in cells(task, settings) if (record := cell.run()) and record["seed"] == settings.seed]
    return sorted(found, key=lambda record: names.index(record["dataset"]))
