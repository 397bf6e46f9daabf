"""An encoder of your own: the two outputs that heads, attacks and tables ask for. Copy this file and change `encode`.

In a parameter file:

    encoders:
      - {name: filters, call: "my_encoder:encode", native: 64}

`encode` may also be a torch.nn.Module with weights; they are frozen and become part of what results are filed under.
This one has learned nothing: edges, random functions of colour, the patches around, and where a patch lies.
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
# random functions of a pixel's colour, tanh(colour @ DIRECTIONS + OFFSETS): a linear head tells colours apart with them
RANDOM = torch.Generator().manual_seed(0)
DIRECTIONS, OFFSETS = 6 * torch.randn(3, 48, generator=RANDOM), 2 * torch.randn(48, generator=RANDOM)


def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W), normalised as the row says, sides divisible by PATCH -> cls (B, D), patches (B, D, h, w).

    Differentiable throughout: an attack follows the gradient from the tokens back to the pixels.
    """
    colours = (images.movedim(1, 3) @ DIRECTIONS.to(images) + OFFSETS.to(images)).tanh().movedim(3, 1)  # (B, 48, H, W)
    parts = [images, colours, edges(images)]
    own = torch.cat([F.avg_pool2d(part, PATCH) for part in parts], 1)  # (B, 55, h, w), h = H / PATCH
    around = F.avg_pool2d(F.pad(own, (2, 2, 2, 2), mode="replicate"), 5, stride=1)  # mean of 5 x 5 patches
    patches = torch.cat([own, around, places(own)], 1)
    cls = patches.amax((2, 3)) - patches.mean((2, 3))  # what stands out
    return cls, patches


def edges(images: torch.Tensor) -> torch.Tensor:
    """How steep the brightness is in four directions, (B, 4, H, W)."""
    slopes = F.conv2d(F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), SLOPES.to(images))
    return (slopes.square() + 1e-4).sqrt()  # + 1e-4: a root has no slope at 0


def places(tokens: torch.Tensor) -> torch.Tensor:
    """Row and column of each token from -1 to 1, and their squares, (B, 4, h, w)."""
    rows, columns = (torch.linspace(-1, 1, side).to(tokens) for side in tokens.shape[2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    return torch.cat([grid, grid.square()]).expand(len(tokens), -1, -1, -1)
