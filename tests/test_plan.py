"""The plan of a profile: what it counts, that it fits measured runs, and that everything missing is listed at once."""

import math
import re
import statistics
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_robust import cost, datasets, encoders, evaluate, heads, plan, records, run
from ssl_robust.settings import TASKS, BadInput, EncoderRow, Settings, check, read_params

PROJECT = Path(__file__).resolve().parents[1]
PARAMS = {p.stem: p for p in (PROJECT / "params").glob("*.yaml")}
TASK = {"n_train": 20, "n_val": 10, "n_test": 7, "epochs": 3, "batch": 5, "lr": 0.1, "views": 2, "attack_batch": 4}
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


def test_counting_leaves_no_trace_and_keeps_weights_frozen():
    encoder = cost.encoder_of(ROW)
    assert (
        cost.traced(encoder, "train", (64, 64)).whole.flops
        > 2 * 3 * 0.9 * cost.traced(encoder, "embed", (64, 64)).forward.flops
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
        cells = [w for w in only(work, task=task) if w.what in evaluate.KINDS]
        rows = [(w.defense, w.what, w.images, w.steps) for w in cells]
        named = [d for d in ("standard", "deacl-epoch1", "deacl") for _ in range(3)] + ["Figure 1"] * 3
        kinds = [("clean", 0), ("embed", 3), ("task", 3)] * 4
        assert rows == [(d, k, 4 if d == "Figure 1" else 7, s) for d, (k, s) in zip(named, kinds, strict=True)]
    step = cost.traced(cost.encoder_of(ROW), "embed", (64, 64))
    (embed,) = only(work, task="classification", what="embed", defense="deacl")
    assert embed.flops == 7 * (3 * step.whole.flops + 2 * step.forward.flops)
    assert embed.launches == math.ceil(7 / 4) * (3 * step.whole.launches + 2 * step.forward.launches)
    (tokens,) = only(work, task="depth", what="tokens", stage="01_heads")
    assert tokens.images == 2 * 20 + 10 and tokens.flops == 50 * step.forward.flops
    assert len(only(work, what="tokens")) == 3 * (1 + 2)  # Standard in 01_heads, two DeACL variants a task
    (tuning,) = only(work, what="deacl")
    own = cost.traced(cost.encoder_of(ROW), "train", (64, 64)).whole.flops
    expected = 2 * 16 * (step.forward.flops + 2 * step.whole.flops + own)
    expected += 3 * 8 * (2 * step.forward.flops + 2 * step.whole.flops)
    assert tuning.flops == expected


def test_heads_whose_tokens_do_not_fit_are_encoded_in_every_epoch(monkeypatch):
    monkeypatch.setattr(heads, "CACHE", 10 * 4 * 160)
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


# --- measured runs ---

RUNS = sorted({p.parent.parent for p in (PROJECT / "figures").glob("*/records/*/*.json")})


def ratios(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """(expected, measured) seconds of each record of a run, by task."""
    base, found = profile(folder.parent.name), {task: [] for task in TASKS}
    for record in records.read_records(folder):
        used = base.model_copy(update={record["task"]: type(base.task(record["task"]))(**record["settings"]["task"])})
        (row,) = [r for r in base.encoders if r.name == record["encoder"]]
        place = record["task"], record["dataset"], row, record["defense"], record["attack"], used
        device = cost.gpu(record["device"]) if "cuda" in record["device"] else CORES
        expected = plan.seconds([plan.cell(*place, n=record["n"])], device)
        found[record["task"]].append((expected, record["seconds"]))
    return found


@pytest.mark.parametrize("folder", RUNS, ids=lambda p: p.parent.name)
def test_cost_model_fits_measured_runs(folder):
    """One factor a run is free, as machines differ; within a run the model must tell cheap cells from dear ones."""
    found = ratios(folder)
    # cells of a second or so are mostly overhead; they count in the sums alone
    quotients = [expected / measured for pairs in found.values() for expected, measured in pairs if measured > 2]
    middle = statistics.median(quotients)
    assert len(quotients) >= 9 and all(middle / 2 < q < middle * 2 for q in quotients), sorted(quotients)
    for task, pairs in found.items():
        expected, measured = map(sum, zip(*pairs, strict=True))
        assert 1 / 1.6 < expected / measured / middle < 1.6, task


def test_stages_of_the_demo_as_measured_on_two_quiet_cores():
    measured = dict(zip(plan.STAGES, (45, 55, 84, 79, 85, 75, 20), strict=True))
    work = plan.all_work(profile("demo"))
    expected = {stage: plan.seconds(only(work, stage=stage), CORES) for stage in measured}
    assert all(1 / 1.6 < expected[s] / measured[s] < 1.6 for s in measured), expected
    assert sum(expected.values()) == pytest.approx(sum(measured.values()), rel=0.2)


# --- devices, headers, words ---


def test_devices():
    assert cost.gpu("NVIDIA H100 80GB HBM3").flops == 67e12 * cost.GPU_FLOPS
    assert cost.gpu("NVIDIA A100-SXM4-80GB").memory == 80e9 and cost.gpu("NVIDIA A100-PCIE-40GB").memory == 40e9
    assert cost.gpu("NVIDIA GeForce RTX 3090").flops == 35.6e12 * cost.GPU_FLOPS
    assert cost.gpu("NVIDIA L40S").flops > cost.gpu("NVIDIA L4").flops
    assert cost.gpu("some GPU", 1e10)[1:] == (30.3e12 * cost.GPU_FLOPS, 300e9 * cost.GPU_WRITTEN, 1e10)
    assert 1e9 < cost.cpu(0.02).flops < 1e14


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


def test_quick_is_quick_and_fits_24_gb():
    quick = profile("quick")
    assert plan.seconds(plan.all_work(quick), cost.gpu("H100")) < 70 * 60
    assert plan.memory(quick)[0] < 24e9 * 0.9


def test_paper_asks_for_every_row_of_the_paper():
    paper = profile("paper")
    work = plan.all_work(paper)
    asked = {(w.task, w.dataset, w.encoder, w.defense) for w in work if w.what == "task"}
    lines = (PROJECT / "ssl_robust" / "reported.csv").read_text().splitlines()[1:]
    assert {tuple(line.split(",")[:4]) for line in lines} - asked == set()
    assert paper.attack.model_dump() == pytest.approx({"eps": 8 / 255, "step": 2 / 255, "steps": 20, "best": False})
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
