"""The committed run of a profile: how far a new one is from it, and how a new one takes its place (make example)."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from .. import records as disk
from ..progress import any_terminal
from ..settings import BadInput, read_params
from ..tasks import TASKS
from ..trust import differ, evidence

Record = dict[str, Any]
Pair = tuple[Record, Record]  # of the same cell: the new record, the committed one
PAGES = ("fig1.*", "index.html")  # what shows images


def place_of(record: Record) -> tuple[str, ...]:
    """Where a value stands: table, data set, encoder, defense, attack."""
    names = (record[name] for name in ("dataset", "encoder", "defense", "attack"))
    return f"table{TASKS[record['task']].number}", *names


def _cells(folder: Path) -> dict[tuple[str, ...], Record]:
    """The records below `folder` whose values stand in the tables, by their place there."""
    return {place_of(r): r for r in evidence.read(folder) if r["defense"] in ("standard", "deacl")}


def apart(pair: Pair) -> float:
    """How far two values are apart, in standard errors of their difference."""
    here, there = pair
    gap = abs(here["value"] - there["value"])
    return gap and gap / max(math.hypot(here["se"], there["se"]), 1e-12)


def verdict(profile: str) -> str:
    """How the tables' values agree with those of the committed run of `profile`, which do so least, and why; empty
    where there is no such run.
    """
    here, there = _cells(disk.results_dir(profile)), _cells(disk.committed_dir(profile) / "records")
    if not here or not there:
        return ""
    pairs = [(here[place], there[place]) for place in here if place in there]
    came = disk.committed_dir(profile).relative_to(disk.ROOT).as_posix()
    lines = [f"Beside the committed run of this profile ({came}):"]
    changed = any(map(apart, pairs))
    if changed:
        near, far = sum(apart(pair) <= 2 for pair in pairs), max(pairs, key=apart)
        numbers = " here, ".join(f"{r['value']:.3f} ± {r['se']:.3f}" for r in far)
        most = f"{apart(far):.1f} standard errors: {'/'.join(place_of(far[0]))}, {numbers} there"
        lines.append(f"{near} of {len(pairs)} values of the tables lie within two standard errors of the difference.")
        lines.append(f"The largest difference, {most}.")
    elif pairs:
        lines.append(f"{len(pairs)} of {len(pairs)} values of the tables are the same.")
    if alone := len(here.keys() ^ there.keys()):
        lines.append(f"Values in one of the two runs only: {alone}.")
    causes = dict.fromkeys(name for pair in pairs for name in differ.differing(*pair))
    if causes and changed:
        lines.append(f"The records differ in {', '.join(causes)}.")
    return "\n  ".join(lines)


def replace(profile: str) -> str:
    """Put what the last run wrote to figures/<profile> in the place of the committed run; returns what was done.

    Executed notebooks come along, to be read where nothing is run. What shows images of others stays out. Raises
    BadInput without a run, or if changed code made its records.
    """
    source, target = disk.figures_dir(profile), disk.committed_dir(profile)
    params, found = disk.ROOT / "params" / f"{profile}.yaml", disk.read_records(source / "records")
    read_params(params)  # for what it raises
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
    shutil.copy(params, target / "params.yaml")
    for path in sorted(disk.runs_dir(profile).glob("0*.ipynb")) * (not left_out):
        disk.write_bytes(readable(path, profile).encode(), target / "notebooks" / path.name)
    kept = f", without {' and '.join(left_out)}, which show images of others" if left_out else ""
    return f"{target.relative_to(disk.ROOT).as_posix()} is now what the last run made{kept}; look at it and commit it."


def readable(path: Path, profile: str) -> str:
    """An executed notebook as it is shown to those who run nothing: without places on the machine and widgets."""
    notebook = disk.read_json(path)
    for part in (notebook, *notebook["cells"]):
        for name in ("papermill", "widgets", "execution"):
            part["metadata"].pop(name, None)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    return text.replace(f"{disk.ROOT}/", "").replace(f"../../figures/{profile}/", "../")


if __name__ == "__main__":
    any_terminal()
    try:
        print(replace(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except BadInput as error:
        sys.exit(str(error))
