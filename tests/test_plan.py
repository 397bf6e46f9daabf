"""The plan of a profile: what it counts, what it takes that to last, and that everything missing is listed at once."""

import dataclasses
import re
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import trees

from ssl_robust import datasets, encoders, records
from ssl_robust.ops import memory, plan, run
from ssl_robust.settings import BadInput, EncoderRow, Settings, check, read_params
from ssl_robust.tasks import TASKS
from ssl_robust.trust import data

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


def settings(**change: object) -> Settings:
    return check(**TINY | change)


def profile(name: str) -> Settings:
    return check(**read_params(PARAMS[name]))


# --- counting ---


@pytest.mark.parametrize(
    ("model", "size", "dim", "depth", "patch"),
    [("dino_vitb16", 224, 768, 12, 16), ("dinov2_vits14", 518, 384, 12, 14)],
)
def test_flops_of_a_vit_are_those_of_the_textbook(model, size, dim, depth, patch):
    n = 1 + (size // patch) ** 2
    # a block: 12 D^2 weights applied to n tokens, and two products with an n x n attention map
    formula = 2 * depth * (12 * n * dim**2 + 2 * n**2 * dim) + 2 * (n - 1) * 3 * patch**2 * dim
    step = plan.step_of(plan.attack_loss, plan.meta(EncoderRow(name=model)), "depth", (size, size), 0, 1.0)
    head = 2 * (2 * dim * 256) * (n - 1)  # before upsampling
    assert step.forward == pytest.approx(formula + head, rel=0.08) and 1.8 < step.whole / step.forward < 2.5


def test_the_laptop_profile_takes_less_than_an_hour_of_four_cores():
    laptop = profile("laptop")
    work = plan.flops([plan.price(job, laptop) for job in plan.jobs_of(laptop)])
    core = 40e9  # fp32 FLOPs a second of a core with AVX2, well below what is common
    assert 0.3 * 3600 < work / (4 * core) + plan.notebooks(list(plan.STAGES), laptop) < 3600


def test_counting_leaves_weights_frozen():
    encoder = plan.meta(EncoderRow(name="embedded_vit"))
    plan.tuning_step(encoder)
    assert not any(p.requires_grad for p in encoder.parameters()) and all(p.is_meta for p in encoder.parameters())


def test_rows_of_a_tiny_profile_by_hand():
    jobs = plan.jobs_of(settings(sanity={"n": 4}))
    of = {
        step: [job for job in jobs if job["step"] == step] for step in ("deacl", "head", "cell", "checks", "examples")
    }
    # Standard, the epoch between on the first data set, and DeACL, of three tasks
    assert {step: len(mine) for step, mine in of.items()} == {
        "deacl": 1,
        "head": 9,
        "cell": 27,
        "checks": 6,
        "examples": 3,
    }
    seeds = plan.jobs_of(settings(seeds=[1, 2]))
    assert sum(job["step"] == "head" for job in seeds) == 27 and sum(job["step"] == "deacl" for job in seeds) == 1
    given = [{"name": "embedded_vit", "defenses": ["standard", "deacl"], "deacl_checkpoint": "a.pth"}]
    assert not any(job["step"] == "deacl" for job in plan.jobs_of(settings(encoders=given)))


def test_prices_by_hand():
    s = settings(depth={**TASK, "n_test": 7})
    one = plan.Place("depth", "scenes", s.encoders[0], s).attack()
    place = {"step": "cell", "task": "depth", "dataset": "scenes", "encoder": "embedded_vit", "defense": "standard"}
    read = 7 * (2e-8 * 64 * 64 + 2e-9 * 64 * 64)  # decoded, and resized
    assert plan.price({**place, "kind": "clean"}, s) == {("depth", "attack"): 7 * one.forward, plan.IMAGES: read}
    assert plan.price({**place, "kind": "task"}, s)["depth", "attack"] == 7 * (3 * one.whole + 2 * one.forward)
    hard = plan.price({**place, "kind": "apgd_rmse"}, s)["depth", "attack"]
    assert hard == 7 * (5 * 3 * one.whole + 2 * one.forward)
    attack, train = plan.tuning_step(plan.meta(s.encoders[0]))
    tuned = 16 * (2 * attack.whole + attack.forward + train.whole) + 8 * (2 * attack.whole + 2 * attack.forward)
    found = plan.price({"step": "deacl", "encoder": "embedded_vit"}, s)
    assert found == {("deacl", "attack"): 2 * tuned, plan.IMAGES: pytest.approx(2 * (16 + 8) * read / 7)}


def test_images_are_read_while_others_are_computed():
    prices = [{("depth", "attack"): 6.0, ("depth", "head"): 4.0, plan.IMAGES: 40.0}, {("depth", "attack"): 6.0}]
    cores = {"attack": 2.0, "head": 1.0, "read": 8.0}
    assert plan.seconds(prices, lambda task, what: cores[what]) == max(3 + 4, 5) + 3
    assert plan.seconds(prices, lambda task, what: cores[what] if what != "read" else 2.0) == max(3 + 4, 20) + 3
    assert plan.flops(prices) == 16


@pytest.mark.parametrize(
    "more", [{"attack": {"steps": 6}}, {"depth": {**TASK, "n_test": 70}}, {"attacks": ["embed", "task", "mifgsm"]}]
)
def test_more_of_anything_takes_longer(more):
    rate = plan.assumed("L4")
    longer, shorter = ([plan.price(job, s) for job in plan.jobs_of(s)] for s in (settings(**more), settings()))
    assert plan.seconds(longer, rate) > plan.seconds(shorter, rate)


def test_rates_of_this_machine_are_measured_and_believable():
    rate = plan.here(settings())
    found = [rate(task, what) for task in (*TASKS, "deacl") for what in ("attack", "head")]
    assert all(1e7 < flops < 1e14 for flops in found) and rate("depth", "attack") == rate("depth", "attack")


def test_images_are_no_more_than_the_data_set_has():
    quick = profile("quick").model_copy(update={"classification": profile("paper").classification})
    assert plan.counts("classification", "stl10", quick) == (4500, 500, 1000)
    assert plan.counts("segmentation", "voc2012", profile("paper")) == (1364, 100, 1449)


def test_a_row_with_fewer_test_images_is_planned_with_them():
    settings = profile("demo")
    rows = [settings.encoders[0].model_copy(update={"n_test": n}) for n in (None, 7)]
    places = [plan.Place("depth", "scenes", r, settings.model_copy(update={"encoders": [r]})) for r in rows]
    assert [place.counts[2] for place in places] == [settings.depth.n_test, 7]


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
    assert data.bytes_of("nyuv2", _nyu("paper")) == sum(a.size for a in nyu.larger) > 35e9
    assert data.bytes_of("nyuv2", _nyu("quick")) == sum(a.size for a in nyu.archives) < 3e9
    trees.nyuv2(tmp_path)  # of small official numbers, one of them there
    monkeypatch.setitem(datasets.DATASETS, "nyuv2", dataclasses.replace(nyu, counts={"train": (4, 50), "test": (2,)}))
    assert plan.counts("depth", "nyuv2", _nyu("paper", tmp_path, n_val=1)) == (3, 1, 2)
    assert plan.counts("depth", "nyuv2", _nyu("paper", n_val=1)) == (49, 1, 2)


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


def test_paper_asks_for_every_row_of_the_paper():
    paper = profile("paper")
    asked = {
        tuple(job[n] for n in ("task", "dataset", "encoder", "defense")) for job in plan.jobs_of(paper) if "kind" in job
    }
    lines = (PROJECT / "ssl_robust" / "show" / "reported.csv").read_text().splitlines()[1:]
    assert {tuple(line.split(",")[:4]) for line in lines} - asked == set()
    attack = paper.attack.model_dump(exclude={"stop_when_broken"})
    assert attack == pytest.approx({"eps": 8 / 255, "step": 2 / 255, "steps": 20, "best": False})
    given = {t: (s.lr, s.batch, s.epochs, s.weight_decay) for t in TASKS for s in [paper.task(t)]}
    expected = {"classification": (0.5, 16, 5, 0), "segmentation": (1e-4, 16, 50, 1e-3), "depth": (1e-4, 128, 20, 0.01)}
    assert given == expected
    default = type(paper.deacl)().model_dump(exclude={"dataset", "n_train", "n_val", "checkpoints", "eps", "step"})
    assert paper.deacl.model_dump(include=set(default)) == default and paper.deacl.eps == pytest.approx(4 / 255)


def test_plan_in_words(root):
    records.write_json({"seconds": 4000.0}, root / "runs" / "tiny" / "02_deacl.time.json")
    said = plan.text(settings(), ["No cifar10; get it."])
    assert "nothing is run" in said and re.search(
        r"segmentation +scenes +embedded_vit +standard +clean embed task +7 +64x64", said
    )
    assert re.search(r"DeACL +scenes +embedded_vit +16 ", said)
    (stage,) = [line for line in said.splitlines() if line.startswith("02_deacl")]
    assert stage.endswith("67 min") and "H100 (assumed)" in said
    assert said.endswith("Missing:\n- No cifar10; get it.")
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
    monkeypatch.setattr(data, "check", lambda settings: ["No cifar10; get it."])
    monkeypatch.setattr(encoders, "check", lambda settings: ["No file a.pth; get it."])
    monkeypatch.setattr(plan, "hub_answers", lambda: False)
    monkeypatch.setattr(plan, "cached", lambda model: False)
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: disk(1e12, 1e12 - 1e6, 1e6))
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


def test_the_hub_is_asked_only_for_what_is_not_here(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "hub_answers", lambda: asked.append(1) or True)
    monkeypatch.setattr(plan, "cached", lambda model: True)
    rows = [{"name": "dino_vitb16"}, {"name": "embedded_vit"}, {"name": "dinov2_vits14", "checkpoint": "a.pth"}]
    assert plan.missing_weights(settings(encoders=rows)) == [] and asked == []
    assert [row.name for row in plan.fetched(settings(encoders=rows))] == ["dino_vitb16"]
    monkeypatch.setattr(plan, "cached", lambda model: False)
    assert plan.missing_weights(settings(encoders=rows)) == [] and asked == [1]


def test_a_hub_that_cannot_be_reached_does_not_answer(monkeypatch):
    def offline(model, timeout):
        raise OSError("offline")

    monkeypatch.setattr(plan.huggingface_hub, "model_info", offline)
    assert not plan.hub_answers()
    monkeypatch.setattr(plan.huggingface_hub, "model_info", lambda model, timeout: model)
    assert plan.hub_answers()


def test_weights_in_the_local_cache_are_found(monkeypatch, tmp_path):
    found = {"timm/vit_base_patch16_224.dino": str(tmp_path)}
    monkeypatch.setattr(plan.huggingface_hub, "try_to_load_from_cache", lambda repo, file: found.get(repo))
    assert plan.cached("vit_base_patch16_224.dino") and not plan.cached("vit_small_patch14_dinov2.lvd142m")


def test_demo_is_checked_without_counting_and_without_network(monkeypatch):
    for name in ("hub_answers", "price"):
        monkeypatch.setattr(plan, name, lambda *_: pytest.fail("not needed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    start = time.process_time()
    assert plan.problems(profile("demo")) == ([], [])
    assert time.process_time() - start < 2


def test_plan_of_an_unknown_profile_or_encoder_is_refused(capsys):
    assert run.main(["--plan", "--profile", "nope"]) == 2
    assert capsys.readouterr().err.startswith("There is no profile 'nope'")
    with pytest.raises(BadInput, match="timm has no model 'vit_huge'"):
        plan.text(settings(encoders=[{"name": "vit_huge"}]), [])


# --- memory of a GPU ---


@pytest.mark.parametrize(
    ("encoder", "task", "size", "classes", "images", "traced"),
    [("dino_vitb16", "classification", (224, 224), 10, 332, 16.4), ("dinov2_vitb14", "depth", (480, 640), 0, 40, 19.8),
     ("dino_vitb16", "segmentation", (375, 500), 21, 36, 18.9)],
)  # fmt: skip
def test_peaks_are_those_of_the_steps_themselves(encoder, task, size, classes, images, traced):
    """GB traced once on tensors without values by another program; our windows have saved up to a tenth since."""
    about = task, plan.meta(EncoderRow(name=encoder)), size, classes, 341 / 518, images
    peak = memory.attack_peak(*about)
    assert 0.88 * traced < peak / 1e9 < 1.02 * traced and memory.attack_peak(*about, bf16=False) > 1.2 * peak


def test_peak_of_deacl_is_that_of_its_step():
    encoder = plan.meta(EncoderRow(name="dino_vitb16"))
    found = {n: memory.tuning_peak(encoder, n) / 1e9 for n in (32, 128)}
    assert found == pytest.approx({32: 5.6, 128: 17.7}, rel=0.08)  # traced
    assert all(p.is_meta and not p.requires_grad for p in encoder.parameters())


def test_a_peak_counts_what_is_alive_at_the_same_time():
    def step():
        kept = torch.empty(100)  # 400 bytes
        for _ in range(3):
            torch.empty(50).fill_(1)  # 200 bytes, gone before the next one
        del kept
        torch.empty(120)

    assert memory._most(step) == 600
    layer = torch.nn.Linear(10, 10, device="meta")
    assert memory._most(lambda: layer(torch.empty(5, 10)), layer) == 440 + 200 + 200


def test_many_classes_take_no_more_memory_of_a_gpu_than_few():
    """Logits count for the batch, so a GPU of 24 GB takes ADE20k, too, at its own size."""
    rows = [{"name": "dino_vitb16"}, {"name": "dino_vits16"}]  # the smaller one is not looked at
    section = {**TASK, "datasets": ["ade20k"], "n_test": 1000, "size": "original", "attack_batch": "auto"}
    given = check(profile="tiny", encoders=rows, attack={}, segmentation=section)
    (need,) = memory.needs(given)
    assert need.what == "SegPGD on ade20k, dino_vitb16" and need.images == 7 and 8e9 < need.bytes < 20e9
    assert "- SegPGD on ade20k, dino_vitb16: 11." in memory.text(given)


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224", "dinov2_vits14_reg", "dinov3_vits16"])
def test_memory_of_other_architectures_is_reckoned_too(name):
    encoder = plan.meta(EncoderRow(name=name))
    assert memory.tuning_peak(encoder, 2) > 3 * plan.bytes_of(encoder)
    assert memory.attack_peak("segmentation", encoder, (256, 300), 5, 0.7, 1) > plan.bytes_of(encoder)


def test_a_callable_is_counted_itself():
    small = settings(encoders=[{"name": "filters", "call": "my_encoder:encode", "native": 64}])
    cost = plan.price({"step": "cell", "kind": "clean", "task": "depth", "dataset": "scenes", "encoder": "filters",
                       "defense": "standard"}, small)["depth", "attack"]  # fmt: skip
    like = settings(encoders=[{"name": "dino_vitb16", "native": 64}])
    more = plan.price({"step": "cell", "kind": "clean", "task": "depth", "dataset": "scenes", "encoder": "dino_vitb16",
                       "defense": "standard"}, like)["depth", "attack"]  # fmt: skip
    assert 0 < cost < more / 10 and "filters" in plan.text(small, [])
