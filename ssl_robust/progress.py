"""Progress of long loops: a bar in JupyterLab, plain lines where nobody watches a bar (make, tests, scripts)."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
# A loop says nothing before it has run that long; the regression tests set 'inf', as their outputs must not vary.
QUIET_SECONDS = float(os.environ.get("SSL_ROBUST_QUIET_SECONDS", "3"))


def any_terminal() -> None:
    """Has what a terminal cannot show (±, †, names of data) printed as \\xb1 instead of ending the run; for mains."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream shows everything
            stream.reconfigure(errors="backslashreplace")


def _in_jupyter() -> bool:
    """True in a kernel with a front end; run.py marks kernels without one by SSL_ROBUST_HEADLESS=1."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return "IPKernelApp" in getattr(shell, "config", {}) and os.environ.get("SSL_ROBUST_HEADLESS") != "1"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _line(desc: str, done: int, total: int, elapsed: float) -> str:
    left = elapsed / done * (total - done)
    time_words = f"about {_duration(left)} left" if done < total else f"took {_duration(elapsed)}"
    return f"{desc} {done}/{total} ({100 * done // total} %), {time_words}".strip()


def track(
    iterable: Iterable[T], total: int | None = None, desc: str = "", size: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """The items of `iterable`, with progress shown under the name `desc`: a bar, or a line for each further tenth.

    `total` is the sum of their `size` (1 each unless given), needed for the plain lines if `iterable` has no length.
    Loops of less than three seconds print nothing; without a total no plain line is printed.
    """
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    jupyter, printed, done, start = _in_jupyter(), 0, 0, time.monotonic()
    with tqdm(total=total, desc=desc, leave=False, disable=not jupyter) as bar:
        for item in iterable:
            yield item
            bar.update(size(item))
            done, elapsed = done + size(item), time.monotonic() - start
            if not jupyter and total and elapsed >= QUIET_SECONDS and 10 * done // total > printed:
                printed = 10 * done // total
                print(_line(desc, done, total, elapsed), flush=True)
