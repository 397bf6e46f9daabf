"""The metrics against torchmetrics, hand-made numbers and analytic standard errors."""

import math

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

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


def test_miou_is_that_of_torchmetrics(masks):
    predicted, target = masks
    stats = metrics.statistics("segmentation", _logits(predicted, 6), target.to(torch.uint8), 6)
    reference = MulticlassJaccardIndex(6, ignore_index=IGNORE)
    assert metrics.value("segmentation", stats) == pytest.approx(float(reference(predicted, target)), abs=1e-6)
    singly = [float(reference(p[None], t[None])) for p, t in zip(predicted, target, strict=True)]
    assert metrics.per_image("segmentation", stats) == pytest.approx(singly, abs=2e-6)


def test_miou_by_hand():
    target = torch.tensor([[[0, 0], [1, IGNORE]], [[1, 1], [1, 0]]])
    predicted = torch.tensor([[[0, 1], [1, 2]], [[1, 1], [0, 0]]])
    stats = metrics.statistics("segmentation", _logits(predicted, 3), target, 3)
    # class 0: 2 hits, union 2 + 1 + 1; class 1: 3 hits, union 3 + 1 + 1; class 2 only where ignored
    assert stats[0].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert metrics.value("segmentation", stats) == pytest.approx((2 / 4 + 3 / 5) / 2)


def test_accuracy_and_its_binomial_error():
    stats = metrics.statistics("classification", _logits([0, 1, 2, 2], 3), torch.tensor([0, 1, 1, 2]), 3)
    assert metrics.value("classification", stats) == 0.75
    assert metrics.standard_error("classification", stats) == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert metrics.per_image("classification", stats) == [1, 1, 0, 1]


def test_rmse_by_hand_ignores_invalid_pixels():
    target = torch.tensor([[[1.0, 0.0], [3.0, 10.5]], [[2.0, 2.0], [2.0, 2.0]]])  # 0: unseen, 10.5: out of range
    predicted = torch.tensor([[[2.0, 9.0], [5.0, 1.0]], [[2.0, 2.0], [2.0, 5.0]]])
    stats = metrics.statistics("depth", predicted, target, 0)
    assert stats.tolist() == [[5, 2], [9, 4]]
    assert metrics.value("depth", stats) == pytest.approx(math.sqrt(14 / 6))
    assert metrics.per_image("depth", stats) == pytest.approx([math.sqrt(2.5), 1.5], abs=1e-6)


def test_bootstrap_error_of_rmse_is_near_the_analytic_one():
    squares = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4
    stats = torch.stack([squares * 50, torch.full_like(squares, 50)], 1)
    rmse = metrics.value("depth", stats)
    analytic = float(squares.std()) / math.sqrt(200) / (2 * rmse)  # of sqrt(mean), by its derivative
    assert metrics.standard_error("depth", stats) == pytest.approx(analytic, rel=0.1)
    assert metrics.standard_error("depth", stats, 1) != metrics.standard_error("depth", stats, 2)


def test_bootstrap_of_equal_images_has_no_error(masks):
    stats = metrics.statistics("segmentation", _logits(masks[0], 6), masks[1], 6)
    assert metrics.standard_error("segmentation", stats[:1].expand(9, -1, -1)) == pytest.approx(0, abs=1e-12)
    assert metrics.standard_error("segmentation", stats[:1]) == 0
    assert 0.005 < metrics.standard_error("segmentation", stats) < 0.1


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
