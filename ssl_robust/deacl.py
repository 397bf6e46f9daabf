"""DeACL (eq. 2, section 3.3, appendix C.2): fine-tune an encoder towards robustness, the original as its teacher.

Several processes (GPUs, nodes) share each batch through accelerate; what is computed does not depend on how many they
are, up to rounding. ops/launch.py starts them.

Encoders stay in eval mode while they are fine-tuned: batch norm (of a ResNet, say) keeps the statistics it was
pretrained with, and its scale and shift are trained like every other weight.
"""

import copy
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from . import attacks, compute, datasets, encoders, records
from .datasets import Subset
from .encoders import Encoder
from .parts import part
from .progress import track
from .settings import Attack, BadInput, DeACL, EncoderRow, Settings, skipping

GIVEN = -1  # the epochs of a checkpoint that was made elsewhere: unknown
SAVE_SECONDS = 600.0  # between the states stored within an epoch
Record = dict[str, Any]


# --- eq. 2 ---


def embed(encoder: Encoder, x: Tensor) -> Tensor:
    """The embedding of eq. 2: the CLS token (B, D), fp32 whatever it was computed in."""
    return encoder.cls(x).float()


def loss_terms(student: Encoder, clean_target: Tensor, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of eq. 2 without gamma, scalars: -cos(f_theta(x), f(x)), -cos(f_theta(x'), f_theta(x)), summed.

    The sums are over the images. clean_target (B, D) is f(x) of the teacher; x, x_adv are (B, 3, H, W) in [0,1].
    """
    clean, adversarial = embed(student, x), embed(student, x_adv)
    return -F.cosine_similarity(clean, clean_target).sum(), -F.cosine_similarity(adversarial, clean).sum()


def adversarial_images(
    attacked: Encoder, clean_target: Tensor, x: Tensor, ids: list[str], cfg: DeACL, seed: int, precision: str = "fp32",
    trace: attacks.Trace | None = None,
) -> Tensor:  # fmt: skip
    """x' by PGD on the encoder `attacked`: the cosine to the teacher's clean embedding is made small."""
    attack = Attack(eps=cfg.eps, step=cfg.step, steps=cfg.steps)
    start = attacks.random_start(x, cfg.eps, ids, seed)

    def loss(adv: Tensor, t: int) -> Tensor:
        return -F.cosine_similarity(embed(attacked, adv), clean_target)

    return attacks.pgd(x, loss, attack, start, precision, trace=trace)


def learning_rate(epoch: float, cfg: DeACL) -> float:
    """Linear warm-up over `warmup_epochs`, then half a cosine down to 0; `epoch` may be a fraction."""
    if epoch < cfg.warmup_epochs:
        return cfg.lr * epoch / cfg.warmup_epochs
    fraction = (epoch - cfg.warmup_epochs) / max(cfg.epochs - cfg.warmup_epochs, 1e-9)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * fraction))


# --- training, as one of several processes or alone ---


@dataclass
class _Tuning:
    """What one process trains with; student and optimizer are the same in all of them at every step."""

    student: Encoder
    teacher: Encoder
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    cfg: DeACL
    precision: str  # of attack steps and of the training step: 'fp32' or 'bf16'
    size: int  # images of a batch at a time; halved where memory lacks


def tuning(teacher: Encoder, accelerator: Accelerator, cfg: DeACL, precision: str) -> _Tuning:
    """A student that starts as the teacher, with the optimizer of its weights."""
    teacher = copy.copy(teacher.to(accelerator.device))
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(student.backbone.parameters(), cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay)
    for encoder in (student, teacher) if cfg.compiled else ():
        encoder.cls = torch.compile(encoder.cls)
    return _Tuning(student, teacher, optimizer, accelerator, cfg, precision, cfg.batch)


def train_step(run: _Tuning, x: Tensor, ids: list[str], counted: bool, batch: int, seed: int) -> Tensor:
    """One step of SGD on eq. 2, of which this process has the images x; returns its sums of the two terms (2,).

    batch: images of all processes together, over which the gradient is the mean, in however many parts it is computed.
    Images that are not `counted` take part with weight 0.
    """
    run.optimizer.zero_grad()
    weight = float(counted) / batch
    terms, run.size = compute.in_parts(lambda rows: _part(run, x[rows], ids[rows], weight, seed), len(x), run.size)
    used = [w for w in run.student.backbone.parameters() if w.grad is not None]
    for w, whole in zip(used, run.accelerator.reduce([w.grad for w in used], "sum"), strict=True):
        w.grad = whole
    run.optimizer.step()
    return terms.sum(0) * float(counted)


def _part(run: _Tuning, x: Tensor, ids: list[str], weight: float, seed: int) -> Tensor:
    """Adds the gradient of eq. 2 on images x, times `weight`, to the student's; their sums of the two terms (1, 2)."""
    with torch.no_grad(), compute.steps_in(run.precision, run.accelerator.device):
        clean_target = embed(run.teacher, x)
    run.student.backbone.requires_grad_(False)  # the attack needs no weight gradient
    attacked = run.student if run.cfg.attack_on == "trained" else run.teacher
    x_adv = adversarial_images(attacked, clean_target, x, ids, run.cfg, seed, run.precision)
    weights = [*run.student.backbone.requires_grad_(True).parameters()]
    with compute.steps_in(run.precision, run.accelerator.device):
        preserve, robust = loss_terms(run.student, clean_target, x, x_adv)
    # not backward(): where memory ends within it, it leaves gradients of some weights
    gradients = torch.autograd.grad((preserve + run.cfg.gamma * robust) * weight, weights, allow_unused=True)
    for w, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            w.grad = gradient if w.grad is None else w.grad.add_(gradient)
    return torch.stack([preserve, robust]).detach()[None]


def slices(order: Tensor, batch: int, process: int, processes: int) -> list[tuple[list[int], bool, int]]:
    """This process's part of each batch of `order`: (indices, whether they count, images of the whole batch).

    Where a last batch has fewer images than there are processes, those without one take the batch's first with
    weight 0, because all of them must take part in each step.
    """
    parts = [(whole.tensor_split(processes)[process], whole) for whole in order.split(batch)]
    return [((mine if len(mine) else whole[:1]).tolist(), len(mine) > 0, len(whole)) for mine, whole in parts]


def _shared(
    run: _Tuning, subset: Subset, order: Tensor, done: int = 0
) -> Iterator[tuple[Tensor, list[str], bool, int]]:
    """Images and identifiers of this process's `slices` after the first `done`, each with what `slices` says of it."""
    accelerator, count = run.accelerator, datasets.workers(subset)
    parts = slices(order, run.cfg.batch, accelerator.process_index, accelerator.num_processes)[done:]
    mine, pinned = [indices for indices, *_ in parts], accelerator.device.type == "cuda"
    loader = torch.utils.data.DataLoader(subset, batch_sampler=mine, num_workers=count, pin_memory=pinned)
    for (images, _), (indices, *about) in zip(datasets.plainly(loader), parts, strict=True):
        yield datasets.pixels(images, accelerator.device), [subset.ids[i] for i in indices], *about


def train_epoch(
    run: _Tuning, train: Subset, epoch: int, done: int = 0, sums: Tensor | None = None,
    store: Callable[[int, Tensor], None] = lambda done, sums: None,
) -> tuple[float, float]:  # fmt: skip
    """One epoch over freshly augmented images; returns the mean of the two terms.

    An interrupted epoch goes on after `done` batches with the `sums` of the terms so far (2,); `store` gets both every
    SAVE_SECONDS. Raises BadInput if the loss becomes NaN or infinite.
    """
    train.view, steps = epoch, math.ceil(len(train) / run.cfg.batch)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(train.seed + epoch))
    batches = _shared(run, train, order, done)
    if run.accelerator.is_main_process:
        batches = track(batches, total=steps - done, desc=f"DeACL epoch {epoch + 1} of {run.cfg.epochs}")
    sums = torch.zeros(2, dtype=torch.float64) if sums is None else sums
    sums, stored = sums.to(run.accelerator.device), time.monotonic()
    for i, (x, ids, counted, batch) in enumerate(batches, done):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(epoch + i / steps, run.cfg)
        terms = train_step(run, x, ids, counted, batch, train.seed + epoch)
        # each step, not once an epoch: then sums stored within an epoch are those of an undisturbed run to the last bit
        sums = sums + run.accelerator.reduce(terms.double(), "sum")
        due = time.monotonic() - stored >= SAVE_SECONDS
        if (due or i + 1 == steps) and not sums.isfinite().all():
            raise BadInput(
                f"DeACL diverged in epoch {epoch + 1} (its loss is no number); lower deacl.lr, which is "
                f"{run.cfg.lr:g}, or deacl.gamma, which is {run.cfg.gamma:g}."
            )
        if due:
            store(i + 1, sums)
            stored = time.monotonic()
    preserve, robust = (sums / len(train)).tolist()
    return preserve, robust


def robustness(run: _Tuning, held_out: Subset, seed: int) -> float:
    """Mean cos(f_theta(x'), f_theta(x)), fp32, over held-out images attacked on the student: 1 is unmoved."""
    run.student.backbone.requires_grad_(False)
    total = torch.zeros((), dtype=torch.float64, device=run.accelerator.device)
    for x, ids, counted, _ in _shared(run, held_out, torch.arange(len(held_out))):

        def part(rows: slice, x: Tensor = x, ids: list[str] = ids) -> Tensor:
            with torch.no_grad():
                clean = embed(run.student, x[rows])
            x_adv = adversarial_images(run.student, clean, x[rows], ids[rows], run.cfg, seed, run.precision)
            with torch.no_grad():
                return F.cosine_similarity(embed(run.student, x_adv), clean)

        cosines, run.size = compute.in_parts(part, len(x), run.size)
        total += cosines.double().sum() * counted
    return float(run.accelerator.reduce(total, "sum") / len(held_out))


# --- one row ---


def finetune_all(settings: Settings, only: str = "") -> dict[str, Record]:
    """DeACL of every row with that defense, {encoder: index as finetune returns it}; finished work is not repeated.

    A row with a deacl_checkpoint is not fine-tuned: its index has the epochs and history of that run, or none if it is
    a single file, and says "origin": what the row calls it.
    `only`: the name of the one row to work on, BadInput if there is none. With missing: skip, rows whose weights or
    data cannot be used are left out and listed in results/<profile>/deacl/skipped.json.
    """
    rows = [row for row in settings.encoders if "deacl" in row.defenses]
    if only and only not in [row.name for row in rows]:
        known = ", ".join(row.name for row in rows) or "none"
        raise BadInput(f"There is no encoder '{only}' with the defense deacl in the profile; choose one of: {known}.")
    if not all(row.deacl_checkpoint for row in rows):
        settings.section("deacl")
    runs: dict[str, Record] = {}
    before = records.read_skipped(records.skipped_path(settings.profile, "deacl")) if only else []
    lost = [entry for entry in before if entry["encoder"] != only]
    for row in (row for row in rows if only in ("", row.name)):
        dataset = "" if row.deacl_checkpoint else settings.deacl.dataset
        with skipping(settings, lost, [{"dataset": dataset, "encoder": row.name, "defense": "deacl"}]):
            runs[row.name] = _row(row, settings)
    if first():
        records.write_skipped(settings.profile, "deacl", lost)
    return runs


def _row(row: EncoderRow, settings: Settings) -> Record:
    """The index of one row: of its given checkpoint, which must fit the model, or of its own run."""
    if row.deacl_checkpoint:
        index, paths = _given(row, settings.data_root)
        hashes = [encoders.load(row, settings.data_root, path).hash for path in paths.values()]
        return index | {"key": records.digest([row.deacl_checkpoint, *hashes]), "origin": row.deacl_checkpoint}
    teacher, launch = encoders.load(row, settings.data_root), part("ops.launch")
    count = launch.processes(settings)
    if count > 1 and not stored(row, teacher, settings)[0]:
        launch.start(count, row.name, settings)
    index = finetune(row, teacher, settings)
    if first():  # what the attacks' notebooks evaluate
        records.write_record(index, current_path(settings.profile, row.name))
    return index


def finetune(row: EncoderRow, teacher: Encoder, settings: Settings) -> Record:
    """Fine-tune `teacher` as settings.deacl says, alone or as one of several processes that all call this.

    Interrupted work goes on at the last stored state, also with another number of processes. Returns what deacl.json
    says beside epoch_N.safetensors: {"key", "made_from", "folder": its name, "epochs": [N, ...] that are kept,
    "history": [{"epoch", "preserve", "robust", "held_out_cosine"}, ...], "processes", ...}.
    """
    cfg, (train, held_out) = settings.deacl, _images(settings, teacher)
    with _processes(settings) as accelerator:
        main = accelerator.is_main_process
        found = [stored(row, teacher, settings) if main else None]  # only there are files read
        done, state, place, made = broadcast_object_list(found)[0]
        if done:
            return done
        run = tuning(teacher, accelerator, cfg, compute.precision(settings.precision, accelerator.device.type))
        state = state or {"history": [], "batches": 0, "sums": None}
        if "student" in state:
            run.student.load_state_dict(state["student"])
            run.optimizer.load_state_dict(state["optimizer"])
        history, batches, sums = (state[name] for name in ("history", "batches", "sums"))
        index = {"key": records.digest(made), "made_from": made, "folder": place.name, "epochs": kept(cfg),
                 "history": history, "processes": accelerator.num_processes, "n_train": len(train),
                 "n_train_asked": datasets.asked("deacl", cfg.dataset, settings)}  # fmt: skip

        def store(batches: int = 0, sums: Tensor | None = None) -> None:
            """All that goes on from here: `batches` of the epoch are done, and their terms have the `sums` (2,)."""
            if main:
                state = {"key": index["key"], "history": history, "batches": batches, "sums": sums}
                state |= {"student": run.student.state_dict(), "optimizer": run.optimizer.state_dict()}
                torch.save(state, buffer := io.BytesIO())
                records.write_sealed(buffer.getvalue(), place / "state.pt")

        if not history:
            history.append({"epoch": 0, "held_out_cosine": robustness(run, held_out, settings.seed)})
        for epoch in range(len(history), cfg.epochs + 1):
            preserve, robust = train_epoch(run, train, epoch - 1, batches, sums, store)
            cosine, batches, sums = robustness(run, held_out, settings.seed), 0, None
            history.append({"epoch": epoch, "preserve": preserve, "robust": robust, "held_out_cosine": cosine})
            if epoch in index["epochs"] and main:
                save_backbone(run.student, place / f"epoch_{epoch}.safetensors")
            store()
        if main:
            records.write_record(index, place / "deacl.json")
        accelerator.wait_for_everyone()
        return index


@contextmanager
def _processes(settings: Settings) -> Iterator[Accelerator]:
    """This process alone, or as one of several, of which the BadInput of one ends all: the others would wait for it."""
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # while the main process reads a large data set
    cpu = records.pick_device(settings.device) == "cpu"
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patient])
    alone = accelerator.num_processes == 1
    try:
        yield accelerator
    except BadInput as problem:
        if alone:
            raise
        raise RuntimeError(f"BadInput: {problem}") from None
    finally:
        if alone:
            AcceleratorState._reset_state(reset_partial_state=True)  # else no processes can be launched from here


def first() -> bool:
    """Whether this process is the main one, of all nodes."""
    return os.environ.get("RANK", "0") == "0"


# --- what is stored of a row ---


def _images(settings: Settings, teacher: Encoder) -> list[Subset]:
    """Training and held-out images."""
    name = settings.deacl.dataset
    return [datasets.load("deacl", name, split, settings, teacher.native) for split in ("train", "val")]


def kept(cfg: DeACL) -> list[int]:
    """The epochs whose checkpoints are kept."""
    return sorted({*cfg.checkpoints, cfg.epochs})


def made_from(teacher: Encoder, settings: Settings) -> records.Made:
    """What a DeACL run is made from; the number of processes decides nothing but rounding, nor does what is kept."""
    train, held_out = _images(settings, teacher)
    aside = {"dataset", "n_train", "n_val", "checkpoints", "processes"}
    aside |= {"compiled"} if not settings.deacl.compiled else set()  # keys are older than this choice
    return records.made_from(
        ["data", "encoders", "pgd", "deacl"],
        settings=settings.deacl.model_dump(exclude=aside),
        seed=settings.seed,
        precision=compute.precision(settings.precision, records.pick_device(settings.device)),
        hashes={"weights": teacher.hash, "training data": train.hash, "held-out data": held_out.hash},
    )


def home(profile: str, encoder: str, made: records.Made) -> Path:
    """Folder of one DeACL run alone, named by its key: checkpoints, state, and deacl.json when it is finished."""
    return records.runs_dir(profile) / "deacl" / encoder / records.digest(made)


def stored(
    row: EncoderRow, teacher: Encoder, settings: Settings
) -> tuple[Record | None, Record | None, Path, records.Made]:
    """What is there of a row: its index if finished, else the state stored last if any; its folder, and made_from.

    A finished run that has not kept all epochs asked for now stays as it is; they are made in a folder beside it.
    """
    made, epochs = made_from(teacher, settings), kept(settings.deacl)
    place = home(settings.profile, row.name, made)
    done = _finished(place, made)
    if done and not set(epochs) <= set(done["epochs"]):
        place = place.with_name(f"{place.name}-{records.digest(epochs)}")
        done = _finished(place, made)
    if done and _whole(place.with_name(Path(done["folder"]).name), epochs):
        return {**done, "epochs": epochs}, None, place, made
    return None, _read_state(place, records.digest(made), epochs), place, made


def others(place: Path) -> list[records.Made]:
    """What the finished runs in the folders beside one were made from."""
    return [index["made_from"] for index in _indices(place)]


def _indices(place: Path) -> Iterator[Record]:
    for path in sorted(place.parent.glob("*/deacl.json")):
        with suppress(BadInput):
            yield records.read_record(path)


def _finished(place: Path, made: records.Made) -> Record | None:
    """The index in a folder; with 'make keep' that of a run that other versions of the code made from equal inputs."""
    found = records.reusable(place / "deacl.json", made)
    for index in _indices(place) if records.keeping and not found else ():
        if index["made_from"]["inputs"] == made["inputs"]:
            found = records.accepted(index, made)
            records.write_record(found, place / "deacl.json")
            break
    return found


def _whole(place: Path, epochs: list[int]) -> bool:
    """Whether the checkpoints after these epochs are there and undamaged."""
    try:
        for epoch in epochs:
            records.read_tensors(place / f"epoch_{epoch}.safetensors")
    except BadInput:
        return False
    return True


def _read_state(place: Path, key: str, kept: list[int]) -> Record | None:
    """The state of interrupted work; None if there is none that fits."""
    try:
        content = io.BytesIO(records.read_sealed(place / "state.pt") or b"")
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:  # missing, truncated or foreign: whatever the reason, the remedy is to start anew
        return None
    passed = [n for n in kept if n < len(state["history"])]
    return state if state["key"] == key and _whole(place, passed) else None


def current_path(profile: str, encoder: str) -> Path:
    """The index of the run that is current: the one that 02_deacl found or made last, and that tables show."""
    return records.results_dir(profile) / "deacl" / encoder / "deacl.json"


def checkpoint_path(profile: str, encoder: str, folder: str, epoch: int) -> Path:
    """File of the encoder after `epoch` epochs of the DeACL run in `folder`."""
    return records.runs_dir(profile) / "deacl" / encoder / folder / f"epoch_{epoch}.safetensors"


def save_backbone(encoder: Encoder, path: Path) -> None:
    """Backbone weights as safetensors, with the mean and std they were trained with, written whole or not at all."""
    colours = {name: getattr(encoder, name).flatten().tolist() for name in ("mean", "std")}
    about = {part("formats.checkpoints").CFG[0]: json.dumps(colours)}
    records.write_tensors(encoder.backbone.state_dict(), about, path)


def variants(row: EncoderRow, profile: str, data_root: str = "") -> list[tuple[str, int, Path | None]]:
    """What is evaluated of a row: (defense, DeACL epochs, weight file); Standard first, then DeACL epoch by epoch.

    The last epoch is 'deacl', earlier ones 'deacl-epochN'. A deacl_checkpoint is looked for in `data_root`; a single
    file is 'deacl' with epochs GIVEN. Raises BadInput if DeACL has not been run, or was skipped (for that reason).
    """
    found: list[tuple[str, int, Path | None]] = [("standard", 0, None)] if "standard" in row.defenses else []
    if "deacl" not in row.defenses:
        return found
    if row.deacl_checkpoint:
        return [*found, *_named(_given(row, data_root)[1])]
    return [*found, *tuned(row, profile, _index(row, profile))]


def tuned(row: EncoderRow, profile: str, index: Record) -> list[tuple[str, int, Path]]:
    """The variants that the DeACL run with this index has left of a row, or will leave."""
    folder = Path(index["folder"]).name  # what a file says leads to no other place
    return _named({n: checkpoint_path(profile, row.name, folder, n) for n in index["epochs"]})


def _named(paths: dict[int, Path]) -> list[tuple[str, int, Path]]:
    names = [f"deacl-epoch{n}" for n in [*paths][:-1]] + ["deacl"]
    return [(name, *found) for name, found in zip(names, paths.items(), strict=True)]


def _given(row: EncoderRow, data_root: str) -> tuple[Record, dict[int, Path]]:
    """The deacl_checkpoint of a row: what is known of its run, and its weight files by epochs.

    It is a file of weights, or the folder that a run has left: deacl.json beside epoch_N.safetensors.
    """
    path = part("formats.checkpoints").locate(row.deacl_checkpoint, data_root)
    if not path.is_dir():
        return {"epochs": [], "history": []}, {GIVEN: path}
    index = records.read_record(path / "deacl.json")
    return index, {n: path / f"epoch_{n}.safetensors" for n in index["epochs"]}


def _index(row: EncoderRow, profile: str) -> Record:
    """What finetune left of a row: of a lab profile that has not run it itself, of the profile it belongs to."""
    path = current_path(profile, row.name)
    if not path.is_file():
        profile = profile.partition("/")[0]
        path = current_path(profile, row.name)
    for lost in records.read_skipped(records.skipped_path(profile, "deacl")):
        if lost["encoder"] == row.name:
            raise BadInput(lost["why"])
    if not path.is_file():
        records.need(profile, "02_deacl")
        raise BadInput(f"{path} is missing although 02_deacl has run; run notebook 02_deacl again.")
    return records.read_record(path)
