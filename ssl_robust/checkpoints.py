"""Weight files: read without executing code, recognised by their keys, brought to timm's names; every tensor counts."""

import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from . import records
from .settings import BadInput

LISTED = 20  # tensors that a refusal names, before it counts the rest
CLASSIFIER = ("head.", "head_dist.", "fc.")  # a classifier that a checkpoint brings along is not part of the encoder


class Format(NamedTuple):
    """How one kind of file names its tensors; the patterns are matched at the start of a key."""

    name: str  # what such a file is, for tables and plans
    entry: str  # the part of the file that holds the tensors; "": the file itself is a state dict
    mark: str  # a key that only this kind of file has
    prefix: str  # what stands before the encoder's own keys
    rest: str  # keys that belong to such a file but not to the encoder; "": none


# heads, momentum copies and queue of solo-learn's methods; what thop's counter adds; the normalisation that DeACL's
# authors keep beside the weights (the row's `normalise` says it here)
SOLO = (
    r"(momentum_)?(projector|predictor|classifier|head)\.|momentum_(backbone|encoder)\.|queue|"
    r".*\btotal_(ops|params)$|.*\bnormalize\.(mean|std)$"
)
WRAPPED = r"((module|_orig_mod)\.)*"  # DistributedDataParallel, torch.compile

# the first that fits counts, so special ones stand before general ones
FORMATS = (
    Format("DINOv2 training checkpoint (teacher)", "model", r"teacher\.backbone\.", r"teacher\.backbone\.",
           r"student\.|teacher\.(dino|ibot)_head\.|\w+_loss\."),
    Format("DINOv2 teacher checkpoint", "teacher", r"(module\.)?backbone\..*ls1\.gamma$", r"(module\.)?backbone\.",
           r"(module\.)?(dino|ibot)_head\."),
    Format("DINO teacher checkpoint", "teacher", "", r"(module\.)?(backbone\.)?", r"(module\.)?head\."),
    Format("DINO student checkpoint", "student", "", r"(module\.)?(backbone\.)?", r"(module\.)?head\."),
    Format("DeACL checkpoint of the paper's code", "state_dict", r"backbone\.(encoder|model)\.",
           r"backbone\.(encoder\.model|encoder|model)\.", SOLO),
    Format("solo-learn checkpoint", "state_dict", r"backbone\.", r"backbone\.", SOLO),
    Format("solo-learn checkpoint (early)", "state_dict", r"encoder\.", r"encoder\.", SOLO),
    # its projector is the fc of its encoder
    Format("SimSiam checkpoint", "state_dict", r"module\.encoder\.", r"module\.encoder\.",
           r"module\.(encoder\.fc|predictor)\."),
    Format("MAE checkpoint with decoder", "model", r"decoder_", "", r"mask_token$|decoder_"),
    Format("DINOv2 state dict", "", r"mask_token$", "", r"mask_token$"),
    Format("state dict in 'model'", "model", "", WRAPPED, ""),
    Format("state dict in 'state_dict'", "state_dict", "", WRAPPED, ""),
    Format("state dict", "", "", WRAPPED, ""),
)  # fmt: skip
# what training leaves in a file beside the model; a tensor anywhere else in the file is left over
TRAINING = re.compile(
    r"student$|.*(optim|sched|scaler|loss|loops|callbacks)|epoch|iter|global_step|args|config|cfg|hyper_parameters|"
    r"hparams|.*version|arch|best|native_amp"
)
# objects of these are options and counters beside the weights; they are not imported but left unread
UNREAD = re.compile(
    r"(argparse|omegaconf|hydra|pytorch_lightning|lightning|lightning_fabric|torchmetrics|numpy|typing|enum|datetime)\.|"
    r"builtins\.(dict|list|tuple|int|float|str|bool|object)$|collections\.(defaultdict|deque)$|"
    r"pathlib\.(Path|PosixPath|WindowsPath)$"
)


# --- reading ---


class Unread:
    """Stands for an option or a counter beside the weights: nothing of the object's own class is imported or run."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class UnreadDict:
    """The same for kinds of dict; torch fills no other class than plain ones."""

    def __new__(cls, *args: Any) -> OrderedDict:
        return OrderedDict()


def read(path: Path) -> dict[str, Any]:
    """Content of a safetensors or PyTorch file, read without executing code; BadInput if missing or damaged.

    Files of this project carry a hash of their content, which must be right.
    """
    if not path.is_file():
        raise BadInput(
            f"The checkpoint {path} does not exist; correct the path (relative ones start in the data folder)."
        )
    try:
        content = records.read_tensors(path)[0] if path.suffix == ".safetensors" else _torch_load(path)
    except BadInput:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: truncated?); fetch it again."
        ) from None
    except Exception as error:  # pickle errors have no common class that is public
        raise BadInput(f"The checkpoint {path} is no plain state dict ({type(error).__name__}); save one.") from None
    if not isinstance(content, dict):
        raise BadInput(f"The checkpoint {path} is no plain state dict but a {type(content).__name__}; save one.")
    return content


def _torch_load(path: Path) -> Any:
    """torch.load for tensors only; options of training tools beside the weights are left unread."""
    names = get_unsafe_globals_in_checkpoint(str(path)) if zipfile.is_zipfile(path) else []
    foreign = sorted(name for name in names if not UNREAD.match(name))
    if foreign:
        raise BadInput(
            f"The checkpoint {path} is no plain state dict: it holds {foreign[0]}, which could run code; "
            f"save the model's state_dict() alone."
        )
    with safe_globals([(UnreadDict if name.endswith("dict") or "Dict" in name else Unread, name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


# --- recognising ---


def read_weights(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors in a weight file under timm's names; BadInput if it is damaged or no kind of FORMATS."""
    return recognise(read(path), path)[0]


def recognise(content: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], str]:
    """The encoder's tensors of what `read` gave, under timm's names, and what kind of file it is.

    Tensors that no format knows stay in, under names that no encoder has, so that `load_weights` lists them.
    """
    for kind in FORMATS:
        tensors = content.get(kind.entry) if kind.entry else content
        if _state_dict(tensors) and any(re.match(kind.mark, key) for key in tensors):
            state = _encoder_part(tensors, kind, path)
            if kind.entry:
                others = {k: v for k, v in content.items() if k != kind.entry and not TRAINING.match(k)}
                state |= {f"{key} (outside '{kind.entry}')": v for key, v in _tensors(others)}
            return timm_names(state), kind.name
    entries = ", ".join(sorted(map(str, content))[:5]) or "nothing"
    raise BadInput(f"The checkpoint {path} is no plain state dict: it holds {entries}; save the model's state_dict().")


def _state_dict(tensors: Any) -> bool:
    """Whether this part of a file maps names to tensors (and perhaps to other things)."""
    named = isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors)
    return named and any(isinstance(value, Tensor) for value in tensors.values())


def _encoder_part(tensors: dict[str, Any], kind: Format, path: Path) -> dict[str, Tensor]:
    """Tensors of the encoder without their prefix; others under a name that says so."""
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if kind.rest and re.match(kind.rest, key):
            continue
        if not isinstance(value, Tensor):
            if not kind.entry and TRAINING.match(key):
                continue
            raise BadInput(
                f"The checkpoint {path} is no plain state dict: its {key} is a {type(value).__name__}, not a tensor; "
                f"save the model's state_dict()."
            )
        prefix = re.match(kind.prefix, key)
        state[key[prefix.end() :] if prefix else f"{key} (outside the encoder)"] = value
    return state


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors inside nested dicts with the names that lead to them."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's names to timm's; names of other encoders are timm's already."""
    if not any(key.endswith("ls1.gamma") for key in state):
        return state
    # blocks may be stored in chunks; the second number counts through all of them: blocks.0.3 is block 3
    chunk = re.compile(r"^blocks\.\d+\.(\d+\.(norm|attn|ls|mlp))")
    swiglu = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}
    state = {
        re.sub(r"mlp\.w\d+\.", lambda m: swiglu.get(m[0], m[0]), chunk.sub(r"blocks.\1", key)): value
        for key, value in state.items()
        if key != "mask_token"  # only pretraining has masked patches
    }
    if "register_tokens" in state and {"cls_token", "pos_embed"} <= state.keys():
        # timm's position embedding of models with registers has no place for the CLS token: it is added beforehand
        positions = state.pop("pos_embed")
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return state


# --- loading ---


def load_weights(backbone: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Copy every tensor of `state` into `backbone`; BadInput lists what is missing, left over or of another shape."""
    own = backbone.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith(CLASSIFIER)}
    wrong = [f"missing {k}" for k in own.keys() - state.keys()] + [f"left over {k}" for k in state.keys() - own.keys()]
    wrong += [
        f"{k} has shape {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own.keys() & state.keys()
        if state[k].shape != own[k].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise BadInput(
            f"The checkpoint does not fit {what}: {'; '.join(sorted(wrong)[:LISTED])}{more}; name as timm the model it "
            f"was made for."
        )
    backbone.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})
