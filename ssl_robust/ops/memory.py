"""How much memory of a GPU a profile's steps take: what their tensors hold at a time, at the most.

The steps themselves run, on tensors that have shapes and no values. Their sums are below what a GPU needs by its own
context and by gaps between tensors, some 2 GB; traced peaks of an earlier version were 2 to 8 % above these.
"""

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import attacks, deacl, evaluate, heads, records
from ..encoders import Encoder
from ..heads import TaskModel
from ..settings import Settings
from ..tasks import TASKS
from . import plan


class Need(NamedTuple):
    """What one step takes."""

    what: str
    images: int  # at a time
    bytes: float


class _Peak(TorchDispatchMode):
    """`most`: the bytes of all storages that were alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # no tensor has values: whatever is asked for in special cases is not the case
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.live -= size


def _most(step: Callable[[], None], *modules: nn.Module) -> float:
    """Bytes of these modules and of a step that uses them; they are of the meta device and useless afterwards."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Peak() as peak:
        for module in modules:
            module.to_empty(device="cpu")
        step()
    return peak.most


def _model(task: str, encoder: Encoder, classes: int, stride: float) -> TaskModel:
    with torch.device("meta"):
        return TaskModel(task, copy.deepcopy(encoder), heads.HEADS[task](encoder.dim, classes), stride)


def attack_peak(
    task: str, encoder: Encoder, size: tuple[int, int], classes: int, stride: float, count: int, bf16: bool = True
) -> float:
    """Bytes of a step of the task's own attack on `count` images of `size` (H, W), and of their prediction in fp32.

    encoder: of the meta device, as plan.meta gives it.
    """
    model = _model(task, encoder, classes, stride)

    def step() -> None:
        x = torch.empty(count, 3, *size)
        target = torch.zeros(count, *(() if task == "classification" else size)).to(*[torch.long] * (task != "depth"))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = attacks.loss_for("task", model, x, target, 2)
            value = loss(adv := x.clone().requires_grad_(), 2)
        torch.autograd.grad(value.sum(), adv)
        del value, loss
        with torch.no_grad():
            model(x)

    return _most(step, model)


def tuning_peak(encoder: Encoder, count: int, bf16: bool = True) -> float:
    """Bytes of the step of eq. 2 on `count` images, beside teacher and momentum; encoder as in `attack_peak`."""
    student, teacher, momentum = (copy.deepcopy(encoder) for _ in range(3))

    def step() -> None:
        weights = [*student.backbone.requires_grad_(True).parameters()]
        x, adv = (torch.empty(count, 3, encoder.native, encoder.native) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = sum(deacl.loss_terms(student, torch.empty(count, encoder.dim), x, adv))
        torch.autograd.grad(loss, weights, allow_unused=True)

    return _most(step, student, teacher, momentum)


def needs(settings: Settings) -> list[Need]:
    """What the largest encoders take, of each task on the data set with most logits, and in DeACL; largest first."""
    bf16, rows = settings.precision != "fp32", [row for row in settings.encoders if not row.call]
    sizes = {row.name: plan.bytes_of(plan.meta(row)) for row in rows}
    found = []
    for row in (row for row in rows if sizes[row.name] >= 0.95 * max(sizes.values())):
        for task in (task for task in TASKS if getattr(settings, task) and settings.attack):
            places = [plan.Place(task, name, row, settings) for name in settings.task(task).datasets]
            place = max(places, key=lambda p: p.classes * math.prod(p.size("test")))
            shape = place.encoder, place.size("test"), place.classes, place.stride
            model, setting = _model(task, place.encoder, place.classes, place.stride), place.section.attack_batch
            count = min(evaluate.batch_of(model, *shape[1:3], setting, "cuda"), place.counts[2])  # what a GPU takes
            what = f"{TASKS[task].attack} on {place.name}, {row.name}"
            found.append(Need(what, count, attack_peak(task, *shape, count, bf16)))
        if row.tuned and settings.deacl:
            count = min(settings.deacl.batch, plan.counts("deacl", settings.deacl.dataset, settings)[0])
            found.append(Need(f"DeACL of {row.name}", count, tuning_peak(plan.meta(row), count, bf16)))
    return sorted(found, key=lambda need: -need.bytes)


def text(settings: Settings) -> str:
    """The largest needs in words; nothing of callables."""
    each = [f"- {need.what}: {records.size(need.bytes)}, {need.images} images at a time" for need in needs(settings)]
    head = "Memory of a GPU (some 2 GB more; where it lacks, fewer images at a time):"
    return "\n".join([head, *each]) if each else ""
