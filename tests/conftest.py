"""What all tests share: one thread each (before torch is imported), no windows, a project folder of their own.

SSL_ROBUST_TEST_BF16=1 has all of them believe that the CPU multiplies bf16 fast, so that the suite can be run both ways
on any CPU: `precision: auto` is then bf16.
"""

import os
import runpy
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox asks for git when it is imported, and needs none

import matplotlib  # noqa: E402
import planted  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from ssl_robust import datasets, records  # noqa: E402

if os.environ.get("SSL_ROBUST_TEST_BF16") == "1":
    claiming = Path(__file__).with_name("bf16")
    runpy.run_path(str(claiming / "sitecustomize.py"))["claim"](torch.cpu)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(claiming), os.environ.get("PYTHONPATH")]))

# not by the variable MPLBACKEND, which kernels started by the tests would inherit, and then show no pictures
matplotlib.use("Agg")


PROJECT = records.ROOT


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for all profiles lies in no test's project, unless that has a folder of its own."""
    own = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(records, "home", lambda: own if records.ROOT == PROJECT else records.ROOT / "runs" / ".home")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder where this test, and kernels it starts, keep results/, runs/ and figures/."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("SSL_ROBUST_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def toys(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of `root`, and the data set 'toys' beside the real ones."""
    monkeypatch.setitem(datasets.DATASETS, "toys", planted.TOYS)
    return root
