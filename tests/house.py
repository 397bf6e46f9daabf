"""How large the package and the notebooks are, and who imports whom: python tests/house.py prints it."""

import ast
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "ssl_robust"
# what a folder may import besides itself and the core; the core imports itself alone
ARROWS = {
    "": set(), "catalogue": set(), "strong": set(), "protocols": set(), "formats": set(), "embedded": set(),
    "trust": set(), "show": {"trust"},
    "ops": {"trust", "show", "catalogue", "strong", "protocols", "formats", "embedded"},
}  # fmt: skip


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    """'trust.health', 'records', 'trust' for a folder's own module."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def folder(module: str) -> str:
    """The sub-package of a module; '' for the core."""
    return module.split(".")[0] if (PACKAGE / module.split(".")[0]).is_dir() else ""


def imports(path: Path, anywhere: bool = True) -> Iterator[str]:
    """Modules of the package that a module imports, or without `anywhere` those that it imports when it is loaded."""
    tree, here = ast.parse(path.read_text()), ["ssl_robust", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree) if anywhere else tree.body:
        found = []
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            whole = ".".join([*base, *filter(None, [node.module])])
            found = [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        for one in (f.removeprefix("ssl_robust.") for f in found if f.startswith("ssl_robust.")):
            file = PACKAGE.joinpath(*one.split("."))
            if file.with_suffix(".py").is_file() or file.is_dir():
                yield one


def wrong_arrows() -> list[str]:
    """Imports that go where none may."""
    found = []
    for path in modules():
        for other in imports(path):
            here, there = folder(name(path)), folder(other)
            if there not in {here, ""} | ARROWS[here]:
                found.append(f"{name(path)} imports {other}")
    return found


def circles() -> list[str]:
    """Modules that import each other when they are loaded."""
    graph = {name(path): {*imports(path, anywhere=False)} - {name(path)} for path in modules()}
    while leaves := [m for m, others in graph.items() if not others & set(graph)]:
        graph = {m: others for m, others in graph.items() if m not in leaves}
    return sorted(graph)


def size(paths: list[Path]) -> tuple[int, int]:
    """Lines and bytes."""
    return sum(len(p.read_text().splitlines()) for p in paths), sum(p.stat().st_size for p in paths)


def public(paths: list[Path]) -> int:
    """Functions and classes at the top of modules whose names begin with no underscore."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = (node for path in paths for node in ast.parse(path.read_text()).body if isinstance(node, kinds))
    return sum(node.name[0] != "_" for node in nodes)


def core() -> list[Path]:
    return [path for path in modules() if not folder(name(path))]


def notebook(path: Path) -> tuple[int, int]:
    """Lines of code without the parameters cell, and words of prose."""
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", [])]
    lines = [line for c in code for line in "".join(c["source"]).splitlines()]
    words = sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines), words


def text() -> str:
    """The measures, a line each."""
    rows = [("core", *size(core()), public(core())), ("whole", *size(modules()), public(modules()))]
    groups = {part: [p for p in modules() if folder(name(p)) == part] for part in ARROWS if part}
    rows += [(part, *size(paths), public(paths)) for part, paths in groups.items()]
    tests = sorted((PROJECT / "tests").glob("*.py"))
    rows.append(("tests", *size(tests), 0))
    lines = [f"{'':10} {'lines':>7} {'bytes':>9} {'public':>7}"]
    lines += [f"{part:10} {n:7,} {b:9,} {p or '':>7}" for part, n, b, p in rows]
    books = {p.stem: notebook(p) for p in sorted((PROJECT / "notebooks").glob("*.ipynb"))}
    lines += ["", f"{'':28} {'code':>5} {'words':>6}"]
    lines += [f"{stem:28} {code:5} {words:6}" for stem, (code, words) in books.items()]
    middle = [statistics.median(column) for column in zip(*books.values(), strict=True)]
    lines.append(f"{'median':28} {middle[0]:5.0f} {middle[1]:6.0f}")
    wrong = wrong_arrows() + circles()
    return "\n".join([*lines, "", "arrows: " + ("as they should be" if not wrong else "; ".join(wrong))])


if __name__ == "__main__":
    print(text())
