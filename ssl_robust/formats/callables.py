"""Encoders of one's own: a Python function from images to tokens, found by its name and tried before it is used."""

import glob
import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import records
from ..settings import BadInput, EncoderRow

# largest difference of two answers about the same image, as a share of the largest token: computed again, and in
# another batch, where sums of lower precision may be added up in another order
REPEATED, BATCHED = 1e-5, 1e-2


class Own(nn.Module):
    """A callable in the place of a timm model. The modules that it is or uses are part of it: frozen, moved, hashed."""

    own = True  # which encoders ask
    computes = ""  # what it gives, as identity says; measure finds it

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]], call: str, uses: list[nn.Module]) -> None:
        super().__init__()
        self.function, self.call, self.uses = function, call, nn.ModuleList(uses)

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
    """The function that the row's `call` names, as an encoder; BadInput if there is none."""
    module, function = _found(row.call, f"Encoder '{row.name}'")
    return Own(function, row.call, _modules(module, function))


def named(call: str, who: str) -> Callable:
    """The function 'module:function'; BadInput, which begins with `who`, if there is none."""
    return _found(call, who)[1]


def _found(call: str, who: str) -> tuple[ModuleType, Callable]:
    module, name = _import(call, who), call.partition(":")[2]
    function = getattr(module, name, None)
    if not callable(function) or isinstance(function, type):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise BadInput(f"{who}: {call} is no function; correct it (functions there: {known}).")
    return module, function


def _import(call: str, who: str) -> ModuleType:
    """The module of a `call`, looked up in notebooks/, the project's folder and the current one."""
    module, _, function = call.partition(":")
    if not module or not function:
        raise BadInput(f"{who}: call is '{call}'; write it as 'module:function'.")
    before = sys.path[:]
    sys.path[:0] = [str(place) for place in (records.ROOT / "notebooks", records.ROOT, Path.cwd())]
    try:
        importlib.invalidate_caches()  # the file may just have been written
        # read anew each time: in a running kernel the file may have been edited since
        return importlib.reload(sys.modules[module]) if module in sys.modules else importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise BadInput(
                f"{who}: there is no module '{module}'; put {module}.py into notebooks/ or the current folder."
            ) from None
        raise BadInput(f"{who}: the module {module} cannot be imported ({_line(error)}); correct it.") from None
    finally:
        sys.path[:] = before


def _line(error: BaseException) -> str:
    """An error in one line of bearable length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _modules(module: ModuleType, function: Callable) -> list[nn.Module]:
    """Modules that a function can reach by its file, its object or the function around it; not those it consists of."""
    holders = [h for h in (function, getattr(function, "__self__", None)) if not isinstance(h, nn.Module)]
    reached = [v for holder in (module, *holders) for v in getattr(holder, "__dict__", {}).values()]
    reached += [getattr(function, "__self__", None)]
    reached += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    own = set(function.modules()) if isinstance(function, nn.Module) else set()
    return [m for m in dict.fromkeys(v for v in reached if isinstance(v, nn.Module)) if m not in own]


def measure(row: EncoderRow, own: Own, mean: Tensor, std: Tensor, native: int) -> tuple[int, int]:
    """Patch side and D of a callable, tried on images of `native` px that are normalised by mean and std.

    Raises BadInput if it fails, its tokens fit no grid or are no numbers, it changes its images, the image gets no
    gradient, or its answer about an image varies or depends on the other images.
    """
    x = torch.rand(2, 3, native, native, generator=torch.Generator().manual_seed(0)).requires_grad_()
    given = _tokens(row, own, (x - mean) / std)
    for what, values in zip(("CLS token", "patch tokens"), given, strict=True):
        if not _has_gradient(values, x):
            raise BadInput(
                f"Encoder '{row.name}': the {what} of {row.call} give the image no gradient, so no attack could "
                f"find anything; use differentiable torch operations without no_grad or detach."
            )
    with torch.no_grad():
        _need_steady(row, own, (x - mean) / std, given)
    down, across = given[1].shape[2:]
    if down != across or not down or native % down:
        raise BadInput(
            f"Encoder '{row.name}': {row.call} gives {down} x {across} patch tokens for {native} x {native} px; give a "
            f"square grid whose side divides the native size, or set native."
        )
    patch = native // down
    own.computes = identity(row.name, (*given, *_elsewhere(own, native + patch, native + 2 * patch)))
    return patch, given[1].shape[1]


@torch.no_grad()
def _elsewhere(own: Own, height: int, width: int) -> tuple[Tensor, ...]:
    """What a callable gives for an image of another size; nothing if it takes none."""
    try:
        return own(torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)))
    except Exception:  # refusing such images is its own affair
        return ()


def identity(name: str, given: tuple[Tensor, ...]) -> str:
    """A name for these tokens: that of earlier ones that are the same up to rounding, else a new one.

    So what a callable computes is known again, whatever files it has that from, and on any number of threads.
    """
    tokens = {str(i): t.detach().contiguous() for i, t in enumerate(given)}
    folder, new = records.home() / "callables", records.state_hash(tokens)
    for path in sorted(folder.glob(f"{glob.escape(name)}__*.safetensors")):
        with suppress(BadInput):
            before = records.read_tensors(path)[0]
            same = {k: t.shape for k, t in before.items()} == {k: t.shape for k, t in tokens.items()}
            if same and _alike(tuple(before[k] for k in tokens), tuple(tokens.values()), REPEATED):
                return path.stem.rpartition("__")[2]
    records.write_tensors(tokens, {}, folder / f"{name}__{new}.safetensors")
    return new


def _tokens(row: EncoderRow, own: Own, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a callable gives for images that it leaves as they are: finite tokens of their type; else BadInput."""
    before = x.detach().clone()
    try:
        given = own(x)
    except BadInput as problem:
        raise BadInput(f"Encoder '{row.name}': {problem}") from None
    except Exception as error:
        raise BadInput(
            f"Encoder '{row.name}': {row.call} fails on images {tuple(x.shape)} ({_line(error)}); correct it."
        ) from None
    problem = ""
    if not torch.equal(x, before):
        problem = "changes the images that it is given; let it work on a copy (images.clone())"
    elif wrong := [t.dtype for t in given if t.dtype != x.dtype]:
        problem = f"gives tokens of {wrong[0]} for images of {x.dtype}; let it compute in the images' type"
    elif not all(t.isfinite().all() for t in given):
        problem = "gives tokens that are NaN or infinite; correct it or its weights"
    if problem:
        raise BadInput(f"Encoder '{row.name}': {row.call} {problem}.")
    return given


def _need_steady(row: EncoderRow, own: Own, x: Tensor, given: tuple[Tensor, Tensor]) -> None:
    """BadInput if a callable answers otherwise when asked again, or about an image among others."""
    for _ in range(2):
        if not _alike(_tokens(row, own, x), given, REPEATED):
            raise BadInput(
                f"Encoder '{row.name}': {row.call} gives other tokens when asked again about the same images; put its "
                f"modules into eval mode (dropout) and take random steps out of it."
            )
    for part in (slice(0, 1), slice(1, 2)):
        if not _alike(_tokens(row, own, x[part]), tuple(t[part] for t in given), BATCHED):
            raise BadInput(
                f"Encoder '{row.name}': {row.call} gives an image other tokens alone than among others; put its "
                f"modules into eval mode (batch norm) and compute nothing across the batch."
            )


def _alike(some: tuple[Tensor, ...], others: tuple[Tensor, ...], share: float) -> bool:
    return all(bool((a - b).abs().max() <= share * b.abs().max()) for a, b in zip(some, others, strict=True))


def _has_gradient(values: Tensor, x: Tensor) -> bool:
    """Whether some gradient of `values` reaches each image of `x`; not of their sum, which norms may hold constant."""
    if not values.requires_grad:
        return False
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((values * weights).sum(), x, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.isfinite().all() and gradient.flatten(1).any(1).all())
