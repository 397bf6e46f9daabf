"""Clean and attacked evaluation take one path; records say what they were made from and are reused only for that."""

import json
import shutil
from dataclasses import replace
from functools import partial

import planted
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ssl_robust import attacks, datasets, deacl, encoders, evaluate, heads, metrics, protocol, records, training
from ssl_robust.datasets import IGNORE
from ssl_robust.protocols import effects, released
from ssl_robust.settings import Attack, BadInput
from ssl_robust.show import examples
from ssl_robust.tasks import TASKS
from ssl_robust.trust import evidence, paired
from ssl_robust.trust.worst import Worst

FIELDS = {
    "schema", "key", "task", "dataset", "encoder", "defense", "epoch", "attack", "attack_name", "metric", "value", "se",
    "n", "chance", "protocol", "counts", "settings", "seed", "hashes", "max_perturbation", "nonfinite", "statistics",
    "seconds", "notebook", "git", "versions", "device", "threads", "made",
    "precision", "batch", "health", "damaged", "numerics",
}  # fmt: skip
ALL = (*attacks.KINDS, evaluate.WORST)
NAMES = {"classification": "PGD", "segmentation": "SegPGD", "depth": "DepthPGD"}


def _test_set(task, settings=None):
    return datasets.load(task, "toys", "test", settings or planted.settings(), 16)


def _cell(task, kind, defense="standard", **changes):
    settings = planted.settings(**changes)
    return evaluate.Cell(planted.model(task), _test_set(task, settings), kind, settings, defense).run()


@pytest.mark.parametrize("task", TASKS)
def test_clean_and_attacked_take_one_path(task, toys):
    model, test = planted.model(task), _test_set(task)
    found = {
        (kind, eps): evaluate.evaluate(model, test, kind, Attack(eps=eps, step=0.3, steps=2), 4, 0, "cpu")
        for kind in attacks.KINDS
        for eps in (0.0, 0.3)
    }
    clean = found["clean", 0.3]
    assert clean.largest == 0 and clean.nonfinite == 0
    for kind in ("embed", "task"):
        assert torch.equal(found[kind, 0.0].stats, clean.stats) and found[kind, 0.0].largest == 0
        assert found[kind, 0.3].largest == pytest.approx(0.3, abs=1e-6)
        assert not torch.equal(found[kind, 0.3].stats, clean.stats)


def test_statistics_are_in_the_order_of_the_images_whatever_their_sizes(toys):
    items = datasets.list_items("toys", "segmentation", "test", 0, "")
    items = [i._replace(image=i.image[:, n % 3 :], target=i.target[n % 3 :]) for n, i in enumerate(items)]
    test = datasets.Subset("toys", "segmentation", items, datasets.transform("segmentation", "test", "original", 16))
    model = planted.model("segmentation")
    stats = evaluate.evaluate(model, test, "clean", None, 4, 0, "cpu").stats
    for i in range(len(test)):
        image, mask = test[i]
        with torch.no_grad():
            logits = model(image.float()[None] / 255)
        assert torch.equal(stats[i], metrics.statistics("segmentation", logits, mask[None], 3)[0])


@pytest.mark.parametrize("task", TASKS)
def test_images_without_a_finite_prediction_are_counted_and_wrong(task, toys):
    model = planted.model(task)
    (model.head.linear if task == "classification" else model.head.conv).bias[0] = torch.nan
    found = evaluate.evaluate(model, _test_set(task), "clean", None, 3, 0, "cpu")
    assert found.nonfinite == 8
    if task == "classification":
        assert found.wrong.all() and len(found.wrong) == 8
    assert metrics.value(task, found.stats) == (10 if task == "depth" else 0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", attacks.KINDS)
def test_a_record_says_all(task, kind, toys):
    record = _cell(task, kind)
    path = records.record_path("toy", task, "toys", "planted", "standard", kind)
    assert records.read_record(path) == record and set(record) >= FIELDS
    assert record["precision"] == "fp32" and "nonfinite" in record["health"] and record["damaged"] == 0
    assert record["protocol"] == "paper"
    assert record["attack_name"] == {"clean": "none", "embed": "EmbedAttack", "task": NAMES[task]}[kind]
    assert (record["metric"], record["n"], record["nonfinite"]) == (TASKS[task].metric, 8, 0)
    assert record["settings"]["attack"] == (None if kind == "clean" else Attack(steps=3).model_dump())
    assert record["settings"]["task"] == planted.settings().task(task).model_dump()
    assert set(record["hashes"]) == {"weights", "head", "data"} and len(record["key"]) == 16
    attacked = {"clean": set(), "embed": {"pgd", "embed"}, "task": {"pgd", "task"}}[kind]
    assert set(record["made_from"]["loops"]) == {"data", "encoders", "heads", "metrics"} | attacked
    assert len(record["statistics"]) == 8 and record["notebook"] == ""  # no notebook was executed
    assert record["max_perturbation"] == 0 if kind == "clean" else 0 < record["max_perturbation"] <= 8 / 255 + 1e-6
    assert record["se"] > 0 and record["chance"] == 0.35


@pytest.fixture
def evaluations(toys, monkeypatch):
    """One entry, the kind, for each evaluation that is really done."""
    found, original = [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: found.append(args[2]) or original(*args))
    return found


def test_a_record_is_reused_for_equal_inputs_alone(evaluations):
    first = _cell("depth", "task")
    assert _cell("depth", "task", depth={"attack_batch": 1, "lr": 1.0}) == first and len(evaluations) == 1
    for count, change in enumerate([{"attack": {"steps": 2}}, {"seed": 1}, {"depth": {"n_test": 5}}], 2):
        again = _cell("depth", "task", **change)
        assert len(evaluations) == count and again["key"] != first["key"], change


def test_the_eigen_crop_and_the_stride_make_another_record(evaluations):
    keys = {_cell("depth", "clean", depth={"crop": crop, "size": "original"})["key"] for crop in ("none", "eigen")}
    keys |= {_cell("depth", "clean", depth={"size": size})["key"] for size in (16, 24)}
    settings, test = planted.settings(), _test_set("segmentation")
    for stride in (0.5, 0.25):
        model = planted.model("segmentation", stride=stride)
        keys.add(evaluate.Cell(model, test, "clean", settings).run()["key"])
    assert len(keys) == len(evaluations) == 6


def test_an_attack_without_settings_is_refused(toys):
    settings = planted.settings().model_copy(update={"attack": None})
    cell = partial(evaluate.Cell, planted.model("depth"), _test_set("depth"), settings=settings)
    for refused in (lambda: cell("embed").run(), lambda: evaluate.run_task("depth", settings),
                    lambda: examples.make("depth", settings), lambda: effects.effects(settings)):  # fmt: skip
        with pytest.raises(BadInput, match="no section 'attack'; add one"):
            refused()
    assert cell("clean").run()["settings"]["attack"] is None


@pytest.mark.parametrize("task", TASKS)
def test_what_a_constant_reaches_is_of_the_training_labels(task, tuned, monkeypatch):
    train = datasets.load(task, "toys", "train", tuned, 16)
    targets = [train.read(i)[1] for i in range(len(train))]
    targets = [torch.tensor(targets)] if task == "classification" else targets
    expected, reads, original = metrics.constant_value(task, targets, 3), [], datasets.Subset.read
    of_test = [torch.as_tensor(target) for _, target in (_test_set(task)[i] for i in range(8))]
    assert metrics.constant_value(task, of_test, 3) != pytest.approx(expected, abs=1e-3)
    found = evaluate.run_task(task, tuned)
    assert {record["chance"] for record in found} == {expected}
    shutil.rmtree(records.runs_dir("toy") / "cells")
    monkeypatch.setattr(datasets.Subset, "read", lambda s, i: reads.append(s.ids[i]) or original(s, i))
    again = evaluate.run_task(task, tuned)  # with heads from disk: what they carry
    assert {record["chance"] for record in again} == {expected} and not any("train" in name for name in reads)


def test_of_many_large_targets_a_few_pixels_are_looked_at(toys, monkeypatch):
    train = datasets.load("segmentation", "toys", "train", planted.settings(), 16)
    train.items, train.ids = train.items * 500, train.ids * 500
    fine = torch.arange(1000)[:, None].div(500, rounding_mode="floor").expand(1000, 2000).to(torch.uint8)
    monkeypatch.setattr(datasets.Subset, "read", lambda subset, i: (None, fine))
    found = training.training_targets(train)
    assert 2000 <= len(found) < 4000 and found[0].shape == (143, 286)
    assert metrics.constant_value("segmentation", found[:1], 3) == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_prediction_that_is_no_number_is_no_class_in_pictures(task):
    logits = torch.zeros(2, 3) if task == "classification" else torch.zeros(2, 3, 1, 1)
    logits[:, 0], logits[1, 2] = 1, torch.nan
    assert heads.labels(task, logits).flatten().tolist() == [0, -1 if task == "classification" else IGNORE]


@pytest.mark.parametrize("protocol_", ["paper", "released"])
@pytest.mark.parametrize("task", TASKS)
def test_differences_are_those_of_the_tables_values(task, protocol_, tuned):
    found = evaluate.run_task(task, tuned.model_copy(update={"protocol": protocol_}))
    cells = {(r["defense"], r["attack"]): _reread(r) for r in found}
    clean = cells["standard", "clean"]
    for kind in ALL:
        before, after = cells["standard", kind], cells["deacl", kind]
        found = paired.resampled(before, after)
        assert found[0] == pytest.approx([before["value"], after["value"]], rel=1e-7)
        change = paired.difference(before, after)
        assert change.value == pytest.approx(after["value"] - before["value"], abs=1e-7)
        assert change.low <= change.value <= change.high and change.low < change.high
        assert task == "classification" or found[1:, 0].std() == pytest.approx(before["se"], rel=0.15)
        if whole := clean["value"] - before["value"]:
            part = (after["value"] - before["value"]) / whole
            assert paired.share(before, after, clean).value == pytest.approx(part, rel=1e-5)


def _reread(record):
    """A record as the committed copy has it."""
    place = [record[name] for name in ("task", "dataset", "encoder", "defense", "attack")]
    return records.read_record(records.record_path("toy", *place))


def test_a_background_that_does_not_count_is_not_in_the_statistics(toys, monkeypatch):
    named = replace(planted.TOYS, classes={"segmentation": ("background", "b", "c")})
    monkeypatch.setitem(datasets.DATASETS, "toys", named)
    settings = planted.settings(protocol=["class0_ignored"])
    test = released.test_images(_test_set("segmentation", settings), protocol.active(settings))
    model = planted.model("segmentation")
    model.protocol, model.chances = protocol.active(settings), {"class0_ignored": 0.1}
    record = evaluate.Cell(model, test, "clean", settings).run()
    assert record["chance"] == 0.1 and all(0 not in image[::3] for image in record["statistics"])
    assert paired.resampled(record)[0].tolist() == pytest.approx([record["value"]])


def test_other_weights_head_or_native_size_make_another_record(evaluations):
    settings, test = planted.settings(), _test_set("depth")
    models = [planted.model("depth"), planted.model("depth", seed=1), planted.model("depth", native=20)]
    models.append(planted.model("depth"))
    models[-1].head.conv.bias += 0.01
    for count, model in enumerate(models, 1):
        evaluate.Cell(model, test, "clean", settings).run()
        assert len(evaluations) == count


def test_a_damaged_record_is_made_again(evaluations):
    first = _cell("depth", "embed")
    path = planted.stored("cells/depth__toys__planted__standard__embed__*.json")
    path.write_text(path.read_text()[:50])
    again = _cell("depth", "embed")
    assert len(evaluations) == 2 and again["value"] == first["value"] and records.read_record(path) == again


def test_what_tables_read_is_put_back_from_where_it_is_stored(evaluations):
    first, path = _cell("depth", "embed"), records.record_path("toy", "depth", "toys", "planted", "standard", "embed")
    for content in (None, "{", path.read_text()[9:]):
        path.unlink() if content is None else path.write_text(content)
        assert _cell("depth", "embed") == first == records.read_record(path)
    assert len(evaluations) == 1


def test_lost_statistics_are_made_again(evaluations):
    first = _cell("depth", "embed")
    path = planted.stored("cells/depth__toys__planted__standard__embed__*.safetensors")
    for content in (b"", path.read_bytes()[:-9], path.read_bytes().replace(first["key"].encode(), b"0" * 16)):
        before = len(evaluations)
        path.write_bytes(content)
        assert _cell("depth", "embed")["statistics"] == first["statistics"] and len(evaluations) == before + 1


def _stats(task, kind):
    return records.unpacked(load_file(planted.stored(f"cells/{task}__toys__planted__standard__{kind}__*.safetensors")))


@pytest.mark.parametrize("task", TASKS)
def test_the_worst_case_takes_each_image_where_it_is_hurt_most(task, toys):
    settings = planted.settings()
    model, test = planted.model(task), _test_set(task, settings)
    row = Worst(model, test, evaluate.WORST, settings)
    assert row.run() is None  # nothing was attacked yet
    found = {kind: evaluate.Cell(model, test, kind, settings).run() for kind in attacks.KINDS}
    worst = row.run()
    hurt = min if TASKS[task].sign > 0 else max
    singly = {kind: metrics.per_image(task, _stats(task, kind)) for kind in ALL}
    expected = [hurt(values) for values in zip(*(singly[kind] for kind in found), strict=True)]
    assert sum(worst["chosen"].values()) == worst["n"] == 8
    sign = TASKS[task].sign
    assert sign * worst["value"] <= min(sign * record["value"] for record in found.values())
    assert task == "segmentation" or singly["worst"] == expected
    assert worst["attack"] == "worst" and worst["max_perturbation"] == max(
        record["max_perturbation"] for record in found.values()
    )
    if task == "classification":
        assert worst["value"] == pytest.approx(sum(expected) / 8)
    assert row.run() == worst  # read, with the time it was made
    assert Worst(model, test, evaluate.WORST, settings.model_copy(update={"seed": 1})).stored() is None


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(toys, monkeypatch):
    model, test, kind, asked = planted.model("depth"), _test_set("depth"), attacks.KINDS["task"], []

    def hungry(model, x, *rest):
        asked.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kind.run(model, x, *rest)

    whole = evaluate.evaluate(model, test, "task", Attack(steps=2), 8, 0, "cpu")
    monkeypatch.setitem(attacks.KINDS, "task", kind._replace(run=hungry))
    parts = evaluate.evaluate(model, test, "task", Attack(steps=2), 8, 0, "cpu")
    assert asked == [8, 4, 2, 2, 2, 2] and parts.batch == 2 and whole.batch == 8
    assert torch.allclose(whole.stats, parts.stats, rtol=1e-4)
    asked.clear()
    assert evaluate.evaluate(model, test, "task", Attack(steps=2), 8, 0, "cpu").batch == 2
    assert asked == [2, 2, 2, 2]  # what was too much before is not tried again


def test_seeds_are_repeated_beside_the_first_one(tuned):
    found = evaluate.run_task("depth", tuned.model_copy(update={"seeds": [0, 1, 2, 1]}))
    assert {r["seed"] for r in found} == {0}
    values = [found[0]["value"]]
    for seed in (1, 2):
        folder = records.results_dir("toy") / "seeds" / str(seed)
        again = records.read_records(folder)
        assert len(again) == len(found) and {r["seed"] for r in again} == {seed}
        values.append(next(r for r in again if (r["defense"], r["attack"]) == ("standard", "clean"))["value"])
    assert len(set(values)) == 3  # other heads
    data = {r["hashes"]["data"] for r in again + found}
    assert len(data) == 1  # on the same images
    assert len(records.read_records(records.results_dir("toy"))) == len(
        found
    )  # those of other seeds are not among them
    evaluate.run_task("depth", tuned.model_copy(update={"seeds": [2]}))
    assert [p.parent.name for p in records.results_dir("toy").glob("seeds/*/depth")] == ["2"]


@pytest.fixture
def tuned(toys, monkeypatch):
    """Planted encoders instead of rows, fine-tuned by DeACL with a checkpoint after epoch 1."""

    def load(row, data_root="", weights=None):
        encoder = planted.encoder()
        if weights:
            encoder.backbone.load_state_dict(load_file(weights))
        return encoder

    monkeypatch.setattr(encoders, "load", load)
    settings = planted.settings(deacl={"checkpoints": [1], "n_train": 8, "epochs": 2})
    deacl.finetune_all(settings)
    return settings


def test_a_task_is_evaluated_in_all_variants_and_other_rows_are_stored_but_not_shown(tuned, monkeypatch):
    found = evaluate.run_task("classification", tuned)
    rows = [(r["defense"], r["epoch"], r["attack"]) for r in found]
    variants = [("standard", 0), ("deacl-epoch1", 1), ("deacl", 2)]
    assert rows == [(*v, kind) for v in variants for kind in ("clean", "embed", "task", "worst")]
    assert len({r["hashes"]["weights"] for r in found}) == 3
    folder = records.results_dir("toy")
    records.write_json({}, folder / "depth" / "toys__gone__standard__clean.json")  # of another task: stays
    records.write_json({}, folder / "classification" / "toys__gone__standard__clean.json")
    fewer = planted.settings(encoders=[{"name": "planted"}])
    evaluate.run_task("classification", fewer)
    left = sorted(p.name for p in (folder / "classification").iterdir())
    assert left == [f"toys__planted__standard__{kind}.json" for kind in ("clean", "embed", "task", "worst")]
    assert len(list((folder / "depth").iterdir())) == 1
    monkeypatch.setattr(evaluate, "evaluate", None)  # the rows come back without any attack
    assert evaluate.run_task("classification", tuned) == found


def test_a_row_may_ask_for_fewer_test_images_than_the_task(tuned):
    row = {"name": "planted", "n_test": 3}
    few, many = (evaluate.run_task("depth", planted.settings(encoders=[row | {"n_test": n}])) for n in (3, 1000))
    assert {r["n"] for r in few} == {r["settings"]["task"]["n_test"] for r in few} == {3}
    assert {r["n"] for r in many} == {
        r["n"] for r in evaluate.run_task("depth", planted.settings(encoders=[{"name": "planted"}]))
    }


def test_checkpoints_between_are_evaluated_on_the_first_data_set_alone(tuned, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "toys2", planted.TOYS)
    monkeypatch.setattr(attacks, "kinds", lambda task, settings: {"clean": attacks.KINDS["clean"]})
    settings = tuned.model_copy(update={"depth": tuned.depth.model_copy(update={"datasets": ["toys", "toys2"]})})
    found = [(r["dataset"], r["defense"]) for r in evaluate.run_task("depth", settings)]
    found = list(dict.fromkeys(found))
    assert found[:3] == [("toys", "standard"), ("toys", "deacl-epoch1"), ("toys", "deacl")]
    assert found[3:] == [("toys2", "standard"), ("toys2", "deacl")]


# --- rows that cannot be run ---


@pytest.fixture
def partly(tuned, monkeypatch):
    """Two encoders, of which the weights of one are missing, and of two data sets one; missing: skip."""
    load = encoders.load

    def load_some(row, data_root="", weights=None):
        if row.name == "gone":
            raise BadInput("The checkpoint gone.pth does not exist; correct the path.")
        return load(row, data_root, weights)

    monkeypatch.setattr(encoders, "load", load_some)
    rows = [{"name": "gone"}, {"name": "planted", "defenses": ["standard", "deacl"]}]
    changes = {"encoders": rows, "missing": "skip", "depth": {"datasets": ["nowhere", "toys"]}}
    return planted.settings(deacl=tuned.deacl.model_dump(), **changes)


def _left():
    return sorted(path.stem for path in (records.results_dir("toy") / "depth").glob("*__*__*__*.json"))


def test_rows_that_cannot_be_run_are_skipped_with_the_reason(partly):
    stale = records.results_dir("toy") / "depth" / "toys__gone__standard__clean.json"
    records.write_json({}, stale)  # of a time when it was there
    found = evaluate.run_task("depth", partly)
    rows = [(r["dataset"], r["encoder"], r["defense"], r["attack"]) for r in found]
    assert rows == [("toys", "planted", d, kind) for d in ("standard", "deacl") for kind in ALL]
    lost = records.read_skipped(records.skipped_path("toy", "depth"))
    assert [(r["dataset"], r["encoder"], r["defense"]) for r in lost] == [
        ("nowhere", "gone", "standard"), ("toys", "gone", "standard"), ("nowhere", "planted", "standard"),
        ("nowhere", "planted", "deacl"),
    ]  # fmt: skip
    assert all(set(r) == {"dataset", "encoder", "defense", "why"} for r in lost)
    assert "gone.pth" in lost[0]["why"] and "nowhere" in lost[2]["why"]
    assert _left() == sorted(f"toys__planted__{d}__{kind}" for _, _, d, kind in rows) and not stale.exists()


def test_the_list_of_skipped_rows_goes_when_nothing_is_skipped(partly):
    evaluate.run_task("depth", partly)
    path = records.results_dir("toy") / "depth" / "skipped.json"
    assert path.is_file() and path not in (records.results_dir("toy")).glob("*/*__*__*__*.json")
    whole = planted.settings(encoders=[{"name": "planted"}], missing="skip")
    assert len(evaluate.run_task("depth", whole)) == len(ALL) and not path.exists()
    assert records.read_skipped(records.skipped_path("toy", "depth")) == []


def test_rows_whose_deacl_was_skipped_are_skipped_for_its_reason(partly):
    nowhere = planted.settings(deacl={"dataset": "nowhere"}, missing="skip", encoders=partly.encoders[1:])
    assert deacl.finetune_all(nowhere.model_copy(update={"encoders": partly.encoders[1:]})) == {}
    evaluate.run_task("classification", partly)
    lost = [r for r in records.read_skipped(records.skipped_path("toy", "classification")) if r["encoder"] == "planted"]
    assert [(r["dataset"], r["defense"]) for r in lost] == [("toys", "deacl")] and "nowhere" in lost[0]["why"]


def test_examples_are_of_the_first_row_that_can_be_used(partly):
    (path,) = examples.make("depth", partly, 2)
    with safe_open(path, "pt") as file:
        assert (file.metadata()["dataset"], file.metadata()["encoder"]) == ("toys", "planted")
    nothing = partly.model_copy(update={"encoders": partly.encoders[:1]})
    assert examples.make("depth", nothing, 2) == [] and evidence.current_examples("toy") == {}  # no old pictures


@pytest.mark.parametrize("task", TASKS)
def test_examples_hold_images_and_what_was_said_of_them(task, tuned):
    (path,) = examples.make(task, tuned, 3)
    with safe_open(path, "pt") as file:
        about, shown = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    assert set(shown) == {"images", "target", "adv_embed", "adv_task", "pred_clean", "pred_embed", "pred_task"}
    assert json.loads(about["classes"]) == ([] if task == "depth" else list(planted.CLASSES))
    assert (float(about["eps"]), about["dataset"], about["encoder"]) == (8 / 255, "toys", "planted")
    kind = {"classification": torch.int64, "segmentation": torch.uint8, "depth": torch.float32}[task]
    assert (
        shown["pred_task"].dtype == shown["target"].dtype == kind and shown["pred_task"].shape == shown["target"].shape
    )
    model, test = evaluate.prepare(task, "toys", tuned.encoders[0], tuned)
    adv = attacks.attacked("task", model, shown["images"], shown["target"], test.ids[:3], tuned.attack, 0)
    assert torch.equal(shown["adv_task"], adv)
    assert torch.equal(shown["pred_task"], heads.labels(task, model(adv)))
    before = path.read_bytes()
    assert examples.make(task, tuned, 3)[0].read_bytes() == before
