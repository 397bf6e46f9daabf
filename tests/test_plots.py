"""Pictures drawn from planted arrays: what is on the axes, not only that something is drawn."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import rgb_to_hsv, to_hex, to_rgb
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
         "chance": 0.25, "encoder": "e", "flagged": False}
        for t in tasks for d in datasets for i, a in enumerate(("clean", "embed", "task")) for e in (0, 4, 8)
    ]  # fmt: skip
    return pd.DataFrame(found)


def said(ax):
    """What stands in or below a tile."""
    return " ".join([text.get_text() for text in ax.texts] + [ax.get_xlabel()]).strip()


def captions(fig):
    return [said(ax) for ax in fig.axes if said(ax)]


def drawn(fig, ax):
    """The box of the axes' name beside them, once the figure is laid out."""
    fig.draw_without_rendering()
    return ax.yaxis.label.get_window_extent()


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
    first, second = (fig.axes[i].get_window_extent() for i in (0, 7))
    assert first.width == pytest.approx(second.width, rel=0.1)
    assert second.height == pytest.approx(first.height / 2, rel=0.1)


def test_class_colours_are_distinct_and_fixed():
    colours = [to_hex(plots.class_colour(number)) for number in range(1, 51)]
    assert len(set(colours)) == 50 and colours[0] == plots.CLASSES[0].lower()


def test_no_class_is_drawn_as_white_or_grey():
    saturation = [rgb_to_hsv(plots.class_colour(number))[1] for number in range(255)]
    assert min(saturation) > 0.3


def test_the_depth_scale_has_arrows_where_a_prediction_lies_beyond_it():
    shown, arrows = example("depth"), {}
    for name, by in {"neither": 0.0, "min": -0.5, "max": 0.5}.items():
        shown["pred_task"] = shown["target"] + by
        arrows[name] = plots.attack_panel(shown, rows=1).axes[-1]._colorbar.extend
    shown["pred_embed"] = shown["target"] - 0.5
    arrows["both"] = plots.figure1({"depth": shown}).axes[-1]._colorbar.extend
    assert arrows == {name: name for name in ("neither", "min", "max", "both")}


def test_depth_maps_share_one_scale_and_hide_what_is_not_valid():
    depths = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[4.0, 4.0], [4.0, float("nan")]]])
    fig = plots.depth_grid(depths)
    drawn = [ax.images[-1] for ax in fig.axes[:2]]
    assert [d.get_clim() for d in drawn] == [(1, 4), (1, 4)]
    assert drawn[0].get_array().mask.tolist() == [[True, False], [False, False]]
    assert drawn[1].get_array().mask.sum() == 1
    assert fig.axes[-1].get_ylabel() == "depth [m]"


def test_learning_curves_are_named_in_words_and_mark_the_epoch_that_is_kept():
    history = pd.DataFrame({"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "held_out": [0.2, 0.1, 0.3]})
    for task, words, best in (("segmentation", "held-out mIoU ↑", 3), ("depth", "held-out RMSE [m] ↓", 2)):
        fig = plots.learning_curves(history, task)
        assert [ax.get_ylabel() for ax in fig.axes] == ["training loss", words]
        assert fig.axes[0].lines[0].get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
        marks = [ax.lines[1].get_xydata().tolist() for ax in fig.axes]
        assert marks == [[[best, 4 - best]], [[best, history["held_out"].tolist()[best - 1]]]]
        assert {ax.get_title() for ax in fig.axes} == {f"kept: epoch {best}"}


def test_learning_curves_of_deacl_have_no_raw_names_and_no_mark():
    history = {"epoch": [0, 1], "held_out_cosine": [0.5, 0.9], "preserve": [np.nan, -0.9], "robust": [np.nan, -0.8]}
    fig = plots.learning_curves(pd.DataFrame(history))
    labels = [ax.get_ylabel().replace("\n", " ") for ax in fig.axes]
    assert labels == ["held-out cosine under attack", "1st term of eq. 2, −cos to the teacher",
                      "2nd term of eq. 2, −cos under attack"]  # fmt: skip
    assert all(len(ax.lines) == 1 and not ax.get_title() for ax in fig.axes)


def test_a_long_learning_curve_is_a_line_and_a_short_one_shows_its_epochs():
    history = pd.DataFrame({"epoch": range(1, 31), "loss": np.linspace(3, 1, 30)})
    markers = [plots.learning_curves(history[:n]).axes[0].lines[0].get_marker() for n in (1, 5, 30)]
    assert markers == ["o", "o", ""]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("classification", ["ball", "ball ✓", "PGD", "cone ✗"]),
        ("segmentation", ["mIoU 1.00", "SegPGD", "mIoU 0.00"]),
        ("depth", ["RMSE 0.00 m", "DepthPGD", "RMSE 1.00 m"]),
    ],
)
def test_attack_panel_says_how_good_each_prediction_is(task, words):
    fig = plots.attack_panel(example(task), "task", rows=1)
    assert captions(fig) == words
    names = ["image", "truth", "clean\nprediction", "perturbation\n×16 about grey", "attacked\nprediction"]
    assert [ax.get_title() for ax in fig.axes[:5]] == names
    assert fig.get_suptitle() == "scenes, e (Standard), attacked in the L∞ ball of 8/255"
    assert fig.axes[3].images[0].get_array().max() < 1e-5  # the task attack took eps away: black
    embed = plots.attack_panel(example(task), "embed", rows=1)
    assert embed.axes[3].images[0].get_array().min() > 1 - 1e-5 and said(embed.axes[3]) == "EmbedAttack"


def test_the_metric_below_a_mask_is_the_tables():
    """Mean IoU over the classes that occur, not the share of pixels: 3/4 of one class, nothing of another."""
    shown = example("segmentation", 1)
    shown["pred_task"] = shown["target"].clone()
    shown["pred_task"][:, :2] = 2
    assert said(plots.attack_panel(shown, rows=1).axes[4]) == f"mIoU {0.75 / 2:.2f}"


def test_the_same_picture_is_not_drawn_twice():
    fig = plots.attack_panel(example(), rows=1)
    assert [len(ax.images) for ax in fig.axes] == [1, 0, 0, 1, 1]  # the truth and the clean class are words
    assert len(plots.prediction_panel(example(), columns=2).axes) == 2


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_the_truth_of_a_dense_task_is_a_picture_beside_the_clean_prediction(task):
    shown = example(task, 1)
    shown["target"] = shown["pred_task"]
    truth, clean = (plots.attack_panel(shown, rows=1).axes[i].images[-1].get_array() for i in (1, 2))
    assert not np.array_equal(truth, clean)


def test_long_names_of_classes_are_broken_into_lines():
    names = ["background", "great white shark, man-eater", "television receiver"]
    fig = plots.attack_panel(example() | {"classes": names}, rows=1)
    longest = max(len(line) for text in captions(fig) for line in text.split("\n"))
    assert longest <= plots.LETTERS


def test_an_attacked_prediction_is_drawn_over_the_attacked_image():
    shown = plots.attack_panel(example("segmentation"), "embed", rows=1).axes
    assert shown[4].images[0].get_array()[0, 0, 0] == pytest.approx(0.5 + EPS)
    assert shown[2].images[0].get_array()[0, 0, 0] == pytest.approx(0.5)


def test_ignored_and_invalid_pixels_do_not_count():
    masks, depths = example("segmentation"), example("depth")
    masks["target"] = masks["target"].clone()
    masks["target"][:, :4] = 255
    assert captions(plots.attack_panel(masks, rows=1))[0] == "mIoU 1.00"
    depths["target"] = depths["target"].clone()
    depths["target"][:, :4], depths["target"][:, 4] = 0, 11  # beyond what counts in the tables, too
    assert captions(plots.attack_panel(depths, rows=1))[0] == "RMSE 0.00 m"


def test_attack_panel_at_zero_radius():
    still = {**example(), "eps": 0.0}
    still["adv_task"] = still["images"]
    assert (plots.attack_panel(still, rows=1).axes[3].images[0].get_array() == 0.5).all()


def test_a_prediction_that_is_no_number_is_drawn_as_wrong():
    shown = example(k=1) | {"pred_task": torch.tensor([-1])}
    assert "no number ✗" in captions(plots.attack_panel(shown, "task", rows=1))
    masks = example("segmentation", 1)
    masks["pred_task"] = torch.full_like(masks["target"], plots.IGNORED)
    assert captions(plots.attack_panel(masks, "task", rows=1))[-1] == "mIoU 0.00"
    assert "SegPGD" in captions(plots.attack_panel(masks, "task", rows=1))


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_prediction_panel_shows_image_truth_and_prediction(task):
    fig = plots.prediction_panel(example(task), columns=2)
    assert [ax.get_ylabel() for ax in fig.axes[:6:2]] == ["image", "truth", "prediction"]
    assert len(captions(fig)) == 2


def test_prediction_panel_of_classes_has_them_above_and_below_the_images():
    fig = plots.prediction_panel(example() | {"pred_clean": torch.tensor([1, 1, 1])}, columns=2)
    assert [ax.get_title() for ax in fig.axes] == ["ball", "cone"] and captions(fig) == ["ball ✓", "ball ✗"]
    assert fig.axes[0].get_ylabel() == "prediction below,\ntruth above"


def test_figure1_marks_the_attacks_that_are_doubtful():
    cases = {task: example(task) for task in ("classification", "depth")}
    fig = plots.figure1(cases, [("depth", "task"), ("classification", "clean")])
    assert [text for text in captions(fig) if "†" in text] == ["DepthPGD †"]


def test_figure1_is_a_row_a_task_with_both_attacks_and_the_first_right_image():
    cases = {task: example(task) for task in ("classification", "segmentation", "depth")}
    cases["classification"]["pred_clean"] = torch.tensor([2, 2, 1])  # the first is wrong, the second (a cone) right
    fig = plots.figure1(cases)
    assert [ax.get_ylabel() for ax in fig.axes[:21:7]] == [f"{task}\nscenes" for task in cases]
    rows = [[said(ax) for ax in fig.axes[i : i + 7]] for i in (0, 7, 14)]
    assert [row[3::2] for row in rows] == [["EmbedAttack", name] for name in ("PGD", "SegPGD", "DepthPGD")]
    assert rows[0][1:5] == ["cone", "cone ✓", "EmbedAttack", "ball ✗"]
    assert fig.get_suptitle() == "e (Standard), attacked in the L∞ ball of 8/255"
    assert fig.get_figheight() < fig.get_figwidth()


def test_figure1_names_the_encoder_of_each_row_where_they_differ():
    cases = {task: example(task) | {"encoder": name} for task, name in (("segmentation", "a"), ("depth", "b"))}
    fig = plots.figure1(cases)
    assert [ax.get_ylabel() for ax in fig.axes[:14:7]] == ["segmentation\nscenes\na", "depth\nscenes\nb"]
    assert fig.get_suptitle().startswith("a, b (Standard)")


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
    assert said == ["clean", "EmbedAttack", "task attack", "majority or mean baseline", "bars: ± standard error"]
    assert fig.get_suptitle() == "e along DeACL fine-tuning"


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


@pytest.mark.parametrize("draw", ["figure2", "sanity_figure"])
def test_names_of_axes_keep_away_from_the_panel_before(draw):
    fig = plots.figure2(tidy()) if draw == "figure2" else plots.sanity_figure(swept())
    for before, ax in itertools.pairwise(fig.axes):
        assert drawn(fig, ax).x0 - before.get_window_extent().x1 > 0.15 * fig.dpi


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
    assert len(plain.legends[0].get_texts()) == 5
    assert not [line for line in plain.axes[0].lines if line.get_markerfacecolor() == "white"]


def swept(values=(0.8, 0.0, 0.0)):
    """What the sweeps of three rows on three tasks leave, all of the same values."""
    points = [{"eps": eps, "value": v, "se": 0.1} for eps, v in zip((0.0, EPS, 8 * EPS), values, strict=True)]
    return [
        {"task": task, "dataset": "scenes", "encoder": encoder, "defense": defense, "n": 5, "flags": [],
         "attack": {"eps": EPS}, "checks": {"chance": 0.25, "sweep": points}}
        for task in ("classification", "segmentation", "depth")
        for encoder, defense in (("a", "standard"), ("a", "deacl"), ("b", "standard"))
    ]  # fmt: skip


def test_curves_of_the_sweep_that_coincide_lie_side_by_side_within_the_axes():
    ax = plots.sanity_figure(swept()).axes[0]
    ax.figure.draw_without_rendering()
    lines = [container.lines[0] for container in ax.containers]
    places = [line.get_transform().transform(line.get_xydata())[0] for line in lines]
    assert np.diff([x for x, _ in places]).min() > 2 and len({round(y) for _, y in places}) == 1
    assert ax.get_ylim()[0] == 0 and 0.9 <= ax.get_ylim()[1] < 1.1


def test_rows_of_the_sweep_differ_in_colour_and_defenses_in_dash_and_marker():
    fig = plots.sanity_figure(swept())
    lines = [container.lines[0] for container in fig.axes[0].containers]
    assert len({line.get_color() for line in lines}) == 3
    kinds = [(line.get_marker(), line._dash_pattern[1] is not None) for line in lines]
    assert kinds == [("o", False), ("D", True), ("o", False)]
    said = [text.get_text() for text in fig.legends[0].get_texts()]
    assert said == ["a Standard", "a DeACL", "b Standard", "majority or mean baseline", "bars: ± standard error"]


def test_panels_of_the_sweep_name_the_attack_and_the_number_of_images():
    titles = [ax.get_title() for ax in plots.sanity_figure(swept()).axes]
    about = {"Classification": "PGD", "Segmentation": "SegPGD", "Depth": "DepthPGD"}
    assert titles == [f"{task}, {attack}\nscenes, n = 5" for task, attack in about.items()]
