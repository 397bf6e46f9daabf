"""Which stages of `make paper` are done, what others will make and why: python -m ssl_robust.ops.stages --profile P.

A stage is done if its notebook was executed as it is now, with the profile's parameters, and all its results are there
by their keys (wanted.py) and shown. Prints the names of the others, for make, and on stderr what is said before a run.
--keep accepts results whose only difference is a version of the code. Exit codes as of run.py.
"""

import argparse
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

from .. import records
from ..progress import any_terminal
from ..settings import BadInput, Settings
from ..show import report
from ..tasks import TASKS
from ..trust import data, differ
from . import plan, run, wanted
from .wanted import Wanted

STEP = {"deacl": "02_deacl", "checks": "07_sanity"}  # of what is no head, cell or example
FILES = {**{TASKS[task].notebook: (f"table{n}.csv",) for n, task in enumerate(TASKS, 1)},
         "06_figures": ("index.html", "fig1.png", "fig2.csv", "fig2.png"), "07_sanity": ("sanity.png",)}  # fmt: skip
NAMES = {"deacl": "DeACL runs", "head": "heads", "cell": "table cells", "checks": "rows of checks",
         "examples": "panels of Figure 1"}  # fmt: skip
FEW = 3  # reasons that are named


def stage_of(job: wanted.Job) -> str:
    """The notebook that makes a result."""
    if job["step"] == "head" and job["defense"] == "standard":
        return "01_heads"
    return STEP.get(job["step"]) or TASKS[job["task"]].notebook


def undone(settings: Settings, found: list[Wanted] | None) -> dict[str, str]:
    """The stages that are not done, in their order, with the reason of each in a few words; see plan.looked_for."""
    if found is None:
        return dict.fromkeys(plan.STAGES, "its results are not there")
    reasons = {name: _why_not(name, settings, found) for name in plan.STAGES}
    if any(reasons[TASKS[task].notebook] for task in TASKS):
        reasons["06_figures"] = reasons["06_figures"] or "the tables are made anew"
    return {name: why for name, why in reasons.items() if why}


def _why_not(stage: str, settings: Settings, found: list[Wanted]) -> str:
    why = run.not_executed(stage, settings)
    if why:
        return why
    mine = [w for w in found if stage_of(w.job) == stage]
    if absent := sum(not w.there for w in mine):
        return f"{absent} of {len(mine)} results are not there"
    if stage == "00_data" and records.need(settings.profile, stage).get("hashes") != data.hashes(settings):
        return "the data are others"
    if gone := _gone(stage, records.figures_dir(settings.profile)):
        return f"{gone[0]} is gone"
    shown = dict(pair for w in mine for pair in w.shown)
    if any(_key(path) != key for path, key in shown.items()):
        return "what is in results/ is not what was made"
    if set(_shown_by(stage, settings)) - set(shown):
        return "results/ shows rows that are not asked for"
    if stage == "06_figures" and run.shown_by(stage, settings.profile) != run.shown(settings.profile):
        return "the tables are others"
    return ""


def _gone(stage: str, home: Path) -> list[str]:
    """Files of a stage that are not there; of Figure 2 there is no picture where its table has no row."""
    table = home / "fig2.csv"
    empty = table.is_file() and len(table.read_text().splitlines()) < 2
    return [n for n in FILES.get(stage, ()) if not (home / n).is_file() and (n, empty) != ("fig2.png", True)]


def _key(path: Path) -> str:
    """The key of what a file of results/ shows, or the file that it names; '' if it is gone or damaged."""
    try:
        content = records.read_json(path)
        return content if isinstance(content, str) else records.read_record(path)["key"]
    except (BadInput, KeyError):
        return ""


def _shown_by(stage: str, settings: Settings) -> list[Path]:
    """The files of results/<profile> that tables take from a stage."""
    home = records.results_dir(settings.profile)
    task = next((task for task in TASKS if TASKS[task].notebook == stage), "")
    if task:
        return [path for part in (task, f"seeds/*/{task}") for path in home.glob(f"{part}/*__*__*__*.json")]
    return [*home.glob("sanity/*/*__*__*.json")] if stage == "07_sanity" else []


# --- what is said before a run ---


def text(settings: Settings, found: list[Wanted] | None) -> str:
    """N of M results are there, what will be made and why, and the time that takes here; see plan.looked_for."""
    if found is None:
        seconds = plan.remaining(settings, plan.jobs_of(settings), list(plan.STAGES))
        return f"{settings.profile}: no results are there; about {plan.duration(seconds)} to go here."
    absent, stages = [w for w in found if not w.there], undone(settings, found)
    head = f"{settings.profile}: {len(found) - len(absent)} of {len(found)} results are there"
    if not stages:
        return f"{head}, and every notebook has been run."
    lines = [f"{head}; about {plan.duration(plan.remaining(settings, [w.job for w in absent], [*stages]))} to go here."]
    for step in wanted.STEPS:
        made = [w for w in absent if w.job["step"] == step]
        if made:
            lines.append(f"  {len(made)} {NAMES[step]} to be made: {_reasons(made)}")
    if any(w.why and all(why.startswith(differ.SAID["loops"]) for why in w.why) for w in absent):
        lines.append("  Those that differ in the code's version alone are accepted by: make keep")
    lines += [f"  {name} to be run: {why}" for name, why in stages.items() if "not there" not in why]
    return "\n".join(lines)


def _reasons(made: list[Wanted]) -> str:
    """Why results are made, the most frequent reasons first."""
    counted = Counter(", ".join(w.why) if w.why else "" for w in made)
    words = [f"{times} for {why}" for why, times in counted.most_common() if why][:FEW]
    if fresh := counted[""]:
        words.append(f"{fresh} not there yet")
    return "; ".join(words)


def to_run(settings: Settings) -> list[str] | None:
    """Says on stderr what is said before a run; the stages that are not done, None if something stops them."""
    with redirect_stdout(sys.stderr):
        stop, warn = run.everything_wrong(settings)
        print("\n".join([*(f"Warning: {sentence}" for sentence in warn), *stop]), end="\n" * bool(stop or warn))
        if stop:
            return None
        found = plan.looked_for(settings)
        print(text(settings, found), flush=True)
    return [*undone(settings, found)]


def answer(settings: Settings) -> int:
    """Print the stages that are not done, for make; returns the exit code."""
    names = to_run(settings)
    print(*(names or ()))
    return run.BAD_INPUT if names is None else 0


def run_all(settings: Settings) -> int:
    """Run the stages that are not done one after the other, then make all tables and figures; returns the exit code."""
    names = to_run(settings)
    if names is None:
        return run.BAD_INPUT
    for name in sorted(names, key=lambda name: name == "06_figures"):  # last, as it shows what the others found
        if code := run.run(name, settings):
            return code
    print(report.main(settings.profile))
    return 0


def keep(settings: Settings) -> int:
    """Accept results whose only difference is a version of the code, and say how many; returns the exit code."""
    before, _ = wanted.results(settings)
    records.keeping = True
    after, _ = wanted.results(settings)
    records.keeping = False
    kept = sum(w.there for w in after) - sum(w.there for w in before)
    print(f"{settings.profile}: {kept} results that other versions of the code made are kept, and say so.")
    print(text(settings, after))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    any_terminal()
    parser = argparse.ArgumentParser(prog="python -m ssl_robust.ops.stages", description="Which stages are not done.")
    parser.add_argument("--profile", default="demo", help="name of a file in params/ without .yaml")
    parser.add_argument("--data", default="", help="folder of the real data sets, in place of the profile's data_root")
    for option, about in (("run", "run them"), ("keep", "accept results that other versions of the code made")):
        parser.add_argument(f"--{option}", action="store_true", help=about)
    arguments = parser.parse_args(argv)
    chosen = keep if arguments.keep else run_all if arguments.run else answer
    return run.guarded(lambda: run.look(arguments.profile, arguments.data, chosen))


if __name__ == "__main__":
    sys.exit(main())
