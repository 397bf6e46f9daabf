"""Encoders of one's own: a Python function from images to tokens, found by its name and tried before it is used."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import records
from .settings import BadInput, EncoderRow


class Own(nn.Module):
    """A callable in the place of a timm model; the weights of a module are part of it, a function is only called."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]], call: str, source: str) -> None:
        super().__init__()
        self.function, self.call, self.source = function, call, source

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """What the callable gives; BadInput unless it is cls (B, D) and patches (B, D, h, w), on `grid` if given."""
        given = self.function(x)
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in _as_tuple(given)]
        if (
            [len(s) for s in shapes] != [2, 4]
            or shapes[0] != (len(x), shapes[1][1])
            or shapes[1][0] != len(x)
            or (grid and shapes[1][2:] != grid)
        ):
            wanted = f"(B, D) and (B, D, {grid[0]}, {grid[1]})" if grid else "(B, D) and (B, D, h, w)"
            raise BadInput(
                f"{self.call} must give cls and patches of shapes {wanted} but gives {' and '.join(map(str, shapes))} "
                f"for images {tuple(x.shape)}; correct it."
            )
        return given


def _as_tuple(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, tuple | list) else (given,)


def find(row: EncoderRow) -> Own:
    """The function that the row's `call` names; BadInput if there is none."""
    module = _import(row)
    name = row.call.partition(":")[2]
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise BadInput(f"Encoder '{row.name}': {row.call} is no function; correct it (functions there: {known}).")
    return Own(function, row.call, _source_hash(module, function))


def _import(row: EncoderRow) -> ModuleType:
    """The module of the row's `call`, looked up in notebooks/, the project's folder and the current one."""
    module, _, function = row.call.partition(":")
    if not module or not function:
        raise BadInput(f"Encoder '{row.name}': call is '{row.call}'; write it as 'module:function'.")
    before = sys.path[:]
    sys.path[:0] = [str(place) for place in (records.ROOT / "notebooks", records.ROOT, Path.cwd())]
    try:
        importlib.invalidate_caches()  # the file may just have been written
        # read anew each time: in a running kernel the file may have been edited since
        return importlib.reload(sys.modules[module]) if module in sys.modules else importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise BadInput(
                f"Encoder '{row.name}': there is no module '{module}'; put {module}.py into notebooks/ or the current "
                f"folder."
            ) from None
        raise BadInput(
            f"Encoder '{row.name}': the module {module} cannot be imported ({type(error).__name__}: {error}); "
            f"correct it."
        ) from None
    finally:
        sys.path[:] = before


def _source_hash(module: ModuleType, function: Callable) -> str:
    """Short hash of the module's text (in a notebook of the function's): what it computes besides its weights."""
    for what in (module, function):
        try:
            return hashlib.sha256(inspect.getsource(what).encode()).hexdigest()[:16]
        except (OSError, TypeError):
            continue
    return ""


def measure(row: EncoderRow, own: Own, mean: Tensor, std: Tensor, native: int) -> tuple[int, int]:
    """Patch side and D of a callable, tried on images of `native` px that are normalised by mean and std.

    Raises BadInput if it fails, its tokens fit no grid, or the image gets no gradient.
    """
    x = torch.rand(2, 3, native, native, generator=torch.Generator().manual_seed(0))
    x = ((x - mean) / std).requires_grad_()
    with torch.enable_grad():
        try:
            given = own(x)
        except BadInput as problem:
            raise BadInput(f"Encoder '{row.name}': {problem}") from None
        except Exception as error:
            raise BadInput(
                f"Encoder '{row.name}': {row.call} fails on images {tuple(x.shape)} "
                f"({type(error).__name__}: {error}); correct it."
            ) from None
        for what, values in zip(("CLS token", "patch tokens"), given, strict=True):
            if not _has_gradient(values, x):
                raise BadInput(
                    f"Encoder '{row.name}': the {what} of {row.call} give the image no gradient, so no attack could "
                    f"find anything; use differentiable torch operations without no_grad or detach."
                )
    down, across = given[1].shape[2:]
    if down != across or not down or native % down:
        raise BadInput(
            f"Encoder '{row.name}': {row.call} gives {down} x {across} patch tokens for {native} x {native} px; give a "
            f"square grid whose side divides the native size, or set native."
        )
    return native // down, given[1].shape[1]


def _has_gradient(values: Tensor, x: Tensor) -> bool:
    """Whether some gradient of `values` reaches `x`; not of their sum, which a normalisation may hold constant."""
    if not values.requires_grad:
        return False
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((values * weights).sum(), x, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.abs().sum() > 0)
