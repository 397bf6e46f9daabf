"""Rules that every notebook keeps, and the regression: nbval runs the committed reference notebooks again."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from make_reference import INJECTED, PROJECT, REFERENCE, checked, environment
from nbformat import NotebookNode, v4

from ssl_robust.settings import BadInput, Settings, check, read_params

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
MAX_LINES = 10


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def format_faults(notebook: NotebookNode) -> Iterator[str]:
    nbformat.validate(notebook)
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        yield "is not nbformat 4.5"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "names another kernel than python3"
    if any(cell.outputs or cell.execution_count for cell in code_cells(notebook)):
        yield "has stored outputs or execution counts"


def prose_faults(notebook: NotebookNode) -> Iterator[str]:
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown" and cell.source.strip()]
    if not prose or notebook.cells[0].cell_type != "markdown":
        yield "does not open with prose"
    if 3 * len(prose) < len(code_cells(notebook)):
        yield "has less than one cell of prose for three of code"


def code_faults(notebook: NotebookNode) -> Iterator[str]:
    for cell in code_cells(notebook):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if len(lines) > MAX_LINES and "parameters" not in cell.metadata.get("tags", []):
            yield f"has a cell of {len(lines)} lines: {lines[0]}"
        if any(isinstance(node, DEFINITIONS) for node in ast.walk(ast.parse(cell.source))):
            yield f"defines something: {lines[0]}"


def _commented(source: str) -> set[int]:
    """Lines that end in a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def _value_fault(name: str, node: ast.expr, demo: dict) -> str | None:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return f"sets {name} to something else than a plain literal"
    if name not in Settings.model_fields:
        return f"declares {name}, which ssl_robust/settings.py does not know"
    try:
        same = getattr(check(**{**demo, name: value}), name) == getattr(check(**demo), name)
    except BadInput as error:
        return str(error)
    return None if same else f"has another default for {name} than params/demo.yaml"


def parameter_faults(notebook: NotebookNode, demo: dict | None) -> Iterator[str]:
    """Faults of the parameters cell; without `demo` names and values are not compared."""
    tagged = [cell.source for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        yield f"has {len(tagged)} cells tagged parameters"
        return
    commented = _commented(tagged[0])
    for node in ast.parse(tagged[0]).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            yield f"has more than assignments in its parameters cell: {ast.unparse(node)}"
            continue
        name, inside = node.targets[0].id, set(range(node.lineno + 1, node.end_lineno))
        if node.lineno not in commented and not (inside and inside <= commented):
            yield f"does not say in a comment what {name} is"
        fault = _value_fault(name, node.value, demo) if demo else None
        if fault:
            yield fault


def ending_faults(notebook: NotebookNode, name: str) -> Iterator[str]:
    calls = [n for n in ast.walk(ast.parse(code_cells(notebook)[-1].source)) if isinstance(n, ast.Call)]
    ended = [c for c in calls if ast.unparse(c.func).endswith("finish") and f"'{name}'" in map(ast.unparse, c.args)]
    if not ended:
        yield f"does not call records.finish(s.profile, '{name}', ...) in its last cell"


def faults(notebook: NotebookNode, name: str, demo: dict) -> list[str]:
    """All rules; the appendix has parameters of its own and no stage file."""
    appendix = name.startswith("appendix")
    found = [*format_faults(notebook), *prose_faults(notebook), *code_faults(notebook)]
    found += parameter_faults(notebook, None if appendix else demo)
    return found if appendix else [*found, *ending_faults(notebook, name)]


@pytest.fixture(scope="module")
def demo() -> dict:
    return read_params(PROJECT / "params" / "demo.yaml")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_keeps_the_rules(path: Path, demo: dict) -> None:
    assert faults(nbformat.read(path, as_version=nbformat.NO_CONVERT), path.stem, demo) == []


DEMO = {"profile": "demo", "encoders": [{"name": "embedded_vit"}], "attack": {"eps": 0.03, "step": 0.01, "steps": 5}}
PARAMETERS = "profile = 'demo'  # the profile\nattack = {  # the ball\n    'eps': 0.03, 'step': 0.01, 'steps': 5\n}"
LAST = "records.finish(profile, '00_good')"


def notebook(parameters: str = PARAMETERS, last: str = LAST, prose: str = "# Why") -> NotebookNode:
    cells = [v4.new_markdown_cell(prose), v4.new_code_cell(parameters), v4.new_code_cell(last)]
    cells[1].metadata["tags"] = ["parameters"]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def test_rules_accept_a_good_notebook() -> None:
    assert faults(notebook(), "00_good", DEMO) == []


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({"parameters": "profile = 'demo'"}, "does not say in a comment"),
        ({"parameters": "profile = 'paper'  # x"}, "another default for profile"),
        ({"parameters": "attack = {'eps': 8 / 255}  # x"}, "plain literal"),
        ({"parameters": "attack = {'eps': '8'}  # x"}, "must be a number"),
        ({"parameters": "epsilon = 0.1  # x"}, "does not know"),
        ({"parameters": "import os"}, "more than assignments"),
        ({"last": "def f():\n    pass\n" + LAST}, "defines something"),
        ({"last": "g = lambda: 0\n" + LAST}, "defines something"),
        ({"last": "x = 1\n" * MAX_LINES + LAST}, f"{MAX_LINES + 1} lines"),
        ({"last": "records.finish(profile, '01_other')"}, "records.finish"),
        ({"prose": " "}, "prose"),
    ],
)
def test_rules_find_each_fault(broken: dict[str, str], expected: str) -> None:
    assert expected in " ".join(faults(notebook(**broken), "00_good", DEMO))


def test_rules_find_stored_outputs_a_foreign_kernel_and_two_parameter_cells() -> None:
    bad = notebook()
    bad.cells[2].outputs = [v4.new_output("stream", text="x")]
    bad.cells[2].metadata["tags"] = ["parameters"]
    bad.metadata.kernelspec.name = "julia"
    found = " ".join(faults(bad, "00_good", DEMO))
    assert "stored outputs" in found and "kernel" in found and "2 cells tagged" in found


def sources(path: Path) -> list[str]:
    """Code of a notebook as it stands, without what papermill put in."""
    cells = code_cells(nbformat.read(path, as_version=4))
    return [cell.source for cell in cells if INJECTED not in cell.metadata.get("tags", [])]


def test_references_are_of_the_present_notebooks() -> None:
    present = {name: sources(PROJECT / "notebooks" / f"{name}.ipynb") for name in checked()}
    reference = {name: sources(REFERENCE / f"{name}.ipynb") for name in checked(REFERENCE)}
    changed = [name for name in present | reference if present.get(name) != reference.get(name)]
    assert changed == [], "run make reference and look at what differs"


@pytest.mark.parametrize("name", checked())
def test_reference_checks_something(name: str) -> None:
    cells = code_cells(nbformat.read(REFERENCE / f"{name}.ipynb", as_version=4))
    assert any(cell.outputs for cell in cells), "no cell with an output is marked # NBVAL_CHECK_OUTPUT"


def test_nbval_regression(tmp_path: Path) -> None:
    """Runs all in order in an empty project folder; cells marked NBVAL_CHECK_OUTPUT must print what they printed."""
    nbval = ["--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider", str(REFERENCE)]
    command = [sys.executable, "-m", "pytest", *nbval]
    done = subprocess.run(command, cwd=PROJECT, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
