"""Where the authors' released code departs from the paper's text, each departure under a name of its own.

The main code follows the paper and asks here at few places. `protocol: released` switches all departures on, a list of
names single ones. Everything here takes `names`, those that are active; the empty set gives what the paper says.
"""

import copy
from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from .. import metrics
from ..datasets import IGNORE, Subset
from ..protocol import Names, active
from ..settings import Settings
from ..tasks import TASKS

Statistic = Callable[[str, Tensor, Tensor, int], Tensor]

WARM_UP = 100  # calls of a new depth loss that leave its variance term out
OFFSET = 0.001  # metres, added to depths before their logarithm
SCALES = (1, 2, 4, 6)  # of the gradient term: every so manieth row
DEPTH_SIZE = (480, 640)
RECIPE = {"classification": {"batch": 128}, "segmentation": {"lr": 1e-3, "weight_decay": 1e-4}}
STRIDES = {518: 341 / 518}  # of the window of `native` px; 100 px of 224 for DINO, taken for every other size as well
STRIDE = 100 / 224

# Each departure: the tasks it concerns, what the paper does, what the released code does
_DEPARTURES = {
    "embed_mse": (
        TASKS,
        "EmbedAttack makes the L2 distance between attacked and clean embedding large.",
        "It makes their mean squared error large. The sign of the gradient is the same, so images differ by rounding.",
    ),
    "pgd_scaled_logits": (
        ("classification",),
        "PGD makes the cross-entropy of the logits large.",
        "Logits are first divided by their largest value where that is above 1, held constant. Without that the "
        "cross-entropy of certain heads (learning rate 0.5) has no gradient in floating point; here PGD climbs its "
        "margin.",
    ),
    "segpgd_two_means": (
        ("segmentation",),
        "SegPGD sums the loss over right and over wrong pixels and divides both sums by HW.",
        "Each of the two sets is averaged on its own, so a few pixels can weigh as much as all the others.",
    ),
    "window_probabilities": (
        ("segmentation",),
        "Where windows overlap, logits are averaged, and the cross-entropy is of logits.",
        "Softmax probabilities are averaged, and SegPGD's cross-entropy takes them for logits: softmax twice.",
    ),
    "class0_ignored": (
        ("segmentation",),
        "Every class counts in mIoU, the background of VOC 2012 among them.",
        "Class 0 stands for unlabelled pixels everywhere, so a background class counts neither in mIoU nor in SegPGD.",
    ),
    "depth_attack_loss": (
        ("depth",),
        "DepthPGD makes the training loss of the depth head large.",
        "The loss is built anew for each image and is in its warm-up for 100 calls, in which L_pixel is only "
        "sqrt(0.15) |mean log error|; L_grad takes vertical differences alone, of rows two apart, over every 1st, "
        "2nd, 4th and 6th row, each scale divided by its own pixels.",
    ),
    "unnormalised_evaluation": (
        ("segmentation", "depth"),
        "Attacked images are judged by the model that was attacked.",
        "Images of SegPGD and DepthPGD, made on a model with normalisation, are judged without it; clean ones and "
        "those of EmbedAttack with it.",
    ),
    "depth_unmasked": (
        ("depth",),
        "RMSE is over the pixels whose true depth is known.",
        "RMSE under attack is over all pixels, those without a true depth counting as 0 m; clean RMSE is not.",
    ),
    "depth_flipped": (
        ("depth",),
        "Test images are shown as they are.",
        "Test images and their depth maps are flipped left to right at random.",
    ),
    "depth_mean_of_images": (
        ("depth",),
        "RMSE is the root of the mean over the pixels of all images.",
        "RMSE is computed for each image, and the mean of these is reported.",
    ),
    "head_recipe": (
        ("classification", "segmentation"),
        "Classification heads train in batches of 16; segmentation heads with learning rate 1e-4 and weight decay "
        "1e-3.",
        "Batches of 128 for classification; learning rate 1e-3 and weight decay 1e-4 for segmentation.",
    ),
    "native_input": (
        ("classification", "segmentation"),
        "The text names no size; the profile does.",
        "The short side of every image is resized to the encoder's native px, that of test images of segmentation by "
        "nearest neighbour.",
    ),
    "depth_480x640": (
        ("depth",),
        "The text names no size; the profile does.",
        "Images and depth maps are resized to 480x640 px, whatever the encoder (here smaller ones, such as the "
        "rendered scenes, stay as they are).",
    ),
    "dense_stride": (
        ("segmentation",),
        "The window moves by the stride of the profile, 341 px of 518 for DINOv2.",
        "It moves by 100 px of 224 for DINO and by 341 px of 518 for DINOv2.",
    ),
}
DIFFERENCES: dict[str, dict[str, Any]] = {
    name: dict(zip(("tasks", "paper", "released"), about, strict=True)) for name, about in _DEPARTURES.items()
}
# Attacks that a difference bears on, where it is not all of them and the clean value too
TOUCHES = {
    "embed_mse": ("embed",), "pgd_scaled_logits": ("task",), "segpgd_two_means": ("task",),
    "depth_attack_loss": ("task",), "unnormalised_evaluation": ("task",), "depth_unmasked": ("embed", "task"),
}  # fmt: skip
JUDGING = {"segmentation": ("class0_ignored",), "depth": ("depth_unmasked", "depth_mean_of_images")}  # the metric
OTHER_HEADS = {"head_recipe", "native_input", "depth_480x640"}  # differences under which heads are trained otherwise


def adjusted(settings: Settings, native: int) -> Settings:
    """`settings` with the head recipe, input size and stride of the active protocol, for an encoder of `native` px."""
    names, changes = active(settings), {}
    for task in (task for task in TASKS if getattr(settings, task)):
        change: dict[str, Any] = dict(RECIPE.get(task, {})) if "head_recipe" in names else {}
        if "native_input" in names and task != "depth":
            change["size"] = "native"
        if "depth_480x640" in names and task == "depth":
            change["size"] = DEPTH_SIZE
        if "dense_stride" in names and task == "segmentation":
            change["stride"] = STRIDES.get(native, STRIDE)
        changes[task] = settings.task(task).model_copy(update=change)
    return settings.model_copy(update=changes)


# --- attacks ---


def attack_loss(kind: str, task: str, names: Names) -> list[Callable[..., Tensor]]:
    """The loss that replaces the one of attacks.py for the attack `kind` ('embed' or 'task'); empty: none does.

    As a list, so that callers pass it on as the last argument that a loss of attacks.py may be given.
    """
    name, loss = {
        "embed": ("embed_mse", mean_square),
        "classification": ("pgd_scaled_logits", scaled_cross_entropy),
        "segmentation": ("segpgd_two_means", two_means),
        "depth": ("depth_attack_loss", depth_loss),
    }["embed" if kind == "embed" else task]
    return [loss] if name in names else []


def mean_square(embedding: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error of embeddings (B, F) -> (B,)."""
    return (embedding - clean).square().mean(1)


def scaled_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy (B,) of logits (B, C) divided by max(1, largest logit), which gets no gradient."""
    return F.cross_entropy(logits / logits.detach().amax(1, keepdim=True).clamp(min=1), truth, reduction="none")


def two_means(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean loss of the right pixels and of the wrong ones, (B, 2); that of an empty set is 0.

    logits (B, C, H, W), mask (B, H, W) with IGNORE where a pixel is in neither set.
    """
    pixel = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none").flatten(1)  # 0 where ignored
    right, seen = (logits.max(1).indices == mask).flatten(1), (mask != IGNORE).flatten(1)
    sets = (right & seen, ~right & seen)
    return torch.stack([(pixel * chosen).sum(1) / chosen.sum(1).clamp(min=1) for chosen in sets], 1)


def depth_loss(prediction: Tensor, depth: Tensor, t: int) -> Tensor:
    """The loss (B,) that DepthPGD climbs in step t = 1.. , from depths (B, H, W) in metres: L_pixel + 0.5 L_grad.

    In the warm-up L_pixel is sqrt(0.15) |mean of g|, then the variance of g is added under the root.
    """
    valid = depth > 0
    g = torch.where(valid, (prediction + OFFSET).log() - (depth + OFFSET).log(), 0.0)
    pixels = valid.flatten(1).sum(1).clamp(min=1)
    mean = g.flatten(1).sum(1) / pixels
    pixel = 0.15**0.5 * mean.abs()
    if t > WARM_UP:
        squares = torch.where(valid, g - mean[:, None, None], 0.0).square().flatten(1).sum(1)
        pixel = (squares / (pixels - 1).clamp(min=1) + pixel.square()).clamp(min=1e-12).sqrt()
    rows = sum(_between_rows(g[:, ::s], valid[:, ::s]) for s in SCALES)
    return pixel + 0.5 * rows


def _between_rows(g: Tensor, valid: Tensor) -> Tensor:
    """Sum of |differences| of rows two apart of g (B, H, W) where both are valid, divided by the valid pixels, (B,)."""
    both = valid[:, :-2] & valid[:, 2:]
    steps = torch.where(both, (g[:, :-2] - g[:, 2:]).abs(), 0.0)
    return steps.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


# --- predictions and test images ---


def window_prediction(predict: Callable[[Tensor], Tensor], names: Names) -> Callable[[Tensor], Tensor]:
    """What is averaged where windows overlap: logits (B, C, H, W), or their softmax."""
    return (lambda crops: predict(crops).softmax(1)) if "window_probabilities" in names else predict


def has_background(classes: tuple[str, ...], names: Names) -> bool:
    """Whether class 0 is left out: only a background is, other data sets mark unlabelled pixels as IGNORE anyway."""
    return "class0_ignored" in names and classes[:1] == ("background",)


def as_judged(kind: str, model: Any, adv: Tensor, names: Names) -> Tensor:
    """Images (B, 3, H, W) under the attack `kind` as the TaskModel `model` is shown them when they are judged."""
    if kind == "task" and model.task != "classification" and "unnormalised_evaluation" in names:
        return adv * model.encoder.std + model.encoder.mean  # which the model's normalisation turns into adv again
    return adv


def test_images(test: Subset, names: Names) -> Subset:
    """The test images as they are attacked and judged: flipped at random (by seed and image), class 0 as IGNORE.

    With native_input images of segmentation are brought to their size by nearest neighbour.
    """
    steps = [test.transform]
    if test.task == "segmentation" and "native_input" in names:
        steps = [_nearest(step) for step in test.transform.transforms]
    if test.task == "depth" and "depth_flipped" in names:
        steps.append(v2.RandomHorizontalFlip())
    if test.task == "segmentation" and has_background(test.classes, names):
        steps.append(_without_class0)
    if steps != [test.transform]:
        test = copy.copy(test)
        test.transform = v2.Compose(steps)
    return test


def _nearest(step: v2.Transform) -> v2.Transform:
    return v2.Resize(step.size, v2.InterpolationMode.NEAREST) if isinstance(step, v2.Resize) else step


def _without_class0(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return image, mask.masked_fill(mask == 0, IGNORE)


# --- metrics ---


def statistics(task: str, kind: str, names: Names) -> Statistic:
    """What is kept of each image under the attack `kind`: metrics.statistics, or for depth (RMSE, 1)."""
    if task != "depth" or not names & {"depth_unmasked", "depth_mean_of_images"}:
        return metrics.statistics

    def depth_statistics(task: str, prediction: Tensor, target: Tensor, classes: int) -> Tensor:
        valid = torch.ones_like(target, dtype=torch.bool) if unmasked(kind, names) else metrics.valid_depth(target)
        stats = metrics.depth_statistics(prediction, target, valid)
        return _rmse_of_images(stats) if "depth_mean_of_images" in names else stats

    return depth_statistics


def unmasked(kind: str, names: Names) -> bool:
    """Whether pixels without a true depth count."""
    return kind != "clean" and "depth_unmasked" in names


def _rmse_of_images(stats: Tensor) -> Tensor:
    """(sum of squares, pixels) of each image -> (its RMSE, 1), or (0, 0) where no pixel counts."""
    pixels = stats[:, 1]
    return torch.stack([(stats[:, 0] / pixels.clamp(min=1)).sqrt(), (pixels > 0).double()], 1)


def reduction(task: str, classes: tuple[str, ...], names: Names) -> metrics.Reduction:
    """How sums of `statistics` over images become the metric; see metrics.value_of_sums."""
    if task == "depth" and "depth_mean_of_images" in names:
        return lambda task, sums, n: sums[:, 0] / sums[:, 1].clamp(min=1)
    if task == "segmentation" and has_background(classes, names):
        return lambda task, sums, n: metrics.mean_iou(sums[:, 1:])
    return metrics.value_of_sums


def listed(task: str, stats: Tensor, classes: tuple[str, ...], names: Names) -> list[Any]:
    """Statistics (N, ...) as records keep them, see metrics.listed: without class 0 where it does not count.

    A mean of images is one number an image, its RMSE, or None where no pixel counts.
    """
    if task == "depth" and "depth_mean_of_images" in names:
        return [float(f"{rmse:.9g}") if counts else None for rmse, counts in stats.tolist()]
    if task == "segmentation" and has_background(classes, names):
        stats = stats.index_fill(1, torch.tensor([0]), 0.0)
    return metrics.listed(task, stats)


def way(task: str, kind: str, classes: tuple[str, ...], names: Names) -> str:
    """Which departures bear on the metric under the attack `kind`, in words; '' if it is the paper's."""
    bears = {
        "class0_ignored": has_background(classes, names), "depth_unmasked": unmasked(kind, names),
        "depth_mean_of_images": "depth_mean_of_images" in names,
    }  # fmt: skip
    return " ".join(name for name in JUDGING.get(task, ()) if bears[name])


def chances(task: str, targets: list[Tensor], classes: tuple[str, ...], _: Names) -> dict[str, float]:
    """What the best constant prediction reaches on these targets, by the `way` in which the metric is taken."""
    found = {}
    for names in map(frozenset, chain.from_iterable(combinations(JUDGING.get(task, ()), k) for k in range(3))):
        counted = [t.masked_fill(t == 0, IGNORE) for t in targets] if has_background(classes, names) else targets
        value = constant_value(task, counted, len(classes), unmasked("task", names), names)
        found[way(task, "task", classes, names)] = value
    return found


def constant_value(task: str, targets: list[Tensor], classes: int, everywhere: bool, names: Names) -> float:
    """metrics.constant_value as the active protocol judges it; `everywhere`: see unmasked."""
    if task != "depth" or not (everywhere or "depth_mean_of_images" in names):
        return metrics.constant_value(task, targets, classes)
    depths = [(t if everywhere else t[metrics.valid_depth(t)]).double().flatten() for t in targets]
    if "depth_mean_of_images" not in names:
        return float(torch.cat(depths).std(correction=0))
    # the mean of RMSEs has no best constant in closed form, but is convex in it: a fine grid finds it
    moments = torch.tensor([(d.mean(), d.var(correction=0)) for d in depths if len(d)], dtype=torch.float64)
    mean, variance = moments.T
    grid = torch.linspace(0, metrics.MAX_DEPTH, 2001, dtype=torch.float64)
    return float(((grid[:, None] - mean) ** 2 + variance).sqrt().mean(1).min())
