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
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from . import attacks, compute, datasets, encoders, records
from .datasets import Subset
from .encoders import Encoder
from .parts import part
from .progress import track
from .settings import Attack, BadInput, DeACL, EncoderRow, Settings, skipping

GIVEN = -1  # the epochs of a checkpoint that was made elsewhere: unknown
SAVE_SECONDS = 600.0  # between the states stored within an epoch


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


class LossTerms(nn.Module):
    """`loss_terms` (2,) as one module: DistributedDataParallel wants one forward pass for each backward pass."""

    def __init__(self, student: Encoder) -> None:
        super().__init__()
        self.student = student

    def forward(self, clean_target: Tensor, x: Tensor, x_adv: Tensor) -> Tensor:
        return torch.stack(loss_terms(self.student, clean_target, x, x_adv))


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
    return (
        cfg.lr * 0.5 * (1 + math.cos(math.pi * (epoch - cfg.warmup_epochs) / max(cfg.epochs - cfg.warmup_epochs, 1e-9)))
    )


# --- training, as one of several processes or alone ---


class Tuning(NamedTuple):
    """What one process trains with; student and optimizer are the same in all of them at every step."""

    student: Encoder
    teacher: Encoder
    terms: nn.Module  # LossTerms of the student; it averages gradients over the processes, if there are several
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    cfg: DeACL
    precision: str  # of attack steps and of the training step: 'fp32' or 'bf16'

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


def tuning(teacher: Encoder, accelerator: Accelerator, cfg: DeACL, precision: str) -> Tuning:
    """A student that starts as the teacher, with the optimizer of its weights."""
    teacher = teacher.to(accelerator.device)
    student = copy.deepcopy(teacher)
    student.backbone.requires_grad_(True)  # before it is prepared: what is frozen then is never averaged
    optimizer = torch.optim.SGD(student.backbone.parameters(), cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay)
    return Tuning(student, teacher, accelerator.prepare(LossTerms(student)), optimizer, accelerator, cfg, precision)


def train_step(run: Tuning, x: Tensor, ids: list[str], counted: bool, batch: int, seed: int) -> Tensor:
    """One step of SGD on eq. 2, of which this process has the images x; returns its sums of the two terms (2,).

    batch: images of all processes together. Images that are not `counted` take part with weight 0.
    """
    with torch.no_grad(), compute.steps_in(run.precision, run.device):
        clean_target = embed(run.teacher, x)
    run.student.backbone.requires_grad_(False)  # the attack needs no weight gradient
    attacked = run.student if run.cfg.attack_on == "trained" else run.teacher
    x_adv = adversarial_images(attacked, clean_target, x, ids, run.cfg, seed, run.precision)
    run.student.backbone.requires_grad_(True)
    with compute.steps_in(run.precision, run.device):
        preserve, robust = run.terms(clean_target, x, x_adv) * float(counted)
    run.optimizer.zero_grad()
    # gradients are averaged over the processes, whose slices may differ in size: their sum / batch is the global mean
    run.accelerator.backward((preserve + run.cfg.gamma * robust) * (run.accelerator.num_processes / batch))
    run.optimizer.step()
    return torch.stack([preserve, robust]).detach()


def slices(order: Tensor, batch: int, process: int, processes: int) -> list[tuple[list[int], bool, int]]:
    """This process's part of each batch of `order`: (indices, whether they count, images of the whole batch).

    Where a last batch has fewer images than there are processes, those without one take the batch's first with
    weight 0, because all of them must take part in each step.
    """
    parts = [(whole.tensor_split(processes)[process], whole) for whole in order.split(batch)]
    return [((mine if len(mine) else whole[:1]).tolist(), len(mine) > 0, len(whole)) for mine, whole in parts]


def train_epoch(
    run: Tuning,
    train: Subset,
    epoch: int,
    done: int = 0,
    sums: Tensor | None = None,
    store: Callable[[int, Tensor], None] = lambda done, sums: None,
) -> tuple[float, float]:
    """One epoch over freshly augmented images; returns the mean of the two terms.

    An interrupted epoch goes on after `done` batches with the `sums` of the terms so far (2,); `store` gets both every
    SAVE_SECONDS. Raises BadInput if the loss becomes NaN or infinite.
    """
    train.view = epoch
    accelerator, count = run.accelerator, datasets.workers(train)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(train.seed + epoch))
    parts = slices(order, run.cfg.batch, accelerator.process_index, accelerator.num_processes)
    mine = [indices for indices, *_ in parts[done:]]
    pinned = run.device.type == "cuda"
    loader = torch.utils.data.DataLoader(train, batch_sampler=mine, num_workers=count, pin_memory=pinned)
    batches, desc = datasets.plainly(loader), f"DeACL epoch {epoch + 1} of {run.cfg.epochs}"
    if accelerator.is_main_process:
        batches = track(batches, total=len(loader), desc=desc)
    sums = torch.zeros(2, dtype=torch.float64) if sums is None else sums
    sums, stored = sums.to(run.device), time.monotonic()
    for i, (images, _) in enumerate(batches, done):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(epoch + i / len(parts), run.cfg)
        indices, counted, batch = parts[i]
        x = images.to(run.device, non_blocking=True).float() / 255
        terms = train_step(run, x, [train.ids[j] for j in indices], counted, batch, train.seed + epoch)
        # each step, not once an epoch: then sums stored within an epoch are those of an undisturbed run to the last bit
        sums = sums + accelerator.reduce(terms.double(), "sum")
        if time.monotonic() - stored >= SAVE_SECONDS:
            _demand_finite(sums, epoch, run.cfg)
            store(i + 1, sums)
            stored = time.monotonic()
    _demand_finite(sums, epoch, run.cfg)
    preserve, robust = (sums / len(train)).tolist()
    return preserve, robust


def _demand_finite(sums: Tensor, epoch: int, cfg: DeACL) -> None:
    """Raises BadInput where the terms of eq. 2 are no numbers any more: what follows would be none either."""
    if not sums.isfinite().all():
        raise BadInput(
            f"DeACL diverged in epoch {epoch + 1} (its loss is no number); lower deacl.lr, which is {cfg.lr:g}, or "
            f"deacl.gamma, which is {cfg.gamma:g}."
        )


def robustness(run: Tuning, held_out: Subset, seed: int) -> float:
    """Mean cos(f_theta(x'), f_theta(x)) over held-out images attacked on the student: 1 is unmoved.

    Embeddings are fp32. Each process attacks a part of the images.
    """
    run.student.backbone.requires_grad_(False)
    processes, total = run.accelerator.num_processes, torch.zeros((), dtype=torch.float64, device=run.device)
    mine = _part(held_out, run.accelerator.process_index, processes)
    for indices, x, _ in datasets.batches(mine, -(-run.cfg.batch // processes)):
        x, ids = x.to(run.device), [mine.ids[i] for i in indices]
        with torch.no_grad():
            clean = embed(run.student, x)
        x_adv = adversarial_images(run.student, clean, x, ids, run.cfg, seed, run.precision)
        with torch.no_grad():
            total += F.cosine_similarity(embed(run.student, x_adv), clean).double().sum()
    return float(run.accelerator.reduce(total, "sum") / len(held_out))


def _part(subset: Subset, process: int, processes: int) -> Subset:
    """The images of one process, each in one part."""
    part, where = copy.copy(subset), torch.arange(len(subset)).tensor_split(processes)[process].tolist()
    part.items, part.ids = [subset.items[i] for i in where], [subset.ids[i] for i in where]
    return part


# --- one row ---


def home(profile: str, encoder: str, made: records.Made) -> Path:
    """Folder of one DeACL run: its checkpoints, its state while it lasts, and deacl.json when it is finished.

    It is named by the key of what the run is made from, so that another run never touches it.
    """
    return records.runs_dir(profile) / "deacl" / encoder / records.digest(made)


def finetune_all(settings: Settings, only: str = "") -> dict[str, dict[str, Any]]:
    """DeACL of every row with that defense, {encoder: index as finetune returns it}; finished work is not repeated.

    A row with a deacl_checkpoint is not fine-tuned: its file is read once, and its index says {"epochs": [], "history":
    [], "origin": file}. `only`: the name of the one row to work on. With missing: skip, rows whose weights or data
    cannot be used are left out and listed in results/<profile>/deacl/skipped.json. Raises BadInput if there is no
    section deacl although a row needs it, or no such row.
    """
    rows = [row for row in settings.encoders if "deacl" in row.defenses]
    if only and only not in [row.name for row in rows]:
        known = ", ".join(row.name for row in rows) or "none"
        raise BadInput(f"There is no encoder '{only}' with the defense deacl in the profile; choose one of: {known}.")
    if settings.deacl is None and not all(row.deacl_checkpoint for row in rows):
        raise BadInput("The settings have no section 'deacl'; add one (params/demo.yaml shows how).")
    runs: dict[str, dict[str, Any]] = {}
    before = records.read_skipped(records.skipped_path(settings.profile, "deacl")) if only else []
    lost = [entry for entry in before if entry["encoder"] != only]
    for row in (row for row in rows if only in ("", row.name)):
        dataset = "" if row.deacl_checkpoint else settings.deacl.dataset
        with skipping(settings, lost, [{"dataset": dataset, "encoder": row.name, "defense": "deacl"}]):
            runs[row.name] = _made_elsewhere(row, settings) if row.deacl_checkpoint else _made_here(row, settings)
            if not row.deacl_checkpoint and first():  # what the attacks' notebooks evaluate
                records.write_record(runs[row.name], current_path(settings.profile, row.name))
    if first():
        records.write_skipped(settings.profile, "deacl", lost)
    return runs


def _made_elsewhere(row: EncoderRow, settings: Settings) -> dict[str, Any]:
    """Index of a given checkpoint, which must fit the row's model."""
    path = part("formats.checkpoints").locate(row.deacl_checkpoint, settings.data_root)
    key = records.digest([row.deacl_checkpoint, encoders.load(row, settings.data_root, path).hash])
    return {"key": key, "epochs": [], "history": [], "origin": row.deacl_checkpoint}


def _made_here(row: EncoderRow, settings: Settings) -> dict[str, Any]:
    teacher, launch = encoders.load(row, settings.data_root), part("ops.launch")
    count = launch.processes(settings)
    if count > 1 and not stored(row, teacher, settings)[0]:
        launch.start(count, row.name, settings)
    return finetune(row, teacher, settings)


def finetune(row: EncoderRow, teacher: Encoder, settings: Settings) -> dict[str, Any]:
    """Fine-tune `teacher` as settings.deacl says, alone or as one of several processes that all call this.

    Interrupted work goes on at the last stored state, also with another number of processes. The main process writes
    epoch_N.safetensors for each of cfg.checkpoints and the last epoch, and deacl.json last, which is returned: {"key",
    "made_from", "folder", "epochs": [N, ...], "history": [{"epoch", "preserve", "robust", "held_out_cosine"}, ...],
    "processes"}, `folder` being the name of the run's folder.
    """
    cpu = records.pick_device(settings.device) == "cpu"
    # the same weights go unused in every step (of blocks that the CLS token needs no more); the main process may read
    # a large data set while the others wait
    parallel = [DistributedDataParallelKwargs(static_graph=True), InitProcessGroupKwargs(timeout=timedelta(hours=1))]
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=parallel)
    try:
        return _finetune(row, teacher, settings, accelerator)
    finally:
        if accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)  # else no processes can be launched from here


def _finetune(row: EncoderRow, teacher: Encoder, settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    cfg, precision = settings.deacl, compute.precision(settings.precision, accelerator.device.type)
    done, state, place, made = _from_main(accelerator, lambda: stored(row, teacher, settings))
    if done:
        return done
    key, epochs = records.digest(made), kept(cfg)
    with _all_or_none(accelerator):
        train, held_out = _images(settings, teacher)
        run = tuning(teacher, accelerator, cfg, precision)
        history, batches, sums = _put_back(state, run)

        def store(batches: int = 0, sums: Tensor | None = None) -> None:
            if accelerator.is_main_process:
                _save_state(place / "state.pt", key, run, history, batches, sums)

        if not history:
            history.append({"epoch": 0, "held_out_cosine": robustness(run, held_out, settings.seed)})
        for epoch in range(len(history) - 1, cfg.epochs):
            preserve, robust = train_epoch(run, train, epoch, batches, sums, store)
            cosine, batches, sums = robustness(run, held_out, settings.seed), 0, None
            history.append({"epoch": epoch + 1, "preserve": preserve, "robust": robust, "held_out_cosine": cosine})
            if epoch + 1 in epochs and accelerator.is_main_process:
                save_backbone(run.student, place / f"epoch_{epoch + 1}.safetensors")
            store()
    index = {"key": key, "made_from": made, "folder": place.name, "epochs": epochs, "history": history}
    index["processes"] = accelerator.num_processes
    index |= {"n_train": len(train), "n_train_asked": datasets.asked("deacl", cfg.dataset, settings)}
    if accelerator.is_main_process:
        records.write_record(index, place / "deacl.json")
    accelerator.wait_for_everyone()
    return index


def _images(settings: Settings, teacher: Encoder) -> tuple[Subset, Subset]:
    """Training and held-out images."""
    name = settings.deacl.dataset
    train, held_out = (datasets.load("deacl", name, split, settings, teacher.native) for split in ("train", "val"))
    return train, held_out


def kept(cfg: DeACL) -> list[int]:
    """The epochs whose checkpoints are kept."""
    return sorted({*cfg.checkpoints, cfg.epochs})


def made_from(teacher: Encoder, settings: Settings) -> records.Made:
    """What a DeACL run is made from; the number of processes decides nothing but rounding, nor does what is kept."""
    train, held_out = _images(settings, teacher)
    return records.made_from(
        ["data", "encoders", "pgd", "deacl"],
        settings=settings.deacl.model_dump(exclude={"dataset", "n_train", "n_val", "checkpoints", "processes"}),
        seed=settings.seed,
        precision=compute.precision(settings.precision, records.pick_device(settings.device)),
        hashes={"weights": teacher.hash, "training data": train.hash, "held-out data": held_out.hash},
    )


Found = tuple[dict[str, Any] | None, dict[str, Any] | None, Path, records.Made]


def stored(row: EncoderRow, teacher: Encoder, settings: Settings) -> Found:
    """What is there of a row: its index if finished, else the state stored last if any; its folder, and made_from.

    A finished run that has not kept all epochs that are asked for now stays as it is; they are made in a folder beside
    it. Nothing is computed.
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
    return [index["made_from"] for index in _indices(place) if index.get("made_from")]


def _indices(place: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(place.parent.glob("*/deacl.json")):
        with suppress(BadInput):
            yield records.read_record(path)


def _finished(place: Path, made: records.Made) -> dict[str, Any] | None:
    """The index in a folder; with 'make keep' that of a run that other versions of the code made from the same inputs.

    Its checkpoints stay where they are.
    """
    found = records.reusable(place / "deacl.json", made)
    for index in _indices(place) if records.keeping and not found else ():
        if index["made_from"]["inputs"] == made["inputs"]:
            found = records.accepted(index, made)
            records.write_record(found, place / "deacl.json")
            break
    return found


# --- one of several processes ---


def first() -> bool:
    """Whether this process is the main one, of all nodes."""
    return os.environ.get("RANK", "0") == "0"


def _from_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """What `work` returns in the main process, in all of them; so is its BadInput. Only there are files read."""
    answer = [None, ""]
    if accelerator.is_main_process:
        try:
            answer[0] = work()
        except BadInput as problem:
            answer[1] = str(problem)
    result, problem = broadcast_object_list(answer)
    if problem:
        raise BadInput(problem)
    return result


@contextmanager
def _all_or_none(accelerator: Accelerator) -> Iterator[None]:
    """A BadInput of one process ends all of them: it may not skip the row while the others wait for it."""
    try:
        yield
    except BadInput as problem:
        if accelerator.num_processes == 1:
            raise
        raise RuntimeError(f"BadInput: {problem}") from None


# --- files ---


def current_path(profile: str, encoder: str) -> Path:
    """The index of the run that is current: the one that 02_deacl found or made last, and that tables show."""
    return records.results_dir(profile) / "deacl" / encoder / "deacl.json"


def checkpoint_path(profile: str, encoder: str, folder: str, epoch: int) -> Path:
    """File of the encoder after `epoch` epochs of the DeACL run in `folder`."""
    return records.runs_dir(profile) / "deacl" / encoder / folder / f"epoch_{epoch}.safetensors"


def save_backbone(encoder: Encoder, path: Path) -> None:
    """Backbone weights as safetensors, with the mean and std they were trained with, written whole or not at all."""
    colours = {name: getattr(encoder, name).flatten().tolist() for name in ("mean", "std")}
    records.write_tensors(
        encoder.backbone.state_dict(), {part("formats.checkpoints").CFG[0]: json.dumps(colours)}, path
    )


def _whole(place: Path, epochs: list[int]) -> bool:
    """Whether the checkpoints after these epochs are there and undamaged."""
    try:
        for epoch in epochs:
            records.read_tensors(place / f"epoch_{epoch}.safetensors")
    except BadInput:
        return False
    return True


def _save_state(path: Path, key: str, run: Tuning, history: list[dict], batches: int, sums: Tensor | None) -> None:
    """Store all that goes on from here: `batches` of the epoch are done, and their terms have the `sums` (2,)."""
    buffer = io.BytesIO()
    state = {"key": key, "student": run.student.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save({**state, "history": history, "batches": batches, "sums": sums}, buffer)
    records.write_sealed(buffer.getvalue(), path)


def _read_state(place: Path, key: str, kept: list[int]) -> dict[str, Any] | None:
    """The state of interrupted work; None if there is none that fits."""
    try:
        content = io.BytesIO(records.read_sealed(place / "state.pt") or b"")
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:  # missing, truncated or foreign: whatever the reason, the remedy is to start anew
        return None
    passed = [n for n in kept if n < len(state.get("history", []))]
    fits = state.get("key") == key and _whole(place, passed)
    return state if fits else None


def _put_back(state: dict[str, Any] | None, run: Tuning) -> tuple[list[dict[str, float]], int, Tensor | None]:
    """Go on from a stored state: history, batches done in the current epoch, and the sums of their terms."""
    if not state:
        return [], 0, None
    run.student.load_state_dict(state["student"])
    run.optimizer.load_state_dict(state["optimizer"])
    return state["history"], state["batches"], state["sums"]


def variants(row: EncoderRow, profile: str, data_root: str = "") -> list[tuple[str, int, Path | None]]:
    """What is evaluated of a row: (defense, DeACL epochs, weight file); Standard first, then DeACL epoch by epoch.

    The last epoch is 'deacl', earlier ones 'deacl-epochN'. A deacl_checkpoint, relative paths in `data_root`, is
    'deacl' with epochs GIVEN. Raises BadInput if DeACL has not been run, or was skipped (for the reason it was).
    """
    found: list[tuple[str, int, Path | None]] = [("standard", 0, None)] if "standard" in row.defenses else []
    if "deacl" not in row.defenses:
        return found
    if row.deacl_checkpoint:
        return [*found, ("deacl", GIVEN, part("formats.checkpoints").locate(row.deacl_checkpoint, data_root))]
    return [*found, *tuned(row, profile, _index(row, profile))]


def tuned(row: EncoderRow, profile: str, index: dict[str, Any]) -> list[tuple[str, int, Path]]:
    """The variants that the DeACL run with this index has left of a row, or will leave."""
    if not re.fullmatch(r"[0-9a-f-]+", index["folder"]):  # what a file says leads to no other place
        raise BadInput(f"DeACL of '{row.name}' names no folder; delete results/{profile} and run 02_deacl again.")
    epochs = index["epochs"]
    names = [f"deacl-epoch{n}" for n in epochs[:-1]] + ["deacl"]
    paths = [checkpoint_path(profile, row.name, index["folder"], n) for n in epochs]
    return list(zip(names, epochs, paths, strict=True))


def _index(row: EncoderRow, profile: str) -> dict[str, Any]:
    """What finetune left of a row: of a lab profile that has not run it itself, of the profile it belongs to."""
    places = [profile] if current_path(profile, row.name).is_file() else [profile.partition("/")[0]]
    path = current_path(*places, row.name)
    for lost in records.read_skipped(records.skipped_path(*places, "deacl")):
        if lost["encoder"] == row.name:
            raise BadInput(lost["why"])
    if not path.is_file():
        records.need(profile, "02_deacl")
        raise BadInput(f"{path} is missing although 02_deacl has run; run notebook 02_deacl again.")
    return records.read_record(path)
