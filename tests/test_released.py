"""Each difference of the released code by hand-computed numbers, and that the paper's protocol knows none of them."""

import math

import planted
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from ssl_robust import attacks, datasets, encoders, evaluate, heads, metrics, protocol, records, settings, training
from ssl_robust.datasets import IGNORE, Subset
from ssl_robust.protocols import effects, released
from ssl_robust.settings import DIFFERENCES, Attack, BadInput
from ssl_robust.tasks import TASKS

NONE = frozenset()
CLASSES = ("background", "a", "b")
LN3 = math.log(3)


def _names(*names):
    return frozenset(names)


def _in(protocol, **changes):
    return planted.settings(protocol=protocol, **changes)


def _model(task, *names):
    model = planted.model(task)
    model.protocol = _names(*names)
    return model


# --- the list of differences, and what is active ---


def test_the_differences_are_those_of_the_settings():
    assert tuple(released.DIFFERENCES) == DIFFERENCES
    for name, difference in released.DIFFERENCES.items():
        assert set(difference) == {"tasks", "paper", "released"}
        assert difference["tasks"] and set(difference["tasks"]) <= set(TASKS), name
        assert difference["paper"] != difference["released"]
        assert difference["paper"].endswith(".") and difference["released"].endswith("."), name


@pytest.mark.parametrize(
    ("given", "names", "label"),
    [
        ("paper", (), "paper"),
        ([], (), "paper"),
        ("released", DIFFERENCES, "released"),
        (["head_recipe", "embed_mse"], ("embed_mse", "head_recipe"), ["embed_mse", "head_recipe"]),
        (list(DIFFERENCES), DIFFERENCES, "released"),
    ],
)
def test_protocols_and_how_records_write_them(given, names, label):
    assert protocol.active(_in(given)) == frozenset(names)
    assert protocol.label(frozenset(names)) == label


def test_an_unknown_difference_is_refused():
    with pytest.raises(BadInput, match="protocol"):
        settings.check(profile="toy", encoders=[{"name": "planted"}], protocol=["no_such_thing"])


def test_nothing_is_replaced_in_the_papers_protocol():
    given = _in("paper")
    assert released.adjusted(given, 224) == given

    def predict(x):
        return x

    assert released.window_prediction(predict, NONE) is predict
    test = datasets.Subset("scenes", "segmentation", [], None)
    assert released.test_images(test, NONE) is test
    for task in TASKS:
        assert released.reduction(task, CLASSES, NONE) is metrics.value_of_sums
        for kind in attacks.KINDS:
            assert released.statistics(task, kind, NONE) is metrics.statistics
        for kind in ("embed", "task"):
            assert released.attack_loss(kind, task, NONE) == []


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_leaves_the_other_tasks_alone(name, toys):
    names, changed = _names(name), set()
    given, adv = _in([name], classification={"size": 32}, depth={"size": 32}), planted.images(1)
    for task in TASKS:
        replaced = [released.attack_loss(kind, task, names) for kind in ("embed", "task")]
        replaced += [released.adjusted(given, 224).task(task) != given.task(task)]
        replaced += [released.reduction(task, CLASSES, names) is not metrics.value_of_sums]
        replaced += [released.statistics(task, "task", names) is not metrics.statistics]
        replaced += [released.as_judged("task", _model(task, name), adv, names) is not adv]
        subset = Subset("scenes", task, [], datasets.transform(task, "test", 32, 16))
        replaced += [released.test_images(subset, names) is not subset]
        changed |= {task} if any(replaced) else set()
    if name == "window_probabilities":  # seen by segmentation alone, see below
        changed = {"segmentation"}
    assert changed == set(released.DIFFERENCES[name]["tasks"])


# --- settings ---


def test_the_head_recipe():
    given = _in(["head_recipe"], segmentation={"epochs": 7})
    found = released.adjusted(given, 224)
    assert found.classification == given.classification.model_copy(update={"batch": 128})
    assert (found.segmentation.lr, found.segmentation.weight_decay, found.segmentation.epochs) == (1e-3, 1e-4, 7)
    assert found.depth == given.depth


def test_native_input():
    found = released.adjusted(_in(["native_input"], depth={"size": "original"}), 224)
    assert found.classification.size == found.segmentation.size == "native" and found.segmentation.stride == 0.5
    assert found.depth.size == "original"


@pytest.mark.parametrize(
    ("stored", "shown"),
    [((480, 640), (480, 640)), ((768, 1280), (480, 640)), ((64, 64), (64, 64)), ((500, 600), (500, 600))],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_depth_is_always_480_by_640_whatever_the_encoder(stored, shown, split):
    size = released.adjusted(_in(["depth_480x640"], depth={"size": "native"}), 224).depth.size
    made = datasets.transform("depth", split, size, 64)
    image = datasets.tv_tensors.Image(torch.zeros(3, *stored, dtype=torch.uint8))
    image, depth = made(image, datasets.tv_tensors.Mask(torch.ones(stored)))
    assert image.shape[1:] == depth.shape == shown
    assert released.adjusted(_in(["depth_480x640"]), 224).classification.size == _in("paper").classification.size


@pytest.mark.parametrize(("native", "pixels"), [(224, 100), (518, 341), (112, 50)])
def test_the_stride_of_the_window(native, pixels):
    found = released.adjusted(_in(["dense_stride"]), native)
    assert round(found.segmentation.stride * native) == pixels and found.segmentation.size == 24
    assert released.adjusted(found, native) == found


def test_sections_that_are_not_set_stay_so():
    alone = _in("released").model_copy(update={"depth": None})
    assert released.adjusted(alone, 224).depth is None


# --- attacks ---


def test_embedding_by_mean_squared_error():
    clean, moved = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, 6.0], [0.0, 1.0]])
    assert released.mean_square(moved, clean).tolist() == [12.5, 0.5]
    assert attacks.l2(moved, clean).tolist() == [5, 1]


@pytest.mark.parametrize("task", TASKS)
def test_mean_squared_error_moves_images_as_the_distance_does(task):
    x = planted.images(2, 24)
    truth = planted.target(task, x)
    found = []
    for names in ((), ("embed_mse",)):
        model = _model(task, *names)
        found.append(attacks.attacked("embed", model, x, truth, ["a", "b"], Attack(steps=3), 0))
        loss = attacks.loss_for("embed", model, x, truth, 3)(found[0], 1)
        moved = (model.embed(found[0]) - model.embed(x)).norm(dim=1)
        assert torch.allclose(loss, moved**2 / model.embed(x).shape[1] if names else moved, rtol=1e-4)
    assert torch.isclose(*found, atol=1e-6).float().mean() > 0.999


def test_pgd_divides_logits_by_their_largest():
    logits = torch.tensor([[4 * LN3, 0.0], [0.5, 0.0]], requires_grad=True)
    loss = released.scaled_cross_entropy(logits, torch.tensor([1, 0]))
    # 4 ln 3 / 4 ln 3 = 1 against 0; the second's largest is below 1 and stays
    expected = [math.log(1 + math.e), math.log(1 + math.exp(-0.5))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    # the divisor is a constant: d/dz of log(1 + exp(z / m)) is sigmoid(1) / m
    assert gradient[0].tolist() == pytest.approx([s / (4 * LN3 * (1 + math.exp(-1))) for s in (1, -1)], rel=1e-5)
    assert attacks.margin(logits, torch.tensor([1, 0]))[0].item() == pytest.approx(4 * LN3, rel=1e-6)


def test_pgd_uses_it_when_it_is_active():
    x = planted.images(2)
    truth, model = torch.tensor([0, 1]), _model("classification", "pgd_scaled_logits")
    found = attacks.loss_for("task", model, x, truth, 3)(x, 1)
    assert torch.equal(found, released.scaled_cross_entropy(model(x), truth))


def test_segpgd_by_two_means():
    # class 0 is said everywhere with probability 3/4: loss ln 4/3 where it is right, ln 4 where it is not
    logits = torch.tensor([LN3, 0.0])[None, :, None, None].expand(1, 2, 2, 3)
    mask = torch.tensor([[[0, 0, 0], [1, IGNORE, IGNORE]]])
    right, wrong = math.log(4 / 3), math.log(4)
    for weight in (0.0, 0.25, 0.5):
        found = attacks.segpgd(released.two_means(logits, mask), weight)
        assert float(found) == pytest.approx((1 - weight) * right + weight * wrong, rel=1e-6)
        paper = ((1 - weight) * 3 * right + weight * wrong) / 6
        assert float(attacks.segpgd(attacks.segpgd_parts(logits, mask), weight)) == pytest.approx(paper, rel=1e-6)


def test_two_means_of_an_empty_set_are_finite():
    logits = torch.tensor([1.0, 0.0])[None, :, None, None].expand(3, 2, 1, 2).clone().requires_grad_(True)
    mask = torch.tensor([[[0, 0]], [[1, 1]], [[IGNORE, IGNORE]]])
    loss = attacks.segpgd(released.two_means(logits, mask), 0.5)
    a, b = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert loss.tolist() == pytest.approx([0.5 * a, 0.5 * b, 0], rel=1e-6)
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_segpgd_of_probabilities_takes_softmax_twice():
    x = planted.images(2, 24)
    mask = planted.target("segmentation", x).to(torch.uint8)
    model = _model("segmentation", "window_probabilities")
    averaged = heads.slide(x, lambda crops: model.single(crops).softmax(1), 16, 8)
    assert torch.equal(model(x), averaged)
    assert torch.allclose(averaged.sum(1), torch.ones(2, 24, 24)) and averaged.min() > 0
    found = attacks.loss_for("task", model, x, mask, 4)(x, 2)
    assert torch.equal(found[:, 0], attacks.segpgd(attacks.segpgd_parts(averaged, mask.long()), 1 / 8))


def test_averages_of_probabilities_by_hand():
    crops = torch.tensor([[LN3, 0.0], [0.0, LN3 + math.log(3)]])[:, :, None, None]  # 3/4, 1/4 and 1/10, 9/10

    def average(names):
        predict = released.window_prediction(lambda x: x, names)
        return predict(crops).mean(0).flatten().tolist()

    assert average(_names("window_probabilities")) == pytest.approx([0.425, 0.575])
    assert average(NONE) == pytest.approx([LN3 / 2, LN3])


def _their_depth_loss(prediction, depth, t):
    """The released loss of one image by loops, depths (H, W): of rows, as it slices (1, H, W) by its first axes."""
    height, width = depth.shape
    g = {
        (r, c): math.log(float(prediction[r, c]) + 0.001) - math.log(float(depth[r, c]) + 0.001)
        for r in range(height) for c in range(width) if depth[r, c] > 0
    }  # fmt: skip
    mean = sum(g.values()) / len(g)
    variance = sum((value - mean) ** 2 for value in g.values()) / (len(g) - 1)  # unbiased, after the warm-up only
    total = math.sqrt((variance if t > 100 else 0) + 0.15 * mean**2)
    for every in (1, 2, 4, 6):
        rows = list(range(0, height, every))
        counted = [(r, c) for r in rows for c in range(width) if (r, c) in g]
        steps = sum(
            abs(g[upper, c] - g[lower, c])
            for upper, lower in zip(rows, rows[2:], strict=False)
            for c in range(width)
            if (upper, c) in g and (lower, c) in g
        )
        total += 0.5 * steps / len(counted)
    return total


@pytest.mark.parametrize("t", [1, 100, 101])
def test_depth_pgd_climbs_the_released_loss(t):
    x = planted.images(2, 24)
    truth, model = planted.target("depth", x), _model("depth", "depth_attack_loss")
    truth[1, ::3, 5:9] = 0
    found = attacks.loss_for("task", model, x, truth, 200)(x, t)
    assert found.tolist() == pytest.approx([_their_depth_loss(model(x)[i], truth[i], t) for i in range(2)], rel=1e-4)
    assert not torch.isclose(found, heads.depth_loss(model(x), truth), rtol=1e-2).any()


def test_the_released_loss_sees_no_horizontal_edge_and_is_finite_without_a_true_depth():
    truth = torch.full((2, 8, 8), 2.0)
    truth[1] = 0
    said = truth.clone() + 1
    said[0, :, 4:] += 3  # a vertical edge: rows are all alike
    g = (said[0] + 0.001).log() - math.log(2.001)
    found = released.depth_loss(said, truth, 1)
    assert found.tolist() == pytest.approx([math.sqrt(0.15) * float(g.mean()), 0], rel=1e-5)


# --- how attacked images are judged ---


@pytest.mark.parametrize("task", TASKS)
def test_images_of_dense_task_attacks_are_judged_without_normalisation(task):
    model, x = _model(task, "unnormalised_evaluation"), planted.images(2, 24)
    bare = _model(task, "unnormalised_evaluation")
    bare.encoder.mean.zero_()
    bare.encoder.std.fill_(1)
    for kind in attacks.KINDS:
        without = kind == "task" and task != "classification"
        assert torch.allclose(evaluate.judged(kind, model, x), (bare if without else model)(x), atol=1e-5)
        assert torch.equal(evaluate.judged(kind, _model(task), x), model(x))
    assert not torch.allclose(bare(x), model(x), atol=1e-2)


def test_test_images_of_segmentation_are_resized_by_nearest_neighbour():
    image = torch.arange(3 * 6 * 9, dtype=torch.uint8).view(3, 6, 9)
    mask = torch.arange(6 * 9, dtype=torch.uint8).view(6, 9) % 3
    items = [datasets.Item("i", image, mask)]
    test = Subset("scenes", "segmentation", items, datasets.transform("segmentation", "test", 4, 4))
    shown, labels = released.test_images(test, _names("native_input"))[0]
    rows, columns = ([int(i * step) for i in range(n)] for n, step in ((4, 6 / 4), (6, 9 / 6)))  # as OpenCV does
    assert torch.equal(shown, image[:, rows][:, :, columns]) and not torch.equal(test[0][0], shown)
    assert torch.equal(labels, mask[rows][:, columns])


# --- test images and metrics ---


def _masks(target):
    items = [datasets.Item(f"i{i}", torch.zeros(3, 2, 2, dtype=torch.uint8), t) for i, t in enumerate(target)]
    transform = datasets.transform("segmentation", "test", "original", 2)
    return Subset("scenes", "segmentation", items, transform)


def test_miou_without_the_background():
    target = torch.tensor([[[0, 1], [1, 2]], [[0, IGNORE], [2, 2]]], dtype=torch.uint8)
    said = torch.tensor([[[1, 1], [0, 2]], [[0, 1], [2, 1]]])
    test = released.test_images(_masks(target), _names("class0_ignored"))
    assert test.classes[0] == "background"
    shown = torch.stack([test[i][1] for i in range(2)])
    assert shown.tolist() == [[[IGNORE, 1], [1, 2]], [[IGNORE, IGNORE], [2, 2]]]
    logits = torch.nn.functional.one_hot(said, 3).movedim(-1, 1).float()
    stats = metrics.statistics("segmentation", logits, shown, 3)
    reduce = released.reduction("segmentation", CLASSES, _names("class0_ignored"))
    # class 1: 1 hit of 2, and said once for class 2: 1/3; class 2: 2 hits of 3: 2/3
    assert metrics.value("segmentation", stats, reduce) == pytest.approx((1 / 3 + 2 / 3) / 2)
    # image 0: class 1 1/2, class 2 1; image 1: class 1 is said only (0 of 1), class 2 1/2
    assert metrics.per_image("segmentation", stats, reduce) == pytest.approx([0.75, 0.25])
    assert metrics.standard_error("segmentation", stats, 0, reduce) > 0
    reference = MulticlassJaccardIndex(3, ignore_index=0)(said[shown != IGNORE], target[shown != IGNORE].long())
    assert metrics.value("segmentation", stats, reduce) == pytest.approx(float(reference), abs=1e-6)
    # the best constant is class 2, 3 of the 5 pixels that count, over two classes
    found = released.chances("segmentation", list(target), CLASSES, NONE)
    assert found[released.way("segmentation", "task", CLASSES, _names("class0_ignored"))] == pytest.approx(3 / 5 / 2)


def test_only_a_background_is_left_out(toys):
    names = _names("class0_ignored")
    assert released.reduction("segmentation", ("wall", "building"), names) is metrics.value_of_sums
    subset = datasets.load("segmentation", "toys", "test", planted.settings(), 16)
    assert subset.classes[0] == "dark" and released.test_images(subset, names) is subset


def test_depth_is_flipped_with_its_image_by_seed_and_image(toys):
    plain = datasets.load("depth", "toys", "test", planted.settings(), 16)
    flipped, again = (released.test_images(plain, _names("depth_flipped")) for _ in range(2))
    turned = 0
    for i in range(len(plain)):
        (image, depth), (other, other_depth) = plain[i], flipped[i]
        turn = not torch.equal(image, other)
        turned += turn
        assert torch.equal(other, image.flip(-1) if turn else image)
        assert torch.equal(other_depth, depth.flip(-1) if turn else depth)
        assert torch.equal(again[i][0], other)
    assert 0 < turned < len(plain) and flipped.hash == plain.hash
    found = datasets.load("depth", "toys", "test", planted.settings(seed=1), 16)
    other = [torch.equal(released.test_images(found, _names("depth_flipped"))[i][0], found[i][0]) for i in range(8)]
    assert 0 < sum(other) < 8


TARGET = torch.tensor([[[1.0, 0.0], [3.0, 3.0]], [[2.0, 2.0], [2.0, 12.0]], [[0.0, 0.0], [0.0, 0.0]]])
SAID = torch.tensor([[[2.0, 4.0], [5.0, 3.0]], [[2.0, 2.0], [5.0, 10.0]], [[1.0, 1.0], [1.0, 1.0]]])


def _rmse(kind, *names):
    stats = released.statistics("depth", kind, _names(*names))("depth", SAID, TARGET, 0)
    reduce = released.reduction("depth", (), _names(*names))
    return metrics.value("depth", stats, reduce), metrics.per_image("depth", stats, reduce)


def test_rmse_under_attack_over_all_pixels():
    # squares of image 0: 1, (16), 4, 0; of image 1: 0, 0, 9, (4); of image 2, never seen: (1, 1, 1, 1)
    masked = math.sqrt(14 / 6)
    assert _rmse("task")[0] == _rmse("clean", "depth_unmasked")[0] == pytest.approx(masked)
    for kind in ("embed", "task"):
        value, singly = _rmse(kind, "depth_unmasked")
        assert value == pytest.approx(math.sqrt((21 + 13 + 4) / 12))
        assert singly == pytest.approx([math.sqrt(21 / 4), math.sqrt(13 / 4), 1], abs=1e-6)


def test_rmse_as_the_mean_of_images():
    value, singly = _rmse("task", "depth_mean_of_images")
    assert value == pytest.approx((math.sqrt(5 / 3) + math.sqrt(3)) / 2)  # the image without a true depth is no image
    assert singly == pytest.approx([math.sqrt(5 / 3), math.sqrt(3), 0], abs=1e-6)
    value, _ = _rmse("task", "depth_mean_of_images", "depth_unmasked")
    assert value == pytest.approx((math.sqrt(21 / 4) + math.sqrt(13 / 4) + 1) / 3)


def test_the_error_of_a_mean_of_images_is_the_analytic_one():
    target = torch.full((50, 2, 2), 2.0)
    said = target + torch.rand(50, 1, 1, generator=torch.Generator().manual_seed(0)) * 3
    names = _names("depth_mean_of_images")
    stats = released.statistics("depth", "task", names)("depth", said, target, 0)
    error = metrics.standard_error("depth", stats, 0, released.reduction("depth", (), names))
    assert error == pytest.approx(float((said - target)[:, 0, 0].std()) / math.sqrt(50), rel=0.1)


@pytest.mark.parametrize(
    "names", [("depth_unmasked",), ("depth_mean_of_images",), ("depth_unmasked", "depth_mean_of_images")]
)
@pytest.mark.parametrize("kind", ["clean", "task"])
def test_the_best_constant_depth_is_judged_like_the_predictions(names, kind):
    names = _names(*names)
    everywhere = released.unmasked(kind, names)
    statistic, reduce = released.statistics("depth", kind, names), released.reduction("depth", (), names)
    scores = [
        metrics.value("depth", statistic("depth", torch.full_like(TARGET, c), TARGET, 0), reduce)
        for c in torch.linspace(0, 10, 1001).tolist()
    ]
    found = released.constant_value("depth", list(TARGET), 0, everywhere, names)
    assert found == pytest.approx(min(scores), abs=1e-3)


# --- records ---


@pytest.fixture
def planted_encoder(toys, monkeypatch):
    monkeypatch.setattr(encoders, "load", lambda row, data_root="", weights=None: planted.encoder())
    return toys


def _records(task, protocol):
    found = evaluate.run_task(task, _in(protocol, encoders=[{"name": "planted"}]))
    return {record["attack"]: record for record in found}


@pytest.mark.parametrize("task", TASKS)
def test_every_record_is_made_anew_in_another_protocol(task, planted_encoder):
    found = {label: _records(task, label) for label in ("paper", "released")}
    single = _records(task, ["depth_unmasked", "embed_mse"])
    for kind in attacks.KINDS:
        records_of = [found["paper"][kind], found["released"][kind], single[kind]]
        assert [r["protocol"] for r in records_of] == ["paper", "released", ["depth_unmasked", "embed_mse"]]
        assert len({r["key"] for r in records_of}) == 3
    assert _records(task, "released").keys() == found["released"].keys()
    size = found["released"]["clean"]["settings"]["task"]["size"]
    assert size == {"depth": (480, 640)}.get(task, "native")


def test_released_depth_differs_where_it_must(planted_encoder):
    paper, unmasked = _records("depth", "paper"), _records("depth", ["depth_unmasked"])
    assert unmasked["clean"]["value"] == paper["clean"]["value"]
    assert unmasked["clean"]["chance"] == paper["clean"]["chance"]
    for kind in ("embed", "task"):
        assert unmasked[kind]["value"] > paper[kind]["value"]  # an unseen pixel is compared with 0 m
        assert unmasked[kind]["chance"] > paper[kind]["chance"]


def test_effects_are_a_row_for_each_difference_of_a_task(planted_encoder):
    given = planted.settings(attack={"steps": 2}, segmentation={"epochs": 2})
    table = effects.effects(given)
    for task in TASKS:
        rows = table[table["task"] == task].set_index("protocol")
        names = [name for name, d in released.DIFFERENCES.items() if task in d["tasks"]]
        assert list(rows.index) == ["paper", *names, "released"]
        assert rows[["clean", "embed", "attack", "clean_se", "embed_se", "attack_se"]].notna().all().all()
        assert (rows["n"] == 8).all() and (rows["encoder"] == "planted").all()
        for name in names:
            untouched = set(attacks.KINDS) - set(released.TOUCHES.get(name, attacks.KINDS))
            for kind in untouched:
                column = {"task": "attack"}.get(kind, kind)
                assert rows[column][name] == rows[column]["paper"]
    assert not list(records.results_dir("toy").glob("*/*__*__*__*.json"))  # no table shows them
    again = effects.effects(given)
    assert again.equals(table)


@pytest.mark.parametrize(("name", "kinds"), released.TOUCHES.items())
def test_attacks_that_a_difference_cannot_touch_give_the_same_number(name, kinds, planted_encoder):
    task = next(t for t in reversed(TASKS) if t in released.DIFFERENCES[name]["tasks"])
    paper, other = _records(task, "paper"), _records(task, [name])
    for kind in set(attacks.KINDS) - set(kinds):
        assert other[kind]["value"] == paper[kind]["value"] and other[kind]["statistics"] == paper[kind]["statistics"]


def test_effects_leave_the_heads_of_the_paper_alone(planted_encoder, monkeypatch):
    trained, fit = [], training.fit
    monkeypatch.setattr(training, "fit", lambda *args: trained.append(args[0]) or fit(*args))
    alone = planted.settings(attack={"steps": 1}).model_copy(update={"classification": None, "depth": None})
    for _ in range(2):
        effects.effects(alone)
        assert len(trained) == 4  # the paper's, head_recipe, native_input and all together
    folder = records.runs_dir("toy") / "heads"
    names = ("standard", "standard-head_recipe", "standard-native_input", "standard-released")
    made = {path.stem.rpartition("__")[0] for path in folder.iterdir()}
    assert made == {f"segmentation__toys__planted__{name}" for name in names}
