"""Pictures: each helper takes data, draws, and returns the figure (or the axes it was given); only `save` writes files.

Images are (k, 3, H, W) in [0, 1], masks (k, H, W) class ids, depths (k, H, W) in metres; torch tensors or numpy arrays.
"""

import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from .. import metrics
from ..items import IGNORE as IGNORED
from ..records import figures_dir, read_tensors, write_bytes
from ..settings import BadInput, written
from ..tasks import TASKS

plt.switch_backend(plt.get_backend())  # now: in rc_context, notebooks would forget to show figures by themselves
Array = Any  # torch tensor or numpy array
# Paul Tol's high-contrast scheme: told apart by the colour-blind and in grey; one attack, one colour, in every picture
COLOURS = {"clean": "#004488", "embed": "#DDAA33", "task": "#BB5566"}
MARKERS = {"clean": "o", "embed": "s", "task": "^"}
# Paul Tol's muted scheme for the first classes; further ones walk round the hue circle by the golden angle
CLASSES = ["#CC6677", "#DDCC77", "#332288", "#44AA99", "#882255", "#88CCEE", "#117733", "#AA4499", "#EE7733", "#999933"]
DEPTHS = "viridis_r"  # near is bright
SIDE, LETTERS = 1.1, 15  # inches of a tile, and letters on a line below it
STYLE = {
    **sns.axes_style("ticks"),
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "pdf.fonttype": 42,
}
# colours of a right and a wrong answer, none of them an attack's; ticks and crosses say the same
RIGHT, WRONG = "#117733", "#882255"
ATTACK = {"clean": "clean", "embed": "EmbedAttack", "task": "task attack"}
# line styles of several data sets in one panel
DASHES = ["-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)), (0, (10, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3))]
HOLLOW = {"markerfacecolor": "white", "markersize": 5.5, "markeredgewidth": 1.2}
CHANCE = {"color": "0.45", "linestyle": (0, (1, 2)), "linewidth": 1.2}
# what the columns of learning curves are
CURVES = {
    "loss": "training loss", "preserve": "1st term of eq. 2,\n−cos to the teacher",
    "robust": "2nd term of eq. 2,\n−cos under attack", "held_out_cosine": "held-out cosine\nunder attack",
}  # fmt: skip
BASELINE = "majority or mean baseline"  # what those dots are
BARS = {"color": "0.2", "marker": "|", "markersize": 10, "linestyle": "", "label": "bars: ± standard error"}
APART = 0.08  # of a panel's width, between panels, whose names would touch the panel before
LEAST = 3.2  # inches of a figure with a legend

Example = dict[str, Any]  # as load_example returns it


def save(fig: Figure, path: Path) -> None:
    """Write `path`.png (150 dpi) and `path`.pdf, atomically and without dates, so equal figures give equal files."""
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        buffer = io.BytesIO()
        with plt.rc_context(STYLE):
            fig.savefig(buffer, format=suffix, dpi=150, metadata=metadata, facecolor="white")
        write_bytes(buffer.getvalue(), path.with_name(f"{path.name}.{suffix}"))


def _axes(rows: int, columns: int, width: float, height: float, **look: Any) -> tuple[Figure, np.ndarray]:
    """A figure of this size in inches with rows x columns axes, which are (rows, columns)."""
    size = {"figsize": (width, height), "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(rows, columns, **size, **look)
    plt.close(fig)  # a notebook shows the figure that a cell returns; left open, it would show it a second time
    return fig, axes


def _tiles(shapes: Sequence[Sequence[int]], columns: int, least: float = 0) -> tuple[Figure, np.ndarray]:
    """A figure of empty tiles, a row for each of the picture shapes (..., H, W), SIDE inches wide.

    `least` is the smallest height of a row in inches, where a heading at its left needs room.
    """
    heights = [max(SIDE * shape[-2] / shape[-1], least) + 0.22 for shape in shapes]
    fig, axes = _axes(len(shapes), columns, SIDE * columns, sum(heights), height_ratios=heights)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    return fig, axes


def _grid(count: int, columns: int, shape: Sequence[int]) -> tuple[Figure, np.ndarray]:
    """Tiles for `count` pictures, row by row, and as many axes."""
    fig, axes = _tiles([shape] * -(-count // columns), min(columns, count))
    return fig, axes.ravel()[:count]


def _show_image(image: Array, ax: Axes, caption: str = "", colour: str = "black") -> Axes:
    """One image (3, H, W) in [0, 1] with a caption below."""
    ax.imshow(np.moveaxis(np.asarray(image), 0, -1).clip(0, 1))
    ax.set_xlabel(caption, color=colour, labelpad=2, fontsize=9)
    return ax


def class_colour(number: int) -> tuple[float, float, float]:
    """The colour of class `number` (0 to 254) in masks and legends, the same everywhere."""
    if 0 < number <= len(CLASSES):
        return to_rgb(CLASSES[number - 1])
    return tuple(hsv_to_rgb((number * 0.618034 % 1, 0.55 + 0.15 * (number % 3), 0.6 + 0.15 * (number % 3))))


def _show_mask(mask: Array, image: Array, ax: Axes, background: int | None = 0, caption: str = "") -> Axes:
    """Class ids (H, W) in colour over their image (3, H, W); `background` and ignored pixels stay transparent."""
    ids = np.asarray(mask).astype(int)
    layer = np.zeros((*ids.shape, 4))
    for number in set(np.unique(ids)) - {background, IGNORED}:
        layer[ids == number] = (*class_colour(number), 0.8)
    _show_image(image, ax, caption).imshow(layer)
    return ax


def _background_of(classes: Sequence[str]) -> int | None:
    """0 if the first class is the background, else None: then every class is drawn."""
    return 0 if classes[0] == "background" else None


def _class_legend(masks: Sequence[Array], classes: Sequence[str], fig: Figure, columns: int) -> None:
    """Names of the classes that occur in these masks, in room added below the figure."""
    numbers = np.unique(np.concatenate([np.asarray(m).ravel() for m in masks])).astype(int)
    shown = [n for n in numbers if n not in (_background_of(classes), IGNORED)]
    patches = [Patch(color=class_colour(n), label=classes[n]) for n in shown]
    longest = max((len(classes[n]) for n in shown), default=0)
    fits = int(fig.get_figwidth() / (0.4 + 0.07 * longest))  # inches of patch, gaps, and a letter at 9 pt
    count = max(1, min(columns, fits, len(shown)))
    fig.set_figheight(fig.get_figheight() + 0.1 + 0.2 * max(1, -(-len(shown) // count)))
    look = {"handlelength": 1, "handleheight": 1, "columnspacing": 1.2, "handletextpad": 0.5}
    fig.legend(handles=patches, loc="outside lower center", ncols=count, **look)


def _show_depth(depth: Array, ax: Axes, span: tuple[float, float], caption: str = "") -> AxesImage:
    """Depth (H, W) in metres on the colour scale `span` (near, far); what is not valid (<= 0) is grey."""
    metres = np.asarray(depth)
    ax.set_xlabel(caption, labelpad=2, fontsize=9)
    ax.imshow(np.full((*metres.shape, 3), 0.8))
    return ax.imshow(np.ma.masked_where(~(metres > 0), metres), cmap=DEPTHS, vmin=span[0], vmax=span[1])


def _span_of(depth: Array) -> tuple[float, float]:
    """Smallest and largest valid depth in metres; (0, 1) if none is valid."""
    valid = np.asarray(depth)[np.asarray(depth) > 0]
    return (float(valid.min()), float(valid.max())) if valid.size else (0.0, 1.0)


def _depth_scale(drawn: AxesImage, axes: Sequence[Axes], fig: Figure) -> None:
    """Colour bar in metres, in room added beside these axes; an arrow at an end beyond which a depth in them lies."""
    fig.set_figwidth(fig.get_figwidth() + 0.6)
    maps = [image.get_array() for ax in axes for image in ax.images if image.get_cmap().name == DEPTHS]
    beyond = any(np.any(m < drawn.norm.vmin) for m in maps), any(np.any(m > drawn.norm.vmax) for m in maps)
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    look = {"label": "depth [m]", "fraction": 0.1, "aspect": 25, "pad": 0.02, "extend": ends}
    fig.colorbar(drawn, ax=list(axes), **look).outline.set_visible(False)


@plt.rc_context(STYLE)
def image_grid(images: Array, captions: Sequence[str] | None = None, columns: int = 8) -> Figure:
    """Images (k, 3, H, W) with their captions, row by row."""
    fig, axes = _grid(len(images), columns, images.shape)
    for ax, image, caption in zip(axes, images, captions or [""] * len(images), strict=True):
        _show_image(image, ax, caption)
    return fig


@plt.rc_context(STYLE)
def mask_grid(images: Array, masks: Array, classes: Sequence[str], columns: int = 8) -> Figure:
    """Masks (k, H, W) over their images (k, 3, H, W), with a legend; class 0 is transparent if named 'background'."""
    fig, axes = _grid(len(images), columns, images.shape)
    for ax, image, mask in zip(axes, images, masks, strict=True):
        _show_mask(mask, image, ax, _background_of(classes))
    _class_legend(masks, classes, fig, columns)
    return fig


@plt.rc_context(STYLE)
def depth_grid(depths: Array, columns: int = 8) -> Figure:
    """Depth maps (k, H, W) on one colour scale in metres, with its bar."""
    fig, axes = _grid(len(depths), columns, depths.shape)
    for ax, depth in zip(axes, depths, strict=True):
        drawn = _show_depth(depth, ax, _span_of(depths))
    _depth_scale(drawn, axes, fig)
    return fig


@plt.rc_context(STYLE)
def learning_curves(history: pd.DataFrame, task: str = "") -> Figure:
    """A panel for each column of `history` (epoch, loss, held_out, ...) against epoch, named in words.

    With a `task` the epoch that is best on the held-out images, whose head is kept, is marked.
    """
    columns, words, kept = [column for column in history.columns if column != "epoch"], CURVES, None
    if task:
        words = words | {"held_out": f"held-out {TASKS[task].heading}"}
        kept = history.loc[(TASKS[task].sign * history["held_out"]).idxmax()]
    fig, axes = _axes(1, len(columns), 2.6 * len(columns), 2.3)
    for ax, column in zip(axes[0], columns, strict=True):
        few = "o" if len(history) <= 12 else ""  # more would hide the line
        ax.plot(history["epoch"], history[column], color=COLOURS["clean"], marker=few, markersize=4)
        ax.set(xlabel="epoch", ylabel=words.get(column, column))
        if kept is not None:
            ax.plot(kept["epoch"], kept[column], color=COLOURS["task"], marker="D", markersize=6)
            ax.set_title(f"kept: epoch {kept['epoch']:.0f}", color=COLOURS["task"])
        ax.xaxis.get_major_locator().set_params(integer=True)
        sns.despine(ax=ax)
    return fig


def load_example(path: Path) -> Example:
    """Tensors and metadata of a file in runs/<profile>/examples in one dict; BadInput if it is missing or damaged.

    images, adv_embed, adv_task (k, 3, H, W); target, pred_clean, pred_embed, pred_task: (k,) class ids, (k, H, W) class
    ids or (k, H, W) metres; classes (names), eps (radius in [0, 1] pixel units), dataset, encoder.
    """
    if not path.is_file():
        raise BadInput(f"There is no example {path}; run the attack notebook of {path.stem} first, or 'make paper'.")
    tensors, about = read_tensors(path)
    return {**tensors, **about, "classes": json.loads(about["classes"]), "eps": float(about["eps"])}


def _amplification(example: Example) -> float:
    """The factor that spreads -eps..eps over black..white."""
    return 0.5 / example["eps"] if example["eps"] else 1.0


def _task(example: Example) -> str:
    target = np.asarray(example["target"])
    return "classification" if target.ndim == 1 else "depth" if target.dtype.kind == "f" else "segmentation"


def _verdict(example: Example, kind: str, index: int) -> tuple[str, str]:
    """What is said of the truth ('target') or the prediction on the 'clean', 'embed' or 'task' image, and its colour.

    Its class and whether that is right; for the dense tasks the table's metric, of this one image.
    """
    task, classes = _task(example), example["classes"]
    names = kind if kind == "target" else f"pred_{kind}", "target"
    said, target = (torch.as_tensor(example[name][index : index + 1]) for name in names)
    if task == "classification":
        name, right = classes[int(said)] if int(said) >= 0 else "no number", bool(said == target)
        mark, colour = (" ✓", RIGHT) if right else (" ✗", WRONG)
        return fill(name + mark * (kind != "target"), LETTERS), "black" if kind == "target" else colour
    if kind == "target":
        return "", "black"
    if task == "segmentation":  # logits that say the same, NaN for what is no number
        one_hot = (said[:, None] == torch.arange(len(classes))[:, None, None]).float()
        said = one_hot.masked_fill(said[:, None] == IGNORED, torch.nan)
    value = metrics.value(task, metrics.statistics(task, said, target, len(classes)))
    return f"{TASKS[task].metric} {value:.2f}" + " m" * (task == "depth"), "black"


def _show(example: Example, kind: str, index: int, ax: Axes) -> AxesImage | None:
    """The truth ('target'), or the prediction on the clean or attacked image over the very image that it is of.

    The true and the clean class are words alone, as the clean image is drawn already.
    """
    task, image = _task(example), example[f"adv_{kind}" if kind in ("embed", "task") else "images"][index]
    shown = example["target" if kind == "target" else f"pred_{kind}"][index]
    words, colour = _verdict(example, kind, index)
    if task == "depth":
        return _show_depth(shown, ax, _span_of(example["target"]), words)
    if task == "segmentation":
        _show_mask(shown, image, ax, _background_of(example["classes"]), words)
    elif kind in ("embed", "task"):
        _show_image(image, ax, words, colour)
    else:
        ax.set_box_aspect(image.shape[-2] / image.shape[-1])
        ax.text(0.5, 0.5, words, color=colour, ha="center", va="center", fontsize=9)
    return None


@plt.rc_context(STYLE)
def prediction_panel(example: Example, columns: int = 6) -> Figure:
    """The first images of an example on a row, below them the truth and the clean prediction.

    Of `example` it needs images, target, pred_clean and classes. A caption says how good a prediction is; classes stand
    above (truth) and below (prediction) their image and need no further pictures.
    """
    count, drawn, lines = min(columns, len(example["images"])), None, 0
    classified = _task(example) == "classification"
    names = ["prediction below,\ntruth above"] if classified else ["image", "truth", "prediction"]
    fig, axes = _tiles([example["images"].shape] * len(names), count, least=1.2 if classified else 0.7)
    for index, (first, *others) in enumerate(axes.T):
        _show_image(example["images"][index], first, *(_verdict(example, "clean", index) if classified else ()))
        first.set_title(_verdict(example, "target", index)[0], fontsize=9)
        lines = max(lines, first.get_title().count("\n") + first.get_xlabel().count("\n"))
        for kind, ax in zip(("target", "clean"), others, strict=False):
            drawn = _show(example, kind, index, ax)
    for ax, name in zip(axes[:, 0], names, strict=True):
        ax.set_ylabel(name)
    fig.set_figheight(fig.get_figheight() + 0.16 * (lines + classified))
    _key(example, [example["target"][:count], example["pred_clean"][:count]], drawn, axes, fig)
    return fig


def _key(example: Example, masks: list[Array], drawn: AxesImage | None, axes: np.ndarray, fig: Figure) -> None:
    """Legend of the classes in `masks`, or colour bar of the depths; nothing for classification."""
    if drawn is not None:
        _depth_scale(drawn, axes.ravel(), fig)
    elif _task(example) == "segmentation":
        _class_legend(masks, example["classes"], fig, axes.shape[1])


def _attack_row(example: Example, attacks: dict[str, str], index: int, axes: Sequence[Axes]) -> AxesImage | None:
    """One image, its truth and clean prediction; of each attack, by its name, the perturbation and what it leads to."""
    image = np.asarray(example["images"][index])
    _show_image(image, axes[0])
    for kind, ax in zip(("target", "clean"), axes[1:3], strict=True):
        _show(example, kind, index, ax)
    for (attack, name), change, said in zip(attacks.items(), axes[3::2], axes[4::2], strict=True):
        moved = np.asarray(example[f"adv_{attack}"][index]) - image
        _show_image(0.5 + _amplification(example) * moved, change, name)  # 0.5, grey, for nothing
        drawn = _show(example, attack, index, said)
    return drawn


def _headings(example: Example, axes: Sequence[Axes], encoders: str, fig: Figure) -> None:
    """Names of the columns, and above them the encoders and the ball, in room added above."""
    title = f"{encoders} (Standard), attacked in the L∞ ball of {written(example['eps'])}"
    fig.suptitle(fill(title, int(12 * fig.get_figwidth())), fontsize=10)  # letters an inch
    words = [f"perturbation\n×{_amplification(example):.0f} about grey", "attacked\nprediction"]
    words = ["image", "truth", "clean\nprediction", *words * (len(axes) // 2 - 1)]
    for ax, heading in zip(axes, words, strict=True):
        ax.set_title(heading, fontsize=9)
    fig.set_figheight(fig.get_figheight() + 0.55)


@plt.rc_context(STYLE)
def attack_panel(example: Example, attack: str = "task", rows: int = 4) -> Figure:
    """The first `rows` images of an example: image, truth, clean prediction, perturbation and attacked prediction.

    `attack` is 'embed' or 'task'. The perturbation is amplified so that -eps..eps spans black..white; the metric below
    a prediction is that of the one image.
    """
    rows, name = min(rows, len(example["images"])), _attack_name(_task(example), attack)
    fig, axes = _tiles([example["images"].shape] * rows, 5)
    for index, line in enumerate(axes):
        drawn = _attack_row(example, {attack: name}, index, line)
    _headings(example, axes[0], f"{example['dataset']}, {example['encoder']}", fig)
    kinds = ("target", "pred_clean", f"pred_{attack}")
    _key(example, [example[kind][:rows] for kind in kinds], drawn, axes, fig)
    return fig


def _attack_name(task: str, attack: str) -> str:
    return TASKS[task].attack if attack == "task" else ATTACK[attack]


def _first_right(example: Example) -> int:
    """The first image that is classified right when clean; the first of all for the dense tasks."""
    if _task(example) != "classification":
        return 0
    return int(np.argmax(np.asarray(example["pred_clean"]) == np.asarray(example["target"])))


@plt.rc_context(STYLE)
def figure1(examples: dict[str, Example], flagged: Collection[tuple[str, str]] = ()) -> Figure:
    """Figure 1: for each task one image under EmbedAttack and the task attack, a row of tiles as attack_panel's.

    `examples` maps task names to examples. The image is not chosen by hand: it is the first one, for classification the
    first that is classified right. A dagger stands at the attacks that are `flagged`, as (task, 'embed' or 'task').
    """
    encoders = list(dict.fromkeys(e["encoder"] for e in examples.values()))
    fig, axes = _tiles([e["images"].shape for e in examples.values()], 7, least=1 if len(encoders) == 1 else 1.6)
    for (task, example), line in zip(examples.items(), axes, strict=True):
        index = _first_right(example)
        names = {a: _attack_name(task, a) + " †" * ((task, a) in flagged) for a in ("embed", "task")}
        drawn = _attack_row(example, names, index, line)
        line[0].set_ylabel("\n".join([task, example["dataset"], example["encoder"]][: 1 + len(encoders)]), fontsize=9)
        kinds = ("target", "pred_clean", "pred_embed", "pred_task")
        _key(example, [example[kind][index] for kind in kinds], drawn, line[None], fig)
    _headings(example, axes[0], ", ".join(encoders), fig)
    return fig


def _curve(ax: Axes, x: pd.Series, line: pd.DataFrame, look: dict[str, Any], aside: float = 0) -> None:
    """Values with their standard errors against `x`, drawn `aside` inches beside it; markers at 0 are drawn whole."""
    drawn = ax.errorbar(x, line["value"], yerr=line["se"], elinewidth=0.8, capsize=1.5, **look)
    for part in drawn.get_children():  # moved when they have set the limits of the axes
        part.set_transform(ax.transData + ScaledTranslation(aside, 0, ax.figure.dpi_scale_trans))
    drawn.lines[0].set_clip_on(False)


def _finished(ax: Axes, rows: pd.DataFrame, below: str, xlabel: str) -> None:
    """Names of one task's panel, `below` its own, and dots where the majority or mean baseline lies."""
    for level in rows["chance"].round(3).unique():
        ax.axhline(level, zorder=0, **CHANCE)
    task = rows["task"].iloc[0]
    metric = TASKS[task].heading.replace("accuracy", "Accuracy")
    ax.set(title=task.capitalize() + below, xlabel=xlabel, ylabel=metric, ylim=(0, None))
    sns.despine(ax=ax)


def _metric_curves(tidy: pd.DataFrame, ax: Axes, key: bool) -> None:
    """One task's metric against DeACL epoch: a colour for each attack, a dash for each data set.

    Markers are hollow where `flagged`. Data sets are named below the panel if `key` asks for it, else in the title.
    """
    dashes = dict(zip(tidy["dataset"].unique(), DASHES * len(tidy), strict=False))
    thin = {"linewidth": 1.1, "markersize": 3} if len(dashes) > 2 else {"markersize": 4.5}
    for (dataset, attack), line in tidy.sort_values("epoch").groupby(["dataset", "attack"]):
        look = {"color": COLOURS[attack], "marker": MARKERS[attack], "linestyle": dashes[dataset], **thin}
        _curve(ax, line["epoch"], line, look)
        for point in line[line["flagged"]].itertuples():
            ax.plot(point.epoch, point.value, **look | HOLLOW | {"linestyle": ""}, zorder=3, clip_on=False)
    _finished(ax, tidy, "" if key else f"\n{next(iter(dashes))}", "DeACL epoch")
    ax.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    if key:
        keys = [Line2D([], [], color="0.2", linestyle=dash, label=name) for name, dash in dashes.items()]
        ax.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.22), handlelength=2.6, labelspacing=0.2)


@plt.rc_context(STYLE)
def figure2(tidy: pd.DataFrame) -> Figure:
    """Figure 2: a panel for each task, its metric clean and attacked along DeACL fine-tuning (report.figure2_table).

    Its title names the encoder; of several, the data sets' names do.
    """
    tasks, most = list(tidy["task"].unique()), tidy.groupby("task")["dataset"].nunique().max()
    width, height = (2.3, 2.9) if most == 1 else (2.6, 3.6 + 0.19 * most)
    fig, axes = _axes(1, len(tasks), max(LEAST, width * len(tasks)), height)
    fig.get_layout_engine().set(wspace=APART, h_pad=0.08)
    if tidy["encoder"].nunique() == 1:
        fig.suptitle(f"{tidy['encoder'].iloc[0]} along DeACL fine-tuning", fontsize=10)
    for task, ax in zip(tasks, axes[0], strict=True):
        _metric_curves(tidy[tidy["task"] == task], ax, key=most > 1)
    lines = [Line2D([], [], color=COLOURS[a], marker=MARKERS[a], markersize=4.5, label=ATTACK[a]) for a in COLOURS]
    lines += [Line2D([], [], label=BASELINE, **CHANCE), Line2D([], [], **BARS)]
    if tidy["flagged"].any():
        look = {"color": "0.2", "marker": "o", "linestyle": "", **HOLLOW}
        lines.append(Line2D([], [], label="† flagged, see the tables' notes", **look))
    columns = int(fig.get_figwidth() / 2.2)  # inches of the longest name
    fig.set_figheight(height + 0.2 * (-(-len(lines) // columns) - 2))
    fig.legend(handles=lines, loc="outside lower center", ncols=columns, columnspacing=1.2, handletextpad=0.5)
    return fig


# --- how hard the attacks of 07_sanity are ---

ROW = ["task", "dataset", "encoder", "defense"]
# its name, its line and marker
DEFENSE = {"standard": ("Standard", "-", "o"), "deacl": ("DeACL", (0, (3, 1.5)), "D")}
# those of CLASSES that are seen as a line on white; an odd number, so that colours come again with the other line
ROWS = [CLASSES[i] for i in (0, 2, 3, 8, 5, 6, 7)]


def _eps_curves(results: list[dict[str, Any]]) -> pd.DataFrame:
    """The sweeps, a row for each radius: ROW, n, eps ([0,1] pixel units), value, se, and of the row its chance,
    table_eps (the radius of the tables) and whether it is flagged.
    """
    columns = [*ROW, "n", "eps", "value", "se", "chance", "table_eps", "flagged"]
    rows = [
        result | {"chance": result["checks"]["chance"], "table_eps": result["attack"]["eps"]}
        | {"flagged": bool(result["flags"])} | point
        for result in results for point in result["checks"]["sweep"]
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


@plt.rc_context(STYLE)
def sanity_figure(results: list[dict[str, Any]]) -> Figure:
    """The metric against the radius, a panel for each task and data set, three in a row; of what sanity.run_all gives.

    A colour for each row of the tables, dashed with DeACL, side by side where they coincide; dots: the tables' majority
    or mean baseline; vertical: the tables' radius; a dagger marks rows with a flag.
    """
    curves = _eps_curves(results)
    panels = curves.groupby(["task", "dataset"], sort=False)
    count = max(1, len(panels))
    across = min(3, count)
    down = -(-count // across)
    fig, axes = _axes(down, across, max(LEAST, 2.5 * across), 2.4 * down + 0.7)
    fig.get_layout_engine().set(wspace=APART)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    flagged = curves.groupby(["encoder", "defense"], sort=False)["flagged"].any()
    looks = {
        (encoder, defense): dict(zip(("linestyle", "marker"), DEFENSE[defense][1:], strict=True))
        | {"color": ROWS[i % len(ROWS)], "markersize": 4, "label": f"{encoder} {DEFENSE[defense][0]}{' †' * doubted}"}
        for i, ((encoder, defense), doubted) in enumerate(flagged.items())
    }
    for (_, rows), ax in zip(panels, axes.flat, strict=False):
        _sanity_panel(rows, looks, ax)
    handles = [*(Line2D([], [], **look) for look in looks.values()), Line2D([], [], label=BASELINE, **CHANCE)]
    fig.legend(handles=[*handles, Line2D([], [], **BARS)], loc="outside lower center", ncols=across)
    return fig


def _sanity_panel(curves: pd.DataFrame, looks: dict[tuple[str, str], dict[str, Any]], ax: Axes) -> None:
    """One task and data set; the axis of radii is logarithmic from the smallest one on."""
    for row, line in curves.sort_values("eps").groupby(["encoder", "defense"], sort=False):
        aside = min(3, 12 / len(looks)) * ([*looks].index(row) - (len(looks) - 1) / 2) / 72  # inches
        _curve(ax, 255 * line["eps"], line, looks[row], aside)
    radii = sorted(set(255 * curves["eps"]))
    ax.axvline(255 * curves["table_eps"].iloc[0], color="0.85", linewidth=3, zorder=0)
    if len(radii) > 1:
        ax.set_xscale("symlog", base=2, linthresh=radii[1])
        ax.set_xlim(-0.3 * radii[1], 1.25 * radii[-1])
    ax.set_xticks(radii, [f"{radius:.3g}" for radius in radii])
    ax.minorticks_off()
    about = f"{curves['dataset'].iloc[0]}, n = {curves['n'].min()}"
    _finished(ax, curves, f", {TASKS[curves['task'].iloc[0]].attack}\n{about}", "eps [1/255]")


def sanity(results: list[dict[str, Any]], profile: str) -> Figure:
    """The figure of all sweeps, also written to figures/<profile>/sanity.png and .pdf."""
    fig = sanity_figure(results)
    save(fig, figures_dir(profile) / "sanity")
    return fig
