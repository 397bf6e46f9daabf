"""Encoders, pixels in [0,1] to a CLS token and patch tokens: known names, timm models, your own callables."""

import math
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from . import records, vit
from .parts import part
from .settings import BadInput, EncoderRow, Settings, skipping

_known = part("formats.known")
Known, KNOWN, describe = _known.Known, _known.KNOWN, _known.describe
DINO, REGISTERS, (CIFAR_MEAN, CIFAR_STD) = _known.DINO, _known.REGISTERS, _known.CIFAR
IMAGENET_MEAN, IMAGENET_STD = _known.IMAGENET


# --- the interface ---


class Encoder(nn.Module):
    """A frozen encoder: images (B, 3, H, W) in [0,1] -> CLS token (B, D) and patch tokens (B, D, h, w).

    Normalisation happens inside. Images that the patch (of a ResNet: the total stride) does not divide are padded on
    all sides with the mean colour, so h = ceil(H / patch), w = ceil(W / patch); position embeddings are interpolated to
    that grid. Images get a gradient, weights only where DeACL asks for one. `origin` says in words where the weights
    come from; `patch` (px) and `dim` (D) are by default what a vision transformer of timm says of itself.
    """

    def __init__(
        self, backbone: nn.Module, name: str, native: int, mean: tuple[float, ...], std: tuple[float, ...],
        patch: int = 0, dim: int = 0, origin: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.name, self.native, self.origin = name, native, origin
        self.patch, self.dim = patch or backbone.patch_embed.patch_size[0], dim or backbone.embed_dim
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.eval()

    def forward(self, x: Tensor, normed: bool = True) -> tuple[Tensor, Tensor]:
        """CLS token and patch tokens; not `normed`: as they enter the backbone's final LayerNorm, if it has one."""
        return _tokens(self.backbone, self._normalised(x), self.patch, normed)

    def cls(self, x: Tensor) -> Tensor:
        """The CLS token (B, D) alone, the same as of forward up to rounding, for less work where that is possible."""
        x = self._normalised(x)
        return vit.cls_token(self.backbone, x) if vit.plain(self.backbone) else _tokens(self.backbone, x, self.patch)[0]

    def _normalised(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.padding(*x.shape[-2:])
        return F.pad((x - self.mean) / self.std, (left, right, top, bottom))  # 0 is the mean colour here

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
        """Short hash of what decides the tokens, what a callable computes included; results are filed under it."""
        more = [getattr(self.backbone, name, None) for name in ("model", "positions", "computes")]
        return records.digest([records.state_hash(self.state_dict()), self.native, *filter(None, more)])

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made from: everything but the hash, because copies are made to be trained."""
        return {name: value for name, value in self.__dict__.items() if name != "hash"}


def _tokens(backbone: nn.Module, x: Tensor, patch: int, normed: bool = True) -> tuple[Tensor, Tensor]:
    """CLS token (B, D) and patch tokens (B, D, h, w) of normalised images whose sides `patch` divides.

    A model without a CLS token gives in its place what its own classifier would see: its pooled patch tokens. Not
    `normed`: tokens before the final LayerNorm; a callable's and a ResNet's are the same either way.
    """
    grid = (x.shape[-2] // patch, x.shape[-1] // patch)
    if getattr(backbone, "own", False):
        return backbone(x, grid)
    features = _features(backbone, x, normed)
    if features.ndim == 4:
        return _map_tokens(backbone, features, grid)
    prefix = backbone.num_prefix_tokens or 0  # CLS token, registers
    patches = features[:, prefix:].transpose(1, 2).unflatten(2, grid)
    if prefix and getattr(backbone, "cls_token", True) is not None:
        return features[:, 0], patches
    return backbone.forward_head(features, pre_logits=True), patches


def _features(backbone: nn.Module, x: Tensor, normed: bool) -> Tensor:
    """What timm's forward_features gives, or what enters the final norm in it."""
    if vit.plain(backbone):
        return vit.features(backbone, x, normed)
    final = getattr(backbone, "norm", None)
    if normed or not isinstance(final, nn.Module):
        return backbone.forward_features(x)
    entered: list[Tensor] = []
    hook = final.register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    try:
        after = backbone.forward_features(x)
    finally:
        hook.remove()
    return entered[-1] if entered else after


def _map_tokens(backbone: nn.Module, features: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same from a feature map (B, D, h, w), or (B, h, w, D) where timm says so."""
    pooled = backbone.forward_head(features, pre_logits=True)
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    # some classifiers widen what they pool (MobileNet): then the mean over the map
    cls = pooled if pooled.shape == features.shape[:2] else features.mean((2, 3))
    if features.shape[2:] == (grid[0] + 1, grid[1] + 1):
        # a padded stem gives one cell more than patches; its cells lie half a patch off, means of neighbours on them
        features = F.avg_pool2d(features, 2, stride=1)
    return cls, features


# --- from a row to an encoder ---


def load(row: EncoderRow, data_root: str = "", weights: Path | None = None) -> Encoder:
    """The frozen encoder of one table row; `weights` (a DeACL checkpoint, say) replaces its checkpoint.

    Raises BadInput if the model is unknown or gives no tokens, or if its weights are not to be had.
    """
    if row.call:
        return own(row, part("formats.callables").find(row), weights)
    known, name = describe(row), row.timm or row.name
    path = weights or _file(row, known, data_root)
    if path is None:
        return _encoder(row, known, _build(row, known, pretrained=True), row.name, f"timm: {known.timm}")
    formats = part("formats.checkpoints")
    content = formats.read(path)
    state, kind = formats.recognise(content, path)
    known, said = _known.own_normalisation(row, known, formats.normalisations(content), path)
    backbone = _build(row, known)
    _take_grid(backbone, state)
    formats.load_weights(backbone, state, f"{name} ({path.name})")
    return _encoder(row, known, backbone, row.name, f"{kind} {path.name}{said}")


def _file(row: EncoderRow, known: Known, data_root: str) -> Path | None:
    """The weight file of a row's Standard encoder; None: timm fetches the weights; BadInput if there are none."""
    if row.checkpoint:
        return part("formats.checkpoints").locate(row.checkpoint, data_root)
    if not known.public:
        name = row.timm or row.name
        raise BadInput(f"Encoder '{row.name}': there are no public weights of {name}; give a file as checkpoint.")
    return None if known.timm else part("embedded.backbone").WEIGHTS


def first(settings: Settings) -> Encoder:
    """The encoder that notebooks show: of the first row with a Standard encoder; BadInput if it cannot be loaded.

    With missing: skip, the first that can.
    """
    rows, lost = [r for r in settings.encoders if "standard" in r.defenses] or settings.encoders, []
    for row in rows:
        with skipping(settings, lost, [{}]):
            return load(row, settings.data_root)
    raise BadInput(lost[0]["why"])


def _take_grid(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives the backbone the position grid of a checkpoint trained at another native size, where it can interpolate."""
    own, given = getattr(backbone, "pos_embed", None), state.get("pos_embed")
    if not hasattr(backbone, "positions") or given is None or given.ndim != 3 or given.shape[2] != own.shape[2]:
        return
    grid = given.shape[1] - (0 if backbone.no_embed_class else backbone.num_prefix_tokens)
    if given.shape != own.shape and grid > 0 and math.isqrt(grid) ** 2 == grid:
        backbone.pos_embed = nn.Parameter(torch.empty_like(given), requires_grad=False)


def random_init(row: EncoderRow, seed: int = 0) -> Encoder:
    """The row's architecture without any training: what pretraining is compared with. BadInput for a callable."""
    if row.call:
        raise BadInput(f"Encoder '{row.name}' is a callable and cannot be initialised at random; name a timm model.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        known = describe(row)
        backbone = _build(row, known)
    return _encoder(row, known, backbone, f"{row.name}_random", f"random, seed {seed}")


def check(settings: Settings) -> list[str]:
    """One sentence for each encoder that cannot be used, a given DeACL checkpoint counting as one.

    Files are read and compared with their models; weights that timm fetches are only looked up by name.
    """
    problems: list[dict[str, str]] = []
    for row in settings.encoders:
        for file in [""] * row.needs_standard + [row.deacl_checkpoint] * bool(row.deacl_checkpoint):
            with skipping(settings.model_copy(update={"missing": "skip"}), problems, [{}]):
                _check_row(row, settings.data_root, file)
    return list(dict.fromkeys(problem["why"] for problem in problems))


def _check_row(row: EncoderRow, data_root: str, file: str) -> None:
    weights = part("formats.checkpoints").locate(file, data_root) if file else None
    for path in sorted(weights.glob("epoch_*.safetensors")) if weights and weights.is_dir() else [weights]:
        _check_file(row, data_root, path)


def _check_file(row: EncoderRow, data_root: str, weights: Path | None) -> None:
    if row.call:
        if load(row, data_root, weights).hash != load(row, data_root, weights).hash:
            raise BadInput(
                f"Encoder '{row.name}': {row.call} has other weights each time that its module is imported; load them "
                f"from a file there, or draw them after torch.manual_seed."
            )
    elif weights or _file(row, describe(row), data_root):
        load(row, data_root, weights)
    elif describe(row) not in KNOWN.values():
        random_init(row)


def _build(row: EncoderRow, known: Known, pretrained: bool = False) -> nn.Module:
    """Backbone of a row; timm's pretrained weights come from its hub."""
    if not known.timm:
        return part("embedded.backbone").embedded_backbone()
    backbone = _create(row, known.timm, pretrained)
    if known.cifar_stem:
        # solo-learn pads by 2 where 1 would keep the size: the map of a 32 px image is 5x5 instead of 4x4
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=2, bias=False)
        backbone.maxpool = nn.Identity()
    if known.positions and isinstance(backbone, VisionTransformer):
        backbone.positions, backbone._pos_embed = known.positions, MethodType(vit.add_positions, backbone)
    return backbone


def _create(row: EncoderRow, model: str, pretrained: bool) -> nn.Module:
    """timm's model, for images of any size where it can."""
    try:
        try:
            return timm.create_model(model, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError:  # no position embedding that would have to follow the size
            return timm.create_model(model, pretrained=pretrained, num_classes=0)
    except Exception as error:  # the hub's client raises classes of several packages
        if not pretrained:
            raise
        raise BadInput(
            f"Encoder '{row.name}': the weights of {model} could not be fetched ({type(error).__name__}); "
            f"download them elsewhere and give the file as checkpoint."
        ) from None


def _encoder(row: EncoderRow, known: Known, backbone: nn.Module, name: str, origin: str) -> Encoder:
    patch, dim = _measure(row, backbone.eval())
    backbone.model = f"{known.timm}{' for 32 px' * known.cifar_stem}"  # weights may fit several
    return Encoder(backbone, name, row.native or known.native, *_known.normalisation(row, known), patch, dim, origin)


@torch.no_grad()
def _measure(row: EncoderRow, backbone: nn.Module) -> tuple[int, int]:
    """Patch side and D of a timm model, from forward passes of small images; BadInput if it gives no such tokens."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 32)
    patch = patch if isinstance(patch, int) else patch[0]
    unit = patch if 32 % patch and hasattr(backbone, "num_prefix_tokens") else 32
    try:
        features = backbone.forward_features(torch.zeros(1, 3, 2 * unit, 3 * unit))
        if features.ndim == 4:
            larger = backbone.forward_features(torch.zeros(1, 3, 4 * unit, 6 * unit))
            side = 1 if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else 2
            patch = 2 * unit // (larger.shape[side] - features.shape[side])  # whatever the stem pads by
        else:
            patch = math.isqrt(6 * unit**2 // (features.shape[1] - (backbone.num_prefix_tokens or 0)))
        # sides that nothing but the patch divides: the tokens must lie on the grid of any image
        image = torch.rand(1, 3, 3 * patch, 5 * patch, generator=torch.Generator().manual_seed(0))
        cls, patches = _tokens(backbone, image, patch)
        fits = cls.shape == patches.shape[:2] and patches.shape[2:] == (3, 5)
    except Exception:  # whatever a model says that is made for one size, or for something else than tokens
        fits = False
    if not fits:
        raise BadInput(
            f"Encoder '{row.name}': {row.timm or row.name} gives no grid of tokens for images of every size; choose a "
            f"vision transformer or a ResNet."
        )
    if not cls.is_meta and not (cls.isfinite().all() and patches.isfinite().all()):
        raise BadInput(f"Encoder '{row.name}': its tokens are NaN or infinite with these weights; fetch or train them.")
    return patch, patches.shape[1]


def own(row: EncoderRow, backbone: nn.Module, weights: Path | None = None) -> Encoder:
    """The encoder of a callable, as formats.callables finds it, or of a module: normalised images -> (cls, patches).

    Its patch and D are found by one forward pass at the native size; BadInput if it is no encoder, or if it is to be
    fine-tuned and is no module. `weights`: what DeACL stored of it.
    """
    callables, native = part("formats.callables"), row.native or 224
    if not isinstance(backbone, callables.Own):
        backbone = callables.Own(backbone.eval(), row.call, [])
    if "deacl" in row.defenses and not isinstance(backbone.function, nn.Module):
        raise BadInput(
            f"Encoder '{row.name}': {row.call} is a function, and DeACL tunes weights; let it be a torch.nn.Module, or "
            f"remove the defense deacl."
        )
    if weights:
        state, _ = records.read_tensors(weights)
        part("formats.checkpoints").load_weights(backbone, state, f"{row.call} ({weights.name})")
    mean, std = _known.normalisation(row, Known("", native, *_known.NORMALISE["none"]))
    encoder = Encoder(backbone, row.name, native, mean, std, 1, 1, f"callable {row.call}")
    encoder.patch, encoder.dim = callables.measure(row, backbone, encoder.mean, encoder.std, native)
    return encoder
