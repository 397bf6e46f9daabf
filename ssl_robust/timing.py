"""Where the time of a run went: seconds of each stage, and of the attacks in it, as bars of text and for the page."""

from pathlib import Path
from typing import Any, NamedTuple

from . import records as disk

WIDTH = 32  # letters of the longest bar


class Stage(NamedTuple):
    """One stage: its seconds, those that its records say for evaluation and attacks, and its share of all stages."""

    name: str
    seconds: float
    cells: float
    share: float


def measured(profile: str) -> dict[str, float]:
    """Seconds that the runner measured for each notebook of `profile`; empty if they were run by hand."""
    paths = sorted(disk.runs_dir(profile).glob("*.time.json"))
    return {path.name.removesuffix(".time.json"): disk.read_json(path)["seconds"] for path in paths}


def stages(times: dict[str, float], records: list[dict[str, Any]]) -> list[Stage]:
    """The stages of `make paper` among `times` (notebooks' names start with a digit), in their order.

    `cells` is 0 where the records took longer than the stage: then they were kept from an earlier run.
    """
    ours = {name: seconds for name, seconds in sorted(times.items()) if name[:1].isdigit()}
    total, found = sum(ours.values()), []
    for name, seconds in ours.items():
        own = [r for r in records if Path(r["notebook"]).stem == name]
        cells = sum(same["seconds"] for r in own for same in [r, *r.get("over_seeds", ())])
        found.append(Stage(name, seconds, cells if cells <= seconds else 0.0, seconds / total if total else 0.0))
    return found


def text(times: dict[str, float], records: list[dict[str, Any]]) -> str:
    """A line for each stage with its seconds, share and bar ('#': table cells, '-': the rest); '' without times."""
    found = stages(times, records)
    if not found:
        return ""
    longest, name = max(s.seconds for s in found) or 1, max(len(s.name) for s in found)
    total, cells = sum(s.seconds for s in found), sum(s.cells for s in found)
    lines = [f"Where the time went: {total:.0f} s (#: attacks and their evaluation, {cells:.0f} s; -: the rest)"]
    if not cells:  # everything was kept from an earlier run
        lines = [f"Where the time went: {total:.0f} s"]
    for stage in found:
        inner = round(WIDTH * stage.cells / longest)
        bar = ("#" * inner).ljust(round(WIDTH * stage.seconds / longest), "-")
        lines.append(f"  {stage.name:{name}} {stage.seconds:6.0f} s {stage.share:4.0%}  {bar}".rstrip())
    return "\n".join(lines)


def bars(times: dict[str, float], records: list[dict[str, Any]]) -> list[tuple[str, float, float, str]]:
    """(name, seconds, seconds of its table cells, words) of each stage, as layout.html_bars takes them."""
    return [(s.name, s.seconds, s.cells, f"{s.seconds:.0f} s, {s.share:.0%}") for s in stages(times, records)]
