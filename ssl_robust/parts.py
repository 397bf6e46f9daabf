"""What the core does without until it is asked for: modules of the folders beside it, looked up by name."""

import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any


def part(name: str) -> ModuleType:
    """A module of this package, e.g. 'trust.health'. Nothing in the core imports one in any other way."""
    return import_module(f"{__package__}.{name}")


@cache
def table(folder: str, name: str) -> dict[str, Any]:
    """The entries of the dicts `name` in all modules of a folder: who adds one adds a file, and no other is touched."""
    modules = sorted(found.name for found in pkgutil.iter_modules(part(folder).__path__))
    found = [getattr(part(f"{folder}.{module}"), name, {}) for module in modules]
    return {key: entry for entries in found for key, entry in entries.items()}
