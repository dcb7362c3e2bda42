"""Patch embedding that normalises: the pixels of a patch before their projection, and the patch after it.

The beginning of the vision transformers of vit_pytorch (arXiv 2302.01327 tried it under the name of dual patch norm;
fixed positions as in arXiv 2205.01580). Letters: B batch, N image features, D width, p patch_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import CoCaConfig
from opencoca.model.kernels.dropout import Dropout


class NormedPatchEmbed(nn.Module):
    """images (B, 3, height, width) -> features (B, N, D): the patches row by row, behind a class token if there is one.

    The scale and shift of the first norm are part of the projection, which acts on them at once.
    """

    def __init__(self, model: CoCaConfig):
        super().__init__()
        config, compat = model.image, model.compat
        self.patch_size = config.patch_size
        self.grid = (config.image_size[0] // config.patch_size, config.image_size[1] // config.patch_size)
        self.proj = nn.Linear(3 * config.patch_size**2, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.class_token = nn.Parameter(torch.empty(config.width)) if compat.image_class_token else None
        # The first row is the class token's.
        rows = self.grid[0] * self.grid[1] + compat.image_class_token
        learned = compat.image_positions == "learned"
        self.pos_embed = nn.Parameter(torch.empty(rows, config.width)) if learned else None
        self.dropout = Dropout(config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        size = self.patch_size
        grid = (height // size, width // size)
        if height % size or width % size:
            raise ValueError(f"image size {height} x {width} is not a multiple of patch_size {size}")
        pixels = F.unfold(images, size, stride=size).transpose(1, 2)
        patches = self.norm(self.proj(F.layer_norm(pixels, pixels.shape[-1:])))
        patches = patches + self.positions(grid).to(device=patches.device, dtype=patches.dtype)
        if self.class_token is not None:
            token = self.class_token if self.pos_embed is None else self.class_token + self.pos_embed[0]
            patches = torch.cat((token.to(patches.dtype).expand(len(patches), 1, -1), patches), dim=1)
        return self.dropout(patches)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(rows * columns, D) position embeddings of a grid of this shape; learned ones are interpolated (bicubic)."""
        if self.pos_embed is None:
            return sincos_positions(grid, self.norm.normalized_shape[0])
        learned = self.pos_embed if self.class_token is None else self.pos_embed[1:]
        if grid == self.grid:
            return learned
        as_image = learned.float().unflatten(0, self.grid).permute(2, 0, 1).unsqueeze(0)
        resized = F.interpolate(as_image, grid, mode="bicubic", align_corners=False, antialias=True)
        return resized[0].flatten(1).T


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """(rows * columns, D): sine and cosine of the column, then of the row, at frequencies 1 down to 1 / 10000."""
    quarter = width // 4
    frequencies = 1.0 / 10_000 ** (torch.arange(quarter) / (quarter - 1))
    rows, columns = (torch.arange(count)[:, None] * frequencies for count in grid)
    rows = rows[:, None].expand(-1, grid[1], -1)
    columns = columns[None].expand(grid[0], -1, -1)
    return torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), dim=-1).flatten(0, 1)
