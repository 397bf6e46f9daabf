"""An attack of one's own as a column: found by name, checked, filed under its file."""

import planted
import pytest
import torch

from ssl_robust import attacks, datasets, evaluate, records
from ssl_robust.settings import BadInput
from ssl_robust.show import tables
from ssl_robust.tasks import TASKS
from ssl_robust.trust.worst import Worst

GOOD = "def mine(x, target, model, attack, start, **_):\n    return (x + attack.eps * (start - x).sign()).clamp(0, 1)\n"


@pytest.fixture
def written(toys):
    """Writes notebooks/NAME.py and returns settings whose columns are the paper's and its function `mine`."""

    def write(source, name="own_attack", **more):
        (toys / "notebooks").mkdir(exist_ok=True)
        (toys / "notebooks" / f"{name}.py").write_text(source)
        return planted.settings(attacks=["embed", "task", {"name": "mine", "call": f"{name}:mine", **more}])

    return write


def _cell(task, settings, name="mine"):
    test = datasets.load(task, "toys", "test", settings, 16)
    return evaluate.Cell(planted.model(task), test, name, settings)


@pytest.mark.parametrize("task", TASKS)
def test_a_function_is_a_column_between_the_paper_s_and_worst(task, written):
    s = written(GOOD)
    assert [*attacks.kinds(task, s)] == ["clean", "embed", "task", "mine"]
    record = _cell(task, s).run()
    assert record["max_perturbation"] == pytest.approx(s.attack.eps, abs=1e-6) and record["precision"] == "fp32"
    for name in ("clean", "embed", "task"):
        _cell(task, s, name).run()
    cell = _cell(task, s)
    worst = Worst(cell.model, cell.test, evaluate.WORST, s).run()
    assert set(worst["chosen"]) == {"clean", "embed", "task", "mine"}
    table = tables.table(task, records.read_records(records.results_dir("toy")))
    assert list(table.columns[3:8]) == ["clean", "embed", "task", "mine", "worst"] and table["mine"].notna().all()


def test_it_serves_the_tasks_that_it_names(written):
    s = written(GOOD, tasks=["depth"])
    assert "mine" in attacks.kinds("depth", s) and "mine" not in attacks.kinds("segmentation", s)


def test_another_file_is_another_attack_and_the_same_one_is_kept(written, monkeypatch):
    first = _cell("depth", written(GOOD)).run()
    asked = []
    original = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a: asked.append(a) or original(*a))
    assert _cell("depth", written(GOOD)).run() == first and not asked
    again = _cell("depth", written(GOOD + "# another\n")).run()
    assert again["key"] != first["key"] and len(asked) == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def mine(x, attack, **_):\n    return x + 2 * attack.eps\n", "within eps of x; clamp what it returns"),
        ("def mine(x, **_):\n    return x[:, :1]\n", "must return finite images of the shape of x"),
        ("def mine(x, **_):\n    return x * float('nan')\n", "must return finite images of the shape of x"),
        ("def other(x, **_):\n    return x\n", "mine cannot be imported .AttributeError"),
        ("import nothing_like_it\n", "cannot be imported .ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_with_it_is_one_sentence(source, said, written):
    with pytest.raises(BadInput, match=f"^Attack 'mine': .*{said}"):
        _cell("depth", written(source, f"own_{len(source)}")).run()  # another module each time


def test_an_unknown_name_is_refused_with_those_there_are():
    s = planted.settings(attacks=["embed", "task", "fgsm"])
    with pytest.raises(BadInput, match="no attack 'fgsm'; choose from: embed, task, .*apgd_rmse.*mifgsm"):
        attacks.kinds("depth", s)


def test_momentum_sums_what_gradients_have_said():
    from ssl_robust.strong import momentum

    first = torch.tensor([1.0, -1.0, 2.0, 0.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    moved = momentum.accumulated(first, torch.zeros_like(first))
    assert torch.allclose(moved.abs().mean((1, 2, 3)), torch.ones(1))  # divided by its mean size
    assert torch.allclose(momentum.accumulated(10 * first, moved), 2 * moved)  # whatever its own size
    seen = []

    def loss(adv, t):
        seen.append(adv.detach().clone())
        return (adv * (first if t == 1 else -0.5 * first)).flatten(1).sum(1)

    x = torch.full((1, 3, 2, 2), 0.5)
    attack = planted.settings(attack={"eps": 0.2, "step": 0.05, "steps": 3}).attack
    attacks.pgd(x, loss, attack, direction=momentum.accumulated)
    steps = [(b - a).sign() for a, b in zip(seen, seen[1:], strict=False)]
    assert torch.equal(steps[0], first.sign())  # then the sum is 0: it has turned back, and stands still
    assert torch.equal(steps[1], torch.zeros_like(first))
