"""The embedded encoder: a small vision transformer behind a convolutional stem, and where its weights lie."""

from functools import partial
from pathlib import Path

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

WEIGHTS = Path(__file__).parent / "weights" / "embedded_vit.safetensors"


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
