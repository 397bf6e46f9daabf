"""Sanity checks on models of which one knows what an attack can do: good, weak and misled attacks."""

import shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
import planted
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ssl_robust import attacks, datasets, deacl, encoders, evaluate, metrics, records
from ssl_robust.settings import Attack, BadInput, Sanity
from ssl_robust.show import plots
from ssl_robust.tasks import TASKS
from ssl_robust.trust import evidence, sanity

RADII = [0.0, 2 / 255, 8 / 255, 64 / 255]
FEW = SimpleNamespace(sanity=Sanity(n=4, restarts=1, eps=RADII))


def bench(model=None, **attack):
    """Images whose brightness lies 0.5, 1.5, .. hundredths above (class 1) or below the border of a linear model."""
    margin = torch.cat([0.005 + 0.01 * torch.arange(12), -0.005 - 0.01 * torch.arange(12)]).view(-1, 1, 1, 1)
    x = planted.images(24)
    x = 0.5 + 0.1 * (x - x.mean((1, 2, 3), keepdim=True)) + margin
    parts = [(x, (margin.flatten() > 0).long(), [f"image-{i}" for i in range(24)])]
    model = model or planted.brightness_model()
    return sanity.Bench(model, parts, 2, metrics.value_of_sums, 0.5, 24, Attack(**attack), 0, "fp32")


def test_a_converged_attack_on_a_linear_model_passes_all_checks():
    b = bench()
    found, said, _ = sanity.checks(b, ("another", "task", planted.brightness_model()), FEW)
    assert said == [] and found["monotone"] and found["reaches_chance"] and found["zero_is_clean"]
    assert found["clean"]["value"] == 1 and found["attack"]["value"] == 0.75 and found["chance"] == 0.5
    values = [point["value"] for point in found["sweep"]]  # what the margins say, in closed form
    assert values == pytest.approx([24 / 24, 22 / 24, 18 / 24, 0]) and found["noise"]["value"] >= 23 / 24
    assert found["more_steps"] | {"se": 0} == {"value": 0.75, "se": 0, "gain": 0, "steps": 100, "converged": True}
    assert found["restarts"]["starts"] == 2 and found["transfer"]["from"] == "another"
    assert found["transfer"]["value"] == 0.75  # the same weights: as good as the white box, but not better


@pytest.mark.parametrize("attack", [{"steps": 1}, {"steps": 3, "step": 1 / 255}])
def test_a_weak_attack_is_flagged(attack):
    _, said, _ = sanity.checks(bench(**attack, eps=16 / 255), None, FEW)
    assert any("PGD is clearly stronger with" in flag and "has not converged" in flag for flag in said)


def test_an_attack_that_depends_on_its_start_is_flagged(monkeypatch):
    starts = {0: 0.0, 1: -1.0}  # the table's seed starts at the image, the next one at the darkest corner
    monkeypatch.setattr(attacks, "random_start", lambda x, eps, ids, seed: x + eps * starts.get(seed, 0))
    found, said, _ = sanity.checks(bench(steps=1, step=0.0, eps=16 / 255), None, FEW)
    assert found["restarts"]["value"] < found["attack"]["value"]
    assert any("from the worst of 2 random starts" in flag for flag in said)


class Rounded(nn.Module):
    """A layer that hides the gradient of what comes before it."""

    def forward(self, x):
        return (64 * x).round() / 64


def test_masked_gradients_are_flagged_by_noise_and_by_the_largest_radius():
    model = planted.brightness_model()
    model.encoder.backbone.proj = nn.Sequential(model.encoder.backbone.proj, Rounded())
    _, said, _ = sanity.checks(bench(model), None, FEW)
    assert any("noise of the same size harms no less than PGD" in flag for flag in said)
    assert any("even a radius of 64/255 leaves more than chance" in flag for flag in said)


def test_an_attack_in_the_wrong_direction_is_flagged_by_every_comparison(monkeypatch):
    right = attacks.margin
    monkeypatch.setattr(attacks, "pgd_loss", lambda m, label: lambda adv, t: -right(m(adv), label))
    found, said, _ = sanity.checks(bench(), ("another", "embed", planted.brightness_model()), FEW)
    text = " ".join(said)
    assert "EmbedAttack harms more than PGD" in text and "images made on another harm more" in text
    assert "random signs of the same size harm no less" in text and "leaves more than chance" in text
    assert found["attack"]["value"] == 1


def test_a_curve_that_turns_back_is_found():
    b = bench()
    right = [torch.tensor([[1.0]] * k + [[0.0]] * (12 - k)).double() for k in (12, 8, 2, 8, 0)]
    assert sanity._turns(b, right) == [2]  # from 2 right ones to 8
    assert sanity._turns(b, right[:3]) == [] and sanity._turns(b, [right[0]] * 3) == []


def test_a_gain_is_paired():
    b = bench()
    one, two = (torch.tensor([[1.0]] * k + [[0.0]] * (12 - k)).double() for k in (9, 6))
    gap, se = sanity.gain(b, one, two)
    assert gap == pytest.approx(0.25) and se == pytest.approx((0.25 * 0.75 / 11) ** 0.5)
    assert sanity.gain(b, one, one) == (0, 0) and sanity.gain(b, two, one)[0] == pytest.approx(-0.25)
    assert not sanity.surely_stronger(b, one, one) and not sanity.surely_stronger(b, two, one)


def test_more_steps_settle_a_rising_loss_if_they_surely_take_hardly_more():
    b = bench()
    right = [torch.tensor([[1.0]] * k + [[0.0]] * (100 - k)).double() for k in (20, 19, 10)]
    taken = 0.6  # of which a tenth is 0.06
    assert sanity._converged(b, right[0], right[0], taken)
    assert sanity._converged(b, right[0], right[1], taken)  # 0.01 with a standard error of 0.01
    assert not sanity._converged(b, right[0], right[1], 0.25)  # 0.03 are more than 0.025
    assert not sanity._converged(b, right[0], right[2], taken)
    assert not sanity._converged(b, right[0], right[0], 0.0)  # the attack does nothing


def test_a_larger_rmse_is_a_stronger_attack():
    b = bench(planted.model("depth"))
    low, high = (torch.tensor([[4.0 * e, 4.0], [e, 1.0]]).double() for e in (1.0, 4.0))
    assert sanity.gain(b, low, high)[0] == pytest.approx(1)
    assert torch.equal(sanity.worst(b, [low, high]), high) and torch.equal(sanity.worst(b, [high, low]), high)


def test_the_tables_own_radius_is_attacked_once(monkeypatch):
    made, original = [], attacks.attacked
    monkeypatch.setattr(attacks, "attacked", lambda *args: made.append(args[5]) or original(*args))
    b = bench()
    sanity.checks(b, None, FEW)
    assert sum(a == b.attack for a in made) == 3  # the attack, one restart, EmbedAttack
    assert [a.steps for a in made if a.eps == 0] == [1]
    assert [a.step for a in made if a.eps == RADII[-1]] == [pytest.approx(16 / 255)]
    # the tables' own two come from their cells, radius 0 costs a step, and the transfer is not made here
    assert FEW.sanity.rounds(b.attack) * 20 == sum(a.steps for a in made) - 2 * 20 + 20 - 1


def test_embed_attack_is_judged_on_all_images_of_the_tables():
    right, wrong = torch.ones(24, 1).double(), torch.zeros(24, 1).double()
    task, embed = torch.cat([wrong[:4], right[:20]]), torch.cat([wrong[:4], right[:4], wrong[:16]])
    few = bench()._replace(parts=[tuple(part[:4] for part in bench().parts[0])], order=torch.arange(4))
    _, said, _ = sanity.checks(few._replace(known={"task": task, "embed": embed}), None, FEW)
    assert "EmbedAttack harms more than PGD (accuracy 0.17 against 0.83)" in said[-1]
    found, said, _ = sanity.checks(few._replace(known={"task": embed, "embed": task}), None, FEW)
    assert not any("EmbedAttack" in flag for flag in said)
    assert found["embed"]["value"] == 0  # of the images that are checked, as everything else in the table


def test_eps_zero_in_the_tables_is_no_flaw_of_the_attack():
    _, said, _ = sanity.checks(bench(eps=0.0), None, FEW)
    assert said == []


# --- all rows on the toys ---

QUICK = Sanity(n=4, more_steps=2, restarts=1, eps=[8 / 255, 64 / 255])


@pytest.fixture
def tuned(toys, monkeypatch):
    """Planted encoders instead of rows, fine-tuned by DeACL; one more row that serves as a source."""

    def load(row, data_root="", weights=None):
        if row.name == "gone":
            raise BadInput("The checkpoint gone.pth does not exist; correct the path.")
        encoder = planted.encoder(seed=len(row.name))
        encoder.name = row.name
        if weights:
            encoder.backbone.load_state_dict(load_file(weights))
        return encoder

    monkeypatch.setattr(encoders, "load", load)
    monkeypatch.setattr(encoders, "random_init", lambda row, seed: planted.encoder(seed=99))
    settings = _settings()
    deacl.finetune_all(settings)
    return settings


def _settings(**changes):
    quick = {"n_train": 6, "n_val": 2, "epochs": 1}
    changes = {"deacl": {**quick, "warmup_epochs": 0}} | dict.fromkeys(TASKS, quick) | changes
    return planted.settings(**changes).model_copy(update={"sanity": QUICK})


def test_all_rows_are_checked_written_and_kept(tuned, monkeypatch):
    found = sanity.run_all(tuned)
    assert [tuple(r[k] for k in sanity.KEYS) for r in found] == [
        (task, "toys", "planted", defense) for task in TASKS for defense in ("standard", "deacl")
    ]
    for row in found:
        path = records.checks_path("toy", *(row[k] for k in sanity.KEYS))
        assert records.read_record(path) == row and row["n"] == 4 and row["checks"]["zero_is_clean"]
        assert row["checks"]["transfer"]["from"] == "planted at random init"
    assert records.read_records(records.results_dir("toy")) == []  # no record of a table
    rows = {r["cell"]: r for r in found}
    assert len(rows) == len(found) and evidence.sanity_checks(records.results_dir("toy")) == rows

    calls, original = [], sanity.checks
    monkeypatch.setattr(sanity, "checks", lambda *args: calls.append(1) or original(*args))
    assert sanity.run_all(tuned) == found and calls == []
    only = tuned.model_copy(update={"segmentation": None, "depth": None})
    assert len(sanity.run_all(only)) == 2 and calls == []
    assert len(list((records.results_dir("toy") / "sanity").glob("*/*.json"))) == 2  # the others are not shown
    assert sanity.run_all(tuned) == found and calls == []  # but there
    only = only.model_copy(update={"encoders": [tuned.encoders[0].model_copy(update={"defenses": ["standard"]})]})
    for change in ({"seed": 1}, {"attack": Attack(steps=2)}, {"sanity": QUICK.model_copy(update={"n": 3})}):
        calls.clear()
        again = sanity.run_all(only.model_copy(update=change))
        assert len(calls) == 1 and {r["key"] for r in again} & {r["key"] for r in found} == set(), change


def _tables(settings, monkeypatch):
    """Records of classification's cells, and the attack settings of the images that sanity.run_all attacks after."""
    found = evaluate.run_task("classification", settings)
    made, original = [], attacks.attacked
    monkeypatch.setattr(attacks, "attacked", lambda *a, **k: made.append((a[0], a[5], a[6])) or original(*a, **k))
    return found, made


def test_the_tables_attacks_are_taken_from_their_cells(tuned, monkeypatch):
    only = tuned.model_copy(update={"segmentation": None, "depth": None})
    alone = sanity.run_all(only)
    shutil.rmtree(records.runs_dir("toy") / "checks")
    _, made = _tables(only, monkeypatch)
    assert [r["checks"] for r in sanity.run_all(only)] == [r["checks"] for r in alone]
    assert all(attack != only.attack or seed != only.seed or kind == "embed" for kind, attack, seed in made)
    assert [kind for kind, *_ in made].count("embed") == 4  # from random init, for both rows, in two batches each


def test_the_worst_case_has_what_the_checks_found(tuned, monkeypatch):
    only = tuned.model_copy(update={"segmentation": None, "depth": None, "attack": Attack(steps=1, step=1e-4)})
    found, _ = _tables(only, monkeypatch)
    before = {r["defense"]: r for r in found if r["attack"] == "worst"}
    assert all(r["checked"] == 0 and "checks" not in r["chosen"] for r in before.values())
    lost = [0.0] * 3 + [1.0] * 5  # of the four that are checked the first three, whatever they were
    monkeypatch.setattr(sanity, "worst", lambda b, stats: torch.tensor([[0.0]] * 3 + [[1.0]]).double())
    sanity.run_all(only)
    again = {r["defense"]: r for r in evaluate.run_task("classification", only) if r["attack"] == "worst"}
    for defense, record in again.items():
        assert record["statistics"] == [min(pair) for pair in zip(before[defense]["statistics"], lost, strict=True)]
        assert record["checked"] == 4 and record["key"] != before[defense]["key"]
    stored = records.record_path("toy", "classification", "toys", "planted", "standard", "worst")
    assert records.read_record(stored) == again["standard"]
    other = only.model_copy(update={"seed": 1})  # another cell, whose images were not checked
    assert all(r.get("checked", 0) == 0 for r in evaluate.run_task("classification", other))


def test_statistics_of_the_checks_are_in_the_order_of_the_test_set(toys, monkeypatch):
    settings = _settings().model_copy(update={"sanity": QUICK})
    test, x = datasets.load("depth", "toys", "test", settings, 16), torch.zeros(2, 3, 16, 16)
    shapes = [([2, 0], x, x[:, 0]), ([1], x[:1], x[:1, 0])]  # parts are by shape
    monkeypatch.setattr(datasets, "batches", lambda *_: iter(shapes))
    b = sanity.bench(planted.model("depth"), test, "standard", settings)
    assert b.order.tolist() == [2, 0, 1] and [ids for *_, ids in b.parts] == [[test.ids[2], test.ids[0]], [test.ids[1]]]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_checks_whose_statistics_are_gone_are_made_again(suffix, tuned):
    only = tuned.model_copy(update={"segmentation": None, "depth": None})
    first, _ = sanity.run_all(only)
    path, tensors = (planted.stored(f"checks/*standard__*{end}") for end in (suffix, ".safetensors"))
    whole = tensors.read_bytes()
    path.write_bytes(path.read_bytes()[:-2])
    assert sanity.run_all(only)[0]["checks"] == first["checks"]
    assert tensors.read_bytes() == whole


def test_a_damaged_result_is_made_again(tuned):
    only = tuned.model_copy(update={"segmentation": None, "depth": None})
    first, _ = sanity.run_all(only)
    path = records.checks_path("toy", *(first[k] for k in sanity.KEYS))
    path.write_text(path.read_text().replace('"n": 4', '"n": 5'))
    assert sanity.run_all(only)[0]["checks"] == first["checks"] and records.read_record(path)["n"] == 4


def test_checks_and_tables_see_the_same_images_and_the_same_attack(tuned):
    settings = _settings(encoders=[{"name": "planted"}]).model_copy(update={"segmentation": None})
    settings = settings.model_copy(update={"sanity": QUICK.model_copy(update={"n": 50})})
    found = {tuple(r[k] for k in sanity.KEYS): r for r in sanity.run_all(settings)}
    for task in ("classification", "depth"):
        for record in evaluate.run_task(task, settings):
            row = found[tuple(record[k] for k in sanity.KEYS)]
            name = {"task": "attack"}.get(record["attack"], record["attack"])
            if name in ("clean", "attack", "embed"):
                assert row["n"] == record["n"] == 8
                assert row["checks"][name]["value"] == pytest.approx(record["value"], rel=1e-5)


def test_images_are_transferred_from_another_row(tuned):
    rows = [{"name": "planted"}, {"name": "other"}]
    settings = _settings(encoders=rows)
    settings = settings.model_copy(update={"segmentation": None, "depth": None})
    assert [r["checks"]["transfer"]["from"] for r in sanity.run_all(settings)] == ["other", "planted"]
    own = _settings(encoders=[{"name": "own", "call": "my_encoder:encoder"}])
    model = planted.model("depth")
    assert sanity.source_of("depth", "toys", own.encoders[0], model, own) is None


def test_rows_without_data_or_weights_are_skipped_or_stop(tuned):
    rows = [{"name": "gone"}, {"name": "planted", "timm": "embedded_vit"}]
    settings = _settings(encoders=rows, missing="skip").model_copy(update={"segmentation": None, "depth": None})
    assert [r["encoder"] for r in sanity.run_all(settings)] == ["planted"]
    lost = records.read_skipped(records.skipped_path("toy", "sanity"))
    assert [(r["task"], r["encoder"]) for r in lost] == [("classification", "gone")] and "gone.pth" in lost[0]["why"]
    with pytest.raises(BadInput, match=r"gone\.pth does not exist"):
        sanity.run_all(settings.model_copy(update={"missing": "stop"}))


@pytest.mark.parametrize("section", ["sanity", "attack"])
def test_missing_sections_are_refused(section, toys):
    settings = _settings().model_copy(update={section: None})
    with pytest.raises(BadInput, match=f"no section '{section}'; add one"):
        sanity.run_all(settings)


def test_without_checks_there_are_no_flags(toys):
    assert evidence.sanity_checks(records.results_dir("toy")) == {}


# --- table and picture ---


def _result(task="classification", defense="standard", flags=(), transfer=True):
    point = {"value": 0.5, "se": 0.1}
    names = ("clean", "attack", "noise", "signs", "more_steps", "restarts", "embed")
    checks = dict.fromkeys(names, point) | {"transfer": point if transfer else None, "chance": 0.2}
    checks |= {"sweep": [{"eps": e, "value": 0.9 - e, "se": 0.05} for e in RADII], "monotone": True}
    about = {"task": task, "dataset": "toys", "encoder": "planted", "defense": defense, "metric": "accuracy", "n": 4}
    return about | {"attack": {"eps": 8 / 255}, "checks": checks | {"reaches_chance": False}, "flags": list(flags)}


def test_the_table_has_a_row_for_each_result():
    shown = sanity.table([_result(), _result("depth", "deacl", ["bad"], transfer=False)])
    assert list(shown["flags"]) == [0, 1] and list(shown["task"]) == ["classification", "depth"]
    assert shown["transfer"].isna().tolist() == [False, True] and (shown["chance"] == 0.2).all()
    assert shown["largest_eps"].tolist() == pytest.approx([0.9 - RADII[-1]] * 2)
    assert list(sanity.table([]).columns) == list(shown.columns)
    assert sanity.sentences([_result(flags=["bad"])]) == ["classification toys planted standard: bad."]


def test_the_picture_shows_every_curve_and_marks_flagged_rows(root):
    results = [_result(), _result(defense="deacl", flags=["bad"]), _result("depth")]
    fig = plots.sanity(results, "toy")
    assert sorted(path.name for path in records.figures_dir("toy").iterdir()) == ["sanity.pdf", "sanity.png"]
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == ["planted Standard", "planted DeACL †", "majority or mean baseline", "bars: ± standard error"]
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["Classification, PGD\ntoys, n = 4", "Depth, DepthPGD\ntoys, n = 4"]
    assert not plt.get_fignums()
    four = [_result(task) for task in TASKS] + [_result() | {"dataset": "more"}]
    assert sum(ax.axison for ax in plots.sanity_figure(four).axes) == 4
    assert plots.sanity_figure([]).axes


def test_the_first_images_are_those_of_the_test_set(toys):
    test = datasets.load("depth", "toys", "test", planted.settings(), 16)
    few = sanity.first(test, 3)
    assert few.ids == test.ids[:3] and len(few) == 3 and len(test) == 8 and len(sanity.first(test, 99)) == 8
