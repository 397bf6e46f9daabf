"""Encoders, pixels in [0,1] to a CLS token and patch tokens: timm models, local checkpoints, the embedded one."""

from functools import cached_property, partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import records
from .settings import BadInput, EncoderRow, Settings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EMBEDDED_WEIGHTS = records.PACKAGE / "weights" / "embedded_vit.safetensors"
CLASSIFIER = ("head.", "head_dist.", "fc.")  # a classifier that a checkpoint brings along is not part of the encoder


class ConvStem(PatchEmbed):
    """Three stride-2 convolutions instead of one 8x8 projection: small vision transformers learn faster behind them."""

    def __init__(self, *args: object, embed_dim: int = 160, widths: tuple[int, ...] = (32, 64, 128), **kwargs: object):
        super().__init__(*args, embed_dim=embed_dim, **kwargs)
        layers: list[nn.Module] = []
        for c_in, c_out in zip((3, *widths), widths, strict=False):
            # group norm: the same function in train and eval mode, and at any batch size
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, c_out), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))


def embedded_backbone() -> VisionTransformer:
    """The architecture of the embedded encoder, randomly initialised: 1 M parameters, 0.07 GMAC at 64 px.

    `forward_features` maps normalised images (B, 3, H, W), H and W divisible by 8, to tokens (B, 1 + H/8 * W/8, 160):
    the CLS token first, then the patch tokens row by row. The position embedding (8x8) is interpolated to other sizes.
    """
    return VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=160,
        depth=4,
        num_heads=5,
        mlp_ratio=2.0,
        num_classes=0,
        dynamic_img_size=True,
        embed_layer=partial(ConvStem, widths=(32, 64, 128)),
    )


class Encoder(nn.Module):
    """A frozen encoder: images (B, 3, H, W) in [0,1] -> CLS token (B, D) and patch tokens (B, D, h, w).

    Normalisation happens inside. Images that the patch does not divide are padded on all sides with the mean colour, so
    h = ceil(H / patch), w = ceil(W / patch); the position embedding is interpolated to that grid. No weight ever gets a
    gradient; the images do.
    """

    def __init__(
        self, backbone: nn.Module, name: str, native: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.name, self.native = name, native
        self.patch, self.dim, self.prefix = (
            backbone.patch_embed.patch_size[0],
            backbone.embed_dim,
            backbone.num_prefix_tokens,
        )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right, top, bottom = self.padding(*x.shape[-2:])
        x = F.pad((x - self.mean) / self.std, (left, right, top, bottom))  # 0 is the mean colour here
        grid = (x.shape[-2] // self.patch, x.shape[-1] // self.patch)
        tokens = self.backbone.forward_features(x)  # (B, prefix + h * w, D)
        return tokens[:, 0], tokens[:, self.prefix :].transpose(1, 2).unflatten(2, grid)

    def padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels added (left, right, top, bottom) so that the patch divides both sides."""
        down, across = -height % self.patch, -width % self.patch
        return across // 2, across - across // 2, down // 2, down - down // 2

    def unpad(self, dense: Tensor, size: tuple[int, int]) -> Tensor:
        """The part (..., H, W) of a dense prediction that lies on the image of `size`, without the padded border."""
        left, _, top, _ = self.padding(*size)
        return dense[..., top : top + size[0], left : left + size[1]]

    def train(self, mode: bool = True) -> "Encoder":
        """Frozen encoders stay in eval mode whatever the module around them does."""
        return super().train(False)

    @cached_property
    def hash(self) -> str:
        """Short hash of weights, normalisation and native px: what results of this encoder are filed under."""
        return records.digest([records.state_hash(self.state_dict()), self.native])


def load(row: EncoderRow, data_root: str = "", weights: Path | None = None) -> Encoder:
    """The frozen encoder of one table row; `weights` replaces its checkpoint (a DeACL one, say).

    Raises BadInput if the model is unknown, a file is missing or damaged, or its tensors are not those of the model.
    """
    backbone, mean, std = _build(row, pretrained=not row.checkpoint and weights is None)
    if model_name(row) == "embedded_vit" or row.checkpoint or weights:
        path = weights or (Path(data_root) / row.checkpoint if row.checkpoint else EMBEDDED_WEIGHTS)
        load_weights(backbone, read_weights(path), f"{model_name(row)} ({path.name})")
    return Encoder(backbone, row.name, row.native or backbone.patch_embed.img_size[0], *normalisation(row, mean, std))


def model_name(row: EncoderRow) -> str:
    """timm's name of the row's model."""
    return row.timm or row.name


def normalisation(row: EncoderRow, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation of the row; `mean`, `std`: its model's own."""
    named = {
        "model": (mean, std), "imagenet": (IMAGENET_MEAN, IMAGENET_STD), "inception": ((0.5,) * 3, (0.5,) * 3),
        "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), "none": ((0.0,) * 3, (1.0,) * 3),
    }  # fmt: skip
    given = row.normalise
    return named[given] if isinstance(given, str) else (given.mean, given.std)


def random_init(row: EncoderRow, seed: int = 0) -> Encoder:
    """The row's architecture without any training: what pretraining is compared with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, mean, std = _build(row, pretrained=False)
    return Encoder(
        backbone, f"{row.name}_random", row.native or backbone.patch_embed.img_size[0], *normalisation(row, mean, std)
    )


def _build(row: EncoderRow, pretrained: bool) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """Backbone of a row with its normalisation; timm's pretrained weights come from its hub."""
    if model_name(row) == "embedded_vit":
        return embedded_backbone(), IMAGENET_MEAN, IMAGENET_STD
    if not timm.is_model(model_name(row)):
        raise BadInput(
            f"Encoder '{row.name}': timm has no model '{model_name(row)}'; timm.list_models() shows the names."
        )
    try:
        backbone = timm.create_model(model_name(row), pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise BadInput(
            f"Encoder '{row.name}': {model_name(row)} gives no patch tokens; choose a vision transformer."
        ) from None
    except (OSError, RuntimeError) as error:
        raise BadInput(
            f"Encoder '{row.name}': the weights of {model_name(row)} could not be fetched ({type(error).__name__}); "
            f"download them elsewhere and give the file as checkpoint."
        ) from None
    if getattr(backbone, "cls_token", None) is None:
        raise BadInput(
            f"Encoder '{row.name}': {model_name(row)} has no CLS token; choose a vision transformer with one."
        )
    return backbone, backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a safetensors or PyTorch file, read without executing code; BadInput if missing or damaged."""
    if not path.is_file():
        raise BadInput(
            f"The checkpoint {path} does not exist; correct the path (relative ones start in the data folder)."
        )
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: truncated?); fetch it again."
        ) from None
    except Exception as error:  # pickle errors have no common class that is public
        raise BadInput(f"The checkpoint {path} is no plain state dict ({type(error).__name__}); save one.") from None
    if not isinstance(state, dict):
        raise BadInput(f"The checkpoint {path} is no plain state dict but a {type(state).__name__}; save one.")
    return state


def load_weights(backbone: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Copy every tensor of `state` into `backbone`; BadInput lists what is missing, left over or of another shape."""
    own = backbone.state_dict()
    state = {k: v for k, v in state.items() if k in own or not k.startswith(CLASSIFIER)}
    wrong = [f"missing {k}" for k in own.keys() - state.keys()] + [f"left over {k}" for k in state.keys() - own.keys()]
    shared = own.keys() & state.keys()
    wrong += [
        f"{k} has shape {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in shared
        if state[k].shape != own[k].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadInput(
            f"The checkpoint does not fit {what}: {'; '.join(sorted(wrong)[:3])}{more}; name its own model as timm."
        )
    backbone.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def check(settings: Settings) -> list[str]:
    """One sentence for each encoder whose local weights cannot be used; hub models are only looked up by name."""
    problems = []
    for row in settings.encoders:
        try:
            if model_name(row) == "embedded_vit" or row.checkpoint:
                load(row, settings.data_root)
            else:
                _build(row, pretrained=False)
        except BadInput as problem:
            problems.append(str(problem))
    return problems
