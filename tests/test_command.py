"""The installed package: its command, where it works, what it brings along."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from ssl_robust.ops import command

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package as pip installs it, in a folder without anything of the checkout."""
    folder = tmp_path_factory.mktemp("site")
    copy = folder / "source"
    kept = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT,
                          capture_output=True, check=True).stdout.decode().split("\0")  # fmt: skip
    for name in filter(lambda n: (PROJECT / n).is_file() and not n.startswith(("figures/", "tests/")), kept):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((PROJECT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, copy]
    subprocess.run(build, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def told(site, folder, *words, code=0):
    clean = {k: v for k, v in os.environ.items() if k != "SSL_ROBUST_ROOT"}
    run = subprocess.run([sys.executable, "-m", "ssl_robust.ops.command", *map(str, words)], cwd=folder, text=True,
                         capture_output=True, env=clean | {"PYTHONPATH": str(site)})  # fmt: skip
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_every_folder_of_the_package_is_installed():
    listed = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(p.parent.relative_to(PROJECT).parts) for p in (PROJECT / "ssl_robust").rglob("__init__.py")}
    assert {name for name in listed if "._" not in name} == there


def test_results_go_to_the_current_folder_or_root_and_never_into_the_package(site, tmp_path):
    before = sorted(site.rglob("*.*"))
    said = told(site, tmp_path, "run", "--profile", "no_such", code=2)
    assert "There is no profile 'no_such'" in said and "demo" in said
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    executed = "from ssl_robust.ops import run; import sys; sys.exit(run.main(['00_data', '--profile', 'test']))"
    for folder, root in ((here, None), (tmp_path, there)):
        env = {k: v for k, v in os.environ.items() if k != "SSL_ROBUST_ROOT"} | {"PYTHONPATH": str(site)}
        env |= {"SSL_ROBUST_ROOT": str(root)} if root else {}
        subprocess.run([sys.executable, "-c", executed], cwd=folder, env=env, check=True, capture_output=True)
        assert (root or folder).joinpath("results", "test", "00_data.json").is_file()
    assert [p for p in sorted(site.rglob("*.*")) if p.suffix != ".pyc"] == [p for p in before if p.suffix != ".pyc"]
    assert "no records yet" in told(site, tmp_path, "explain", "table1/a/b/c/d", "--root", there, code=2)


def test_init_writes_notebooks_and_params_to_change(site, tmp_path):
    assert told(site, tmp_path, "init").count("is made.") == 2
    assert {p.name for p in (tmp_path / "notebooks").iterdir()} == {
        p.name for p in (PROJECT / "notebooks").iterdir() if p.suffix in (".ipynb", ".py")
    }
    (tmp_path / "params" / "demo.yaml").write_text("profile: other\n")
    assert told(site, tmp_path, "init").count("stays as it is.") == 2
    assert "must say 'profile: demo'" in told(site, tmp_path, "plan", code=2)


def test_each_command_has_a_module_that_lists_its_options(capsys):
    assert command.main([]) == 2 and "commands:" in capsys.readouterr().out
    for name in set(command.COMMANDS) - {"init", "lab"}:
        with pytest.raises(SystemExit) as end:
            command.main([name, "--help"])
        assert end.value.code == 0 and "--profile" in capsys.readouterr().out
