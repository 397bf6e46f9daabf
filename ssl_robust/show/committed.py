"""The committed run of a profile: how far a new one is from it, and how a new one takes its place (make example)."""

import math
import shutil
import sys
from pathlib import Path
from typing import Any

from .. import records as disk
from ..progress import any_terminal
from ..settings import BadInput, DeACL, read_params, read_yaml
from ..tasks import TASKS
from ..trust import differ, evidence

Record = dict[str, Any]
Pair = tuple[Record, Record]  # of the same cell: the new record, the committed one
SETTINGS = ("the protocol", "the setting", "the seed", "the epochs", "the number of images")  # of differ.SAID
PAGES = ("fig1.*", "index.html")  # what shows images


def place_of(record: Record) -> tuple[str, ...]:
    """Where a value stands: table, data set, encoder, defense, attack."""
    names = (record[name] for name in ("dataset", "encoder", "defense", "attack"))
    return f"table{TASKS[record['task']].number}", *names


def params_path(profile: str) -> Path:
    """The parameters that the committed run was made with."""
    return disk.committed_dir(profile) / "params.yaml"


def _own_params(profile: str) -> Path:
    return disk.ROOT / "params" / f"{profile}.yaml"


def _tuning(path: Path) -> dict[str, Any]:
    """DeACL's settings in a parameter file, which records do not have; empty without them."""
    found = read_yaml(path, path.name) if path.is_file() else {}
    return DeACL().model_dump() | found["deacl"] if found.get("deacl") else {}


def _cells(folder: Path, tuning: dict[str, Any]) -> dict[tuple[str, ...], Record]:
    """The records below `folder` whose values stand in the tables, by their place there, DeACL's with its settings."""
    found = {place_of(r): r for r in evidence.read(folder) if r["defense"] in ("standard", "deacl")}
    more = {"standard": {}, "deacl": {"deacl": tuning}}
    return {place: r | {"settings": r["settings"] | more[r["defense"]]} for place, r in found.items()}


def _both(profile: str) -> tuple[dict[tuple[str, ...], Record], dict[tuple[str, ...], Record]]:
    """The cells of the new run and of the committed one."""
    tunings = [_tuning(path) for path in (_own_params(profile), params_path(profile))]
    tunings = tunings if all(tunings) else [{}, {}]
    folders = disk.results_dir(profile), disk.committed_dir(profile) / "records"
    here, there = (_cells(folder, tuning) for folder, tuning in zip(folders, tunings, strict=True))
    return here, there


def _apart(pair: Pair) -> float:
    """How far two values are apart, in standard errors of their difference."""
    here, there = pair
    apart = abs(here["value"] - there["value"])
    return apart and apart / max(math.hypot(here["se"], there["se"]), 1e-12)


def _differing(pairs: list[Pair]) -> dict[str, str]:
    """What differs within the pairs, each once: its name -> that and its values, if they are the same everywhere."""
    values: dict[str, set[tuple[str, str]]] = {}
    for here, there in pairs:
        for name, (one, other) in differ.differing(here, there).items():
            values.setdefault(name, set()).add((str(one), str(other)))
    return {name: _with_values(name, *found) for name, found in values.items()}


def _with_values(name: str, first: tuple[str, str], *more: tuple[str, str]) -> str:
    return name if more or "hash" in name else f"{name} ({first[0]} here, {first[1]} there)"


def _asked(pair: Pair) -> bool:
    """Whether two records are of different settings, so that their values are no two tries of the same."""
    return any(name.startswith(SETTINGS) for name in differ.differing(*pair))


def _values(number: int) -> str:
    return f"{number} value{' is' if number == 1 else 's are'}"


def verdict(profile: str) -> str:
    """How the tables' values agree with those of the committed run of `profile`; empty where there is no such run."""
    here, there = _both(profile)
    if not here or not there:
        return ""
    pairs = [(here[place], there[place]) for place in here if place in there]
    like, other = ([pair for pair in pairs if _asked(pair) == changed] for changed in (False, True))
    came = disk.committed_dir(profile).relative_to(disk.ROOT).as_posix()
    lines = [f"Beside the committed run of this profile ({came}):", *_agreement(like)]
    if other:
        changed = [words for name, words in _differing(other).items() if name.startswith(SETTINGS)]
        lines.append(f"{_values(len(other))} of other settings and not compared: {', '.join(changed)}.")
    if alone := len(here.keys() ^ there.keys()):
        lines.append(f"{_values(alone)} in one of the two runs only.")
    if causes := [words for name, words in _differing(pairs).items() if not name.startswith(SETTINGS)]:
        lines.append(f"What differs{' besides' if other else ''}: {', '.join(causes)}.")
    return "\n  ".join(lines)


def _agreement(pairs: list[Pair]) -> list[str]:
    """How many pairs of values agree, and which do so least."""
    if not any(map(_apart, pairs)):
        return [f"{len(pairs)} of {len(pairs)} values of the tables are the same."] if pairs else []
    near, far = sum(_apart(pair) <= 2 for pair in pairs), max(pairs, key=_apart)
    numbers = " here, ".join(f"{r['value']:.3f} ± {r['se']:.3f}" for r in far)
    return [
        f"{near} of {len(pairs)} values of the tables lie within two standard errors of the difference.",
        f"The largest difference, {_apart(far):.1f} standard errors: {'/'.join(place_of(far[0]))}, {numbers} there.",
    ]


def replace(profile: str) -> str:
    """Put what the last run wrote to figures/<profile> in the place of the committed run; returns what was done.

    Pages that show images of others stay out. Raises BadInput without a run, or if changed code made its records.
    """
    source, target, params = disk.figures_dir(profile), disk.committed_dir(profile), _own_params(profile)
    read_params(params)  # for what it raises
    found = disk.read_records(source / "records")
    if not source.is_dir():
        raise BadInput(f"There is nothing in figures/{profile}; run 'make paper PROFILE={profile}' first.")
    if vague := sorted({r["git"] for r in found if r["git"].endswith("+") or r["git"] == "unknown"}):
        raise BadInput(
            f"Records in figures/{profile} were made by code that no commit has ({vague[0]}); commit it, then repeat "
            f"'make clean PROFILE={profile}' and 'make paper PROFILE={profile}'."
        )
    left_out = PAGES if any(r["dataset"] != "scenes" for r in found) else ()
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("lab", *left_out))
    shutil.copy(params, params_path(profile))
    kept = f", without {' and '.join(left_out)}, which show images of others" if left_out else ""
    return f"{target.relative_to(disk.ROOT).as_posix()} is now what the last run made{kept}; look at it and commit it."


def main(profile: str) -> int:
    """Command line; returns the exit code."""
    any_terminal()
    try:
        print(replace(profile))
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
