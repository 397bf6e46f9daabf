"""Results on disk: where they lie, atomic writing, hashes that say what a result was made from, provenance."""

import ast
import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import BadInput

if TYPE_CHECKING:
    import torch  # imported where it is used: the runner needs none of it, and it takes seconds

# The project's folder follows from the package, so notebooks work from any working directory; tests set the variable.
ROOT = Path(os.environ.get("SSL_ROBUST_ROOT", Path(__file__).resolve().parents[1]))
PACKAGE = Path(__file__).resolve().parent
SCHEMA = 1
PACKAGES = ("torch", "torchvision", "timm", "torchmetrics", "numpy")


def results_dir(profile: str) -> Path:
    """Folder of the records of `profile`."""
    return ROOT / "results" / profile


def runs_dir(profile: str) -> Path:
    """Folder of heads, checkpoints, example tensors and executed notebooks of `profile`."""
    return ROOT / "runs" / profile


def figures_dir(profile: str) -> Path:
    """Folder of tables and figures of `profile`."""
    return ROOT / "figures" / profile


def record_path(profile: str, task: str, dataset: str, encoder: str, defense: str, attack: str) -> Path:
    """File of one table cell, e.g. results/demo/depth/scenes__embedded_vit__standard__embed.json."""
    return results_dir(profile) / task / f"{dataset}__{encoder}__{defense}__{attack}.json"


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all: a killed process leaves the old file or none, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: dict[str, Any] | list[Any], path: Path) -> Path:
    """Write `content` as JSON, atomically; returns the path."""
    write_bytes((json.dumps(content, indent=1, allow_nan=False) + "\n").encode(), path)
    return path


def read_json(path: Path) -> Any:
    """Content of one JSON file; raises BadInput naming the file if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise BadInput(f"{path.name} is damaged (not valid JSON); delete {path} and run its notebook again.") from None


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records below `folder` (results/<profile> or figures/<profile>/records), sorted by path."""
    return [read_json(p) for p in sorted(folder.glob("*/*__*__*__*.json"))]


def skipped_path(profile: str, part: str) -> Path:
    """File that lists the skipped rows of `part`: a task, 'heads' or 'deacl'."""
    return results_dir(profile) / part / "skipped.json"


def read_skipped(path: Path) -> list[dict[str, str]]:
    """Rows that could not be run and why, [{dataset, encoder, defense, why}]; empty if there is no such file."""
    return read_json(path) if path.is_file() else []


def write_skipped(profile: str, part: str, lost: list[dict[str, str]]) -> None:
    """Write the skipped rows, one for each place in the table; no file if there are none."""
    path = skipped_path(profile, part)
    path.unlink(missing_ok=True)
    # the first reason stands: a row's later variants fail for the same one
    rows = {tuple(v for k, v in row.items() if k != "why"): row for row in reversed(lost)}
    if lost:
        write_json(list(reversed(rows.values())), path)


def reusable(path: Path, key: str) -> dict[str, Any] | None:
    """The record at `path` if it is whole and was made from exactly what `key` hashes, else None."""
    try:
        record = read_json(path) if path.is_file() else {}
    except BadInput:
        return None
    return record if record.get("key") == key else None


def digest(content: Any) -> str:
    """Short hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def state_hash(state: "dict[str, torch.Tensor]") -> str:
    """Short hash of names, shapes and exact values of a state dict."""
    import torch

    hasher = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return hasher.hexdigest()[:16]


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = body[1:]
    return tree


@cache
def code_hash(*modules: str) -> str:
    """Short hash of what these modules compute: comments, docstrings and layout do not count."""
    trees = [ast.dump(_without_docstrings(ast.parse((PACKAGE / f"{m}.py").read_text()))) for m in sorted(modules)]
    return digest(trees)


@cache
def git_revision() -> str:
    """Commit of the project, with '+' if the package differs from it; 'unknown' outside a checkout."""
    try:
        run = ["git", "-C", str(PACKAGE), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(run, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def pick_device(device: str) -> str:
    """'cpu' or 'cuda' for the setting 'auto', 'cpu' or 'cuda'; raises BadInput if a GPU is asked for in vain."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("The setting device is 'cuda' but no CUDA GPU is usable here; write device: auto or cpu.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def provenance(device: str) -> dict[str, Any]:
    """Where and with what a result was computed."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "git": git_revision(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def stage_path(profile: str, notebook: str) -> Path:
    """The file that a notebook writes as its last act, and that make waits for."""
    return results_dir(profile) / f"{notebook}.json"


def finish(profile: str, notebook: str, **summary: Any) -> Path:
    """Last act of a notebook: say that it is done, and what it found."""
    return write_json({"notebook": notebook, "profile": profile, **summary}, stage_path(profile, notebook))


def need(profile: str, notebook: str) -> dict[str, Any]:
    """Summary of a notebook that must have run before; raises BadInput naming it if it has not."""
    path = stage_path(profile, notebook)
    if not path.is_file():
        raise BadInput(f"Notebook {notebook} has not run for profile '{profile}'; run it first, or 'make paper'.")
    return read_json(path)
