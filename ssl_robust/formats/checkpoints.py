"""Weight files: read without executing code, recognised by their keys, brought to timm's names; every tensor counts."""

import io
import json
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from .. import records
from ..settings import BadInput

LISTED = 3  # tensors that a refusal names, before it counts the rest
UNPACKED = 10  # times its size that a file may hold; torch.save compresses nothing
CLASSIFIER = ("head.", "head_dist.", "fc.")  # a classifier that a checkpoint brings along is not part of the encoder


# what torch.compile and FSDP put into names, anywhere, and what stands where DistributedDataParallel's `module.` may
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER = re.compile(r"((module|teacher|student|backbone|model)\.)*")


class Format(NamedTuple):
    """How one kind of file names its tensors; the patterns are matched at the start of an `unwrapped` key."""

    name: str  # what such a file is, for tables and plans
    entry: str  # the part of the file that holds the tensors; "": the file itself is a state dict
    mark: str  # a key that only this kind of file has
    prefix: str  # what stands before the encoder's own keys
    rest: str  # keys that belong to such a file but not to the encoder; "": none


# heads, momentum copies and queue of self-supervised methods; what thop's counter adds
SOLO = (
    r"(momentum_)?(projector|predictor|classifier|head)\.|momentum_(backbone|encoder)\.|encoder_k\.|queue|"
    r".*\btotal_(ops|params)$"
)
QUERY = r"(encoder|encoder_q|base_encoder)\."
INSIDE = r"((backbone|model|1)\.)*"  # a model beside its normalisation, in a wrapper or an nn.Sequential

# the first that fits counts, so special ones stand before general ones
FORMATS = (
    Format("DINOv2 training checkpoint (teacher)", "model", r"teacher\.backbone\.", r"teacher\.backbone\.",
           r"student\.|teacher\.(dino|ibot)_head\.|\w+_loss\."),
    Format("DINOv2 teacher checkpoint", "teacher", r"backbone\..*ls1\.gamma$", r"backbone\.", r"(dino|ibot)_head\."),
    Format("DINO teacher checkpoint", "teacher", "", r"(backbone\.)?", r"head\."),
    Format("DINO student checkpoint", "student", "", r"(backbone\.)?", r"head\."),
    Format("DeACL checkpoint of the paper's code", "state_dict", r"backbone\.(encoder|model)\.",
           r"backbone\.(encoder\.model|encoder|model)\.", SOLO),
    Format("solo-learn checkpoint", "state_dict", r"backbone\.", r"backbone\.", SOLO),
    # the projector is the fc or the head of the encoder
    Format("SimSiam, MoCo or early solo-learn checkpoint", "state_dict", QUERY, QUERY, rf"{SOLO}|{QUERY}(fc|head)\."),
    Format("robustness checkpoint", "model", r"attacker\.", r"model\.", r"attacker\."),
    Format("MAE checkpoint with decoder", "model", r"decoder_", "", r"mask_token$|decoder_"),
    Format("DINOv3 state dict", "", r"storage_tokens$", "", ""),
    Format("DINOv2 state dict", "", r"mask_token$", "", r"mask_token$"),
    Format("state dict in 'model'", "model", "", INSIDE, ""),
    Format("state dict in 'state_dict'", "state_dict", "", INSIDE, ""),
    Format("state dict", "", "", INSIDE, ""),
)  # fmt: skip
# where a file keeps the mean of its pixels; `std` stands in the same place
MEAN = re.compile(r"(.*\.)?((new|pixel|image|input)_)?mean$")
CFG = ("pretrained_cfg", "default_cfg")  # what timm says of a model
# what training leaves in a file beside the model; a tensor anywhere else in the file is left over
TRAINING = re.compile(
    r"student$|.*(optim|sched|scaler|loss|loops|callbacks)|epoch|iter|global_step|args|config|.*cfg|hyper_parameters|"
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


def locate(file: str, data_root: str = "") -> Path:
    """Where a row's weight file lies: ~ is the home folder, relative paths start in the data folder, else the project.

    BadInput for the home of an unknown user.
    """
    try:
        return (Path(data_root).expanduser() if data_root else records.ROOT) / Path(file).expanduser()
    except RuntimeError:
        raise BadInput(f"The checkpoint {file} lies in the home folder of nobody here; write the whole path.") from None


def read(path: Path) -> dict[str, Any]:
    """Content of a safetensors or PyTorch file, read without executing code; BadInput if missing or damaged.

    Files of this project carry a hash of their content, which must be right. The format is known by the first bytes.
    """
    head = _head(path)
    try:
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1e8:  # the longest header that the format allows
            tensors, about = records.read_tensors(path, "fetch or make it again")
            return tensors | {name: _json(about[name]) for name in CFG if name in about}
        if not head.startswith((b"PK", b"\x80")):  # zip, pickle
            raise BadInput(f"The checkpoint {path} is not a weight file ({_begins(head)}); fetch it again.")
        content = _torch_load(path)
    except BadInput:
        raise
    except Exception as error:  # a damaged file raises whatever it leads to
        raise BadInput(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: truncated?); fetch it again."
        ) from None
    if not isinstance(content, dict):
        raise BadInput(f"The checkpoint {path} is no plain state dict but a {type(content).__name__}; save one.")
    return content


def _head(path: Path) -> bytes:
    """The first bytes of a file; BadInput if it cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(60)
    except FileNotFoundError:
        problem = "does not exist; correct the path (relative ones start in the data folder, else in the project's)"
    except IsADirectoryError:
        problem = "is a folder; name the weight file in it"
    except PermissionError as error:
        problem = f"cannot be opened ({error.strerror}); make it readable"
    except (OSError, ValueError) as error:
        problem = f"cannot be opened ({getattr(error, 'strerror', error)}); correct the path"
    raise BadInput(f"The checkpoint {path} {problem}.")


def _begins(head: bytes) -> str:
    """What a file that holds no weights is seen to be."""
    line = head.strip().splitlines()[:1]
    return f"it begins {line[0][:40].decode('latin-1')!r}" if line else "it is empty"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _torch_load(path: Path) -> Any:
    """torch.load for tensors only; options of training tools beside the weights are left unread."""
    names = _names(path)
    unread = [(UnreadDict if re.search("dict$|Dict", n) else Unread, n) for n in names if UNREAD.match(n)]
    try:
        with safe_globals(unread), path.open("rb") as file:  # given a path, torch goes by its ending
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = [n for n in names if not UNREAD.match(n) and not re.match(r"torch\.|collections\.|_codecs\.", n)]
        why = f"it holds {foreign[0]}, which could run code" if foreign else type(error).__name__
    raise BadInput(f"The checkpoint {path} is no plain state dict: {why}; save the model's state_dict() alone.")


def _names(path: Path) -> list[str]:
    """Names of all objects that a PyTorch file wants imported, from its pickles, which are not run."""
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            with zipfile.ZipFile(file) as archive:
                return _imports(io.BytesIO(archive.read(_pickle_in(archive, path))), 1)
        file.seek(0)  # before PyTorch 1.6: three small pickles, the content, the keys; then the numbers
        return _imports(file, 5)


def _pickle_in(archive: zipfile.ZipFile, path: Path) -> str:
    """Name of the pickle in a PyTorch zip; BadInput for other zips, and for one that unpacks to far more than it is."""
    names = [m.filename for m in archive.infolist()]
    found = [name for name in names if name.endswith("/data.pkl")]
    if not found:
        raise BadInput(
            f"The checkpoint {path} is a zip file without PyTorch's data.pkl (it holds {', '.join(names[:2])}); save "
            f"the model's state_dict() with torch.save."
        )
    if any(name.endswith("/constants.pkl") for name in names):
        raise BadInput(f"The checkpoint {path} is a TorchScript program; save the model's state_dict() alone.")
    whole = sum(m.file_size for m in archive.infolist())
    if whole > UNPACKED * path.stat().st_size:
        raise BadInput(
            f"The checkpoint {path} is compressed and would unpack to {whole / 1e9:.3g} GB; save it anew with "
            f"torch.save, which does not compress."
        )
    return found[0]


def _imports(file: BinaryIO, pickles: int) -> list[str]:
    """Names that so many pickles, one after the other, want imported."""
    names = set()
    for _ in range(pickles):
        try:
            names |= {arg.replace(" ", ".") for op, arg, _ in pickletools.genops(file) if op.name == "GLOBAL"}
        except ValueError:  # no pickle: torch.load says it
            break
    return sorted(re.sub(r"^__builtin__\.", "builtins.", name) for name in names)  # as Python 2 called it


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
        if _state_dict(tensors) and any(re.match(kind.mark, unwrapped(key)) for key in tensors):
            state = _encoder_part(tensors, kind, path)
            if kind.entry:
                others = {k: v for k, v in content.items() if k != kind.entry and not TRAINING.match(str(k))}
                state |= {f"{key} (outside '{kind.entry}')": v for key, v in _tensors(others)}
            return timm_names(state), kind.name
    entries = ", ".join(sorted(map(str, content))[:5]) or "nothing"
    raise BadInput(f"The checkpoint {path} is no plain state dict: it holds {entries}; save the model's state_dict().")


def unwrapped(key: str) -> str:
    """A tensor's name without what wrappers around the model, or around its parts, have put into it."""
    key = WRAPPERS.sub("", key)
    outer = OUTER.match(key)[0]
    return outer.replace("module.", "") + key[len(outer) :]


def _state_dict(tensors: Any) -> bool:
    """Whether this part of a file maps names to tensors (and perhaps to other things)."""
    named = isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors)
    return named and any(isinstance(value, Tensor) for value in tensors.values())


def _encoder_part(tensors: dict[str, Any], kind: Format, path: Path) -> dict[str, Tensor]:
    """Tensors of the encoder without their prefix; others under a name that says so."""
    state: dict[str, Tensor] = {}
    beside = {key for mean in _means(tensors) for key in (mean, _std_of(mean))}
    for key, value in tensors.items():
        plain = unwrapped(key)
        if key in beside or (kind.rest and re.match(kind.rest, plain)):
            continue
        if not isinstance(value, Tensor):
            if not kind.entry and TRAINING.match(key):
                continue
            raise BadInput(
                f"The checkpoint {path} is no plain state dict: its {key} is a {type(value).__name__}, not a tensor; "
                f"save the model's state_dict()."
            )
        _need_plain(key, value, path)
        prefix = re.match(kind.prefix, plain)
        name = plain[prefix.end() :] if prefix else f"{plain} (outside the encoder)"
        state[f"{key} (a second {name})" if name in state else name] = value
    return state


def _need_plain(key: str, value: Tensor, path: Path) -> None:
    """BadInput for a tensor that is stored in another way than as its numbers."""
    kinds = {"meta": value.is_meta, "quantised": value.is_quantized, "sparse": value.layout is not torch.strided}
    found = [kind for kind, so in kinds.items() if so] or [type(value).__name__]
    if found != ["Tensor"] and found != ["Parameter"]:
        raise BadInput(
            f"The checkpoint {path} holds no plain numbers: its {key} is a {found[0]} tensor; save plain "
            f"floating-point tensors (to_dense(), dequantize())."
        )


def normalisations(content: dict[str, Any]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Each (mean, std) of pixels that what `read` gave keeps for its model, once; what training used is not read."""
    found = []
    for part in (content, *(content.get(name) for name in (*CFG, *(kind.entry for kind in FORMATS)))):
        found += [(_three(part[m]), _three(part[_std_of(m)])) for m in _means(part)]
    return list(dict.fromkeys(found))


def _means(part: Any) -> list[str]:
    """Keys of a dict at which the mean of a normalisation stands."""
    named = [key for key in part if isinstance(key, str) and MEAN.match(key)] if isinstance(part, dict) else []
    return [key for key in named if _three(part[key]) and _three(part.get(_std_of(key)))]


def _std_of(mean: str) -> str:
    return mean.removesuffix("mean") + "std"


def _three(value: Any) -> tuple[float, ...]:
    """The three numbers of a colour; () for anything else."""
    if isinstance(value, Tensor):
        stored = value.numel() == 3 and value.layout is torch.strided and not value.is_meta
        value = value.flatten().tolist() if stored else ()
    colour = isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(v, int | float) for v in value)
    return tuple(map(float, value)) if colour else ()


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors inside nested dicts with the names that lead to them."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of DINOv2 and DINOv3 to timm's; names of other encoders are timm's already."""
    if not any(key.endswith("ls1.gamma") for key in state):
        return state
    # blocks may be stored in chunks; the second number counts through all of them: blocks.0.3 is block 3
    chunk = re.compile(r"^blocks\.\d+\.(\d+\.(norm|attn|ls|mlp))")
    swiglu = {"mlp.w12.": "mlp.fc1.", "mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2."}
    state = {
        re.sub(r"mlp\.w\d+\.", lambda m: swiglu.get(m[0], m[0]), chunk.sub(r"blocks.\1", key)): value
        for key, value in state.items()
        if key != "mask_token"  # only pretraining has masked patches
    }
    if "storage_tokens" in state:
        return _dinov3_names(state)
    if "register_tokens" in state and {"cls_token", "pos_embed"} <= state.keys():
        # timm's position embedding of models with registers has no place for the CLS token: it is added beforehand
        positions = state.pop("pos_embed")
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return state


def _dinov3_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv3's names to timm's, which has no bias of keys; the periods of its positions follow from the model."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("qkv.bias"):
            mask = state.get(f"{key}_mask", torch.ones(()))  # where a bias is masked, it may hold anything
            query, keys, values = torch.where(mask == 0, 0, value * mask).chunk(3)
            block = key.removesuffix("qkv.bias")
            named |= {f"{block}q_bias": query, f"{block}k_bias": keys, f"{block}v_bias": values}
        elif not re.match(r"rope_embed\.periods$|local_cls_norm\.|.*qkv\.bias_mask$", key):
            key = re.sub(r"ls([12])\.gamma$", r"gamma_\1", key)
            named["reg_token" if key == "storage_tokens" else key] = value
    return named


# --- loading ---


def load_weights(backbone: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Copy every tensor of `state` into `backbone`; BadInput lists what is missing, left over or of another shape.

    A counter of batch norm may be missing, as nothing but training reads it.
    """
    own = backbone.state_dict()
    state = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | {
        k: v for k, v in state.items() if k in own or not _without_effect(k, v)
    }
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
    backbone.load_state_dict({k: _numbers(k, v, own[k].dtype, what) for k, v in state.items()})


def _without_effect(key: str, value: Tensor) -> bool:
    """Whether a model can do without a tensor: its encoder's tokens are the same."""
    return key.startswith(CLASSIFIER) or (key.endswith("bias") and not value.any())


def _numbers(key: str, value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A weight as the model computes with it; BadInput if it is of another kind, or not finite."""
    if dtype.is_floating_point and not value.is_floating_point():
        raise BadInput(f"The checkpoint of {what} holds {value.dtype} numbers in {key}; save floating-point weights.")
    value = value.to(dtype)
    if not value.isfinite().all():
        raise BadInput(f"The checkpoint of {what} holds NaN or infinite numbers in {key}; fetch or make it again.")
    return value
