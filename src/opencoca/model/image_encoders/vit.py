"""Vision Transformer: images -> one feature a patch. arXiv 2010.11929.

Letters: B batch, N patches (row by row), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.blocks import Dropout, TransformerBlock
from opencoca.model.config import ImageEncoderConfig


class PatchEmbed(nn.Module):
    """images (B, 3, height, width) -> patches (B, N, D) with learned positions.

    Positions are a grid for the configured size; for another size or shape they are interpolated (bicubic).
    """

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.grid = tuple(side // config.patch_size for side in config.image_size)
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], config.width))
        self.dropout = Dropout(config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height} x {width} is not a multiple of patch_size {self.patch_size}")
        patches = self.proj(images)
        positions = self.positions(patches.shape[-2], patches.shape[-1]).to(patches.dtype)
        return self.dropout(patches.flatten(2).transpose(1, 2) + positions)

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, rows * columns, D) position embeddings of a grid of this shape."""
        if (rows, columns) == self.grid:
            return self.pos_embed
        grid = self.pos_embed.float().unflatten(1, self.grid).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False, antialias=True)
        return resized.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Stages: the patches, each block, and the last norm."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.width = config.width
        blocks = [TransformerBlock(config.block()) for _ in range(config.depth)]
        self.stages = nn.ModuleList([PatchEmbed(config), *blocks, nn.LayerNorm(config.width)])
        self.num_stages = len(self.stages)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, height, width) -> features (B, N, D)."""
        return self.run_stages(images, 0, self.num_stages)

    def run_stages(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Runs stages start .. stop - 1 on what stage ``start`` takes."""
        for stage in self.stages[start:stop]:
            x = stage(x)
        return x
