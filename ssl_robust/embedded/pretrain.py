"""Pretraining of the embedded encoder without labels, by multi-view contrast.

Images are uint8 (N, 3, H, W); views are float (B, 3, s, s) in [0, 1] until `normalise`. Everything that one step draws
comes from a generator seeded by (seed, step), so a run that was killed and taken up again draws what it would have.
"""

import copy
import io
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from .. import compute, datasets, heads, metrics, records, training
from ..encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder
from ..items import file_of
from ..parts import part
from ..progress import track
from ..settings import BadInput, check
from ..tasks import TASKS
from . import scenes
from .backbone import embedded_backbone

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in luminance
SCENES_SHARE = 0.25  # of every batch, where there are photographs too
EMA = 0.003  # of the way that the average of the weights goes towards the newest at each step
SAVE_SECONDS = 60.0  # a killed run loses at most this


# --- data ---


def training_images(data_root: str, n_scenes: int) -> dict[str, Tensor]:
    """What to pretrain on, by name, uint8 (N, 3, 64, 64): `n_scenes` rendered scenes, and Tiny-ImageNet's training
    images if a data folder is given, BadInput if they are not in it.
    """
    pools = {}
    if data_root:
        items = datasets.list_items("tiny_imagenet", "deacl", "train", 0, data_root)
        items.sort(key=lambda item: (str(file_of(item.image)), item.id))  # as the shipped weights saw them
        read = (datasets.read(item, "deacl")[0].as_subclass(Tensor) for item in track(items, desc="tiny_imagenet"))
        pools["tiny-imagenet"] = torch.stack([*read])
    if n_scenes:
        pools["scenes"] = scenes.cached(records.ROOT / "runs" / "scenes", "train", n_scenes, progress=track).images
    return pools


def draw(pools: dict[str, Tensor], batch: int, rng: torch.Generator) -> Tensor:
    """A batch uint8 (B, 3, H, W) drawn from all pools, SCENES_SHARE of it scenes where there are photographs too."""
    few = round(batch * SCENES_SHARE) if len(pools) > 1 else batch
    counts = [few if name == "scenes" or len(pools) == 1 else batch - few for name in pools]
    chosen = [p[torch.randint(len(p), (n,), generator=rng)] for p, n in zip(pools.values(), counts, strict=True)]
    return torch.cat(chosen)


# --- augmentation ---


class View(NamedTuple):
    """One crop of every image: pixels (B, 3, s, s) and the affine map (B, 2, 2) [centre, half extent] it was cut by."""

    pixels: Tensor
    box: Tensor


def random_boxes(batch: int, scale: tuple[float, float], rng: torch.Generator) -> Tensor:
    """Crop boxes (B, 2, 2): centre (x, y) and half extent (x, y) in [-1, 1]; a negative x extent is a flip."""
    area = torch.empty(batch, 1).uniform_(*scale, generator=rng)
    log_ratio = torch.empty(batch, 1).uniform_(-math.log(4 / 3), math.log(4 / 3), generator=rng)
    half = torch.cat([area.sqrt() * (log_ratio / 2).exp(), area.sqrt() * (-log_ratio / 2).exp()], 1).clamp(max=1)
    centre = (torch.rand(batch, 2, generator=rng) * 2 - 1) * (1 - half)
    half[:, 0] *= torch.randint(0, 2, (batch,), generator=rng) * 2 - 1
    return torch.stack([centre, half], 1)


def colour_matrices(batch: int, strength: float, grey_share: float, rng: torch.Generator) -> Tensor:
    """Random colour maps (B, 3, 3): brightness and saturation in 1 +- strength, hue +- strength / 3 rad; some grey.

    Milder than usual: colour tells the downstream categories apart. Not milder still: two crops of one image would
    be matched by the colour of their background alone.
    """
    bright, saturate, hue = (torch.rand(3, batch, 1, 1, generator=rng) * 2 - 1) * strength
    keep = (torch.rand(batch, 1, 1, generator=rng) >= grey_share).float()
    grey = torch.tensor(GREY).expand(3, 3)
    # rotation about the grey axis by a small angle, to first order: the cross-product matrix of (1, 1, 1) / sqrt(3)
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return (1 + bright) * (grey + keep * ((1 + saturate) * (torch.eye(3) - grey) + hue / 3 * turn))


def jitter(pixels: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Colour-jittered pixels (B, 3, s, s), still in [0, 1]: contrast about the mean, then a random colour matrix."""
    colour = colour_matrices(len(pixels), strength, 0.15, rng).to(pixels)
    contrast = 1 + (torch.rand(len(pixels), 1, 1, 1, generator=rng).to(pixels) * 2 - 1) * strength
    pixels = pixels * contrast + pixels.mean((1, 2, 3), keepdim=True) * (1 - contrast)
    return (colour @ pixels.flatten(2)).view_as(pixels).clamp(0, 1)


def cut(images: Tensor, box: Tensor, size: int) -> Tensor:
    """The part of every image (B, 3, H, W) inside its box (B, 2, 2), resampled to (B, 3, size, size)."""
    theta = torch.cat([box[:, 1].diag_embed(), box[:, 0, :, None]], 2)  # (B, 2, 3)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def crop(images: Tensor, size: int, scale: tuple[float, float], rng: torch.Generator) -> View:
    """One random resized, flipped, jittered crop of each image (B, 3, H, W) in [0, 1]; `scale` is the area's range."""
    box = random_boxes(len(images), scale, rng).to(images)
    return View(jitter(cut(images, box, size), 0.5, rng), box)


def multi_crop(
    images: Tensor, rng: torch.Generator, global_px: int = 40, local_px: int = 32, n_local: int = 2
) -> list[View]:
    """Two global crops (30-100 % of the area), then `n_local` local crops (10-50 %), of uint8 images (B, 3, H, W)."""
    images = images.float() / 255
    views = [crop(images, global_px, (0.3, 1.0), rng) for _ in range(2)]
    return views + [crop(images, local_px, (0.1, 0.5), rng) for _ in range(n_local)]


def normalise(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, s, s) in [0, 1] to what the backbone expects, in channels_last order."""
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


# --- losses ---


def contrastive_loss(z: Tensor, temperature: float = 0.15) -> Tensor:
    """Decoupled multi-view InfoNCE of unit vectors z (V, B, D): V views of B images, every pair of views a positive.

    Decoupled: the positive is left out of the denominator, which keeps the gradient large in small batches.
    """
    views, batch, _ = z.shape
    similarity = z.flatten(0, 1) @ z.flatten(0, 1).T / temperature  # (V*B, V*B)
    image = torch.arange(batch, device=z.device).repeat(views)
    same = image[:, None] == image
    negatives = similarity.masked_fill(same, -math.inf).logsumexp(1)
    positives = (similarity * same).sum(1) - similarity.diagonal()
    return (negatives - positives / (views - 1)).mean()


def shared_points(a: Tensor, b: Tensor, points: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random image points that both boxes (B, 2, 2) show, in each view's own [-1, 1] coordinates: (B, K, 2) twice;
    the middle of the gap for the rare pair of boxes that do not meet."""
    low = torch.maximum(a[:, 0] - a[:, 1].abs(), b[:, 0] - b[:, 1].abs())
    high = torch.minimum(a[:, 0] + a[:, 1].abs(), b[:, 0] + b[:, 1].abs())
    share = torch.rand(len(a), points, 2, generator=rng).to(a) - 0.5
    where = ((low + high) / 2)[:, None] + share * (high - low).clamp(min=0)[:, None]
    inside_a, inside_b = ((where - box[:, :1]) / box[:, 1:] for box in (a, b))
    return inside_a, inside_b


def tokens_at(tokens: Tensor, points: Tensor) -> Tensor:
    """Patch tokens (B, g*g, D) interpolated at points (B, K, 2) in [-1, 1]: (B, K, D)."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    sampled = F.grid_sample(grid, points[:, :, None], padding_mode="border", align_corners=False)  # (B, D, K, 1)
    return sampled.squeeze(3).transpose(1, 2)


def projector(dim_in: int, hidden: int, dim_out: int) -> nn.Sequential:
    """Two-layer head with batch norm; thrown away after pretraining."""
    return nn.Sequential(
        nn.Linear(dim_in, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim_out)
    )


class Contrastive(nn.Module):
    """Multi-view contrastive learning on CLS, on the mean patch token, and on patch tokens of the same image point."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        dim = backbone.embed_dim
        self.backbone, self.average = backbone, copy.deepcopy(backbone).requires_grad_(False)
        self.cls_head, self.pool_head = projector(dim, 512, 128), projector(dim, 512, 128)
        self.point_head = projector(dim, 256, 64)

    def forward(self, views: list[View], rng: torch.Generator) -> dict[str, Tensor]:
        """Loss terms of one batch; views[0] and views[1] are the global ones."""
        tokens = [self.backbone.forward_features(normalise(v.pixels)) for v in views]  # each (B, 1 + g*g, D)
        cls = self.cls_head(torch.cat([t[:, 0] for t in tokens]))
        pool = self.pool_head(torch.cat([t[:, 1:].mean(1) for t in tokens]))
        cls, pool = (F.normalize(z, dim=1).view(len(views), -1, 128) for z in (cls, pool))
        points = shared_points(views[0].box, views[1].box, 4, rng)
        local = torch.cat([tokens_at(t[:, 1:], p).flatten(0, 1) for t, p in zip(tokens, points, strict=False)])
        local = F.normalize(self.point_head(local), dim=1).view(2, -1, 64)
        return {
            "cls": contrastive_loss(cls),
            "pool": 0.5 * contrastive_loss(pool),
            "point": 0.5 * contrastive_loss(local),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Running average of the weights: smoother features than the last iterate."""
        for average, now in zip(self.average.parameters(), self.backbone.parameters(), strict=True):
            average.lerp_(now.detach(), EMA)


# --- training ---


def learning_rate(progress: float, peak: float, warm_up: float = 0.03) -> float:
    """Linear warm-up over the first 3 % of the run, then a cosine to zero; `progress` in [0, 1]."""
    if progress < warm_up:
        return peak * (progress + 1e-3) / warm_up
    return peak * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up))) / 2


def global_size(progress: float) -> int:
    """Pixels of the global crops: small ones first, as they cost less than half, and the full size towards the end."""
    return 40 if progress < 0.85 else 64


def optimiser(learner: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW on what is trained; no weight decay on biases, norms and embeddings."""
    named = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if p.ndim > 1 and not n.endswith(("pos_embed", "cls_token"))]
    plain = [p for n, p in named if p.ndim <= 1 or n.endswith(("pos_embed", "cls_token"))]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def train_step(
    learner: nn.Module, adam: torch.optim.AdamW, images: Tensor, done: float, rng: torch.Generator,
    precision: str = "fp32",
) -> dict[str, float]:  # fmt: skip
    """One update on uint8 images (B, 3, H, W) at progress `done`, in `precision` (fp32 or bf16); the loss terms.

    Raises BadInput if the loss is not finite.
    """
    views = multi_crop(images, rng, global_px=global_size(done))
    with compute.steps_in(precision, images.device):
        losses = learner(views, rng)
    total = torch.stack(list(losses.values())).sum()
    if not total.isfinite():
        raise BadInput(f"The pretraining loss is {total.item()} after {done:.0%} of the run; choose a smaller lr.")
    adam.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_([p for p in learner.parameters() if p.requires_grad], 3.0)
    adam.step()
    learner.after_step()
    return {name: value.item() for name, value in losses.items()}


@dataclass
class Run:
    """A pretraining run that can be saved after any step and taken up again."""

    learner: nn.Module
    adam: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write everything to `path`, whole or not at all."""
        state = {**vars(self), "learner": self.learner.state_dict(), "adam": self.adam.state_dict()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        records.write_sealed(buffer.getvalue(), path)

    def resume(self, path: Path, device: str) -> None:
        """Go on from `path`; raises BadInput if it is damaged."""
        content = records.read_sealed(path)
        if content is None:
            raise BadInput(f"The checkpoint {path} is damaged; delete it to start anew.")
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]


def new_run(lr: float, seed: int, device: str, start: str | Path = "") -> Run:
    """A run at step 0, initialised by `seed`, the backbone by the weights in the file `start` if one is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = embedded_backbone()
        if start:
            formats, path = part("formats.checkpoints"), Path(start)
            formats.load_weights(backbone, formats.recognise(formats.read(path), path)[0], f"the start ({path.name})")
        learner = Contrastive(backbone)
    learner = learner.to(device, memory_format=torch.channels_last).train()
    return Run(learner, optimiser(learner, lr))


def pretrain(
    pools: dict[str, Tensor], *, checkpoint: Path, minutes: float | None = None, epochs: float | None = None,
    batch: int = 256, lr: float = 1e-3, seed: int = 0, device: str = "cpu", precision: str = "fp32",
    start: str | Path = "", progress: Callable[[Run], None] | None = None, stop_after: int | None = None,
) -> tuple[nn.Module, list[dict]]:  # fmt: skip
    """Train the embedded architecture on pools of images (see `training_images`); goes on from `checkpoint` if it is.

    The run is `minutes` or `epochs` long, whichever is given, in `precision` (fp32 or bf16), from the weights in the
    file `start` if one is given. Once a minute the checkpoint is written, a line added to
    the history (seconds, images seen, progress in [0, 1], mean of each loss term) and `progress` called. `stop_after`
    steps the run is left where it is, as if it had been killed. Returns the averaged backbone and the history.
    """
    if (minutes is None) == (epochs is None):
        raise BadInput("The length of the run must be given either in minutes or in epochs; set the other to None.")
    run = new_run(lr, seed, device, start)
    if checkpoint.is_file():
        run.resume(checkpoint, device)
    steps = math.inf if epochs is None else max(1, round(epochs * sum(map(len, pools.values())) / batch))
    budget = math.inf if minutes is None else 60 * minutes
    begun, noted, terms = time.monotonic() - run.seconds, run.seconds, []
    stop = math.inf if stop_after is None else run.step + stop_after
    while (done := max(run.step / steps, run.seconds / budget)) < 1 and run.step < stop:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
        for group in run.adam.param_groups:
            group["lr"] = learning_rate(done, lr)
        terms.append(train_step(run.learner, run.adam, draw(pools, batch, rng).to(device), done, rng, precision))
        run.step, run.seconds = run.step + 1, time.monotonic() - begun
        if run.seconds - noted > SAVE_SECONDS or max(run.step / steps, run.seconds / budget) >= 1 or run.step == stop:
            run.history.append(entry(run, batch, done, terms))
            noted, terms = run.seconds, []
            run.save(checkpoint)
            if progress:
                progress(run)
    return run.learner.average.eval(), run.history


def entry(run: Run, batch: int, done: float, terms: list[dict]) -> dict[str, float]:
    """One line of the history: the loss terms are means over the steps since the last line."""
    means = {name: round(sum(t[name] for t in terms) / len(terms), 4) for name in terms[0]}
    return {"seconds": round(run.seconds, 1), "images": run.step * batch, "progress": round(done, 4), **means}


def report(run: Run) -> None:
    """Print the newest line of the history; a `progress` for notebooks."""
    print(", ".join(f"{name} {value:g}" for name, value in run.history[-1].items()), flush=True)


# --- what comes out ---


def save_weights(backbone: nn.Module, path: Path, **metadata: str) -> int:
    """Write the backbone as fp16 safetensors, whole or not at all, with `metadata` (text); returns the bytes."""
    state = {k: v.detach().half().cpu().contiguous() for k, v in backbone.state_dict().items()}
    data = save(state, metadata)
    records.write_bytes(data, path)
    return len(data)


# Settings of the linear heads, the same for every backbone; none was tuned on a test split.
PROBES = {
    "classification": {"epochs": 40, "batch": 64, "lr": 0.003},
    "segmentation": {"epochs": 30, "batch": 16, "lr": 0.003, "stride": 1.0},
    "depth": {"epochs": 30, "batch": 32, "lr": 0.003},
}


def linear_probe(
    backbone: nn.Module, task: str, dataset: str, data_root: str = "", split: str = "test", n_train: int = 1500,
    n_val: int = 300, n_test: int = 600, seed: int = 0,
) -> float:  # fmt: skip
    """Accuracy, mIoU or RMSE (metres) on `split` of a linear head on the frozen backbone; see training.fit.

    The head trains on `n_train` images of the train split; its epoch is selected on images held out of it.
    """
    section = {**PROBES[task], "datasets": [dataset], "n_train": n_train, "n_val": n_val, "n_test": n_test, "size": 64}
    row = {"name": "probe"}
    settings = check(profile="probe", seed=seed, data_root=data_root, counts="any", encoders=[row], **{task: section})
    encoder = Encoder(copy.deepcopy(backbone).cpu().float(), "probe", 64, IMAGENET_MEAN, IMAGENET_STD)
    train, val = (datasets.load(task, dataset, part, settings, 64) for part in ("train", "val"))
    head, _ = training.fit(task, encoder, train, val, settings.task(task), seed, "cpu")
    model = heads.TaskModel(task, encoder, head).eval()
    with torch.no_grad():
        parts = [
            metrics.statistics(task, model(images), targets, len(train.classes))
            for _, images, targets in datasets.batches(datasets.load(task, dataset, split, settings, 64), 100)
        ]
    return metrics.value(task, torch.cat(parts))


def random_backbone(seed: int = 0) -> nn.Module:
    """The same architecture without any training: what pretraining is compared with."""
    return new_run(0.0, seed, "cpu").learner.average.eval()


# Photographs on which a backbone is probed if they are there: task, training images, images that select the epoch
PHOTOS = {
    "cifar10": ("classification", 3500, 500), "cifar100": ("classification", 800, 100),
    "voc2012": ("segmentation", 250, 50),
}  # fmt: skip


def probe_table(backbones: dict[str, nn.Module], data_root: str = "", n_scenes: int = 1500) -> pd.DataFrame:
    """One row per probe, one column per backbone: the scenes' three tasks, and those PHOTOS that the data folder has.

    The heads of the scenes train on `n_scenes` images, a fifth as many select their epoch.
    """
    wanted = [(task, "scenes", n_scenes, n_scenes // 5) for task in PROBES]
    for name, (task, *counts) in PHOTOS.items() if data_root else ():
        with suppress(BadInput):
            datasets.list_items(name, task, "test", 0, data_root, "any")
            wanted.append((task, name, *counts))
    rows = []
    for task, dataset, n_train, n_val in track(wanted, desc="linear probes"):
        options = {"data_root": data_root, "n_train": n_train, "n_val": n_val}
        values = {name: linear_probe(backbone, task, dataset, **options) for name, backbone in backbones.items()}
        rows.append({"data set": dataset, "metric": TASKS[task].metric, **values})
    return pd.DataFrame(rows)
