"""The plan of a profile: what it counts, that it fits measured runs, and that everything missing is listed at once."""

import dataclasses
import math
import re
import statistics
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import trees
from torch.utils.flop_counter import FlopCounterMode

from ssl_robust import attacks, datasets, encoders, records
from ssl_robust.ops import cost, plan, run
from ssl_robust.settings import BadInput, EncoderRow, Settings, check, read_params
from ssl_robust.tasks import TASKS

PROJECT = Path(__file__).resolve().parents[1]
PARAMS = {p.stem: p for p in (PROJECT / "params").glob("*.yaml")}
TASK = {"n_train": 20, "n_val": 10, "n_test": 7, "epochs": 3, "batch": 5, "lr": 0.1, "attack_batch": 4}
TINY = {
    "profile": "tiny",
    "device": "cpu",
    "encoders": [{"name": "embedded_vit", "defenses": ["standard", "deacl"]}],
    **dict.fromkeys(TASKS, TASK),
    "attack": {"steps": 3},
    "deacl": {"n_train": 16, "n_val": 8, "epochs": 2, "batch": 8, "steps": 2, "warmup_epochs": 1, "checkpoints": [1]},
}
ROW = EncoderRow(name="embedded_vit")
CORES = cost.Device("2 CPU cores", 1.5e11, 2.0e9)  # what the constants for CPUs were fitted on


def settings(**change: object) -> Settings:
    return check(**TINY | change)


def profile(name: str) -> Settings:
    return check(**read_params(PARAMS[name]))


def only(work: list[plan.Work], **fields: str) -> list[plan.Work]:
    return [w for w in work if all(getattr(w, key) == value for key, value in fields.items())]


# --- counting ---


@pytest.mark.parametrize(
    ("model", "size", "dim", "depth", "patch"),
    [("dino_vitb16", 224, 768, 12, 16), ("dinov2_vits14", 518, 384, 12, 14)],
)
def test_flops_of_a_vit_are_those_of_the_textbook(model, size, dim, depth, patch):
    n = 1 + (size // patch) ** 2
    # a block: 12 D^2 weights applied to n tokens, and two products with an n x n attention map
    formula = 2 * depth * (12 * n * dim**2 + 2 * n**2 * dim) + 2 * (n - 1) * 3 * patch**2 * dim
    step = cost.traced(cost.encoder_of(EncoderRow(name=model)), "embed", (size, size))
    assert step.forward.flops == pytest.approx(formula, rel=0.05)
    # backward to the image: each product with a weight once more, each product of attention twice
    backward = 2 * depth * (12 * n * dim**2 + 4 * n**2 * dim) + 2 * (n - 1) * 3 * patch**2 * dim
    assert step.whole.flops == pytest.approx(formula + backward, rel=0.05)


def test_counts_are_those_of_torchs_own_counter():
    encoder = cost.encoder_of(ROW)
    x = torch.zeros(1, 3, 64, 64, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        encoder(x)[1].norm().backward()
    assert cost.traced(encoder, "embed", (64, 64)).whole.flops == counter.get_total_flops()


def test_the_cls_token_alone_saves_most_of_the_last_block():
    whole, alone = (
        cost.traced(cost.encoder_of(EncoderRow(name="dino_vitb16")), w, (224, 224)) for w in ("embed", "cls")
    )
    for one, other in zip(whole, alone, strict=True):
        assert 0.06 < 1 - other.flops / one.flops < 1 / 12  # of 12 blocks the last one, without keys and values
    assert alone.whole.kept < whole.whole.kept
    encoder, size = cost.encoder_of(ROW), (64, 64)
    for task, kind, what in (
        ("classification", "task", "cls"),
        ("classification", "embed", "cls"),
        ("depth", "embed", "embed"),
    ):
        assert cost.attack_step(encoder, task, kind, size, 10, 1.0) == cost.traced(encoder, what, size)


def test_counting_leaves_no_trace_and_keeps_weights_frozen():
    encoder = cost.encoder_of(ROW)
    assert (
        cost.traced(encoder, "train", (64, 64)).whole.flops
        > 2 * 3 * 0.9 * cost.traced(encoder, "cls", (64, 64)).forward.flops
    )
    assert not any(p.requires_grad for p in encoder.parameters())
    assert next(encoder.parameters()).device.type == "meta"


def test_windows_by_hand():
    # 375 x 500 px, window 224, stride 147: starts 0, 147, 151 and 0, 147, 276
    assert cost.windows((375, 500), 224, 341 / 518) == 9
    assert cost.windows((518, 691), 518, 341 / 518) == 2
    assert cost.windows((64, 64), 64, 0.5) == 1
    one, nine = (
        cost.attack_step(cost.encoder_of(ROW), "segmentation", "embed", size, 10, 0.5)
        for size in ((64, 64), (128, 128))
    )
    assert nine.whole.flops == 9 * one.whole.flops


@pytest.mark.parametrize(
    ("task", "part", "name", "size", "expected"),
    [
        ("classification", "test", "cifar10", "native", (224, 224)),
        ("segmentation", "test", "voc2012", "native", (224, 299)),
        ("segmentation", "test", "voc2012", "original", (375, 500)),
        ("segmentation", "train", "voc2012", "original", (224, 224)),
        ("depth", "test", "nyuv2", 240, (240, 320)),
        ("depth", "train", "nyuv2", "original", (480, 640)),
        ("depth", "test", "scenes", "original", (224, 224)),
    ],
)
def test_image_sizes(task, part, name, size, expected):
    assert cost.image_size(task, part, name, size, 224) == expected


def test_an_images_size_is_what_the_transform_makes():
    for task, size in (("classification", "native"), ("segmentation", "original"), ("depth", 48)):
        made = datasets.transform(task, "test", size, 64)
        image, _ = made(torch.zeros(3, 480, 640, dtype=torch.uint8), torch.zeros(480, 640))
        assert tuple(image.shape[1:]) == cost.image_size(task, "test", "nyuv2", size, 64)


def test_rows_and_steps_of_a_tiny_profile_by_hand():
    work = plan.all_work(settings())
    for task in TASKS:
        cells = [w for w in only(work, task=task) if w.what in attacks.KINDS]
        rows = [(w.defense, w.what, w.images, w.steps) for w in cells]
        named = [d for d in ("standard", "deacl-epoch1", "deacl") for _ in range(3)] + ["Figure 1"] * 3
        kinds = [("clean", 0), ("embed", 3), ("task", 3)] * 4
        assert rows == [(d, k, 4 if d == "Figure 1" else 7, s) for d, (k, s) in zip(named, kinds, strict=True)]
    step, dense = (cost.traced(cost.encoder_of(ROW), what, (64, 64)) for what in ("cls", "embed"))
    (embed,) = only(work, task="classification", what="embed", defense="deacl")
    # a prediction in fp32; the clean embedding, the steps, and a last look at the loss as in the steps
    assert embed.low_flops == pytest.approx(7 * (3 * step.whole.flops + 2 * step.forward.flops))
    assert embed.flops == pytest.approx(embed.low_flops + 7 * step.forward.flops)
    assert embed.launches == math.ceil(7 / 4) * (3 * step.whole.launches + 3 * step.forward.launches)
    (tokens,) = only(work, task="depth", what="tokens", stage="01_heads")
    assert tokens.images == 2 * 20 + 10 and tokens.flops == 50 * dense.forward.flops and tokens.low_flops == 0
    (tokens,) = only(work, task="classification", what="tokens", stage="01_heads")
    assert tokens.images == 2 * 20 + 10 and tokens.flops == 50 * step.forward.flops
    assert len(only(work, what="tokens")) == 3 * (1 + 2)  # Standard in 01_heads, two DeACL variants a task
    (tuning,) = only(work, what="deacl")
    own = cost.traced(cost.encoder_of(ROW), "train", (64, 64)).whole.flops
    expected = 2 * 16 * (step.forward.flops + 2 * step.whole.flops + own)
    expected += 3 * 8 * (2 * step.forward.flops + 2 * step.whole.flops)
    assert tuning.flops == tuning.low_flops == expected


def test_pgd_on_classes_takes_a_part_of_its_steps_unless_told_otherwise():
    def steps(defense="standard", **change):
        attack = change.pop("attack", {})
        used = settings(attack={"steps": 20, **attack}, **change)
        return plan.steps_taken(change.get("task", "classification"), "task", defense, used)

    assert steps() == 20 * cost.STEPS_TAKEN["standard"] < steps("deacl-epoch1") == 20 * cost.STEPS_TAKEN["deacl"] < 20
    assert steps(attack={"stop_when_broken": False}) == steps(protocol="released") == 20
    for task, kind in (("classification", "embed"), ("segmentation", "task"), ("depth", "task")):
        assert plan.steps_taken(task, kind, "standard", settings()) == 3


def test_copies_of_training_images():
    views = settings(segmentation={**TASK, "views": 3, "epochs": 9}, depth={**TASK, "epochs": 9})
    found = {t: plan.encodings(t, ROW, (64, 64), 20, 10, views) for t in TASKS}
    assert found == {"classification": 50, "segmentation": 70, "depth": 50}
    few = settings(depth={**TASK, "epochs": 2})  # each side serves once: nothing to keep
    assert plan.encodings("depth", ROW, (64, 64), 20, 10, few) == 2 * 20 + 10


def test_images_at_a_time_are_those_of_the_device(monkeypatch):
    auto = settings(device="cpu", **dict.fromkeys(TASKS, TASK | {"attack_batch": "auto", "size": 128}))
    rule = plan.compute.TOKENS
    assert plan.at_once("classification", "scenes", "test", ROW, auto) == rule["cpu"] // (1 + 16**2)
    assert plan.at_once("segmentation", "scenes", "test", ROW, auto) == rule["cpu"] // (9 * (1 + 8**2))
    assert plan.at_once("segmentation", "scenes", "train", ROW, auto) == rule["cpu"] // (1 + 8**2)
    assert plan.at_once("depth", "scenes", "test", ROW, settings()) == 4
    there = auto.model_copy(update={"device": "cuda"})
    assert plan.at_once("depth", "scenes", "test", ROW, there) == rule["cuda"] // (1 + 16**2)


def test_seeds_repeat_heads_and_attacks_alone():
    one, three = (plan.all_work(settings(seeds=seeds)) for seeds in ([], [1, 2]))
    for a, b in zip(one, three, strict=True):
        times = 1 if a.what in ("read", "notebook", "deacl") else 3
        assert b.flops == times * a.flops and b.launches == times * a.launches and b.low_flops == times * a.low_flops
        assert b.fixed == pytest.approx(times * a.fixed)
    assert plan.disk(settings(seeds=[1, 2]))[1] > plan.disk(settings())[1]


def test_strong_attacks_and_sanity_checks_are_counted_where_asked_for():
    plain, strong, sane = (
        plan.all_work(settings(**c)) for c in ({}, {"strong": True}, {"sanity": {"n": 4, "eps": [0, 0.1]}})
    )
    assert only(plain, stage="07_sanity") == [] == only(plain, what="strong")
    for task in TASKS:
        (hard,) = only(strong, task=task, what="strong", defense="deacl")
        (cell,) = only(plain, task=task, what="task", defense="deacl")
        assert hard.flops > 4 * cell.flops and hard.steps == 5 * cell.steps
        lines = only(sane, task=task, stage="07_sanity")
        assert [(w.defense, w.images, w.steps) for w in lines] == [
            ("standard", 4, 27),
            ("deacl", 4, 27),
        ]  # 5 + 2 + 2 times 3
        assert lines[1].flops >= 9 * 4 / 7 * cell.low_flops * 0.9
    assert [w.fixed for w in only(sane, stage="07_sanity", what="notebook")] == [plan.START]
    assert [w for w in sane if w.stage != "07_sanity"] == plain == [w for w in strong if w.what != "strong"]


def test_heads_whose_tokens_do_not_fit_are_encoded_in_every_epoch(monkeypatch):
    monkeypatch.setattr(training, "CACHE", 10 * 4 * 160)
    (cls, dense) = (
        only(plan.all_work(settings()), task=t, what="tokens", stage="01_heads")[0] for t in ("classification", "depth")
    )
    assert cls.images == 10 + 3 * 20  # the held-out tokens fit, those of the training images do not
    assert dense.images == 3 * (10 + 20)


def total(**change: object) -> float:
    return plan.seconds(plan.all_work(settings(**change)), CORES)


@pytest.mark.parametrize(
    "more",
    [
        {"classification": {**TASK, "n_test": 8}},
        {"attack": {"steps": 4}},
        {"attack": {"steps": 3, "best": True}},
        {"depth": {**TASK, "size": 96}},
        {"segmentation": {**TASK, "size": 96}},
        {"depth": {**TASK, "epochs": 4}},
        {"deacl": TINY["deacl"] | {"epochs": 3}},
        {"deacl": TINY["deacl"] | {"steps": 3}},
        {"encoders": [{"name": "embedded_vit", "defenses": ["standard", "deacl"]}, {"name": "dino_vits16"}]},
    ],
    ids=str,
)
def test_more_of_anything_takes_longer(more):
    assert total(**more) > total()


def test_a_given_checkpoint_takes_the_place_of_fine_tuning():
    row = {"name": "embedded_vit", "defenses": ["standard", "deacl"], "deacl_checkpoint": "robust.ckpt"}
    work = plan.all_work(settings(encoders=[row]))
    assert only(work, what="deacl") == [] and {w.defense for w in work if w.what == "task"} == {
        "standard",
        "deacl",
        "Figure 1",
    }


def test_images_are_no_more_than_the_data_set_has():
    quick = profile("quick").model_copy(update={"classification": profile("paper").classification})
    assert plan.counts("classification", "stl10", quick) == (4500, 500, 1000)
    assert plan.counts("segmentation", "voc2012", profile("paper")) == (1364, 100, 1449)


def _nyu(name, root="", **depth):
    """The depth part of a profile, on the data in `root`."""
    used = profile(name)
    depth = used.depth.model_copy(update=depth)
    none = dict.fromkeys(("classification", "segmentation", "deacl"))
    return used.model_copy(update={**none, "depth": depth, "data_root": str(root)})


def test_the_training_set_of_two_sizes_is_planned_as_it_is_or_will_be_fetched(tmp_path, monkeypatch):
    nyu = datasets.DATASETS["nyuv2"]
    assert plan.counts("depth", "nyuv2", _nyu("paper")) == (47_584 - 60, 60, 654)
    assert plan.counts("depth", "nyuv2", _nyu("quick")) == (600, 60, 200)
    assert plan.counts("depth", "nyuv2", _nyu("quick", n_train=795)) == (735, 60, 200)
    assert plan.disk(_nyu("paper"))[0] == sum(a.size for a in nyu.larger) > 35e9
    assert plan.disk(_nyu("quick"))[0] == sum(a.size for a in nyu.archives) < 3e9
    trees.nyuv2(tmp_path)  # of small official numbers, one of them there
    monkeypatch.setitem(datasets.DATASETS, "nyuv2", dataclasses.replace(nyu, counts={"train": (4, 50), "test": (2,)}))
    plan._listed.cache_clear()
    assert plan.counts("depth", "nyuv2", _nyu("paper", tmp_path, n_val=1)) == (3, 1, 2)
    assert plan.counts("depth", "nyuv2", _nyu("paper", n_val=1)) == (49, 1, 2)
    plan._listed.cache_clear()


def test_fewer_training_images_than_asked_for_are_said_but_stop_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "missing_weights", lambda settings: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = dataclasses.replace(datasets.DATASETS["nyuv2"], counts={"train": (4, 50), "test": (2,)})
    monkeypatch.setitem(datasets.DATASETS, "nyuv2", small)
    trees.nyuv2(tmp_path)
    stop, warn = plan.problems(_nyu("paper", tmp_path, n_val=1))
    said = "The depth head on nyuv2 is trained on 3 of 50 images, as no more are there; make data fetches them"
    assert stop == [] and warn == [f"{said} (35.2 GB), or lower depth.n_train."]
    assert plan.problems(_nyu("paper", tmp_path, n_val=1, n_train=4)) == ([], [])
    assert all("trained on" not in sentence for sentence in sum(plan.problems(_nyu("paper")), []))  # nothing is there


def test_deacl_on_fewer_images_is_said_too(tmp_path):
    trees.flat_folder(tmp_path, "photos")  # 16 images
    asked = settings(data_root=str(tmp_path), deacl=TINY["deacl"] | {"dataset": "photos", "n_train": 900})
    said = "DeACL on photos is trained on 8 of 900 images, as no more are there; add images, or lower deacl.n_train."
    assert plan.problems(asked) == ([], [said])


# --- measured runs ---

RUNS = sorted({p.parent.parent for p in (PROJECT / "figures" / "committed").glob("*/records/*/*.json")})


def ratios(folder: Path) -> dict[str, list[tuple[float, float, bool]]]:
    """(expected, measured) seconds of each record of a run, and whether images left the attack early, by task."""
    base, found = profile(folder.parent.name), {task: [] for task in TASKS}
    for record in records.read_records(folder):
        if record["attack"] not in attacks.KINDS:
            continue
        used = base.model_copy(update={record["task"]: type(base.task(record["task"]))(**record["settings"]["task"])})
        (row,) = [r for r in base.encoders if r.name == record["encoder"]]
        place = record["task"], record["dataset"], row, record["defense"], record["attack"], used
        device = cost.gpu(record["device"]) if "cuda" in record["device"] else CORES
        expected = plan.seconds([plan.cell(*place, n=record["n"])], device)
        found[record["task"]].append((expected, record["seconds"], record["health"].get("left", 0) > 0))
    return found


@pytest.mark.parametrize("folder", RUNS, ids=lambda p: p.parent.name)
def test_cost_model_fits_measured_runs(folder):
    """One factor a run is free, as machines differ; within a run the model must tell cheap cells from dear ones."""
    found = ratios(folder)
    # cells of a second or so are mostly overhead; they count in the sums alone
    quotients = [(e / m, early) for pairs in found.values() for e, m, early in pairs if m > 2]
    middle = statistics.median(q for q, _ in quotients)
    # when images leave depends on the data: the model has the mean of many, of which a cell may take half
    wide = {True: 3, False: 2}
    assert len(quotients) >= 9 and all(middle / wide[early] < q < middle * wide[early] for q, early in quotients), (
        sorted(quotients)
    )
    for task, pairs in found.items():
        expected, measured, _ = map(sum, zip(*pairs, strict=True))
        assert 1 / 1.6 < expected / measured / middle < 1.6, task


def test_stages_of_the_demo_as_measured_on_two_quiet_cores():
    measured = dict(zip(plan.STAGES[:7], (45, 55, 84, 79, 85, 75, 20), strict=True))
    work = plan.all_work(profile("demo"))
    expected = {stage: plan.seconds(only(work, stage=stage), CORES) for stage in measured}
    assert all(1 / 1.6 < expected[s] / measured[s] < 1.6 for s in measured), expected
    assert sum(expected.values()) == pytest.approx(sum(measured.values()), rel=0.2)


# --- devices, headers, words ---


def test_devices():
    assert cost.gpu("NVIDIA H100 80GB HBM3").flops == 67e12 * cost.ASSUMED_FP32
    assert cost.gpu("NVIDIA A100-SXM4-80GB").memory == 80e9 and cost.gpu("NVIDIA A100-PCIE-40GB").memory == 40e9
    assert cost.gpu("NVIDIA GeForce RTX 3090").flops == 35.6e12 * cost.ASSUMED_FP32
    assert cost.gpu("NVIDIA L40S").flops > cost.gpu("NVIDIA L4").flops
    unknown, known = cost.gpu("some GPU", 1e10), cost.gpu("NVIDIA L4")
    assert unknown == known._replace(name="some GPU", memory=1e10)
    assert 1e9 < cost.cpu(0.02).flops < 1e14


def test_attack_steps_have_the_rate_of_their_precision(monkeypatch):
    h100, exact = cost.gpu("H100"), cost.gpu("H100", precision="fp32")
    assert cost.in_steps(h100).flops == 989e12 * cost.ASSUMED_BF16 and cost.in_steps(h100).written > h100.written
    assert cost.in_steps(exact) == exact and cost.in_steps(cost.gpu("Tesla V100")) == cost.gpu("Tesla V100")
    assert cost.gpu("H100", precision="bf16") == h100
    cell = plan.cell("depth", "scenes", ROW, "standard", "task", settings())
    clean = plan.cell("depth", "scenes", ROW, "standard", "clean", settings())
    times = [[plan.seconds([w._replace(launches=0, read=0, fixed=0)], d) for d in (exact, h100)] for w in (cell, clean)]
    assert times[0][1] < 0.7 * times[0][0] and times[1][1] == times[1][0]  # predictions are fp32 in any case
    for able, setting, low in (
        (True, "auto", True),
        (True, "fp32", False),
        (False, "auto", False),
        (False, "bf16", True),
    ):
        monkeypatch.setattr(plan.compute, "fast_bf16", lambda device, able=able: able)
        assert (cost.cpu(0.01, setting).bf16 > 0) == low


def test_other_processes_read_while_a_device_computes():
    w = plan.Work("01_heads", "depth", "", "", "", "tokens", 1, flops=3e11, read=4.0)
    assert plan.seconds([w], CORES) == 2 + 4
    assert (
        plan.seconds([w], CORES._replace(readers=4)) == 2
        and plan.seconds([w._replace(read=16)], CORES._replace(readers=4)) == 4
    )


# --- many GPUs ---


def test_time_on_many_gpus_is_all_work_shared_or_the_longest_chain(monkeypatch):
    device = cost.Device("planted", 1.0, 1.0)
    monkeypatch.setattr(cost, "gpu", lambda name, precision: device)
    line = lambda stage, what, defense, flops: plan.Work(stage, "depth", "d", "e", defense, what, 1, flops=flops)  # noqa: E731
    work = [
        plan.Work("02_deacl", "deacl", "d", "e", "deacl", "deacl", 1, flops=9 * 3600),
        *(line("01_heads", "head", d, 3600) for d in ("standard", "deacl")),
        *(
            line("05_attack_depth", k, d, f * 3600)
            for d in ("standard", "deacl")
            for k, f in (("clean", 1), ("task", 3))
        ),
    ]
    monkeypatch.setattr(plan, "all_work", lambda settings: work)
    used = settings(deacl=TINY["deacl"] | {"batch": 16})
    found = {r["gpus"]: r for r in plan.scaling(used, (1, 2, 3, 100))}
    assert found[1]["hours"] == pytest.approx(9 + 2 + 8) and found[1]["busy"] == 1
    assert found[1]["dollars"] == pytest.approx(19 * cost.ASSUMED_PRICE["H100"])
    # one GPU for DeACL: a chain of 9 + 1 + 3 hours; two share it at 0.9: 5 + 1 + 3, and 10 + 10 GPU-hours in all
    assert found[2]["hours"] == pytest.approx(20 / 2) and found[2]["deacl_gpus"] == 2
    assert found[3]["hours"] == found[100]["hours"] == pytest.approx(9) and found[100]["deacl_gpus"] == 2
    assert found[100]["busy"] == pytest.approx(19 / 900) and plan.useful(used) == 3
    said = plan.scaling_text(used)
    assert "| 3 | 9 |" in said and "More than 3 GPUs bring nothing" in said and "shared by 2 GPUs" in said
    assert "DeACL of e 5.0 h; the head of depth on d 60 min; its longest attack 3.0 h" in said


def test_scaling_of_real_settings():
    plain, seeded = settings(), settings(seeds=[1, 2, 3])
    one, eight, many = plan.scaling(plain)
    assert (one["gpus"], eight["gpus"], many["gpus"]) == (1, 8, 64)
    assert one["hours"] > eight["hours"] >= many["hours"] and one["dollars"] < eight["dollars"] < many["dollars"]
    more = plan.scaling(seeded)
    assert more[0]["hours"] > 1.1 * one["hours"] and more[2]["hours"] < 1.05 * many["hours"]  # seeds beside each other
    assert plan.useful(seeded) > plan.useful(plain)
    alone = settings(encoders=[{"name": "embedded_vit"}])
    assert plan.scaling(alone)[0]["deacl_gpus"] == 1 and "DeACL" not in plan.scaling_text(alone)


NUMBER = re.compile(r"\d+(?:\.\d+)?(?![\w.])")


@pytest.mark.parametrize("name", ["quick", "paper"])
def test_headers_of_the_gpu_profiles_are_what_the_plan_says(name):
    head = PARAMS[name].read_text().partition("\nprofile:")[0].splitlines()
    assert any("No such run was measured" in line for line in head)
    for line in plan.header(profile(name)):
        (said,) = [h for h in head if h.startswith(f"# {line.partition(':')[0]}:")]
        assert NUMBER.sub("", said) == NUMBER.sub("", f"# {line}")
        numbers = [[float(n) for n in NUMBER.findall(text)] for text in (said, line)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.1), f"# {line}"
    assert any(h.startswith("# Reproduces:") for h in head) and any("PROFILE=" + name in h for h in head)


def test_scaling_in_the_readme_is_what_the_plan_says():
    section = (PROJECT / "README.md").read_text().partition("\n## Scaling on paper\n")[2].partition("\n## ")[0]
    said, expected = (
        [[float(n) for n in NUMBER.findall(line)] for line in text.splitlines() if re.match(r"\| \d", line)]
        for text in (section, plan.scaling_text(profile("paper")))
    )
    assert len(said) == len(expected) >= 3
    assert all(a == pytest.approx(b, rel=0.1) for a, b in zip(said, expected, strict=True))


def test_quick_is_quick_and_fits_24_gb():
    quick = profile("quick")
    assert plan.seconds(plan.all_work(quick), cost.gpu("H100")) < 70 * 60
    assert plan.memory(quick, least=True)[0] < 24e9 * 0.9


def test_paper_asks_for_every_row_of_the_paper():
    paper = profile("paper")
    work = plan.all_work(paper)
    asked = {(w.task, w.dataset, w.encoder, w.defense) for w in work if w.what == "task"}
    lines = (PROJECT / "ssl_robust" / "show" / "reported.csv").read_text().splitlines()[1:]
    assert {tuple(line.split(",")[:4]) for line in lines} - asked == set()
    attack = paper.attack.model_dump(exclude={"stop_when_broken"})
    assert attack == pytest.approx({"eps": 8 / 255, "step": 2 / 255, "steps": 20, "best": False})
    given = {t: (s.lr, s.batch, s.epochs, s.weight_decay) for t in TASKS for s in [paper.task(t)]}
    expected = {"classification": (0.5, 16, 5, 0), "segmentation": (1e-4, 16, 50, 1e-3), "depth": (1e-4, 128, 20, 0.01)}
    assert given == expected
    default = type(paper.deacl)().model_dump(exclude={"dataset", "n_train", "n_val", "checkpoints", "eps", "step"})
    assert paper.deacl.model_dump(include=set(default)) == default and paper.deacl.eps == pytest.approx(4 / 255)


def test_plan_in_words(root, capsys):
    records.write_json({"seconds": 4000.0}, root / "runs" / "tiny" / "02_deacl.time.json")
    said = plan.text(settings(), ["No cifar10; get it."])
    assert "nothing is run" in said and "Table 2, segmentation: clean, EmbedAttack, SegPGD" in said
    assert "DeACL of embedded_vit on scenes: 16 images, 2 epochs, 2 attack steps" in said
    (stage,) = [line for line in said.splitlines() if line.startswith("02_deacl")]
    assert stage.endswith("67 min") and "not measured" in said
    assert said.endswith("Missing:\n- No cifar10; get it.")
    assert plan.scaling_text(settings()) in said
    assert plan.text(settings(), []).endswith("Nothing is missing.")


@pytest.mark.parametrize(
    ("seconds", "words"), [(40, "40 s"), (600, "10 min"), (7200, "2.0 h"), (10 * 86400, "10.0 days")]
)
def test_durations(seconds, words):
    assert plan.duration(seconds) == words


# --- what is missing ---


@pytest.fixture
def absent(monkeypatch):
    """Data and weights that are not there, a hub that does not answer, a disk of 1 MB."""
    monkeypatch.setattr(datasets, "check", lambda settings: ["No cifar10; get it."])
    monkeypatch.setattr(encoders, "check", lambda settings: ["No file a.pth; get it."])
    monkeypatch.setattr(plan, "hub_answers", lambda: False)
    monkeypatch.setattr(plan, "cached", lambda model: False)
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: disk(1e6, 0, 1e6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_everything_missing_is_listed_at_once(absent):
    asked = settings(device="cuda", encoders=[{"name": "dino_vitb16"}, *TINY["encoders"]])
    stop, warn = plan.problems(asked)
    assert warn == [] and stop[:2] == ["No cifar10; get it.", "No file a.pth; get it."]
    weights, device, disk = stop[2:]
    assert "vit_base_patch16_224.dino" in weights and "give the file as checkpoint" in weights
    assert "no CUDA GPU" in device and "free some space" in disk
    assert all(sentence.endswith(".") and sentence.count(";") == 1 for sentence in stop)
    stop, warn = plan.problems(asked.model_copy(update={"missing": "skip"}))
    assert warn == ["No cifar10; get it.", "No file a.pth; get it.", weights] and stop == [device, disk]


def test_a_gpu_that_is_too_small_is_said_with_the_remedy(monkeypatch):
    small = cost.Device("NVIDIA T4", 1e12, 1e11, 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cost, "this_device", lambda settings: small)
    (said,) = plan.problems(settings(device="auto"))[1]
    assert "1 GB of GPU memory are expected but NVIDIA T4 has 1 GB; lower" in said and "params/tiny.yaml" in said
    assert "attack_batch" in said or "deacl.batch" in said
    monkeypatch.setattr(cost, "this_device", lambda settings: small._replace(memory=2e10))
    assert plan.problems(settings(device="auto")) == ([], [])


def test_memory_grows_with_the_batch():
    taken = [plan.memory(settings(depth={**TASK, "n_test": 500, "attack_batch": n})) for n in (100, 200)]
    assert taken[1][0] > 1.5 * taken[0][0] - plan.CONTEXT and "depth.attack_batch 200" in taken[1][1]
    depth = {**TASK, "n_test": 500, "attack_batch": 200}
    assert plan.memory(settings(depth=depth), least=True)[0] < taken[0][0]  # an attack comes down to what there is


def test_memory_counts_the_training_of_heads():
    small = settings(attack=None, deacl=None, encoders=[{"name": "embedded_vit"}])
    taken, words = plan.memory(small)
    wide, wide_words = plan.memory(small.model_copy(update={"depth": small.depth.model_copy(update={"batch": 20})}))
    assert "depth.batch 5" in words and "depth.batch 20" in wide_words
    assert wide - plan.CONTEXT > 3 * (taken - plan.CONTEXT)


def test_attack_steps_in_bf16_keep_less():
    wide = {**TASK, "n_test": 500, "attack_batch": 400}
    exact, low = (plan.memory(settings(depth=wide, precision=p))[0] - plan.CONTEXT for p in ("fp32", "auto"))
    assert low == pytest.approx(cost.ASSUMED_HALF * exact, rel=0.1)


def test_a_network_that_hangs_does_not_hang_the_check(monkeypatch):
    monkeypatch.setattr(plan, "PATIENCE", 0.1)
    monkeypatch.setattr(plan, "_knock", lambda address: time.sleep(5))
    monkeypatch.setattr(plan.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(plan, "cached", lambda model: False)
    start = time.monotonic()
    assert len(plan.missing_weights(settings(encoders=[{"name": "dino_vitb16"}, {"name": "dinov2_vits14"}]))) == 2
    assert time.monotonic() - start < 2


def test_the_hub_is_asked_only_for_what_is_not_here(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "hub_answers", lambda: asked.append(1) or True)
    monkeypatch.setattr(plan, "cached", lambda model: True)
    rows = [{"name": "dino_vitb16"}, {"name": "embedded_vit"}, {"name": "dinov2_vits14", "checkpoint": "a.pth"}]
    assert plan.missing_weights(settings(encoders=rows)) == [] and asked == []
    assert [row.name for row in plan.fetched(settings(encoders=rows))] == ["dino_vitb16"]
    monkeypatch.setattr(plan, "cached", lambda model: False)
    assert plan.missing_weights(settings(encoders=rows)) == [] and asked == [1]


def test_hub_answers(monkeypatch):
    monkeypatch.setattr(plan.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(plan, "_knock", lambda address: True)
    assert not plan.hub_answers()
    monkeypatch.setattr(plan.constants, "HF_HUB_OFFLINE", False)
    assert plan.hub_answers()


def test_weights_in_the_local_cache_are_found(monkeypatch, tmp_path):
    found = {"timm/vit_base_patch16_224.dino": str(tmp_path)}
    monkeypatch.setattr(plan, "try_to_load_from_cache", lambda repo, file: found.get(repo))
    assert plan.cached("vit_base_patch16_224.dino") and not plan.cached("vit_small_patch14_dinov2.lvd142m")


def test_demo_is_checked_without_counting_and_without_network(monkeypatch):
    for name in ("hub_answers", "all_work"):
        monkeypatch.setattr(plan, name, lambda *_: pytest.fail("not needed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    start = time.process_time()
    assert plan.problems(profile("demo")) == ([], [])
    assert time.process_time() - start < 2


def test_plan_of_an_unknown_profile_or_encoder_is_refused(capsys):
    assert run.main(["--plan", "--profile", "nope"]) == 2
    assert capsys.readouterr().err.startswith("There is no profile 'nope'")
    with pytest.raises(BadInput, match="timm has no model 'vit_huge'"):
        plan.all_work(settings(encoders=[{"name": "vit_huge"}]))


def test_an_encoder_of_ones_own_counts_as_a_vit_b():
    own = cost.encoder_of(EncoderRow(name="mine", call="mine:encoder"))
    assert own.dim == 768 and own.patch == 16
