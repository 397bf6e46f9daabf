"""Every result that settings ask for: whether it is there, where tables show it, or why it will be made.

What counts as made is decided by the functions of the notebooks themselves, by their own keys; nothing is computed or
written here.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .. import deacl, encoders, evaluate, heads, records
from ..datasets import Subset
from ..encoders import Encoder
from ..heads import TaskModel, skipping
from ..settings import BadInput, EncoderRow, Settings
from ..tasks import TASKS
from ..trust import evidence

# What makes a result: "name"; "step", one of STEPS; "needs", names of jobs that come before it; and what grid.work() is
# told: "encoder", and for heads, cells and checks "task", "dataset", "defense", "epoch", "weights", "seed", for cells
# "kind"; for examples "task" alone.
Job = dict[str, Any]
STEPS = ("deacl", "head", "cell", "checks", "examples")
Shown = tuple[Any, str]  # a file of results/<profile>, and the key of the result that it should show


class Wanted(NamedTuple):
    """One result."""

    job: Job
    there: bool
    why: list[str]  # in what it differs from the nearest one that is there; [] if none is, or if what it needs is not
    shown: list[Shown]


class _Computes(Exception):
    """An encoder is asked for tokens: the result that was looked for is not on disk."""


def _refuse(*_: Any) -> None:
    raise _Computes


def _refusing(encoder: Encoder) -> Encoder:
    """An encoder that cannot compute. What the notebooks' functions return with it, they read from disk."""
    for module in encoder.modules():
        module.register_forward_pre_hook(_refuse)
    return encoder


def _load(row: EncoderRow, data_root: str) -> Encoder:
    return _refusing(encoders.load(row, data_root))


def _on_disk(result: Callable[[], Any]) -> Any:
    """What `result` returns without computing, else None."""
    try:
        return result()
    except _Computes:
        return None


def results(settings: Settings) -> tuple[list[Wanted], list[dict[str, str]]]:
    """All results, those that others need first; and rows that are skipped, [{what, why}].

    Raises BadInput if data or weights are missing; with missing: skip, their rows are skipped, each with a reason.
    """
    tasks = [task for task in TASKS if getattr(settings, task)]
    for name, used in (("attack", bool(tasks)), ("deacl", any(row.tuned for row in settings.encoders))):
        if used and getattr(settings, name) is None:
            raise BadInput(f"The settings have no section '{name}'; add one (params/demo.yaml shows how).")
    lost: list[dict[str, str]] = []
    found: list[Wanted] = []
    for row in settings.encoders:
        for defense in row.defenses:
            only = row.model_copy(update={"defenses": [defense]})
            with skipping(settings, lost, [{"what": f"{row.name} {defense}"}]):
                found += _row(only, tasks, settings, lost)
    return [*found, *(_examples(task, settings) for task in tasks)], lost


def _row(row: EncoderRow, tasks: list[str], settings: Settings, lost: list[dict[str, str]]) -> Iterator[Wanted]:
    """The results of one encoder with one defense."""
    variants, before = [], []
    if row.tuned:
        made = _tuned(row, settings)
        yield made[0]
        variants, before = made[1], [] if made[0].there else [made[0].job["name"]]
    for variant in variants or deacl.variants(row, settings.profile, settings.data_root):
        # before there are weights of DeACL, the original's place is enough to see that the data are there
        encoder = _refusing(encoders.load(row, settings.data_root, None if before else variant[2]))
        for seed in (settings.seed, *settings.more_seeds):
            for task in tasks:
                cells = evaluate.wanted_cells(task, settings, row, variant)
                for dataset in dict.fromkeys(cell.dataset for cell in cells):
                    here = [cell for cell in cells if cell.dataset == dataset]
                    with skipping(settings, lost, [{"what": _where(task, here[0], seed, settings)}]):
                        yield from _head_and_cells(task, here, seed, encoder, settings, before)


def _tuned(row: EncoderRow, settings: Settings) -> tuple[Wanted, list[evaluate.Variant]]:
    """DeACL of a row, and the variants that it leaves, known before it has run."""
    done, _, place, made = deacl.stored(row, encoders.load(row, settings.data_root), settings)
    index = done or {"folder": place.name, "epochs": deacl.kept(settings.deacl)}
    job = {"name": f"deacl {row.name}", "step": "deacl", "encoder": row.name, "needs": []}
    why = [] if done else records.nearest(deacl.others(place), made)
    shown = [(deacl.current_path(settings.profile, row.name), index.get("key", ""))]
    return Wanted(job, bool(done), why, shown), deacl.tuned(row, settings.profile, index)


def _where(task: str, cell: evaluate.Cell, seed: int, settings: Settings) -> str:
    """A row of a table in words: depth scenes embedded_vit deacl."""
    again = "" if seed == settings.seed else f" seed {seed}"
    return f"{task} {cell.dataset} {cell.row.name} {cell.variant[0]}{again}"


def _head_and_cells(
    task: str, cells: list[evaluate.Cell], seed: int, encoder: Encoder, settings: Settings, before: list[str]
) -> Iterator[Wanted]:
    """One head, its cells and checks; `before`: the DeACL job that all wait for."""
    dataset, row, (defense, epoch, weights), _ = cells[0]
    checked = settings.sanity is not None and seed == settings.seed and defense in row.defenses
    where, settings = _where(task, cells[0], seed, settings), seeded(settings, seed)
    place = {"encoder": row.name, "defense": defense, "epoch": epoch, "weights": str(weights or "")}
    place |= {"task": task, "dataset": dataset, "seed": seed}
    head = {"name": f"head {where}", "step": "head", "needs": before, **place}
    _, _, path, wanted = heads.sources(task, dataset, encoder, settings, defense)
    made = None
    if not before and records.reusable_tensors(path, wanted):
        made = evaluate.prepared(task, dataset, encoder, settings, defense)
    yield Wanted(head, bool(made), [] if made or before else records.why(path, wanted), [])
    for kind in (cell.kind for cell in cells):
        job = {"name": f"cell {where} {kind}", "step": "cell", "needs": [head["name"]], "kind": kind, **place}
        yield _cell(job, made, (defense, epoch), kind, settings)
    if checked:
        others = [f"head {task} {dataset} {other.name} standard" for other in _sanity().sources(row, settings)]
        cells_of = [f"cell {where} {kind}" for kind in ("embed", "task")]
        job = {"name": f"checks {where}", "step": "checks", "needs": [*cells_of, *others], **place}
        about = made and _on_disk(lambda: _checks(made, row, defense, settings))
        yield _of_record(job, about, about and _sanity().stored(about, settings), settings)


def _cell(
    job: Job, made: tuple[TaskModel, Subset] | None, variant: tuple[str, int], kind: str, settings: Settings
) -> Wanted:
    if made is None:
        return Wanted(job, False, [], [])
    path, about = evaluate.place(*made, variant, kind, settings)
    there = evaluate.stored(*made, variant, kind, settings) is not None
    names = made[0].task, made[1].name, made[0].encoder.name, variant[0]
    shown = [(records.record_path(settings.profile, *names, kind), records.digest(about))]
    if there and kind == evaluate.kinds(made[0].task, settings)[-1]:
        worst = evaluate.worst_place(*made, variant, settings)
        shown.append((records.record_path(settings.profile, *names, evaluate.WORST), worst["key"]))
    return Wanted(job, there, [] if there else records.why(path, about), shown)


def _of_record(job: Job, about: dict[str, Any] | None, found: Any, settings: Settings) -> Wanted:
    """The checks of a row."""
    if about is None:
        return Wanted(job, False, [], [])
    names = (about[key] for key in ("task", "dataset", "encoder", "defense"))
    shown = [(evidence.checks_path(settings.profile, *names), about["key"])]
    why = [] if found else records.why(evaluate.checks_place(settings.profile, about), about["made_from"])
    return Wanted(job, bool(found), why, shown)


def _sanity() -> Any:
    from ..trust import sanity  # here, because its pictures take seconds that not every caller needs

    return sanity


def _checks(made: tuple[TaskModel, Subset], row: EncoderRow, defense: str, settings: Settings) -> dict[str, Any]:
    """What the sanity checks of one row are made from, by encoders that cannot compute."""
    model, test = made
    source = _sanity().source_of(model.task, test.name, row, model, settings, _load)
    return _sanity().about(model, test, defense, source, settings)


def _examples(task: str, settings: Settings) -> Wanted:
    """Figure 1's images of one task."""
    rows = [(dataset, row.name) for dataset in settings.task(task).datasets for row in settings.encoders]
    needs = [f"head {task} {dataset} {name} standard" for dataset, name in rows]
    job = {"name": f"examples {task}", "step": "examples", "task": task, "needs": needs}
    pointer, none = evidence.examples_path(settings.profile, task), ("", {}, True)
    found = _on_disk(lambda: evaluate.examples_stored(task, settings, _load) or none)
    if found is None:
        return Wanted(job, False, [], [])
    path, made, there = found
    return Wanted(job, there, [] if there else records.why(path, made), [(pointer, path and path.name)])


def seeded(settings: Settings, seed: int) -> Settings:
    """The settings of one seed, as evaluate.run_task repeats heads and attacks with settings.seeds."""
    return settings if seed == settings.seed else settings.again(seed)
