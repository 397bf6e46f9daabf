"""timm's vision transformers as attacks need them: the authors' position embeddings, and no work without effect."""

import math

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

# --- position embeddings ---


def resample(positions: Tensor, grid: tuple[int, int], offset: float, antialias: bool) -> Tensor:
    """A square grid's position embedding (1, N, D) on another grid (1, h * w, D), bicubic, as its authors do it.

    With an offset the scale is (h + offset) / sqrt(N), so that the cells lie slightly denser than they should
    (DINO, DINOv2); without one it is exactly h / sqrt(N) (DINOv2 with registers, which smooths as well).
    """
    side = math.isqrt(positions.shape[1])
    if grid == (side, side):
        return positions
    square = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
    scale = {"scale_factor": [(n + offset) / side for n in grid]} if offset else {"size": grid}
    return F.interpolate(square, **scale, mode="bicubic", antialias=antialias).flatten(2).transpose(1, 2)


def add_positions(self: VisionTransformer, x: Tensor) -> Tensor:
    """Takes the place of timm's `_pos_embed`: embedded patches (B, h, w, D) -> all tokens with their positions."""
    own = 0 if self.no_embed_class else self.num_prefix_tokens  # tokens before the patches that have a position
    patches = x.flatten(1, 2) + resample(self.pos_embed[:, own:], tuple(x.shape[1:3]), *self.positions)
    prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
    prefix = torch.cat(prefix, 1) + self.pos_embed[:, :own] if own else torch.cat(prefix, 1)
    return self.pos_drop(torch.cat([prefix, patches], 1))


# --- the forward pass ---


def plain(backbone: nn.Module) -> bool:
    """Whether `backbone` is a vision transformer of standard blocks with a CLS token, which cls_token can shorten."""
    return (
        type(backbone) is VisionTransformer
        and backbone.cls_token is not None
        and all(type(b) is Block and type(b.attn) is Attention and b.attn.gate is None for b in backbone.blocks)
    )


def features(backbone: VisionTransformer, x: Tensor, normed: bool = True) -> Tensor:
    """All tokens (B, prefix + h * w, D) of normalised images: forward_features, or what enters its last LayerNorm."""
    out = backbone.blocks(_embedded(backbone, x))
    return backbone.norm(out) if normed else out


def cls_token(backbone: VisionTransformer, x: Tensor) -> Tensor:
    """The CLS token (B, D) of normalised images, the same as features(backbone, x)[:, 0].

    The last block computes queries, projection and MLP for that token alone, as nothing reads the other ones: five
    sixths of the block's work, forward and backward.
    """
    x = _embedded(backbone, x)
    for block in backbone.blocks[:-1]:
        x = block(x)
    return backbone.norm(_last_block(backbone.blocks[-1], x))[:, 0]


def _embedded(backbone: VisionTransformer, x: Tensor) -> Tensor:
    """Tokens (B, N, D) before the first block."""
    return backbone.norm_pre(backbone._pos_embed(_patches(backbone.patch_embed, x)))


def _patches(embed: nn.Module, x: Tensor) -> Tensor:
    """Embedded patches of (B, 3, H, W). A convolution whose stride is its kernel is one matrix product over patches.

    Its gradient in the image takes a fraction of the convolution's.
    """
    if type(embed) is not PatchEmbed or embed.flatten or type(embed.proj) is not nn.Conv2d:
        return embed(x)
    p, q = embed.patch_size
    cut = x.unflatten(3, (-1, q)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, p, q)
    return embed.norm(F.linear(cut.flatten(3), embed.proj.weight.flatten(1), embed.proj.bias))


def _last_block(block: Block, x: Tensor) -> Tensor:
    """The CLS token (B, 1, D) after a block that gets all tokens (B, N, D)."""
    attn, y = block.attn, block.norm1(x)
    weight, bias, heads = attn.qkv.weight, attn.qkv.bias, (attn.num_heads, attn.head_dim)
    b_query, b_rest = (None, None) if bias is None else bias.split([attn.attn_dim, 2 * attn.attn_dim])
    query = F.linear(y[:, :1], weight[: attn.attn_dim], b_query).unflatten(2, heads).transpose(1, 2)
    key, value = F.linear(y, weight[attn.attn_dim :], b_rest).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(attn.q_norm(query), attn.k_norm(key), value)  # (B, heads, 1, head_dim)
    x = x[:, :1] + block.ls1(attn.proj(attn.norm(mixed.transpose(1, 2).flatten(2))))
    return x + block.ls2(block.mlp(block.norm2(x)))
