"""ssl_robust: adversarial robustness of frozen self-supervised encoders on three downstream tasks."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["attack", "fit_head", "load_encoder", "score"]


def __getattr__(name: str) -> Any:
    """The four steps of library.py, imported when they are asked for, as torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.library"), name)
