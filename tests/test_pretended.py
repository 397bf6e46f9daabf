"""Nothing that computes mixes devices: on_pretended.py runs the whole chain on a pretended one, in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pretended
import pytest
import torch

CHAIN = Path(__file__).with_name("on_pretended.py")


@pytest.mark.skipif(
    not pretended.able(),
    reason=f"torch {torch.__version__} has no {pretended.SETUP}, of which the pretended device is made",
)
def test_the_chain_runs_on_a_pretended_device():
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHAIN)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(run, capture_output=True, text=True, env=kept, cwd=CHAIN.parents[1], timeout=900)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
