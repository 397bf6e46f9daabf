"""What an attack step costs on this machine, and how strong it is: ours beside other implementations.

Whatever is compared runs on the same frozen model, images, start, ball and number of steps, and once in every round; a
ratio is one of two times of the same round, so that other work on the machine spoils both. Strength is always judged in
fp32. Weights do not change the time, so encoders without local weights are drawn at random, and the table says so.

python benchmarks/contenders.py [--encoders NAME ..] [--steps N] [--repeats N] writes figures/bench/contenders.{csv,md}.
"""

import argparse
import ctypes
import gc
import importlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ssl_robust import attacks, compute, datasets, encoders, heads, records, vit
from ssl_robust.encoders import Encoder
from ssl_robust.heads import TaskModel
from ssl_robust.progress import any_terminal, track
from ssl_robust.settings import Attack, BadInput, EncoderRow, Settings, check
from ssl_robust.show import layout

Contender = Callable[[TaskModel, Tensor, Tensor | None, Tensor, Attack], Tensor]
Pieces = dict[str, Callable[[], Any]]  # what is timed, by name
Row = dict[str, Any]

CLASSES, HEAD_IMAGES = 10, 16
LEAST = 0.3  # seconds; shorter pieces are repeated until they take that long
ROUNDING = 1e-6  # images that differ by less are equal up to the order of two additions
ATTACK = {"task": "PGD", "embed": "EmbedAttack"}


class Bench(NamedTuple):
    """What is timed: names of encoders or timm models, at most so many px and images, steps, rounds."""

    encoders: tuple[str, ...] = ("embedded_vit", "dinov2_vits14")
    size: int = 224
    images: int | str = "auto"  # as many as the package would take, or a smaller number
    steps: int = 2
    repeats: int = 3


class Case(NamedTuple):
    """One frozen encoder with a linear head, and the images that everything is timed on."""

    name: str
    model: TaskModel
    x: Tensor  # (n, 3, size, size) in [0,1]
    start: Tensor  # of EmbedAttack, drawn once: the noise comes from the CPU, which must not be timed
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


def case(settings: Settings, bench: Bench, name: str) -> Case:
    """The encoder `name` (of encoders.KNOWN, or a timm model) ready to be timed; BadInput if there is no such model."""
    device = records.pick_device(settings.device)
    encoder = _encoder(settings, bench, name).to(device)
    # all in one batch, as other implementations have no other: not more than this project would take
    batch = compute.batch_for(compute.tokens_of(encoder.patch, (encoder.native, encoder.native)), device)
    batch = batch if bench.images == "auto" else min(bench.images, batch)
    subset = scenes(max(batch, HEAD_IMAGES), encoder.native, settings.seed)
    x = _all(subset).to(device)
    model = TaskModel("classification", encoder, _head(encoder, x, settings.seed))
    ids, x = subset.ids[:batch], x[:batch]
    ball = (settings.attack or Attack()).model_copy(update={"steps": bench.steps, "best": False})
    with torch.no_grad():
        label = model(x).argmax(1)
    precision = compute.precision(settings.precision, device)
    start = attacks.random_start(x, ball.eps, ids, settings.seed)
    return Case(name, model, x, start, label, ids, ball, batch, settings.seed, precision)


def _encoder(settings: Settings, bench: Bench, name: str) -> Encoder:
    """The encoder with its own weights if it is the embedded one, else drawn from the seed."""
    row = EncoderRow(name=re.sub(r"[^A-Za-z0-9_.-]", "_", name), timm=name)
    known = encoders.describe(row)
    row = row.model_copy(update={"native": min(bench.size, known.native)})
    if not known.timm:
        return encoders.load(row)
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


def fused(model: TaskModel, x: Tensor, label: Tensor | None, start: Tensor, attack: Attack) -> Tensor:
    """`ours` in bf16 with torch's fused attention on the CPU, too, which the package computes as matrix products."""
    explicit, compute.ExplicitAttention = compute.ExplicitAttention, nullcontext
    try:
        return ours(model, x, label, start, attack, "bf16")
    finally:
        compute.ExplicitAttention = explicit


def contenders(precision: str, device: str = "cpu") -> dict[str, Contender]:
    """All contenders of PGD by name; `precision`: what `ours` computes its steps in."""
    return {
        "ours": partial(ours, precision=precision),
        **({"ours, fused attention": fused} if (precision, device) == ("bf16", "cpu") else {}),
        **({"ours fp32": ours} if precision != "fp32" else {}),
        "torchattacks": torchattacks_pgd,
        "foolbox": foolbox_pgd,
        "plain loop": plain,
    }


def able(kind: str, precision: str, device: str = "cpu") -> dict[str, Contender]:
    """The contenders that have the loss of the attack `kind`, 'task' or 'embed'."""
    everyone = contenders(precision, device)
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
            attack_case(case, contender, kind, slice(0, 1), steps)
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
    return case.x if kind == "task" else case.start


def attack_case(
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
        loss = F.cross_entropy(logits, label, reduction="none")
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


def run(settings: Settings, bench: Bench) -> pd.DataFrame:
    """Every encoder, attack and contender: speed, ratio, memory, share of the ceiling and strength; a row each.

    Raises BadInput, before any work, for a missing package or an unknown model.
    """
    for name in ("torchattacks", "foolbox"):
        _library(name)
    work, rows, cases = [(name, kind) for name in bench.encoders for kind in ATTACK], [], {}
    for name, kind in track(work, desc="contenders"):
        cases = cases if name in cases else {name: case(settings, bench, name)}
        while not (found := _fitting(cases[name], kind, bench.repeats)):
            fewer = cases[name].batch // 2
            print(f"{name}: memory lacks for {2 * fewer} images at a time; {fewer} are timed (--images)", flush=True)
            cases = {name: case(settings, bench._replace(images=fewer), name)}
        rows += found
    return pd.DataFrame(rows)


def _fitting(case: Case, kind: str, repeats: int) -> list[Row]:
    """The rows of `compare`; none if memory lacks for the case, and would suffice for fewer images."""
    try:
        return compare(case, kind, repeats)
    except RuntimeError as error:
        if case.batch == 1 or not compute.memory_lacks(error):
            raise
    clear_device_cache(garbage_collection=True)
    return []


def compare(case: Case, kind: str, repeats: int) -> list[Row]:
    """The rows of one encoder and attack, 'task' or 'embed'."""
    everyone = able(kind, case.precision, case.device)
    images, memory = {}, {}
    for name, contender in everyone.items():  # also the round that is dropped
        attack_case(case, contender, kind, slice(0, 1), 1)  # a first call keeps buffers, which are not its need
        memory[name] = peak_memory(
            lambda f=contender, n=name: images.update({n: attack_case(case, f, kind)}), case.device
        )
    against = "torchattacks" if kind == "task" else "plain loop"
    precisions = {name: case.precision if name in ("ours", "ours, fused attention") else "fp32" for name in everyone}
    ceilings = {p: products(case, p) for p in set(precisions.values())}
    for piece, _ in ceilings.values():
        piece()
    pieces = {name: partial(attack_case, case, f, kind) for name, f in everyone.items()}
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
                "ceiling_tflops": ceiling.mean() / 1e12, "ceiling_share": (rates[name] * cost / ceiling).mean(),
                **strength(case, images[name], kind, images[against]), "seconds": times[name].tolist(),
            }
        )  # fmt: skip
    return rows


def _about(case: Case) -> Row:
    return {
        "encoder": case.name, "weights": case.model.encoder.origin, "device": case.device, "size": case.size,
        "images": len(case.x), "steps": case.attack.steps, "batch": case.batch, "gpu": gpu(case.device),
    }  # fmt: skip


def gpu(device: str) -> str:
    """Name, driver, power limit and clocks (now, at most) of the GPU: pieces on a card that is throttled differ."""
    if device != "cuda":
        return ""
    asked = "--query-gpu=name,driver_version,power.limit,clocks.sm,clocks.max.sm"
    with suppress(OSError, IndexError):
        said = subprocess.run(["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True)
        return said.stdout.strip().splitlines()[torch.cuda.current_device()]
    return torch.cuda.get_device_name()


SHOWN = ["encoder", "attack", "contender", "precision", "speed", "ratio", "ratio_sd", "memory_mb", "accuracy"]
SHOWN += ["loss", "near", "ceiling_tflops", "ceiling_share"]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    any_terminal()
    parser = argparse.ArgumentParser(prog="python benchmarks/contenders.py", description="Our attacks beside others.")
    parser.add_argument("--encoders", nargs="+", default=Bench().encoders, help="names or timm models")
    parser.add_argument("--steps", type=int, default=Bench().steps)
    parser.add_argument("--repeats", type=int, default=Bench().repeats, help="rounds of everything")
    parser.add_argument(
        "--images", type=int, default=0, help="at most so many at a time; 0: as many as the package takes"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of our attack steps")
    asked = parser.parse_args(argv)
    rows = [{"name": "embedded_vit"}]
    try:
        given = check(profile="bench", device=asked.device, precision=asked.precision, encoders=rows, attack={})
        about = {"encoders": tuple(asked.encoders), "steps": asked.steps, "repeats": asked.repeats}
        found = run(given, Bench(**about, images=asked.images or "auto"))
    except BadInput as problem:
        print(problem, file=sys.stderr)
        return 2
    notes = {"": ["speed: images times steps a second; ratio: to torchattacks (PGD) or the plain loop (EmbedAttack), "
                  "paired within each round, ± its spread; near: share of values within 1e-6 of theirs; ceiling: large "
                  "matrix products in the same precision and rounds, TFLOP/s, and our share of it.",
                  *filter(None, found["gpu"].unique())]}  # fmt: skip
    text = layout.markdown("Attack steps beside other implementations", found[SHOWN].round(3), notes)
    folder = records.figures_dir("bench")
    records.write_bytes(text.encode(), folder / "contenders.md")
    records.write_bytes(found.to_csv(index=False).encode(), folder / "contenders.csv")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
