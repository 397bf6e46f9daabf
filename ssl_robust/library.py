"""The benchmark's four steps for a script of one's own: load an encoder, fit a head, attack images, score the model.

    from ssl_robust import attack, fit_head, load_encoder, score

Images are tensors (N, 3, H, W), uint8 or floats in [0,1], of one size, which is the size that they are used at. Targets
are classes (N,), masks (N, H, W) of classes and 255 (ignored), or depth maps (N, H, W) in metres whose 0 is invalid.
Both come as a pair, or as anything that gives such pairs batch by batch, a DataLoader for example. Heads are trained
and models scored on images of 8 bits. Nothing is written to disk.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from . import attacks, compute, datasets, encoders, evaluate, metrics, records, training
from .datasets import IGNORE, Subset
from .encoders import Encoder
from .heads import TaskModel
from .items import Item
from .settings import BadInput, EncoderRow, Settings, check
from .tasks import TASKS

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
HEADS = {  # what suffices for a few hundred images
    "classification": {"epochs": 30, "batch": 64, "lr": 0.003},
    "segmentation": {"epochs": 8, "batch": 16, "lr": 0.003, "weight_decay": 0.001},
    "depth": {"epochs": 8, "batch": 16, "lr": 0.01, "weight_decay": 0.01},
}


def load_encoder(what: str | nn.Module, name: str = "", device: str = "auto", **row: Any) -> Encoder:
    """A frozen encoder, by its name (encoders.KNOWN, or timm's) or from a module of yours: images -> (cls, patches).

    `row`: what an encoder's row in a parameter file may say besides, e.g. checkpoint, native or normalise. A module
    gets normalised images (by default as they are) and gives (B, D) and (B, D, h, w). Raises BadInput if there are no
    such weights, or if a module is no encoder that can be attacked.
    """
    device = records.pick_device(device)
    if not isinstance(what, str):
        row |= {"name": name or type(what).__name__, "call": "a module in memory"}
        return encoders.own(EncoderRow(**row), what.cpu()).to(device)
    row |= {"name": name or what, "timm": what}
    return encoders.load(_settings(encoders=[row]).encoders[0]).to(device)


def fit_head(
    encoder: Encoder, data: Data, task: str, held_out: Data | None = None, classes: int = 0, seed: int = 0, **head: Any
) -> TaskModel:
    """A model of `task` on frozen tokens: its linear head is trained, its epoch selected on `held_out` (section 4.1).

    By default every fifth image is held out. `head`: what a task's section of a parameter file may say, e.g. epochs,
    batch or lr. classes: by default the largest label that occurs, and one. Raises BadInput for an unknown task, a bad
    setting or targets that do not fit.
    """
    if task not in TASKS:
        raise BadInput(f"There is no task '{task}'; choose one of: {', '.join(TASKS)}.")
    section = _settings(**{task: HEADS[task] | head}).task(task)
    images, targets = _pair(data)
    if held_out is None:
        chosen = torch.arange(len(images)) % 5 == 4
        held_out, images, targets = (images[chosen], targets[chosen]), images[~chosen], targets[~chosen]
    classes = classes or int(targets[targets != IGNORE].max()) + 1
    train, val = _subset((images, targets), task, classes), _subset(held_out, task, classes)
    if task == "segmentation":  # as by datasets.transform: crops of the window
        sides = [min(side, encoder.native) for side in images.shape[-2:]]
        train.transform = v2.Compose([v2.RandomCrop(sides), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
    train.flip, train.seed = None if task in datasets.FLIPPED else False, seed
    trained, _ = training.fit(task, encoder, train, val, section, seed, encoder.mean.device.type)
    chance = metrics.constant_value(task, training.training_targets(train), classes)
    return TaskModel(task, encoder, trained, getattr(section, "stride", 1.0), chances={"": chance})


def attack(
    model: TaskModel, x: Tensor, target: Tensor, name: str = "task", seed: int = 0, precision: str = "auto", **ball: Any
) -> Tensor:
    """Images (B, 3, H, W) in [0,1] under an attack: 'embed', 'task', or of ssl_robust/strong; section 3.1.

    `ball`: eps ('8/255'), step ('2/255') and steps (20). Raises BadInput for an unknown attack or a bad setting.
    """
    made, device = _settings(attack=ball).attack, model.encoder.mean.device
    ids = [str(i) for i in range(len(x))]
    precision = compute.precision(precision, device.type)
    return attacks.attacked(name, model, x.to(device), target.to(device), ids, made, seed, precision)


def score(
    model: TaskModel, data: Data, attack: str = "clean", seed: int = 0, precision: str = "auto", **ball: Any
) -> dict[str, Any]:
    """The number of a table's cell, as notebooks make it: "value" in the task's metric, its standard error "se", "n",
    "chance" (what a constant prediction reaches), "max_perturbation", and the attack's "health".

    attack, ball: as in `attack`, or 'clean'. Raises BadInput as it does.
    """
    task, names = model.task, dict.fromkeys(["embed", "task", *[attack] * (attack != "clean")])
    about = {"attacks": [*names], "attack": ball, "seed": seed, "precision": precision, task: HEADS[task]}
    settings = _settings(device=model.encoder.mean.device.type, **about)
    classes = sum(len(last.weight) for last in model.head.modules() if isinstance(last, nn.Linear | nn.Conv2d))
    return evaluate.Cell(model, _subset(data, task, classes), attack, settings).measured()[0]


def _settings(**parameters: Any) -> Settings:
    return check(**{"profile": "library", "encoders": [{"name": "own"}], **parameters})


def _pair(data: Data) -> tuple[Tensor, Tensor]:
    """All images, uint8, and targets; BadInput unless they belong together."""
    pair = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor)
    images, targets = (part.cpu() for part in (data if pair else map(torch.cat, zip(*data, strict=True))))
    if images.is_floating_point():
        if images.min() < 0 or images.max() > 1:
            raise BadInput("Images must be uint8 or floats in [0,1]; undo any normalisation, encoders have their own.")
        images = (255 * images).round().to(torch.uint8)
    if images.shape[1:2] != (3,) or len(images) != len(targets):
        shapes = f"{tuple(images.shape)} and {tuple(targets.shape)}"
        raise BadInput(f"Images and targets have the shapes {shapes}; give (N, 3, H, W) and N targets.")
    return images, targets


def _subset(data: Data, task: str, classes: int) -> Subset:
    """A data set in memory, its images numbered; BadInput for labels that are no classes."""
    images, targets = _pair(data)
    wrong = (targets[targets != IGNORE] if task == "segmentation" else targets).long()
    if task != "depth" and len(wrong) and not 0 <= int(wrong.min()) <= int(wrong.max()) < classes:
        raise BadInput(f"Targets go from {int(wrong.min())} to {int(wrong.max())}, classes from 0 to {classes - 1}.")
    labels = targets.tolist() if task == "classification" else targets
    items = [Item(str(i), *pair) for i, pair in enumerate(zip(images, labels, strict=True))]
    return Subset("data", task, items, lambda *pair: pair, classes=tuple(map(str, range(classes))))
