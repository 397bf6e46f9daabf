"""How a cell came about: python -m ssl_robust.ops.explain --profile demo table1/scenes/embedded_vit/standard/task.

Prints the record, what speaks against it, the executed notebook and the command that makes this cell alone again. Exit
codes: 0 done, 2 bad input, said in one sentence on stderr.
"""

import argparse
import difflib
import json
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import records as disk
from ..progress import any_terminal
from ..settings import BadInput
from ..show import report
from ..tasks import TASKS
from ..trust import evidence, paired

Record = dict[str, Any]
Place = tuple[str, ...]  # table1, dataset, encoder, defense, attack

PARTS = ("table", "data set", "encoder", "defense", "attack")
FORM = "TABLE/DATASET/ENCODER/DEFENSE/ATTACK, for example table1/scenes/embedded_vit/standard/task"
WIDTH = 12


def place_of(record: Record) -> Place:
    """The CELL that a record fills; a skipped row, which has no attack, gives four parts."""
    names = [record[name] for name in ("dataset", "encoder", "defense", "attack") if name in record]
    return f"table{TASKS[record['task']].number - 1 + 1}", *names


def find(cell: str, records: list[Record], skipped: list[Record]) -> Record:
    """The record of CELL, or the skipped row that it lies in.

    Raises BadInput that names the first part which is not known, the known ones and the nearest of them.
    """
    wanted = tuple(cell.strip("/").split("/"))
    if len(wanted) != len(PARTS):
        raise BadInput(f"CELL '{cell}' has {len(wanted)} parts; write {FORM}.")
    there = {place_of(r): r for r in records}
    if wanted in there:
        return there[wanted]
    rows = {place_of(r): r for r in skipped}
    if wanted[:-1] in rows:
        return rows[wanted[:-1]]
    raise BadInput(_unknown(cell, wanted, [*there, *rows]))


def _unknown(cell: str, wanted: Place, places: list[Place]) -> str:
    """Which part of CELL is not known among those that go on from the parts before."""
    for i, (part, name) in enumerate(zip(PARTS, wanted, strict=True)):
        known = sorted({p[i] for p in places if p[:i] == wanted[:i] and len(p) > i})
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.4)
            hint = f"did you mean '{near[0]}', of the known ones" if near else "write one of the known ones"
            return f"There is no {part} '{name}' for CELL '{cell}'; {hint}: {', '.join(known) or 'none'}."
    return f"There is no CELL '{cell}'; write {FORM}."


def _line(name: str, words: Any) -> str:
    return f"  {name:{WIDTH}} {words}"


def _listed(name: str, sentences: list[str]) -> list[str]:
    """Sentences, each on a line of its own; 'none' without one."""
    return [_line(name if i == 0 else "", f"- {s}") for i, s in enumerate(sentences)] or [_line(name, "none")]


def _pairs(content: dict[str, Any]) -> str:
    """'eps 0.0314, steps 20': the entries of a dict, those of dicts in it too, numbers short."""
    return ", ".join(f"{key} {_short(value)}" for key, value in content.items()) or "none"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_pairs(value)})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _numbers(record: Record) -> list[str]:
    """Value, its spread over seeds, and what to compare it with."""
    unit = " m" if record["metric"] == "RMSE" else ""
    lines = [_line(record["metric"], f"{record['value']:.4f} ± {record['se']:.4f}{unit} (standard error)")]
    lines.append(_line("images", f"{record['n']}; the majority or mean baseline is {record['chance']:.4f}{unit}"))
    values = evidence.seed_values(record)
    if len(values) > 1:
        seeds = [record["seed"], *(r["seed"] for r in record["over_seeds"])]
        pairs = ", ".join(f"{seed}: {value:.4f}" for seed, value in zip(seeds, values, strict=True))
        lines.append(_line("seeds", pairs))
    if record.get("damaged"):
        lines.append(_line("left out", f"{record['damaged']} unreadable images"))
    return lines


def _making(record: Record) -> list[str]:
    """Attack, settings, hashes, versions and machine."""
    settings = record["settings"]
    attack = "none" if record["attack"] == "clean" else f"{record['attack_name']}: {_pairs(settings['attack'] or {})}"
    lines = [
        _line("attack", attack),
        _line("largest", f"|x' - x| of {record['max_perturbation'] * 255:.3f}/255"),
        _line("protocol", _short(record.get("protocol", "paper"))),
        _line("task", _pairs(settings["task"])),
        _line("seed", record["seed"]),
        _line("hashes", _pairs(record["hashes"])),
        _line("versions", _pairs(record["versions"])),
        _line("device", f"{record['device']}, {record['threads']} threads"),
        _line("made", f"{record['made']} in {record['seconds']:.1f} s by commit {record['git']}"),
    ]
    optional = ("precision", "batch", "epoch", "chosen", "checked", "kept", "numerics")
    return lines + [_line(name, _short(record[name])) for name in optional if name in record]


def _doubts(record: Record, folder: Path) -> list[str]:
    """Health of the attack, and the flags of the record and of its row."""
    health = {k: v for k, v in (record.get("health") or {}).items() if k != "flags"}
    row = evidence.sanity_flags(folder).get(record["key"], [])
    own = evidence.own_flags(record)
    return [_line("health", _pairs(health)), *_listed("flags", own), *_listed("row's flags", row)]


def _against_standard(record: Record, records: list[Record]) -> list[str]:
    """DeACL - Standard on the same images, if this is a cell of one and the other is there."""
    others = {r["defense"]: r for r in records if place_of(r)[:3] == place_of(record)[:3]
              and r["attack"] == record["attack"]}  # fmt: skip
    if record["defense"] not in ("standard", "deacl") or not {"standard", "deacl"} <= set(others):
        return []
    found = paired.difference(others["standard"], others["deacl"])
    if found is None:
        return []
    words = f"{found.value:+.4f}, 95 % interval [{found.low:+.4f}, {found.high:+.4f}], paired over the images"
    return [_line("DeACL-Standard", words)]


def _executed(record: Record) -> Path | None:
    """The executed notebook that a record names; None if it names none, or a place that is no such file's."""
    runs = (disk.ROOT / "runs").resolve()
    path = (disk.ROOT / record["notebook"]).resolve() if record["notebook"] else runs
    return path if path.suffix == ".ipynb" and path.is_relative_to(runs) else None


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


def _notebook(record: Record) -> str:
    """The executed notebook in which a number was made, if it is still that, or why there is none."""
    path = _executed(record)
    if path is None:
        return "none: it was made in JupyterLab, by a job or by a script"
    if not path.is_file():
        return f"{record['notebook']} (not here: it is left where the notebooks were run)"
    try:
        run = disk.read_json(path.with_suffix(".time.json"))
        since = datetime.fromisoformat(record["made"]).timestamp() - run["started"]
        made = -1 <= since <= run["seconds"] + 1  # times are in whole seconds
    except (BadInput, KeyError, TypeError, ValueError):
        made = False
    return record["notebook"] if made else f"none: {record['notebook']} shows it, but an earlier run of it made it"


def text(cell: str, profile: str) -> str:
    """All that is known of CELL, as text; of a row that was skipped, why. Raises BadInput for an unknown one."""
    folder = report.folder_of(profile)
    records, skipped = report.read(profile, folder)
    record = find(cell, records, skipped)
    where = folder.relative_to(disk.ROOT).as_posix()
    title = f"{'/'.join(place_of(record))} of profile '{profile}'"
    if "value" not in record:
        return f"{title} was not run, because: {record['why'].rstrip('.')}."
    lines = [f"{title}, from {where}"]
    if folder != disk.results_dir(profile):
        came = disk.committed_dir(profile) / "records"
        kind = "record that came with the project" if folder == came else "copy with the figures"
        lines.append(f"There are no results in results/{profile}; this is the {kind}.")
    lines += [*_numbers(record), *_against_standard(record, records), *_doubts(record, folder), *_making(record)]
    if others := _committed(record, profile, folder):
        lines += _listed("committed", disk.differences(record, others[0]))
    lines += [_line("notebook", _notebook(record)), "Only this cell is made again by"]
    return "\n".join([*lines, f"  {command(profile, record)}"])


def _committed(record: Record, profile: str, folder: Path) -> list[Record]:
    """The record of the same cell that came with the project, if it is another one."""
    came = disk.committed_dir(profile) / "records"
    return [] if folder == came else [r for r in disk.read_records(came) if place_of(r) == place_of(record)]


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
