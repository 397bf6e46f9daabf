"""What a profile will do before it does it: rows, FLOPs, minutes, memory, disk, what is missing; and on many GPUs."""

import math
import shutil
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache

from .. import catalogue, compute, datasets, encoders, heads, records, strong
from ..evaluate import EXAMPLES, KINDS
from ..protocols import released
from ..settings import BadInput, EncoderRow, Settings, TaskSettings
from ..tasks import TASKS
from . import cost
from .cost import Cost, Device, Step, attack_step, encoder_of, image_size, reading, traced

if TYPE_CHECKING:
    from . import wanted

STAGES = ("00_data", "01_heads", "02_deacl", "03_attack_classification", "04_attack_segmentation",
          "05_attack_depth", "06_figures", "07_sanity")  # fmt: skip
START, DRAW = 9.0, 11.0  # seconds of a notebook for imports and pictures; more of them in 06_figures
CELL = 0.1  # seconds of a table cell for its metric and its record
SCENES_PER_SECOND = 30.0  # rendered on two CPU cores
MEMORY, CONTEXT = 1.3, 1e9  # assumed: what is not counted, as a factor, and bytes of the CUDA context
PATIENCE = 3.0  # seconds for the hub to answer
LOOKS = 4  # predictions of each image in 07_sanity besides the attacks: noise, signs, transfer, clean
STANDING = 0.1  # assumed share of images that APGD on cross-entropy leaves to the other parts of AutoAttack
GPU_COUNTS = (1, 8, 64)
SHARE = 8  # images of a batch of DeACL that a GPU gets at least
ASSUMED_SHARING = 0.9  # assumed efficiency of several GPUs that share a batch
UNKNOWN = 10**9  # images of a data set that is not there yet: more than any profile asks for


class Work(NamedTuple):
    """One line of the plan."""

    stage: str
    task: str  # one of TASKS, 'deacl', or '' for what belongs to no task
    dataset: str
    encoder: str
    defense: str
    what: str  # clean, embed, task, strong: a table cell; tokens, head, deacl, read, sanity, notebook
    images: int
    steps: int = 0
    flops: float = 0.0
    written: float = 0.0  # bytes
    launches: float = 0.0
    low_flops: float = 0.0  # of these FLOPs and bytes: those of attack steps, which may be in bf16
    low_written: float = 0.0
    read: float = 0.0  # seconds of one CPU core to read images
    fixed: float = 0.0  # seconds that no device shortens: rendering, imports, pictures


def seconds(work: list[Work], device: Device) -> float:
    """Expected seconds of these lines on `device`."""
    return sum(_computing(w, device) + cost.seconds(0, 0, w.launches, device) + w.fixed for w in work)


def _computing(w: Work, device: Device) -> float:
    """Seconds of FLOPs, bytes and reading: what more devices would share. Other processes read while it computes."""
    steps = cost.seconds(w.low_flops, w.low_written, 0, cost.in_steps(device))
    computing = steps + cost.seconds(w.flops - w.low_flops, w.written - w.low_written, 0, device)
    return max(computing, w.read / device.readers) if device.readers > 1 else computing + w.read


def counts(task: str, name: str, settings: Settings) -> tuple[int, int, int]:
    """Images used for training, held out, and for the test: n_train, n_val, n_test, or what the data set has."""
    section = settings.deacl if task == "deacl" else settings.task(task)
    wanted = section.n_train, section.n_val, getattr(section, "n_test", 0)
    if name == "scenes":
        return wanted
    has = [_there(name, task, split, settings) for split in ("train", "test")]
    val = min(wanted[1], has[0])
    return min(wanted[0], has[0] - val), val, min(wanted[2], has[1])


@cache
def _listed(name: str, task: str, split: str, root: str) -> int:
    try:
        return len(datasets.list_items(name, task, split, 1, root))
    except BadInput:
        return UNKNOWN


def _there(name: str, task: str, split: str, settings: Settings) -> int:
    """Images of a split: the official number, or where parts are accepted and for folders of one's own, the listed."""
    official = catalogue.DATASETS[name].counts.get(split) if name in catalogue.DATASETS else None
    if official and settings.counts == "official":
        listed = _listed(name, task, split, settings.data_root) if len(official) > 1 else UNKNOWN
        enough = [n for n in official if n >= datasets.asked(task, name, settings)]
        return listed if listed in official else min(enough, default=max(official))  # which make data brings
    if task == "deacl" and split == "test":
        return 0
    return min(_listed(name, task, split, settings.data_root), max(official or (UNKNOWN,)))


# --- the work of a profile ---


def all_work(settings: Settings) -> list[Work]:
    """Every line of the plan, in the order of the stages."""
    lines, used = [*_data(settings)], [(t, name) for t, name in datasets.wanted(settings) if t != "deacl"]
    tasks = list(dict.fromkeys(task for task, _ in used))
    for row in settings.encoders:
        lines += [w for task, name in used for w in _heads("01_heads", task, name, row, settings, "standard")]
    lines += [w for row in settings.encoders for w in _deacl(row, settings)]
    if settings.attack:
        lines += [w for task in tasks for w in _table(task, settings)]
    lines = [_with_seeds(w, settings) for w in lines]
    if settings.attack and settings.sanity:
        lines += [w for task, name in used for row in settings.encoders for w in _sanity(task, name, row, settings)]
    stages = STAGES if settings.sanity else STAGES[:-1]
    lines += [Work(stage, "", "", "", "", "notebook", 0, fixed=START) for stage in stages]
    return [*lines, Work("06_figures", "", "", "", "", "notebook", 0, fixed=DRAW)]


def remaining(settings: Settings, jobs: list[dict[str, Any]], stages: list[str]) -> float:
    """Expected seconds on this machine for these jobs (wanted.Job) and for running the notebooks of these stages."""
    device, times, seeds = cost.this_device(settings), Counter(map(_line_of, jobs)), 1 + len(settings.more_seeds)
    total = 0.0
    for w in all_work(settings):
        what = {"tokens": "head", "Figure 1": "examples"}.get(w.defense if w.defense == "Figure 1" else w.what, w.what)
        place = {"deacl": (w.encoder,), "examples": (w.task,)}.get(what, w[1:5])
        many = {"deacl": 1, "sanity": 1, "examples": seeds, "strong": seeds * len(strong.NAMES.get(w.task, ""))}
        share = w.stage in stages if what in ("notebook", "read") else times[what, *place] / many.get(what, seeds)
        total += share * seconds([w], device)
    return total


def _line_of(job: dict[str, Any]) -> tuple[str, ...]:
    """The lines of the plan that a job is one of."""
    what = {"cell": job.get("kind"), "checks": "sanity"}.get(job["step"], job["step"])
    if what in ("deacl", "examples"):
        return what, job["encoder" if what == "deacl" else "task"]
    what = what if what in (*KINDS, "head", "sanity") else "strong"
    return what, *(job[name] for name in ("task", "dataset", "encoder", "defense"))


def _with_seeds(w: Work, settings: Settings) -> Work:
    """Heads and attacks are repeated with each further seed; data and DeACL are not."""
    times = 1 if w.task in ("", "deacl") or w.what == "read" else 1 + len(settings.seeds)
    return w._replace(**{name: times * getattr(w, name) for name in w._fields[w._fields.index("flops") :]})


def _times(made: Cost, passes: float, calls: float, low: bool = False, **more: float) -> dict[str, float]:
    """Totals of `passes` images in `calls` batches; `low`: of attack steps."""
    flops, written = made.flops * passes, made.written * passes
    totals = {"flops": flops, "written": written, "launches": made.launches * calls}
    return totals | {"low_flops": low * flops, "low_written": low * written} | more


def at_once(task: str, name: str, part: str, row: EncoderRow, settings: Settings) -> int:
    """Images of `part` 'train' or 'test' that are encoded or attacked at a time."""
    section, encoder = section_of(task, row, settings), encoder_of(row)
    size, count = image_size(task, part, name, section.size, encoder.native), 1
    if task == "segmentation" and part == "test":
        count = cost.windows(size, encoder.native, section.stride)
        size = tuple(min(side, encoder.native) for side in size)
    tokens = compute.tokens_of(encoder.patch, size, count)
    return compute.batch_for(tokens, cost.kind(settings), section.attack_batch)


def _sum(*totals: dict[str, float]) -> dict[str, float]:
    return {key: sum(total[key] for total in totals) for key in totals[0]}


def _data(settings: Settings) -> Iterator[Work]:
    """00_data reads every image once; the scenes are rendered."""
    used = datasets.wanted(settings)
    rendered = [counts(task, name, settings) for task, name in used if name == "scenes"]
    for task, name in used:
        n = sum(counts(task, name, settings))
        if name != "scenes":
            yield Work("00_data", task, name, "", "", "read", n, fixed=n * reading(name, (0, 0)))  # in one process
    if rendered:
        n = sum(map(max, zip(*rendered, strict=True)))  # the tasks share the scenes of a split
        yield Work("00_data", "", "scenes", "", "", "read", n, fixed=n / SCENES_PER_SECOND)


def tuned(row: EncoderRow, settings: Settings) -> bool:
    """Whether DeACL is run for this row here."""
    return row.tuned and settings.deacl is not None


def variants(row: EncoderRow, settings: Settings, first: bool) -> list[str]:
    """Defenses of a row in the tables; on the `first` data set also the DeACL epochs of Figure 2."""
    if not tuned(row, settings):
        return list(row.defenses)
    between = set(settings.deacl.checkpoints) - {settings.deacl.epochs} if first else ()
    standard = ["standard"] if "standard" in row.defenses else []
    return [*standard, *(f"deacl-epoch{n}" for n in sorted(between)), "deacl"]


def section_of(task: str, row: EncoderRow, settings: Settings) -> TaskSettings:
    """The settings of a task as the protocol has them for this encoder."""
    return released.adjusted(settings, encoder_of(row).native).task(task)


def encodings(task: str, row: EncoderRow, size: tuple[int, int], train: int, val: int, settings: Settings) -> int:
    """Images that are encoded to train one head: once a copy if the tokens fit in memory, else in every epoch."""
    section, encoder = section_of(task, row, settings), encoder_of(row)
    tokens = 1 + (task != "classification") * math.prod(cost.grid(encoder, size))
    pixels = 0 if task == "classification" else math.prod(size)
    each = 4 * encoder.dim * tokens + pixels * (4 if task == "depth" else 1)
    keep_train, keep_val = heads.kept(train * each, val * each, section)
    return train * (heads.copies(section) if keep_train else section.epochs) + val * (1 if keep_val else section.epochs)


def _heads(stage: str, task: str, name: str, row: EncoderRow, settings: Settings, defense: str) -> Iterator[Work]:
    """Tokens of the training images and the held-out ones, and the head's epochs on them."""
    section, encoder = section_of(task, row, settings), encoder_of(row)
    train, val, _ = counts(task, name, settings)
    size = image_size(task, "train", name, section.size, encoder.native)
    n, about = encodings(task, row, size, train, val, settings), (stage, task, name, row.name, defense)
    once = traced(encoder, "cls" if task == "classification" else "embed", size).forward
    step = cost.head_step(encoder, task, size, cost.shape(name).classes)
    calls = n / at_once(task, name, "train", row, settings)
    yield Work(*about, "tokens", n, **_times(once, n, calls, read=n * reading(name, size)))
    trained = _times(step.whole, section.epochs * train, section.epochs * train / section.batch)
    judged = _times(step.forward, section.epochs * val, section.epochs * val / 64)
    yield Work(*about, "head", train, section.epochs, **_sum(trained, judged))


def _table(task: str, settings: Settings) -> Iterator[Work]:
    """All cells of one task, the heads of the DeACL variants, and the examples of Figure 1."""
    section, stage = settings.task(task), TASKS[task].notebook
    for name in section.datasets:
        first = name == section.datasets[0]
        for row in settings.encoders:
            for defense in variants(row, settings, first):
                if defense != "standard":
                    yield from _heads(stage, task, name, row, settings, defense)
                yield from (cell(task, name, row, defense, kind, settings) for kind in KINDS)
                if settings.strong:
                    yield _strong(task, name, row, defense, settings)
    row, name = settings.encoders[0], section.datasets[0]
    yield from (cell(task, name, row, "Figure 1", kind, settings, EXAMPLES) for kind in KINDS)


def _test_size(task: str, name: str, row: EncoderRow, settings: Settings) -> tuple[int, int]:
    """(H, W) of the test images of a table row."""
    return image_size(task, "test", name, section_of(task, row, settings).size, encoder_of(row).native)


def _stride(task: str, row: EncoderRow, settings: Settings) -> float:
    """Stride of the sliding window as a fraction of it; 1 where there is none."""
    return getattr(section_of(task, row, settings), "stride", 1.0)


def _step(task: str, name: str, row: EncoderRow, kind: str, settings: Settings) -> Step:
    """One image of a table row in one attack step."""
    size, stride = _test_size(task, name, row, settings), _stride(task, row, settings)
    return attack_step(encoder_of(row), task, kind, size, cost.shape(name).classes, stride)


def steps_taken(task: str, kind: str, defense: str, settings: Settings) -> float:
    """Attack steps of an image: all, or on average those until its class is surely lost."""
    early = (task, kind) == ("classification", "task") and settings.attack.stop_when_broken
    share = cost.STEPS_TAKEN["deacl" if defense.startswith("deacl") else "standard"]
    return settings.attack.steps * (share if early and not released.active(settings) else 1.0)


def cell(task: str, name: str, row: EncoderRow, defense: str, kind: str, settings: Settings, n: int = 0) -> Work:
    """One table cell: 'clean', 'embed' or 'task' on `n` images (default: all test images that are used)."""
    n = min(n or math.inf, counts(task, name, settings)[2])
    calls, steps = math.ceil(n / at_once(task, name, "test", row, settings)), 0
    parts = [_times(_step(task, name, row, "task", settings).forward, n, calls)]
    if kind != "clean":
        steps, taken = settings.attack.steps, steps_taken(task, kind, defense, settings)
        step = _step(task, name, row, kind, settings)
        # the clean embedding; the loss of the returned image; with best the loss of each step once more
        looks = (kind == "embed") + 1 + taken * settings.attack.best
        parts += [_times(step.whole, n * taken, calls * steps, low=True)]
        parts += [_times(step.forward, n * looks, calls * looks, low=True)]
    # read once more in three cells, for the value of a constant prediction
    read = 4 / 3 * n * reading(name, _test_size(task, name, row, settings))
    about = (TASKS[task].notebook, task, name, row.name, defense, kind)
    return Work(*about, n, steps, **_sum(*parts), read=read, fixed=CELL)


def _strong(task: str, name: str, row: EncoderRow, defense: str, settings: Settings) -> Work:
    """All strong attacks on one row, roughly; AutoAttack's later parts meet only the images that its first one left."""
    n, steps = counts(task, name, settings)[2], strong.STEPS * settings.attack.steps
    step, losses = _step(task, name, row, "task", settings), _losses(task)
    parts = [_times(step.whole, n * steps * losses, 0, low=task != "classification")]
    if task == "classification":
        targets = min(strong.TARGETS, cost.shape(name).classes - 1)
        parts += [_times(step.whole, STANDING * n * 2 * targets * steps, 0)]  # APGD and FAB towards each of them
        parts += [_times(step.forward, STANDING * n * strong.QUERIES * steps, 0)]
    about = (TASKS[task].notebook, task, name, row.name, defense, "strong")
    kinds = len(strong.NAMES[task])
    return Work(*about, n, steps, **_sum(*parts), fixed=kinds * CELL)


def _losses(task: str) -> int:
    """Runs of the steps of strong attacks: one for each loss of each attack."""
    return sum(len(strong.LOSSES.get(name, (name,))) for name in strong.NAMES[task])


def _sanity(task: str, name: str, row: EncoderRow, settings: Settings) -> Iterator[Work]:
    """07_sanity on one data set, Standard and DeACL of one row: the task attack again and again on a few images."""
    cfg, n = settings.sanity, min(settings.sanity.n, counts(task, name, settings)[2])
    rounds = cfg.rounds(settings.attack)
    calls = math.ceil(n / at_once(task, name, "test", row, settings))
    step, steps = _step(task, name, row, "task", settings), rounds * settings.attack.steps
    looks = rounds + LOOKS
    for defense in row.defenses:
        taken = rounds * steps_taken(task, "task", defense, settings)
        attack = _times(step.whole, n * taken, calls * steps, low=True)
        total = _sum(attack, _times(step.forward, n * looks, calls * looks))
        about = ("07_sanity", task, name, row.name, defense, "sanity")
        yield Work(*about, n, steps, **total, fixed=rounds * CELL)


def _deacl(row: EncoderRow, settings: Settings) -> Iterator[Work]:
    """Fine-tuning: the teacher once, the attack's steps, eq. 2's own step; held-out images attacked every epoch."""
    if not tuned(row, settings):
        return
    cfg, encoder = settings.deacl, encoder_of(row)
    size = (encoder.native, encoder.native)
    train, val, _ = counts("deacl", cfg.dataset, settings)
    attack, own = traced(encoder, "cls", size), traced(encoder, "train", size)
    seen, watched = cfg.epochs * train, (cfg.epochs + 1) * val
    looks, attacked = seen + 2 * watched, cfg.steps * (seen + watched)
    total = _sum(
        _times(attack.forward, looks, looks / cfg.batch, low=True),
        _times(attack.whole, attacked, attacked / cfg.batch, low=True),
        _times(own.whole, seen, seen / cfg.batch, low=True),
    )
    read = (seen + watched) * reading(cfg.dataset, size)
    yield Work("02_deacl", "deacl", cfg.dataset, row.name, "deacl", "deacl", train, cfg.steps, **total, read=read)


# --- many GPUs ---


def scaling(settings: Settings, gpus: tuple[int, ...] = GPU_COUNTS) -> list[dict[str, float]]:
    """Time and price on so many GPUs (cost.RENTED), from the cost model: one row for each number.

    gpus; hours; dollars, all GPUs being rented to the end; busy, the share of them that is work; deacl_gpus, those that
    share each batch of DeACL. The jobs, one for each DeACL row, head and cell, wait only for each other in that order,
    so the time is the larger of all work over the GPUs and of the longest chain.
    """
    device, jobs, chains = _jobs(settings)
    found = []
    for count in gpus:
        hours, shared = min(
            (_hours(count, n, jobs, chains, device), n) for n in range(1, _sharers(count, settings) + 1)
        )
        busy = _hours(1, 1, jobs, chains, device) / (count * hours)
        price = count * hours * cost.ASSUMED_PRICE[cost.RENTED]
        found.append({"gpus": count, "hours": hours, "dollars": price, "busy": busy, "deacl_gpus": shared})
    return found


def _jobs(settings: Settings) -> tuple[Device, list[Work], list[Work]]:
    """The GPU, all work, and that of one seed: seeds are jobs beside each other and lengthen no chain."""
    one = all_work(settings.model_copy(update={"seeds": []}))
    return cost.gpu(cost.RENTED, precision=settings.precision), all_work(settings), one


def _sharers(gpus: int, settings: Settings) -> int:
    """GPUs at most that share a batch of DeACL."""
    tunes = settings.deacl is not None and any(tuned(row, settings) for row in settings.encoders)
    return max(1, min(gpus, settings.deacl.batch // SHARE)) if tunes else 1


def _on(w: Work, gpus: int, device: Device) -> float:
    """Seconds of one line on so many GPUs if they can share it; each of them launches every operation itself."""
    computing = _computing(w, device)
    shared = computing / (gpus * ASSUMED_SHARING) if w.what == "deacl" and gpus > 1 else computing
    return seconds([w], device) - computing + shared


def _total(shared: int, work: list[Work], device: Device) -> float:
    """GPU-seconds of all work."""
    return sum(_on(w, shared, device) * (shared if w.what == "deacl" else 1) for w in work)


def _hours(gpus: int, shared: int, work: list[Work], one_seed: list[Work], device: Device) -> float:
    """Hours on `gpus` GPUs of which `shared` work on each DeACL job."""
    longest = sum(chain(one_seed, shared, device).values())
    return max(_total(shared, work, device) / gpus, longest) / 3600


def chain(work: list[Work], shared: int, device: Device) -> dict[str, float]:
    """The longest chain of jobs, which no number of GPUs shortens: what it waits for, one after the other, in seconds.

    The data are read before it, and the figures drawn after it.
    """
    tuning = {w.encoder: _on(w, shared, device) for w in work if w.what == "deacl"}
    found = [{}]
    for place in dict.fromkeys(w[1:5] for w in work if w.what in KINDS and "-epoch" not in w.defense):
        mine = [w for w in work if w[1:5] == place]
        cells = [seconds([w], device) for w in mine if w.what in (*KINDS, "strong")]
        checks = sum(seconds([w], device) for w in mine if w.what == "sanity")
        before = tuning.get(place[2], 0.0) if place[3] == "deacl" else 0.0
        head = sum(seconds([w], device) for w in mine if w.what in ("tokens", "head"))
        found.append({f"DeACL of {place[2]}": before, f"the head of {place[0]} on {place[1]}": head,
                      "its longest attack": max(cells), "its checks": checks})  # fmt: skip
    longest = {words: took for words, took in max(found, key=lambda parts: sum(parts.values())).items() if took}
    ends = sum(seconds([w], device) for w in work if w.stage in ("00_data", "06_figures"))
    return longest | {"reading the data once and drawing": ends}


def useful(settings: Settings) -> int:
    """The number of GPUs beyond which the longest chain, made as short as it can be, is all that takes time."""
    (device, work, one_seed), shared = _jobs(settings), _sharers(UNKNOWN, settings)
    longest = sum(chain(one_seed, shared, device).values())
    return max(shared, math.ceil(_total(shared, work, device) / longest))


def scaling_text(settings: Settings) -> str:
    """The rows of `scaling` as a table in Markdown, and where and why it stops scaling."""
    most, shared, (device, _, one_seed) = useful(settings), _sharers(UNKNOWN, settings), _jobs(settings)
    lines = [[f"{cost.RENTED} GPUs", "hours", "US dollars", "share of the GPU time used"], ["---:"] * 4]
    for row in scaling(settings, tuple(sorted({*GPU_COUNTS, most}))):
        numbers = (_number(row["hours"]), _number(row["dollars"]), f"{100 * row['busy']:.0f} %")
        lines.append([str(row["gpus"]), *numbers])
    parts = [f"{words} {duration(took)}" for words, took in chain(one_seed, shared, device).items()]
    by = f" (shared by {shared} GPUs, at least {SHARE} images of a batch each)" if shared > 1 else ""
    return "\n".join([
        *("| " + " | ".join(line) + " |" for line in lines),
        f"\nMore than {most} GPUs bring nothing, as the longest chain of jobs is left{by}:",
        "; ".join(parts) + ".",
        f"Assumed: an efficiency of {ASSUMED_SHARING} where GPUs share a batch, ${cost.ASSUMED_PRICE[cost.RENTED]} for "
        "a GPU-hour,\nall GPUs rented to the end.",
    ])  # fmt: skip


# --- memory and disk ---


def memory(settings: Settings, least: bool = False) -> tuple[float, str]:
    """Expected GPU memory in bytes, and the step that takes most, in words.

    `least`: with images attacked one by one, to which attacks come down by themselves where memory lacks.
    """
    bytes_, words = max(_peaks(settings, least), default=(0.0, "nothing"))
    return CONTEXT + MEMORY * bytes_, words


def _peaks(settings: Settings, least: bool) -> Iterator[tuple[float, str]]:
    """What each kind of step keeps for its gradient, with weights: (bytes, words)."""
    cfg, low = settings.deacl, cost.ASSUMED_HALF if settings.precision != "fp32" else 1.0
    for row in settings.encoders:
        encoder, weights = encoder_of(row), cost.weight_bytes(encoder_of(row))
        for task, name in ((t, name) for t, name in datasets.wanted(settings) if t != "deacl"):
            yield _head_peak(task, name, row, settings)
            if settings.attack:
                batch = 1 if least else at_once(task, name, "test", row, settings)
                batch = min(batch, counts(task, name, settings)[2])
                kept = low * _step(task, name, row, "task", settings).whole.kept
                yield weights + batch * kept, f"{task}.attack_batch {batch} ({name}, {row.name})"
        if tuned(row, settings):
            own = traced(encoder, "train", (encoder.native, encoder.native)).whole
            yield 5 * weights + cfg.batch * low * own.kept, f"deacl.batch {cfg.batch} ({row.name})"


def _head_peak(task: str, name: str, row: EncoderRow, settings: Settings) -> tuple[float, str]:
    """Training a head: the encoder's weights, a batch of tokens and what the head keeps of it."""
    section, encoder = section_of(task, row, settings), encoder_of(row)
    size = image_size(task, "train", name, section.size, encoder.native)
    batch = min(section.batch, counts(task, name, settings)[0])
    tokens = 4 * encoder.dim * (1 + (task != "classification") * math.prod(cost.grid(encoder, size)))
    kept = tokens + cost.head_step(encoder, task, size, cost.shape(name).classes).whole.kept
    return cost.weight_bytes(encoder) + batch * kept, f"{task}.batch {batch} ({name}, {row.name})"


def disk(settings: Settings) -> tuple[float, float]:
    """Bytes of the data sets with the archives they come in, and of public weights, heads and DeACL checkpoints."""
    data = sum(_data_bytes(name, settings) for name in {name for _, name in datasets.wanted(settings)})
    weights = sum(cost.weight_bytes(encoder_of(row)) for row in fetched(settings))
    return data, weights + sum(_run_bytes(row, settings) for row in settings.encoders)


def _data_bytes(name: str, settings: Settings) -> float:
    """Bytes of one data set, unpacked or as its archives are; nothing of a folder of the user's own."""
    files = datasets.archives(name, settings)
    as_it_is = bool(files) and all(a.as_it_is for a in files)
    unpacked = catalogue.DATASETS[name].gigabytes * 1e9 if name in catalogue.DATASETS and not as_it_is else 0.0
    return unpacked + sum(a.size for a in files)


def _run_bytes(row: EncoderRow, settings: Settings) -> float:
    """What runs/<profile> will hold of one encoder: heads; DeACL checkpoints, and the state with its momentum."""
    encoder, used = encoder_of(row), [w for w in datasets.wanted(settings) if w[0] != "deacl"]
    heads_ = sum(
        cost.head_bytes(encoder, task, cost.shape(name).classes)
        * len(variants(row, settings, name == settings.task(task).datasets[0]))
        * (1 + len(settings.seeds))
        for task, name in used
    )
    kept = {*settings.deacl.checkpoints, settings.deacl.epochs} if tuned(row, settings) else ()
    return heads_ + cost.weight_bytes(encoder) * (len(kept) + 2 * bool(kept))


# --- the plan in words ---


def text(settings: Settings, missing: list[str]) -> str:
    """The whole plan in words; `missing`: sentences that say what is wrong or not there."""
    work, here = all_work(settings), cost.this_device(settings)
    parts = [f"Plan of profile {settings.profile}; nothing is run."]
    parts += [
        _table_text(number, task, settings, work) for number, task in enumerate(TASKS, 1) if getattr(settings, task)
    ]
    parts += [_deacl_text(settings, work), _stage_text(settings, work, here), "\n".join(header(settings)), RATES]
    parts.append(f"On many GPUs:\n\n{scaling_text(settings)}")
    parts.append("Missing:\n" + "\n".join(f"- {m}" for m in missing) if missing else "Nothing is missing.")
    return "\n\n".join(part for part in parts if part)


RATES = (
    f"Minutes on CPUs: a short measurement here times constants fitted to measured runs. Minutes on GPUs: data-sheet\n"
    f"rates times an assumed efficiency of {cost.ASSUMED_FP32} in fp32 and {cost.ASSUMED_BF16} in bf16, not measured; "
    f"so is GPU memory. Roughly\nreckoned: strong attacks and 07_sanity."
)


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


def _table_text(number: int, task: str, settings: Settings, work: list[Work]) -> str:
    """The rows of one table: what is attacked how, and FLOPs of an image forward and in an attack step."""
    title = f"Table {number}, {task}: clean, EmbedAttack, {TASKS[task].attack}"
    lines = [["data set", "encoder", "defense", "images", "px", "windows", "steps", "GFLOP forward", "a step", "PFLOP"]]
    for row in settings.encoders:
        for name in settings.task(task).datasets:
            for defense in variants(row, settings, name == settings.task(task).datasets[0]):
                lines.append(_row_text(task, name, row, defense, settings, work))
    return f"{title}\n{_columns(lines)}"


def _row_text(task: str, name: str, row: EncoderRow, defense: str, settings: Settings, work: list[Work]) -> list[str]:
    size, step = _test_size(task, name, row, settings), _step(task, name, row, "task", settings)
    mine = [w for w in work if w[1:5] == (task, name, row.name, defense)]
    native, stride = encoder_of(row).native, _stride(task, row, settings)
    seen = cost.windows(size, native, stride) if task == "segmentation" else 1
    steps = settings.attack.steps if settings.attack else 0
    flops = [step.forward.flops / 1e9, step.whole.flops / 1e9, sum(w.flops for w in mine) / 1e15]
    images = counts(task, name, settings)[2]
    return [name, row.name, defense, str(images), f"{size[1]}x{size[0]}", str(seen), str(steps), *map(_number, flops)]


def _deacl_text(settings: Settings, work: list[Work]) -> str:
    lines = [
        f"DeACL of {w.encoder} on {w.dataset}: {w.images} images, {settings.deacl.epochs} epochs, {w.steps} attack "
        f"steps, {_number(w.flops / 1e15)} PFLOP"
        for w in work
        if w.what == "deacl"
    ]
    given = [f"DeACL of {row.name}: {row.deacl_checkpoint}" for row in settings.encoders if row.deacl_checkpoint]
    return "\n".join([*lines, *given])


def _stage_text(settings: Settings, work: list[Work], here: Device) -> str:
    """Expected time of each stage here and on some GPUs, and the measured one if the stage has been run."""
    others = [cost.gpu(name, precision=settings.precision) for name in cost.REFERENCE]
    rows = [["stage", "PFLOP", here.name, *(d.name for d in others), "measured here"]]
    for stage in (*STAGES, "total"):
        mine = [w for w in work if stage in (w.stage, "total")]
        times = [duration(seconds(mine, device)) for device in (here, *others)]
        rows.append([stage, _number(sum(w.flops for w in mine) / 1e15), *times, _measured(settings.profile, stage)])
    return _columns(rows)


def _measured(profile: str, stage: str) -> str:
    path = records.runs_dir(profile) / f"{stage}.time.json"
    try:
        return duration(records.read_json(path)["seconds"]) if path.is_file() else ""
    except (BadInput, KeyError, TypeError):
        return ""


def _rounded(value: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}" if value < 1e4 else f"{float(f'{value:.2g}'):.0f}"


def header(settings: Settings) -> list[str]:
    """The lines about minutes, memory and disk that head a profile's file."""
    work, (data, runs) = all_work(settings), disk(settings)
    tuning = [w for w in work if w.stage == "02_deacl"]

    def minutes(lines: list[Work]) -> str:
        devices = ((name, cost.gpu(name, precision=settings.precision)) for name in cost.REFERENCE)
        return ", ".join(f"{name} {_rounded(seconds(lines, device) / 60)}" for name, device in devices)

    taken, most = memory(settings)
    return [
        f"Minutes:    {minutes(work)} expected; of these DeACL: {minutes(tuning)}",
        f"GPU memory: {_rounded(taken / 1e9)} GB expected, most for {most}",
        f"Disk:       {_rounded(data / 1e9)} GB of data sets, {_rounded(runs / 1e9)} GB of weights, heads, checkpoints",
    ]


# --- what is missing ---


def problems(settings: Settings) -> tuple[list[str], list[str]]:
    """Everything that is missing, a sentence each: what stops a run, and what is only said before it.

    Missing data sets and weights stop it unless the profile says missing: skip; fewer training images than asked for
    never do, nor too little GPU memory, as its need is only an estimate.
    """
    absent = [*datasets.check(settings), *encoders.check(settings), *missing_weights(settings)]
    stop, warn = ([], absent) if settings.missing == "skip" else (absent, [])
    wrong, remarks = datasets.look(settings)
    stop, warn = stop + [w for w in wrong if w not in absent], warn + remarks + datasets.shortages(settings)
    return stop + _device_problems(settings) + _disk_problems(settings), warn + _memory_warnings(settings)


def _device_problems(settings: Settings) -> list[str]:
    try:
        records.pick_device(settings.device)
    except BadInput as problem:
        return [str(problem)]
    return []


def looked_for(settings: Settings) -> "list[wanted.Wanted] | None":
    """All results; None if none can be there, as nothing was computed yet, or weights would be fetched to know that."""
    from . import wanted  # here, as it looks at every result

    places = (records.runs_dir(settings.profile) / part for part in ("heads", "deacl", "cells"))
    here = all(cached(encoders.describe(row).timm) for row in fetched(settings))
    return wanted.results(settings)[0] if here and any(place.is_dir() for place in places) else None


def _disk_problems(settings: Settings) -> list[str]:
    """What does not fit on the disk, of that which is still to be written: what is there already needs no more room."""
    try:
        free = shutil.disk_usage(records.ROOT).free
        need = disk(settings)[1] + max((_while_tuning(row, settings) for row in settings.encoders), default=0.0)
    except BadInput:  # an unknown encoder, which encoders.check has named
        return []
    if need > free:
        with suppress(BadInput):  # data or weights are not there, which others say
            found = looked_for(settings)
            need = need if found is None else _still_written(settings, [w.job for w in found if not w.there])
    if need <= free:
        return []
    return [f"The disk of {records.ROOT} has {records.size(free)} free but weights and checkpoints still need about "
            f"{records.size(need)}; free some space."]  # fmt: skip


def _while_tuning(row: EncoderRow, settings: Settings) -> float:
    """Bytes of DeACL's state with its momentum: a new one is written whole before it takes the place of the old one."""
    return 2 * cost.weight_bytes(encoder_of(row)) if tuned(row, settings) else 0.0


def _still_written(settings: Settings, jobs: list[dict[str, Any]]) -> float:
    """Bytes of the heads and checkpoints that these jobs (wanted.Job) leave, less what they have left already."""
    rows, total = {row.name: row for row in settings.encoders}, 0.0
    for job in jobs:
        row = rows.get(job.get("encoder"))
        if job["step"] == "head":
            total += cost.head_bytes(encoder_of(row), job["task"], cost.shape(job["dataset"]).classes)
        if job["step"] == "deacl":
            folders = [f for f in (records.runs_dir(settings.profile) / "deacl" / row.name).glob("*") if f.is_dir()]
            begun = [f for f in folders if not (f / "deacl.json").is_file()]
            held = sum(path.stat().st_size for folder in begun for path in folder.iterdir())
            kept = len({*settings.deacl.checkpoints, settings.deacl.epochs}) * cost.weight_bytes(encoder_of(row))
            total += max(0.0, kept + _while_tuning(row, settings) - held) + _while_tuning(row, settings)
    return total


def _memory_warnings(settings: Settings) -> list[str]:
    """Only where there is a GPU: counting takes seconds that a run on the CPU need not wait for."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        return []
    try:
        need, most = memory(settings, least=True)
    except BadInput:
        return []
    device = cost.this_device(settings)
    if need <= device.memory:
        return []
    return [f"About {need / 1e9:.0f} GB of GPU memory are expected but {device.name} has {device.memory / 1e9:.0f} GB; "
            f"lower {most} in params/{settings.profile}.yaml."]  # fmt: skip


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
