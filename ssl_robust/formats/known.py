"""What rows of settings name: encoders, of which one more is one more entry of KNOWN, and their normalisation."""

from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..settings import BadInput, EncoderRow, Normalise, listed

Colours = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of pixels
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CIFAR = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
NORMALISE = {
    "imagenet": IMAGENET, "inception": ((0.5,) * 3, (0.5,) * 3), "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "none": ((0.0,) * 3, (1.0,) * 3), "cifar": CIFAR,
}  # fmt: skip


class Known(NamedTuple):
    """What an encoder's name stands for."""

    timm: str  # timm's model; "": the embedded one
    native: int  # px
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    # how its authors interpolate the position embedding, (offset, antialias) of vit.resample; None: as timm does
    positions: tuple[float, bool] | None = None
    public: bool = True  # whether timm can fetch the weights
    cifar_stem: bool = False  # 3x3 convolution of stride 1 and no max pool, for 32 px


DINO, REGISTERS = (0.1, False), (0.0, True)  # DINOv2 without registers does as DINO did
KNOWN = {
    "embedded_vit": Known("", 64),
    "dinov2_vits14": Known("vit_small_patch14_dinov2.lvd142m", 518, positions=DINO),
    "dinov2_vitb14": Known("vit_base_patch14_dinov2.lvd142m", 518, positions=DINO),
    "dinov2_vits14_reg": Known("vit_small_patch14_reg4_dinov2.lvd142m", 518, positions=REGISTERS),
    "dinov2_vitb14_reg": Known("vit_base_patch14_reg4_dinov2.lvd142m", 518, positions=REGISTERS),
    "dino_vits16": Known("vit_small_patch16_224.dino", 224, positions=DINO),
    "dino_vitb16": Known("vit_base_patch16_224.dino", 224, positions=DINO),
    "dinov3_vits16": Known("vit_small_patch16_dinov3.lvd1689m", 256),  # rotary positions need no interpolation
    "dinov3_vitb16": Known("vit_base_patch16_dinov3.lvd1689m", 256),
    "mae_vitb16": Known("vit_base_patch16_224.mae", 224),
    "simclr_resnet50": Known("resnet50", 224, public=False),
    "simsiam_resnet50": Known("resnet50", 224, public=False),
    "simclr_resnet18_cifar": Known("resnet18", 32, *CIFAR, public=False, cifar_stem=True),
    "simsiam_resnet18_cifar": Known("resnet18", 32, *CIFAR, public=False, cifar_stem=True),
}


def describe(row: EncoderRow) -> Known:
    """What the row's model is: an entry of KNOWN, or what timm knows of a model of its own; BadInput if unknown."""
    name = row.timm or row.name
    if name in KNOWN:
        return KNOWN[name]
    try:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        raise BadInput(
            f"Encoder '{row.name}': timm has no model '{name}'; take one of timm.list_models() or of encoders.KNOWN: "
            f"{', '.join(KNOWN)}."
        ) from None
    return Known(name, cfg.input_size[-1], cfg.mean, cfg.std, _positions_of(name), bool(cfg.has_weights))


def _positions_of(model: str) -> tuple[float, bool] | None:
    """How the authors of a timm model that is not in KNOWN interpolate positions; None: as timm does."""
    if "dinov2" in model:
        return REGISTERS if "_reg" in model else DINO
    return DINO if model.endswith(".dino") else None


def normalisation(row: EncoderRow, known: Known) -> Colours:
    """Mean and standard deviation of the row, by default its model's own."""
    if row.normalise == "model":
        return known.mean, known.std
    return NORMALISE[row.normalise] if isinstance(row.normalise, str) else (row.normalise.mean, row.normalise.std)


def own_normalisation(row: EncoderRow, known: Known, found: list[Colours], path: Path) -> tuple[Known, str]:
    """The row's model with the mean and std that its file keeps, if it keeps some, and what the origin says of that.

    The row's own `normalise` counts more. BadInput if the file keeps several, or some that are not of pixels in [0,1].
    """
    if row.normalise != "model":
        own = torch.tensor(normalisation(row, known))
        differ = any(not torch.allclose(own, torch.tensor(one), atol=1e-3) for one in found)
        return known, ", normalised as the row says, not as the file does" if differ else ""
    if not found:
        return known, ""
    try:
        ((mean, std),) = found
        Normalise(mean=list(mean), std=list(std))
    except ValueError:  # several, or refused by pydantic
        raise BadInput(
            f"The checkpoint {path} keeps as mean and std of pixels in [0,1] {listed([*map(str, found)])}; "
            f"give the encoder's normalise, {{mean: [..], std: [..]}}."
        ) from None
    return known._replace(mean=mean, std=std), ", normalised by its own mean and std"
