"""What an attack step costs on this machine: ours beside other implementations, and each choice of ours by itself.

Whatever is compared runs on the same frozen model, images, start, ball and number of steps, and once in every round; a
ratio is one of two times of the same round, so that other work on the machine spoils both. Strength is always judged in
fp32. Weights do not change the time, so encoders without local weights are drawn at random, and the tables say so.
"""

import ctypes
import gc
import importlib
import io
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pandas as pd
import psutil
import seaborn as sns
import timm.layers
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import attacks, compute, datasets, encoders, heads, layout, records, tiles, vit
from .encoders import Encoder
from .heads import TaskModel
from .progress import track
from .settings import Attack, BadInput, EncoderRow, Settings

Contender = Callable[[TaskModel, Tensor, Tensor | None, Tensor, Attack], Tensor]
Pieces = dict[str, Callable[[], Any]]  # what is timed, by name
Row = dict[str, Any]

CLASSES, HEAD_IMAGES = 10, 16
LEAST = 0.3  # seconds; shorter pieces are repeated until they take that long
SHORT = 2  # steps of a choice's attack: every step costs the same
LOADED = 32  # images that the loading is timed with
EPOCHS = 4  # of head training on cached tokens; the paper's heads train for more, and gain more
ROUNDING = 1e-6  # images that differ by less are equal up to the order of two additions
ATTACK = {"task": "PGD", "embed": "EmbedAttack"}
# What this project set out to reach against torchattacks, and of the matrix product's rate; the notes say what it did.
AIMS = {("cpu", "fp32"): 1.1, ("cpu", "bf16"): 2.2, ("cuda", "fp32"): 6.0}
CEILING_AIM = 0.45
CHOICE_COLUMNS = [
    "encoder", "choice", "option", "against", "unit", "value", "against_value", "ratio", "ratio_sd", "ratio_min",
    "ratio_max", "note",
]  # fmt: skip


class Case(NamedTuple):
    """One frozen encoder with a linear head, and the images that everything is timed on."""

    name: str
    model: TaskModel
    x: Tensor  # (n, 3, size, size) in [0,1]
    label: Tensor  # (n,) the clean prediction, so that accuracy starts at 1
    ids: list[str]
    attack: Attack
    batch: int  # images at a time, for every contender
    seed: int
    precision: str  # what the setting means on this device

    @property
    def size(self) -> int:
        return self.x.shape[-1]

    @property
    def device(self) -> str:
        return self.x.device.type

    @property
    def tokens(self) -> int:
        return compute.tokens_of(self.model.encoder.patch, self.x.shape[-2:])


# --- models and images ---


def case(settings: Settings, name: str) -> Case:
    """The encoder `name` (a row of the settings, a name of encoders.KNOWN or a timm model) ready to be timed.

    Raises BadInput if the settings have no section `bench`, or if there is no such model.
    """
    bench, device = section(settings), records.pick_device(settings.device)
    encoder = _encoder(settings, name).to(device)
    subset = scenes(max(bench.images, HEAD_IMAGES), encoder.native, settings.seed)
    ids, x = subset.ids[: bench.images], _all(subset).to(device)
    model = TaskModel("classification", encoder, _head(encoder, x, settings.seed))
    x = x[: bench.images]
    batch = compute.batch_for(compute.tokens_of(encoder.patch, x.shape[-2:]), device)
    ball = (settings.attack or Attack()).model_copy(update={"steps": bench.steps, "best": False})
    with torch.no_grad():
        label = model(x).argmax(1)
    precision = compute.precision(settings.precision, device)
    return Case(name, model, x, label, ids, ball, min(batch, bench.images), settings.seed, precision)


def section(settings: Settings) -> Any:
    """The settings' section `bench`; BadInput without it."""
    if settings.bench is None:
        raise BadInput("The settings have no section 'bench'; add one (params/bench.yaml shows how).")
    return settings.bench


def _row(settings: Settings, name: str) -> EncoderRow:
    """The settings' row of that name, else one for the model itself; its images have the side of the bench."""
    found = [row for row in settings.encoders if row.name == name]
    row = found[0] if found else EncoderRow(name=re.sub(r"[^A-Za-z0-9_.-]", "_", name), timm=name)
    native = row.native or (math.inf if row.call else encoders.describe(row).native)
    return row.model_copy(update={"native": min(section(settings).size, native)})


def _encoder(settings: Settings, name: str) -> Encoder:
    """The encoder with its own weights if they are local, else drawn from the seed."""
    row = _row(settings, name)
    if row.call or row.checkpoint or not encoders.describe(row).timm:
        return encoders.load(row, settings.data_root)
    encoder = encoders.random_init(row, settings.seed)
    for scale in (m for m in encoder.modules() if isinstance(m, LayerScale)):
        scale.gamma.fill_(1)  # it starts at 1e-5, and then no block would have any effect
    return encoder


@torch.no_grad()
def _head(encoder: Encoder, x: Tensor, seed: int) -> heads.ClassificationHead:
    """A linear head drawn from the seed, whose logits on x have mean 0 and standard deviation 3.

    Features of encoders drawn at random hardly differ between images; so scaled, the classes do.
    """
    head = heads.ClassificationHead(encoder.dim, CLASSES)
    weight = torch.randn(CLASSES, encoder.dim, generator=torch.Generator().manual_seed(seed)).to(x)
    logits = torch.cat([encoder(part)[0] for part in x.split(8)]) @ weight.T  # (n, CLASSES)
    scale = 3 / (logits - logits.mean(0)).std().clamp(min=1e-9)
    head.linear.weight.copy_(weight * scale)
    head.linear.bias.copy_(-logits.mean(0) * scale)
    return head.to(x.device)


def scenes(count: int, side: int, seed: int) -> datasets.Subset:
    """Rendered test images, `side` px."""
    items = datasets.select("scenes", "classification", "test", count, 0, seed, "")
    return datasets.Subset("scenes", "classification", items, datasets.transform("classification", "test", side, side))


def _all(subset: datasets.Subset) -> Tensor:
    return torch.cat([x for _, x, _ in datasets.batches(subset, 64)])


# --- the contenders: (model, x, label or None for EmbedAttack, start, attack) -> x_adv ---


def ours(
    model: TaskModel, x: Tensor, label: Tensor | None, start: Tensor, attack: Attack, precision: str = "fp32"
) -> Tensor:
    """attacks.pgd as the package runs it, all steps for all images."""
    with compute.steps_in(precision, x.device):
        loss = attacks.loss_for("embed" if label is None else "task", model, x, label, attack.steps)
    return attacks.pgd(x, loss, attack, start, precision)


def torchattacks_pgd(model: TaskModel, x: Tensor, label: Tensor, start: Tensor, attack: Attack) -> Tensor:
    """PGD of torchattacks on timm's forward pass, without a random start; it has no loss for EmbedAttack."""
    pgd = _library("torchattacks").PGD
    return pgd(Logits(model), attack.eps, attack.step, attack.steps, random_start=False)(start, label)


def foolbox_pgd(model: TaskModel, x: Tensor, label: Tensor, start: Tensor, attack: Attack) -> Tensor:
    """LinfPGD of foolbox on timm's forward pass, without a random start; it has no loss for EmbedAttack."""
    foolbox = _library("foolbox")
    wrapped = foolbox.PyTorchModel(Logits(model).eval(), bounds=(0, 1), device=x.device)
    pgd = foolbox.attacks.LinfPGD(abs_stepsize=attack.step, steps=attack.steps, random_start=False)
    # `run` is the attack alone; calling it would evaluate the images as well
    return pgd.run(wrapped, start, foolbox.criteria.Misclassification(label), epsilon=attack.eps)


def plain(
    model: TaskModel, x: Tensor, label: Tensor | None, start: Tensor, attack: Attack, trainable: bool = True
) -> Tensor:
    """A loop as in the paper's released code: fp32, loss.backward(), and gradients of the weights, which nobody reads.

    The model is left as it was, its gradients dropped. With `trainable` = False the weights are frozen.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(trainable)
    try:
        return _plain_steps(model, x, label, start, attack)
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _plain_steps(model: TaskModel, x: Tensor, label: Tensor | None, start: Tensor, attack: Attack) -> Tensor:
    logits = Logits(model)
    with torch.no_grad():
        clean = logits.cls(x)
    adv = start.clone()
    for _ in range(attack.steps):
        adv = adv.detach().requires_grad_(True)
        for parameter in model.parameters():
            parameter.grad = None
        if label is None:
            loss = torch.linalg.vector_norm(logits.cls(adv) - clean, dim=1).sum()
        else:
            loss = F.cross_entropy(logits(adv), label)
        loss.backward()
        moved = adv.detach() + attack.step * adv.grad.sign()
        adv = (x + (moved - x).clamp(-attack.eps, attack.eps)).clamp(0, 1)
    return adv


class Logits(nn.Module):
    """The same model by timm's own forward pass, as other implementations would be given it."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def cls(self, x: Tensor) -> Tensor:
        """CLS token (B, D) of images (B, 3, H, W) in [0,1]."""
        encoder = self.model.encoder
        if not vit.plain(encoder.backbone):
            return encoder(x)[0]
        x = F.pad((x - encoder.mean) / encoder.std, encoder.padding(*x.shape[-2:]))
        return encoder.backbone.forward_features(x)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.model.head.linear(self.cls(x))


def _library(name: str) -> ModuleType:
    """A package that only the bench needs; BadInput if it cannot be imported."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox brings GitPython, which else insists on git
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            f"The package {name}, which the bench compares with, is not installed or not whole ({error}); install the "
            f"extra 'dev' (make env)."
        ) from None


def contenders(precision: str) -> dict[str, Contender]:
    """All contenders of PGD by name; `precision`: what `ours` computes its steps in."""
    return {
        "ours": partial(ours, precision=precision),
        "ours fp32": ours,
        "torchattacks": torchattacks_pgd,
        "foolbox": foolbox_pgd,
        "plain loop": plain,
    }


def able(kind: str, precision: str) -> dict[str, Contender]:
    """The contenders that have the loss of the attack `kind`, 'task' or 'embed'."""
    everyone = contenders(precision)
    return everyone if kind == "task" else {n: f for n, f in everyone.items() if n not in ("torchattacks", "foolbox")}


# --- measuring ---


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(piece: Callable[[], Any], device: str, least: float = 0.0) -> float:
    """Seconds of one call of `piece`, the mean over as many calls as take `least` seconds."""
    _synchronise(device)
    start, calls, passed = time.perf_counter(), 0, 0.0
    while passed < least or not calls:
        piece()
        _synchronise(device)
        calls, passed = calls + 1, time.perf_counter() - start
    return passed / calls


def timed(pieces: Pieces, repeats: int, device: str, warm: bool = False) -> pd.DataFrame:
    """Seconds of each piece (columns) in each round (rows); every round begins with another piece.

    A first round is run and dropped unless the pieces are `warm` already.
    """
    names, rounds = list(pieces), []
    for name in () if warm else names:
        seconds(pieces[name], device)
    for r in range(repeats):
        order = names[r % len(names) :] + names[: r % len(names)]
        rounds.append({name: seconds(pieces[name], device, LEAST) for name in order})
    return pd.DataFrame(rounds)[names]


def paired(rates: pd.DataFrame, name: str, against: str) -> Row:
    """Ratio of two columns of rates, round by round: mean, standard deviation, smallest and largest."""
    ratio = rates[name] / rates[against]
    return {"ratio": ratio.mean(), "ratio_sd": ratio.std(), "ratio_min": ratio.min(), "ratio_max": ratio.max()}


def peak_memory(piece: Callable[[], Any], device: str) -> float:
    """MB (10^6 bytes) that `piece` needs at its peak beyond what was held before it.

    On a GPU as its allocator tells, on a CPU resident memory, sampled.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        piece()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the last piece freed must not count as held
    with _Peak() as sampled:
        piece()
    return sampled.bytes / 1e6


class _Peak:
    """Samples the resident memory of this process in a thread; `bytes`: the largest rise."""

    def __enter__(self) -> "_Peak":
        self.process, self.done = psutil.Process(), threading.Event()
        self.before, self.bytes = self.process.memory_info().rss, 0
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.002):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self.process.memory_info().rss - self.before)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
        self._look()


def flops(case: Case, contender: Contender, kind: str) -> float:
    """FLOPs that one step does to one image, counted: forward and backward, whatever the contender computes of it."""
    counts = []
    for steps in (1, 2):  # the difference leaves out what is done once, as the clean embedding
        with _Flops() as count:
            _attack(case, contender, kind, slice(0, 1), steps)
        counts.append(count.total)
    return counts[1] - counts[0]


class _Flops(TorchDispatchMode):
    """Counts FLOPs by torch's formulas; torch's own FlopCounterMode stumbles over autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def products(case: Case, precision: str, times: int = 8) -> tuple[Callable[[], None], float]:
    """The two matrix products of an MLP on all tokens of a batch, `times` over, and their FLOPs: the ceiling."""
    narrow = case.model.encoder.dim
    wide, kind = 4 * narrow, torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = ((case.batch * case.tokens, narrow), (narrow, wide), (wide, narrow))
    a, up, down = (torch.rand(*shape, dtype=kind, device=case.device) for shape in shapes)

    def piece() -> None:
        for _ in range(times):
            (a @ up) @ down

    return piece, times * 4.0 * len(a) * narrow * wide


def _start(case: Case, kind: str) -> Tensor:
    """Where everyone starts: PGD at x, since the libraries take their start for the ball's centre.

    EmbedAttack starts inside the ball: at x its distance is 0 and has no direction.
    """
    return case.x if kind == "task" else attacks.random_start(case.x, case.attack.eps, case.ids, case.seed)


def _attack(
    case: Case, contender: Contender, kind: str, rows: slice = slice(None), steps: int = 0, batch: int = 0
) -> Tensor:
    """The images of `rows` as `contender` leaves them, `batch` (the case's) at a time."""
    attack = case.attack.model_copy(update={"steps": steps or case.attack.steps})
    x, label, start = (part[rows].split(batch or case.batch) for part in (case.x, case.label, _start(case, kind)))
    parts = zip(x, label if kind == "task" else [None] * len(x), start, strict=True)
    return torch.cat([contender(case.model, a, b, c, attack) for a, b, c in parts])


@torch.no_grad()
def strength(case: Case, adv: Tensor, kind: str, reference: Tensor | None = None) -> Row:
    """How far attacked images (n, 3, H, W) got, in fp32: accuracy, the attack's own loss and its standard error.

    With a `reference` also the share of values that are bit-identical to its, that differ by at most ROUNDING, and the
    largest difference. `adv` may be the first images of the case only.
    """
    x, label = case.x[: len(adv)], case.label[: len(adv)]
    logits = torch.cat([case.model(part) for part in adv.split(case.batch)])
    if kind == "task":
        loss = attacks.cross_entropy(logits, label)
    else:
        loss = torch.cat([attacks.l2(case.model.embed(a), case.model.embed(b))
                          for a, b in zip(adv.split(case.batch), x.split(case.batch), strict=True)])  # fmt: skip
    row = {"accuracy": (logits.argmax(1) == label).float().mean(), "max_change": (adv - x).abs().max()}
    row |= {"loss": loss.mean(), "loss_se": loss.std() / len(loss) ** 0.5}
    if reference is not None:
        off = (adv - reference).abs()
        row |= {"identical": (off == 0).float().mean(), "near": (off <= ROUNDING).float().mean(), "largest": off.max()}
    return {name: float(value) for name, value in row.items()}


# --- the table of contenders ---


def run(settings: Settings) -> pd.DataFrame:
    """Every encoder, attack and contender: speed, ratio, memory, share of the ceiling and strength; a row each.

    `seconds` lists the time of each round. Raises BadInput, before any work, for a missing package or section.
    """
    for name in ("torchattacks", "foolbox"):
        _library(name)
    work = [(name, kind) for name in section(settings).encoders for kind in ATTACK]
    rows, cases = [], {}
    for name, kind in track(work, desc="contenders"):
        cases = cases if name in cases else {name: case(settings, name)}
        rows += compare(cases[name], kind, settings.bench.repeats)
    return pd.DataFrame(rows)


def compare(case: Case, kind: str, repeats: int) -> list[Row]:
    """The rows of one encoder and attack, 'task' or 'embed'."""
    everyone = able(kind, case.precision)
    images, memory = {}, {}
    for name, contender in everyone.items():  # also the round that is dropped
        _attack(case, contender, kind, slice(0, 1), 1)  # a first call keeps buffers, which are not its need
        memory[name] = peak_memory(lambda f=contender, n=name: images.update({n: _attack(case, f, kind)}), case.device)
    against = "torchattacks" if kind == "task" else "plain loop"
    precisions = {name: case.precision if name == "ours" else "fp32" for name in everyone}
    ceilings = {p: products(case, p) for p in set(precisions.values())}
    for piece, _ in ceilings.values():
        piece()
    pieces = {name: partial(_attack, case, f, kind) for name, f in everyone.items()}
    times = timed(pieces | {f"ceiling {p}": piece for p, (piece, _) in ceilings.items()}, repeats, case.device, True)
    rates = len(case.x) * case.attack.steps / times[list(everyone)]  # image steps per second
    rows = []
    for name, contender in everyone.items():
        precision, cost = precisions[name], flops(case, contender, kind)
        ceiling = ceilings[precision][1] / times[f"ceiling {precision}"]  # FLOP/s of each round
        rows.append(
            _about(case) | {
                "attack": ATTACK[kind], "contender": name, "precision": precision,
                "speed": rates[name].mean(), "speed_sd": rates[name].std(), "against": against,
                **paired(rates, name, against), "memory_mb": memory[name], "gflop": cost / 1e9,
                "ceiling_gflops": ceiling.mean() / 1e9, "ceiling_share": (rates[name] * cost / ceiling).mean(),
                **strength(case, images[name], kind, images[against]), "seconds": times[name].tolist(),
            }
        )  # fmt: skip
    return rows


def _about(case: Case) -> Row:
    return {
        "encoder": case.name, "weights": case.model.encoder.origin, "device": case.device, "size": case.size,
        "images": len(case.x), "steps": case.attack.steps, "batch": case.batch,
    }  # fmt: skip


# --- the choices ---


def _rows(
    case: Case, choice: str, against: str, rates: pd.DataFrame, unit: str = "image steps/s", note: str = ""
) -> list[Row]:
    """A row for each column of rates beside the column `against`."""
    return [
        {"encoder": case.name, "choice": choice, "option": name, "against": against, "unit": unit,
         "value": rates[name].mean(), "against_value": rates[against].mean(), **paired(rates, name, against),
         "note": note}
        for name in rates.columns if name != against
    ]  # fmt: skip


def _left_out(case: Case, choice: str, option: str, against: str, why: str) -> list[Row]:
    """A row without numbers, and the reason."""
    row = {"encoder": case.name, "choice": choice, "option": option, "against": against, "unit": "image steps/s"}
    return [row | dict.fromkeys(CHOICE_COLUMNS[5:-1], math.nan) | {"note": why}]


def _speeds(case: Case, pieces: Pieces, repeats: int, work: float = 0) -> pd.DataFrame:
    """Rates of the pieces, round by round; `work`: image steps (or what the unit says) of one call."""
    return (work or len(case.x) * SHORT) / timed(pieces, repeats, case.device)


def _loop(case: Case, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
    """A piece: PGD on loss(x_adv, label), `case.batch` images at a time."""

    def contender(model: TaskModel, x: Tensor, label: Tensor, start: Tensor, attack: Attack) -> Tensor:
        return attacks.pgd(x, lambda adv, t: loss(adv, label), attack, start, case.precision)

    return partial(_attack, case, contender, "task", steps=SHORT)


def _loss_of(logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda adv, label: attacks.cross_entropy(logits(adv).float(), label)


def frozen_weights(case: Case, repeats: int) -> list[Row]:
    """The plain loop with and without gradients of the weights."""
    pieces = {
        name: partial(_attack, case, partial(plain, trainable=trainable), "task", steps=SHORT)
        for name, trainable in (("frozen", False), ("trainable", True))
    }
    return _rows(case, "weights", "trainable", _speeds(case, pieces, repeats))


def last_block(case: Case, repeats: int) -> list[Row]:
    """Encoder.cls against Encoder.forward."""
    model, names = case.model, ("last block", "CLS token only", "all tokens")
    if not vit.plain(model.encoder.backbone):
        return _left_out(case, *names, "not a vision transformer of standard blocks: both are the same")
    pieces = {
        names[1]: _loop(case, _loss_of(lambda x: model.head.linear(model.encoder.cls(x)))),
        names[2]: _loop(case, _loss_of(lambda x: model.head.linear(model.encoder(x)[0]))),
    }
    return _rows(case, names[0], names[2], _speeds(case, pieces, repeats))


def patch_embedding(case: Case, repeats: int) -> list[Row]:
    """Encoder.forward, which embeds patches by a matrix product, against timm's, which convolves."""
    model, names = case.model, ("patch embedding", "matrix product", "convolution")
    backbone = model.encoder.backbone
    if not vit.plain(backbone) or type(backbone.patch_embed) is not timm.layers.PatchEmbed:
        return _left_out(case, *names, "its stem is another one: both are the same")
    pieces = {
        names[1]: _loop(case, _loss_of(lambda x: model.head.linear(model.encoder(x)[0]))),
        names[2]: _loop(case, _loss_of(Logits(model))),
    }
    return _rows(case, names[0], names[2], _speeds(case, pieces, repeats))


def bf16(case: Case, repeats: int) -> list[Row]:
    """Steps in bf16 against fp32: timed where the device has instructions for it; its strength in any case."""
    kinds = {name: partial(ours, precision=name) for name in ("bf16", "fp32")}
    fast = compute.fast_bf16(case.device)
    few = slice(0, len(case.x) if fast else 4)  # elsewhere it is emulated
    found = {name: strength(case, _attack(case, f, "task", few), "task") for name, f in kinds.items()}
    words = "; ".join(
        f"{name}: accuracy {s['accuracy']:.2f}, cross-entropy {s['loss']:.3f} ± {s['loss_se']:.3f}"
        for name, s in found.items()
    )
    words = f"on {min(len(case.x), few.stop)} images {words}"
    if not fast:
        why = "not timed: this device has no matrix instructions for bf16 (auto is fp32) and emulates it"
        return _left_out(case, "precision", "bf16", "fp32", f"{why}; {words}")
    pieces = {name: partial(_attack, case, f, "task", steps=SHORT) for name, f in kinds.items()}
    return _rows(case, "precision", "fp32", _speeds(case, pieces, repeats), note=words)


def fused_attention(case: Case, repeats: int) -> list[Row]:
    """Scaled dot product attention in one operation, against its explicit products and softmax."""
    modules = [m for m in case.model.encoder.modules() if hasattr(m, "fused_attn")]
    names = ("attention", "fused (SDPA)", "explicit")
    if not modules:
        return _left_out(case, *names, "it has no attention of timm's")
    whole = partial(_attack, case, partial(ours, precision=case.precision), "task", steps=SHORT)

    def explicit() -> None:
        before = [m.fused_attn for m in modules]
        try:
            for module in modules:
                module.fused_attn = False
            with sdpa_kernel(SDPBackend.MATH):  # for the block that does not ask its module
                whole()
        finally:
            for module, flag in zip(modules, before, strict=True):
                module.fused_attn = flag

    return _rows(case, names[0], names[2], _speeds(case, {names[1]: whole, names[2]: explicit}, repeats))


def batch_sizes(case: Case, repeats: int) -> list[Row]:
    """Images at a time: powers of two, and what the package chooses, against one."""
    chosen = compute.batch_for(case.tokens, case.device)
    sizes = sorted({2**k for k in range(len(case.x).bit_length())} | {min(chosen, len(case.x))})
    contender = partial(ours, precision=case.precision)
    pieces = {str(b): partial(_attack, case, contender, "task", batch=b, steps=SHORT) for b in sizes}
    return _rows(case, "batch", "1", _speeds(case, pieces, repeats), note=f"the package chooses {chosen}")


def finished_images(case: Case, repeats: int) -> list[Row]:
    """stop_when_broken: images whose class is surely lost leave the batch; with it the accuracy must be the same."""
    steps = 4 * SHORT
    kinds, images = {"leave the batch": True, "stay": False}, {}

    def attacked(name: str) -> None:
        attack = case.attack.model_copy(update={"steps": steps, "stop_when_broken": kinds[name]})
        parts = zip(case.x.split(case.batch), case.label.split(case.batch), _split(case.ids, case.batch), strict=True)
        images[name] = torch.cat(
            [attacks.attacked("task", case.model, *part, attack, case.seed, case.precision) for part in parts]
        )

    rates = _speeds(case, {name: partial(attacked, name) for name in kinds}, repeats, len(case.x) * steps)
    words = " and ".join(f"{strength(case, images[name], 'task')['accuracy']:.2f}" for name in kinds)
    return _rows(case, "broken images", "stay", rates, note=f"{steps} steps asked for; accuracy {words}")


def _split(rows: list[str], size: int) -> list[list[str]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def cached_tokens(case: Case, repeats: int) -> list[Row]:
    """A linear head trained on tokens that are kept, against encoding the images in every epoch."""
    subset = scenes(len(case.x), case.size, case.seed)
    encoder = case.model.encoder

    def encoded() -> Iterator[tuple[Tensor, ...]]:
        return heads.encoded(encoder, subset, case.batch, case.device, False)

    def train(keep: bool) -> None:
        head = heads.ClassificationHead(encoder.dim, CLASSES).to(case.device)
        optimizer = torch.optim.Adam(head.parameters())
        rows = list(encoded()) if keep else None
        for _ in range(EPOCHS):
            for cls, _, target in rows or encoded():
                optimizer.zero_grad()
                F.cross_entropy(head.linear(cls), target).backward()
                optimizer.step()

    pieces = {"kept": partial(train, True), "encoded anew": partial(train, False)}
    rates = _speeds(case, pieces, repeats, EPOCHS * len(subset))
    note = f"{EPOCHS} epochs; the ratio grows with their number"
    return _rows(case, "tokens of head training", "encoded anew", rates, "images/s", note)


def windows(case: Case, repeats: int) -> list[Row]:
    """EmbedAttack through a sliding window, one step: windows of several images together, against image by image."""
    encoder, side = case.model.encoder, round(1.5 * case.size)
    model = TaskModel("segmentation", encoder, heads.SegmentationHead(encoder.dim, CLASSES).to(case.device), 2 / 3)
    x = F.interpolate(case.x[:2], size=(side, side), mode="bilinear").clamp(0, 1)
    start, attack = (x + case.attack.eps).clamp(max=1), case.attack.model_copy(update={"steps": 1})

    def together(size: int) -> None:
        for part, begin in zip(x.split(size), start.split(size), strict=True):
            ours(model, part, None, begin, attack, case.precision)

    pieces = {f"of {len(x)} images": partial(together, len(x)), "of one image": partial(together, 1)}
    count = len(heads.window_starts(side, encoder.native, model.stride)) ** 2
    rates = _speeds(case, pieces, repeats, len(x))
    note = f"{count} windows of {encoder.native} px an image of {side} px"
    return _rows(case, "windows in a batch", "of one image", rates, note=note)


def loading(case: Case, repeats: int) -> list[Row]:
    """Images that the data loading delivers a second, beside those that an attack of 20 steps takes."""
    contender, long = partial(ours, precision=case.precision), 20
    with tempfile.TemporaryDirectory() as folder:
        subsets = {"scenes": scenes(LOADED, case.size, case.seed)}
        subsets |= {f"{kind} files": _files(subsets["scenes"], Path(folder), kind) for kind in ("PNG", "JPEG")}
        pieces = {n: partial(_exhaust, subset, case.batch) for n, subset in subsets.items()}
        pieces["20-step attack"] = partial(_attack, case, contender, "task", steps=SHORT)
        times = timed(pieces, repeats, case.device)
    rates = pd.DataFrame({n: LOADED / times[n] for n in subsets})
    rates["20-step attack"] = len(case.x) * SHORT / long / times["20-step attack"]
    note = f"files of 500 x 375 px, read by one process, brought to {case.size} px"
    return _rows(case, "loading", "20-step attack", rates, "images/s", note)


def _exhaust(subset: datasets.Subset, batch: int) -> None:
    for _ in datasets.batches(subset, batch):
        pass


def _files(subset: datasets.Subset, folder: Path, kind: str) -> datasets.Subset:
    """The same pictures as files of the size of a common photograph."""
    items = []
    for i, (image, _) in enumerate(subset[k] for k in range(len(subset))):
        path, buffer = folder / f"{i}.{kind.lower()}", io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((500, 375)).save(buffer, kind)
        path.write_bytes(buffer.getvalue())
        items.append(datasets.Item(f"{kind}-{i}", path, 0))
    return datasets.Subset("scenes", "classification", items, subset.transform)


def memory(case: Case, repeats: int) -> list[Row]:
    """Peak memory: five times the steps, and batches of several images against one."""
    contender, most, few = partial(ours, precision=case.precision), min(4, len(case.x)), min(2, len(case.x))

    def peak(images: int, steps: int) -> float:
        return peak_memory(partial(_attack, case, contender, "task", slice(0, images), steps, images), case.device)

    peak(most, 1)  # the first call keeps buffers
    steps = pd.DataFrame([{str(t): peak(few, t) for t in (2, 10)} for _ in range(2)])
    batches = pd.DataFrame([{str(2**k): peak(2**k, 2) for k in range(most.bit_length())} for _ in range(2)])
    return [
        *_rows(case, "memory by steps", "2", steps, "MB", f"batches of {few}"),
        *_rows(case, "memory by batch", "1", batches, "MB", "2 steps"),
    ]


def compilation(case: Case, repeats: int) -> list[Row]:
    """torch.compile of the encoder's CLS path against running it operation by operation, and when it pays."""
    names = ("torch.compile", "compiled", "not compiled")
    if case.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return _left_out(case, *names, "no C++ compiler is installed, which torch.compile needs on a CPU")
    model = case.model
    torch.compiler.reset()
    fast = torch.compile(model.encoder.cls, dynamic=False)
    pieces = {
        "compiled": _loop(case, _loss_of(lambda x: model.head.linear(fast(x)))),
        "not compiled": _loop(case, _loss_of(lambda x: model.head.linear(model.encoder.cls(x)))),
    }
    once = seconds(pieces["not compiled"], case.device)
    try:
        with torch._inductor.config.patch(force_disable_caches=True):  # an earlier run's work must not count
            spent = seconds(pieces["compiled"], case.device) - once
            rates = _speeds(case, pieces, repeats)
    except Exception as error:  # whatever the compiler does not understand
        return _left_out(case, *names, f"compiling failed ({type(error).__name__})")
    finally:
        torch.compiler.reset()
    return _rows(case, names[0], names[2], rates, note=_pays(case, spent, rates))


def _pays(case: Case, spent: float, rates: pd.DataFrame) -> str:
    """When the seconds spent on compiling come back."""
    step = {name: case.batch / rates[name].mean() for name in rates}  # seconds of a step of one batch
    words = (
        f"compiling takes {spent:.0f} s; a step of {case.batch} images takes {step['compiled'] * 1e3:.1f} ms compiled"
    )
    words += f", {step['not compiled'] * 1e3:.1f} ms not; "
    gain = step["not compiled"] - step["compiled"]
    return words + (f"it pays after {math.ceil(spent / gain):,} such steps" if gain > 0 else "it never pays")


CHOICES = (
    frozen_weights, last_block, patch_embedding, bf16, fused_attention, batch_sizes, finished_images, cached_tokens,
    windows, loading, memory,
)  # fmt: skip


def choices(settings: Settings, compiled: bool | list[str] = True) -> pd.DataFrame:
    """Every choice on every encoder: CHOICE_COLUMNS, a row for each option; a ratio above 1 favours the option.

    Units are rates (image steps or images a second), or MB, where less is better. compiled: whether torch.compile is
    tried, which takes minutes on large encoders; or the encoders it is tried on.
    """
    names, rows = section(settings).encoders, []
    wanted = (names if compiled else []) if isinstance(compiled, bool) else compiled
    for name in names:
        here = case(settings, name)
        for choice in track((*CHOICES, *([compilation] if name in wanted else [])), desc=f"choices, {name}"):
            rows += choice(here, settings.bench.repeats)
    return pd.DataFrame(rows)[CHOICE_COLUMNS]


# --- what is written ---


def notes(table: pd.DataFrame, picks: pd.DataFrame | None = None) -> list[str]:
    """Sentences below the tables: how it was measured, the weights, and what was reached of the aims."""
    device, rounds = table["device"].iloc[0], len(table["seconds"].iloc[0])
    found = [
        f"Rounds: {rounds}, after one that is dropped; each runs everything once. Ratios are of the same round, ± is "
        "the standard deviation over rounds.",
        "Speed: images x steps a second. Memory: the peak above what was held before. FLOPs: what the contender itself "
        "computes; the ceiling is the measured rate of an MLP's two matrix products in the same precision.",
        "Accuracy (1 when clean) and loss are evaluated in fp32. Torchattacks, foolbox and the plain loop get timm's "
        "own forward pass; torchattacks and foolbox cannot express EmbedAttack, so the plain loop stands in.",
    ]
    origins = table.drop_duplicates("encoder")
    found += [f"Weights of {r.encoder} at {r.size} px: {r.weights}." for r in origins.itertuples()]
    for _, rows in table.groupby(["encoder", "attack"], sort=False):
        found += _reached(rows.set_index("contender"), device)
    if not (table["precision"] == "bf16").any():
        found.append(_no_bf16(device, picks))
    return found


def _verdict(value: float, aim: float | None) -> str:
    return "" if aim is None else f" (aim: {aim:g}; {'reached' if value >= aim else 'not reached'})"


def _reached(rows: pd.DataFrame, device: str) -> Iterator[str]:
    """Sentences on one encoder and attack: speed and strength of ours beside the contender it is compared with."""
    first = rows.iloc[0]
    other, what = rows.loc[first["against"]], f"{first['encoder']}, {first['attack']}"
    for name in ("ours fp32", "ours") if first["precision"] == "bf16" else ("ours fp32",):
        own = rows.loc[name]
        aim = AIMS.get((device, own["precision"])) if first["against"] == "torchattacks" else None
        apart = abs(own["loss"] - other["loss"]) / max(own["loss_se"], other["loss_se"], 1e-12)
        yield (
            f"{what}: ours in {own['precision']} runs {own['ratio']:.2f} ± {own['ratio_sd']:.2f} times as fast as "
            f"{first['against']}{_verdict(own['ratio'], aim)}; its loss is {apart:.2f} standard errors away; "
            f"{own['identical']:.1%} of the values are bit-identical, {own['near']:.1%} equal up to rounding (1e-6)."
        )
    if first["precision"] == "bf16":
        share = first["ceiling_share"]
        yield f"{what}: ours reaches {share:.0%} of the bf16 matrix products{_verdict(share, CEILING_AIM)}."


def _no_bf16(device: str, picks: pd.DataFrame | None) -> str:
    """Why there is no row in bf16, and what is known of its strength."""
    words = "No row is in bf16: " + (
        "the setting precision is fp32."
        if compute.fast_bf16(device)
        else f"this {device.upper()} has no matrix instructions for it, so its speed could not be measured here."
    )
    known = [] if picks is None else picks[picks["choice"] == "precision"].itertuples()
    return " ".join([words, *(f"Strength, {r.encoder}, {r.note.partition('; ')[2]}." for r in known)])


def _contenders_text(table: pd.DataFrame) -> pd.DataFrame:
    """The table of contenders for people."""
    rows = [
        {
            "Encoder": r.encoder, "Attack": r.attack, "Contender": f"{r.contender} ({r.precision})",
            "Image steps/s": f"{r.speed:.3g} ± {r.speed_sd:.2g}",
            "Ratio": f"{r.ratio:.2f} ± {r.ratio_sd:.2f} × {r.against}", "Memory, MB": f"{r.memory_mb:.0f}",
            "GFLOP": f"{r.gflop:.3g}", "Of the ceiling": f"{r.ceiling_share:.0%} of {r.ceiling_gflops:.3g} GFLOP/s",
            "Accuracy": f"{r.accuracy:.2f}", "Loss": f"{r.loss:.4g} ± {r.loss_se:.2g}",
            "Largest change": f"{r.max_change * 255:.3g}/255", "Identical": f"{r.identical:.1%}",
            "Within 1e-6": f"{r.near:.1%}", "Largest difference": f"{r.largest:.1e}",
        }
        for r in table.itertuples()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _choices_text(picks: pd.DataFrame) -> pd.DataFrame:
    """The table of choices for people."""
    rows = [
        {
            "Encoder": r.encoder, "Choice": r.choice, "Option": r.option, "Against": r.against,
            "Ratio": "–" if math.isnan(r.ratio) else f"{r.ratio:.2f} ± {r.ratio_sd:.2f}",
            "Value": "–" if math.isnan(r.value) else f"{r.value:.3g} against {r.against_value:.3g} {r.unit}",
            "Remark": r.note,
        }
        for r in picks.itertuples()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, picks: pd.DataFrame) -> str:
    """Both tables with their notes."""
    return "\n".join(
        [
            layout.markdown("Contenders", _contenders_text(table), notes(table, picks)),
            layout.markdown("Choices", _choices_text(picks), remarks(picks)),
        ]
    )


def remarks(picks: pd.DataFrame) -> list[str]:
    """Sentences below the choices: how to read them, and which brought nothing."""
    found = [
        "A ratio above 1 favours the option; of memory, below 1. Loading: above 1, images come faster than a 20-step "
        "attack takes them, so the attack never waits.",
    ]
    speeds = picks[(picks["unit"] != "MB") & picks["ratio"].notna()]
    idle = [f"{r.choice} ({r.option}, {r.encoder})" for r in speeds[speeds["ratio_max"] < 1].itertuples()]
    open_ = speeds[(speeds["ratio_min"] < 1) & (speeds["ratio_max"] >= 1)]
    unclear = [f"{r.choice} ({r.option}, {r.encoder})" for r in open_.itertuples()]
    found.append(f"Slower in every round: {', '.join(idle) or 'none'}.")
    return [*found, f"Faster in some rounds and slower in others: {', '.join(unclear) or 'none'}."]


def write(settings: Settings, table: pd.DataFrame, picks: pd.DataFrame) -> str:
    """Write figures/<profile>/bench.{csv,md,json,png,pdf}, choices.{csv,png,pdf}; returns the Markdown."""
    folder, text = records.figures_dir(settings.profile), markdown(table, picks)
    for name, rows in (("bench", table.drop(columns="seconds")), ("choices", picks)):
        content = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        records.write_bytes(content.encode(), folder / f"{name}.csv")
    records.write_bytes(text.encode(), folder / "bench.md")
    content = {
        "settings": {"seed": settings.seed, "precision": settings.precision, "bench": section(settings).model_dump()},
        "provenance": records.provenance(records.pick_device(settings.device)),
        "notes": notes(table, picks), "contenders": _plainly(table), "choices": _plainly(picks),
    }  # fmt: skip
    records.write_json(content, folder / "bench.json")
    tiles.save(picture(table), folder / "bench")
    tiles.save(choices_picture(picks), folder / "choices")
    return text


def _plainly(rows: pd.DataFrame) -> list[Row]:
    """Rows as JSON can hold them: null for what was not measured."""
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


@plt.rc_context(tiles.STYLE)
def picture(table: pd.DataFrame) -> Figure:
    """Image steps a second of every contender, a panel for each encoder; bars: standard deviation over rounds."""
    long = table.assign(speed=[[r.images * r.steps / s for s in r.seconds] for r in table.itertuples()])
    long = long.explode("speed").astype({"speed": float})
    colours = {"PGD": tiles.COLOURS["task"], "EmbedAttack": tiles.COLOURS["embed"]}
    fig, axes = tiles.panels(table["encoder"].nunique(), 4.4, 3.2)
    for ax, (name, rows) in zip(axes, long.groupby("encoder", sort=False), strict=True):
        look = {"errorbar": "sd", "capsize": 0.3, "err_kws": {"linewidth": 1}, "palette": colours}
        sns.barplot(rows, x="speed", y="contender", hue="attack", ax=ax, legend=ax is axes[-1], **look)
        first = rows.iloc[0]
        ax.set(title=f"{name}, {first['size']} px, {first['device'].upper()}", xlabel="image steps / s", ylabel="")
        sns.despine(ax=ax)
    if legend := axes[-1].get_legend():
        sns.move_legend(axes[-1], "upper left", bbox_to_anchor=(1, 1), title=None)
        legend.set_in_layout(True)
    return fig


@plt.rc_context(tiles.STYLE)
def choices_picture(picks: pd.DataFrame) -> Figure:
    """The ratio of every choice that was timed, a panel for each encoder; at the line a choice brings nothing."""
    shown = picks.dropna(subset="ratio")
    # loading is no choice: its ratio says whether the attack has to wait
    shown = shown[(shown["unit"] != "MB") & (shown["choice"] != "loading")].assign(
        what=lambda rows: rows["choice"] + ": " + rows["option"]
    )
    names = list(shown["encoder"].unique())
    most = max(shown["encoder"].value_counts(), default=1)
    fig, axes = tiles.panels(max(1, len(names)), 5.2, 0.8 + 0.27 * most)
    for ax, name in zip(axes, names, strict=False):
        rows = shown[shown["encoder"] == name]
        look = {"color": tiles.COLOURS["clean"], "ecolor": "0.4", "capsize": 2}
        bars = ax.barh(rows["what"], rows["ratio"] - 1, left=1, xerr=rows["ratio_sd"], **look)
        ax.bar_label(bars, [f"{r:.2f}" for r in rows["ratio"]], padding=4, fontsize=8)
        ax.axvline(1, color="0.3", linewidth=0.8)
        ax.invert_yaxis()
        ax.set(title=name, xlabel="times as fast as without the choice")
        ax.margins(x=0.15)
        sns.despine(ax=ax)
    return fig
