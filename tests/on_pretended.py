"""All that computes, on a pretended device (see pretended.py): nothing is mixed, and every value is the CPU's.

test_pretended.py runs these tests in a process of their own, which is what the device needs; so does
pytest tests/on_pretended.py.
"""

import inspect
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gpu_check
import planted
import pretended
import pytest
import torch
from accelerate import Accelerator
from pretended import Mixed

from ssl_robust import attacks, compute, datasets, deacl, encoders, evaluate, heads, metrics, records, training
from ssl_robust.protocols import effects
from ssl_robust.settings import Sanity, Settings
from ssl_robust.show import examples
from ssl_robust.strong import autoattack, dense
from ssl_robust.tasks import TASKS
from ssl_robust.trust import sanity

DEVICE = pretended.register()  # before any gradient is taken, as torch then starts a thread for each device there is
VOLATILE = ("git", "seconds", "made", "notebook", "device", "numerics", "sha")  # of a record
OWN = Path(__file__).parents[1] / "notebooks" / "my_encoder.py"
FEW = {"n_train": 4, "n_val": 2, "n_test": 2, "epochs": 2, "batch": 2, "lr": 0.01}


# --- the device enters where a user's does: by what the setting `device` means ---


def place(patch: pytest.MonkeyPatch) -> None:
    """From here on the setting `device` means the pretended device."""
    patch.setattr(records, "pick_device", lambda setting: pretended.NAME)
    patch.setitem(compute.TOKENS, pretended.NAME, compute.TOKENS["cpu"])  # the same batches, so the same rounding
    patch.setattr(deacl, "Accelerator", lambda **_: _accelerator())


def _accelerator() -> Accelerator:
    """accelerate knows the names of its devices; it is told of another one."""
    made = Accelerator(cpu=True, mixed_precision="no")
    made.state._shared_state["device"] = DEVICE  # which all of its states share
    assert made.device == DEVICE
    return made


@pytest.fixture
def device(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretended device in a temporary project."""
    place(monkeypatch)


def settings(**changes: object) -> Settings:
    """Everything that a vision transformer can be asked for, as small as it can be."""
    rows = [{"name": "vit", "timm": "embedded_vit", "native": 16, "defenses": ["standard", "deacl"]}]
    strong = [name for task in TASKS for name in planted.strong_attacks(task)]
    base = {
        "encoders": rows, "attacks": ["embed", "task", *dict.fromkeys(strong)],
        "classification": FEW, "segmentation": {**FEW, "size": 20, "views": 2}, "depth": {**FEW, "size": 20},
        "attack": {"steps": 1}, "sanity": Sanity(n=2, more_steps=2, restarts=1, eps=[0.0, 0.1]),
        "deacl": {"n_train": 4, "n_val": 2, "epochs": 1, "warmup_epochs": 0.5, "batch": 2, "steps": 1},
    }  # fmt: skip
    return planted.settings(**base | changes)


# --- the whole chain ---


def chain() -> None:
    """What the notebooks of `make paper` compute, in their order, and the appendices on protocols and own encoders."""
    s = settings()
    training.fit_all(s)
    deacl.finetune_all(s)
    for task in TASKS:
        examples.make(task, s, count=2)
        evaluate.run_task(task, s)
    sanity.run_all(s)
    effects.effects(s)
    callable_ = [{"name": "filters", "call": "my_encoder:encode", "native": 16}]
    for task in TASKS:
        evaluate.run_task(task, settings(encoders=callable_, attacks=["embed", "task"], profile="own"))


def content(root: Path) -> dict[str, object]:
    """All results below `root`: records without what differs from run to run, and the bytes of tensors."""
    found: dict[str, object] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".json", ".safetensors") and ".home" not in p.parts):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            found[name] = {k: v for k, v in record.items() if k not in VOLATILE} if isinstance(record, dict) else record
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What the chain leaves behind on the CPU and on the device, {device: content}."""
    found = {}
    for name in ("cpu", pretended.NAME):
        root = tmp_path_factory.mktemp(name)
        (root / "notebooks").mkdir()
        shutil.copy2(OWN, root / "notebooks")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "ROOT", root)
            patch.setitem(datasets.DATASETS, "toys", planted.TOYS)
            patch.setattr(dense, "STEPS", 2)  # times the steps of the profile's attack
            patch.setattr(autoattack, "QUERIES", 3)
            if name != "cpu":
                place(patch)
            chain()
        found[name] = content(root)
    return found


def test_the_chain_leaves_the_same_bits_as_on_the_cpu(both):
    cpu, device = both["cpu"], both[pretended.NAME]
    assert [*cpu] == [*device]
    assert [name for name in cpu if cpu[name] != device[name]] == []


def test_the_chain_was_computed_on_the_device_and_is_whole(both):
    made = pretended.MADE
    # the convolution of patches, attention and its gradient, an optimizer's step, the steps of attacks
    wanted = ("convolution", "_scaled_dot_product_flash_attention_for_cpu_backward", "native_batch_norm", "sign", "bmm")
    assert [name for name in wanted if not any(f"aten::{name}" in one for one in made)] == []
    names = [Path(name).name for name in both[pretended.NAME]]
    paper = ("clean", "embed", "task", "worst")
    cells = {f"toys__filters__standard__{kind}.json" for kind in paper}
    for kind in (*paper, *(name for task in TASKS for name in planted.strong_attacks(task))):
        cells |= {f"toys__vit__{defense}__{kind}.json" for defense in ("standard", "deacl")}
    assert cells <= {*names}
    assert "deacl.json" in names and any(name.startswith("toys__vit__standard-released") for name in names)


def test_golden_numbers_of_every_probe_are_the_stored_ones(device):
    points = list(gpu_check.golden_numbers(gpu_check.Check(pretended.NAME)))
    assert len(points) == len(gpu_check.PROBES) and [p for p in points if not p.held] == []


# --- what the device refuses, and what it allows ---

X = torch.arange(6.0).reshape(2, 3)


def on(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(DEVICE)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


MIXES = {
    "a tensor of the CPU added": lambda: on(X) + X,
    "added from the left": lambda: X + on(X),
    "added in place": lambda: on(X).add_(X),
    "added to one of the CPU": lambda: X.clone().add_(on(X)),
    "a scalar added to a scalar of the CPU": lambda: torch.tensor(1.0).add_(on(X).sum()),
    "in one list": lambda: torch.cat([on(X), X]),
    "scalars stacked": lambda: torch.stack([on(X).sum(), X.sum()]),
    "a matrix product": lambda: on(X) @ X.T,
    "a condition of the CPU": lambda: torch.where(X > 1, on(X), 0.0),
    "an index of the device on the CPU": lambda: X[on(torch.tensor([0]))],
    "a mask of the device on the CPU": lambda: X[on(X > 1)],
    "rows of the CPU put in": lambda: on(X).__setitem__(on(torch.tensor([0])), X[:1]),
    "gathered by an index of the CPU": lambda: on(X).gather(1, torch.zeros(2, 1, dtype=torch.long)),
    "a layer of the CPU": lambda: torch.nn.Linear(3, 2)(on(X)),
    "an image of the CPU": lambda: on(torch.nn.Linear(3, 2).weight) @ X.T,
    "a draw by a generator of the CPU": lambda: torch.rand(3, generator=_seeded(), device=DEVICE),
    "a draw by the global one": lambda: torch.rand(3, device=DEVICE),
    "a draw like a tensor": lambda: torch.randn_like(on(X)),
    "a permutation": lambda: torch.randperm(4, device=DEVICE),
    "a draw in place": lambda: on(X).uniform_(generator=_seeded()),
    "dropout": lambda: torch.nn.functional.dropout(on(X), 0.5, training=True),
    "numpy": lambda: on(X).numpy(),
    "an array": lambda: __import__("numpy").asarray(on(X)),
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_refused(mix):
    with pytest.raises(Mixed, match=r"move it to the device|draw on the CPU and copy|call cpu\(\) first"):
        MIXES[mix]()


ALLOWED = {
    "a scalar of the CPU": (lambda x: x + torch.tensor(2.0), X + 2),
    "a number": (lambda x: torch.where(x > 1, x, 0.0), X.where(X > 1, 0)),
    "an index of the CPU": (lambda x: x[torch.tensor([1])], X[1:]),
    "a mask of the CPU": (lambda x: x[torch.tensor([False, True])], X[1:]),
    "a copy into the CPU": (lambda x: torch.zeros(2, 3).copy_(x), X),
    "a copy into the device": (lambda x: x.clone().copy_(X * 2), X * 2),
    "a slice written": (lambda x: _written(x), torch.tensor([[0.0, 1, 2], [7, 7, 7]])),
    "a draw on the CPU": (lambda x: torch.rand(3, generator=_seeded()).to(x), torch.rand(3, generator=_seeded())),
    "dropout that drops nothing": (lambda x: torch.nn.functional.dropout(x, 0.5, training=False), X),
}


def _written(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[1:] = 7
    return x


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_gpu_allows_is_allowed(name):
    work, expected = ALLOWED[name]
    assert torch.equal(work(on(X)).cpu(), expected)


# --- one place of the package is broken, and the chain finds it ---


def broken(patch: pytest.MonkeyPatch, module: ModuleType, name: str, old: str, new: str) -> None:
    """Replace text in the source of a function, or of a method 'Class.name', as an edit of the file would."""
    owner, _, name = f"{module.__name__}.{name}".rpartition(".")
    owner = module if owner == module.__name__ else getattr(module, owner.rpartition(".")[2])
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(old) == 1, f"{name} has changed: {old} stands there {source.count(old)} times"
    made: dict[str, object] = {}
    exec(compile(source.replace(old, new), module.__file__, "exec"), vars(module), made)
    patch.setattr(owner, name, made[name])


def _cell(task: str, kind: str = "task") -> Callable[[], object]:
    def run() -> object:
        s, model = settings(), planted.model(task).to(DEVICE)
        return evaluate.Cell(model, datasets.load(task, "toys", "test", s, 16), kind, s).run()

    return run


def _head() -> object:
    s = settings()
    train, val = (datasets.load("segmentation", "toys", split, s, 16) for split in ("train", "val"))
    encoder = planted.encoder().to(DEVICE)
    return training.fit("segmentation", encoder, train, val, s.segmentation, 0, pretended.NAME)


def _tuned() -> object:
    return deacl.finetune_all(settings())


def _checked() -> object:
    s, model = settings(), planted.model("classification").to(DEVICE)
    test = datasets.load("classification", "toys", "test", s, 16)
    return sanity.statistics(sanity.bench(model, test, "standard", s), lambda x, target, ids: x)


BREAKS = {
    "the start stays on the CPU": (
        attacks, "random_start", "noise.to(x, non_blocking=True)", "noise", _cell("classification"),
    ),
    "the start is drawn on the device": (
        attacks, "random_start", "pin_memory=x.is_cuda", "device=x.device", _cell("depth"),
    ),
    "PGD counts its images on the CPU": (attacks, "pgd", ", device=x.device", "", _cell("classification")),
    "targets stay on the CPU": (datasets, "_stack", "targets.to(device)", "targets", _cell("segmentation")),
    "images stay on the CPU": (evaluate, "evaluate", "(test, size, device)", "(test, size)", _cell("depth", "embed")),
    "statistics stay on the device": (metrics, "depth_statistics", ".cpu()", "", _cell("depth", "clean")),
    "interpolation is made on the CPU": (heads, "upsample", ", device=x.device", "", _cell("segmentation", "sea")),
    "tokens of heads": (training, "encoded", "(subset, batch, device)", "(subset, batch)", _head),
    "targets of heads": (training, "_kept", "column.to(device)", "column", _head),
    "DeACL's images": (deacl, "_shared", "(images, accelerator.device)", "(images, 'cpu')", _tuned),
    "DeACL's sum": (deacl, "robustness", ", device=run.accelerator.device", "", _tuned),
    "the hash of weights": (records, "state_hash", ".detach().cpu()", ".detach()", _cell("depth")),
    "the images of checks": (sanity, "bench", "len(few), device)", "len(few))", _checked),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_place_is_found_through_the_chain(what, device, monkeypatch):
    *place, work = BREAKS[what]
    work()
    for path in ("runs", "results"):
        shutil.rmtree(records.ROOT / path, ignore_errors=True)
    broken(monkeypatch, *place)
    with pytest.raises((Mixed, deacl.BadInput), match="of the CPU|draws on the device|call cpu"):
        work()


def test_a_callable_that_forgets_its_constant_is_found(device):
    own = planted.encoder()
    own.backbone.forward_features = lambda x: torch.zeros(1, 1, 6) + x.flatten(1)[:, None, :6]
    with pytest.raises(Mixed, match=r"\(1, 1, 6\) of the CPU"):
        encoders.Encoder.forward(own.to(DEVICE), on(planted.images(2)))
