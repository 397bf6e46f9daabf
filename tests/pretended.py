"""A pretended device: a backend in Python whose tensors have the CPU's values and refuse all that a GPU would refuse.

After `register` the device 'pretended' exists in this process, for good, which is why tests that use it run in a
process of their own. Its tensors wrap tensors of the CPU; every operation on them raises Mixed, a sentence that names
the operation, where it meets a tensor of the CPU. What CUDA allows is allowed: the CPU's tensors of 0 dimensions in
operations of elements, its index tensors, and copies between devices. More strictly than on CUDA, nothing may be drawn
at random on the device: the CPU's generators cannot do it, and another one gives other numbers than the CPU's.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "pretended"
SETUP = "_setup_privateuseone_for_python_backend"  # of torch, private; without it nothing of this runs
COPIES = ("aten::_to_copy", "aten::copy_", "aten::set_")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
FACTORIES = ("empty.memory_format", "empty_strided")  # all that torch asks of a backend before there is a tensor of it
MADE: set[str] = set()  # names of operations that the device has computed


class Mixed(RuntimeError):
    """Something that raises on a GPU, or that a GPU would not compute as a CPU does."""


class OnDevice(Tensor):
    """A tensor of the device 'pretended'; `raw` is the CPU's tensor that has its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=torch.device(NAME, 0)
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        _refuse(func, args, kwargs)
        MADE.add(func.name())
        written = _written(func, args, kwargs)
        to_cpu = str(kwargs.get("device")) == "cpu"
        if "device" in kwargs:
            kwargs |= {"device": torch.device("cpu")}
        result = func(*_changed(_raw, args), **{name: _changed(_raw, value) for name, value in kwargs.items()})
        return result if to_cpu else _changed(partial(_wrapped, written=written), result)

    # what torch does for its own tensors alone, and for those of a GPU as well

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __format__(self, form: str) -> str:
        return format(self.raw, form)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.raw!r})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise Mixed("numpy() of a tensor of the device; call cpu() first.")


def _changed(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Arguments or results of an operation, with its tensors changed; they stand alone or in a list."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_changed(change, part) for part in value) if type(value) in (list, tuple) else value


def _raw(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, OnDevice) else tensor


def _wrapped(result: Tensor, written: list[Tensor]) -> Tensor:
    """A result on the device: the tensor that was written into, if it is one of them."""
    same = [t for t in written if t is result or _raw(t) is result]
    return same[0] if same else OnDevice(result)


@cache
def _writes(func: Any) -> list[tuple[int, str]]:
    """Places and names of the arguments that an operation writes into."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation writes into."""
    values = [kwargs.get(name, args[i] if i < len(args) else None) for i, name in _writes(func)]
    return [t for value in values for t in (value if isinstance(value, list | tuple) else [value]) if t is not None]


@cache
def _about(func: Any) -> tuple[str, bool, bool]:
    """The name of an operation, whether it may draw at random, and whether it is one of elements."""
    tags = func.tags
    return func.name().partition(".")[0], torch.Tag.nondeterministic_seeded in tags, torch.Tag.pointwise in tags


def _refuse(func: Any, args: tuple, kwargs: dict) -> None:
    """Mixed for what raises on a GPU."""
    name, draws, elements = _about(func)
    if draws and not _draws_nothing(func, args, kwargs):
        given = kwargs.get("generator")
        whose = "the CPU's global generator" if given is None else f"a generator of the {given.device}"
        raise Mixed(f"{name} draws on the device by {whose}; draw on the CPU and copy.")
    if name in COPIES:
        return
    for k, value in enumerate([*args, *kwargs.values()]):
        for tensor in value if type(value) in (list, tuple) else (value,):
            if not isinstance(tensor, Tensor) or isinstance(tensor, OnDevice):
                continue
            index = name in INDEXED and k == 1 and isinstance(args[0], OnDevice)
            scalar = tensor.ndim == 0 and (elements or name in INDEXED)
            if not index and (not scalar or any(tensor is t for t in _written(func, args, kwargs))):
                raise Mixed(f"{name} meets a tensor {tuple(tensor.shape)} of the CPU; move it to the device.")


def _draws_nothing(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operation that may draw does not: dropout of nothing, in attention or outside of training."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    share = next((given[n] for n in ("dropout_p", "p") if n in given), None)
    if share is None and "dropout_p" in names:
        share = 0.0
    return "generator" not in names and (share == 0 or given.get("train") is False)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Attention by the kernel that the CPU takes; for other people's backends torch itself takes the plain one."""
    three = (query, key, value)
    if (
        attn_mask is None
        and dropout_p == 0
        and torch._fused_sdp_choice(*_changed(_raw, three), is_causal=is_causal) == 1
    ):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*three, is_causal=is_causal)[0]
    return torch.nn.functional.scaled_dot_product_attention(*three, attn_mask, dropout_p, is_causal)


def _made(name: str) -> Any:
    """A factory of the device: what the CPU's makes, wrapped."""
    operation = getattr(torch.ops.aten, name.split(".")[0])
    overload = getattr(operation, name.partition(".")[2] or "default")

    def make(*args: Any, **kwargs: Any) -> Tensor:
        kwargs |= {"device": torch.device("cpu"), "pin_memory": False}
        return OnDevice(overload(*args, **kwargs))

    return make


class _Module:
    """What torch asks of torch.pretended."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """There is nothing to seed, as nothing may be drawn."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_kept: list[torch.library.Library] = []  # a library that is dropped takes its operations with it


def able() -> bool:
    """Whether this torch can have a backend in Python."""
    return hasattr(backend_registration, SETUP)


def register() -> torch.device:
    """The device, which this process has from now on."""
    if not _kept:
        getattr(backend_registration, SETUP)(NAME, backend_module=_Module())
        library = torch.library.Library("aten", "IMPL")
        for name in FACTORIES:
            library.impl(name, _made(name), "PrivateUse1")
        # nothing is cast: asked for bf16 the device computes in fp32
        casts = torch.library.Library("_", "IMPL")
        casts.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        _kept.extend([library, casts])
    return torch.device(NAME, 0)
