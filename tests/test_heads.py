"""Heads against direct transcriptions, losses by hand, the sliding window, and how heads are trained and kept."""

import copy
import math

import planted
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file

from ssl_robust import datasets, encoders, heads, protocol, records, training
from ssl_robust.encoders import Encoder
from ssl_robust.heads import HEADS, TaskModel
from ssl_robust.settings import BadInput, EncoderRow, TaskSettings
from ssl_robust.tasks import TASKS


def _tokens(count=2, dim=5, h=3, w=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, dim, generator=generator), torch.randn(count, dim, h, w, generator=generator)


# --- the three heads ---


def test_classification_head_is_linear_in_cls_alone():
    cls, patches = _tokens()
    head = HEADS["classification"](5, 3)
    expected = cls @ head.linear.weight.T + head.linear.bias
    assert torch.allclose(head(cls, patches, 8), expected, atol=1e-6)
    assert torch.equal(head(cls, patches + 1, 8), head(cls, patches, 8))


def test_segmentation_head_is_batch_norm_and_a_1x1_convolution_then_bilinear():
    cls, patches = _tokens()
    head = HEADS["segmentation"](5, 3)
    normal = (patches - patches.mean((0, 2, 3), keepdim=True)) / patches.std((0, 2, 3), correction=0, keepdim=True)
    low = torch.einsum("cd,bdhw->bchw", head.conv.weight[:, :, 0, 0], normal) + head.conv.bias[:, None, None]
    expected = F.interpolate(low, size=(24, 32), mode="bilinear")
    assert torch.allclose(head.train()(cls, patches, 8), expected, atol=1e-4)


def _depth_as_written(head, cls, patches, patch):
    """Section 4.1 in its own order: upsample tokens, linear, normalised bins, expectation, bilinear, clamp."""
    h, w = patches.shape[2:]
    tokens = torch.cat([patches, cls[:, :, None, None].repeat(1, 1, h, w)], 1)
    bins = F.conv2d(F.interpolate(tokens, scale_factor=4, mode="bilinear"), head.conv.weight, head.conv.bias)
    bins = bins.relu() + 0.1
    width = (10 - 0.001) / 256
    centres = torch.tensor([0.001 + (i + 0.5) * width for i in range(256)])
    depth = (bins / bins.sum(1, keepdim=True) * centres[:, None, None]).sum(1, keepdim=True)
    return F.interpolate(depth, size=(h * patch, w * patch), mode="bilinear")[:, 0].clamp(0.001, 10)


@pytest.mark.parametrize("patch", [4, 8, 14])
def test_depth_head_equals_its_direct_transcription(patch):
    cls, patches = _tokens()
    head = HEADS["depth"](5)
    found = head(cls, 5 * patches, patch)
    assert found.shape == (2, 3 * patch, 4 * patch) and found.std() > 0.01
    assert torch.allclose(found, _depth_as_written(head, cls, 5 * patches, patch), atol=1e-4)


@pytest.mark.parametrize(("shape", "factor"), [((3, 4), 4), ((1, 5), 3), ((7, 2), 2)])
def test_upsample_is_bilinear_interpolation(shape, factor):
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear")
    assert torch.allclose(heads.upsample(x, factor), expected, atol=1e-5)


# --- windows and borders ---


@pytest.mark.parametrize(
    ("size", "window", "stride"), [((37, 29), 16, 7), ((16, 16), 16, 5), ((40, 16), 16, 16), ((9, 50), 16, 11)]
)
def test_sliding_an_identity_returns_the_image(size, window, stride):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(heads.slide(x, lambda crops: crops, window, stride), x, atol=1e-6)


@pytest.mark.parametrize("size", [(48, 70), (32, 32), (33, 40), (20, 50)])
def test_gradient_through_windows_is_that_of_autograd_to_the_last_bit(size):
    """The same sums written with slices, which autograd differentiates by itself."""

    def by_slices(x):
        corners = heads.crop_windows(x, 32, 21)[1]
        crops = torch.cat([x[..., t : t + 32, left : left + 32] for t, left in corners])
        parts = predict(crops).unflatten(0, (len(corners), len(x)))
        total, count = parts.new_zeros(2, 5, *size), torch.zeros(size)
        for part, (t, left) in zip(parts, corners, strict=True):
            total[..., t : t + 32, left : left + 32] += part
            count[t : t + 32, left : left + 32] += 1
        return total / count

    layer = torch.nn.Conv2d(3, 5, 5, padding=2).requires_grad_(False)
    predict = lambda crops: layer(crops.sin())  # noqa: E731
    x, found = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)), []
    for way in (by_slices, lambda x: heads.slide(x, predict, 32, 21)):
        leaf = x.clone().requires_grad_(True)
        logits = way(leaf)
        found.append((logits, *torch.autograd.grad(logits.softmax(1)[:, 3].log().mean(), leaf)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_overlaps_are_averaged():
    x = torch.zeros(1, 1, 2, 6)

    def predict(crops):
        return torch.tensor([1.0, 3.0])[:, None, None, None].expand(len(crops), 1, 2, 4)

    assert heads.slide(x, predict, 4, 2)[0, 0].tolist() == [[1, 1, 2, 2, 3, 3]] * 2


def test_windows_cover_every_pixel_and_stay_inside():
    for length in range(1, 60):
        for window, stride in ((16, 16), (16, 11), (16, 1), (7, 5)):
            starts = heads.window_starts(length, window, stride)
            covered = {p for s in starts for p in range(s, min(s + window, length))}
            assert covered == set(range(length)), (length, window, stride)
            assert starts[-1] == max(length - window, 0) and len(set(starts)) == len(starts)


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_padded_images_come_back_in_their_own_size(task):
    model, x = planted.model(task, patch=8), torch.rand(1, 3, 70, 51, generator=torch.Generator().manual_seed(0))
    assert model.encoder.padding(70, 51) == (2, 3, 1, 1)  # 56 - 51 across, 72 - 70 down
    padded = torch.full((1, 3, 72, 56), 0.5)  # the planted encoder's mean colour
    padded[..., 1:71, 2:53] = x
    assert torch.allclose(model.single(x), model.single(padded)[..., 1:71, 2:53], atol=1e-5)
    assert model(x).shape[-2:] == (70, 51)


@pytest.mark.parametrize("task", TASKS)
def test_heads_and_embeddings_are_fp32_inside_autocast(task):
    model, x, seen = planted.model(task), planted.images(2, 16), []
    model.encoder.backbone.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    model.head.register_forward_pre_hook(lambda head, given: seen.append((given[0].dtype, given[1].dtype)))
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        said, moved = model(x), model.embed(x)
    assert said.dtype == moved.dtype == torch.float32 and (torch.float32, torch.float32) in seen
    assert torch.allclose(said, exact, atol=0.05) and not torch.equal(said, exact)  # the encoder itself is in bf16
    cls, patches = heads.tokens(model.encoder, x, task)
    with torch.autocast("cpu", torch.bfloat16):
        cls, patches = (part.bfloat16() for part in (cls, patches))
        alone = heads.predict(model.head, model.encoder, cls.float(), patches.float(), (16, 16))
        with heads._fp32(x.device):
            inside = heads.predict(model.head, model.encoder, cls.float(), patches.float(), (16, 16))
    assert inside.dtype == torch.float32 and not torch.equal(inside, alone.float())


def test_classification_asks_for_the_cls_token_alone(monkeypatch):
    model, x = planted.model("classification"), planted.images(2, 16)
    logits, embedding = model(x), model.embed(x)
    monkeypatch.setattr(Encoder, "forward", lambda *_: pytest.fail("patch tokens are not needed"))
    cls = model.encoder.cls(x)
    assert torch.equal(model(x), logits) and torch.equal(model.embed(x), embedding) and torch.equal(cls, embedding)


# --- losses ---


def test_pixel_loss_by_hand():
    g = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]])
    valid = torch.tensor([[[True, True], [True, False]], [[True] * 2] * 2])
    expected = [math.sqrt(14 / 3 - 0.85 * 2**2), math.sqrt(0.15) * 0.5]  # mean of squares, square of the mean
    assert heads.pixel_loss(g, valid).tolist() == pytest.approx(expected, rel=1e-5)
    assert heads.pixel_loss(g, valid, alpha=2, lam=0)[0] == pytest.approx(2 * math.sqrt(14 / 3), rel=1e-5)


def test_gradient_loss_by_hand():
    g = torch.tensor([[[0.0, 1.0, 3.0], [2.0, 9.0, 5.0], [4.0, 0.0, 1.0]]])
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    valid[0, 1, 1] = False
    # scale 0: across 1 + 2 and 4 + 1, down 2 + 2 and 2 + 4; scale 1 (the corners): across 3 + 3, down 4 + 2
    assert heads.gradient_loss(g, valid).tolist() == pytest.approx([(8 + 10 + 12) / 8])
    assert heads.gradient_loss(g, valid, scales=1).tolist() == pytest.approx([18 / 8])


def test_depth_loss_has_a_gradient_at_the_truth_and_without_valid_pixels():
    for target in (torch.full((1, 4, 4), 2.0), torch.zeros(1, 4, 4)):
        prediction = torch.full((1, 4, 4), 2.0, requires_grad=True)
        heads.depth_loss(prediction, target).sum().backward()
        assert prediction.grad.isfinite().all()


def test_training_loss_leaves_ignored_pixels_out():
    logits, mask = (
        torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[[0, 255], [2, 1]]]),
    )
    rows = [(0, 0, 0), (1, 0, 2), (1, 1, 1)]
    expected = -sum(logits[0, :, r, c].log_softmax(0)[label] for r, c, label in rows) / 3
    assert torch.allclose(heads.training_loss("segmentation", logits, mask.to(torch.uint8)), expected)


# --- training ---


def test_protocol_of_the_optimisers():
    section = TaskSettings(epochs=5, batch=16, lr=0.5, weight_decay=0.01)
    kinds = {"classification": torch.optim.Adam, "segmentation": torch.optim.AdamW, "depth": torch.optim.AdamW}
    for task, kind in kinds.items():
        optimizer = training.make_optimizer(task, HEADS[task](4, 3), section)
        assert type(optimizer) is kind
        assert optimizer.defaults["lr"] == 0.5 and optimizer.defaults["weight_decay"] == 0.01


def _subsets(task, settings, encoder):
    return [datasets.load(task, "toys", split, settings, encoder.native) for split in ("train", "val")]


@pytest.mark.parametrize("task", TASKS)
def test_training_learns_and_leaves_the_encoder_alone(task, toys):
    lr = 0.5 if task == "classification" else 0.05
    settings, encoder = planted.settings(**{task: {"epochs": 25, "n_train": 18, "lr": lr}}), planted.encoder()
    before = records.state_hash(encoder.state_dict())
    train, val = _subsets(task, settings, encoder)
    head, history = training.fit(task, encoder, train, val, settings.task(task), 0, "cpu")
    assert records.state_hash(encoder.state_dict()) == before
    assert all(not p.requires_grad and p.grad is None for p in encoder.parameters())
    scores = [h["held_out"] for h in history]
    best = min(scores) if task == "depth" else max(scores)
    held_out = training.encoded(encoder, val, 4, "cpu")
    assert training._held_out_metric(task, head, encoder, held_out, 3) == pytest.approx(best)
    assert [h["epoch"] for h in history] == list(range(1, 26))
    assert history[-1]["loss"] < 0.9 * history[0]["loss"] and best != scores[0]


@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_the_best_held_out_epoch_is_kept(task, toys, monkeypatch):
    settings, encoder = planted.settings(), planted.encoder()
    sign = -1 if task == "depth" else 1

    def fit(scores):
        told = iter(scores)
        monkeypatch.setattr(training, "_held_out_metric", lambda *args: sign * next(told))
        section = settings.task(task).model_copy(update={"epochs": len(scores)})
        head, _ = training.fit(task, encoder, *_subsets(task, settings, encoder), section, 0, "cpu")
        return records.state_hash(head.state_dict())

    assert fit([0.1, 0.9, 0.2]) == fit([0.1, 0.2]) != fit([0.1, 0.2, 0.9])


@pytest.mark.parametrize("batch", [1, 11, 100])  # of 12 images; 11 leaves one over
def test_any_batch_size_trains(batch, toys):
    settings, encoder = planted.settings(segmentation={"batch": batch, "epochs": 1}), planted.encoder()
    _, history = training.fit(
        "segmentation", encoder, *_subsets("segmentation", settings, encoder), settings.segmentation, 0, "cpu"
    )
    assert math.isfinite(history[0]["loss"])


def test_features_are_in_the_order_of_the_images(toys):
    encoder = planted.encoder()
    subset = datasets.load("segmentation", "toys", "test", planted.settings(), 16)
    cls, patches, target = training.features(encoder, subset, 3, "cpu")
    image, mask = subset[5]
    alone = encoder(image.float()[None] / 255)
    assert torch.allclose(cls[5], alone[0][0], atol=1e-5) and torch.allclose(patches[5], alone[1][0], atol=1e-5)
    assert torch.equal(target[5], mask)


def test_training_on_images_of_different_sizes_is_refused(toys):
    items = datasets.list_items("toys", "depth", "train", 0, "")[:2]
    items[1] = items[1]._replace(image=items[1].image[:, 1:], target=items[1].target[1:])  # same grid of patches, 23 px
    subset = datasets.Subset("toys", "depth", items, datasets.transform("depth", "test", "original", 16))
    with pytest.raises(BadInput, match="images of toys differ in size; set 'size'"):
        training.features(planted.encoder(), subset, 2, "cpu")


def _with_room_for(room, task, encoder, settings, monkeypatch):
    """Head and history where `room` bytes of tokens may be kept."""
    monkeypatch.setattr(training, "CACHE", room)
    head, history = training.fit(task, encoder, *_subsets(task, settings, encoder), settings.task(task), 0, "cpu")
    return records.state_hash(head.state_dict()), history


@pytest.mark.parametrize("task", TASKS)
def test_streamed_tokens_train_the_same_head_as_kept_ones(task, toys, monkeypatch):
    settings, encoder = planted.settings(), planted.encoder()  # 3 epochs on 2 views or sides
    encodings, original = [], training.encoded
    monkeypatch.setattr(training, "encoded", lambda *args: encodings.append(len(args[1])) or original(*args))
    whole = _with_room_for(2**30, task, encoder, settings, monkeypatch)
    kept = [n for n in encodings if n > 1]
    assert sorted(kept) == [6, 12, 12]  # the held-out images once, each view or side once
    encodings.clear()
    assert _with_room_for(0, task, encoder, settings, monkeypatch) == whole
    assert sorted(n for n in encodings if n > 1) == [6, 6, 6, 12, 12, 12]  # all in every epoch


@pytest.mark.parametrize("task", TASKS)
def test_tokens_of_another_precision_are_rounded_and_make_another_head(task, toys):
    settings, encoder = planted.settings(), planted.encoder()
    train = datasets.load(task, "toys", "train", settings, 16)
    exact, rounded = (training.features(encoder, train, 4, "cpu", p) for p in ("fp32", "bf16"))
    for a, b in zip(exact[:2], rounded[:2], strict=True):
        assert b.dtype == torch.float32 and torch.allclose(a, b, atol=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(exact[:2], rounded[:2], strict=True))
    section = settings.task(task)
    other = settings.model_copy(update={task: section.model_copy(update={"tokens": "bf16"})})
    made = [training.sources(task, "toys", encoder, s, "standard")[3]["inputs"]["settings"] for s in (settings, other)]
    assert made[1] == made[0] | {"tokens": "bf16"} and "tokens" not in made[0]  # keys are older than the choice
    model, _ = training.fitted(task, "toys", encoder, other)
    assert model(planted.images(2)).isfinite().all()


@pytest.mark.parametrize("task", ["classification", "depth"])
def test_kept_sides_are_those_that_each_epoch_draws(task, toys):
    settings, encoder = planted.settings(), planted.encoder()
    train = datasets.load(task, "toys", "train", settings, 16)
    order, drawn = [4, 0, 7, 9, 2, 11], []
    kept, streamed = (make(encoder, train, 4, "cpu") for make in (training._kept, training._streamed))
    for train.view in range(12):
        mine, other = ([torch.cat(c) for c in zip(*source(order, 4), strict=True)] for source in (kept, streamed))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, other, strict=True))
        drawn.append([train.flipped(i) for i in order])
    assert len({tuple(row) for row in drawn}) > 2 and all(len(set(column)) == 2 for column in zip(*drawn, strict=True))


def test_tokens_are_encoded_in_smaller_batches_when_memory_runs_out(toys, monkeypatch):
    encoder, tried, original = planted.encoder(), [], heads.tokens
    train, _ = _subsets("depth", planted.settings(), encoder)
    whole = training.features(encoder, train, 12, "cpu")

    def hungry(encoder, x, task):
        tried.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(encoder, x, task)

    monkeypatch.setattr(training, "tokens", hungry)
    found = training.features(encoder, train, 6, "cpu")
    assert tried == [6, 3, 3, 3, 3]  # the next batch does not try again what did not fit
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, whole, strict=True))


def test_tokens_are_kept_as_far_as_there_is_room(toys, monkeypatch):
    settings, encoder = planted.settings(), planted.encoder()
    subsets = _subsets("depth", settings, encoder)
    of_train, of_val = (training.token_bytes(encoder, subset, "cpu") for subset in subsets)
    assert of_train == sum(part.nbytes for part in training.features(encoder, subsets[0], 4, "cpu"))

    def sources(room, **section):
        monkeypatch.setattr(training, "CACHE", room)
        section = settings.depth.model_copy(update=section)
        found = training.token_sources(encoder, *subsets, section, "cpu")
        return ["kept" if "_kept" in source.__qualname__ else "streamed" for source in found]

    assert sources(2 * of_train + of_val) == ["kept", "kept"]
    assert sources(2 * of_train + of_val - 1) == ["streamed", "kept"]
    assert sources(of_val - 1) == ["streamed", "streamed"]
    assert sources(2**30, epochs=2) == ["streamed", "kept"]  # each side serves once


@pytest.mark.parametrize("groups", [(5, 5, 2), (12,), (1,) * 12, (3, 9)])
@pytest.mark.parametrize("size", [1, 4, 12, 20])
def test_regrouped_batches_hold_the_same_rows(groups, size):
    rows = torch.arange(36.0).reshape(12, 3)
    found = list(training._regrouped(zip(rows.split(groups), (-rows).split(groups), strict=True), size))
    assert [len(a) for a, _ in found] == [len(part) for part in rows.split(size)]
    assert torch.equal(torch.cat([a for a, _ in found]), rows) and torch.equal(torch.cat([b for _, b in found]), -rows)


# --- heads on disk ---


@pytest.fixture
def trainings(toys, monkeypatch):
    """One entry for each head that is trained."""
    found, fit = [], training.fit
    monkeypatch.setattr(training, "fit", lambda *args: found.append(args[0]) or fit(*args))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_a_head_is_trained_once(task, trainings):
    first, history = training.fitted(task, "toys", planted.encoder(), planted.settings())
    again, history_again = training.fitted(task, "toys", planted.encoder(), planted.settings(**{task: {"n_test": 1}}))
    assert trainings == [task] and history_again == history
    assert records.state_hash(first.head.state_dict()) == records.state_hash(again.head.state_dict())
    x = planted.images(2, 24)
    assert torch.equal(first(x), again(x)) and again.stride == first.stride
    assert isinstance(again, TaskModel) and all(not p.requires_grad for p in again.parameters())


def test_a_head_is_trained_again_for_other_inputs(trainings):
    def fitted(native=16, seed=0, **section):
        encoder = planted.encoder(native=native, seed=seed)
        return training.fitted("classification", "toys", encoder, planted.settings(classification=section))

    for count, change in enumerate([{}, {"lr": 0.02}, {"n_train": 11}, {"size": 12}, {"native": 20}, {"seed": 1}], 1):
        fitted(**change)
        assert len(trainings) == count, change
        fitted(**change)
        assert len(trainings) == count, change


def test_what_evaluation_alone_depends_on_is_no_part_of_a_head(trainings):
    for section in ({}, {"stride": 0.25}, {"attack_batch": 2}, {"n_test": 3}):
        training.fitted("segmentation", "toys", planted.encoder(), planted.settings(segmentation=section))
    training.fitted("segmentation", "toys", planted.encoder(), planted.settings(protocol=["segpgd_two_means"]))
    assert trainings == ["segmentation"]


def test_the_released_recipe_makes_another_head(trainings):
    for count, names in enumerate(["paper", ["head_recipe"], ["native_input"], "released"], 1):
        model, _ = training.fitted("segmentation", "toys", planted.encoder(), planted.settings(protocol=names))
        assert len(trainings) == count and model.protocol == protocol.active(planted.settings(protocol=names))


def test_head_files_are_the_same_bytes_each_time(toys):
    found = set()
    for profile in "abcdef":  # the order of two metadata entries would be another one in half of all files
        training.fitted("depth", "toys", planted.encoder(), planted.settings(profile=profile, depth={"epochs": 1}))
        found.add(planted.stored("heads/depth__toys__planted__standard__*", profile).read_bytes())
    assert len(found) == 1
    assert set(load(found.pop())) == {"conv.weight", "conv.bias"}


def test_a_damaged_head_is_trained_again(trainings):
    training.fitted("depth", "toys", planted.encoder(), planted.settings())
    path = planted.stored("heads/depth__toys__planted__standard__*")
    whole, trained = path.read_bytes(), load(path.read_bytes())
    for content in (whole[:-10], whole[:5], b""):
        path.write_bytes(content)
        training.fitted("depth", "toys", planted.encoder(), planted.settings())
        assert all(torch.equal(v, trained[k]) for k, v in load(path.read_bytes()).items())
    save_file({"conv.bias": torch.zeros(1)}, path)  # a foreign file without a key
    training.fitted("depth", "toys", planted.encoder(), planted.settings())
    assert len(trainings) == 5


def test_fit_all_lists_every_head(toys, monkeypatch):
    monkeypatch.setattr(encoders, "load", lambda row, root: planted.encoder())
    table = training.fit_all(planted.settings())
    assert table["task"].tolist() == list(TASKS)
    assert table["metric"].tolist() == [TASKS[t].metric for t in TASKS]
    assert (table["epoch"].between(1, 3)).all() and table["held_out"].notna().all()


def _absent(name):
    """A loader that knows every row but `name`."""

    def load(row, root, weights=None):
        if row.name == name:
            raise BadInput(f"The checkpoint of {name} does not exist; correct the path.")
        return planted.encoder()

    return load


def test_fit_all_skips_what_is_missing_and_says_why(toys, monkeypatch):
    monkeypatch.setattr(encoders, "load", _absent("gone"))
    rows = [{"name": "gone"}, {"name": "planted"}]
    settings = planted.settings(encoders=rows, missing="skip", depth={"datasets": ["toys", "nowhere"]})
    path = records.results_dir("toy") / "heads" / "skipped.json"
    table = training.fit_all(settings)
    assert list(zip(table["task"], table["encoder"], strict=True)) == [(task, "planted") for task in TASKS]
    lost = records.read_json(path)
    assert [(r["task"], r["dataset"], r["encoder"]) for r in lost] == [
        ("classification", "toys", "gone"), ("segmentation", "toys", "gone"), ("depth", "toys", "gone"),
        ("depth", "nowhere", "gone"), ("depth", "nowhere", "planted"),
    ]  # fmt: skip
    assert "checkpoint of gone" in lost[0]["why"] and "nowhere" in lost[-1]["why"]
    with pytest.raises(BadInput, match="checkpoint of gone"):
        training.fit_all(settings.model_copy(update={"missing": "stop"}))
    training.fit_all(planted.settings(encoders=rows[1:], missing="skip"))
    assert not path.exists()


def test_predictions_for_pictures(toys):
    subset = datasets.load("segmentation", "toys", "test", planted.settings(), 16)
    shown = heads.predictions(planted.model("segmentation"), subset, 4)
    assert shown["pred_clean"].shape == shown["target"].shape == (4, 24, 24)
    assert shown["pred_clean"].dtype == torch.uint8 and shown["classes"] == list(planted.CLASSES)


# --- which tokens a head reads ---


@pytest.mark.parametrize(
    "model",
    ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m"],
)
def test_depth_reads_tokens_before_the_final_norm_and_the_other_tasks_behind_it(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = encoders.random_init(EncoderRow(name=model))
        torch.nn.init.normal_(encoder.backbone.norm.weight)  # at its start the norm is hardly one
        torch.nn.init.normal_(encoder.backbone.norm.bias)
    x = planted.images(2, 4 * encoder.patch)
    pixels, prefix = (x - encoder.mean) / encoder.std, encoder.backbone.num_prefix_tokens
    for task in ("segmentation", "depth"):
        timms = encoder.backbone.forward_intermediates(
            pixels, 1, return_prefix_tokens=True, norm=task == "segmentation", intermediates_only=True
        )
        ((patches, first),) = timms
        cls, found = heads.tokens(encoder, x, task)
        assert torch.allclose(found, patches, atol=1e-4) and torch.allclose(cls, first[:, 0], atol=1e-4)
        model = TaskModel(task, encoder, HEADS[task](encoder.dim, 3))
        moved = model.embed(x) if task == "depth" else None
        assert moved is None or torch.allclose(moved, patches.flatten(1), atol=1e-4)
    assert torch.allclose(heads.tokens(encoder, x, "classification")[0], encoder(x)[0], atol=1e-4)
    assert prefix >= 1 and not torch.allclose(encoder(x)[1], encoder(x, normed=False)[1], atol=1e-2)


@pytest.mark.parametrize("model", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_feature_maps_have_tokens_before_a_norm_only_where_there_is_one(model):
    encoder = encoders.random_init(EncoderRow(name=model, native=64 if model == "resnet18" else None))
    x = planted.images(1, encoder.native)
    (_, normed), (_, raw) = encoder(x), encoder(x, normed=False)
    final = getattr(encoder.backbone, "norm", None)
    behind = raw if final is None else final(raw.movedim(1, -1)).movedim(-1, 1)
    assert torch.allclose(behind, normed, atol=1e-4)


def test_a_head_that_diverges_is_refused_by_name(toys):
    settings, encoder = planted.settings(depth={"lr": 900.0, "epochs": 30}), planted.encoder()
    bad = copy.deepcopy(encoder)
    bad.backbone.proj.weight.fill_(math.nan)
    with pytest.raises(BadInput, match="gives tokens that are not finite on toys"):
        training.fit("depth", bad, *_subsets("depth", settings, bad), settings.depth, 0, "cpu")
    original = training._epoch
    training._epoch = lambda *args: math.nan
    try:
        with pytest.raises(BadInput, match=r"depth head of 'planted' on toys diverged in epoch 1 .*lower depth.lr"):
            training.fit("depth", encoder, *_subsets("depth", settings, encoder), settings.depth, 0, "cpu")
    finally:
        training._epoch = original
