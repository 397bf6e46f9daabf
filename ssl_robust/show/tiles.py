"""What every picture is made of: colours, tiles, one image, mask or depth map on given axes, and `save`.

Images are (3, H, W) in [0, 1], masks (H, W) class ids, depths (H, W) in metres; torch tensors or numpy arrays.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from ..records import write_bytes

Array = Any  # torch tensor or numpy array
# Paul Tol's high-contrast scheme: told apart by the colour-blind and in grey; one attack, one colour, in every picture
COLOURS = {"clean": "#004488", "embed": "#DDAA33", "task": "#BB5566"}
MARKERS = {"clean": "o", "embed": "s", "task": "^"}
# Paul Tol's muted scheme for the first classes; further ones walk round the hue circle by the golden angle
CLASSES = ["#CC6677", "#DDCC77", "#332288", "#44AA99", "#882255", "#88CCEE", "#117733", "#AA4499", "#EE7733", "#DDDDDD"]
DEPTHS = "viridis_r"  # near is bright
IGNORED = 255  # catalogue.IGNORE, whose module would bring torch along
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


def save(fig: Figure, path: Path) -> None:
    """Write `path`.png (150 dpi) and `path`.pdf, atomically and without dates, so equal figures give equal files."""
    for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        buffer = io.BytesIO()
        with plt.rc_context(STYLE):
            fig.savefig(buffer, format=suffix, dpi=150, metadata=metadata, facecolor="white")
        write_bytes(buffer.getvalue(), path.with_name(f"{path.name}.{suffix}"))


def panels(count: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure with a row of `count` axes, each of this size in inches."""
    fig, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False, layout="constrained")
    # a notebook shows the figure that a cell returns; left open, it would show it a second time
    plt.close(fig)
    return fig, axes[0]


def tiles(
    shapes: Sequence[Sequence[int]], columns: int, side: float = 1.1, least: float = 0
) -> tuple[Figure, np.ndarray]:
    """A figure of empty tiles, a row for each of the picture shapes (..., H, W), `side` inches wide.

    `least` is the smallest height of a row in inches, where a heading at its left needs room.
    """
    heights = [max(side * shape[-2] / shape[-1], least) + 0.22 for shape in shapes]
    look = {"squeeze": False, "layout": "constrained", "height_ratios": heights}
    fig, axes = plt.subplots(len(shapes), columns, figsize=(side * columns, sum(heights)), **look)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    plt.close(fig)
    return fig, axes


def grid(count: int, columns: int, shape: Sequence[int]) -> tuple[Figure, np.ndarray]:
    """Tiles for `count` pictures, row by row."""
    fig, axes = tiles([shape] * -(-count // columns), min(columns, count))
    return fig, axes.ravel()


def show_image(image: Array, ax: Axes, caption: str = "", colour: str = "black") -> Axes:
    """One image (3, H, W) in [0, 1] with a caption below."""
    ax.imshow(np.moveaxis(np.asarray(image), 0, -1).clip(0, 1))
    ax.set_xlabel(caption, color=colour, labelpad=2, fontsize=9)
    return ax


def class_colour(number: int) -> tuple[float, float, float]:
    """The colour of class `number` (0 to 254) in masks and legends, the same everywhere."""
    if 0 < number <= len(CLASSES):
        return to_rgb(CLASSES[number - 1])
    return tuple(hsv_to_rgb((number * 0.618034 % 1, 0.55 + 0.15 * (number % 3), 0.6 + 0.15 * (number % 3))))


def show_mask(mask: Array, image: Array, ax: Axes, background: int | None = 0, caption: str = "") -> Axes:
    """Class ids (H, W) in colour over their image (3, H, W); `background` and ignored pixels stay transparent."""
    ids = np.asarray(mask).astype(int)
    layer = np.zeros((*ids.shape, 4))
    for number in set(np.unique(ids)) - {background, IGNORED}:
        layer[ids == number] = (*class_colour(number), 0.8)
    show_image(image, ax, caption).imshow(layer)
    return ax


def background_of(classes: Sequence[str]) -> int | None:
    """0 if the first class is the background, else None: then every class is drawn."""
    return 0 if classes[0] == "background" else None


def _columns_that_fit(names: Sequence[str], columns: int, width: float) -> int:
    """How many columns (at most `columns`) of a legend with these names fit into `width` inches; matplotlib fills them
    one after another.
    """
    for count in range(min(columns, len(names)), 1, -1):
        rows = -(-len(names) // count)
        longest = [max(map(len, names[i : i + rows])) for i in range(0, len(names), rows)]
        if sum(0.4 + 0.07 * length for length in longest) <= width:  # patch, gaps, a letter at 9 pt
            return count
    return 1


def class_legend(masks: Sequence[Array], classes: Sequence[str], fig: Figure, columns: int) -> None:
    """Names of the classes that occur in these masks, in room added below the figure."""
    numbers = np.unique(np.concatenate([np.asarray(m).ravel() for m in masks])).astype(int)
    shown = [n for n in numbers if n not in (background_of(classes), IGNORED)]
    patches = [Patch(color=class_colour(n), label=classes[n]) for n in shown]
    rows = max(1, -(-len(shown) // _columns_that_fit([classes[n] for n in shown], columns, fig.get_figwidth())))
    fig.set_figheight(fig.get_figheight() + 0.1 + 0.2 * rows)
    look = {"handlelength": 1, "handleheight": 1, "columnspacing": 1.2, "handletextpad": 0.5}
    fig.legend(handles=patches, loc="outside lower center", ncols=max(1, -(-len(shown) // rows)), **look)


def show_depth(depth: Array, ax: Axes, span: tuple[float, float], caption: str = "") -> AxesImage:
    """Depth (H, W) in metres on the colour scale `span` (near, far); what is not valid (<= 0) is grey."""
    metres = np.asarray(depth)
    ax.set_xlabel(caption, labelpad=2, fontsize=9)
    ax.imshow(np.full((*metres.shape, 3), 0.8))
    return ax.imshow(np.ma.masked_where(~(metres > 0), metres), cmap=DEPTHS, vmin=span[0], vmax=span[1])


def span_of(depth: Array) -> tuple[float, float]:
    """Smallest and largest valid depth in metres; (0, 1) if none is valid."""
    valid = np.asarray(depth)[np.asarray(depth) > 0]
    return (float(valid.min()), float(valid.max())) if valid.size else (0.0, 1.0)


def depth_scale(drawn: AxesImage, axes: Sequence[Axes], fig: Figure) -> None:
    """Colour bar in metres, in room added beside these axes."""
    fig.set_figwidth(fig.get_figwidth() + 0.6)
    fig.colorbar(drawn, ax=list(axes), label="depth [m]", fraction=0.1, aspect=25, pad=0.02).outline.set_visible(False)
