"""Makes tests/reference (`make reference`): the notebooks executed with params/test.yaml, from nothing.

They run in a folder that is thrown away; of their outputs only those stay that nbval compares, in the cells marked
NBVAL_CHECK_OUTPUT.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parents[1]
REFERENCE = PROJECT / "tests" / "reference"
INJECTED = "injected-parameters"


def stages(folder: Path = PROJECT / "notebooks") -> list[str]:
    """Names of the notebooks of `make paper`, in order."""
    return sorted(path.stem for path in folder.glob("[0-9]*.ipynb"))


def checked(folder: Path = PROJECT / "notebooks") -> list[str]:
    """Names of the notebooks that nbval runs, in order: all but two appendices, which are long and tested elsewhere."""
    others = ("appendix_pretraining",)
    return sorted(path.stem for path in folder.glob("*.ipynb") if path.stem not in others)


def environment(root: Path) -> dict[str, str]:
    """Environment in which notebooks leave everything below `root`, print no progress, and compute on one core."""
    quiet = {"SSL_ROBUST_HEADLESS": "1", "SSL_ROBUST_QUIET_SECONDS": "inf"}
    # my_encoder.py lies there, the references do not
    example = {"PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT / "notebooks"), os.environ.get("PYTHONPATH")]))}
    return os.environ | quiet | example | {"SSL_ROBUST_ROOT": str(root), "OMP_NUM_THREADS": "1"}


def _clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for volatile in ("metadata", "execution_count"):
        if volatile in output:
            output[volatile] = None if volatile == "execution_count" else {}
    output.get("data", {}).pop("image/png", None)  # nbval does not compare pictures
    return output


def _clean_cell(cell: nbformat.NotebookNode) -> None:
    tags = cell.metadata.get("tags", [])
    cell.metadata = {"tags": tags} if tags else {}
    if INJECTED in tags:
        cell.id = INJECTED  # papermill draws another each time
    if cell.cell_type == "code":
        compared = cell.outputs if "NBVAL_CHECK_OUTPUT" in cell.source else []
        cell.outputs = [_clean_output(output) for output in compared if output.get("name") != "stderr"]
        cell.execution_count = 1 if cell.outputs else None  # nbval takes outputs without a count for a mistake


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """`notebook` without what differs from run to run, says where it ran, or is not compared."""
    for cell in notebook.cells:
        _clean_cell(cell)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for name in checked():
            command = [sys.executable, "-m", "ssl_robust.ops.run", name, "--profile", "test"]
            subprocess.run(command, cwd=PROJECT, env=environment(Path(root)), check=True)
            executed = nbformat.read(Path(root, "runs", "test", f"{name}.ipynb"), as_version=4)
            nbformat.write(clean(executed), REFERENCE / f"{name}.ipynb")


if __name__ == "__main__":
    main()
