"""Each choice that makes an attack step cheaper, by itself, against doing without it.

A choice is a function (case, rounds) -> rows of the table; it says in a row without numbers where it does not apply.
Everything is timed as bench.py does it.
"""

import io
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bench
import pandas as pd
import timm.layers
import torch
import torch.nn.functional as F
from bench import Case, Pieces, Row
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssl_robust import attacks, compute, datasets, heads, records, vit
from ssl_robust.heads import TaskModel
from ssl_robust.progress import track
from ssl_robust.settings import Attack, Settings

SHORT = 2  # steps of a choice's attack: every step costs the same
LOADED = 32  # images that the loading is timed with
EPOCHS = 4  # of head training on cached tokens; the paper's heads train for more, and gain more
SEGMENTED = (2, 21, 224)  # images, classes (Pascal VOC's) and px of the logits that SegPGD's loss is timed on
COLUMNS = [
    "encoder", "choice", "option", "against", "unit", "value", "against_value", "ratio", "ratio_sd", "ratio_min",
    "ratio_max", "note",
]  # fmt: skip


def _rows(
    case: Case, choice: str, against: str, rates: pd.DataFrame, unit: str = "image steps/s", note: str = ""
) -> list[Row]:
    """A row for each column of rates beside the column `against`."""
    return [
        {"encoder": case.name, "choice": choice, "option": name, "against": against, "unit": unit,
         "value": rates[name].mean(), "against_value": rates[against].mean(), **bench.paired(rates, name, against),
         "note": note}
        for name in rates.columns if name != against
    ]  # fmt: skip


def _left_out(case: Case, choice: str, option: str, against: str, why: str) -> list[Row]:
    """A row without numbers, and the reason."""
    row = {"encoder": case.name, "choice": choice, "option": option, "against": against, "unit": "image steps/s"}
    return [row | dict.fromkeys(COLUMNS[5:-1], math.nan) | {"note": why}]


def _speeds(case: Case, pieces: Pieces, repeats: int, work: float = 0) -> pd.DataFrame:
    """Rates of the pieces, round by round; `work`: image steps (or what the unit says) of one call."""
    return (work or len(case.x) * SHORT) / bench.timed(pieces, repeats, case.device)


def _piece(case: Case, contender: bench.Contender, **options: Any) -> Callable[[], Tensor]:
    """A piece: PGD by `contender` with few steps, on the whole case unless `options` of attack_case say otherwise."""
    return partial(bench.attack_case, case, contender, "task", **({"steps": SHORT} | options))


def _own(case: Case, **options: Any) -> Callable[[], Tensor]:
    """A piece: PGD as the package runs it."""
    return _piece(case, partial(bench.ours, precision=case.precision), **options)


def _loop(case: Case, cls: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """A piece: our PGD, with `cls` as the way from images to their CLS tokens (B, D)."""

    def contender(model: TaskModel, x: Tensor, label: Tensor, start: Tensor, attack: Attack) -> Tensor:
        def loss(adv: Tensor, t: int) -> Tensor:
            return attacks.margin(model.head.linear(cls(adv)).float(), label)

        return attacks.pgd(x, loss, attack, start, case.precision)

    return _piece(case, contender)


def frozen_weights(case: Case, repeats: int) -> list[Row]:
    """The plain loop with and without gradients of the weights."""
    pieces = {
        name: _piece(case, partial(bench.plain, trainable=trainable))
        for name, trainable in (("frozen", False), ("trainable", True))
    }
    return _rows(case, "weights", "trainable", _speeds(case, pieces, repeats))


def last_block(case: Case, repeats: int) -> list[Row]:
    """Encoder.cls against Encoder.forward."""
    encoder, names = case.model.encoder, ("last block", "CLS token only", "all tokens")
    if not vit.plain(encoder.backbone):
        return _left_out(case, *names, "not a vision transformer of standard blocks: both are the same")
    pieces = {names[1]: _loop(case, encoder.cls), names[2]: _loop(case, lambda x: encoder(x)[0])}
    return _rows(case, names[0], names[2], _speeds(case, pieces, repeats))


def patch_embedding(case: Case, repeats: int) -> list[Row]:
    """Patches embedded by a matrix product, forward and backward, against timm's convolution."""
    encoder, names = case.model.encoder, ("patch embedding", "matrix product", "convolution")
    backbone = encoder.backbone
    if not vit.plain(backbone) or type(backbone.patch_embed) is not timm.layers.PatchEmbed:
        return _left_out(case, *names, "its stem is another one: both are the same")
    embed, x = backbone.patch_embed, case.x.clone().requires_grad_()

    def gradient(tokens: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(tokens(x).sum(), x)[0]

    pieces = {names[1]: partial(gradient, partial(vit.patches, embed)), names[2]: partial(gradient, embed)}
    note = "forward and backward of the embedding alone"
    return _rows(case, names[0], names[2], _speeds(case, pieces, repeats, len(x)), "images/s", note)


def bf16(case: Case, repeats: int) -> list[Row]:
    """Steps in bf16 against fp32: timed where the device has instructions for it; its strength in any case."""
    kinds = {name: partial(bench.ours, precision=name) for name in ("bf16", "fp32")}
    fast = compute.fast_bf16(case.device)
    few = slice(0, len(case.x) if fast else 4)  # elsewhere it is emulated
    found = {name: bench.strength(case, bench.attack_case(case, f, "task", few), "task") for name, f in kinds.items()}
    words = "; ".join(
        f"{name}: accuracy {s['accuracy']:.2f}, cross-entropy {s['loss']:.3f} ± {s['loss_se']:.3f}"
        for name, s in found.items()
    )
    words = f"on {min(len(case.x), few.stop)} images {words}"
    if not fast:
        why = "not timed: this device has no matrix instructions for bf16 (auto is fp32) and emulates it"
        return _left_out(case, "precision", "bf16", "fp32", f"{why}; {words}")
    pieces = {name: _piece(case, f) for name, f in kinds.items()}
    return _rows(case, "precision", "fp32", _speeds(case, pieces, repeats), note=words)


def fused_attention(case: Case, repeats: int) -> list[Row]:
    """Scaled dot product attention in one operation, against its explicit products and softmax."""
    modules = [m for m in case.model.encoder.modules() if hasattr(m, "fused_attn")]
    names = ("attention", "fused (SDPA)", "explicit")
    if not modules:
        return _left_out(case, *names, "it has no attention of timm's")
    whole = _own(case)

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
    pieces = {str(b): _own(case, batch=b) for b in sizes}
    return _rows(case, "batch", "1", _speeds(case, pieces, repeats), note=f"the package chooses {chosen}")


def finished_images(case: Case, repeats: int) -> list[Row]:
    """stop_when_broken: images whose class is surely lost leave the batch; with it the accuracy must be the same."""
    steps = 4 * SHORT
    kinds, images = {"leave the batch": True, "stay": False}, {}

    def attacked(name: str) -> None:
        attack = case.attack.model_copy(update={"steps": steps, "stop_when_broken": kinds[name]})
        ids = [case.ids[i : i + case.batch] for i in range(0, len(case.ids), case.batch)]
        parts = zip(case.x.split(case.batch), case.label.split(case.batch), ids, strict=True)
        images[name] = torch.cat(
            [attacks.attacked("task", case.model, *part, attack, case.seed, case.precision) for part in parts]
        )

    rates = _speeds(case, {name: partial(attacked, name) for name in kinds}, repeats, len(case.x) * steps)
    words = " and ".join(f"{bench.strength(case, images[name], 'task')['accuracy']:.2f}" for name in kinds)
    return _rows(case, "broken images", "stay", rates, note=f"{steps} steps asked for; accuracy {words}")


def cached_tokens(case: Case, repeats: int) -> list[Row]:
    """A linear head trained on tokens that are kept, against encoding the images in every epoch."""
    subset = bench.scenes(len(case.x), case.size, case.seed)
    encoder = case.model.encoder

    def encoded() -> Iterator[tuple[Tensor, ...]]:
        return heads.encoded(encoder, subset, case.batch, case.device)

    def train(keep: bool) -> None:
        head = heads.ClassificationHead(encoder.dim, bench.CLASSES).to(case.device)
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
    head = heads.SegmentationHead(encoder.dim, bench.CLASSES).to(case.device)
    model = TaskModel("segmentation", encoder, head, 2 / 3)
    x = F.interpolate(case.x[:2], size=(side, side), mode="bilinear").clamp(0, 1)
    start, attack = (x + case.attack.eps).clamp(max=1), case.attack.model_copy(update={"steps": 1})

    def together(size: int) -> None:
        for part, begin in zip(x.split(size), start.split(size), strict=True):
            bench.ours(model, part, None, begin, attack, case.precision)

    pieces = {f"of {len(x)} images": partial(together, len(x)), "of one image": partial(together, 1)}
    count = len(heads.window_starts(side, encoder.native, model.stride)) ** 2
    rates = _speeds(case, pieces, repeats, len(x))
    note = f"{count} windows of {encoder.native} px an image of {side} px"
    return _rows(case, "windows in a batch", "of one image", rates, note=note)


def segpgd(case: Case, repeats: int) -> list[Row]:
    """The sums of SegPGD's loss (eq. 1) with a backward of their own, against cross-entropy, argmax and autograd."""
    draw, (images, classes, side) = torch.Generator().manual_seed(case.seed), SEGMENTED
    logits = torch.randn(images, classes, side, side, generator=draw).to(case.device).requires_grad_()
    mask = torch.randint(classes, (images, side, side), generator=draw).to(case.device)

    def gradient(parts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(attacks.segpgd(parts(logits, mask), 0.25).sum(), logits)[0]

    pieces = {"own backward": partial(gradient, attacks.segpgd_parts), "autograd": partial(gradient, _plain_parts)}
    rates = _speeds(case, pieces, repeats, images)
    note = f"forward and backward of the loss alone; {images} images, {classes} classes, {side} px"
    return _rows(case, "SegPGD's loss", "autograd", rates, "images/s", note)


def _plain_parts(logits: Tensor, mask: Tensor) -> Tensor:
    """attacks.segpgd_parts as one would write it down."""
    pixel = F.cross_entropy(logits, mask, ignore_index=datasets.IGNORE, reduction="none")  # (B, H, W)
    right = logits.argmax(1) == mask
    return torch.stack([(pixel * part).mean((1, 2)) for part in (right, ~right)], 1)


def loading(case: Case, repeats: int) -> list[Row]:
    """Images that the data loading delivers a second, beside those that an attack of 20 steps takes."""
    long = 20
    with tempfile.TemporaryDirectory() as folder:
        subsets = {"scenes": bench.scenes(LOADED, case.size, case.seed)}
        subsets |= {f"{kind} files": _files(subsets["scenes"], Path(folder), kind) for kind in ("PNG", "JPEG")}
        pieces = {n: partial(_exhaust, subset, case.batch) for n, subset in subsets.items()}
        pieces["20-step attack"] = _own(case)
        times = bench.timed(pieces, repeats, case.device)
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
    most, few = min(4, len(case.x)), min(2, len(case.x))

    def peak(images: int, steps: int) -> float:
        return bench.peak_memory(_own(case, rows=slice(0, images), steps=steps, batch=images), case.device)

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
    cls = case.model.encoder.cls
    torch.compiler.reset()
    pieces = {"compiled": _loop(case, torch.compile(cls, dynamic=False)), "not compiled": _loop(case, cls)}
    once = bench.seconds(pieces["not compiled"], case.device)
    try:
        with torch._inductor.config.patch(force_disable_caches=True):  # an earlier run's work must not count
            spent = bench.seconds(pieces["compiled"], case.device) - once
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
    windows, segpgd, loading, memory,
)  # fmt: skip


def run(settings: Settings, compiled: list[str] | None = None) -> pd.DataFrame:
    """Every choice on every encoder: COLUMNS, a row for each option; a ratio above 1 favours the option.

    Units are rates (image steps or images a second), or MB, where less is better. compiled: the encoders that
    torch.compile is tried on; default: all on a GPU, the first on a CPU, where it takes minutes for large ones.
    """
    names, rows = bench.names(settings), []
    if compiled is None:
        compiled = names if records.pick_device(settings.device) == "cuda" else names[:1]
    for name in names:
        here = bench.case(settings, name)
        for choice in track((*CHOICES, *([compilation] if name in compiled else [])), desc=f"choices, {name}"):
            rows += choice(here, settings.bench.repeats)
    return pd.DataFrame(rows)[COLUMNS]
