"""The shortened forward pass gives what timm's own gives, and its gradient."""

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from ssl_robust import encoders, vit
from ssl_robust.embedded.backbone import embedded_backbone
from ssl_robust.settings import EncoderRow

SMALL = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}


def _lively(backbone):
    """Weights as different from each other as after training."""
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data = parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone.eval().requires_grad_(False)


def _models():
    yield VisionTransformer(**SMALL, dynamic_img_size=True)
    yield VisionTransformer(
        **SMALL, dynamic_img_size=True, qkv_bias=False, init_values=1e-1, reg_tokens=4, pre_norm=True
    )
    yield VisionTransformer(**SMALL, qk_norm=True, scale_attn_norm=True)
    yield embedded_backbone()


def test_it_gives_what_timm_gives_and_its_gradient():
    for backbone in map(_lively, _models()):
        assert vit.plain(backbone)
        side = backbone.patch_embed.img_size[0]
        x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        expected = backbone.forward_features(x)
        assert torch.allclose(vit.features(backbone, x), expected, atol=1e-5)
        assert torch.allclose(vit.cls_token(backbone, x), expected[:, 0], atol=1e-5)
        weight = torch.randn(2, expected.shape[2], generator=torch.Generator().manual_seed(2))
        gradients = [
            torch.autograd.grad((cls * weight).sum(), x)[0]
            for cls in (backbone.forward_features(x)[:, 0], vit.cls_token(backbone, x))
        ]
        assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_images_of_other_sizes_have_interpolated_positions():
    backbone = _lively(VisionTransformer(**SMALL, dynamic_img_size=True))
    x = torch.randn(1, 3, 35, 21, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(vit.cls_token(backbone, x), backbone.forward_features(x)[:, 0], atol=1e-5)


def test_other_models_keep_their_own_forward_pass():
    for name in ("resnet18", "vit_relpos_small_patch16_224", "eva02_tiny_patch14_224"):
        assert not vit.plain(timm.create_model(name))
    assert not vit.plain(VisionTransformer(**SMALL, class_token=False, global_pool="avg"))


def test_an_encoder_gives_its_cls_token_alone():
    encoder = encoders.random_init(EncoderRow(name="embedded_vit"))
    x = torch.rand(2, 3, 60, 52, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(encoder.cls(x), encoder(x)[0], atol=1e-5)
