"""The three downstream tasks: what tables, figures and messages call them, in one place."""

from typing import NamedTuple


class Task(NamedTuple):
    """Names and directions of one task; what it computes stands in heads, attacks and metrics under the task's name."""

    number: int  # of its table
    notebook: str  # that makes the table
    title: str
    attack: str  # its own attack, 'task' in YAML and records
    metric: str
    sign: int  # +1: a larger metric is better
    heading: str  # the metric with its unit, and where better is
    baseline: str  # what a constant prediction is, in words


TASKS = {
    "classification": Task(
        1, "03_attack_classification", "Linear classification under attack", "PGD", "accuracy", 1, "accuracy ↑",
        "Majority baseline (always the most frequent class)",
    ),
    "segmentation": Task(
        2, "04_attack_segmentation", "Semantic segmentation under attack", "SegPGD", "mIoU", 1, "mIoU ↑",
        "Majority baseline (one class everywhere)",
    ),
    "depth": Task(
        3, "05_attack_depth", "Depth estimation under attack", "DepthPGD", "RMSE", -1, "RMSE [m] ↓",
        "Mean baseline (the mean depth everywhere)",
    ),
}  # fmt: skip
