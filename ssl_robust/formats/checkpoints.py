"""Weight files: read without executing code, brought to timm's names; every tensor of the encoder's must fit."""

import json
import os
import re
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from .. import records
from ..settings import BadInput, listed

BROUGHT = Path(__file__).parents[1] / "embedded" / "weights"  # files that come with the package
CFG = ("pretrained_cfg", "default_cfg")  # what timm says of a model

# parts of a file that may hold the tensors, the first that does; "": the file itself is a state dict
ENTRIES = ("teacher", "student", "model", "state_dict", "")
# what torch.compile and FSDP put into names, anywhere
INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# what stands before the encoder's own names: wrappers, and what methods of training call it; 1: in an nn.Sequential
BEFORE = re.compile(r"((module|teacher|backbone|model|encoder|encoder_q|base_encoder|1)\.)*")
# what such files hold beside the encoder: heads, other copies of it, decoders, what only training needs
BESIDE = re.compile(
    r"(head|head_dist|fc|projector|predictor|classifier|dino_head|ibot_head|student|encoder_k|attacker|local_cls_norm|"
    r"rope_embed|\w+_loss)\.|momentum_|queue|decoder_|mask_token$|.*\b(total_(ops|params)|bias_mask)$"
)
# where a file keeps the mean of its pixels; `std` stands in the same place
MEAN = re.compile(r"(.*\.)?((new|pixel|image|input)_)?mean$")
# DINOv2's and DINOv3's names: blocks in chunks, whose second number counts through all of them, and SwiGLU
RENAMED = (
    (r"^blocks\.\d+\.(\d+\.(norm|attn|ls|mlp))", r"blocks.\1"),
    (r"mlp\.w12\.", "mlp.fc1."), (r"mlp\.w1\.", "mlp.fc1_g."), (r"mlp\.w2\.", "mlp.fc1_x."), (r"mlp\.w3\.", "mlp.fc2."),
    (r"^(register|storage)_tokens$", "reg_token"),
)  # fmt: skip


class UnreadObject:
    """Stands for whatever object lies beside the weights: nothing of its own class is imported or run."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class UnreadDict:
    """The same for kinds of dict; torch fills no other class than plain ones."""

    def __new__(cls, *args: Any) -> OrderedDict:
        return OrderedDict()


def locate(file: str, data_root: str = "") -> Path:
    """Where a row's weight file lies: relative paths start in the data folder, else the project; ~ is the home.

    A bare name that is not there may be that of something which the package brings, see BROUGHT.
    """
    home = os.path.expanduser(data_root) or records.ROOT
    path = home / Path(os.path.expanduser(file))  # that of nobody stays as it is
    brought = BROUGHT / Path(file).name
    return brought if file == brought.name and brought.exists() and not path.exists() else path


def read(path: Path) -> dict[str, Any]:
    """Content of a safetensors or PyTorch file, read without executing code; BadInput if missing or damaged.

    Files of this project carry a hash of their content, which must be right. The format is known by the first bytes.
    """
    try:
        with path.open("rb") as file:
            safetensors = file.read(9)[8:] == b"{"
        content = _safetensors(path) if safetensors else _torch_load(path)
    except BadInput:
        raise
    except Exception as error:  # a damaged file raises whatever it leads to
        why = getattr(error, "strerror", None) or "half a file, or objects that could run code"
        raise BadInput(f"The checkpoint {path} cannot be read ({why}); correct the path or fetch it again.") from None
    if not isinstance(content, dict):
        raise _other(path, f"a single {type(content).__name__}")
    return content


def _other(path: Path, what: str) -> BadInput:
    return BadInput(f"The checkpoint {path} is no plain state dict but holds {what}; save the model's state_dict().")


def _safetensors(path: Path) -> dict[str, Any]:
    content, about = records.read_tensors(path, "fetch or make it again")
    for name in CFG:
        with suppress(KeyError, ValueError):  # not there, or no JSON
            content[name] = json.loads(about[name])
    return content


def _torch_load(path: Path) -> Any:
    """torch.load for tensors only; options of training tools beside the weights are left unread."""
    names = []
    with suppress(ValueError):  # a file from before PyTorch 1.6
        names = get_unsafe_globals_in_checkpoint(path)
    unread = [(UnreadDict if re.search("dict$|Dict", name) else UnreadObject, name) for name in names]
    with safe_globals(unread), path.open("rb") as file:  # given a path, torch goes by its ending
        return torch.load(file, map_location="cpu", weights_only=True)


def recognise(content: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], str]:
    """The encoder's tensors of what `read` gave, under timm's names, and where they stood in it, in words.

    Tensors that are not the encoder's stay in, so that `load_weights` lists what it does not know.
    """
    for entry in ENTRIES:
        tensors = content.get(entry) if entry else content
        if isinstance(tensors, dict) and any(isinstance(value, Tensor) for value in tensors.values()):
            return timm_names(_unwrapped(tensors, path)), f"state dict in '{entry}'" if entry else "state dict"
    raise _other(path, listed(sorted(map(str, content))) or "nothing")


def _unwrapped(tensors: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Tensors under the names that they have in the model itself, without means and stds of pixels."""
    state: dict[str, Tensor] = {}
    colours = sum(_colours(tensors), ())
    for key, value in tensors.items():
        if key in colours or not isinstance(value, Tensor):
            continue
        name = BEFORE.sub("", INSIDE.sub("", key), count=1)
        if name in state:
            raise _other(path, f"{name} twice")
        state[name] = value
    return state


def normalisations(content: dict[str, Any]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Each (mean, std) of pixels that what `read` gave keeps for its model, once; what training used is not read."""
    parts = [content, *(content.get(name) for name in (*CFG, *ENTRIES))]
    found = [(_three(part[mean]), _three(part[std])) for part in parts for mean, std in _colours(part)]
    return list(dict.fromkeys(found))


def _colours(part: Any) -> list[tuple[str, str]]:
    """Keys of a dict at which mean and std of a normalisation stand."""
    named = [key for key in part if isinstance(key, str) and MEAN.match(key)] if isinstance(part, dict) else []
    both = [(mean, mean.removesuffix("mean") + "std") for mean in named]
    return [(mean, std) for mean, std in both if _three(part[mean]) and _three(part.get(std))]


def _three(value: Any) -> tuple[float, ...]:
    """The three numbers of a colour; () for anything else."""
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    except Exception:  # no numbers, or some that are not there
        return ()
    return tuple(numbers) if len(numbers) == 3 else ()


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of DINOv2 and DINOv3 to timm's; names of other encoders are timm's already."""
    if not any(key.endswith("ls1.gamma") for key in state):
        return state
    three, named = "storage_tokens" in state, {}
    for key, value in state.items():
        for old, new in RENAMED + ((r"\.ls([12])\.gamma$", r".gamma_\1"),) * three:
            key = re.sub(old, new, key)
        if three and key.endswith("qkv.bias"):  # that of the keys is masked, so it may hold anything
            block = key.removesuffix("qkv.bias")
            named[f"{block}q_bias"], _, named[f"{block}v_bias"] = value.chunk(3)
        else:
            named[key] = value
    if {"reg_token", "cls_token", "pos_embed"} <= named.keys() and "reg_token" not in state:
        # timm's position embedding of models with registers has no place for the CLS token: it is added beforehand
        positions = named["pos_embed"]
        named |= {"cls_token": named["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return named


def load_weights(backbone: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Copy every tensor of `state` into `backbone`; BadInput lists what is missing, left over or of another shape.

    What is known to stand beside encoders is left out, and a bias of zeros; a counter of batch norm may be missing, as
    nothing but training reads it.
    """
    own = backbone.state_dict()
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    beside = [k for k, v in state.items() if BESIDE.match(k) or (k.endswith("bias") and not v.any())]
    state = counters | {k: v for k, v in state.items() if k in own or k not in beside}
    wrong = [f"missing {k}" for k in own.keys() - state.keys()] + [f"left over {k}" for k in state.keys() - own.keys()]
    shapes = {k: (tuple(state[k].shape), tuple(own[k].shape)) for k in own.keys() & state.keys()}
    wrong += [f"{k} has shape {given}, not {wanted}" for k, (given, wanted) in shapes.items() if given != wanted]
    if wrong:
        found = listed(sorted(wrong))
        raise BadInput(f"The checkpoint does not fit {what}: {found}; name as timm the model it was made for.")
    for key, value in state.items():
        kind = value.is_floating_point() or value.dtype == torch.int64  # counters
        if not kind or not value.float().isfinite().all():
            raise BadInput(f"The checkpoint of {what} holds no finite plain numbers in {key}; fetch or make it again.")
    backbone.load_state_dict(state)
