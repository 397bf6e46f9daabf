"""The metrics against torchmetrics, hand-made numbers and analytic standard errors."""

import math

import pytest
import torch

from ssl_robust import metrics
from ssl_robust.datasets import IGNORE


def _logits(labels, classes):
    return torch.nn.functional.one_hot(torch.as_tensor(labels), classes).movedim(-1, 1).float()


@pytest.fixture
def masks():
    """Predictions and targets of 6 images; class 4 of 6 never occurs, 255 does."""
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randint(4, (6, 9, 7), generator=generator) for _ in range(2))
    predicted[0, 0, 0] = 5  # a class that occurs in no target
    target[torch.rand(6, 9, 7, generator=generator) < 0.2] = IGNORE
    return predicted, target


def test_miou_by_hand():
    target = torch.tensor([[[0, 0], [1, IGNORE]], [[1, 1], [1, 0]]])
    predicted = torch.tensor([[[0, 1], [1, 2]], [[1, 1], [0, 0]]])
    stats = metrics.statistics("segmentation", _logits(predicted, 3), target, 3)
    # class 0: 2 hits, union 2 + 1 + 1; class 1: 3 hits, union 3 + 1 + 1; class 2 only where ignored
    assert stats.tolist() == [[[1, 2], [1, 2], [0, 0]], [[1, 2], [2, 3], [0, 0]]]
    assert metrics.listed("segmentation", stats) == [[0, 1, 2, 1, 1, 2], [0, 1, 2, 1, 2, 3]]
    assert metrics.value("segmentation", stats) == pytest.approx((2 / 4 + 3 / 5) / 2)


@pytest.mark.parametrize(
    "row", [[math.nan] * 3, [5.0, math.nan, 1.0], [math.inf] * 3, [-math.inf] * 3, [5.0, -math.inf, 1.0]]
)
def test_a_prediction_that_is_no_number_is_wrong_in_every_task(row):
    bad = torch.tensor([row])
    for truth in range(3):
        assert metrics.statistics("classification", bad, torch.tensor([truth]), 3).tolist() == [[0]]
    logits = torch.stack([_logits([[0, 1, 1]], 3)[0].unsqueeze(1)] * 2)  # two images of 1 x 3 pixels, both right
    target = torch.tensor([[[0, 1, 1]], [[0, 1, IGNORE]]])
    right = metrics.value("segmentation", metrics.statistics("segmentation", logits, target, 3))
    assert right == 1
    logits[0, :, 0, 1] = bad  # one pixel of class 1
    stats = metrics.statistics("segmentation", logits, target, 3)
    # it is in the union of its own class, and raises or lowers no other
    assert stats.tolist() == [[[1, 1], [1, 2], [0, 0]], [[1, 1], [1, 1], [0, 0]]]
    logits[1] = bad.view(3, 1, 1)  # and a whole image, whose ignored pixel counts nowhere
    stats = metrics.statistics("segmentation", logits, target, 3)
    assert stats[1].tolist() == [[0, 1], [0, 1], [0, 0]]
    assert metrics.value("segmentation", stats) == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_accuracy_and_its_error_by_wilson():
    stats = metrics.statistics("classification", _logits([0, 1, 2, 2], 3), torch.tensor([0, 1, 1, 2]), 3)
    assert metrics.value("classification", stats) == 0.75
    # sqrt(0.1875 / 4 + 1 / 64) / (5 / 4) = 0.25 / 1.25
    assert metrics.standard_error("classification", stats) == pytest.approx(0.2)
    assert metrics.listed("classification", stats) == [1, 1, 0, 1]
    assert metrics.per_image("classification", stats) == [1, 1, 0, 1]


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_no_value_is_certain(right):
    for n in (1, 4, 48):  # 1 / (2 n + 2) by hand
        error = metrics.standard_error("classification", torch.full((n, 1), right).double())
        assert error == pytest.approx({1: 0.25, 4: 0.1, 48: 0.010204}[n], rel=1e-4)
        masks = torch.tensor([[30.0 * right, 30.0], [50.0 * right, 50.0]]).double().expand(n, 2, 2)
        assert metrics.standard_error("segmentation", masks) == pytest.approx(error)


def test_a_single_image_says_little():
    mask = torch.tensor([[[60.0, 100.0]]]).double()  # sqrt(0.6 * 0.4 + 1 / 4) / 2
    assert metrics.standard_error("segmentation", mask) == pytest.approx(0.35)
    depth = torch.tensor([[50.0, 200.0]]).double()  # RMSE 0.5
    assert metrics.standard_error("depth", depth) == pytest.approx(0.25)
    assert metrics.standard_error("depth", depth.expand(16, -1)) == pytest.approx(0.0625)


def test_wilsons_error_covers_a_truth_near_the_end():
    n, truth, covered, binomial = 48, 0.02, 0.0, 0.0
    for right in range(n + 1):
        chance = math.comb(n, right) * truth**right * (1 - truth) ** (n - right)
        stats, share = (torch.arange(n) < right).double()[:, None], right / n
        covered += chance * (abs(share - truth) <= 2 * metrics.standard_error("classification", stats))
        binomial += chance * (abs(share - truth) <= 2 * math.sqrt(share * (1 - share) / n))
    assert covered > 0.9 and binomial < 0.65  # 0 of 48, with an error of 0, comes up in 38 % of all tries


def test_rmse_by_hand_ignores_invalid_pixels():
    target = torch.tensor([[[1.0, 0.0], [3.0, 10.5]], [[2.0, 2.0], [2.0, 2.0]]])  # 0: unseen, 10.5: out of range
    predicted = torch.tensor([[[2.0, 9.0], [5.0, 1.0]], [[2.0, 2.0], [2.0, 5.0]]])
    stats = metrics.statistics("depth", predicted, target, 0)
    assert stats.tolist() == metrics.listed("depth", stats) == [[5, 2], [9, 4]]
    assert metrics.value("depth", stats) == pytest.approx(math.sqrt(14 / 6))
    assert metrics.per_image("depth", stats) == pytest.approx([math.sqrt(2.5), 1.5], abs=1e-6)


def test_bootstrap_error_of_rmse_is_near_the_analytic_one():
    squares = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4
    stats = torch.stack([squares * 50, torch.full_like(squares, 50)], 1)
    rmse = metrics.value("depth", stats)
    analytic = float(squares.std()) / math.sqrt(200) / (2 * rmse)  # of sqrt(mean), by its derivative
    assert metrics.standard_error("depth", stats) == pytest.approx(analytic, rel=0.1)
    assert metrics.standard_error("depth", stats, 1) != metrics.standard_error("depth", stats, 2)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_constant_value_is_the_best_constant(task, masks):
    targets = torch.tensor([0, 2, 2, 1]) if task == "classification" else masks[1]
    scores = []
    for c in range(6):
        constant = _logits(torch.full_like(targets, c), 6)
        scores.append(metrics.value(task, metrics.statistics(task, constant, targets, 6)))
    assert metrics.constant_value(task, list(targets), 6) == pytest.approx(max(scores))


def test_constant_depth_is_the_best_constant():
    targets = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    grid = torch.linspace(0.5, 5, 451)
    scores = [metrics.value("depth", metrics.statistics("depth", torch.full((1, 2, 2), c), targets, 0)) for c in grid]
    assert metrics.constant_value("depth", list(targets), 0) == pytest.approx(min(scores), abs=1e-4)
