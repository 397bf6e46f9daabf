"""Executes a notebook with a profile's parameters: python -m ssl_robust.ops.run 00_data --profile demo [--data FOLDER].

In place of a notebook, --check says what is wrong or missing, --plan what would be done. The only module that knows
papermill. Exit codes: 0 done, 1 the notebook failed, 2 bad input, 130 interrupted, 138 the kernel died; whatever goes
wrong is said in one sentence on stderr.
"""

import argparse
import ast
import hashlib
import json
import logging
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

# Jupyter brings this check of addresses, which no notebook has; building its grammar takes longer than all else here.
sys.modules.setdefault("rfc3987_syntax", None)

import nbformat  # noqa: E402
import papermill  # noqa: E402
from papermill.exceptions import PapermillExecutionError  # noqa: E402
from papermill.iorw import LocalHandler, papermill_io  # noqa: E402
from traitlets.config import Config  # noqa: E402

from .. import records  # noqa: E402
from ..progress import any_terminal  # noqa: E402
from ..settings import NOTEBOOKS, PARAMS, BadInput, Settings, check, read_params  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs at once are not kept apart there
    fcntl = None

BAD_INPUT, INTERRUPTED, KERNEL_DIED = 2, 130, 138
MEMORY = ("OutOfMemoryError", "MemoryError", "failed to map segment", "allocate memory")  # how its lack is said
# A kernel that is told to stop may find its sockets closed, and would print a traceback (on a busy machine often).
QUIET_END = "__import__('logging').getLogger('tornado').setLevel(60)"
LEFT_BEHIND = 3600  # seconds after which an unfinished file belongs to a process that was killed
CHILDREN = {
    # Images of many sizes leave gaps in a GPU's memory that no tensor fits; segments that grow have none.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # Idle threads spin a little and then sleep. Endless spinning makes small steps many times slower on a machine with
    # other work; no spinning at all (OMP_WAIT_POLICY=PASSIVE) made them twice as slow on one without.
    "GOMP_SPINCOUNT": "1000",
    # Freed memory is kept for the next step (glibc). Fetching and clearing it anew each time took a third of the time
    # that training a depth head takes.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 2**30),
}


def read_profile(profile: str, data: str = "") -> Settings:
    """Validated settings of params/<profile>.yaml, `data` (a folder, relative to where one is) in place of data_root.

    Raises BadInput for an unknown profile or parameter, a bad value, or a data folder that does not exist.
    """
    settings = _settings(profile, data)
    problem = _data_problem(settings)
    if problem:
        raise BadInput(problem)
    return settings


def data_folder(settings: Settings, data: str) -> Path | None:
    """The data folder: `data`, relative to where one is, else data_root, relative to the project; None: not given."""
    if data:
        return Path(os.path.expanduser(data))  # unlike Path's own, it leaves the name of nobody's home as it is
    return records.ROOT / os.path.expanduser(settings.data_root) if settings.data_root else None


def _parameters(profile: str) -> dict[str, object]:
    """The raw parameters of a profile, whose name leads to no other folder."""
    if Path(profile).name != profile:
        raise BadInput(f"'{profile}' cannot be a profile; give the name of a file in params/ without folder and .yaml.")
    return read_params(PARAMS / f"{profile}.yaml")


def _settings(profile: str, data: str) -> Settings:
    """Those of read_profile, but their data folder need not exist."""
    settings = check(**_parameters(profile))
    folder = data_folder(settings, data)
    if folder is None:
        return settings
    # absolute, because notebooks run in a folder of their own
    root = str(folder.resolve()) if os.path.isdir(folder) else data or settings.data_root
    return settings.model_copy(update={"data_root": root})


def _data_problem(settings: Settings) -> str:
    if not settings.data_root or os.path.isabs(settings.data_root) and os.path.isdir(settings.data_root):
        return ""
    remedy = "name an existing one (make: DATA=FOLDER; python -m ssl_robust.ops.run: --data FOLDER)"
    return f"The data folder '{settings.data_root}' does not exist; {remedy}."


def wrong_parameters(profile: str) -> list[str]:
    """One sentence for each wrong top-level parameter of a profile; BadInput if there is no such profile."""
    parameters, found = _parameters(profile), []
    for name, value in parameters.items():
        try:
            check(**{"profile": "any", "encoders": [{"name": "embedded_vit"}], name: value})
        except BadInput as problem:
            found.append(str(problem))
    if not found:
        check(**parameters)  # what only shows when all are seen together
    return found


def declared(notebook: Path) -> list[str]:
    """Names that the notebook's parameters cell assigns; raises BadInput if there is no such notebook or cell."""
    if not os.path.isfile(notebook) or notebook.parent != NOTEBOOKS:
        known = ", ".join(sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
        raise BadInput(f"There is no notebook '{notebook.stem}' in notebooks/; choose one of: {known}.")
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except ValueError:
        raise BadInput(f"notebooks/{notebook.name} is damaged (not a valid notebook); restore it.") from None
    sources = [c.source for c in cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(sources) != 1:
        raise BadInput(f"notebooks/{notebook.name} has {len(sources)} cells tagged 'parameters'; it must have one.")
    try:  # read as code, because papermill's own reader goes by lines and stumbles over '=' inside values
        return [name for statement in ast.parse(sources[0]).body for name in _assigned(statement)]
    except SyntaxError as error:
        raise BadInput(
            f"The parameters cell of notebooks/{notebook.name} must give names plain values and do nothing else, but "
            f"does in line {error.lineno}; move that into another cell."
        ) from None


def _assigned(statement: ast.stmt) -> list[str]:
    """Names that one statement of a parameters cell gives plain values to; SyntaxError if it does anything else.

    What is derived from a value would stay as it is when that is replaced.
    """
    parts = [part for name in ("targets", "target", "value") for part in [getattr(statement, name, None)] if part]
    flat = [part for item in parts for part in (item if isinstance(item, list) else [item])]
    names = [node for part in flat for node in ast.walk(part) if isinstance(node, ast.Name)]
    plain = isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr)
    if not plain or not all(isinstance(node.ctx, ast.Store) for node in names):
        raise SyntaxError("", ("", statement.lineno, None, None))
    return [node.id for node in names]


def parameters_for(notebook: str, settings: Settings) -> dict[str, object]:
    """What the notebook declares of `settings`, defaults written out; raises BadInput if a section is not set."""
    values = settings.model_dump(context="written")
    chosen = {name: values[name] for name in declared(NOTEBOOKS / f"{notebook}.ipynb") if name in values}
    missing = [name for name, value in chosen.items() if value is None]
    if missing:  # the notebook's own default, the demo's, must not slip into another profile
        raise BadInput(
            f"Notebook {notebook} needs the section '{missing[0]}'; add it to params/{settings.profile}.yaml."
        )
    return chosen


def _say(profile: str, line: str) -> None:
    """Print a line, and add it with the time to runs/<profile>/paper.log."""
    print(line, flush=True)
    path = records.runs_dir(profile) / "paper.log"
    with suppress(OSError):  # a full disk is said by those whose results it takes
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


class _Terminal:
    """Shows what a notebook prints as it comes: whole lines, after the notebook's name (two may run at once)."""

    def __init__(self, notebook: str, profile: str) -> None:
        self.notebook, self.profile, self.rest = notebook, profile, ""

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            _say(self.profile, f"{self.notebook} | {line}")

    def flush(self) -> None:
        """Called by papermill after every write; lines are flushed when they are whole."""


class _Whole(LocalHandler):
    """How papermill writes executed copies: whole or not at all, and a full disk is said in one sentence."""

    def write(self, buf: str, path: str) -> None:
        records.write_bytes(buf.encode(), Path(path))


def executed_path(profile: str, notebook: str) -> Path:
    """The executed copy of a notebook, with its outputs or the full traceback of its failure."""
    return records.runs_dir(profile) / f"{notebook}.ipynb"


@contextmanager
def alone(notebook: str, profile: str) -> Iterator[float]:
    """Waits until no other process runs this notebook of this profile, and keeps others waiting; the seconds waited.

    The lock belongs to the process: however that ends, kill -9 included, the system releases it, so none is ever stale.
    """
    path = executed_path(profile, notebook).with_name(f".{notebook}.lock")
    start = time.monotonic()
    with _opened(path) as lock:
        if fcntl and not _free(lock.fileno()):
            print(f"{notebook} | profile {profile}: waiting, as another process runs this notebook", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield time.monotonic() - start


def _opened(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:  # another user's, say
        raise BadInput(records.disk_problem(error, path)) from None


def _free(lock: int) -> bool:
    """Takes the lock if nobody has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _made_meanwhile(notebook: str, settings: Settings, waited: float) -> bool:
    """Whether the process that was waited for has run the notebook to its end with the same parameters."""
    stage = records.stage_path(settings.profile, notebook)
    return stage.is_file() and time.time() - stage.stat().st_mtime <= waited and not not_executed(notebook, settings)


def not_executed(notebook: str, settings: Settings) -> str:
    """Why a notebook's executed copy is not one of the notebook as it is now with these parameters; '' if it is.

    Prose and outputs stored in the notebook do not count, nor does the place of the data, whose content keys hold.
    """
    target, stage = executed_path(settings.profile, notebook), records.stage_path(settings.profile, notebook)
    if not (target.is_file() and stage.is_file() and _times(target).is_file()):
        return "it has not been run to its end"
    try:
        records.read_record(stage)
        whole = records.read_json(_times(target)).get("notebook") == file_hash(target)
        copy = nbformat.read(target, as_version=4)
        code = _code(nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4))
    except (ValueError, OSError):  # BadInput is one
        return "what it left is damaged"
    if not whole:
        return "its executed copy was changed"
    if _code(copy) != code:
        return "the notebook was edited"
    used, asked = copy.metadata.get("papermill", {}).get("parameters", {}), parameters_for(notebook, settings)
    asked = json.loads(json.dumps(asked))
    differing = [name for name in {**asked, **used} if used.get(name) != asked.get(name) and name != "data_root"]
    return f"it was run with other parameters ({', '.join(sorted(differing))})" if differing else ""


def _code(notebook: nbformat.NotebookNode) -> list[str]:
    """The code cells of a notebook, without those of parameters, which are compared by their values."""
    cells = (c for c in notebook.cells if c.cell_type == "code")
    return [c.source for c in cells if not {"parameters", "injected-parameters"} & {*c.metadata.get("tags", [])}]


def file_hash(path: Path) -> str:
    """Short hash of a file's bytes; empty if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def shown(profile: str) -> str:
    """Hash of which results the tables of `profile` show; the worst case follows from others and is left out."""
    home = records.results_dir(profile)
    paths = [p for p in sorted(home.glob("*/*__*__*__*.json")) if not p.stem.endswith("__worst")]
    skipped = [p.read_text(encoding="utf-8") for p in sorted(home.glob("*/skipped.json"))]
    return records.digest([[str(p.relative_to(home)), records.read_record(p)["key"]] for p in paths] + skipped)


def _times(target: Path) -> Path:
    return target.with_suffix(".time.json")


def shown_by(notebook: str, profile: str) -> str:
    """`shown` as it was when a notebook was executed."""
    return records.read_json(_times(executed_path(profile, notebook))).get("shown", "")


def sweep(folder: Path) -> None:
    """Remove unfinished files that killed processes left below `folder`."""
    for part in folder.rglob(".*.part"):
        with suppress(OSError):  # another process may finish or remove it at the same time
            if time.time() - part.stat().st_mtime > LEFT_BEHIND:
                part.unlink()


def execute(notebook: str, settings: Settings) -> float:
    """Run one notebook with `settings`; returns the seconds it took.

    Leaves the executed copy, and the seconds and the copy's hash, in runs/<profile>; its records and stage file are the
    notebook's own work. The stage file of an earlier run goes if this one fails, so that a failed stage is not taken
    for a finished one, and stays until then, as others may be reading it; records stay.
    """
    parameters = parameters_for(notebook, settings)
    target, stage = executed_path(settings.profile, notebook), records.stage_path(settings.profile, notebook)
    records.keep_inside()
    with alone(notebook, settings.profile) as waited:
        start, clock = time.monotonic(), time.time()
        if waited > 1 and _made_meanwhile(notebook, settings, waited):
            return 0.0
        for folder in (target.parent, stage.parent):
            sweep(folder)
        before = _stamp(stage)
        try:
            _papermill(notebook, parameters, target)
        except BaseException:
            for stale in (stage, _times(target)):
                stale.unlink(missing_ok=True)
            raise
        if _stamp(stage) == before and not notebook.startswith("appendix"):
            stage.unlink(missing_ok=True)
            place = _in_project(stage)
            raise BadInput(f"Notebook {notebook} did not write {place}; let its last cell call records.finish.")
        seconds = round(time.monotonic() - start, 1)
        about = {"started": round(clock, 1), "seconds": seconds, "notebook": file_hash(target)}
        records.write_json({**about, "shown": shown(settings.profile)}, _times(target))
    return seconds


def _stamp(path: Path) -> tuple[int, int]:
    """What tells one writing of a file from another."""
    return (path.stat().st_mtime_ns, path.stat().st_ino) if path.is_file() else (0, 0)


def _papermill(notebook: str, parameters: dict[str, object], target: Path) -> None:
    papermill_io.register(str(target.parent), _Whole())
    # the file that tells the kernel its ports outlives a runner that is killed; here it is inside the project
    before, tempfile.tempdir = tempfile.tempdir, str(records.home())
    os.environ["SSL_ROBUST_NOTEBOOK"] = _in_project(target)  # see records.notebook
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{notebook}.ipynb",
            target,
            parameters,
            kernel_name="python3",
            cwd=NOTEBOOKS,
            progress_bar=False,
            stdout_file=_Terminal(notebook, str(parameters["profile"])),
            start_timeout=180,
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),  # else a warning about plain TCP
            extra_arguments=["--IPKernelApp.log_level=50", f"--IPKernelApp.exec_lines={QUIET_END}"],
        )
    finally:
        tempfile.tempdir = before
        del os.environ["SSL_ROBUST_NOTEBOOK"]


def everything_wrong(settings: Settings) -> tuple[list[str], list[str]]:
    """What keeps the profile from being run, and what is only worth a warning: one sentence each."""
    from . import plan  # here, because its imports take seconds that no notebook's run needs

    stop, warn = plan.problems(settings)
    folder = _data_problem(settings)
    return [*([folder] if folder else []), *_missing_sections(settings), *stop, *_moved()], warn


def _moved() -> list[str]:
    """What tests/golden.py, if it is there, says of loops that compute other numbers than their version did."""
    golden = records.PACKAGE.parent / "tests" / "golden.py"
    return runpy.run_path(str(golden))["check"]() if golden.is_file() else []


def _missing_sections(settings: Settings) -> list[str]:
    """One sentence for each section that a notebook of the paper needs and the profile does not have."""
    found = {}
    for notebook in sorted(NOTEBOOKS.glob("0*.ipynb")):
        needed = [name for name in declared(notebook) if getattr(settings, name, "") is None]
        found |= {name: notebook.stem for name in needed if name not in found}
    return [
        f"Notebook {n} needs the section '{s}'; add it to params/{settings.profile}.yaml." for s, n in found.items()
    ]


def _in_project(path: Path) -> str:
    return str(path.relative_to(records.ROOT))


def _fail(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr, flush=True)
    return code


def _failed_cell(error: PapermillExecutionError, notebook: str, profile: str) -> int:
    """Says what a notebook's exception was: BadInput speaks for itself, others point at the traceback."""
    message = " ".join(error.evalue.split()).rstrip(".") or _last_said(notebook, profile)
    if error.ename == BadInput.__name__:
        return _fail(f"{message}.", BAD_INPUT)
    if any(words in f"{error.ename}: {message}" for words in MEMORY):
        return _fail(f"There is too little memory for notebook {notebook} ({message}); {_less(profile)}.", 1)
    place = _in_project(executed_path(profile, notebook))
    return _fail(f"Notebook {notebook} failed by {error.ename}: {message}; the full traceback is in {place}.", 1)


def _last_said(notebook: str, profile: str) -> str:
    """The last line of what an executed notebook wrote to stderr; where memory lacks, IPython leaves no more."""
    cells = nbformat.read(executed_path(profile, notebook), as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"]
    return outputs[-1].text.strip().rpartition("\n")[2].rstrip(".") if outputs else "no message"


def prepare_children() -> None:
    """Sets the environment that kernels and jobs inherit, as far as the user has not set it."""
    for name, value in CHILDREN.items():
        os.environ.setdefault(name, value)
    os.environ["SSL_ROBUST_ROOT"] = str(records.ROOT)  # they work in other folders
    os.environ["SSL_ROBUST_HEADLESS"] = "1"  # lines instead of bars, see progress.py


def _less(profile: str) -> str:
    return f"lower attack_batch, which changes no result, or batch in params/{profile}.yaml and repeat"


def run(notebook: str, settings: Settings) -> int:
    """Execute one notebook and say how it ended; returns the exit code."""
    prepare_children()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    for name in ("asyncio", "tornado"):  # what a full disk or an ended kernel interrupts would be said a second time
        logging.getLogger(name).setLevel(logging.CRITICAL)
    parameters_for(notebook, settings)  # refuses what is missing before anything is touched
    _say(settings.profile, f"{notebook} | profile {settings.profile}: started")
    try:
        seconds = execute(notebook, settings)
    except PapermillExecutionError as error:
        return _failed_cell(error, notebook, settings.profile)
    except RuntimeError as error:
        if "Kernel died" not in str(error):
            raise
        said = f"The kernel of notebook {notebook} died, as where memory lacks; {_less(settings.profile)}"
        return _fail(f"{said}, what was computed before is kept.", KERNEL_DIED)
    _say(settings.profile, f"{notebook} | profile {settings.profile}: done in {seconds:.0f} s")
    return 0


def _check(settings: Settings) -> int:
    stop, warn = everything_wrong(settings)
    for sentence in warn:
        print(f"Warning: {sentence}")
    if stop:
        return _fail("\n".join(stop), BAD_INPUT)
    print(
        f"Profile {settings.profile}: parameters, data and checkpoints are in place{' but for that' if warn else ''}."
    )
    return 0


def _plan(settings: Settings) -> int:
    from . import plan, stages

    stop, warn = everything_wrong(settings)
    if not stop:
        print(stages.text(settings, plan.looked_for(settings)) + "\n")
    print(plan.text(settings, [*stop, *warn]))
    return 0


def look(profile: str, data: str, answer: Callable[[Settings], int]) -> int:
    """`answer` to the settings of a profile whose parameters are right; else all that is wrong with them."""
    wrong = wrong_parameters(profile)
    if wrong:
        return _fail("\n".join(wrong), BAD_INPUT)
    return answer(_settings(profile, data))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ssl_robust.ops.run", description="Execute one notebook of a profile."
    )
    parser.add_argument("notebook", nargs="?", help="name in notebooks/ without .ipynb, e.g. 03_attack_classification")
    parser.add_argument("--profile", default="demo", help="name of a file in params/ without .yaml")
    parser.add_argument("--data", default="", help="folder of the real data sets, in place of the profile's data_root")
    parser.add_argument("--check", action="store_true", help="only say what is wrong or missing")
    parser.add_argument("--plan", action="store_true", help="only say what would be done, and what it takes")
    arguments = parser.parse_args(argv)
    if bool(arguments.notebook) + arguments.check + arguments.plan != 1:
        parser.error("name a notebook, or give --check or --plan without one")
    return arguments


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`, or that of what ended it, which is said in one sentence."""
    try:
        return work()
    except BadInput as error:
        return _fail(str(error), BAD_INPUT)
    except (ImportError, MemoryError) as error:
        said = f"{type(error).__name__}: {error}"
        remedy = "give it more memory, or delete .venv and have 'make env' make it anew"
        return _fail(f"What this needs cannot be loaded ({said}); {remedy}.", 1)
    except KeyboardInterrupt:
        return _fail("Interrupted; repeat the command to go on from what is computed.", INTERRUPTED)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    any_terminal()
    asked = _arguments(argv)
    if asked.check or asked.plan:
        return guarded(lambda: look(asked.profile, asked.data, _check if asked.check else _plan))
    return guarded(lambda: run(asked.notebook, read_profile(asked.profile, asked.data)))


if __name__ == "__main__":
    sys.exit(main())
