"""JupyterLab on copies of the notebooks, in lab/: python -m ssl_robust.ops.lab. What is tried there changes none.

A copy is made once; when its notebook has changed since, the old one is put aside as NAME.before.ipynb.
"""

import json
import os
import shlex
import sys
from pathlib import Path

from .. import records
from . import run


def copies(folder: Path) -> list[Path]:
    """Copies of all notebooks in `folder`, each of the notebook as it is now; edited ones stay."""
    found = []
    for notebook in sorted(run.NOTEBOOKS.glob("*.ipynb")):
        copy, now = folder / notebook.name, run.file_hash(notebook)
        if copy.is_file() and _copied(copy) != now:
            copy.replace(copy.with_suffix(".before.ipynb"))
        if not copy.is_file():
            content = json.loads(notebook.read_text(encoding="utf-8"))
            content["metadata"]["ssl_robust"] = {"copied": now}
            records.write_bytes((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(), copy)
        found.append(copy)
    return found


def _copied(copy: Path) -> str:
    """The hash of the notebook that a copy was made of; '' if it does not say."""
    try:
        return json.loads(copy.read_text(encoding="utf-8"))["metadata"]["ssl_robust"]["copied"]
    except (ValueError, KeyError, TypeError):
        return ""


def command(first: Path) -> list[str]:
    """How JupyterLab is started: the whole project in its file browser."""
    place = first.relative_to(records.ROOT).as_posix()
    options = [f"--ServerApp.root_dir={records.ROOT}", f"--LabApp.default_url=/lab/tree/{place}"]
    return [sys.executable, "-m", "jupyterlab", *options, *shlex.split(os.environ.get("LAB", ""))]


def environment(folder: Path) -> dict[str, str]:
    """What JupyterLab and its kernels find: the project, and besides the user's own settings no question about news.

    Kernels are set up as those of `make paper` are.
    """
    config = folder / ".jupyter"
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    records.write_json(quiet, config / "labconfig" / "page_config.json")
    paths = filter(None, [os.environ.get("JUPYTER_CONFIG_PATH"), str(config)])
    place = {"SSL_ROBUST_ROOT": str(records.ROOT), "JUPYTER_CONFIG_PATH": os.pathsep.join(paths)}
    return {name: os.environ.get(name, value) for name, value in run.CHILDREN.items()} | place


def main(options: list[str] | None = None) -> None:
    """Becomes JupyterLab, started with its own `options`."""
    made = copies(records.ROOT / "lab")
    os.environ |= environment(records.ROOT / "lab")  # kernels work in lab/
    print("The notebooks in lab/ are copies: edit and run them as you like; delete one to have it anew.", flush=True)
    os.execv(sys.executable, [*command(made[0]), *(options or [])])


if __name__ == "__main__":
    main()
