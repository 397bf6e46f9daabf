"""How a cell came about: python -m ssl_robust.ops.explain --profile demo table1/scenes/embedded_vit/standard/task.

Prints the record, what speaks against it, and the command that makes this cell alone again.
Exit codes: 0 shown, 2 bad input.
"""

import argparse
import shlex
import sys
from typing import Any

import yaml

from .. import records as disk
from ..progress import any_terminal
from ..settings import Attack, BadInput
from ..show import report
from ..show.committed import place_of
from ..trust import evidence

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


def _data(profile: str) -> str:
    """The data folder that the profile's notebooks were executed with; '' if none or unknown."""
    for path in sorted(disk.runs_dir(profile).glob("*.ipynb")):
        try:
            return disk.read_json(path)["metadata"]["papermill"]["parameters"]["data_root"]
        except (BadInput, KeyError, TypeError):  # a notebook that has no need of data
            continue
    return ""


def command(profile: str, record: Record) -> str:
    """The shell command that makes this cell alone again: make does so where its stored result is not there."""
    name = "__".join([*(record[part] for part in evidence.CELL), record["key"]]).replace("/", "_")  # no other folder
    stored = disk.runs_dir(profile) / "cells" / name
    paths = [f"{stored.relative_to(disk.ROOT).as_posix()}{suffix}" for suffix in (".json", ".safetensors")]
    make = ["make", place_of(record)[0], *([f"PROFILE={profile}"] if profile != "demo" else [])]
    if data := _data(profile):
        make.append(f"DATA={data}")
    return f"{shlex.join(['rm', '-f', *paths])} && {shlex.join(make)}"


def text(cell: str, profile: str) -> str:
    """All that is known of CELL, as text. Raises BadInput for an unknown one."""
    folder = report.folder_of(profile)
    record = find(cell, report.read(profile, folder)[0])
    shown = {name: value for name, value in record.items() if name not in LONG}
    shown |= {"flags": evidence.reasons(record), "seeds": [r["value"] for r in record["over_seeds"]]}
    if attack := record["settings"]["attack"]:
        shown["settings"] = record["settings"] | {"attack": Attack(**attack).model_dump(context="written")}
    lines = [f"{'/'.join(place_of(record))} of profile '{profile}', from {folder.relative_to(disk.ROOT).as_posix()}"]
    lines += [yaml.safe_dump(shown, sort_keys=False, width=120), f"Made again, alone, by\n  {command(profile, record)}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    any_terminal()
    parser = argparse.ArgumentParser(
        prog="python -m ssl_robust.ops.explain", description="How one table cell came about."
    )
    parser.add_argument("cell", metavar="CELL", help=FORM)
    parser.add_argument("--profile", default="demo", help="name of a file in params/ without .yaml")
    arguments = parser.parse_args(argv)
    try:
        print(text(arguments.cell, arguments.profile))
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
