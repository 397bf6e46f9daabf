"""What a profile will do before it does it: rows, FLOPs, time, disk, and what is missing.

FLOPs are counted, one image through one step of each row on torch's meta device, which computes shapes only (of a
callable, really). Their rate is measured on this machine by such steps; those of GPUs that one does not have are
data-sheet numbers, see ASSUMED.
"""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import attacks, compute, datasets, deacl, encoders, heads, protocol, records, training
from ..settings import BadInput, EncoderRow, Settings
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
READ, RESIZE = 2e-8, 2e-9  # seconds of a CPU core for a pixel of a stored image, and for one of the resized image
READERS = 8.0  # CPU cores that read ahead beside a GPU
IMAGES = ("images", "read")  # a price beside FLOPs: seconds of a core; images are read while others are computed
TAKEN = {"standard": 0.15, "deacl": 0.45}  # share of its steps until PGD on classes has surely lost an image; fitted
STRONG = 5  # times the steps of the profile's attack, and so many losses at most
# TFLOP/s of attack steps and of heads: 30 % of the data sheet's bf16 and 50 % of its fp32; assumed, not measured. An
# H200 made PGD steps on a ViT-B/16 at 253 (figures/committed/bench_h200), a quarter of its data sheet; an H100, with
# two thirds of its memory's bandwidth, is taken for a fifth.
ASSUMED = {"H200": (253.0, 33.5), "H100": (198.0, 33.5), "RTX 4090": (49.5, 41.3), "L4": (36.3, 15.2)}
SLOW = 4e11  # FLOPs of a dense image's step from which a CPU is timed on images of the native size instead
PATIENCE = 3.0  # seconds for the hub to answer
OWN = 20  # classes of a folder whose own are not known yet
Price = dict[tuple[str, str], float]  # FLOPs by the rate that they have: (task or 'deacl', 'attack' or 'head'); IMAGES
Rate = Callable[[str, str], float]  # of these two -> FLOPs a second; of IMAGES -> cores


# --- one image through one step ---


class Step(NamedTuple):
    """FLOPs of one image: forward, and forward and backward together."""

    forward: float
    whole: float


@cache
def _architecture(name: str, model: str, call: str, native: int | None) -> encoders.Encoder:
    if call:
        return encoders.load(EncoderRow(name=name, call=call, native=native))
    with torch.device("meta"):
        return encoders.random_init(EncoderRow(name=name, timm=model, native=native))


def meta(row: EncoderRow) -> encoders.Encoder:
    """The encoder of a row as shapes without numbers; a callable itself. BadInput if there is none."""
    return _architecture(row.name, row.timm, row.call, row.native)


def _counted(loss: Callable[[], Tensor]) -> Step:
    with FlopCounterMode(display=False) as flops:
        value = loss()
        forward = flops.get_total_flops()
        value.backward()
    return Step(forward, flops.get_total_flops())


def attack_loss(
    encoder: encoders.Encoder, task: str, size: tuple[int, int], classes: int, stride: float, images: int
) -> Callable[[], Tensor]:
    """What is differentiated in a step of the task's own attack on so many images of `size` (H, W): a prediction."""
    with encoder.mean.device:
        model = heads.TaskModel(task, encoder, heads.HEADS[task](encoder.dim, classes), stride)
        x = torch.rand(images, 3, *size, requires_grad=True)
    return lambda: model(x).sum()


def head_loss(
    encoder: encoders.Encoder, task: str, size: tuple[int, int], classes: int, images: int
) -> Callable[[], Tensor]:
    """The same of a head's training on the tokens of so many images; the loss itself costs next to nothing."""
    with encoder.mean.device:
        head, grid = heads.HEADS[task](encoder.dim, classes), [-(-side // encoder.patch) for side in size]
        cls, patches = torch.rand(images, encoder.dim), torch.rand(images, encoder.dim, *grid)
    return lambda: heads.predict(head.eval(), encoder, cls, patches, size).sum()


@cache
def step_of(loss: Callable[..., Callable[[], Tensor]], *about: Any) -> Step:
    """One image in a step of `attack_loss` or `head_loss`."""
    return _counted(loss(*about, 1))


@cache
def tuning_step(encoder: encoders.Encoder) -> tuple[Step, Step]:
    """DeACL on one image of the native size: a step of its attack, and a step of eq. 2."""
    with encoder.mean.device:
        x = torch.zeros(1, 3, encoder.native, encoder.native)
        moved, goal = x.clone().requires_grad_(), torch.zeros(1, encoder.dim)
    attack = _counted(lambda: encoder.cls(moved).sum())
    encoder.backbone.requires_grad_(True)
    train = _counted(lambda: sum(deacl.loss_terms(encoder, goal, x, x)))
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
    official = data.known(name).counts.get(split, ())
    enough = [n for n in official if n >= datasets.asked(task, name, settings)]
    return min(enough, default=max(official, default=10**9))


def _reading(name: str, size: tuple[int, int]) -> float:
    """Seconds of a core for an image that becomes one of `size` (H, W)."""
    return READ * math.prod(data.known(name).shape) + RESIZE * math.prod(size)


class Place:
    """An encoder on a data set of a task: its sizes and steps."""

    def __init__(self, task: str, name: str, row: EncoderRow, settings: Settings) -> None:
        self.task, self.name, self.encoder, settings = task, name, meta(row), settings.of(row.name)
        self.section = protocol.adjusted(settings, self.encoder.native).task(task)
        self.counts = counts(task, name, settings)
        try:
            self.classes = len(datasets.class_names(name, task, settings.data_root))
        except BadInput:  # it is not here
            self.classes = data.known(name).many or OWN

    def size(self, split: str) -> tuple[int, int]:
        """(H, W) of an image of 'train' or 'test' as the encoder gets it; see datasets.transform."""
        native, size, (height, width) = self.encoder.native, self.section.size, data.known(self.name).shape
        if self.task == "classification":
            return (size, size) if isinstance(size, int) else (native, native)
        if self.task == "segmentation" and split == "train":
            return native, native
        small = min(height, width)
        if isinstance(size, tuple):
            size = "original" if height < size[0] or width < size[1] else size[0]
        goal = {"native": native, "original": max(small, native)}.get(size, size)
        return round(height * goal / small), round(width * goal / small)

    @property
    def stride(self) -> float:
        return getattr(self.section, "stride", 1.0)

    def attack(self) -> Step:
        return step_of(attack_loss, self.encoder, self.task, self.size("test"), self.classes, self.stride)

    def read(self, images: float, split: str) -> Price:
        return {IMAGES: images * _reading(self.name, self.size(split))}

    def training(self) -> Price:
        """Encoding the images of a head, once a copy if tokens fit in memory, else in every epoch; and its training."""
        size, dense_task, (train, val, _) = self.size("train"), self.task != "classification", self.counts
        tokens = 1 + dense_task * math.prod(-(-side // self.encoder.patch) for side in size)
        each = 4 * self.encoder.dim * tokens + dense_task * math.prod(size) * (4 if self.task == "depth" else 1)
        keep_train, keep_val = training.kept(train * each, val * each, self.section)
        encoded = train * (training.copies(self.section) if keep_train else self.section.epochs)
        encoded += val * (1 if keep_val else self.section.epochs)
        head = step_of(head_loss, self.encoder, self.task, size, self.classes)
        once = step_of(attack_loss, self.encoder, "classification", size, 1, 1.0).forward
        trained = self.section.epochs * (train * head.whole + val * head.forward)
        costs = {(self.task, "attack"): encoded * once, (self.task, "head"): trained}
        return costs | self.read(encoded, "train")


# --- what a job costs ---


def jobs_of(settings: Settings) -> list[Job]:
    """Every job of a profile that is still without any result, as wanted.results lists them."""
    found: list[Job] = []
    tasks = [task for task in TASKS if getattr(settings, task)]
    for row in settings.encoders:
        found += [{"step": "deacl", "encoder": row.name}] * (row.tuned and settings.deacl is not None)
        places = [(task, i, name) for task in tasks for i, name in enumerate(settings.task(task).datasets)]
        for task, i, name in places:
            for defense in _defenses(row, settings, first=i == 0):
                place = {"task": task, "dataset": name, "encoder": row.name, "defense": defense}
                kinds = attacks.kinds(task, settings) if settings.attack else ()
                row_jobs = [{"step": "head", **place}, *({"step": "cell", "kind": k, **place} for k in kinds)]
                found += row_jobs * (1 + len(settings.more_seeds))
                if settings.sanity and settings.attack and defense in row.defenses:
                    found.append({"step": "checks", **place})
    return found + [{"step": "examples", "task": task} for task in tasks if settings.attack]


def _defenses(row: EncoderRow, settings: Settings, first: bool) -> list[str]:
    """Defenses of a row in the tables; on the `first` data set also the DeACL epochs of Figure 2."""
    if row.deacl_checkpoint:
        found = [name for name, *_ in deacl.variants(row, settings.profile, settings.data_root)]
        return [name for name in found if first or name in row.defenses]
    if not (row.tuned and settings.deacl):
        return list(row.defenses)
    between = set(settings.deacl.checkpoints) - {settings.deacl.epochs} if first else ()
    standard = ["standard"] if "standard" in row.defenses else []
    return [*standard, *(f"deacl-epoch{n}" for n in sorted(between)), "deacl"]


def _row(job: Job, settings: Settings) -> EncoderRow:
    return next((row for row in settings.encoders if row.name == job.get("encoder")), settings.encoders[0])


def place_of(job: Job, settings: Settings) -> Place:
    """Where a job that is of a task works; the images of Figure 1 are of the first data set and encoder."""
    task = job["task"]
    return Place(task, job.get("dataset", settings.task(task).datasets[0]), _row(job, settings), settings)


def price(job: Job, settings: Settings) -> Price:
    step = job["step"]
    if step == "deacl":
        cfg, (attack, train) = settings.deacl, tuning_step(meta(_row(job, settings)))
        images = counts("deacl", cfg.dataset, settings)
        tuned = images[0] * (cfg.steps * attack.whole + attack.forward + train.whole)
        watched = images[1] * (cfg.steps * attack.whole + 2 * attack.forward)
        native = meta(_row(job, settings)).native
        read = cfg.epochs * sum(images) * _reading(cfg.dataset, (native, native))
        return {("deacl", "attack"): cfg.epochs * (tuned + watched), IMAGES: read}
    place = place_of(job, settings)
    if step == "head":
        return place.training()
    one, steps, test = place.attack(), settings.attack.steps, place.counts[2]
    if step == "examples":
        return {(place.task, "attack"): 2 * examples.COUNT * steps * one.whole}
    if step == "checks":
        each = settings.sanity.rounds(settings.attack) * steps * one.whole + 4 * one.forward
        return {(place.task, "attack"): min(settings.sanity.n, test) * each}
    kind = job["kind"]
    if kind not in attacks.KINDS:
        steps *= STRONG * len(dense.LOSSES.get(kind, (None,)))
    if kind == "task" and place.task == "classification" and settings.attack.stop_when_broken:
        steps *= TAKEN["deacl" if job["defense"].startswith("deacl") else "standard"]
    cost = test * (one.forward + (kind != "clean") * (steps * one.whole + one.forward))
    return {(place.task, "attack"): cost} | place.read(test, "test")


def flops(prices: list[Price]) -> float:
    return sum(cost for each in prices for what, cost in each.items() if what != IMAGES)


def seconds(prices: list[Price], rate: Rate) -> float:
    """Expected seconds of jobs: of each what it computes, or reads if that takes longer."""
    spent = [{what: cost / rate(*what) for what, cost in each.items()} for each in prices]
    return sum(max(sum(each.values()) - each.get(IMAGES, 0.0), each.get(IMAGES, 0.0)) for each in spent)


def notebooks(stages: list[str], settings: Settings) -> float:
    """Seconds of these notebooks besides their jobs: 00_data looks through the images, and renders the scenes."""
    fixed = START * len(stages) + DRAW * ("06_figures" in stages)
    if "00_data" not in stages:
        return fixed
    used = [(name, counts(task, name, settings)) for task, name in datasets.wanted(settings)]
    scenes = [n for name, n in used if name == "scenes"]  # which tasks share
    rendered = sum(map(max, zip(*scenes, strict=True))) / SCENES_PER_SECOND if scenes else 0.0
    looked_at = [(name, sum(len(datasets.spread(range(int(k)))) for k in n)) for name, n in used]
    return fixed + rendered + sum(n * _reading(name, (0, 0)) for name, n in looked_at)


def assumed(gpu: str) -> Rate:
    """The rates of a GPU that one does not have."""
    steps, plain = (1e12 * rate for rate in ASSUMED[gpu])
    return lambda task, what: {"attack": steps, "head": plain, "read": READERS}[what]


def here(settings: Settings) -> Rate:
    """The rates of this machine: an attack step and a head step of the first encoder, timed when they are asked for."""
    # a GPU that is asked for and not there is said by `problems`
    row, device = settings.encoders[0], records.pick_device("cpu" if settings.device == "cpu" else "auto")
    precision = compute.precision(settings.precision, device)

    @cache
    def rate(task: str, what: str) -> float:
        if what == "read":
            return float(max(1, datasets.ahead()))
        task = "classification" if task == "deacl" else task
        encoder, stride = (encoders.load if row.call else encoders.random_init)(row).to(device), 1.0
        size = (encoder.native, encoder.native)
        if getattr(settings, task):
            place = Place(task, settings.task(task).datasets[0], row, settings)
            size, stride = place.size("test"), place.stride
        if what == "head":
            spent = _timed(head_loss(encoder, task, size, OWN, 8), "fp32", device)
            return 8 * step_of(head_loss, meta(row), task, size, OWN).whole / spent
        one = step_of(attack_loss, meta(row), task, size, OWN, stride).whole
        if device == "cpu" and one > SLOW and task != "classification":
            return rate("classification", what)
        batch = int(max(1, min(16, 4e10 // one))) if device == "cpu" else 32
        return batch * one / _timed(attack_loss(encoder, task, size, OWN, stride, batch), precision, device)

    return rate


def _timed(loss: Callable[[], Tensor], precision: str, device: str) -> float:
    """Seconds of a loss and its gradient: the second time of two, or where they are short the best of several."""
    taken, end = [], time.perf_counter() + 0.5
    while len(taken) < 2 or (time.perf_counter() < end and len(taken) < 6):
        start = time.perf_counter()
        with compute.steps_in(precision, device):
            loss().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def remaining(settings: Settings, jobs: list[Job], stages: list[str]) -> float:
    """Expected seconds on this machine for these jobs and for running the notebooks of these stages."""
    return seconds([price(job, settings) for job in jobs], here(settings)) + notebooks(stages, settings)


# --- the plan in words ---


def text(settings: Settings, missing: list[str]) -> str:
    """The whole plan in words; `missing`: sentences that say what is wrong or not there."""
    from . import memory  # here, as it stands above this module

    work = [(job, price(job, settings)) for job in jobs_of(settings)]
    parts = [f"Plan of profile {settings.profile}; nothing is run.", _rows_text(settings, work)]
    parts += [_stage_text(settings, work), *filter(None, [memory.text(settings)])]
    names = {name for _, name in datasets.wanted(settings)}
    public = sum(bytes_of(meta(row)) for row in fetched(settings))
    made = sum(_written(job, settings) for job, _ in work)
    stored = records.size(sum(data.bytes_of(name, settings) for name in names))
    parts.append(f"Disk: {stored} of data sets, {records.size(public + made)} of weights, heads and checkpoints.")
    parts.append("Missing:\n" + "\n".join(f"- {m}" for m in missing) if missing else "Nothing is missing.")
    return "\n\n".join(parts)


def _columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    if seconds < 6000:
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _rows_text(settings: Settings, work: list[tuple[Job, Price]]) -> str:
    """The rows of the tables with their attacks, images and FLOPs, and DeACL."""
    rows = [["task", "data set", "encoder", "defense", "attacks", "images", "px", "PFLOP"]]
    mine: dict[tuple[str, ...], list[tuple[Job, Price]]] = {}
    for job, cost in work:
        place = tuple(job.get(name, "") for name in ("task", "dataset", "encoder", "defense"))
        mine.setdefault(place, []).append((job, cost))
    for place, row in mine.items():
        jobs, cost = [job for job, _ in row], _number(flops([each for _, each in row]) / 1e15)
        if jobs[0]["step"] == "deacl":
            images = str(counts("deacl", settings.deacl.dataset, settings)[0])
            rows.append(["DeACL", settings.deacl.dataset, place[2], "", "", images, "", cost])
        elif jobs[0]["step"] == "head":
            here, kinds = place_of(jobs[0], settings), dict.fromkeys(job["kind"] for job in jobs if "kind" in job)
            height, width = here.size("test")
            rows.append([*place, " ".join(kinds), str(here.counts[2]), f"{width}x{height}", cost])
    return _columns(rows)


def _stage_text(settings: Settings, work: list[tuple[Job, Price]]) -> str:
    """Expected time of each stage here and on some GPUs, and the measured one if the stage has been run."""
    from . import stages  # here, as it stands above this module

    rates = {"here": here(settings), **{f"{gpu} (assumed)": assumed(gpu) for gpu in ASSUMED}}
    rows = [["stage", "PFLOP", *rates, "measured here"]]
    for stage in (*STAGES, "total"):
        mine = [cost for job, cost in work if stage in (stages.stage_of(job), "total")]
        fixed = notebooks([*STAGES] if stage == "total" else [stage], settings)
        times = [duration(seconds(mine, rate) + fixed) for rate in rates.values()]
        path = records.runs_dir(settings.profile) / f"{stage}.time.json"
        measured = duration(records.read_json(path)["seconds"]) if path.is_file() else ""
        rows.append([stage, _number(flops(mine) / 1e15), *times, measured])
    return _columns(rows)


# --- disk ---


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _written(job: Job, settings: Settings) -> float:
    """Bytes that a job leaves in runs/, and of DeACL's state while a new one is written beside the old one."""
    if job["step"] == "deacl":
        return (len(deacl.kept(settings.deacl)) + 4) * bytes_of(meta(_row(job, settings)))
    if job["step"] != "head":
        return 0.0
    place = place_of(job, settings)
    with torch.device("meta"):
        return bytes_of(heads.HEADS[place.task](place.encoder.dim, place.classes))


def _disk_problems(settings: Settings) -> list[str]:
    """What does not fit on the disk, of that which is still to be written: what is there already needs no more room."""
    free = shutil.disk_usage(records.ROOT).free
    with suppress(BadInput):  # an unknown encoder, which encoders.check has named
        need = sum(_written(job, settings) for job in jobs_of(settings))
        if need > free and (found := looked_for(settings)) is not None:
            need = sum(_written(w.job, settings) for w in found if not w.there)
        if need > free:
            return [f"The disk of {records.ROOT} has {records.size(free)} free but weights and checkpoints still need "
                    f"about {records.size(need)}; free some space."]  # fmt: skip
    return []


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
    warn += [cramped] if (cramped := datasets.cramped()) else []
    tasks = [task for task in TASKS if getattr(settings, task)]
    for look in (
        *(partial(attacks.kinds, task, settings) for task in tasks),
        partial(records.pick_device, settings.device),
    ):
        try:
            look()
        except BadInput as problem:
            stop.append(str(problem))
    return [*dict.fromkeys(stop), *_disk_problems(settings)], warn


def looked_for(settings: Settings) -> list[Wanted] | None:
    """All results; None if none can be there, as nothing was computed yet, or weights would be fetched to know that."""
    places = (records.runs_dir(settings.profile) / folder for folder in ("heads", "deacl", "cells"))
    local = all(cached(encoders.describe(row).timm) for row in fetched(settings))
    return wanted.results(settings)[0] if local and any(place.is_dir() for place in places) else None


def fetched(settings: Settings) -> list[EncoderRow]:
    """The rows whose weights timm fetches from its hub."""
    found = []
    for row in settings.encoders:
        with suppress(BadInput):  # encoders.check says it
            if row.needs_standard and not row.call and not row.checkpoint:
                known = encoders.describe(row)
                found += [row] if known.timm and known.public else []
    return found


def missing_weights(settings: Settings) -> list[str]:
    """One sentence for each encoder whose weights are neither in the local cache nor to be had from the hub."""
    absent = {row.name: encoders.describe(row).timm for row in fetched(settings)}
    absent = {name: model for name, model in absent.items() if not cached(model)}
    if not absent or hub_answers():
        return []
    return [
        f"Encoder '{name}': the weights of {model} are not in the local cache and the hub does not answer; download "
        "them elsewhere and give the file as checkpoint."
        for name, model in absent.items()
    ]


def cached(model: str) -> bool:
    """Whether the weights of a timm model lie in the local cache of its hub."""
    cfg = timm.get_pretrained_cfg(model)
    if not cfg.hf_hub_id:
        return (Path(torch.hub.get_dir()) / "checkpoints" / str(cfg.url).rpartition("/")[2]).is_file()
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    return any(isinstance(huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files)


def hub_answers() -> bool:
    try:
        huggingface_hub.model_info("timm/vit_base_patch16_224.dino", timeout=PATIENCE)
    except Exception:  # whatever its client raises for a network that is not there, or does not answer in time
        return False
    return True
