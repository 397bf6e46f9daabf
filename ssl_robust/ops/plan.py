"""What a profile will do before it does it: rows, FLOPs, time, disk, and what is missing.

FLOPs are counted, one image through one step of each row on torch's meta device, which computes shapes only. Their rate
is measured on this machine by such steps; those of GPUs that one does not have are data-sheet numbers, see ASSUMED.
"""

import math
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import attacks, compute, datasets, deacl, encoders, heads, protocol, records, training
from ..settings import BadInput, EncoderRow, Settings, TaskSettings
from ..show import examples
from ..strong import dense
from ..tasks import TASKS
from ..trust import data
from . import wanted
from .wanted import Job, Wanted

STAGES = ("00_data", "01_heads", "02_deacl", "03_attack_classification", "04_attack_segmentation",
          "05_attack_depth", "06_figures", "07_sanity")  # fmt: skip
START, DRAW = 9.0, 11.0  # seconds of a notebook for imports and pictures; more of them in 06_figures
SCENES_PER_SECOND = 30.0  # rendered on two CPU cores
READ = 2e-8  # seconds of a CPU core to decode a pixel of a stored image
TAKEN = {"standard": 0.15, "deacl": 0.45}  # share of its steps until PGD on classes has surely lost an image; fitted
STRONG = 5  # times the steps of the profile's attack, and so many losses at most
# TFLOP/s of attack steps and of heads: 30 % of the data sheet's bf16 and 50 % of its fp32; assumed, not measured
ASSUMED = {"H100": (297.0, 33.5), "RTX 4090": (49.5, 41.3), "L4": (36.3, 15.2)}
PATIENCE = 3.0  # seconds for the hub to answer
OWN = 20  # classes of a folder whose own are not known yet
Rate = Callable[[str, str], float]  # (task or 'deacl', 'attack' or 'head') -> FLOPs a second


# --- one image through one step ---


class Step(NamedTuple):
    """FLOPs of one image: forward, and forward and backward together."""

    forward: float
    whole: float


@cache
def encoder_of(row_name: str, model: str, native: int | None) -> encoders.Encoder:
    """The architecture of a row on the meta device; an encoder of the user's own counts as a ViT-B/16."""
    with torch.device("meta"):
        row = EncoderRow(name=row_name, timm=model, native=native)
        return encoders.random_init(row)


def meta(row: EncoderRow) -> encoders.Encoder:
    """The encoder of a row as shapes without numbers."""
    return encoder_of(row.name, "vit_base_patch16_224" if row.call else row.timm, row.native)


def counted(loss: Callable[[], Tensor]) -> Step:
    """What a loss and its gradient cost."""
    with FlopCounterMode(display=False) as flops:
        value = loss()
        forward = flops.get_total_flops()
        value.backward()
    return Step(forward, flops.get_total_flops())


@cache
def attack_step(encoder: encoders.Encoder, task: str, size: tuple[int, int], classes: int, stride: float) -> Step:
    """One image of `size` (H, W) through a step of the task's own attack; the forward pass is a prediction."""
    with torch.device("meta"):
        model = heads.TaskModel(task, encoder, heads.HEADS[task](encoder.dim, classes), stride)
        x = torch.zeros(1, 3, *size, requires_grad=True)
    return counted(lambda: model(x).sum())


@cache
def head_step(encoder: encoders.Encoder, task: str, size: tuple[int, int], classes: int) -> Step:
    """One training step of a head on the tokens of one image; the loss itself costs next to nothing."""
    with torch.device("meta"):
        head, grid = heads.HEADS[task](encoder.dim, classes), [-(-side // encoder.patch) for side in size]
        cls, patches = torch.zeros(1, encoder.dim), torch.zeros(1, encoder.dim, *grid)
    return counted(lambda: heads.predict(head.eval(), encoder, cls, patches, size).sum())


@cache
def tuning_step(encoder: encoders.Encoder) -> tuple[Step, Step]:
    """DeACL on one image of the native size: a step of its attack, and a step of eq. 2."""
    with torch.device("meta"):
        x = torch.zeros(1, 3, encoder.native, encoder.native)
        moved, goal = x.clone().requires_grad_(), torch.zeros(1, encoder.dim)
    attack = counted(lambda: encoder.cls(moved).sum())
    encoder.backbone.requires_grad_(True)
    train = counted(lambda: sum(deacl.loss_terms(encoder, goal, x, x)))
    encoder.backbone.requires_grad_(False)
    return attack, train


# --- images and sizes, before any file is there ---


def counts(task: str, name: str, settings: Settings) -> tuple[int, int, int]:
    """Images used for training, held out, and for the test: n_train, n_val, n_test, or what the data set has."""
    section = settings.deacl if task == "deacl" else settings.task(task)
    asked = section.n_train, section.n_val, getattr(section, "n_test", 0)
    if name == "scenes":
        return asked
    train, test = (_has(name, task, split, settings) for split in ("train", "test"))
    val = min(asked[1], train)
    return min(asked[0], train - val), val, min(asked[2], test)


def _has(name: str, task: str, split: str, settings: Settings) -> float:
    """Images of a split: those that are listed, else those of the official data set that are asked for."""
    with suppress(BadInput):
        return len(datasets.list_items(name, task, split, 1, settings.data_root))
    official = datasets.DATASETS[name].counts.get(split, ()) if name in datasets.DATASETS else ()
    enough = [n for n in official if n >= datasets.asked(task, name, settings)]
    return min(enough, default=max(official, default=10**9))


def classes_of(name: str, task: str, settings: Settings) -> int:
    """Classes of a data set, OWN while they are not known."""
    try:
        return len(datasets.class_names(name, task, settings.data_root))
    except BadInput:
        return OWN


def image_size(task: str, split: str, name: str, row: EncoderRow, settings: Settings) -> tuple[int, int]:
    """(H, W) of an image of 'train' or 'test' as the encoder gets it; see datasets.transform."""
    native = meta(row).native
    size = "native" if task == "deacl" else section_of(task, row, settings).size
    known = datasets.DATASETS.get(name)
    height, width = known.shape if known else (375, 500)  # of a common photograph
    if task in ("classification", "deacl"):
        side = size if isinstance(size, int) else native
        return side, side
    if task == "segmentation" and split == "train":
        return native, native
    small = min(height, width)
    if isinstance(size, tuple):
        size = "original" if height < size[0] or width < size[1] else size[0]
    goal = {"native": native, "original": max(small, native)}.get(size, size)
    return round(height * goal / small), round(width * goal / small)


def section_of(task: str, row: EncoderRow, settings: Settings) -> TaskSettings:
    """The settings of a task as the protocol has them for this encoder."""
    return protocol.adjusted(settings, meta(row).native).task(task)


def step_of(task: str, name: str, row: EncoderRow, settings: Settings) -> Step:
    """One image of a table row in one attack step."""
    size = image_size(task, "test", name, row, settings)
    return attack_step(meta(row), task, size, classes_of(name, task, settings), stride_of(task, row, settings))


def stride_of(task: str, row: EncoderRow, settings: Settings) -> float:
    """Stride of the sliding window as a fraction of it; 1 where there is none."""
    return getattr(section_of(task, row, settings), "stride", 1.0)


# --- what a job costs ---


def jobs_of(settings: Settings) -> list[Job]:
    """Every job of a profile that is still without any result, as wanted.results lists them."""
    found: list[Job] = []
    tasks = [task for task in TASKS if getattr(settings, task)]
    for row in settings.encoders:
        found += [{"step": "deacl", "encoder": row.name}] * (row.tuned and settings.deacl is not None)
        for task in tasks:
            for i, name in enumerate(settings.task(task).datasets):
                for defense in variants(row, settings, i == 0):
                    place = {"task": task, "dataset": name, "encoder": row.name, "defense": defense}
                    kinds = attacks.kinds(task, settings) if settings.attack else ()
                    row_jobs = [{"step": "head", **place}, *({"step": "cell", "kind": k, **place} for k in kinds)]
                    found += row_jobs * (1 + len(settings.more_seeds))
                    if settings.sanity and settings.attack and defense in row.defenses:
                        found.append({"step": "checks", **place})
    return found + [{"step": "examples", "task": task} for task in tasks if settings.attack]


def variants(row: EncoderRow, settings: Settings, first: bool) -> list[str]:
    """Defenses of a row in the tables; on the `first` data set also the DeACL epochs of Figure 2."""
    if not (row.tuned and settings.deacl):
        return list(row.defenses)
    between = set(settings.deacl.checkpoints) - {settings.deacl.epochs} if first else ()
    standard = ["standard"] if "standard" in row.defenses else []
    return [*standard, *(f"deacl-epoch{n}" for n in sorted(between)), "deacl"]


def price(job: Job, settings: Settings) -> dict[tuple[str, str], float]:
    """FLOPs of a job by the rate that they have: (task or 'deacl', 'attack' or 'head')."""
    rows, step = {row.name: row for row in settings.encoders}, job["step"]
    if step == "deacl":
        row, cfg = rows[job["encoder"]], settings.deacl
        attack, train = tuning_step(meta(row))
        images = counts("deacl", cfg.dataset, settings)
        tuned = images[0] * (cfg.steps * attack.whole + attack.forward + train.whole)
        watched = images[1] * (cfg.steps * attack.whole + 2 * attack.forward)
        return {("deacl", "attack"): cfg.epochs * (tuned + watched)}
    task = job["task"]
    if step == "examples":
        name, row = settings.task(task).datasets[0], settings.encoders[0]
        steps = examples.COUNT * (2 * settings.attack.steps * step_of(task, name, row, settings).whole)
        return {(task, "attack"): steps}
    row, name = rows[job["encoder"]], job["dataset"]
    train, val, test = counts(task, name, settings)
    if step == "head":
        section, size = section_of(task, row, settings), image_size(task, "train", name, row, settings)
        head = head_step(meta(row), task, size, classes_of(name, task, settings))
        encoded = _encoded(task, row, size, train, val, section)
        once = attack_step(meta(row), "classification", size, 1, 1.0).forward
        return {(task, "attack"): encoded * once,
                (task, "head"): section.epochs * (train * head.whole + val * head.forward)}  # fmt: skip
    one, steps = step_of(task, name, row, settings), settings.attack.steps
    if step == "checks":
        rounds = settings.sanity.rounds(settings.attack)
        return {(task, "attack"): min(settings.sanity.n, test) * (rounds * steps * one.whole + 4 * one.forward)}
    kind = job["kind"]
    if kind not in attacks.KINDS:
        steps *= STRONG * len(dense.LOSSES.get(kind, (None,)))
    if kind == "task" and task == "classification" and settings.attack.stop_when_broken:
        steps *= TAKEN["deacl" if job["defense"].startswith("deacl") else "standard"]
    return {(task, "attack"): test * (one.forward + (kind != "clean") * (steps * one.whole + one.forward))}


def _encoded(task: str, row: EncoderRow, size: tuple[int, int], train: int, val: int, section: TaskSettings) -> int:
    """Images that are encoded to train one head: once a copy if the tokens fit in memory, else in every epoch."""
    encoder = meta(row)
    tokens = 1 + (task != "classification") * math.prod(-(-side // encoder.patch) for side in size)
    each = 4 * encoder.dim * tokens + (task != "classification") * math.prod(size) * (4 if task == "depth" else 1)
    keep_train, keep_val = training.kept(train * each, val * each, section)
    passes = training.copies(section) if keep_train else section.epochs
    return train * passes + val * (1 if keep_val else section.epochs)


def seconds(jobs: list[Job], rate: Rate, settings: Settings) -> float:
    """Expected seconds of these jobs."""
    return sum(flops / rate(*what) for job in jobs for what, flops in price(job, settings).items())


def reading(settings: Settings) -> float:
    """Seconds in which 00_data reads every image once, and renders the scenes, which tasks share."""
    used = [(name, counts(task, name, settings)) for task, name in datasets.wanted(settings)]
    scenes = [n for name, n in used if name == "scenes"]
    rendered = sum(map(max, zip(*scenes, strict=True))) / SCENES_PER_SECOND if scenes else 0.0
    shapes = ((n, datasets.DATASETS[name].shape if name in datasets.DATASETS else (375, 500)) for name, n in used)
    return rendered + sum(READ * sum(n) * math.prod(shape) for n, shape in shapes)


def assumed(gpu: str) -> Rate:
    """The rates of a GPU that one does not have."""
    steps, plain = (1e12 * rate for rate in ASSUMED[gpu])
    return lambda task, what: steps if what == "attack" else plain


def here(settings: Settings) -> Rate:
    """The rates of this machine: an attack step and a head step of the first encoder, timed when they are asked for."""
    row, device = settings.encoders[0], records.pick_device(settings.device)
    given = EncoderRow(name="like_it", timm="vit_base_patch16_224") if row.call else row
    precision = compute.precision(settings.precision, device)

    @cache
    def rate(task: str, what: str) -> float:
        task = "classification" if task == "deacl" else task
        name = settings.task(task).datasets[0] if getattr(settings, task) else "scenes"
        encoder, there = encoders.random_init(given).to(device), getattr(settings, task)
        size = image_size(task, "test", name, row, settings) if there else (encoder.native, encoder.native)
        head = heads.HEADS[task](encoder.dim, OWN).to(device)
        if what == "head":
            with torch.no_grad():
                cls, patches = encoder(torch.rand(8, 3, *size, device=device))
            spent = _timed(lambda: heads.predict(head, encoder, cls, patches, size).sum().backward(), device)
            return 8 * head_step(meta(row), task, size, OWN).whole / spent
        stride = stride_of(task, row, settings) if there else 1.0
        model = heads.TaskModel(task, encoder, head, stride)
        one = attack_step(meta(row), task, size, OWN, stride).whole
        batch = int(max(1, min(16, 4e10 // one))) if device == "cpu" else 32
        x = torch.rand(batch, 3, *size, device=device, requires_grad=True)

        def step() -> None:
            with compute.steps_in(precision, device):
                torch.autograd.grad(model(x).sum(), x)

        return batch * one / _timed(step, device)

    return rate


def _timed(step: Callable[[], None], device: str) -> float:
    """Seconds of a step: the second of two, or where they are short the best of several."""
    taken, end = [], time.perf_counter() + 0.5
    while len(taken) < 2 or (time.perf_counter() < end and len(taken) < 6):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def remaining(settings: Settings, jobs: list[Job], stages: list[str]) -> float:
    """Expected seconds on this machine for these jobs and for running the notebooks of these stages."""
    notebooks = START * len(stages) + DRAW * ("06_figures" in stages) + reading(settings) * ("00_data" in stages)
    return seconds(jobs, here(settings), settings) + notebooks


# --- the plan in words ---


def text(settings: Settings, missing: list[str]) -> str:
    """The whole plan in words; `missing`: sentences that say what is wrong or not there."""
    parts = [f"Plan of profile {settings.profile}; nothing is run."]
    parts += [_table_text(task, settings) for task in TASKS if getattr(settings, task)]
    parts += [_deacl_text(settings), _stage_text(settings), _disk_text(settings)]
    parts.append("Missing:\n" + "\n".join(f"- {m}" for m in missing) if missing else "Nothing is missing.")
    return "\n\n".join(part for part in parts if part)


def _columns(rows: list[list[str]]) -> str:
    """Rows of text as columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for limit, unit, words in ((100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {words}"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _table_text(task: str, settings: Settings) -> str:
    """The rows of one table: what is attacked how, and FLOPs of an image forward and in an attack step."""
    kinds = ", ".join(["clean", *(attacks.title(task, *kind) for kind in [*attacks.kinds(task, settings).items()][1:])])
    lines = [["data set", "encoder", "defense", "images", "px", "windows", "steps", "GFLOP forward", "a step", "PFLOP"]]
    for row in settings.encoders:
        for i, name in enumerate(settings.task(task).datasets):
            (height, width), one = image_size(task, "test", name, row, settings), step_of(task, name, row, settings)
            windows = _windows(task, (height, width), row, settings)
            for defense in variants(row, settings, i == 0):
                mine = [job for job in jobs_of(settings) if _of_row(job, task, name, row.name, defense)]
                total = sum(sum(price(job, settings).values()) for job in mine)
                numbers = [one.forward / 1e9, one.whole / 1e9, total / 1e15]
                steps = str(settings.attack.steps if settings.attack else 0)
                shown = [str(counts(task, name, settings)[2]), f"{width}x{height}", str(windows), steps]
                lines.append([name, row.name, defense, *shown, *map(_number, numbers)])
    return f"Table {TASKS[task].number}, {task}: {kinds}\n{_columns(lines)}"


def _windows(task: str, size: tuple[int, int], row: EncoderRow, settings: Settings) -> int:
    """Windows that slide over an image; 1 where none do."""
    if task != "segmentation":
        return 1
    native = meta(row).native
    step = max(1, round(section_of(task, row, settings).stride * native))
    return math.prod(len(heads.window_starts(side, min(side, native), step)) for side in size)


def _of_row(job: Job, *place: str) -> bool:
    return tuple(job.get(name) for name in ("task", "dataset", "encoder", "defense")) == place


def _deacl_text(settings: Settings) -> str:
    lines = [f"DeACL of {row.name}: {row.deacl_checkpoint}" for row in settings.encoders if row.deacl_checkpoint]
    for job in (job for job in jobs_of(settings) if job["step"] == "deacl"):
        cfg, flops = settings.deacl, sum(price(job, settings).values())
        images = counts("deacl", cfg.dataset, settings)[0]
        lines.append(f"DeACL of {job['encoder']} on {cfg.dataset}: {images} images, {cfg.epochs} epochs, {cfg.steps} "
                     f"attack steps, {_number(flops / 1e15)} PFLOP")  # fmt: skip
    return "\n".join(lines)


def _stage_text(settings: Settings) -> str:
    """Expected time of each stage here and on some GPUs, and the measured one if the stage has been run."""
    from . import stages  # here, as it stands above this module

    rates = {"here": here(settings), **{f"{gpu} (assumed)": assumed(gpu) for gpu in ASSUMED}}
    rows, jobs = [["stage", "PFLOP", *rates, "measured here"]], jobs_of(settings)
    for stage in (*STAGES, "total"):
        mine = [job for job in jobs if stage in (stages.stage_of(job), "total")]
        names = list(STAGES) if stage == "total" else [stage]
        fixed = START * len(names) + DRAW * ("06_figures" in names) + reading(settings) * ("00_data" in names)
        times = [duration(seconds(mine, rate, settings) + fixed) for rate in rates.values()]
        flops = sum(sum(price(job, settings).values()) for job in mine)
        rows.append([stage, _number(flops / 1e15), *times, _measured(settings.profile, stage)])
    return _columns(rows)


def _measured(profile: str, stage: str) -> str:
    path = records.runs_dir(profile) / f"{stage}.time.json"
    try:
        return duration(records.read_json(path)["seconds"]) if path.is_file() else ""
    except (BadInput, KeyError, TypeError):
        return ""


# --- disk ---


def _disk_text(settings: Settings) -> str:
    names = {name for _, name in datasets.wanted(settings)}
    public = sum(_bytes(meta(row)) for row in fetched(settings))
    made = sum(_written(job, settings) for job in jobs_of(settings))
    stored = records.size(sum(data.bytes_of(name, settings) for name in names))
    return f"Disk: {stored} of data sets, {records.size(public + made)} of weights, heads and checkpoints."


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _written(job: Job, settings: Settings) -> float:
    """Bytes that a job leaves in runs/, and of DeACL's state while a new one is written beside the old one."""
    row = next((row for row in settings.encoders if row.name == job.get("encoder")), None)
    if job["step"] == "deacl":
        return (len(deacl.kept(settings.deacl)) + 4) * _bytes(meta(row))
    if job["step"] != "head":
        return 0.0
    with torch.device("meta"):
        classes = classes_of(job["dataset"], job["task"], settings)
        return _bytes(heads.HEADS[job["task"]](meta(row).dim, classes))


def _disk_problems(settings: Settings) -> list[str]:
    """What does not fit on the disk, of that which is still to be written: what is there already needs no more room."""
    try:
        free, jobs = shutil.disk_usage(records.ROOT).free, jobs_of(settings)
        need = sum(_written(job, settings) for job in jobs)
    except BadInput:  # an unknown encoder, which encoders.check has named
        return []
    if need > free:
        with suppress(BadInput):  # data or weights are not there, which others say
            found = looked_for(settings)
            absent = jobs if found is None else [w.job for w in found if not w.there]
            need = sum(max(0.0, _written(job, settings) - _begun(job, settings)) for job in absent)
    if need <= free:
        return []
    return [f"The disk of {records.ROOT} has {records.size(free)} free but weights and checkpoints still need about "
            f"{records.size(need)}; free some space."]  # fmt: skip


def _begun(job: Job, settings: Settings) -> float:
    """Bytes that DeACL has left already, where it was interrupted."""
    if job["step"] != "deacl":
        return 0.0
    folders = [f for f in (records.runs_dir(settings.profile) / "deacl" / job["encoder"]).glob("*") if f.is_dir()]
    begun = [f for f in folders if not (f / "deacl.json").is_file()]
    return sum(path.stat().st_size for folder in begun for path in folder.iterdir())


# --- what is missing ---


def problems(settings: Settings) -> tuple[list[str], list[str]]:
    """Everything that is missing, a sentence each: what stops a run, and what is only said before it.

    Missing data sets and weights stop it unless the profile says missing: skip; fewer training images than asked for
    never do.
    """
    absent = [*data.check(settings), *encoders.check(settings), *missing_weights(settings)]
    stop, warn = ([], absent) if settings.missing == "skip" else (absent, [])
    wrong, remarks = data.look(settings)
    stop, warn = stop + [w for w in wrong if w not in absent], warn + remarks + data.shortages(settings)
    return stop + _attack_problems(settings) + _device_problems(settings) + _disk_problems(settings), warn


def _attack_problems(settings: Settings) -> list[str]:
    try:
        for task in (task for task in TASKS if getattr(settings, task)):
            attacks.kinds(task, settings)
    except BadInput as problem:
        return [str(problem)]
    return []


def _device_problems(settings: Settings) -> list[str]:
    try:
        records.pick_device(settings.device)
    except BadInput as problem:
        return [str(problem)]
    return []


def looked_for(settings: Settings) -> list[Wanted] | None:
    """All results; None if none can be there, as nothing was computed yet, or weights would be fetched to know that."""
    places = (records.runs_dir(settings.profile) / folder for folder in ("heads", "deacl", "cells"))
    local = all(cached(encoders.describe(row).timm) for row in fetched(settings))
    return wanted.results(settings)[0] if local and any(place.is_dir() for place in places) else None


def fetched(settings: Settings) -> list[EncoderRow]:
    """The rows whose weights timm fetches from its hub."""
    found = []
    for row in settings.encoders:
        try:
            if row.needs_standard and not row.call and not row.checkpoint:
                known = encoders.describe(row)
                found += [row] if known.timm and known.public else []
        except BadInput:  # encoders.check says it
            continue
    return found


def missing_weights(settings: Settings) -> list[str]:
    """One sentence for each encoder whose weights are neither in the local cache nor to be had from the hub."""
    absent = [row for row in fetched(settings) if not cached(encoders.describe(row).timm)]
    if not absent or hub_answers():
        return []
    return [
        f"Encoder '{row.name}': the weights of {encoders.describe(row).timm} are not in the local cache and the hub "
        f"does not answer; download them elsewhere and give the file as checkpoint."
        for row in absent
    ]


def cached(model: str) -> bool:
    """Whether the weights of a timm model lie in the local cache of its hub."""
    cfg = timm.get_pretrained_cfg(model)
    if not cfg.hf_hub_id:
        return (Path(torch.hub.get_dir()) / "checkpoints" / str(cfg.url).rpartition("/")[2]).is_file()
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files)


def hub_answers() -> bool:
    """Whether the model hub can be reached, within PATIENCE seconds whatever the network does."""
    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []
    # a thread, because looking up a name has no time limit of its own
    thread = threading.Thread(target=lambda: answers.append(_knock(constants.ENDPOINT)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answers == [True]


def _knock(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:  # an answer all the same
        return True
    except (OSError, ValueError):
        return False
    return True
