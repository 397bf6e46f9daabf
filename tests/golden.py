"""What each loop of records.VERSIONS computes on a small problem: golden numbers that notice a forgotten version.

Stored results are valid as long as their versions are, so arithmetic that changes must come with another version.
`python tests/golden.py` writes the numbers of versions that are new; those of a version never change. With --check, as
make calls it, it says which have moved, and computes only if a source has changed since it said none.
"""

import io
import json
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssl_robust import (
    attacks,
    compute,
    datasets,
    deacl,
    encoders,
    evaluate,
    heads,
    metrics,
    parts,
    records,
    training,
    vit,
)
from ssl_robust.datasets import IGNORE, Item, Subset
from ssl_robust.embedded import scenes
from ssl_robust.encoders import Encoder
from ssl_robust.heads import TaskModel
from ssl_robust.progress import any_terminal
from ssl_robust.protocols import released
from ssl_robust.settings import (
    DIFFERENCES,
    Attack,
    BadInput,
    DeACL,
    Depth,
    EncoderRow,
    Sanity,
    Segmentation,
    TaskSettings,
)
from ssl_robust.tasks import TASKS
from ssl_robust.trust import sanity

FILE = Path(__file__).with_name("golden.json")  # {loop: {"version": n, "numbers": {entry: [numbers]}}}
CLOSE = 2e-3  # relative: other CPUs and other numbers of threads add up in another order
CLASSES = ("background", "a", "b", "c")
Numbers = dict[str, list[float]]


# --- a small model, its images and their targets ---


class _Backbone(nn.Module):
    """Smooth patch tokens of 4 px, and their mean as CLS token."""

    num_prefix_tokens, embed_dim = 1, 6

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 6, 4, 4)
        self.patch_embed.patch_size = (4, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).tanh().flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _filled(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Weights from a fixed seed, whatever torch's own initialisation is."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = scale * (2 * _random(*parameter.shape, seed=i) - 1)
    return module


def _encoder() -> Encoder:
    return Encoder(_filled(_Backbone(), 0.5), "golden", 16, (0.5,) * 3, (0.25,) * 3)


def _model(task: str, *protocol: str) -> TaskModel:
    head = _filled(heads.HEADS[task](6, len(CLASSES)), 2.0)
    return TaskModel(task, _encoder(), head, 0.5, frozenset(protocol), {"": 0.3})


def _target(task: str, x: Tensor) -> Tensor:
    """Labels, masks with an ignored corner, depths with an invalid one."""
    if task == "classification":
        return torch.arange(len(x)) % len(CLASSES)
    dense = (4 * x.mean(1)).long().clamp(max=3) if task == "segmentation" else 1 + 5 * x.mean(1)
    dense[:, :5, :7] = IGNORE if task == "segmentation" else 0
    return dense


X, IDS = _random(2, 3, 24, 20, seed=7), ["one", "two"]


def _of(*tensors: Tensor) -> list[float]:
    """Mean, spread, and a sum in which every place has a weight of its own."""
    parts = [t.detach().double().flatten() for t in tensors]
    return [
        float(value)
        for t in parts
        for value in (t.mean(), t.std(correction=0), (t * (torch.arange(len(t)) * 0.7).cos()).mean())
    ]


# --- one probe for each loop ---


def _scenes() -> Numbers:
    made = scenes.render(range(3), "train", 32)
    return {name: _of(getattr(made, name)) for name in ("images", "labels", "masks", "depths")}


def _data() -> Numbers:
    image, mask = (255 * _random(3, 40, 50)).to(torch.uint8), (4 * _random(40, 50, seed=1)).to(torch.uint8)
    found = {}
    for task, split, size in (
        ("classification", "test", 24), ("segmentation", "train", 24), ("segmentation", "val", 24),
        ("depth", "test", 20), ("depth", "test", (32, 40)), ("deacl", "train", "native"),
    ):  # fmt: skip
        items = [Item(name, image, mask.float() if task == "depth" else mask) for name in IDS]
        change = datasets.transform(task, split, size, 16, "eigen" if size == 20 else "none")
        subset = Subset.__new__(Subset)
        subset.__dict__ |= {"name": "golden", "task": task, "items": items, "transform": change, "seed": 3, "view": 1,
                            "ids": IDS, "classes": CLASSES, "flip": None if split == "train" else False}  # fmt: skip
        parts = [part / (255 if k == 0 else 1) for i in range(2) for k, part in enumerate(subset[i])]
        found[f"{task} {split} {size}"] = _of(*(torch.as_tensor(p).as_subclass(Tensor) for p in parts))
    return found


def _encoders() -> Numbers:
    own = encoders.random_init(EncoderRow(name="embedded_vit"), 0)
    _filled(own.backbone, 0.2)
    positions = _random(1, 16, 5)
    entries = {"embedded": (*own(X), *own(X, normed=False), own.cls(X)), "plain": (*_encoder()(X), _encoder().cls(X))}
    entries |= {f"positions {k}": (vit.resample(positions, (6, 3), *k),) for k in (encoders.DINO, encoders.REGISTERS)}
    return {name: _of(*tensors) for name, tensors in entries.items()}


def _heads() -> Numbers:
    return {task: _of(_model(task)(X), _model(task).embed(X)) for task in TASKS}


def _subset(task: str, n: int, seed: int) -> Subset:
    x = _random(n, 3, 16, 16, seed=seed)
    images, targets = (255 * x).to(torch.uint8), _target(task, x)
    items = [Item(f"{seed}-{i}", images[i], int(t) if t.ndim == 0 else t) for i, t in enumerate(targets)]
    subset = Subset.__new__(Subset)
    change = datasets.transform(task, "train", 16, 16)
    subset.__dict__ |= {"name": "golden", "task": task, "items": items, "transform": change, "seed": 0, "view": 0,
                        "ids": [i.id for i in items], "classes": CLASSES, "flip": None, "damaged": []}  # fmt: skip
    return subset


def _training() -> Numbers:
    kinds = {"classification": TaskSettings, "segmentation": Segmentation, "depth": Depth}
    found = {}
    for task, kind in kinds.items():
        section = kind(epochs=2, batch=3, lr=0.01, weight_decay=0.01)
        train, val = _subset(task, 6, 1), _subset(task, 3, 2)
        head, history = training.fit(task, _encoder(), train, val, section, 0, "cpu")
        losses = torch.tensor([[h["loss"], h["held_out"]] for h in history])
        found[task] = _of(losses, *head.state_dict().values())
    return found


def _metrics() -> Numbers:
    found = {}
    for task in TASKS:
        target = _target(task, X)
        stats = metrics.statistics(task, _model(task)(X), target, len(CLASSES))
        each = torch.tensor(metrics.per_image(task, stats))
        numbers = [metrics.value(task, stats), metrics.standard_error(task, stats)]
        found[task] = (
            numbers
            + _of(stats, each)
            + [metrics.constant_value(task, [*target], len(CLASSES))] * (task != "classification")
        )
    return found


def _pgd() -> Numbers:
    start = attacks.random_start(X, 0.1, IDS, 5)
    middle = _random(2, 3, 24, 20, seed=9)

    def loss(adv: Tensor, t: int) -> Tensor:
        return -((adv - middle) ** 2).flatten(1).sum(1) * (1 + 0.1 * t)

    found = {"start": _of(start)}
    for best in (False, True):
        trace: attacks.Trace = []
        adv = attacks.pgd(X, loss, Attack(eps=0.1, step=0.06, steps=3, best=best), start, trace=trace)
        found[f"best {best}"] = _of(adv - X, *(entry["loss"] for entry in trace))
    return found


def _bf16() -> Numbers:
    own = encoders.random_init(EncoderRow(name="embedded_vit"), 0)
    _filled(own.backbone, 0.2)
    x = X.clone().requires_grad_(True)
    with compute.steps_in("bf16", "cpu"):
        tokens = own.cls(x)
    (gradient,) = torch.autograd.grad(tokens.float().square().sum(), x)
    return {"tokens": _of(tokens.float()), "gradient": _of(gradient / gradient.abs().max())}


def _attacked(kinds: dict[str, tuple[str, ...]], steps: int, *protocol: str) -> Numbers:
    """The loss of images under attacks and how far these went, of the given kinds of each task."""
    found, attack = {}, Attack(eps=0.1, step=0.04, steps=steps)
    for task, names in kinds.items():
        model, target = _model(task, *protocol), _target(task, X)
        for kind in names:
            adv = attacks.attacked(kind, model, X, target, IDS, attack, 3)
            judged = heads.training_loss(task, evaluate.judged(kind, model, adv), target)
            found[f"{task} {kind}"] = [float(judged), float((adv - X).abs().mean())]
    return found


def _strong() -> Numbers:
    strong = parts.table("strong", "ATTACKS")
    return _attacked({task: [name for name, kind in strong.items() if task in kind.tasks] for task in TASKS}, 1)


def _deacl() -> Numbers:
    cfg = DeACL(eps=0.1, step=0.05, steps=2)
    run = deacl.tuning(_encoder(), Accelerator(cpu=True, mixed_precision="no"), cfg, "fp32")
    terms = [deacl.train_step(run, X, IDS, True, len(X), 1) for _ in range(2)]
    rates = torch.tensor([deacl.learning_rate(epoch / 2, cfg) for epoch in range(0, 200, 7)])
    return {"rates": _of(rates), "steps": _of(*terms, *run.student.backbone.state_dict().values())}


def _released() -> Numbers:
    found = {}
    for name in DIFFERENCES:
        tasks = dict.fromkeys(released.DIFFERENCES[name]["tasks"], ("embed", "task"))
        numbers = _attacked(tasks, 2, name)
        for task in tasks:
            model, target, names = _model(task, name), _target(task, X), frozenset({name})
            stats = released.statistics(task, "task", names)(task, model(X), target, len(CLASSES))
            reduce = released.reduction(task, CLASSES, names)
            numbers[task] = [metrics.value(task, stats, reduce), *_of(stats)]
        found |= {f"{name} {key}": value for key, value in numbers.items()}
    recipe = {**released.RECIPE, "strides": [*released.STRIDES.items()], "size": released.DEPTH_SIZE}
    return found | {"recipe": [float(len(records.digest(recipe))), int(records.digest(recipe)[:6], 16)]}


def _checks() -> Numbers:
    found = {}
    for task in TASKS:
        model, attack = _model(task), Attack(eps=0.1, step=0.05, steps=1)
        parts, reduce = [(X, _target(task, X), IDS)], metrics.value_of_sums
        b = sanity.Bench(model, parts, len(CLASSES), reduce, 0.3, 2, attack, 0, "fp32")
        settings = _Settings(Sanity(n=2, more_steps=2, restarts=1, eps=[0.0, 0.2]))
        made, _, stats = sanity.checks(b, ("other", "task", _model(task)), settings)
        found[task] = [*_leaves(made), *_of(stats)]
    return found


class _Settings:
    """All that sanity.checks asks of settings."""

    def __init__(self, sanity: Sanity) -> None:
        self.sanity = sanity


def _leaves(content: object) -> list[float]:
    """The numbers in nested dicts and lists."""
    if isinstance(content, dict | list):
        return [n for part in (content.values() if isinstance(content, dict) else content) for n in _leaves(part)]
    return [float(content)] if isinstance(content, float) else []


PROBES: dict[str, Callable[[], Numbers]] = {
    "scenes": _scenes, "data": _data, "encoders": _encoders, "heads": _heads, "training": _training,
    "metrics": _metrics, "pgd": _pgd, "bf16": _bf16, "deacl": _deacl, "released": _released, "strong": _strong,
    "checks": _checks,
    "embed": lambda: _attacked(dict.fromkeys(TASKS, ("embed",)), 2),
    "task": lambda: _attacked(dict.fromkeys(TASKS, ("task",)), 2),
}  # fmt: skip


# --- what is compared ---


def probe(name: str) -> Numbers:
    """What a loop computes now, {entry: numbers}."""
    with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):
        return PROBES[name]()


def golden() -> dict[str, dict]:
    """The stored numbers: {loop: {"version", "numbers": {entry: [numbers]}}}."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def moved() -> list[str]:
    """One sentence for each loop that computes other numbers than its version did, or whose version has none yet.

    Entries that a loop has gained since, another attack for example, move nothing.
    """
    stored, said = golden(), []
    for name, version in records.VERSIONS.items():
        if stored.get(name, {}).get("version") != version:
            said.append(f"Version {version} of '{name}' has no golden numbers; run python tests/golden.py.")
            continue
        now, before = probe(name), stored[name]["numbers"]
        if wrong := [entry for entry, numbers in before.items() if not _close(numbers, now.get(entry))]:
            said.append(
                f"What '{name}' computes has changed ({wrong[0]}) and its version, {version}, has not; undo that, or "
                f"raise VERSIONS['{name}'] in ssl_robust/records.py and run python tests/golden.py."
            )
    return said


def _close(stored: list[float], now: list[float] | None) -> bool:
    if now is None or len(now) != len(stored):
        return False
    return all(math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE / 10) for a, b in zip(stored, now, strict=True))


def write() -> list[str]:
    """Write the numbers of versions that have none yet, and return their loops; BadInput if those of another moved."""
    stored = golden()
    new = [name for name, version in records.VERSIONS.items() if stored.get(name, {}).get("version") != version]
    if changed := [sentence for sentence in moved() if sentence.startswith("What")]:
        raise BadInput(changed[0])
    numbers = {name: {entry: [float(f"{n:.6g}") for n in v] for entry, v in probe(name).items()} for name in new}
    stored |= {name: {"version": records.VERSIONS[name], "numbers": numbers[name]} for name in new}
    records.write_json(dict(sorted(stored.items())), FILE)
    return new


def check() -> list[str]:
    """What `moved` says, asked again only when a source has changed since it said nothing."""
    sources = [path.read_bytes().hex() for path in sorted(records.PACKAGE.rglob("*.py"))]
    key, passed = records.digest([sources, records.VERSIONS]), records.home() / "golden"
    if passed.is_file() and passed.read_text() == key:
        return []
    found = moved()
    if not found:
        records.write_bytes(key.encode(), passed)
    return found


if __name__ == "__main__":
    any_terminal()
    try:
        if "--check" in sys.argv:
            print("\n".join(said := check()), end="\n" * bool(said), file=sys.stderr)
            sys.exit(2 * bool(said))
        print("written:", ", ".join(write()) or "nothing, as no version is new")
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)
