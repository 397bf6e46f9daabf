"""Encoders, heads and data so small that the right answer can be said beforehand."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ssl_robust import attacks, records
from ssl_robust import settings as schema
from ssl_robust.datasets import IGNORE, Dataset, Item
from ssl_robust.encoders import Encoder
from ssl_robust.heads import HEADS, TaskModel

CLASSES = ("dark", "middle", "bright")


class Backbone(nn.Module):
    """One convolution: patch tokens are linear in the pixels, the CLS token is their mean."""

    num_prefix_tokens = 1

    def __init__(self, dim: int, patch: int, native: int) -> None:
        super().__init__()
        self.embed_dim = dim
        self.patch_embed = SimpleNamespace(patch_size=(patch, patch), img_size=(native, native))
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


def encoder(dim: int = 6, patch: int = 4, native: int = 16, seed: int = 0) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(Backbone(dim, patch, native), "planted", native, (0.5,) * 3, (0.25,) * 3)


def model(task: str, seed: int = 0, stride: float = 0.5, **kwargs: int) -> TaskModel:
    """A random head of three classes on the planted encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        planted = encoder(seed=seed, **kwargs)
        return TaskModel(task, planted, HEADS[task](planted.dim, 3), stride, chances={"": 0.35})


def brightness_model(task: str = "classification") -> TaskModel:
    """Tokens are the mean brightness of their pixels; class 1 where it is above one half, else class 0."""
    planted = Encoder(Backbone(1, 4, 16), "brightness", 16, (0.0,) * 3, (1.0,) * 3)
    planted.backbone.proj.weight.fill_(1 / 48)
    planted.backbone.proj.bias.zero_()
    head = HEADS[task](1, 2).eval()
    layer = head.linear if task == "classification" else head.conv
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-20.0, 20.0]).reshape_as(layer.weight))
        layer.bias.copy_(torch.tensor([10.0, -10.0]))
    return TaskModel(task, planted, head, chances={"": 0.5})


def images(count: int, side: int = 16, seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def target(task: str, x: Tensor) -> Tensor:
    """Labels 0, 1, 2, ..; masks with an ignored corner; depths with an invalid one."""
    if task == "classification":
        return torch.arange(len(x)) % 3
    dense = (x.mean(1) * 3).long().clamp(max=2) if task == "segmentation" else 1 + 5 * x.mean(1)
    dense[:, :3, :3] = IGNORE if task == "segmentation" else 0
    return dense


def _toys(root: Path, task: str, split: str, n: int) -> list[Item]:
    """Images of three brightnesses whose left half is black; n counts nothing, as with files."""
    found = []
    for i in range({"train": 24, "test": 10}[split]):
        generator = torch.Generator().manual_seed(100 * len(split) + i)
        picture = torch.randint(40, (3, 24, 24), generator=generator) + 70 * (i % 3) + 20
        picture[:, :, :12] = 0
        mask = torch.zeros(24, 24, dtype=torch.uint8)
        mask[:, 12:], mask[0, 0] = i % 3, IGNORE
        depth = 1 + picture.float().mean(0) / 50
        depth[0, 0] = 0
        truth = {"classification": i % 3, "segmentation": mask, "depth": depth}.get(task)
        found.append(Item(f"toys-{split}-{i}", picture.to(torch.uint8), truth))
    return found


TOYS = Dataset(
    ("classification", "segmentation", "depth", "deacl"),
    "toys",
    _toys,
    {"classification": CLASSES, "segmentation": CLASSES},
)


def settings(**changes: object) -> schema.Settings:
    """Settings of all tasks on the toys; a section that is given replaces single values of it."""
    section = {"datasets": ["toys"], "n_train": 12, "n_val": 6, "n_test": 8, "epochs": 3, "batch": 4, "lr": 0.05}
    base = {
        "profile": "toy",
        "device": "cpu",
        "precision": "fp32",
        "encoders": [{"name": "planted", "timm": "embedded_vit", "defenses": ["standard", "deacl"]}],
        "classification": {**section, "attack_batch": 3},
        "segmentation": {**section, "size": 24, "stride": 0.5},
        "depth": section,
        "attack": {"steps": 3},
        "deacl": {
            "dataset": "toys",
            "n_train": 12,
            "n_val": 4,
            "epochs": 3,
            "warmup_epochs": 1,
            "batch": 4,
            "steps": 2,
        },
    }
    for name, value in changes.items():
        base[name] = {**base[name], **value} if isinstance(value, dict) else value
    return schema.check(**base)


def stored(pattern: str, profile: str = "toy") -> Path:
    """The one file or folder below runs/<profile> that is called so; results have their key in their name."""
    (found,) = records.runs_dir(profile).glob(pattern)
    return found


def strong_attacks(task: str) -> list[str]:
    """Names of the attacks on a task besides the paper's."""
    return [name for name, kind in attacks.known().items() if task in kind.tasks and name not in attacks.KINDS]
