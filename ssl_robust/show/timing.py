"""Where the time of a run went: seconds of each stage, and of the attacks in it, as bars of text and for the page."""

from typing import Any, NamedTuple

from .. import records as disk
from ..tasks import TASKS

WIDTH = 32  # letters of the longest bar
Times = dict[str, dict[str, float]]  # notebook: {"started": seconds since 1970, "seconds": how long it took}


class Stage(NamedTuple):
    """One stage: its seconds, those that its records say for evaluation and attacks, and its share of all stages."""

    name: str
    seconds: float
    cells: float
    share: float


def measured(profile: str) -> Times:
    """What the runner measured for each notebook of `profile`; empty if they were run by hand."""
    paths = sorted(disk.runs_dir(profile).glob("*.time.json"))
    found = {path.name.removesuffix(".time.json"): disk.read_json(path) for path in paths}
    return {name: {key: about[key] for key in ("started", "seconds")} for name, about in found.items()}


def _of_stages(times: Times) -> Times:
    """Those of `make paper` (notebooks' names start with a digit), in their order."""
    return {name: about for name, about in sorted(times.items()) if name[:1].isdigit()}


def stages(times: Times, records: list[dict[str, Any]]) -> list[Stage]:
    """The stages of `make paper` among `times`, in their order.

    `cells` is 0 where the records took longer than the stage: then they were kept from an earlier run.
    """
    ours = {name: about["seconds"] for name, about in _of_stages(times).items()}
    total, found = sum(ours.values()), []
    for name, seconds in ours.items():
        own = [r for r in records if TASKS[r["task"]].notebook == name]
        cells = sum(same["seconds"] for r in own for same in [r, *r.get("over_seeds", ())])
        found.append(Stage(name, seconds, cells if cells <= seconds else 0.0, seconds / total if total else 0.0))
    return found


def elapsed(times: Times) -> float:
    """Seconds in which at least one stage ran: less than their sum where two ran side by side."""
    passed, until = 0.0, 0.0
    for about in sorted(_of_stages(times).values(), key=lambda about: about["started"]):
        end = about["started"] + about["seconds"]
        passed += max(0.0, end - max(until, about["started"]))
        until = max(until, end)
    return passed


def total_words(times: Times) -> str:
    """'466 s', or, where notebooks ran side by side, '380 s (466 s of notebooks, side by side)'."""
    passed, total = elapsed(times), sum(about["seconds"] for about in _of_stages(times).values())
    return f"{passed:.0f} s" + (f" ({total:.0f} s of notebooks, side by side)" if total > passed + 1 else "")


def text(times: Times, records: list[dict[str, Any]]) -> str:
    """A line for each stage with its seconds, share and bar ('#': table cells, '-': the rest); '' without times."""
    found = stages(times, records)
    if not found:
        return ""
    longest, name = max(s.seconds for s in found) or 1, max(len(s.name) for s in found)
    cells = sum(s.cells for s in found)
    lines = [f"Where the time went: {total_words(times)}"]
    if cells:  # else everything was kept from an earlier run
        lines[0] += f"; #: attacks and their evaluation, {cells:.0f} s; -: the rest"
    for stage in found:
        inner = round(WIDTH * stage.cells / longest)
        bar = ("#" * inner).ljust(round(WIDTH * stage.seconds / longest), "-")
        lines.append(f"  {stage.name:{name}} {stage.seconds:6.0f} s {stage.share:4.0%}  {bar}".rstrip())
    return "\n".join(lines)


def bars(times: Times, records: list[dict[str, Any]]) -> list[tuple[str, float, float, str]]:
    """(name, seconds, seconds of its table cells, words) of each stage, as layout.html_bars takes them."""
    return [(s.name, s.seconds, s.cells, f"{s.seconds:.0f} s, {s.share:.0%}") for s in stages(times, records)]
