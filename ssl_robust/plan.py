"""What a profile will do before it does it: rows, FLOPs, minutes, memory, disk, and everything that is missing."""

import math
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache

from . import attacks, catalogue, cost, datasets, encoders, heads, records, released
from .cost import Cost, Device, Step, attack_step, encoder_of, image_size, reading, traced
from .evaluate import KINDS
from .settings import TASKS, BadInput, EncoderRow, Settings, TaskSettings

STAGES = ("00_data", "01_heads", "02_deacl", "03_attack_classification", "04_attack_segmentation",
          "05_attack_depth", "06_figures")  # fmt: skip
STAGE = dict(zip(TASKS, STAGES[3:6], strict=True))  # the notebook that attacks each task
EXAMPLES = 4  # images of Figure 1, attacked once more
START, DRAW = 9.0, 11.0  # seconds of a notebook for imports and pictures; more of them in 06_figures
CELL = 0.1  # seconds of a table cell for its metric and its record
SCENES_PER_SECOND = 30.0  # rendered on two CPU cores
MEMORY, CONTEXT = 1.3, 1e9  # assumed: what is not counted, as a factor, and bytes of the CUDA context
PATIENCE = 3.0  # seconds for the hub to answer
UNKNOWN = 10**9  # images of a data set that is not there yet: more than any profile asks for


class Work(NamedTuple):
    """One line of the plan."""

    stage: str
    task: str  # one of TASKS, 'deacl', or '' for what belongs to no task
    dataset: str
    encoder: str
    defense: str
    what: str  # clean, embed, task: a table cell; tokens, head, deacl, read, notebook
    images: int
    steps: int = 0
    flops: float = 0.0
    written: float = 0.0  # bytes
    launches: float = 0.0
    fixed: float = 0.0  # seconds that no device shortens: reading, rendering, imports


def seconds(work: list[Work], device: Device) -> float:
    """Expected seconds of these lines on `device`."""
    return sum(cost.seconds(w.flops, w.written, w.launches, device) + w.fixed for w in work)


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
        return official[0]
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
    lines += [Work(stage, "", "", "", "", "notebook", 0, fixed=START) for stage in STAGES]
    return [*lines, Work("06_figures", "", "", "", "", "notebook", 0, fixed=DRAW)]


def _times(made: Cost, passes: float, calls: float, **fixed: float) -> dict[str, float]:
    """Totals of `passes` images in `calls` batches."""
    return {"flops": made.flops * passes, "written": made.written * passes, "launches": made.launches * calls, **fixed}


def _sum(*totals: dict[str, float]) -> dict[str, float]:
    return {key: sum(total[key] for total in totals) for key in totals[0]}


def _data(settings: Settings) -> Iterator[Work]:
    """00_data reads every image once; the scenes are rendered."""
    used = datasets.wanted(settings)
    rendered = [counts(task, name, settings) for task, name in used if name == "scenes"]
    for task, name in used:
        n = sum(counts(task, name, settings))
        if name != "scenes":
            yield Work("00_data", task, name, "", "", "read", n, fixed=n * reading(name, (0, 0)))
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
    return train * (section.views if keep_train else section.epochs) + val * (1 if keep_val else section.epochs)


def _heads(stage: str, task: str, name: str, row: EncoderRow, settings: Settings, defense: str) -> Iterator[Work]:
    """Tokens of the training images and the held-out ones, and the head's epochs on them."""
    section, encoder = section_of(task, row, settings), encoder_of(row)
    train, val, _ = counts(task, name, settings)
    size = image_size(task, "train", name, section.size, encoder.native)
    n, about = encodings(task, row, size, train, val, settings), (stage, task, name, row.name, defense)
    once = traced(encoder, "embed", size).forward
    step = cost.head_step(encoder, task, size, cost.shape(name).classes)
    read = n * reading(name, size)
    yield Work(*about, "tokens", n, **_times(once, n, n / section.attack_batch, fixed=read))
    trained = _times(step.whole, section.epochs * train, section.epochs * train / section.batch)
    judged = _times(step.forward, section.epochs * val, section.epochs * val / 64)
    yield Work(*about, "head", train, section.epochs, **_sum(trained, judged))


def _table(task: str, settings: Settings) -> Iterator[Work]:
    """All cells of one task, the heads of the DeACL variants, and the examples of Figure 1."""
    section, stage = settings.task(task), STAGE[task]
    for name in section.datasets:
        first = name == section.datasets[0]
        for row in settings.encoders:
            for defense in variants(row, settings, first):
                if defense != "standard":
                    yield from _heads(stage, task, name, row, settings, defense)
                yield from (cell(task, name, row, defense, kind, settings) for kind in KINDS)
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


def cell(task: str, name: str, row: EncoderRow, defense: str, kind: str, settings: Settings, n: int = 0) -> Work:
    """One table cell: 'clean', 'embed' or 'task' on `n` images (default: all test images that are used)."""
    section = section_of(task, row, settings)
    n = min(n or math.inf, counts(task, name, settings)[2])
    calls, steps = math.ceil(n / section.attack_batch), 0 if kind == "clean" else settings.attack.steps
    parts = [_times(_step(task, name, row, "task", settings).forward, n, calls)]
    if steps:
        step = _step(task, name, row, kind, settings)
        looks = (kind == "embed") + steps * settings.attack.best  # the clean embedding; with best each loss once more
        parts += [_times(step.whole, n * steps, calls * steps), _times(step.forward, n * looks, calls * looks)]
    # read once more in three cells, for the value of a constant prediction
    read = 4 / 3 * n * reading(name, _test_size(task, name, row, settings))
    about = (STAGE[task], task, name, row.name, defense, kind)
    return Work(*about, n, steps, **_sum(*parts), fixed=read + CELL)


def _deacl(row: EncoderRow, settings: Settings) -> Iterator[Work]:
    """Fine-tuning: the teacher once, the attack's steps, eq. 2's own step; held-out images attacked every epoch."""
    if not tuned(row, settings):
        return
    cfg, encoder = settings.deacl, encoder_of(row)
    size = (encoder.native, encoder.native)
    train, val, _ = counts("deacl", cfg.dataset, settings)
    attack, own = traced(encoder, "embed", size), traced(encoder, "train", size)
    seen, watched = cfg.epochs * train, (cfg.epochs + 1) * val
    looks, attacked = seen + 2 * watched, cfg.steps * (seen + watched)
    total = _sum(
        _times(attack.forward, looks, looks / cfg.batch),
        _times(attack.whole, attacked, attacked / cfg.batch),
        _times(own.whole, seen, seen / cfg.batch),
    )
    read = (seen + watched) * reading(cfg.dataset, size)
    yield Work("02_deacl", "deacl", cfg.dataset, row.name, "deacl", "deacl", train, cfg.steps, **total, fixed=read)


# --- memory and disk ---


def memory(settings: Settings) -> tuple[float, str]:
    """Expected GPU memory in bytes, and the step that takes most, in words."""
    bytes_, words = max(_peaks(settings), default=(0.0, "nothing"))
    return CONTEXT + MEMORY * bytes_, words


def _peaks(settings: Settings) -> Iterator[tuple[float, str]]:
    """What each kind of step keeps for its gradient, with weights: (bytes, words)."""
    cfg = settings.deacl
    for row in settings.encoders:
        encoder, weights = encoder_of(row), cost.weight_bytes(encoder_of(row))
        for task, name in ((t, name) for t, name in datasets.wanted(settings) if t != "deacl" and settings.attack):
            section = section_of(task, row, settings)
            batch = min(section.attack_batch, counts(task, name, settings)[2])
            words = f"{task}.attack_batch {section.attack_batch} ({name}, {row.name})"
            yield weights + batch * _step(task, name, row, "task", settings).whole.kept, words
        if tuned(row, settings):
            own = traced(encoder, "train", (encoder.native, encoder.native)).whole
            yield 5 * weights + cfg.batch * own.kept, f"deacl.batch {cfg.batch} ({row.name})"


def disk(settings: Settings) -> tuple[float, float]:
    """Bytes of the data sets with the archives they come in, and of public weights, heads and DeACL checkpoints."""
    used = {name: catalogue.DATASETS.get(name) for _, name in datasets.wanted(settings)}
    data = sum(d.gigabytes * 1e9 + sum(a.size for a in d.archives if not a.as_it_is) for d in used.values() if d)
    weights = sum(cost.weight_bytes(encoder_of(row)) for row in fetched(settings))
    return data, weights + sum(_run_bytes(row, settings) for row in settings.encoders)


def _run_bytes(row: EncoderRow, settings: Settings) -> float:
    """What runs/<profile> will hold of one encoder: heads; DeACL checkpoints, and the state with its momentum."""
    encoder, used = encoder_of(row), [w for w in datasets.wanted(settings) if w[0] != "deacl"]
    heads_ = sum(
        cost.head_bytes(encoder, task, cost.shape(name).classes)
        * len(variants(row, settings, name == settings.task(task).datasets[0]))
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
    parts.append("Missing:\n" + "\n".join(f"- {m}" for m in missing) if missing else "Nothing is missing.")
    return "\n\n".join(part for part in parts if part)


RATES = (
    f"Minutes on CPUs: a short measurement here times constants fitted to measured runs. Minutes on GPUs: data-sheet\n"
    f"fp32 rates times an assumed efficiency of {cost.GPU_FLOPS}, not measured; so is GPU memory."
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
    title = f"Table {number}, {task}: clean, EmbedAttack, {attacks.NAMES[task]}"
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
    others = [cost.gpu(name) for name in cost.REFERENCE]
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
        devices = ((name, cost.gpu(name)) for name in cost.REFERENCE)
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

    Missing data sets and weights stop it unless the profile says missing: skip; too little GPU memory never does, as
    its need is only an estimate.
    """
    absent = [*datasets.check(settings), *encoders.check(settings), *missing_weights(settings)]
    stop, warn = ([], absent) if settings.missing == "skip" else (absent, [])
    return stop + _device_problems(settings) + _disk_problems(settings), warn + _memory_warnings(settings)


def _device_problems(settings: Settings) -> list[str]:
    try:
        records.pick_device(settings.device)
    except BadInput as problem:
        return [str(problem)]
    return []


def _disk_problems(settings: Settings) -> list[str]:
    try:
        need, free = disk(settings)[1], shutil.disk_usage(records.ROOT).free
    except BadInput:  # an unknown encoder, which encoders.check has named
        return []
    if need <= free:
        return []
    return [f"The disk of {records.ROOT} has {free / 1e9:.1f} GB free but weights and checkpoints need about "
            f"{need / 1e9:.1f} GB; free some space."]  # fmt: skip


def _memory_warnings(settings: Settings) -> list[str]:
    """Only where there is a GPU: counting takes seconds that a run on the CPU need not wait for."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        return []
    try:
        need, most = memory(settings)
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
