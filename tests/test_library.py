"""The four steps from a script: the same numbers as the core's own, tensors and loaders alike, and nothing on disk."""

import re
from pathlib import Path

import planted
import pytest
import torch
from torch import nn

from ssl_robust import attack, attacks, encoders, fit_head, load_encoder, metrics, score
from ssl_robust.embedded import scenes
from ssl_robust.settings import Attack, BadInput, EncoderRow
from ssl_robust.tasks import TASKS

README = Path(__file__).parents[1] / "README.md"


class Tokens(nn.Module):
    """Smooth patch tokens of 4 px and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 6, 4, 4)
        for i, weight in enumerate(self.proj.parameters()):
            weight.data = planted.images(1, 64, seed=i).flatten()[: weight.numel()].view_as(weight) - 0.5

    def forward(self, x):
        patches = self.proj(x).tanh()
        return patches.mean((2, 3)), patches


@pytest.fixture
def encoder():
    return load_encoder(Tokens(), native=16)


def _data(task, n=20, seed=0):
    x = (255 * planted.images(n, seed=seed)).to(torch.uint8)
    return x, planted.target(task, x.float() / 255)


@pytest.mark.parametrize("task", TASKS)
def test_the_four_steps(task, encoder, root):
    model = fit_head(encoder, _data(task), task, epochs=2)
    images, target = _data(task, 6, seed=1)
    found = {name: score(model, (images, target), name, steps=3) for name in ("clean", "embed", "task")}
    clean, task_attack = found["clean"], found["task"]
    expected = metrics.statistics(task, model(images / 255), target, 3)
    assert clean["value"] == pytest.approx(metrics.value(task, expected)) and clean["n"] == 6
    assert clean["max_perturbation"] == 0 and 0 < task_attack["max_perturbation"] <= 8 / 255 + 1e-6
    assert TASKS[task].sign * task_attack["value"] <= TASKS[task].sign * clean["value"]
    adv = attack(model, images / 255, target, precision="fp32", steps=3, eps="4/255")
    ids, ball = [str(i) for i in range(6)], Attack(steps=3, eps=4 / 255)
    assert torch.equal(adv, attacks.attacked("task", model, images / 255, target, ids, ball, 0))
    assert not list(root.rglob("*.safetensors")) and not (root / "results").exists()


def test_loaders_and_floats_give_what_tensors_give(encoder):
    images, labels = _data("classification")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images / 255, labels), batch_size=7)
    models = [fit_head(encoder, data, "classification", epochs=3) for data in ((images, labels), loader)]
    assert torch.equal(*(model.head.linear.weight for model in models))
    values = [score(models[0], data)["value"] for data in ((images, labels), loader, [*loader])]
    assert len(set(values)) == 1


def test_held_out_images_select_the_epoch(encoder):
    images, labels = _data("classification")
    (own, default), others = ((images[4::5], labels[4::5]), None), torch.arange(20) % 5 < 4
    a = fit_head(encoder, (images[others], labels[others]), "classification", own, epochs=3)
    b = fit_head(encoder, (images, labels), "classification", default, epochs=3)
    assert torch.equal(a.head.linear.weight, b.head.linear.weight)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda e: fit_head(e, _data("depth"), "normals"), "no task 'normals'; choose one of: classification, seg"),
        (lambda e: fit_head(e, _data("depth"), "depth", epoch=3), "Unknown parameter 'depth.epoch'"),
        (lambda e: fit_head(e, (torch.randn(5, 3, 8, 8), torch.zeros(5)), "classification"), "floats in .0,1.; undo"),
        (lambda e: fit_head(e, (torch.rand(5, 3, 8, 8), torch.zeros(4)), "depth"), r"\(5, 3, 8, 8\) and \(4,\); give"),
        (lambda e: fit_head(e, _data("classification"), "classification", classes=2), "from 0 to 2, classes .* to 1"),
        (lambda e: score(fit_head(e, _data("depth"), "depth", epochs=1), _data("depth"), "pgdd"), "no attack 'pgdd'"),
        (lambda e: attack(planted.model("depth"), *_data("depth"), eps="9"), "'attack.eps' must be a number"),
        (lambda e: load_encoder("vit_of_mine"), "timm has no model 'vit_of_mine'"),
        (lambda e: load_encoder(nn.Identity(), native=16), "must give cls and patches of shapes"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_one_sentence(step, words, encoder):
    with pytest.raises(BadInput, match=words):
        step(encoder)


def test_the_script_in_the_readme_runs(capsys, root):
    (script,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(script.strip().splitlines()) <= 15
    script = script.replace("range(300)", "range(60)").replace("range(40)", "range(8)").replace("steps=20", "steps=2")
    exec(compile(script, str(README), "exec"), found := {})  # noqa: S102
    assert found["adversarial"].shape == (8, 3, 64, 64)
    assert re.findall(r"(\w+): accuracy \d\.\d\d ± \d\.\d\d", capsys.readouterr().out) == ["clean", "embed", "task"]


@pytest.mark.parametrize(
    ("task", "field"), [("classification", "labels"), ("segmentation", "masks"), ("depth", "depths")]
)
def test_the_example_of_an_own_encoder_is_worth_looking_at(task, field):
    """On scenes it is clearly better than a constant prediction, in every table."""
    train, test = scenes.render(range(150), "train", 64), scenes.render(range(40), "test", 64)
    example = encoders.load(EncoderRow(name="filters", call="my_encoder:encode", native=64))
    found = score(fit_head(example, (train.images, getattr(train, field)), task), (test.images, getattr(test, field)))
    assert TASKS[task].sign * (found["value"] - found["chance"]) > 3 * found["se"]
