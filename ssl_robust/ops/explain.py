"""How a cell came about: python -m ssl_robust.ops.explain --profile demo table1/scenes/embedded_vit/standard/task.

Prints the record, what speaks against it, and the command that makes this cell again, alone; --again does that, and
says whether it is the same, within its error, or differs, and why. Exit codes as of run.py.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from .. import records as disk
from ..progress import any_terminal
from ..settings import Attack, BadInput, Settings
from ..show import committed, report
from ..show.committed import place_of
from ..tasks import TASKS
from ..trust import differ, evidence
from . import run

Record = dict[str, Any]
FORM = "TABLE/DATASET/ENCODER/DEFENSE/ATTACK, for example table1/scenes/embedded_vit/standard/task"
LONG = ("statistics", "over_seeds", "reasons", "made_from")  # of a record, not printed


def find(cell: str, records: list[Record]) -> Record:
    """The record of CELL, whose attack may be called as in tables, capitals or not; BadInput that lists the cells."""
    there = {"/".join(place_of(r)): r for r in records}
    shown = {"/".join([*place_of(r)[:-1], r["attack_name"]]).lower(): r for r in records}
    asked = cell.strip("/").lower()
    found = {name.lower(): r for name, r in there.items()}.get(asked) or shown.get(asked)
    if not found:
        raise BadInput(f"There is no CELL '{cell}'; write one of: {', '.join(sorted(there))}.")
    return found


def command(profile: str, record: Record) -> str:
    """The shell command that makes this cell again, alone."""
    given = {"PROFILE": profile if profile != "demo" else "", "DATA": _data(profile)}
    words = [f"CELL={'/'.join(place_of(record))}", *(f"{name}={value}" for name, value in given.items() if value)]
    return shlex.join(["make", "remake", *words])


def _data(profile: str) -> str:
    """The data folder that the profile's notebooks were executed with; '' if none or unknown."""
    for path in sorted(disk.runs_dir(profile).glob("*.ipynb")):
        try:
            return disk.read_json(path)["metadata"]["papermill"]["parameters"]["data_root"]
        except (BadInput, KeyError, TypeError):  # a notebook that has no need of data
            continue
    return ""


def text(cell: str, profile: str) -> str:
    """All that is known of CELL, as text. Raises BadInput for an unknown one."""
    folder = report.folder_of(profile)
    record = find(cell, report.read(profile, folder)[0])
    shown = {name: value for name, value in record.items() if name not in LONG}
    shown |= {"flags": evidence.reasons(record), "seeds": [r["value"] for r in record["over_seeds"]]}
    if attack := record["settings"]["attack"]:
        shown["settings"] = record["settings"] | {"attack": Attack(**attack).model_dump(context="written")}
    lines = [f"{'/'.join(place_of(record))} of profile '{profile}', from {folder.relative_to(disk.ROOT).as_posix()}"]
    lines += [
        yaml.safe_dump(shown, sort_keys=False, width=120),
        f"Made again, alone, by\n  {command(profile, record)}",
    ]
    return "\n".join(lines)


# --- the cell made again ---


def again(cell: str, settings: Settings) -> str:
    """Make CELL again by the present settings, its head and DeACL too if they are not there; how it agrees with before.

    What is stored of it is replaced. Raises BadInput for an unknown cell or one that is not asked for.
    """
    from .. import evaluate  # here, as these import torch, which takes seconds that explain does not need
    from . import grid, wanted

    folder = report.folder_of(settings.profile)
    before = find(cell, report.read(settings.profile, folder)[0])
    if before["attack"] == evaluate.WORST:
        raise BadInput("Worst follows from the other attacks of its row; write the CELL of one of them.")
    place = "/".join(place_of(before))
    # of the profile only this row and task, so that nothing else has to be there
    only = {task: None for task in TASKS if task != before["task"]} | {
        "encoders": [row for row in settings.encoders if row.name == before["encoder"]]
    }
    settings = settings.model_copy(update=only)
    jobs = {w.job["name"]: w.job for w in wanted.results(settings)[0]}
    mine = {"dataset": "dataset", "defense": "defense", "kind": "attack"}
    job = next((j for j in jobs.values() if all(j.get(name) == before[its] for name, its in mine.items())), None)
    if not job:
        raise BadInput(f"The profile '{settings.profile}' no longer asks for {place}; add its row or attack to it.")
    for name in jobs[job["needs"][0]]["needs"]:  # of its head: DeACL
        grid.compute(jobs[name], settings)
    made = grid.cell_of(job, settings)
    now, _ = made.write(*made.measured())
    made.run()  # has it shown in tables
    return "\n".join([f"{place} of profile '{settings.profile}'", *agreement(before, now, folder)])


def agreement(before: Record, now: Record, folder: Path) -> list[str]:
    """How a value made again agrees with the one before, in lines: the same, within its error, or differing."""
    numbers = [f"{r['value']:.4f} ± {r['se']:.4f}" for r in (before, now)]
    lines = [f"  before: {numbers[0]}, from {folder.relative_to(disk.ROOT).as_posix()}", f"  now:    {numbers[1]}"]
    images = sum(a != b for a, b in zip(before["statistics"], now["statistics"], strict=False))
    if before["statistics"] == now["statistics"]:
        return [*lines, f"  The same, and so is each of its {now['n']} images."]
    apart = committed.apart((now, before))
    word = "Within two standard errors of the difference" if apart <= 2 else "Differs"
    causes = ", ".join(name for name in differ.differing(now, before)) or "nothing that records hold"
    return [*lines, f"  {word} ({apart:.1f}); {images} of {now['n']} images differ, because these do: {causes}."]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    any_terminal()
    parser = argparse.ArgumentParser(prog="python -m ssl_robust.ops.explain", description="How a value came about.")
    parser.add_argument("cell", metavar="CELL", help=FORM)
    parser.add_argument("--profile", default="demo", help="name of a file in params/ without .yaml")
    parser.add_argument("--data", default="", help="folder of the real data sets, for --again")
    parser.add_argument("--again", action="store_true", help="make the value again, alone, and compare it")
    asked = parser.parse_args(argv)

    def work() -> int:
        if asked.again:
            print(again(asked.cell, run.read_profile(asked.profile, asked.data)))
        else:
            print(text(asked.cell, asked.profile))
        return 0

    return run.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
