"""The first hour on a GPU: what the project says of GPUs, point by point against what this one does.

Each step is a process of its own and is tried whatever became of the others; what is done is kept, so that an
interrupted check goes on. The steps call the functions that the notebooks call, so neither Jupyter nor papermill is
needed. All results lie in runs/gpu_check and results/gpu_check.

python benchmarks/gpu_check.py [--data FOLDER] [--again] writes runs/gpu_check/report.md, with the same as report.json.
"""

import argparse
import importlib.util
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from timm.models.vision_transformer import LayerScale
from torch import nn

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(PROJECT / "benchmarks")]  # not installed is good enough

import contenders  # noqa: E402

from ssl_robust import attacks, compute, datasets, deacl, encoders, evaluate, heads, records, training  # noqa: E402
from ssl_robust.ops import memory as planned  # noqa: E402
from ssl_robust.ops import plan  # noqa: E402
from ssl_robust.progress import any_terminal  # noqa: E402
from ssl_robust.settings import PARAMS, Attack, BadInput, DeACL, EncoderRow, Settings, check, read_params  # noqa: E402
from ssl_robust.show import layout  # noqa: E402
from ssl_robust.tasks import TASKS  # noqa: E402
from ssl_robust.trust import data as trusted  # noqa: E402
from ssl_robust.trust import sanity  # noqa: E402

HOME = "gpu_check"  # the profile that everything here belongs to
HELD = {True: "held", False: "DID NOT HOLD", None: "not judged"}
VALUES = {"fp32": 0.002, "bf16": 0.02}  # of the `test` profile, GPU against CPU; one H200 was within 0.0004 and 0.0025
GOLDEN = 0.02  # relative, of golden numbers; CPUs among each other: 0.002
SAME_IMAGES = 0.99  # share of the values of PGD's images within 1e-6 of torchattacks'; one H200: 0.9999
TIMES = 3.0  # a time may be so many times the expected one, or so much shorter
ROOM, MORE = 1.3, 1.0  # a memory peak may be so many times the planned one, and so many GB more
STRIDE = 341 / 518  # of the sliding window
QUICK_GB = 24.0  # what params/quick.yaml says that a GPU needs
REPORTED = {"classification": 0.1, "segmentation": 0.1, "depth": 0.2}  # clean values may differ from the paper's by
# unit tests of all that computes; they run on the CPU of a machine that has a GPU, which must not disturb them
TESTS = ("compute", "vit", "heads", "metrics", "attacks", "oracles", "strong", "released", "golden")
PROBES = ("encoders", "heads", "metrics", "pgd", "embed", "task", "strong", "released", "checks")  # of tests/golden.py
Values = dict[str, float]


class Point(NamedTuple):
    """One thing that was expected: in words what, what was seen, and whether it held; None: nothing could be said."""

    what: str
    expected: str
    seen: str
    held: bool | None


class Check(NamedTuple):
    """What is checked: the device, the folder of real data sets, and whether all is as small as it can be."""

    device: str = "cuda"
    data: str = ""
    small: bool = False  # for tests


# --- unit tests, and golden numbers on the GPU ---


def unit_tests(c: Check) -> Iterator[Point]:
    """The unit tests of all that computes, on this machine's CPU with its versions of torch and all else."""
    names = ("vit",) if c.small else TESTS
    what, expected = f"unit tests beside the GPU ({', '.join(names)})", "none fails"
    if importlib.util.find_spec("pytest") is None:
        yield Point(what, expected, "pytest is not installed", None)
        return
    files = [f"tests/test_{name}.py" for name in names]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), kept.get("PYTHONPATH")]))
    done = subprocess.run(run, capture_output=True, text=True, cwd=PROJECT, env=kept)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield Point(what, expected, "; ".join([*lines[-1:], *failed[:5]]), done.returncode == 0)


def golden_numbers(c: Check) -> Iterator[Point]:
    """The golden numbers of every loop that computes with a model, computed on the GPU."""
    import golden

    stored = golden.golden()
    with _golden_on(golden, c.device):
        for name in PROBES[:2] if c.small else PROBES:
            now = golden.probe(name)
            far = {entry: _farthest(now[entry], numbers) for entry, numbers in stored[name]["numbers"].items()}
            worst = max(far, key=far.get)
            said = f"{far[worst]:.2g} ({worst})"
            yield Point(f"golden numbers of '{name}'", f"within {GOLDEN:g}", said, far[worst] <= GOLDEN)


def _farthest(now: list[float], stored: list[float]) -> float:
    """Largest difference of two lists of numbers, relative where they are not small."""
    return max((_gap(a, b) / max(abs(b), 0.1) for a, b in zip(now, stored, strict=True)), default=0.0)


def _gap(one: float, other: float) -> float:
    """Difference of two numbers; what is no number is infinitely far from every other."""
    return 0.0 if one == other else math.inf if math.isnan(one - other) else abs(one - other)


@contextmanager
def _golden_on(golden: Any, device: str) -> Iterator[None]:
    """What tests/golden.py draws on the CPU is on the device, and so are its models; its summaries are made here."""
    before, load = dict(vars(golden)), encoders.random_init

    def filled(module: nn.Module, scale: float = 1.0) -> nn.Module:
        for i, parameter in enumerate(module.parameters()):
            parameter.data.copy_(scale * (2 * golden._random(*parameter.shape, seed=i) - 1))
        return module

    golden._filled, golden.X = filled, golden.X.to(device)
    golden._random = lambda *shape, seed=0: before["_random"](*shape, seed=seed).to(device)
    golden._encoder = lambda: before["_encoder"]().to(device)
    golden._model = lambda *about: before["_model"](*about).to(device)
    golden._target = lambda task, x: before["_target"](task, x).to(device)
    golden._of = lambda *tensors: before["_of"](*(t.cpu() for t in tensors))
    encoders.random_init = lambda *about: load(*about).to(device)
    try:
        yield
    finally:
        vars(golden).update(before)
        encoders.random_init = load


# --- the profile `test`, GPU against CPU ---


def test_profile(c: Check) -> Iterator[Point]:
    """Heads, DeACL, attacks and checks of params/test.yaml: the GPU in fp32, again, and in bf16 against the CPU."""
    seconds = []

    def values(name: str, device: str, precision: str) -> Values:
        began = time.perf_counter()
        found = _values(c, f"{precision}_{name}", device, precision)
        seconds.append(f"{precision} {name} {time.perf_counter() - began:.0f} s")
        return found

    for precision, bound in VALUES.items():
        gpu, cpu = values("gpu", c.device, precision), values("cpu", "cpu", precision)
        yield _apart(f"{precision}: values on the GPU against this CPU's", gpu, cpu, bound)
        if precision == "fp32":
            again = values("gpu_again", c.device, precision)
            yield _apart("fp32: values of a second run on the GPU", gpu, again, 0.0)
    yield Point("seconds of these runs (what was kept is not repeated)", "", ", ".join(seconds), None)


def _values(c: Check, name: str, device: str, precision: str) -> Values:
    """Every value of the profile `test` on a device, {task, data set, encoder, defense, attack: value}."""
    given = read_params(PARAMS / "test.yaml")
    if c.small:
        few = {"n_train": 8, "n_val": 4, "n_test": 2, "epochs": 1, "batch": 4}
        given |= {task: given[task] | few for task in TASKS} | {"attack": given["attack"] | {"steps": 1}}
        given["deacl"] |= {"n_train": 4, "n_val": 2, "epochs": 1, "batch": 2, "checkpoints": []}
        given["sanity"] |= {"eps": [0.0, 0.25]}
    s = _settings(given, device=device, precision=precision, profile=f"{HOME}/{name}")
    training.fit_all(s)
    for row in s.encoders:  # in this process alone, however many GPUs there are
        index = deacl.finetune(row, encoders.load(row), s)
        records.write_record(index, deacl.current_path(s.profile, row.name))
    found = [record for task in TASKS for record in evaluate.run_task(task, s)]
    sanity.run_all(s)
    return {" ".join(r[key] for key in (*evaluate.PLACE, "attack")): r["value"] for r in found}


def _settings(given: dict[str, Any], **changes: Any) -> Settings:
    """The settings of a profile with some changed; their profile is a folder within that of the check."""
    return check(**given).model_copy(update=changes)


def _apart(what: str, one: Values, other: Values, bound: float) -> Point:
    """Whether two runs have the same values within the bound."""
    far = {name: _gap(value, other[name]) for name, value in one.items()}
    worst = max(far, key=far.get)
    where = f" ({worst})" if far[worst] else ""
    expected = f"{len(one)} values, none differs by more than {bound:g}"
    return Point(what, expected, f"largest difference {far[worst]:.2g}{where}", far[worst] <= bound)


# --- speed ---


def bench(c: Check) -> Iterator[Point]:
    """A short form of make bench: PGD and EmbedAttack beside other implementations, a small and a large encoder."""
    names = ("embedded_vit",) if c.small else ("embedded_vit", "dinov2_vits14")
    given = {"profile": "bench", "encoders": [{"name": names[0]}], "attack": {}}
    s = _settings(given, device=c.device, precision="fp32" if c.small else "auto")
    asked = contenders.Bench(names, 32, 2, 1, 1) if c.small else contenders.Bench(names, repeats=2)
    kinds, rows = ["embed", "task"], []
    if absent := [name for name in ("torchattacks", "foolbox") if importlib.util.find_spec(name) is None]:
        kinds = ["embed"]
        yield Point("other implementations of PGD", "installed", f"{' and '.join(absent)} not installed", None)
    for case in (contenders.case(s, asked, name) for name in names):
        for row in (row for kind in kinds for row in contenders.compare(case, kind, asked.repeats)):
            rows.append(row)
            if row["contender"] in ("ours", "ours fp32"):
                yield from _contender(c, row)
    records.write_bytes(pd.DataFrame(rows).to_csv(index=False).encode(), records.runs_dir(HOME) / "contenders.csv")


def _contender(c: Check, row: dict[str, Any]) -> Iterator[Point]:
    """What a row of the bench, one of ours, says."""
    name = f"{row['attack']} on {row['encoder']}, {row['contender']} ({row['precision']}, {row['images']} images)"
    said = f"{row['ratio']:.2f} ± {row['ratio_sd']:.2f}, {row['speed']:.0f} image steps/s"
    quick = None if c.small else row["ratio"] >= 1
    yield Point(f"{name}: speed", f"at least that of {row['against']}", said, quick)
    if row["precision"] == "fp32" and row["attack"] == "PGD":
        expected = f"at least {SAME_IMAGES:g} of the values within 1e-6 of torchattacks'"
        yield Point(f"{name}: images", expected, f"{row['near']:.4f}", row["near"] >= SAME_IMAGES)


# --- one row of the profile `quick` ---


def quick_row(c: Check) -> Iterator[Point]:
    """The first row of params/quick.yaml, or where its data or weights are missing random ones on rendered scenes."""
    given = read_params(PARAMS / "quick.yaml") | {"data_root": c.data, "sanity": None, "deacl": None}
    given["encoders"] = given["encoders"][:1]
    s = _settings(given, device=c.device, profile=f"{HOME}/row")
    absent = [*trusted.check(s), *plan.missing_weights(s)]
    yield Point("data sets and weights of profile quick", "there", absent[0] if absent else "there", None)
    if absent:
        s = _stand_in(c, given)
    size, used = encoders.describe(s.encoders[0]).native, [s.task(task).datasets[0] for task in TASKS]
    yield Point("the row", "", f"{s.encoders[0].name}, {size} px, on {', '.join(dict.fromkeys(used))}", None)
    for task in TASKS:  # scenes are rendered before anything is timed
        for split in ("train", "val", "test"):
            datasets.load(task, s.task(task).datasets[0], split, s, size)
    jobs, rate = plan.jobs_of(s), plan.here(s)
    of = {step: [plan.price(job, s) for job in jobs if job["step"] == step] for step in ("head", "cell")}
    expected = [plan.seconds(prices, rate) for prices in of.values()]
    _reset_peak(c.device)
    began = time.perf_counter()
    training.fit_all(s)
    said = f"{time.perf_counter() - began:.0f} s (what was kept is not repeated)"
    yield Point("heads: time", f"{expected[0]:.0f} s by the plan", said, None)
    found = [record for task in TASKS for record in evaluate.run_task(task, s)]
    spent, peak = sum(record["seconds"] for record in found), _peak_gb(c.device)
    within = None if c.small else expected[1] / TIMES <= spent <= expected[1] * TIMES
    said = f"{expected[1]:.0f} s by the plan, times or divided by {TIMES:g}"
    yield Point("attacks: time", said, f"{spent:.0f} s", within)
    said = f"at most {QUICK_GB:g} GB, as params/quick.yaml says"
    yield Point("heads and attacks: memory peak", said, _said(peak), None if peak is None else peak <= QUICK_GB)
    inside = all(r["max_perturbation"] <= s.attack.eps + 1e-6 and not r["nonfinite"] for r in found)
    yield Point("images stay in the ball, predictions are finite", "all", "all" if inside else "not all", inside)
    if not absent:
        yield from _against_paper(found)


def _stand_in(c: Check, given: dict[str, Any]) -> Settings:
    """The same row with random weights, on rendered scenes."""
    name = "embedded_vit" if c.small else "dinov2_vits14"
    path = records.runs_dir(HOME) / f"{name}.safetensors"
    encoder = encoders.random_init(EncoderRow(name=name))
    for scale in (m for m in encoder.modules() if isinstance(m, LayerScale)):
        scale.gamma.fill_(1)  # it starts at 1e-5, and then no block would have any effect
    deacl.save_backbone(encoder, path)
    few = {"n_train": 4, "n_val": 2, "n_test": 2, "epochs": 1, "batch": 2} if c.small else {"n_train": 600}
    changes = {task: given[task] | {"datasets": ["scenes"]} | few for task in TASKS}
    changes["depth"] |= {"size": 64 if c.small else 480}
    changes["attack"] = given["attack"] | ({"steps": 1} if c.small else {})
    rows = [{"name": f"{name}_random", "timm": name, "checkpoint": str(path)}]
    return _settings(given | changes | {"encoders": rows}, device=c.device, profile=f"{HOME}/row")


def _against_paper(found: list[dict[str, Any]]) -> Iterator[Point]:
    """Clean values beside those that the paper reports."""
    table = pd.read_csv(records.PACKAGE / "show" / "reported.csv").set_index(list(evaluate.PLACE))
    for record in (r for r in found if r["attack"] == "clean"):
        reported = table.loc[tuple(record[key] for key in evaluate.PLACE), "reported_clean"]
        bound = REPORTED[record["task"]]
        what = f"clean {record['metric']} of {record['encoder']} on {record['dataset']}"
        held = abs(record["value"] - reported) <= bound
        yield Point(what, f"{reported:g} (paper), within {bound:g}", f"{record['value']:.3f}", bool(held))


# --- memory ---


class Need(NamedTuple):
    """A step of DeACL, or of a task's own attack, on a model of random weights."""

    what: str
    encoder: str
    count: int  # images
    task: str = ""  # '': DeACL
    size: tuple[int, int] = (0, 0)  # (H, W) of the images
    classes: int = 0

    def planned(self, bf16: bool) -> float:
        """Its memory peak in GB, as make plan reckons it from shapes."""
        encoder = plan.meta(EncoderRow(name=self.encoder))
        if not self.task:
            return planned.tuning_peak(encoder, self.count, bf16) / 1e9
        return planned.attack_peak(self.task, encoder, self.size, self.classes, STRIDE, self.count, bf16) / 1e9

    def work(self, device: str, precision: str) -> None:
        """The step itself."""
        if self.task:
            _attack(self, device, precision)
        else:
            _tuning(self, device, precision)


def memory(c: Check) -> Iterator[Point]:
    """Peaks of the largest steps of the profiles beside those that the plan reckons from shapes alone."""
    precision = compute.precision("auto", c.device)
    for need in SMALL if c.small else NEEDS:
        reckoned = need.planned(precision == "bf16")
        limit = ROOM * reckoned + MORE
        expected = f"{reckoned:.1f} GB by the plan; at most {limit:.1f} GB"
        if c.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 1e9 * reckoned:
            yield Point(need.what, expected, "not run: this GPU has less memory", None)
            continue
        _reset_peak(c.device)
        try:
            need.work(c.device, precision)
        except torch.OutOfMemoryError:
            yield Point(need.what, expected, "out of memory", False)
            continue
        peak = _peak_gb(c.device)
        yield Point(need.what, expected, _said(peak), None if peak is None else peak <= limit)


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gb(device: str) -> float | None:
    """GB that torch held at most since the last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def _said(gigabytes: float | None) -> str:
    return "not measured on a CPU" if gigabytes is None else f"{gigabytes:.1f} GB"


def _attack(need: Need, device: str, precision: str) -> None:
    """Two steps of a task's own attack."""
    encoder = encoders.random_init(EncoderRow(name=need.encoder)).to(device)
    head = heads.HEADS[need.task](encoder.dim, need.classes).to(device)
    model = heads.TaskModel(need.task, encoder, head, STRIDE)
    x, ids = torch.rand(need.count, 3, *need.size).to(device), [str(i) for i in range(need.count)]
    shape = (need.count,) if need.task == "classification" else (need.count, *need.size)
    target = torch.full(shape, 2.0) if need.task == "depth" else torch.zeros(shape, dtype=torch.long)
    attack = Attack(steps=2, stop_when_broken=False)
    attacks.attacked("task", model, x, target.to(device), ids, attack, 0, precision)


def _tuning(need: Need, device: str, precision: str) -> None:
    """One step of DeACL."""
    accelerator = deacl.Accelerator(cpu=device == "cpu", mixed_precision="no")
    encoder = encoders.random_init(EncoderRow(name=need.encoder))
    run = deacl.tuning(encoder, accelerator, DeACL(steps=2, batch=need.count), precision)
    x = torch.rand(need.count, 3, encoder.native, encoder.native).to(device)
    deacl.train_step(run, x, [str(i) for i in range(need.count)], True, need.count, 0)


NEEDS = (
    Need("DeACL of dino_vitb16, batch 32 (quick)", "dino_vitb16", 32),
    Need("DeACL of dino_vitb16, batch 128 (paper)", "dino_vitb16", 128),
    Need("PGD on dino_vitb16, 332 images of 224 px", "dino_vitb16", 332, "classification", (224, 224), 10),
    Need("DepthPGD on dino_vitb16, 54 images of 480x640 px", "dino_vitb16", 54, "depth", (480, 640)),
    Need(
        "SegPGD on dinov2_vitb14, 8 images of 518x690 px, 150 classes",
        "dinov2_vitb14",
        8,
        "segmentation",
        (518, 690),
        150,
    ),
)
SMALL = (
    Need("DeACL of embedded_vit, batch 2", "embedded_vit", 2),
    Need("SegPGD on embedded_vit, 1 image", "embedded_vit", 1, "segmentation", (64, 80), 3),
)


# --- all steps, each tried, and the one file ---


class Step(NamedTuple):
    title: str
    work: Callable[[Check], Iterator[Point]]
    minutes: float  # until it is given up


STEPS = {
    "unit_tests": Step("Unit tests", unit_tests, 8),
    "golden": Step("Golden numbers on the GPU", golden_numbers, 3),
    "test_profile": Step("Profile test, GPU against CPU", test_profile, 20),
    "bench": Step("Speed beside other implementations", bench, 8),
    "quick_row": Step("One row of profile quick", quick_row, 15),
    "memory": Step("Memory peaks", memory, 5),
}
Result = dict[str, Any]  # {"key", "points": [Point], "seconds", "failed": '' or why}


def result_path(name: str) -> Path:
    return records.runs_dir(HOME) / f"{name}.json"


def key(c: Check) -> str:
    """What results of steps are valid for: code, versions, device and data."""
    name = torch.cuda.get_device_name() if c.device == "cuda" else platform.machine()
    return records.digest([_code(), torch.__version__, name, *c])


@cache
def _code() -> str:
    """Short hash of the package, of the tests that are used and of this file, committed or not."""
    files = [p for folder in (records.PACKAGE, PROJECT / "tests", PROJECT / "benchmarks") for p in folder.rglob("*.py")]
    return records.digest([path.read_bytes().hex() for path in sorted(files)])


def take(name: str, c: Check) -> Result:
    """One step in this process, its result written point by point and whatever becomes of it."""
    began, points, failed = time.perf_counter(), [], ""
    try:
        for point in STEPS[name].work(c):
            points.append(point._asdict())
            _write(name, c, points, time.perf_counter() - began, "it was ended")
    except Exception as error:  # a step that fails is a result
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    return _write(name, c, points, time.perf_counter() - began, failed)


def _write(name: str, c: Check, points: list[dict[str, Any]], seconds: float, failed: str) -> Result:
    result = {"key": key(c), "points": points, "seconds": round(seconds, 1), "failed": failed}
    records.write_json(result, result_path(name))
    return result


def stored(name: str, c: Check, unfinished: bool = False) -> Result | None:
    """The result of a step that is done, or all that there is of it; None if it is of other code or another device."""
    try:
        found = records.read_json(result_path(name))
    except BadInput:
        return None
    return found if found["key"] == key(c) and (unfinished or not found["failed"]) else None


def in_process(name: str, c: Check) -> Result:
    """One step in a process of its own, so that no crash and no time limit of it ends the others."""
    run = [sys.executable, __file__, "--step", name, "--device", c.device, "--data", c.data, *["--small"] * c.small]
    result_path(name).unlink(missing_ok=True)
    began, why = time.perf_counter(), ""
    child = subprocess.Popen(run, start_new_session=True)
    try:
        code = child.wait(60 * STEPS[name].minutes)
        why = f"its process ended with code {code}" if code < 0 or not result_path(name).is_file() else ""
    except subprocess.TimeoutExpired:
        why = f"not done after {STEPS[name].minutes:g} minutes"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # with what it has started
            child.wait()
    result = stored(name, c, unfinished=True) or {"points": []}
    return _write(name, c, result["points"], time.perf_counter() - began, why) if why else result


def machine(c: Check) -> dict[str, str]:
    """Where this was measured."""
    found = {"device": c.device, "code": records.REVISION, "python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "torchvision", "timm")}
    if c.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"device": about.name, "compute capability": f"{about.major}.{about.minor}"}
        found |= {"memory": f"{about.total_memory / 1e9:.0f} GB", "GPUs": str(torch.cuda.device_count())}
        found |= {"CUDA": str(torch.version.cuda), "driver, power, clocks": contenders.gpu(c.device)}
    notebooks = importlib.util.find_spec("papermill") is not None
    found["papermill"] = "installed" if notebooks else "not installed; the steps need none"
    return found


def report(c: Check, results: dict[str, Result]) -> str:
    """The one file: for each point what was expected, what was seen, and whether it held."""
    points = [p for r in results.values() for p in r["points"]]
    failed = [name for name, r in results.items() if r["failed"]]
    held, lost = (sum(p["held"] is state for p in points) for state in (True, False))
    parts = ["# First hour on a GPU", "\n".join(f"- {name}: {said}" for name, said in machine(c).items())]
    verdict = f"{held} points held, {lost} did not, {len(points) - held - lost} were not judged"
    parts.append(f"**{verdict}; {len(results) - len(failed)} of {len(STEPS)} steps are done.**")
    parts.append("The steps call the package's functions as its notebooks do, without Jupyter and papermill.")
    for name, result in results.items():
        rows = [{**p, "held": HELD[p["held"]]} for p in result["points"]]
        title = f"{STEPS[name].title} ({result['seconds']:.0f} s)"
        parts.append(layout.markdown(title, pd.DataFrame(rows, columns=list(Point._fields)), {}).rstrip())
        parts += [f"FAILED: {result['failed']}"] * bool(result["failed"])
    records.write_json({"machine": machine(c), "steps": results}, records.runs_dir(HOME) / "report.json")
    text = "\n\n".join(parts) + "\n"
    records.write_bytes(text.encode(), records.runs_dir(HOME) / "report.md")
    return text


def run(c: Check, again: bool = False, one: Callable[[str, Check], Result] = in_process) -> dict[str, Result]:
    """All steps in their order, each result as soon as it is there in the report; with `again` nothing is kept."""
    old = records.runs_dir(HOME) / "key"
    if again or not old.is_file() or old.read_text() != key(c):
        for folder in (records.runs_dir(HOME), records.results_dir(HOME)):
            shutil.rmtree(folder, ignore_errors=True)
        records.write_bytes(key(c).encode(), old)
    results: dict[str, Result] = {}
    for name in STEPS:
        kept = stored(name, c)
        print(f"{STEPS[name].title}: {'done before' if kept else '...'}", flush=True)
        results[name] = kept or one(name, c)
        report(c, results)
    return results


def fine(results: dict[str, Result]) -> bool:
    """Whether every step is done and no point failed to hold."""
    return all(not r["failed"] and all(p["held"] is not False for p in r["points"]) for r in results.values())


def need_gpu() -> None:
    """BadInput unless CUDA really starts: a driver that is too old is there all the same."""
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:  # the latter: a torch without CUDA
        why = str(error).strip().splitlines()[0].rstrip(".")
        remedy = "look at nvidia-smi, update the driver, or install a torch for it"
        raise BadInput(f"No CUDA GPU is usable here ({why}), and this check is of one; {remedy}.") from None


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0 if all held, 1 if not, 2 without a GPU."""
    any_terminal()
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_check.py", description="The first hour on a GPU.")
    parser.add_argument("--data", default="", help="folder of real data sets, for one row of profile quick")
    parser.add_argument("--again", action="store_true", help="keep nothing of an earlier check")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)  # cpu: for tests
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    try:
        if asked.device == "cuda":
            need_gpu()
        c = Check(asked.device, str(Path(asked.data).expanduser().resolve()) if asked.data else "", asked.small)
        if asked.step:
            return int(bool(take(asked.step, c)["failed"]))
        results = run(c, asked.again)
    except BadInput as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; what is done is kept, and the same command goes on.", file=sys.stderr)
        return 130
    print((records.runs_dir(HOME) / "report.md").read_text(encoding="utf-8"))
    return int(not fine(results))


if __name__ == "__main__":
    sys.exit(main())
