"""Pictures drawn from planted arrays: what is on the axes, not only that something is drawn."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from safetensors.torch import save_file

from ssl_robust.settings import BadInput
from ssl_robust.show import plots

EPS = 8 / 255
CLASSES = ["background", "ball", "cone"]


def example(task="classification", k=3):
    """k grey images; EmbedAttack adds eps, the task attack takes it away; predictions right when clean, else wrong."""
    images = torch.full((k, 3, 8, 8), 0.5)
    target = {
        "classification": torch.arange(k) % 2 + 1,
        "segmentation": torch.ones(k, 8, 8, dtype=torch.uint8),
        "depth": torch.linspace(1, 5, 64).reshape(1, 8, 8).repeat(k, 1, 1),
    }[task]
    wrong = target + 1 if task == "depth" else 3 - target
    return {
        "images": images, "adv_embed": images + EPS, "adv_task": images - EPS, "target": target, "pred_clean": target,
        "pred_embed": wrong, "pred_task": wrong, "classes": CLASSES, "eps": EPS, "dataset": "scenes", "encoder": "e",
    }  # fmt: skip


def tidy(tasks=("classification", "segmentation", "depth"), datasets=("scenes",)):
    found = [
        {"task": t, "dataset": d, "epoch": e, "attack": a, "metric": "m", "value": 0.1 * e + i, "n": 9, "se": 0.01,
         "chance": 0.25, "flagged": False}
        for t in tasks for d in datasets for i, a in enumerate(("clean", "embed", "task")) for e in (0, 4, 8)
    ]  # fmt: skip
    return pd.DataFrame(found)


def captions(fig):
    return [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]


def test_helpers_write_nothing_and_leave_no_figure_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = plt.get_fignums()
    plots.figure1({task: example(task) for task in ("classification", "segmentation", "depth")})
    plots.figure2(tidy())
    plots.learning_curves(pd.DataFrame({"epoch": [1, 2], "loss": [1.0, 0.5]}))
    assert plt.get_fignums() == before and not list(tmp_path.iterdir())


def test_save_writes_png_and_pdf_of_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        plots.save(plots.figure2(tidy()), tmp_path / "fig" / name)
    assert sorted(p.name for p in (tmp_path / "fig").iterdir()) == ["a.pdf", "a.png", "b.pdf", "b.png"]
    for suffix, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        content = (tmp_path / f"fig/a.{suffix}").read_bytes()
        assert content.startswith(magic) and content == (tmp_path / f"fig/b.{suffix}").read_bytes()


def test_image_grid_shows_each_image_above_its_caption():
    images = torch.stack([torch.full((3, 4, 6), v) for v in (0.0, 0.5, 1.0)])
    fig = plots.image_grid(images, ["a", "b", "c"], columns=2)
    assert captions(fig) == ["a", "b", "c"] and len(fig.axes) == 4
    assert [ax.images[0].get_array().mean() for ax in fig.axes[:3]] == [0, 0.5, 1]
    assert fig.axes[0].images[0].get_array().shape == (4, 6, 3)


def test_masks_colour_classes_and_leave_background_and_ignored_clear():
    mask = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    fig = plots.mask_grid(torch.zeros(1, 3, 2, 2), mask[None], CLASSES)
    layer = fig.axes[0].images[1].get_array()
    assert (layer[..., 3] > 0).tolist() == [[False, True], [True, False]]
    assert tuple(layer[0, 1, :3]) == to_rgb(plots.CLASSES[0]) and tuple(layer[1, 0, :3]) == to_rgb(plots.CLASSES[1])
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["ball", "cone"]


def test_class_zero_is_drawn_where_it_is_no_background():
    fig = plots.mask_grid(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8), ["wall", "floor"])
    assert (fig.axes[0].images[1].get_array()[..., 3] > 0).all()
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["wall"]


def test_a_legend_of_many_long_names_stays_inside_its_figure():
    names = ["background"] + ["television receiver"[: 8 + i] for i in range(12)]
    for columns in (2, 4, 8):
        masks = torch.arange(13, dtype=torch.uint8)[None, None].repeat(columns, 4, 1)
        fig = plots.mask_grid(torch.zeros(columns, 3, 4, 13), masks, names, columns)
        fig.draw_without_rendering()
        legend = fig.legends[0].get_window_extent()
        assert legend.x0 >= 0 and legend.x1 <= fig.bbox.x1, columns
        assert legend.y1 <= min(ax.get_window_extent().y0 for ax in fig.axes) + 2
        assert [text.get_text() for text in fig.legends[0].get_texts()] == names[1:]


def test_rows_of_figure_1_have_the_heights_of_their_images():
    wide = {**example("segmentation"), "images": torch.zeros(3, 3, 8, 16)}
    wide |= {name: torch.zeros(3, 3, 8, 16) for name in ("adv_embed", "adv_task")}
    wide |= {name: torch.ones(3, 8, 16) for name in ("target", "pred_clean", "pred_embed", "pred_task")}
    wide["target"] = wide["target"].to(torch.uint8)
    fig = plots.figure1({"classification": example(), "segmentation": wide})
    fig.draw_without_rendering()
    boxes = [ax.get_window_extent() for ax in fig.axes[:16:4]]
    assert boxes[0].width == pytest.approx(boxes[2].width, rel=0.1)
    assert boxes[2].height == pytest.approx(boxes[0].height / 2, rel=0.1)


def test_class_colours_are_distinct_and_fixed():
    colours = [to_hex(plots.class_colour(number)) for number in range(1, 51)]
    assert len(set(colours)) == 50 and colours[0] == plots.CLASSES[0].lower()


def test_depth_maps_share_one_scale_and_hide_what_is_not_valid():
    depths = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[4.0, 4.0], [4.0, float("nan")]]])
    fig = plots.depth_grid(depths)
    drawn = [ax.images[-1] for ax in fig.axes[:2]]
    assert [d.get_clim() for d in drawn] == [(1, 4), (1, 4)]
    assert drawn[0].get_array().mask.tolist() == [[True, False], [False, False]]
    assert drawn[1].get_array().mask.sum() == 1
    assert fig.axes[-1].get_ylabel() == "depth [m]"


def test_learning_curves_have_a_panel_for_each_column():
    history = pd.DataFrame({"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "val": [0.1, 0.2, 0.3]})
    fig = plots.learning_curves(history, {"val": "held-out accuracy"})
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "held-out accuracy"]
    assert fig.axes[0].lines[0].get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("classification", ["ball", "ball ✓", "cone ✗"]),
        ("segmentation", ["100% right", "0% right"]),
        ("depth", ["RMSE 0.00 m", "RMSE 1.00 m"]),
    ],
)
def test_attack_panel_says_how_good_each_prediction_is(task, said):
    fig = plots.attack_panel(example(task), "task", rows=1)
    assert captions(fig) == said
    assert [ax.get_title() for ax in fig.axes[:2]] == ["image", "perturbation\n×16"]
    assert fig.axes[1].images[0].get_array().max() < 1e-5  # the task attack took eps away: black
    assert plots.attack_panel(example(task), "embed", rows=1).axes[1].images[0].get_array().min() > 1 - 1e-5


def test_an_attacked_prediction_is_drawn_over_the_attacked_image():
    shown = plots.attack_panel(example(), "embed", rows=1).axes
    assert shown[3].images[0].get_array()[0, 0, 0] == pytest.approx(0.5 + EPS)
    assert shown[2].images[0].get_array()[0, 0, 0] == pytest.approx(0.5)


def test_ignored_and_invalid_pixels_do_not_count():
    masks, depths = example("segmentation"), example("depth")
    masks["target"] = masks["target"].clone()
    masks["target"][:, :4] = 255
    assert captions(plots.attack_panel(masks, rows=1))[0] == "100% right"
    depths["target"] = depths["target"].clone()
    depths["target"][:, :4] = 0
    assert captions(plots.attack_panel(depths, rows=1))[0] == "RMSE 0.00 m"


def test_attack_panel_at_zero_radius():
    still = {**example(), "eps": 0.0}
    still["adv_task"] = still["images"]
    assert (plots.attack_panel(still, rows=1).axes[1].images[0].get_array() == 0.5).all()


def test_a_prediction_that_is_no_number_is_drawn_as_wrong():
    shown = example(k=1) | {"pred_task": torch.tensor([-1])}
    assert "no number ✗" in captions(plots.attack_panel(shown, "task", rows=1))
    masks = example("segmentation", 1)
    masks["pred_task"] = torch.full_like(masks["target"], plots.IGNORED)
    assert "0% right" in captions(plots.attack_panel(masks, "task", rows=1))


@pytest.mark.parametrize("task", ["classification", "segmentation", "depth"])
def test_prediction_panel_shows_image_truth_and_prediction(task):
    fig = plots.prediction_panel(example(task), columns=2)
    assert [ax.get_ylabel() for ax in fig.axes[:6:2]] == ["image", "truth", "prediction"]
    assert len(captions(fig)) == (4 if task == "classification" else 2)


def test_figure1_marks_the_attacks_that_are_doubtful():
    cases = {task: example(task) for task in ("classification", "depth")}
    fig = plots.figure1(cases, [("depth", "task"), ("classification", "clean")])
    labels = [ax.get_ylabel() for ax in fig.axes if ax.get_ylabel()]
    assert [label for label in labels if "†" in label] == ["depth\nDepthPGD †"]


def test_figure1_has_both_attacks_of_each_task_and_the_first_right_image():
    cases = {task: example(task) for task in ("classification", "segmentation", "depth")}
    cases["classification"]["pred_clean"] = torch.tensor([2, 2, 1])  # the first is wrong, the second (a cone) right
    fig = plots.figure1(cases)
    names = [ax.get_ylabel().split("\n") for ax in fig.axes[:24:4]]
    last = {"classification": "PGD", "segmentation": "SegPGD", "depth": "DepthPGD"}
    assert names == [[task, attack] for task in cases for attack in ("EmbedAttack", last[task])]
    assert captions(fig)[:3] == ["cone", "cone ✓", "ball ✗"]


def test_figure2_draws_each_attack_in_its_colour_against_epoch():
    fig = plots.figure2(tidy())
    assert [ax.get_title() for ax in fig.axes] == ["Classification\nscenes", "Segmentation\nscenes", "Depth\nscenes"]
    assert [ax.get_ylabel()[-1] for ax in fig.axes] == ["↑", "↑", "↓"]
    lines = {container.lines[0].get_color(): container.lines[0] for container in fig.axes[0].containers}
    assert set(lines) == set(plots.COLOURS.values())
    assert lines[plots.COLOURS["embed"]].get_xydata() == pytest.approx(np.array([[0, 1], [4, 1.4], [8, 1.8]]))
    dotted = [line for line in fig.axes[0].lines if list(line.get_ydata()) == [0.25, 0.25]]
    assert len(dotted) == 1
    said = [text.get_text() for text in fig.legends[0].get_texts()]
    assert said == ["clean", "EmbedAttack", "task attack", "majority or mean baseline"]


def test_several_data_sets_differ_in_dashes_and_are_named_below_their_panel():
    many = [f"data_set_{i} (an_encoder)" for i in range(6)]
    fig = plots.figure2(pd.concat([tidy(["segmentation"], many), tidy(["depth"], ["only"])]))
    first, second = fig.axes
    assert [ax.get_title() for ax in fig.axes] == ["Segmentation", "Depth"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == many
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["only"]
    looks = {handle.get_label(): str(handle._dash_pattern) for handle in first.get_legend().get_lines()}
    assert len(set(looks.values())) == 6
    drawn = {str(container.lines[0]._unscaled_dash_pattern) for container in first.containers}
    assert len(drawn) == 6 and len(first.containers) == 18


def test_names_of_many_data_sets_overlap_neither_axes_nor_key():
    names = {"classification": ["cifar10 (dinov2_vits14)", "b", "c", "d", "e", "f"], "depth": ["nyuv2"]}
    fig = plots.figure2(pd.concat([tidy([task], found) for task, found in names.items()]))
    fig.draw_without_rendering()
    key = fig.legends[0].get_window_extent()
    for ax in fig.axes:
        below = ax.get_legend().get_window_extent()
        assert key.y1 <= below.y0 + 2 and below.y1 <= ax.xaxis.label.get_window_extent().y0
        assert ax.get_window_extent().height > fig.bbox.height * 0.4
        assert fig.bbox.x0 <= below.x0 and below.x1 <= fig.bbox.x1


def test_without_a_followed_run_figure_2_says_so():
    fig = plots.figure2(tidy().iloc[:0])
    assert "No DeACL fine-tuning was followed" in fig.axes[0].texts[0].get_text()
    fig.draw_without_rendering()
    assert fig.axes[0].texts[0].get_window_extent().width < fig.bbox.width


def test_load_example_reads_tensors_and_metadata(tmp_path):
    made = example("depth")
    tensors = {name: value.contiguous() for name, value in made.items() if isinstance(value, torch.Tensor)}
    about = {"classes": json.dumps(CLASSES), "eps": str(EPS), "dataset": "scenes", "encoder": "e"}
    tensors = {name: value.clone() for name, value in tensors.items()}
    save_file(tensors, tmp_path / "depth.safetensors", about)
    read = plots.load_example(tmp_path / "depth.safetensors")
    assert read["classes"] == CLASSES and read["eps"] == EPS and torch.equal(read["adv_task"], made["adv_task"])
    with pytest.raises(BadInput, match="run the attack notebook of segmentation"):
        plots.load_example(tmp_path / "segmentation.safetensors")


def test_flagged_points_are_hollow_and_the_key_says_what_that_means():
    data = tidy(["depth"])
    data.loc[(data["attack"] == "task") & (data["epoch"] == 4), "flagged"] = True
    fig = plots.figure2(data)
    hollow = [line for line in fig.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[4, 2.4]]]
    assert hollow[0].get_markeredgecolor() == plots.COLOURS["task"]
    assert fig.legends[0].get_texts()[-1].get_text() == "† flagged, see the tables' notes"
    plain = plots.figure2(data.assign(flagged=False))
    assert len(plain.legends[0].get_texts()) == 4
    assert not [line for line in plain.axes[0].lines if line.get_markerfacecolor() == "white"]
