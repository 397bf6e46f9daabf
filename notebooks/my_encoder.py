"""An encoder of your own: the two outputs that heads, attacks and tables ask for. Copy this file and change `encode`.

In a parameter file:

    encoders:
      - {name: filters, call: "my_encoder:encode", native: 64}

`encode` may also be a torch.nn.Module with weights; they are frozen and become part of what results are filed under.
"""

import torch
import torch.nn.functional as F

PATCH = 8  # px; each patch token stands for PATCH x PATCH pixels

# fixed linear filters on brightness, (4, 1, 3, 3): slope to the right, slope downwards, and the two diagonals
SLOPES = torch.tensor(
    [
        [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]],
        [[-1.0, -2.0, -1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 1.0]],
        [[-2.0, -1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 1.0, 2.0]],
        [[0.0, -1.0, -2.0], [1.0, 0.0, -1.0], [2.0, 1.0, 0.0]],
    ]
)[:, None]


def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W), normalised as the row says, sides divisible by PATCH -> cls (B, 14), patches (B, 14, h, w).

    Differentiable throughout: an attack follows the gradient from the tokens back to the pixels.
    """
    slopes = F.conv2d(F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), SLOPES.to(images))
    # squared, because up and down slopes of one texture would cancel in a patch's mean; + 1e-4: a root's slope at 0
    strength = (slopes.square() + 1e-4).sqrt()
    colour = F.avg_pool2d(images, PATCH)  # (B, 3, h, w), h = H / PATCH
    contrast = (F.avg_pool2d(images.square(), PATCH) - colour.square() + 1e-4).clamp(min=1e-6).sqrt()
    patches = torch.cat([colour, contrast, F.avg_pool2d(slopes, PATCH), F.avg_pool2d(strength, PATCH)], 1)
    return patches.mean((2, 3)), patches
