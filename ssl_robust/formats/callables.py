"""Encoders of one's own: a Python function from images to tokens, found by its name and tried before it is used."""

import glob
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .. import records
from ..settings import NOTEBOOKS, BadInput, EncoderRow

# largest difference of two answers about the same image, as a share of the largest token: computed again, and in
# another batch, where sums of lower precision may be added up in another order
REPEATED, BATCHED = 1e-5, 1e-2


class Own(nn.Module):
    """A callable in the place of a timm model. The modules that it is or uses are part of it: frozen, moved, hashed."""

    own = True  # which encoders ask
    answers: tuple[str, tuple[Tensor, ...]]  # its name, and tokens that it gave; see measure

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]], call: str, uses: list[nn.Module]) -> None:
        super().__init__()
        self.function, self.call, self.uses = function, call, nn.ModuleList(uses)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """What the callable gives; BadInput unless it is cls (B, D) and patches (B, D, h, w), on `grid` if given."""
        given = self.function(x)
        both = given if isinstance(given, tuple | list) else (given,)
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in both]
        patches = shapes[-1]
        right = [len(s) for s in shapes] == [2, 4] and shapes[0] == patches[:2] and patches[0] == len(x)
        if not right or (grid and patches[2:] != grid):
            wanted = "(B, D) and (B, D, {}, {})".format(*(grid or "hw"))
            said = f"{' and '.join(map(str, shapes))} for images {tuple(x.shape)}"
            raise BadInput(f"{self.call} must give cls and patches of shapes {wanted} but gives {said}; correct it.")
        return tuple(given)

    @cached_property
    def computes(self) -> str:
        """A name for its answers: that of earlier ones that are the same up to rounding, else a new one.

        So what it computes is known again, whatever files it has that from, and on any number of threads.
        """
        name, given = self.answers
        tokens = {str(i): t.detach().contiguous() for i, t in enumerate(given)}
        folder, new = records.home() / "callables", records.state_hash(tokens)
        for path in sorted(folder.glob(f"{glob.escape(name)}__*.safetensors")):
            with suppress(BadInput):
                before = records.read_tensors(path)[0]
                if _alike([before[k] for k in sorted(before)], list(tokens.values()), REPEATED):
                    return path.stem.rpartition("__")[2]
        records.write_tensors(tokens, {}, folder / f"{name}__{new}.safetensors")
        return new


def find(row: EncoderRow) -> Own:
    """The function that the row's `call` names, as an encoder; BadInput if there is none."""
    function = named(row.call, f"Encoder '{row.name}'")
    module = sys.modules[row.call.partition(":")[0]]
    return Own(function, row.call, _modules(module, function))


def named(call: str, who: str) -> Callable:
    """The function 'module:function' of notebooks/, the project's folder or the current one.

    BadInput, which begins with `who`, if there is none.
    """
    name, _, attribute = call.partition(":")
    before = sys.path[:]
    sys.path[:0] = [str(place) for place in (records.ROOT / "notebooks", NOTEBOOKS, records.ROOT, Path.cwd())]
    try:
        importlib.invalidate_caches()  # the file may just have been written
        # read anew each time: in a running kernel the file may have been edited since
        module = importlib.reload(sys.modules[name]) if name in sys.modules else importlib.import_module(name)
        function = getattr(module, attribute)
    except (Exception, SystemExit) as error:
        where = "'module:function' is looked up in notebooks/ and the current folder"
        raise BadInput(f"{who}: {call} cannot be imported ({_line(error)}); correct it, {where}.") from None
    finally:
        sys.path[:] = before
    if not callable(function) or isinstance(function, type):
        raise BadInput(f"{who}: {call} is no function; correct it.")
    return function


def _line(error: BaseException) -> str:
    """An error in one line of bearable length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _modules(module: ModuleType, function: Callable) -> list[nn.Module]:
    """Modules that a function can reach by its file, its object or the function around it; not those it consists of."""
    around = getattr(function, "__self__", None)
    holders = [h for h in (module, function, around) if not isinstance(h, nn.Module)]
    reached = [around, *(v for holder in holders for v in getattr(holder, "__dict__", {}).values())]
    reached += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    own = set(function.modules()) if isinstance(function, nn.Module) else set()
    return [m for m in dict.fromkeys(v for v in reached if isinstance(v, nn.Module)) if m not in own]


def measure(row: EncoderRow, own: Own, mean: Tensor, std: Tensor, native: int) -> tuple[int, int]:
    """Patch side and D of a callable, tried on images of `native` px that are normalised by mean and std.

    Raises BadInput if it fails, its tokens fit no grid or are no numbers, the image gets no gradient, or its answer
    about an image varies or depends on the other images.
    """
    who = f"Encoder '{row.name}': "
    x = torch.rand(2, 3, native, native, generator=torch.Generator().manual_seed(0)).requires_grad_()
    try:
        given = own((x - mean) / std)
        with torch.no_grad():
            again, alone = own((x - mean) / std), own((x[1:] - mean) / std)
    except BadInput as problem:
        raise BadInput(f"{who}{problem}") from None
    except Exception as error:
        said = f"fails on images {tuple(x.shape)} ({_line(error)})"
        raise BadInput(f"{who}{row.call} {said}; correct it.") from None
    down, across = given[1].shape[2:]
    steady = _alike(again, given, REPEATED) and _alike(alone, [t[1:] for t in given], BATCHED)
    needed = {
        "gives tokens that are NaN or infinite; correct it or its weights": all(t.isfinite().all() for t in given),
        "gives cls or patches without a gradient of the image; use differentiable torch operations without no_grad "
        "or detach": all(_has_gradient(t, x) for t in given),
        "gives other tokens when asked again, or among other images; put its modules into eval mode and compute "
        "nothing at random or across the batch": steady,
        f"gives {down} x {across} patch tokens for {native} x {native} px; give a square grid whose side divides the "
        "native size, or set native": down == across and down > 0 and native % down == 0,
    }
    for problem, fine in needed.items():
        if not fine:
            raise BadInput(f"{who}{row.call} {problem}.")
    patch = native // down
    own.answers = row.name, tuple(t.detach() for t in (*given, *_elsewhere(own, native + patch, native + 2 * patch)))
    return patch, given[1].shape[1]


@torch.no_grad()
def _elsewhere(own: Own, height: int, width: int) -> tuple[Tensor, ...]:
    """What a callable gives for an image of another size; nothing if it takes none."""
    try:
        return own(torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)))
    except Exception:  # refusing such images is its own affair
        return ()


def _alike(some: Sequence[Tensor], others: Sequence[Tensor], share: float) -> bool:
    """Whether tensors have the same shapes, and values that differ by no more than a share of the largest."""
    if [a.shape for a in some] != [b.shape for b in others]:
        return False
    return all(bool((a - b).abs().max() <= share * b.abs().max()) for a, b in zip(some, others, strict=True))


def _has_gradient(values: Tensor, x: Tensor) -> bool:
    """Whether some gradient of `values` reaches each image of `x`; not of their sum, which norms may hold constant."""
    if not values.requires_grad:
        return False
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((values * weights).sum(), x, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.isfinite().all() and gradient.flatten(1).any(1).all())
