"""Whether the attacks of the tables can be believed: what they must beat, and what must not beat them.

After Carlini et al., "On Evaluating Adversarial Robustness" (2019), on the first images of each test set and in the
same way as in the tables. Each comparison is paired: its standard error is that of the difference on the same images.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from .. import attacks, compute, datasets, deacl, encoders, evaluate, metrics, protocol, records
from ..datasets import Subset
from ..heads import TaskModel
from ..progress import track
from ..settings import Attack, EncoderRow, Settings, skipping, written
from ..tasks import TASKS
from .worst import Worst

KEYS = ["task", "dataset", "encoder", "defense"]
SURE = 2  # standard errors by which one attack must be stronger than another to say so
STRONGER = 0.1  # a longer attack must take this share more than the table's takes from the clean value
DEFENSE = ("standard", "deacl")
SLACK = 0.02  # of the sweep's whole range: a curve that turns back by less is still monotone

Result = dict[str, Any]
Known = Mapping[str, Tensor]  # attack of the table: statistics (N, ..) of its cell, of all test images
Maker = Callable[[Tensor, Tensor, list[str]], Tensor]  # (images, targets, ids) -> images under attack
Source = tuple[str, str, TaskModel]  # where transferred images come from: its name, the attack on it, the model


class Bench(NamedTuple):
    """A model, the images it is checked on, and how they are attacked and judged."""

    model: TaskModel
    parts: list[tuple[Tensor, Tensor, list[str]]]  # images (b, 3, H, W), targets, identifiers; those of one shape each
    classes: int
    reduce: metrics.Reduction
    chance: float  # the metric of a constant prediction, as in the tables
    batch: int  # images attacked at a time
    attack: Attack
    seed: int
    precision: str
    known: Known = {}
    order: Tensor | None = None  # (n,) where in the test set the checked images are, which come by shape


def first(test: Subset, n: int) -> Subset:
    """The first `n` images of a test set, or all if it has fewer."""
    few = copy.copy(test)
    few.items, few.ids = test.items[:n], test.ids[:n]
    return few


def bench(model: TaskModel, test: Subset, defense: str, settings: Settings) -> Bench:
    """What the checks of one row need; `test` is the whole test set of the row.

    What the tables' own attacks left of the images is taken from their cells, if these are there.
    """
    device, section = records.pick_device(settings.device), settings.task(model.task)
    few = first(test, settings.sanity.n)
    found = list(datasets.batches(few, len(few), device))
    parts = [(x, y, [few.ids[i] for i in rows]) for rows, x, y in found]
    order = torch.tensor([i for rows, *_ in found for i in rows])
    row = evaluate.Cell(model, test, "task", settings, defense)
    cells = {kind: row.of(kind).stored() for kind in ("task", "embed")}
    return Bench(
        model, parts, len(test.classes), evaluate.reduction(model, test), evaluate.chance(model, test),
        evaluate.at_once(model, few, section.attack_batch, device), settings.attack, settings.seed,
        compute.precision(settings.precision, device), {k: cell[1] for k, cell in cells.items() if cell}, order,
    )  # fmt: skip


# --- attacks, and what they leave of the images ---


def attacking(b: Bench, kind: str = "task", seed: int = 0, source: TaskModel | None = None, **changes: Any) -> Maker:
    """The table's attack `kind` with some settings changed, `seed` added to its own, made on `source` if given."""
    attack, model = b.attack.model_copy(update=changes), source or b.model
    return lambda x, target, ids: attacks.attacked(kind, model, x, target, ids, attack, b.seed + seed, b.precision)


def noise(b: Bench, signs: bool) -> Maker:
    """Noise in place of an attack: uniform in the ball, or at its corners."""

    def make(x: Tensor, target: Tensor, ids: list[str]) -> Tensor:
        names = [f"noise/{i}" for i in ids]  # not the noise that attacks start from
        if not signs:
            return attacks.random_start(x, b.attack.eps, names, b.seed)
        drawn = attacks.random_start(torch.full_like(x, 0.5), 0.5, names, b.seed)
        return (x + b.attack.eps * (drawn - 0.5).sign()).clamp(0, 1)

    return make


def statistics(b: Bench, make: Maker) -> Tensor:
    """Statistics (n, ...) of the images that `make` gives, as evaluate.evaluate takes them under attack."""
    task = b.model.task
    judge = protocol.ask(b.model.protocol, "statistics", metrics.statistics, task, "task")

    def part(rows: slice, x: Tensor, target: Tensor, ids: list[str]) -> Tensor:
        adv = make(x[rows], target[rows], ids[rows])
        with torch.no_grad():
            return judge(task, b.model(adv), target[rows], b.classes)

    found = []
    for x, y, ids in b.parts:
        size = min(b.batch, b.model.fits or b.batch)
        stats, fits = compute.in_parts(partial(part, x=x, target=y, ids=ids), len(x), size)
        b.model.fits = fits if fits < size else b.model.fits
        found.append(stats)
    return torch.cat(found)


def value(b: Bench, stats: Tensor) -> float:
    return metrics.value(b.model.task, stats, b.reduce)


def numbers(b: Bench, stats: Tensor) -> dict[str, float]:
    return {"value": value(b, stats), "se": metrics.standard_error(b.model.task, stats, b.seed, b.reduce)}


def gain(b: Bench, weaker: Tensor, stronger: Tensor) -> tuple[float, float]:
    """By how much statistics `stronger` are worse than `weaker` in the metric, with the jackknife's standard error."""
    sign = TASKS[b.model.task].sign
    whole = sign * (value(b, weaker) - value(b, stronger))
    n = len(weaker)
    counts = torch.full((n,), n - 1.0)
    without = [b.reduce(b.model.task, stats.sum(0) - stats, counts) for stats in (weaker, stronger)]  # (n,) each
    gaps = sign * (without[0] - without[1]).double()
    return whole, float(((n - 1) * gaps.var(correction=0)).sqrt())


def surely_stronger(b: Bench, weaker: Tensor, stronger: Tensor) -> bool:
    """Whether `stronger` is worse than `weaker` by more than SURE standard errors."""
    gap, se = gain(b, weaker, stronger)
    return gap > SURE * se + 1e-9


def worst(b: Bench, found: list[Tensor]) -> Tensor:
    """Of several attacks' statistics those of the one that hurts each image most."""
    sign = TASKS[b.model.task].sign
    values = sign * torch.tensor([metrics.per_image(b.model.task, stats, b.reduce) for stats in found])
    return torch.stack(found)[values.argmin(0), torch.arange(len(found[0]))]


def at_chance(b: Bench, stats: Tensor) -> bool:
    """Whether these statistics are no better than a constant prediction, give or take their standard error."""
    found = numbers(b, stats)
    return TASKS[b.model.task].sign * (found["value"] - b.chance) <= found["se"] + 1e-9


# --- the checks of one row: numbers, and sentences where something is wrong ---

FAILED = {  # what is said where the table's attack is not stronger than this, or this is much stronger than it
    "noise": "uniform noise of the same size harms no less than {attack} ({pair})",
    "signs": "random signs of the same size harm no less than {attack} ({pair})",
    "more_steps": "{attack} is clearly stronger with {more} steps instead of {steps} ({pair}): it has not converged",
    "restarts": "{attack} is clearly stronger from the worst of {starts} random starts ({pair}): it has not converged",
    "transfer": "images made on {source} harm more than {attack} on the model itself ({pair})",
    "embed": "EmbedAttack harms more than {attack} ({pair}): {attack} has not found the worst",
}


def checks(b: Bench, source: Source | None, settings: Settings) -> tuple[Result, list[str], Tensor]:
    """All checks of one row: their numbers ("checks" of its file) and one sentence for each that fails.

    source: where transferred images come from (name, attack, model); None: nowhere. The third are the statistics
    (n, ..) of each image under that of the checks' attacks inside the table's ball that hurts it most.
    """
    name, kind, other = source or ("", "", None)
    untouched, attacked, embed = statistics(b, lambda x, *_: x), _of_table(b, "task"), _of_table(b, "embed")
    more, count = b.attack.steps * settings.sanity.more_steps, 1 + settings.sanity.restarts
    starts = [statistics(b, attacking(b, seed=k)) for k in range(1, count)]
    tried = {
        "noise": statistics(b, noise(b, signs=False)),
        "signs": statistics(b, noise(b, signs=True)),
        "more_steps": statistics(b, attacking(b, steps=more)),
        **({"transfer": statistics(b, attacking(b, kind, source=other))} if source else {}),
    }
    inside = [tried["noise"], tried["signs"], *starts, *(tried[k] for k in ("more_steps", "transfer") if k in tried)]
    tried |= {"restarts": worst(b, [attacked, *starts]), "embed": embed}

    values = {check: numbers(b, stats) for check, stats in tried.items()}
    gains = {check: {"gain": gain(b, attacked, tried[check])[0]} for check in ("more_steps", "restarts")}
    taken = max(0.0, gain(b, untouched, attacked)[0])
    swept, turned = _sweep(b, untouched, attacked, settings)
    found = {
        "clean": numbers(b, untouched), "attack": numbers(b, attacked), "chance": b.chance,
        "noise": values["noise"], "signs": values["signs"],
        "more_steps": values["more_steps"] | gains["more_steps"] | {
            "steps": more, "converged": _converged(b, attacked, tried["more_steps"], taken),
        },
        "restarts": values["restarts"] | gains["restarts"] | {"starts": count}, **swept,
        "transfer": values["transfer"] | {"from": name} if source else None, "embed": values["embed"],
    }  # fmt: skip
    words = {"attack": TASKS[b.model.task].attack, "source": name}
    words |= {"more": more, "steps": b.attack.steps, "starts": count}
    pairs = {check: (stats, attacked) for check, stats in tried.items()}
    if len(b.known) == 2:
        pairs["embed"] = b.known["embed"], b.known["task"]  # on all images
    bad = {check: pair for check, pair in pairs.items() if _fails(b, check, *pair, taken)}
    said = {check: [FAILED[check].format(pair=_pair(b, *pair), **words)] for check, pair in bad.items()}
    said["sweep"] = turned
    return found, [flag for check in found for flag in said.get(check, ())], worst(b, inside)


def _fails(b: Bench, check: str, stats: Tensor, attacked: Tensor, taken: float) -> bool:
    """Whether statistics of a check speak against the table's attack, which takes `taken` from the clean value.

    Noise must be weaker than it, if it leaves more than chance; more steps or starts may not find much more.
    """
    surely = surely_stronger(b, attacked, stats)
    if check in ("noise", "signs"):
        weaker = b.attack.eps == 0 or gain(b, stats, attacked)[0] > 0
        return not weaker and (surely or not at_chance(b, attacked))
    return surely and (check not in ("more_steps", "restarts") or gain(b, attacked, stats)[0] > STRONGER * taken)


def _converged(b: Bench, attacked: Tensor, longer: Tensor, taken: float) -> bool:
    """Whether more steps surely take less than STRONGER of what the table's attack takes, whatever its loss does."""
    gap, se = gain(b, attacked, longer)
    return gap + SURE * se < STRONGER * taken


def _of_table(b: Bench, kind: str) -> Tensor:
    """Statistics of the images under the table's attack `kind`: its cell's, or made here without one."""
    return b.known[kind][b.order] if kind in b.known else statistics(b, attacking(b, kind))


def _sweep(b: Bench, untouched: Tensor, attacked: Tensor, settings: Settings) -> tuple[Result, list[str]]:
    """A larger ball must not help the model, radius 0 must change nothing, and the largest must leave only chance.

    Steps grow with the radius. The table's own radius is the attack that was made already.
    """
    ratio, curve = b.attack.step / b.attack.eps if b.attack.eps else 0.25, {b.attack.eps: attacked}
    for eps in {0.0, *settings.sanity.eps} - {b.attack.eps}:
        steps = b.attack.steps if eps else 1
        curve[eps] = statistics(b, attacking(b, eps=eps, step=min(1.0, ratio * eps), steps=steps))
    radii, stats = zip(*sorted(curve.items(), key=lambda point: point[0]), strict=True)
    back, same, lost = _turns(b, stats), bool(torch.equal(stats[0], untouched)), at_chance(b, stats[-1])
    said = [] if same else ["an attack of radius 0 differs from clean images"]
    if back:
        places = ", ".join(f"{written(radii[i])} to {written(radii[i + 1])}" for i in back)
        said.append(f"a larger radius weakens the attack ({places})")
    if not lost:
        what = f"{TASKS[b.model.task].metric} {value(b, stats[-1]):.2f}, baseline {b.chance:.2f}"
        said.append(f"even a radius of {written(radii[-1])} leaves more than chance ({what})")
    sweep = [{"eps": eps, **numbers(b, point)} for eps, point in zip(radii, stats, strict=True)]
    return {"sweep": sweep, "zero_is_clean": same, "monotone": not back, "reaches_chance": lost}, said


def _turns(b: Bench, curve: Sequence[Tensor]) -> list[int]:
    """Where a curve of statistics turns back to better values, by more than its standard error and SLACK."""
    values = [value(b, stats) for stats in curve]
    slack = SLACK * (max(values) - min(values))
    gaps = [gain(b, smaller, larger) for smaller, larger in itertools.pairwise(curve)]
    return [i for i, (gap, se) in enumerate(gaps) if -gap > se + slack + 1e-9]


def _pair(b: Bench, other: Tensor, attacked: Tensor) -> str:
    return f"{TASKS[b.model.task].metric} {value(b, other):.2f} against {value(b, attacked):.2f}"


# --- one row and all rows, on disk ---


def stored(row: Result, settings: Settings) -> Result | None:
    """The checks that lie where `row`, what is known of them before they are made, says; None if they are not there."""
    kept = records.reusable(evaluate.checks_place(settings.profile, row), row["made_from"])
    place = evaluate.checks_place(settings.profile, row, ".safetensors")
    return kept if records.reusable_tensors(place, row["made_from"]) else None


def about(model: TaskModel, test: Subset, defense: str, source: Source | None, settings: Settings) -> Result:
    """What is known of the checks of a row before they are made, and what they are made from."""
    cell = evaluate.Cell(model, test, "task", settings, defense).made
    other = [(m.encoder.hash, records.state_hash(m.head.state_dict())) for m in (source or ())[2:]]
    inputs = {**cell["inputs"], "checks": settings.sanity.model_dump(), "transfer": [*(source or ())[:2], *other]}
    made = records.made_from([*cell["loops"], "embed", "checks"], **inputs)
    names = model.task, test.name, model.encoder.name, defense
    return {
        "schema": records.SCHEMA, "key": records.digest(made), "made_from": made, "cell": records.digest(cell),
        **dict(zip(KEYS, names, strict=True)), "metric": TASKS[model.task].metric,
        "attack": settings.attack.model_dump(),
    }  # fmt: skip


def sources(row: EncoderRow, settings: Settings) -> list[EncoderRow]:
    """Rows whose Standard encoder images for `row` can be transferred from, in the order in which they are tried."""
    return [other for other in settings.encoders if other.name != row.name and "standard" in other.defenses]


def source_of(
    task: str, dataset: str, row: EncoderRow, model: TaskModel, settings: Settings, load: evaluate.Loader | None = None
) -> Source | None:
    """Where images for `row` are transferred from: another row's Standard encoder and head, under the task attack.

    With a single row EmbedAttack on the same architecture at random init; None if that is a callable. Rows whose data
    or weights are missing are passed over with missing: skip, else raise BadInput. `load`: what loads an encoder in
    place of encoders.load.
    """
    for other in sources(row, settings):
        with skipping(settings, [], []):
            encoder = (load or encoders.load)(other, settings.data_root)
            return other.name, "task", evaluate.prepared(task, dataset, encoder, settings, "standard")[0]
    if row.call:
        return None
    blank = encoders.random_init(row, settings.seed).to(model.encoder.mean.device)
    stride = model.stride / model.encoder.native
    return f"{row.name} at random init", "embed", TaskModel(task, blank, model.head, stride, model.protocol)


def run_all(settings: Settings) -> list[Result]:
    """The checks of every row of the tables, Standard and DeACL's last epoch; results on disk are kept as far as valid.

    Writes results/<profile>/sanity/<task>/<dataset>__<encoder>__<defense>.json. Raises BadInput if the settings have no
    section 'sanity' or 'attack', or if data, weights or DeACL are missing; with missing: skip, such rows are left out.
    """
    for name in ("sanity", "attack"):
        settings.section(name)
    rows = [
        (task, dataset, row, defense)
        for task in TASKS if getattr(settings, task)
        for dataset in settings.task(task).datasets
        for row in settings.encoders
        for defense in DEFENSE if defense in row.defenses
    ]  # fmt: skip
    found, lost, shown = [], [], set()
    for task, dataset, row, defense in track(rows, desc="sanity checks"):
        place = {"task": task, "dataset": dataset, "encoder": row.name, "defense": defense}
        with skipping(settings, lost, [place]):
            found.append(check(task, dataset, row, defense, settings))
            shown.add(records.checks_path(settings.profile, *place.values()))
    for path in set((records.results_dir(settings.profile) / "sanity").glob("*/*.json")) - shown:
        path.unlink()  # the settings no longer ask for it; it stays where it is stored
    records.write_skipped(settings.profile, "sanity", lost)
    return found


def check(task: str, dataset: str, row: EncoderRow, defense: str, settings: Settings) -> Result:
    """The checks of one row: read if they were made from exactly these inputs, else made and written.

    {"task", "dataset", "encoder", "defense", "metric", "n", "attack" (settings), "cell": key of the task attack's cell,
    "checks": numbers, "flags": sentences} and where it was computed; beside it the statistics for trust/worst.py. They
    lie under their key in runs/<profile>/checks, with a copy of the row in results/<profile>. The row's worst case is
    then made anew with their attacks.
    """
    only = row.model_copy(update={"defenses": [defense]})
    *_, (_, epoch, weights) = deacl.variants(only, settings.profile, settings.data_root)
    model, test = evaluate.prepare(task, dataset, row, settings, defense, weights)
    source = source_of(task, dataset, row, model, settings)
    known = about(model, test, defense, source, settings)
    kept = (stored(known, settings) or _make(model, test, defense, source, known, settings)) | {"cell": known["cell"]}
    path = records.checks_path(settings.profile, *(known[key] for key in KEYS))
    records.write_record(kept, path)  # with the cell of now, if one of another version of the code was kept
    Worst(model, test, evaluate.WORST, settings, defense, epoch).run()
    return records.read_record(path)


def _make(
    model: TaskModel, test: Subset, defense: str, source: Source | None, known: Result, settings: Settings
) -> Result:
    """The checks of one row and the statistics of their images made and written; `known`: see about."""
    b = bench(model, test, defense, settings)
    found, said, stats = checks(b, source, settings)
    ordered = torch.empty_like(stats)
    ordered[b.order] = stats
    here = records.provenance(records.pick_device(settings.device))
    made = known | {"n": len(stats), "checks": found, "flags": said, **here}
    place = evaluate.checks_place(settings.profile, known, ".safetensors")
    records.write_tensors(records.packed(ordered), records.about(known["made_from"]), place)
    records.write_record(made, evaluate.checks_place(settings.profile, known))
    return made


# --- for the notebook and for the tables ---

COLUMNS = ["clean", "attack", "noise", "signs", "more_steps", "restarts", "transfer", "embed"]
ENDS = ["chance", "largest_eps", "monotone", "reaches_chance", "flags"]


def table(results: list[Result]) -> pd.DataFrame:
    """A row for each result: KEYS, metric, n, the metric's value under each of COLUMNS and its chance, its value at the
    sweep's largest radius, whether the sweep is monotone and ends at chance, and how many flags there are.
    """
    rows = []
    for result in results:
        found = result["checks"]
        values = {name: found[name] and found[name]["value"] for name in COLUMNS}
        ends = {"largest_eps": found["sweep"][-1]["value"], "flags": len(result["flags"])}
        rows.append(result | found | values | ends)
    return pd.DataFrame(rows, columns=[*KEYS, "metric", "n", *COLUMNS, *ENDS])


def sentences(results: list[Result]) -> list[str]:
    return [f"{' '.join(row[key] for key in KEYS)}: {flag}." for row in results for flag in row["flags"]]
