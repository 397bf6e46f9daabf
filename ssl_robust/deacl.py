"""DeACL (eq. 2, section 3.3, appendix C.2): fine-tune an encoder towards robustness, the original as its teacher.

Encoders stay in eval mode while they are fine-tuned: batch norm (of a ResNet, say) keeps the statistics it was
pretrained with, and its scale and shift are trained like every other weight.
"""

import copy
import io
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from . import attacks, datasets, encoders, records
from .datasets import Subset
from .encoders import Encoder
from .heads import skipping
from .progress import track
from .settings import Attack, BadInput, DeACL, EncoderRow, Settings

GIVEN = -1  # the epochs of a checkpoint that was made elsewhere: unknown
CODE = ("catalogue", "datasets", "scenes", "checkpoints", "encoders", "attacks", "deacl")


def embed(encoder: Encoder, x: Tensor) -> Tensor:
    """The embedding of eq. 2: the CLS token (B, D)."""
    return encoder(x)[0]


def loss_terms(student: Encoder, clean_target: Tensor, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of eq. 2 without gamma, scalars: -cos(f_theta(x), f(x)) and -cos(f_theta(x'), f_theta(x)).

    clean_target (B, D) is f(x) of the teacher; x, x_adv are (B, 3, H, W) in [0,1].
    """
    clean, adversarial = embed(student, x), embed(student, x_adv)
    return -F.cosine_similarity(clean, clean_target).mean(), -F.cosine_similarity(adversarial, clean).mean()


def adversarial_images(
    attacked: Encoder, clean_target: Tensor, x: Tensor, ids: list[str], cfg: DeACL, seed: int
) -> Tensor:
    """x' by PGD on the encoder `attacked`: the cosine to the teacher's clean embedding is made small."""
    attack = Attack(eps=cfg.eps, step=cfg.step, steps=cfg.steps)
    start = attacks.random_start(x, cfg.eps, ids, seed)
    return attacks.pgd(x, lambda adv, t: -F.cosine_similarity(embed(attacked, adv), clean_target), attack, start)


def learning_rate(epoch: float, cfg: DeACL) -> float:
    """Linear warm-up over `warmup_epochs`, then half a cosine down to 0; `epoch` may be a fraction."""
    if epoch < cfg.warmup_epochs:
        return cfg.lr * epoch / cfg.warmup_epochs
    return (
        cfg.lr * 0.5 * (1 + math.cos(math.pi * (epoch - cfg.warmup_epochs) / max(cfg.epochs - cfg.warmup_epochs, 1e-9)))
    )


def train_step(
    student: Encoder,
    teacher: Encoder,
    x: Tensor,
    ids: list[str],
    optimizer: torch.optim.Optimizer,
    cfg: DeACL,
    seed: int,
) -> tuple[float, float]:
    """One step of SGD on eq. 2; returns its two terms."""
    with torch.no_grad():
        clean_target = embed(teacher, x)
    student.backbone.requires_grad_(False)  # the attack needs no weight gradient
    x_adv = adversarial_images(student if cfg.attack_on == "trained" else teacher, clean_target, x, ids, cfg, seed)
    student.backbone.requires_grad_(True)
    preserve, robust = loss_terms(student, clean_target, x, x_adv)
    optimizer.zero_grad()
    (preserve + cfg.gamma * robust).backward()
    optimizer.step()
    return preserve.item(), robust.item()


def robustness(encoder: Encoder, held_out: Subset, cfg: DeACL, seed: int, device: str) -> float:
    """Mean cos(f_theta(x'), f_theta(x)) over held-out images attacked on this encoder: 1 is unmoved."""
    cosines = []
    for indices, x, _ in datasets.batches(held_out, cfg.batch):
        x, ids = x.to(device), [held_out.ids[i] for i in indices]
        with torch.no_grad():
            clean = embed(encoder, x)
        x_adv = adversarial_images(encoder, clean, x, ids, cfg, seed)
        with torch.no_grad():
            cosines.append(F.cosine_similarity(embed(encoder, x_adv), clean))
    return float(torch.cat(cosines).mean())


def train_epoch(
    student: Encoder,
    teacher: Encoder,
    train: Subset,
    optimizer: torch.optim.Optimizer,
    cfg: DeACL,
    epoch: int,
    device: str,
) -> tuple[float, float]:
    """One epoch over freshly augmented images; returns the mean of the two terms."""
    train.view = epoch
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(train.seed + epoch)).tolist()
    shuffled = torch.utils.data.Subset(train, order)
    loader = torch.utils.data.DataLoader(shuffled, cfg.batch, num_workers=datasets.workers(train))
    terms, desc = [], f"DeACL epoch {epoch + 1} of {cfg.epochs}"
    for i, (images, _) in enumerate(track(datasets.plainly(loader), total=len(loader), desc=desc)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch + i / len(loader), cfg)
        x = images.to(device).float() / 255
        ids = [train.ids[j] for j in order[i * cfg.batch : i * cfg.batch + len(x)]]
        terms.append(train_step(student, teacher, x, ids, optimizer, cfg, train.seed + epoch))
    return tuple(torch.tensor(terms).mean(0).tolist())


def folder(profile: str, encoder: str) -> Path:
    """Folder of the DeACL checkpoints of one encoder."""
    return records.runs_dir(profile) / "deacl" / encoder


def finetune_all(settings: Settings) -> dict[str, dict[str, Any]]:
    """DeACL of every row with that defense, {encoder: index as finetune returns it}; finished work is not repeated.

    A row with a deacl_checkpoint is not fine-tuned: its file is read once, and its index says {"epochs": [], "history":
    [], "origin": file}. With missing: skip, rows whose weights or data cannot be used are left out and listed in
    results/<profile>/deacl/skipped.json. Raises BadInput if there is no section deacl although a row needs it.
    """
    rows = [row for row in settings.encoders if "deacl" in row.defenses]
    if settings.deacl is None and not all(row.deacl_checkpoint for row in rows):
        raise BadInput("The settings have no section 'deacl'; add one (params/demo.yaml shows how).")
    runs: dict[str, dict[str, Any]] = {}
    lost: list[dict[str, str]] = []
    for row in rows:
        dataset = "" if row.deacl_checkpoint else settings.deacl.dataset
        with skipping(settings, lost, [{"dataset": dataset, "encoder": row.name, "defense": "deacl"}]):
            runs[row.name] = _made_elsewhere(row, settings) if row.deacl_checkpoint else _made_here(row, settings)
    records.write_skipped(settings.profile, "deacl", lost)
    return runs


def _made_here(row: EncoderRow, settings: Settings) -> dict[str, Any]:
    return finetune(row, encoders.load(row, settings.data_root), settings)


def _made_elsewhere(row: EncoderRow, settings: Settings) -> dict[str, Any]:
    """Index of a given checkpoint, which must fit the row's model."""
    path = Path(settings.data_root) / row.deacl_checkpoint
    key = records.digest([row.deacl_checkpoint, encoders.load(row, settings.data_root, path).hash])
    return {"key": key, "epochs": [], "history": [], "origin": row.deacl_checkpoint}


def finetune(row: EncoderRow, teacher: Encoder, settings: Settings) -> dict[str, Any]:
    """Fine-tune `teacher` as settings.deacl says; interrupted work goes on at the last finished epoch.

    Writes epoch_N.safetensors for each of cfg.checkpoints and the last epoch, and deacl.json last, which is returned:
    {"key", "epochs": [N, ...], "history": [{"epoch", "preserve", "robust", "held_out_cosine"}, ...]}.
    """
    cfg, device = settings.deacl, records.pick_device(settings.device)
    train, held_out = (
        datasets.load("deacl", cfg.dataset, split, settings, teacher.native) for split in ("train", "val")
    )
    schedule = cfg.model_dump(exclude={"checkpoints"})
    key = records.digest([schedule, settings.seed, teacher.hash, train.hash, held_out.hash, records.code_hash(*CODE)])
    kept, home = sorted({*cfg.checkpoints, cfg.epochs}), folder(settings.profile, row.name)
    done = records.reusable(home / "deacl.json", records.digest([key, kept]))
    if done and all(checkpoint_path(settings.profile, row.name, n).is_file() for n in kept):
        return done
    teacher = teacher.to(device)
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(student.backbone.parameters(), cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay)
    history = _resume(home / "state.pt", key, student, optimizer, kept, home)
    if not history:
        history = [{"epoch": 0, "held_out_cosine": robustness(student, held_out, cfg, settings.seed, device)}]
    for epoch in range(len(history) - 1, cfg.epochs):
        preserve, robust = train_epoch(student, teacher, train, optimizer, cfg, epoch, device)
        student.backbone.requires_grad_(False)
        cosine = robustness(student, held_out, cfg, settings.seed, device)
        history.append({"epoch": epoch + 1, "preserve": preserve, "robust": robust, "held_out_cosine": cosine})
        if epoch + 1 in kept:
            save_backbone(student, checkpoint_path(settings.profile, row.name, epoch + 1))
        _save_state(home / "state.pt", key, student, optimizer, history)
    index = {"key": records.digest([key, kept]), "epochs": kept, "history": history}
    records.write_json(index, home / "deacl.json")
    return index


def checkpoint_path(profile: str, encoder: str, epoch: int) -> Path:
    """File of the encoder after `epoch` epochs of DeACL."""
    return folder(profile, encoder) / f"epoch_{epoch}.safetensors"


def save_backbone(encoder: Encoder, path: Path) -> None:
    """Backbone weights as safetensors, written whole or not at all."""
    records.write_bytes(
        save({k: v.detach().cpu().contiguous() for k, v in encoder.backbone.state_dict().items()}), path
    )


def _save_state(path: Path, key: str, student: Encoder, optimizer: torch.optim.Optimizer, history: list[dict]) -> None:
    buffer = io.BytesIO()
    state = {"key": key, "student": student.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
    torch.save(state, buffer)
    records.write_bytes(buffer.getvalue(), path)


def _resume(
    path: Path, key: str, student: Encoder, optimizer: torch.optim.Optimizer, kept: list[int], home: Path
) -> list[dict[str, float]]:
    """Put an interrupted run's state back and return its history; empty if there is none that fits."""
    try:
        state = torch.load(path, map_location=student.mean.device, weights_only=True)
    except Exception:  # missing, truncated or foreign: whatever the reason, the remedy is to start anew
        return []
    passed = [n for n in kept if n < len(state.get("history", []))]
    if state.get("key") != key or not all((home / f"epoch_{n}.safetensors").is_file() for n in passed):
        return []
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def variants(row: EncoderRow, profile: str, data_root: str = "") -> list[tuple[str, int, Path | None]]:
    """What is evaluated of a row: (defense, DeACL epochs, weight file); Standard first, then DeACL epoch by epoch.

    The last epoch is 'deacl', earlier ones 'deacl-epochN'. A deacl_checkpoint, relative paths in `data_root`, is
    'deacl' with epochs GIVEN. Raises BadInput if DeACL has not been run, or was skipped (for the reason it was).
    """
    found: list[tuple[str, int, Path | None]] = [("standard", 0, None)] if "standard" in row.defenses else []
    if "deacl" not in row.defenses:
        return found
    if row.deacl_checkpoint:
        return [*found, ("deacl", GIVEN, Path(data_root) / row.deacl_checkpoint)]
    epochs = _index(row, profile)["epochs"]
    names = [f"deacl-epoch{n}" for n in epochs[:-1]] + ["deacl"]
    return found + [(d, n, checkpoint_path(profile, row.name, n)) for d, n in zip(names, epochs, strict=True)]


def _index(row: EncoderRow, profile: str) -> dict[str, Any]:
    """What finetune left of a row."""
    path = folder(profile, row.name) / "deacl.json"
    for lost in records.read_skipped(records.skipped_path(profile, "deacl")):
        if lost["encoder"] == row.name:
            raise BadInput(lost["why"])
    if not path.is_file():
        records.need(profile, "02_deacl")
        raise BadInput(f"{path} is missing although 02_deacl has run; run notebook 02_deacl again.")
    return records.read_json(path)
