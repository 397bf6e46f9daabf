"""What a step costs and how fast devices are: FLOPs, bytes, and rates that turn them into seconds.

The cost of one image is counted, not measured: each model runs once on torch's meta device, which computes shapes only.
Seconds are FLOPs and written bytes over a device's rates. The rate of a CPU follows from a short measurement and two
constants that were fitted to runs of this project; those of GPUs are data-sheet numbers times an assumed efficiency.
Attack steps and DeACL have a rate of their own where they are computed in bf16.
"""

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .. import compute, datasets, encoders, heads, records
from ..deacl import loss_terms
from ..settings import EncoderRow, Settings


class Device(NamedTuple):
    """Rates at which a device works through what `Cost` counts."""

    name: str
    flops: float  # per second
    written: float  # bytes per second
    memory: float = math.inf  # bytes
    bf16: float = 0.0  # FLOPs per second of attack steps in bf16; 0: they are computed in fp32
    readers: int = 1  # processes that read images for it


class Cost(NamedTuple):
    """One image through one step of a model: what passes, what stays until the gradient is known."""

    flops: float = 0.0
    written: float = 0.0  # bytes of all results of operations
    launches: float = 0.0  # operations, once per batch
    kept: float = 0.0  # bytes kept for the gradient


# --- devices ---

# TFLOP/s in fp32 without tensor cores and in dense bf16 with them (0: none), GB/s, GB: the makers' data sheets; the
# longest name that fits the device counts
GPUS = {
    "H200": (67.0, 989, 4800, 141), "H100": (67.0, 989, 3350, 80), "H100 PCIe": (51.0, 756, 2000, 80),
    "A100": (19.5, 312, 1555, 40), "A100-SXM4-80GB": (19.5, 312, 2039, 80), "L40S": (91.6, 362, 864, 48),
    "L40": (90.5, 181, 864, 48), "L4": (30.3, 121, 300, 24), "A10": (31.2, 125, 600, 24),
    "RTX A6000": (38.7, 155, 768, 48), "RTX 4090": (82.6, 165, 1008, 24), "RTX 3090": (35.6, 71, 936, 24),
    "V100": (15.7, 0, 900, 16), "T4": (8.1, 0, 320, 16),
}  # fmt: skip
REFERENCE = ("H100", "RTX 4090", "L4")
ASSUMED_FP32, ASSUMED_BF16 = 0.5, 0.3  # assumed, not measured: shares of the data sheet's FLOP/s
ASSUMED_WRITTEN = 0.2  # assumed share of the data sheet's bytes/s; written bytes are also read, twice or so
ASSUMED_HALF = 0.6  # assumed: bytes of a step in bf16 for each of it in fp32; norms and sums stay fp32
ASSUMED_READERS = 8  # assumed: CPU cores beside each GPU, which read images while it computes
RENTED, ASSUMED_PRICE = "H100", {"H100": 2.5}  # assumed: US dollars for an hour of one rented GPU
CPU_FLOPS, CPU_WRITTEN = 0.6, 1 / 125  # fitted: share of a matrix product's rate, and bytes written per FLOP of it
ASSUMED_CPU_BF16 = 0.3  # assumed share of a bf16 matrix product's rate, as no such CPU has run the project yet
# Shares of its steps that an image takes part in PGD on classes before its class is surely lost (stop_when_broken), by
# defense: fitted to runs of this project
STEPS_TAKEN = {"standard": 0.15, "deacl": 0.45}
LAUNCH = 1e-5  # seconds an operation takes at least


def gpu(name: str, memory: float = 0.0, precision: str = "auto") -> Device:
    """A GPU by its name as CUDA tells it; an unknown one counts as an L4. `memory`: its bytes, if known.

    precision: the setting; 'auto' and 'bf16' are bf16 where the GPU has tensor cores for it.
    """
    fits = [known for known in GPUS if known.replace("-", " ") in name.replace("-", " ")]
    fp32, bf16, bandwidth, gigabytes = GPUS[max(fits, key=len, default="L4")]
    steps = 0.0 if precision == "fp32" else bf16 * 1e12 * ASSUMED_BF16
    rates = fp32 * 1e12 * ASSUMED_FP32, bandwidth * 1e9 * ASSUMED_WRITTEN
    return Device(name, *rates, memory or gigabytes * 1e9, steps, ASSUMED_READERS)


def cpu(seconds: float = 0.3, precision: str = "auto") -> Device:
    """This machine's CPU, its rate measured by matrix products for that many seconds; `precision`: the setting."""
    rate = _products(torch.float32, seconds)
    low = compute.precision(precision, "cpu") == "bf16"
    steps = _products(torch.bfloat16, seconds) * ASSUMED_CPU_BF16 if low else 0.0
    name = f"CPU, threads: {torch.get_num_threads()}"
    return Device(name, rate * CPU_FLOPS, rate * CPU_WRITTEN, bf16=steps, readers=max(1, datasets.ahead()))


def _products(dtype: torch.dtype, seconds: float) -> float:
    """FLOPs per second of matrix products, the best of some."""
    a, best, end = torch.rand(1024, 1024).to(dtype), math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def in_steps(device: Device) -> Device:
    """The device as it computes attack steps: in bf16 if it does so."""
    return device._replace(flops=device.bf16, written=device.written / ASSUMED_HALF) if device.bf16 else device


def kind(settings: Settings) -> str:
    """'cuda' or 'cpu': where the settings will be run, as far as can be said here."""
    return "cuda" if settings.device == "cuda" else records.pick_device(settings.device)


def this_device(settings: Settings) -> Device:
    """What the notebooks would use here: the GPU unless there is none or device is cpu."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        return cpu(precision=settings.precision)
    memory = torch.cuda.get_device_properties(0).total_memory
    return gpu(torch.cuda.get_device_name(), memory, settings.precision)


# --- the cost of one image ---


def seconds(flops: float, written: float, launches: float, device: Device) -> float:
    """Expected seconds on `device` of so many FLOPs, written bytes and operations."""
    return flops / device.flops + written / device.written + launches * LAUNCH


class _Count(TorchDispatchMode):
    """Counts FLOPs by torch's formulas (those of FlopCounterMode), operations, and the bytes they write.

    Left out are attention maps (tokens x tokens), which no device keeps, and what has the shape of a weight: its
    gradient is made once a batch, not once an image.
    """

    def __init__(self, tokens: int, weights: list[Tensor]) -> None:
        super().__init__()
        self.map, self.flops, self.written, self.launches, self.kept = (tokens, tokens), 0, 0, 0, {}
        self.weights = {w.untyped_storage()._cdata for w in weights}
        self.shapes = {shape for w in weights if w.ndim > 1 for shape in (w.shape, w.shape[::-1])}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [r for r in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(r, Tensor)]
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        if not func.is_view:
            self.launches += 1
            self.written += sum(r.nbytes for r in made if r.shape[-2:] != self.map and r.shape not in self.shapes)
        return result

    def cost(self) -> Cost:
        """What was counted so far."""
        return Cost(self.flops, self.written, self.launches, sum(self.kept.values()))

    def keep(self, tensor: Tensor) -> Tensor:
        """Called for each tensor that the gradient needs; one storage counts once, weights do not."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights and tensor.shape[-2:] != self.map:
            self.kept[storage._cdata] = storage.nbytes()
        return tensor


@cache
def architecture(name: str, model: str, native: int | None) -> encoders.Encoder:
    """The encoder of a row on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return encoders.random_init(EncoderRow(name=name, timm=model, native=native))


def encoder_of(row: EncoderRow) -> encoders.Encoder:
    """The row's architecture; an encoder of the user's own, whose cost is unknown, counts as a ViT-B/16."""
    if row.call:
        return architecture(row.name, "vit_base_patch16_224", row.native)
    return architecture(row.name, row.timm, row.native)


class Step(NamedTuple):
    """Cost of the forward pass alone, and of forward and backward together."""

    forward: Cost
    whole: Cost


def attack_step(
    encoder: encoders.Encoder, task: str, kind: str, size: tuple[int, int], classes: int, stride: float
) -> Step:
    """One image of `size` (H, W) through one attack step: 'embed' (EmbedAttack) or 'task', backward to the image.

    The forward pass of 'task' is a prediction. A linear head on one token adds nothing that could be seen, so PGD costs
    what EmbedAttack does; in segmentation EmbedAttack costs what the encoder does on every window.
    """
    if kind == "task" and task != "classification":
        return traced(encoder, task, size, classes, stride)
    if task != "segmentation":
        return traced(encoder, "cls" if task == "classification" else "embed", size)
    count, window = windows(size, encoder.native, stride), tuple(min(side, encoder.native) for side in size)
    return Step(*(Cost(*(count * part for part in made)) for made in traced(encoder, "embed", window)))


@cache
def traced(encoder: encoders.Encoder, what: str, size: tuple[int, int], classes: int = 0, stride: float = 1.0) -> Step:
    """Cost of one image of `size`, counted once.

    what: 'embed' is the encoder, 'cls' its CLS token alone, 'segmentation' and 'depth' their attack, 'train' a step of
    eq. 2 without its attack.
    """
    prepare = {"embed": _embed, "cls": _embed, "train": _train}.get(what, _predict)
    side = tuple(min(s, encoder.native) for s in size) if what == "segmentation" else size
    with torch.device("meta"):
        loss = prepare(encoder, what, size, classes, stride)
    step = _counted(loss, encoder, side)
    encoder.backbone.requires_grad_(False)
    return step


@cache
def head_step(encoder: encoders.Encoder, task: str, size: tuple[int, int], classes: int) -> Step:
    """Cost of one training step of a head on the tokens of one image of `size`."""
    with torch.device("meta"):
        head, target = heads.HEADS[task](encoder.dim, classes).train(), _target(task, size)
        cls, patches = torch.zeros(1, encoder.dim), torch.zeros(1, encoder.dim, *grid(encoder, size))

    def loss() -> Tensor:
        return heads.training_loss(task, heads.predict(head, encoder, cls, patches, size), target)

    return _counted(loss, encoder, size)


def grid(encoder: encoders.Encoder, size: tuple[int, int]) -> tuple[int, ...]:
    """Rows and columns of patch tokens of an image of `size`."""
    return tuple(-(-side // encoder.patch) for side in size)


def _counted(loss: Callable[[], Tensor], encoder: encoders.Encoder, side: tuple[int, int]) -> Step:
    """What `loss` and its gradient cost; `side`: the size of what the encoder sees at once."""
    prefix = getattr(encoder.backbone, "num_prefix_tokens", 0) or 0
    count = _Count(prefix + math.prod(grid(encoder, side)), list(encoder.parameters()))
    with count, torch.autograd.graph.saved_tensors_hooks(count.keep, lambda tensor: tensor):
        value = loss()
        forward = count.cost()
        value.backward()
    return Step(forward, count.cost())


def weight_bytes(encoder: encoders.Encoder) -> int:
    """Bytes of the encoder's weights."""
    return sum(p.nbytes for p in encoder.parameters())


def head_bytes(encoder: encoders.Encoder, task: str, classes: int) -> int:
    """Bytes of one head of it."""
    with torch.device("meta"):
        return sum(p.nbytes for p in heads.HEADS[task](encoder.dim, classes).parameters())


def _target(task: str, size: tuple[int, int]) -> Tensor:
    if task == "classification":
        return torch.zeros(1, dtype=torch.long)
    return torch.zeros(1, *size, dtype=torch.long if task == "segmentation" else torch.float)


def _embed(encoder: encoders.Encoder, what: str, size: tuple[int, int], *_: Any) -> Callable[[], Tensor]:
    x = torch.zeros(1, 3, *size, requires_grad=True)
    return lambda: torch.linalg.vector_norm(encoder.cls(x) if what == "cls" else encoder(x)[1])


def _predict(
    encoder: encoders.Encoder, task: str, size: tuple[int, int], classes: int, stride: float
) -> Callable[[], Tensor]:
    model = heads.TaskModel(task, encoder, heads.HEADS[task](encoder.dim, classes), stride)
    x, target = torch.zeros(1, 3, *size, requires_grad=True), _target(task, size)
    return lambda: heads.training_loss(task, model(x), target)


def _train(encoder: encoders.Encoder, what: str, size: tuple[int, int], *_: Any) -> Callable[[], Tensor]:
    encoder.backbone.requires_grad_(True)
    x, goal = torch.zeros(1, 3, *size), torch.zeros(1, encoder.dim)
    return lambda: sum(loss_terms(encoder, goal, x, x))


# --- images of the data sets, as far as the cost depends on them ---


class Shape(NamedTuple):
    """Typical size of a data set's images, and its classes: what the cost depends on before any file is there."""

    height: int
    width: int
    classes: int = 0


SHAPES = {
    "scenes": Shape(64, 64, 10), "cifar10": Shape(32, 32, 10), "cifar100": Shape(32, 32, 100),
    "stl10": Shape(96, 96, 10), "voc2012": Shape(375, 500, 21), "ade20k": Shape(512, 683, 150),
    "cityscapes": Shape(1024, 2048, 19), "nyuv2": Shape(480, 640), "imagenet": Shape(400, 480),
    "imagenette": Shape(320, 427), "tiny_imagenet": Shape(64, 64), "camvid": Shape(360, 480, 11),
    "sevenscenes": Shape(480, 640), "imagenet_samples": Shape(256, 341),
}  # fmt: skip
OWN = Shape(375, 500, 20)  # a folder of the user's own: the size of a common photograph


def shape(name: str) -> Shape:
    """Shape of a data set; that of a common photograph where it is not known."""
    return SHAPES.get(name, OWN)


def image_size(
    task: str, part: str, name: str, size: int | str | tuple[int, int], native: int
) -> tuple[int, int]:  # fmt: skip
    """(H, W) of an image as the encoder gets it, in `part` 'train' or 'test'; see datasets.transform."""
    height, width, _ = shape(name)
    if task in ("classification", "deacl"):
        side = size if isinstance(size, int) else native
        return side, side
    if task == "segmentation" and part == "train":
        return native, native
    small = min(height, width)
    if isinstance(size, tuple):
        size = "original" if height < size[0] or width < size[1] else size[0]
    goal = {"native": native, "original": max(small, native)}.get(size, size)
    return round(height * goal / small), round(width * goal / small)


def windows(size: tuple[int, int], native: int, stride: float) -> int:
    """Windows that slide over an image of `size`."""
    step = max(1, round(stride * native))
    return math.prod(len(heads.window_starts(side, min(side, native), step)) for side in size)


def reading(name: str, size: tuple[int, int]) -> float:
    """Seconds of one CPU core to read an image and bring it to `size`: decoding by source, resizing by result."""
    height, width, _ = shape(name)
    source = 0 if name == "scenes" else height * width
    return 1e-3 + 2e-8 * source + 7e-9 * math.prod(size)
