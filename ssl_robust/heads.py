"""The three linear heads on frozen tokens, the sliding window, and the losses of heads (section 4.1, appendix C)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import datasets, metrics, protocol
from .datasets import IGNORE, MAX_DEPTH, Subset
from .encoders import Encoder

MIN_DEPTH, BINS = 0.001, 256


class ClassificationHead(nn.Module):
    """One linear layer on the CLS token: (B, D) -> logits (B, classes)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)

    def forward(self, cls: Tensor, patches: Tensor, patch: int) -> Tensor:
        return self.linear(cls)


def upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling of (B, C, h, w) as two products with interpolation matrices.

    With its gradient it takes a third of the time of F.interpolate on CPUs, and on GPUs its gradient is deterministic.
    """
    down, across = (
        F.interpolate(torch.eye(side, device=x.device)[None], scale_factor=factor, mode="linear")[0]
        for side in x.shape[2:]
    )  # (h, factor h), (w, factor w): each row is what one token contributes
    return down.T @ (x @ across)


class _SegmentationHead(nn.Module):
    """Batch norm and 1x1 convolution on patch tokens, bilinear to pixels: (B, D, h, w) -> logits (B, classes, H, W)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(dim), nn.Conv2d(dim, classes, 1)

    def forward(self, cls: Tensor, patches: Tensor, patch: int) -> Tensor:
        return upsample(self.conv(self.norm(patches)), patch)


class _DepthHead(nn.Module):
    """CLS next to every patch token, x4 bilinear, linear to 256 bins, expectation -> depth (B, H, W) in metres."""

    def __init__(self, dim: int, classes: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * dim, BINS, 1)
        edges = torch.linspace(MIN_DEPTH, MAX_DEPTH, BINS + 1)
        self.register_buffer("centres", (edges[1:] + edges[:-1]) / 2, persistent=False)

    def forward(self, cls: Tensor, patches: Tensor, patch: int) -> Tensor:
        tokens = torch.cat([patches, cls[:, :, None, None].expand(-1, -1, *patches.shape[2:])], 1)
        # a 1x1 convolution and bilinear upsampling commute: convolving first costs a sixteenth and gives the same
        bins = upsample(self.conv(tokens), 4).relu_()  # (B, 256, 4h, 4w)
        # expectation over the bins plus 0.1, normalised: both sums in one product with the rows (centres, 1)
        rows = torch.stack([self.centres, torch.ones_like(self.centres)])
        sums = rows @ bins.flatten(2) + 0.1 * rows.sum(1)[:, None]  # (B, 2, 16hw)
        depth = (sums[:, :1] / sums[:, 1:]).unflatten(2, bins.shape[2:])
        size = (patches.shape[2] * patch, patches.shape[3] * patch)
        return F.interpolate(depth, size=size, mode="bilinear")[:, 0].clamp(MIN_DEPTH, MAX_DEPTH)


HEADS = {"classification": ClassificationHead, "segmentation": _SegmentationHead, "depth": _DepthHead}


def predict(head: nn.Module, encoder: Encoder, cls: Tensor, patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Prediction of a head from tokens; a dense one loses the border that the encoder padded an image of `size` by."""
    prediction = head(cls, patches, encoder.patch)
    return prediction if prediction.ndim == 2 else encoder.unpad(prediction, size)


class TaskModel(nn.Module):
    """A frozen encoder and a head: images (B, 3, H, W) in [0,1] -> logits (B, C), (B, C, H, W) or depth (B, H, W).

    Segmentation slides a window of the encoder's native px over the image with `stride` (a fraction of the window)
    and averages the logits where windows overlap. `differences`: those to the paper's text that attacks on the model
    and its evaluation follow. `chances`: what a constant prediction reaches, see training.fitted.
    """

    def __init__(
        self, task: str, encoder: Encoder, head: nn.Module, stride: float = 1.0,
        differences: protocol.Names = frozenset(), chances: Mapping[str, float] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        super().__init__()
        self.task, self.encoder, self.head = task, encoder, head.eval().requires_grad_(False)
        self.protocol, self.chances = differences, chances
        self.stride = max(1, round(stride * encoder.native))
        self.trained = (0, 0)  # images its head was trained on, and asked for; see fitted
        self.fits: int | None = None  # images at a time, where memory has lacked for more

    def forward(self, x: Tensor) -> Tensor:
        if self.task == "segmentation":
            predict = protocol.ask(self.protocol, "window_prediction", self.single, self.single)
            return slide(x, predict, self.encoder.native, self.stride)
        return self.single(x)

    def single(self, x: Tensor) -> Tensor:
        """Prediction without a window; what the encoder padded is cut off again. The head computes in fp32."""
        cls, patches = tokens(self.encoder, x, self.task)
        with _fp32(x.device):
            return predict(self.head, self.encoder, cls.float(), patches.float(), x.shape[-2:])

    def embed(self, x: Tensor) -> Tensor:
        """The embedding that EmbedAttack moves, fp32 (B, F): what the head reads, of dense tasks just the patch tokens.

        Segmentation: the patch tokens of all windows.
        """
        if self.task == "classification":
            return self.encoder.cls(x).float()
        crops = crop_windows(x, self.encoder.native, self.stride)[0] if self.task == "segmentation" else x
        patches = tokens(self.encoder, crops, self.task)[1].float().flatten(1)  # (K * B, F)
        return patches.unflatten(0, (-1, len(x))).transpose(0, 1).flatten(1)


def tokens(encoder: Encoder, x: Tensor, task: str) -> tuple[Tensor, Tensor]:
    """What the head of `task` reads of images in [0,1]: CLS token (B, D) and patch tokens (B, D, h, w).

    Classification has no patch tokens, (B, 0). Depth reads both before the final LayerNorm, as the linear depth heads
    of DINOv2 (Oquab et al. 2024, which the paper follows) and the released code do; the other tasks behind it.
    """
    if task != "classification":
        return encoder(x, normed=task != "depth")
    cls = encoder.cls(x)
    return cls, cls[:, :0]


def _fp32(device: torch.device) -> AbstractContextManager:
    """Ends any autocast around it, so that sums over pixels and bins lose no digits."""
    able = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if able else nullcontext()


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last window ends at the border."""
    return [*range(0, max(length - window, 0), stride), max(length - window, 0)]


def crop_windows(x: Tensor, window: int, stride: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """All windows of images (B, C, H, W) in one batch (K * B, C, window, window), and their K corners (top, left)."""
    tops, lefts = (window_starts(side, window, stride) for side in x.shape[-2:])
    corners = [(top, left) for top in tops for left in lefts]
    return _Cut.apply(x, corners, window), corners


def slide(x: Tensor, predict: Callable[[Tensor], Tensor], window: int, stride: int) -> Tensor:
    """Dense prediction (B, C, H, W) of `predict` on windows, averaged where they overlap."""
    crops, corners = crop_windows(x, window, stride)
    parts = predict(crops)
    ones = parts.new_ones(len(corners), 1, *parts.shape[-2:])
    return _Paste.apply(parts, corners, x.shape[-2:]) / _paste(ones, corners, x.shape[-2:])


def _cut(x: Tensor, corners: list[tuple[int, int]], window: int) -> Tensor:
    """The windows of images (B, C, H, W) at K corners, (K * B, C, window, window)."""
    return torch.cat([x[..., top : top + window, left : left + window] for top, left in corners])


def _paste(parts: Tensor, corners: list[tuple[int, int]], size: tuple[int, int], reverse: bool = False) -> Tensor:
    """Windows (K * B, C, window, window) added up where they lie, (B, C, *size), the first or the last one first."""
    rows = [*zip(parts.unflatten(0, (len(corners), -1)), corners, strict=True)]
    total = parts.new_zeros(*rows[0][0].shape[:2], *size)
    for part, (top, left) in reversed(rows) if reverse else rows:
        total[..., top : top + parts.shape[-2], left : left + parts.shape[-1]] += part
    return total


# Cutting and pasting are each other's gradients. Autograd would instead copy the whole image for every window: on large
# images it moves three times the bytes for the same gradient, bit for bit, as it adds up the last window first, too.


class _Cut(torch.autograd.Function):
    """`_cut` with `_paste` as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, corners: list[tuple[int, int]], window: int) -> Tensor:
        ctx.about = corners, x.shape[-2:]
        return _cut(x, corners, window)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _paste(gradient, *ctx.about, reverse=True), None, None


class _Paste(torch.autograd.Function):
    """`_paste` with `_cut` as its gradient."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, corners: list[tuple[int, int]], size: tuple[int, int]) -> Tensor:
        ctx.about = corners, parts.shape[-1]
        return _paste(parts, corners, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _cut(gradient, *ctx.about), None, None


def pixel_loss(g: Tensor, valid: Tensor, alpha: float = 1.0, lam: float = 0.85) -> Tensor:
    """Eq. 4 per image: alpha * sqrt(mean(g^2) - lam * mean(g)^2) over the valid pixels of g (B, H, W)."""
    pixels = valid.flatten(1).sum(1).clamp(min=1)
    mean, square = g.flatten(1).sum(1) / pixels, (g**2).flatten(1).sum(1) / pixels
    return alpha * (square - lam * mean**2).clamp(min=1e-12).sqrt()  # clamped: the root has no gradient at 0


def gradient_loss(g: Tensor, valid: Tensor, scales: int = 4) -> Tensor:
    """Eq. 3 per image: sum over 4 scales of |grad_x R| + |grad_y R|, divided by n = valid pixels.

    R^k is g at every 2^k-th pixel. A difference counts where both of its pixels are valid.
    """
    total = g.new_zeros(len(g))
    for k in range(scales):
        r, v = g[:, :: 2**k, :: 2**k], valid[:, :: 2**k, :: 2**k]
        for axis in (1, 2):
            both = v.narrow(axis, 1, v.shape[axis] - 1) & v.narrow(axis, 0, v.shape[axis] - 1)
            total = total + torch.where(both, r.diff(dim=axis).abs(), 0.0).flatten(1).sum(1)
    return total / valid.flatten(1).sum(1).clamp(min=1)


def depth_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_pixel + 0.5 L_grad per image (B,), from depths (B, H, W) in metres; appendix C.1, eq. 3 and 4."""
    valid = metrics.valid_depth(target)
    log_difference = torch.where(valid, prediction.clamp(min=1e-6).log() - target.clamp(min=1e-6).log(), 0.0)
    return pixel_loss(log_difference, valid) + 0.5 * gradient_loss(log_difference, valid)


def training_loss(task: str, prediction: Tensor, target: Tensor) -> Tensor:
    """What a head minimises, a scalar: cross-entropy over images or pixels, or the depth loss."""
    if task == "depth":
        return depth_loss(prediction, target).mean()
    return F.cross_entropy(prediction, target.long(), ignore_index=IGNORE)


def labels(task: str, prediction: Tensor) -> Tensor:
    """What a prediction says: class (B,), mask uint8 (B, H, W), or depth (B, H, W) itself; not finite: -1 or IGNORE."""
    if task == "depth":
        return prediction
    if task == "classification":
        return torch.where(metrics.finite(prediction), prediction.argmax(1), -1)
    return torch.where(metrics.finite(prediction), prediction.max(1).indices.to(torch.uint8), IGNORE)


def predictions(model: TaskModel, subset: Subset, count: int) -> dict[str, object]:
    """`count` images of equal size with truth and prediction, as plots.prediction_panel shows them."""
    _, x, target = next(datasets.batches(subset, count))
    with torch.no_grad():
        said = labels(model.task, model(x.to(model.encoder.mean.device)))
    return {"images": x, "target": target, "pred_clean": said.cpu(), "classes": list(subset.classes)}
