"""How heads are trained on frozen tokens (section 4.1, appendix C); the epoch that is best on held-out images stays."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from . import compute, datasets, encoders, metrics, protocol, records
from .datasets import Subset
from .encoders import Encoder
from .heads import HEADS, TaskModel, predict, tokens, training_loss
from .parts import part
from .progress import track
from .settings import BadInput, Settings, TaskSettings, skipping
from .tasks import TASKS

# Tokens up to this many bytes are kept for all epochs: hundreds of small images fit, while 20,000 images of 518 px
# are 84 GB for DINOv2 ViT-B and would not fit any machine. Beyond it, images are encoded anew in every epoch.
CACHE = 4 * 2**30
COARSE = 128  # rows, or up to twice as many, of a target that are looked at for what a constant prediction reaches
SIDES = 2  # an image and its mirror image: all there is where a flip is the only augmentation

Batches = Iterator[tuple[Tensor, Tensor, Tensor]]  # CLS (B, D), patches (B, D, h, w), targets (B, ...)


def encoded(encoder: Encoder, subset: Subset, batch: int, device: str, precision: str = "fp32") -> Batches:
    """Frozen tokens batch by batch, in the order of the images: (CLS, patches, targets), as `tokens` of the task.

    They are computed in `precision`, see compute.steps_in, and are fp32. Where memory lacks, fewer images than `batch`
    are encoded at a time. Raises BadInput if the images differ in size or a token is not finite.
    """
    shapes, size = set(), batch
    for _, images, targets in datasets.batches(subset, batch, device):

        def part(rows: slice, images: Tensor = images) -> tuple[Tensor, Tensor]:
            with compute.steps_in(precision, device):
                cls, patches = tokens(encoder, images[rows], subset.task)
            return cls.float(), patches.float()

        with torch.no_grad():
            made, size = compute.in_parts(part, len(images), size)
        shapes.add((images.shape[1:], targets.shape[1:]))
        if len(shapes) > 1:
            raise BadInput(f"The images of {subset.name} differ in size; set 'size' of the task to one they share.")
        if not all(part.isfinite().all() for part in made):
            raise BadInput(
                f"Encoder '{encoder.name}' gives tokens that are not finite on {subset.name}; check its weights and "
                f"its normalisation."
            )
        yield *made, targets


def features(
    encoder: Encoder, subset: Subset, batch: int, device: str, precision: str = "fp32"
) -> tuple[Tensor, Tensor, Tensor]:
    """Frozen tokens of all images in main memory: CLS (N, D), patches (N, D, h, w), targets (N, ...); see encoded."""
    rows = ((part.cpu() for part in row) for row in encoded(encoder, subset, batch, device, precision))
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def token_bytes(encoder: Encoder, subset: Subset, device: str) -> int:
    """Bytes that `features` of the subset takes, reckoned from its first image."""
    (first,) = encoded(encoder, _ordered(subset, [0]), 1, device)
    return len(subset) * sum(part.nbytes for part in first)


def _ordered(subset: Subset, order: list[int]) -> Subset:
    """The images of `subset` in another order, or some of them."""
    chosen = copy.copy(subset)
    chosen.items, chosen.ids = ([column[i] for i in order] for column in (subset.items, subset.ids))
    return chosen


def make_optimizer(task: str, head: nn.Module, section: TaskSettings) -> torch.optim.Optimizer:
    """Adam for classification, AdamW for the dense tasks (section 4.1)."""
    kind = torch.optim.Adam if task == "classification" else torch.optim.AdamW
    return kind(head.parameters(), lr=section.lr, weight_decay=section.weight_decay)


def fit(
    task: str, encoder: Encoder, train: Subset, val: Subset, section: TaskSettings, seed: int, device: str
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train one head on frozen tokens and keep the epoch that is best on `val` (held out of train).

    Returns the head and its history: epoch, training loss, metric on the held-out images. Each epoch draws anew which
    side of an image it trains on; in segmentation, which of its `section.views` augmented copies. Tokens that serve
    once, or that take more memory than CACHE, are made when they are needed, which changes at most rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = HEADS[task](encoder.dim, len(train.classes)).to(device)
    optimizer = make_optimizer(task, head, section)
    training, held_out = token_sources(encoder, train, val, section, device)
    best, best_state, history = -math.inf, head.state_dict(), []
    for epoch in track(range(section.epochs), desc=f"{task} head on {train.name}"):
        train.view = epoch % getattr(section, "views", section.epochs)
        order = _order(len(train), section.batch, seed + epoch)
        loss = _epoch(task, head.train(), encoder, optimizer, training(order, section.batch))
        if not math.isfinite(loss):
            raise BadInput(
                f"The {task} head of '{encoder.name}' on {train.name} diverged in epoch {epoch + 1} (loss {loss}); "
                f"lower {task}.lr, which is {section.lr:g}."
            )
        score = _held_out_metric(task, head.eval(), encoder, held_out(range(len(val)), 64), len(train.classes))
        history.append({"epoch": epoch + 1, "loss": loss, "held_out": score})
        gain = TASKS[task].sign * score
        if gain > best:
            best, best_state = gain, {k: v.clone() for k, v in head.state_dict().items()}
    head.load_state_dict(best_state)
    return head.eval(), history


Source = Callable[[list[int], int], Batches]  # (order of the images, batch) -> their tokens


def kept(bytes_train: float, bytes_val: float, section: TaskSettings) -> tuple[bool, bool]:
    """Whether tokens of the training images (bytes of one copy) and of the held-out ones stay in CACHE."""
    keep_val = bytes_val <= CACHE
    room = CACHE - bytes_val * keep_val
    return copies(section) < section.epochs and bytes_train * copies(section) <= room, keep_val


def copies(section: TaskSettings) -> int:
    """Augmented copies of a training image that can be kept: the views of segmentation, else its two sides."""
    return getattr(section, "views", SIDES)


def token_sources(
    encoder: Encoder, train: Subset, val: Subset, section: TaskSettings, device: str
) -> tuple[Source, Source]:
    """Where training and held-out tokens come from: memory if CACHE has room for them, else the encoder."""
    subsets = (train, val)
    keep = kept(*(token_bytes(encoder, subset, device) for subset in subsets), section)
    sources = []
    for subset, keeps in zip(subsets, keep, strict=True):
        about = _encoded_at_once(encoder, subset, section, device), device, section.tokens
        sources.append((_kept if keeps else _streamed)(encoder, subset, *about))
    return tuple(sources)


def _encoded_at_once(encoder: Encoder, subset: Subset, section: TaskSettings, device: str) -> int:
    """Images of `subset` that are encoded at a time."""
    size = subset[0][0].shape[-2:]
    return compute.batch_for(compute.tokens_of(encoder.patch, size), device, section.attack_batch)


def _kept(encoder: Encoder, subset: Subset, batch: int, device: str, precision: str = "fp32") -> Source:
    """Tokens of every view or of both sides, encoded `batch` images at a time when first asked for, in main memory."""

    @cache
    def made(view: int, flip: bool) -> tuple[Tensor, ...]:
        shown = copy.copy(subset)
        shown.view, shown.flip = view, flip
        return features(encoder, shown, batch, device, precision)

    def source(order: list[int], size: int) -> Batches:
        drawn = subset.flip is None
        sides = [made(0, False), made(0, True)] if drawn else [made(subset.view, subset.flip)] * 2
        for chosen in torch.as_tensor(order).split(size):
            mirrored = torch.tensor([drawn and subset.flipped(i) for i in chosen.tolist()])
            rows, others = ([column[chosen] for column in side] for side in sides)
            for column, other in zip(rows, others, strict=True):
                column[mirrored] = other[mirrored]
            yield tuple(column.to(device) for column in rows)

    return source


def _streamed(encoder: Encoder, subset: Subset, batch: int, device: str, precision: str = "fp32") -> Source:
    """Tokens encoded `batch` images at a time whenever they are asked for."""
    return lambda order, size: _regrouped(encoded(encoder, _ordered(subset, order), batch, device, precision), size)


def _regrouped(rows: Batches, size: int) -> Batches:
    """The same rows in batches of `size`; the last may be smaller."""
    waiting: list[tuple[Tensor, ...]] = []
    for row in rows:
        joined = tuple(torch.cat(column) for column in zip(*waiting, row, strict=True))
        *whole, rest = zip(*(part.split(size) for part in joined), strict=True)
        yield from whole
        waiting = [rest]
    yield from waiting


def _order(n: int, batch: int, seed: int) -> list[int]:
    """The order of `n` images in one epoch, drawn from `seed`; a last batch of one is too few for batch norm."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:-1] if n % batch == 1 < min(batch, n) else order


def _epoch(task: str, head: nn.Module, encoder: Encoder, optimizer: torch.optim.Optimizer, batches: Batches) -> float:
    """One pass over the training tokens; the mean loss."""
    losses = []
    for cls, patches, target in batches:
        loss = training_loss(task, predict(head, encoder, cls, patches, target.shape[-2:]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


@torch.no_grad()
def _held_out_metric(task: str, head: nn.Module, encoder: Encoder, batches: Batches, classes: int) -> float:
    """Metric on the tokens of the held-out images."""
    stats = [
        metrics.statistics(task, predict(head, encoder, cls, patches, target.shape[-2:]), target, classes)
        for cls, patches, target in batches
    ]
    return metrics.value(task, torch.cat(stats))


def fitted(
    task: str, dataset: str, encoder: Encoder, settings: Settings, defense: str = "standard"
) -> tuple[TaskModel, list[dict[str, float]]]:
    """The model of one table row: its head is read from disk if it was made from exactly these inputs, else trained.

    Returns the model and the head's history (see fit). Raises BadInput if the data set is missing.
    """
    settings = protocol.adjusted(settings, encoder.native)
    section, device = settings.task(task), records.pick_device(settings.device)
    train, val, path, made = sources(task, dataset, encoder, settings, defense)
    found = records.reusable_tensors(path, made)
    if found is None:
        part("trust.data").remarks(task, dataset, settings)  # refuses what cannot be meant
        chances = _chances(train, settings)
        head, history = fit(task, encoder.to(device), train, val, section, settings.seed, device)
        more = {"history": json.dumps(history), "chances": json.dumps(chances)}
        records.write_tensors(head.state_dict(), records.about(made) | more, path)
    else:
        history, chances = (json.loads(found[1][name]) for name in ("history", "chances"))
        head = HEADS[task](encoder.dim, len(train.classes))
        head.load_state_dict(found[0])
        if protocol.active(settings) and len(chances) == 1:  # those of a head of the paper's protocol
            chances = _chances(train, settings)
    stride = getattr(section, "stride", 1.0)
    model = TaskModel(task, encoder.to(device), head.to(device), stride, protocol.active(settings), chances)
    model.trained = len(train), datasets.asked(task, dataset, settings)
    return model, history


def sources(
    task: str, dataset: str, encoder: Encoder, settings: Settings, defense: str
) -> tuple[Subset, Subset, Path, records.Made]:
    """What a head is trained on and selected by, its file, and what it is made from; which images, hashes say.

    The file holds weights, and as metadata what they were made from, their history and their chances.
    """
    settings = protocol.adjusted(settings, encoder.native)
    section, aside = settings.task(task), {"datasets", "n_train", "n_val", "n_test", "attack_batch", "stride", "crop"}
    aside |= {"tokens"} if section.tokens == "fp32" else set()  # keys are older than this choice
    train, val = (datasets.load(task, dataset, split, settings, encoder.native) for split in ("train", "val"))
    made = records.made_from(
        ["data", "encoders", "heads", "training", "metrics"],
        task=task,
        settings=section.model_dump(exclude=aside),
        seed=settings.seed,
        hashes={"weights": encoder.hash, "training data": train.hash, "held-out data": val.hash},
    )
    name = f"{task}__{dataset}__{encoder.name}__{defense}"
    return train, val, records.place(records.runs_dir(settings.profile) / "heads", name, made, ".safetensors"), made


def _chances(train: Subset, settings: Settings) -> dict[str, float]:
    """What the best constant prediction reaches on the training targets; see released.chances."""
    names, targets = protocol.active(settings), training_targets(train)
    paper = {} if names else {"": metrics.constant_value(train.task, targets, len(train.classes))}
    return protocol.ask(names, "chances", paper, train.task, targets, train.classes)


def training_targets(train: Subset) -> list[Tensor]:
    """What a constant prediction can know: the labels, or every few pixels of evenly spread masks or depth maps.

    They are as stored, before any resizing and augmentation.
    """
    if train.task == "classification":
        return [torch.tensor([item.target for item in train.items])]
    found = (train.read(i)[1] for i in datasets.spread(range(len(train))))
    steps = ((t, max(1, len(t) // COARSE)) for t in found)
    return [t[::step, ::step].clone() for t, step in steps]  # a view would keep the whole one in memory


def fit_all(settings: Settings) -> pd.DataFrame:
    """Heads of all encoders (Standard), tasks and data sets, read or trained: one row each with its held-out metric.

    With missing: skip, rows that cannot be trained are left out and listed in results/<profile>/heads/skipped.json.
    """
    rows, lost = [], []
    wanted = [(t, d) for t in TASKS if getattr(settings, t) for d in settings.task(t).datasets]
    for row in (r for r in settings.encoders if "standard" in r.defenses):
        names = [{"task": t, "dataset": d, "encoder": row.name, "defense": "standard"} for t, d in wanted]
        with skipping(settings, lost, names):
            encoder = encoders.load(row, settings.data_root)
            for name in names:
                with skipping(settings, lost, [name]):
                    task, dataset = name["task"], name["dataset"]
                    history = fitted(task, dataset, encoder, settings)[1]
                    best = max(history, key=lambda h, sign=TASKS[task].sign: sign * h["held_out"])
                    losses = [history[i]["loss"] for i in (0, -1)]
                    rows.append([task, dataset, row.name, TASKS[task].metric, best["epoch"], best["held_out"], *losses])
    records.write_skipped(settings.profile, "heads", lost)
    columns = ["task", "dataset", "encoder", "metric", "epoch", "held_out", "first_loss", "last_loss"]
    return pd.DataFrame(rows, columns=columns)
