"""The notebooks of `make paper` as the tests of faults and of determinism run them, with params/test.yaml.

`play` executes one in a forked process, which spares the imports of a kernel; `Tree` is a copy of the project in which
the real make, papermill and kernels run.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest
from make_reference import PROJECT, stages

# imported before the fork, so that each forked process has them
from ssl_robust import deacl, evaluate, heads, records
from ssl_robust.ops import run
from ssl_robust.show import plots, report

__all__ = ["deacl", "evaluate", "heads", "plots", "report", "undisturbed"]
PROFILE, STAGES = "test", stages()
WORDS = {"runner": "ssl_robust.ops.run", "kernel": "ipykernel_launcher"}  # in the command lines of processes
VOLATILE = ("git", "seconds", "made", "notebook")  # of a record: the clock, and who executed the notebook


def _execute(notebook: str, root: Path) -> None:
    """All code cells in this process, with the profile's parameters in place of the parameters cell."""
    records.ROOT, os.environ["SSL_ROBUST_QUIET_SECONDS"] = root, "inf"
    os.environ["SSL_ROBUST_ROOT"] = str(root)
    cells = nbformat.read(PROJECT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    names = {"display": print} | run.parameters_for(notebook, run.read_profile(PROFILE))
    with open(root / f"{notebook}.log", "w") as log, contextlib.redirect_stdout(log):
        for cell in (c for c in cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])):
            exec(compile(cell.source, notebook, "exec"), names)


def fork(notebook: str, root: Path) -> multiprocessing.Process:
    """A process that executes the notebook with its results below `root`."""
    process = multiprocessing.get_context("fork").Process(target=_execute, args=(notebook, root))
    process.start()
    return process


def play(notebook: str, root: Path) -> None:
    """Execute a notebook to its end."""
    process = fork(notebook, root)
    process.join(600)  # on a machine with other work
    assert process.exitcode == 0, f"{notebook}: exit code {process.exitcode}"


def files(root: Path) -> set[tuple[Path, int]]:
    """What lies below `root`, each file with the time of its last change; unfinished and Jupyter's own files apart."""
    found = (p for p in root.rglob("*") if p.suffix not in (".part", ".log", ".lock") and ".home" not in p.parts)
    return {(p, p.stat().st_mtime_ns) for p in found if p.is_file()}


def wait_for(condition: Callable[[], object], seconds: float = 120) -> bool:
    """Whether the condition came true within that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def play_with_kills(notebook: str, root: Path, kills: int) -> int:
    """Execute a notebook that is killed (-9) as soon as it has written something, `kills` times; the kills."""
    for done in range(kills):
        before, process = files(root), fork(notebook, root)
        wait_for(lambda: not process.is_alive() or files(root) != before)  # noqa: B023
        process.kill()
        process.join()
        if process.exitcode == 0:
            return done
        assert process.exitcode == -signal.SIGKILL
    play(notebook, root)
    return kills


def tables(root: Path) -> dict[str, bytes]:
    """Tables and data of figures, byte for byte."""
    folder = root / "figures" / PROFILE
    return {p.name: p.read_bytes() for kind in ("csv", "md", "tex") for p in sorted(folder.glob(f"*.{kind}"))}


def numbers(root: Path) -> dict[str, dict]:
    """All records below results/, but for the clock."""
    found = {}
    for path in sorted((root / "results" / PROFILE).glob("*/*__*.json")):
        record = json.loads(path.read_text())
        found[f"{path.parent.name}/{path.name}"] = {k: v for k, v in record.items() if k not in (*VOLATILE, "sha")}
    return found


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of one run of all notebooks that nothing disturbed; not to be changed."""
    root = tmp_path_factory.mktemp("undisturbed")
    for notebook in STAGES:
        play(notebook, root)
    return root


class Tree:
    """A copy of the project, committed, with folders of its own for HOME and TMPDIR, and make in it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.home, self.tmp = folder / "project", folder / "home", folder / "tmp"
        for name in ("ssl_robust", "notebooks", "params"):
            shutil.copytree(PROJECT / name, self.root / name)
        for name in ("Makefile", ".gitignore"):
            shutil.copy2(PROJECT / name, self.root)
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all")
        (self.root / ".git" / "info" / "exclude").write_text("log\n*.log\n")  # where the tests keep what make says
        for place in (self.home, self.tmp, self.root / "runs" / PROFILE):
            place.mkdir(parents=True)

    def git(self, *words: str) -> str:
        return subprocess.run(["git", "-C", self.root, *words], check=True, capture_output=True, text=True).stdout

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "SSL_ROBUST_", "IPYTHON", "JUPYTER"))}
        path = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
        mine = {"PYTHONPATH": path, "HOME": str(self.home), "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1"}
        return {k: v for k, v in kept.items() if k != "MPLCONFIGDIR"} | mine

    def command(self, target: str, *variables: str) -> list[str]:
        # of one stage, run-STAGE, it is not asked each time what is to be done, which takes seconds
        return ["make", f"PY={sys.executable}", "STAMP=", f"PROFILE={PROFILE}", target, *variables]

    def start(self, target: str, log: str, *variables: str) -> subprocess.Popen:
        """make in the background, what it says in the file `log`."""
        with open(self.root / log, "w") as out:
            return subprocess.Popen(
                self.command(target, *variables),
                cwd=self.root,
                env=self.environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def victims(self, make: subprocess.Popen) -> dict[str, psutil.Process]:
        """make, the runner (papermill) and the kernel as soon as all three are there."""
        found = {"make": psutil.Process(make.pid)}

        def complete() -> bool:
            for process in found["make"].children(recursive=True):
                with contextlib.suppress(psutil.Error):  # gone since it was listed
                    words = process.cmdline()
                    found.update({n: process for n, word in WORDS.items() if word in words[:3]})
            return len(found) == 3

        assert wait_for(complete), f"no kernel: {sorted(found)}"
        return found
