"""How attack steps are computed: precision, images at a time, and what happens when memory runs out."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.overrides import TorchFunctionMode

torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: by default GPUs would round the factors of convolutions

# Tokens that fill a device; more at a time take more memory and are no faster (make bench shows it for this machine).
TOKENS = {"cpu": 2048, "cuda": 65536}
# Logits that take as much memory of a GPU as a token of a ViT-B does: with the 150 classes of ADE20k they are the most.
LOGITS = 10_000


def precision(setting: str, device: str) -> str:
    """'fp32' or 'bf16' for the setting 'auto', 'fp32' or 'bf16'; auto: bf16 where the device multiplies it faster.

    Those are GPUs from compute capability 8.0 on, and x86 CPUs with instructions for it: on one with avx512_bf16 steps
    on ViT-S/14 and on the embedded encoder were 1.8 to 2 times as fast as in fp32 (make bench). Others have not been
    measured.
    """
    if setting != "auto":
        return setting
    if device == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if any(able.get(name) for name in ("avx512_bf16", "amx_bf16")) else "fp32"


@contextmanager
def steps_in(precision: str, device: str | torch.device) -> Iterator[None]:
    """Context of attack steps: autocast to bf16; nothing for fp32, but for GPUs with 'tf32' in its factors.

    Weights and images stay fp32, and so do heads and losses (see heads.TaskModel). Predictions are made outside.
    """
    kind, matmul = torch.device(device).type, torch.get_float32_matmul_precision()
    attention = ExplicitAttention() if (precision, kind) == ("bf16", "cpu") else nullcontext()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else matmul)
    try:
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"), attention:
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)


class ExplicitAttention(TorchFunctionMode):
    """Attention as two matrix products and a softmax, which in bf16 on CPUs is faster than torch's fused kernel.

    A step on the embedded encoder takes half the time, on ViT-S/14 four fifths; in fp32 it makes no difference.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        more = any(isinstance(value, Tensor) or value for value in kwargs.values())  # a mask, dropout, scale or causal
        if func is not F.scaled_dot_product_attention or len(args) != 3 or more:
            return func(*args, **kwargs)
        query, key, value = args  # (B, heads, N, head_dim) each
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value


def batch_for(tokens: int, device: str, setting: str | int = "auto", logits: int = 0) -> int:
    """Images at a time: the setting, or for 'auto' as many as fill the device with their `tokens` and `logits` each.

    A rule instead of a measurement, because the rounding of results, and so the same tables for the same seed, depends
    on it; where memory lacks, `in_parts` goes below it.
    """
    tokens += logits // LOGITS if device == "cuda" else 0
    return max(1, TOKENS[device] // tokens) if setting == "auto" else setting


def tokens_of(patch: int, size: tuple[int, int], windows: int = 1) -> int:
    """Tokens of an image of `size` (H, W), or of so many windows of that size."""
    return windows * (1 + math.prod(-(-side // patch) for side in size))


Rows = Tensor | tuple[Tensor, ...]  # one or several tensors, (rows, ...) each


def in_parts(work: Callable[[slice], Rows], count: int, size: int) -> tuple[Rows, int]:
    """`work` on rows 0..count in parts of at most `size`, joined, and the size that was possible.

    When memory runs out the size is halved; a single image that does not fit raises torch's error.
    """
    done, parts = 0, []
    while done < count:
        rows = slice(done, min(done + size, count))
        try:
            part = work(rows)
        except RuntimeError as error:
            if size == 1 or not memory_lacks(error):
                raise
            part = None
        if part is None:  # outside of the block, where the failed call's tensors are no longer held
            size = (rows.stop - done + 1) // 2
            clear_device_cache(garbage_collection=True)
        else:
            parts.append(part)
            done = rows.stop
    whole = torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))
    return whole, size


def memory_lacks(error: RuntimeError) -> bool:
    """Libraries of a GPU have words of their own for it."""
    said = any(words in str(error) for words in ("ALLOC_FAILED", "CUDA error: out of memory"))
    return said or isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
