"""The paper's own recipe for classification heads (Adam, learning rate 0.5) on a pretrained ViT and real images."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ssl_robust import datasets, evaluate, settings
from ssl_robust.trust import evidence

DATA = Path(__file__).parents[2] / "shared" / "data"
WEIGHTS = "weights/vit_tiny_patch16_224.tinyimagenet200.fp16.safetensors"
pytestmark = pytest.mark.skipif(
    not (DATA / WEIGHTS).is_file(), reason=f"needs {WEIGHTS} and cifar10 in a folder shared/data beside the project"
)


@pytest.fixture(scope="module")
def certain(tmp_path_factory):
    """A ViT-Ti/16 with a head of the paper's recipe, its test images and settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.records, "ROOT", tmp_path_factory.mktemp("recipe"))
        row = {
            "name": "vit_tiny16", "timm": "vit_tiny_patch16_224", "checkpoint": WEIGHTS, "native": 96,
            "normalise": "inception",
        }  # fmt: skip
        given = settings.check(
            profile="recipe", device="cpu", precision="fp32", counts="any", data_root=str(DATA), encoders=[row],
            classification={
                "datasets": ["cifar10"], "n_train": 480, "n_val": 60, "n_test": 16, "epochs": 5, "batch": 16, "lr": 0.5,
            },
            attack={},
        )  # fmt: skip
        yield *evaluate.prepare("classification", "cifar10", given.encoders[0], given), given


def test_cross_entropy_has_no_gradient_on_most_images_of_this_head(certain):
    model, test, _ = certain
    _, x, label = next(datasets.batches(test, 16))
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x.requires_grad_(True)), label, reduction="sum"), x)
    right = model(x).argmax(1) == label
    assert right.float().mean() > 0.3 and (gradient[right].flatten(1) == 0).all(1).float().mean() > 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pgd_breaks_it_all_the_same(certain, precision):
    model, test, given = certain
    clean, _ = evaluate.Cell(model, test, "clean", given).measured()
    found, _ = evaluate.Cell(model, test, "task", given.model_copy(update={"precision": precision})).measured()
    assert clean["value"] > 0.3 and found["value"] <= 0.02
    assert found["health"]["zero_gradient"] == 0 and not evidence.flags(found["health"])
