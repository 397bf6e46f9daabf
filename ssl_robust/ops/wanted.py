"""Every result that settings ask for: whether it is there, where tables show it, or why it will be made.

What counts as made is decided by the functions of the notebooks themselves, by their own keys; nothing is computed or
written here.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .. import attacks, deacl, encoders, evaluate, records, training
from ..encoders import Encoder
from ..settings import EncoderRow, Settings, skipping
from ..show import examples
from ..tasks import TASKS
from ..trust import differ, sanity
from ..trust.worst import Worst

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
        if used:
            settings.section(name)
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
        made, variants = _tuned(row, settings)
        before = [] if made.there else [made.job["name"]]
        yield made
    for variant in variants or deacl.variants(row, settings.profile, settings.data_root):
        # before there are weights of DeACL, the original's place is enough to see that the data are there
        encoder = _refusing(encoders.load(row, settings.data_root, None if before else variant[2]))
        for seed in (settings.seed, *settings.more_seeds):
            for task in tasks:
                for dataset in evaluate.data_sets(task, settings, row, variant):
                    where = (
                        f"{task} {dataset} {row.name} {variant[0]}{'' if seed == settings.seed else f' seed {seed}'}"
                    )
                    with skipping(settings, lost, [{"what": where}]):
                        job = {"encoder": row.name, "defense": variant[0], "epoch": variant[1], "seed": seed,
                               "weights": str(variant[2] or ""), "task": task, "dataset": dataset}  # fmt: skip
                        yield from _head_and_cells(where, job, row, encoder, settings, before)


def _tuned(row: EncoderRow, settings: Settings) -> tuple[Wanted, list[evaluate.Variant]]:
    """DeACL of a row, and the variants that it leaves, known before it has run."""
    done, _, place, made = deacl.stored(row, encoders.load(row, settings.data_root), settings)
    index = done or {"folder": place.name, "epochs": deacl.kept(settings.deacl)}
    job = {"name": f"deacl {row.name}", "step": "deacl", "encoder": row.name, "needs": []}
    why = [] if done else differ.nearest(deacl.others(place), made)
    shown = [(deacl.current_path(settings.profile, row.name), index.get("key", ""))]
    return Wanted(job, bool(done), why, shown), deacl.tuned(row, settings.profile, index)


def _head_and_cells(
    where: str, place: Job, row: EncoderRow, encoder: Encoder, settings: Settings, before: list[str]
) -> Iterator[Wanted]:
    """One head, its cells and checks; `before`: the DeACL job that all wait for."""
    task, dataset, defense = place["task"], place["dataset"], place["defense"]
    checked = settings.sanity is not None and place["seed"] == settings.seed and defense in row.defenses
    settings = seeded(settings, place["seed"])
    _, _, path, made = training.sources(task, dataset, encoder, settings, defense)
    there = not before and records.reusable_tensors(path, made) is not None
    head = {"name": f"head {where}", "step": "head", "needs": before, **place}
    yield Wanted(head, there, [] if there or before else differ.why(path, made), [])
    found = evaluate.prepared(task, dataset, encoder, settings, defense) if there else None
    for kind in attacks.kinds(task, settings):
        job = {"name": f"cell {where} {kind}", "step": "cell", "needs": [head["name"]], "kind": kind, **place}
        cell = found and evaluate.Cell(*found, kind, settings, defense, place["epoch"])
        yield _cell(job, cell) if cell else Wanted(job, False, [], [])
    if checked:
        others = [f"head {task} {dataset} {other.name} standard" for other in sanity.sources(row, settings)]
        needs = [*(f"cell {where} {kind}" for kind in ("embed", "task")), *others]
        job = {"name": f"checks {where}", "step": "checks", "needs": needs, **place}
        about = found and _on_disk(lambda: _checks(*found, row, defense, settings))
        yield _of_checks(job, about, settings) if about else Wanted(job, False, [], [])


def _cell(job: Job, cell: evaluate.Cell) -> Wanted:
    there, shown = cell.stored() is not None, [(cell.shown(), records.digest(cell.made))]
    if there and cell.attack == [*attacks.kinds(cell.model.task, cell.settings)][-1]:
        worst = Worst(cell.model, cell.test, evaluate.WORST, cell.settings, cell.defense, cell.epoch)
        shown.append((worst.shown(), records.digest(worst.made)))
    return Wanted(job, there, [] if there else differ.why(cell.path(), cell.made), shown)


def _checks(model: Any, test: Any, row: EncoderRow, defense: str, settings: Settings) -> dict[str, Any]:
    """What the sanity checks of one row are made from, by encoders that cannot compute."""
    source = sanity.source_of(model.task, test.name, row, model, settings, _load)
    return sanity.about(model, test, defense, source, settings)


def _of_checks(job: Job, about: dict[str, Any], settings: Settings) -> Wanted:
    there = sanity.stored(about, settings) is not None
    shown = [(records.checks_path(settings.profile, *(about[key] for key in evaluate.PLACE)), about["key"])]
    why = [] if there else differ.why(evaluate.checks_place(settings.profile, about), about["made_from"])
    return Wanted(job, there, why, shown)


def _examples(task: str, settings: Settings) -> Wanted:
    """Figure 1's images of one task."""
    rows = [(dataset, row.name) for dataset in settings.task(task).datasets for row in settings.encoders]
    needs = [f"head {task} {dataset} {name} standard" for dataset, name in rows]
    job, pointer = {"name": f"examples {task}", "step": "examples", "task": task, "needs": needs}, records.examples_path
    try:
        found = examples.usable(task, settings, _load)
    except _Computes:
        return Wanted(job, False, [], [])
    there = found is None or found.there()
    why, shown = [] if there else differ.why(found.path, found.made), found.path.name if found else ""
    return Wanted(job, there, why, [(pointer(settings.profile, task), shown)])


def seeded(settings: Settings, seed: int) -> Settings:
    """The settings of one seed, as evaluate.cells repeats heads and attacks with settings.seeds."""
    return settings if seed == settings.seed else settings.again(seed)
