"""Vision Transformer: images -> one feature a patch. arXiv 2010.11929.

Letters: B batch, N patches (row by row), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import CoCaConfig
from opencoca.model.encoders.normed_patches import NormedPatchEmbed
from opencoca.model.encoders.stages import ImageEncoder
from opencoca.model.kernels.dropout import Dropout
from opencoca.model.layers.blocks import TransformerBlock


class PatchEmbed(nn.Module):
    """images (B, 3, height, width) -> patches (B, N, D) with learned positions, behind a class token if there is one.

    Positions are a grid for the configured size; for another size or shape they are interpolated (bicubic).
    """

    def __init__(self, model: CoCaConfig):
        super().__init__()
        config, compat = model.image, model.compat
        self.patch_size = config.patch_size
        self.grid = tuple(side // config.patch_size for side in config.image_size)
        self.proj = nn.Conv2d(
            3, config.width, config.patch_size, stride=config.patch_size, bias=compat.image_patch_bias
        )
        self.class_token = nn.Parameter(torch.empty(config.width)) if compat.image_class_token else None
        # The first row is the class token's.
        rows = self.grid[0] * self.grid[1] + compat.image_class_token
        self.pos_embed = nn.Parameter(torch.empty(1, rows, config.width))
        self.norm = nn.LayerNorm(config.width) if compat.image_pre_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height} x {width} is not a multiple of patch_size {self.patch_size}")
        patches = self._project(images)
        x = patches + self.positions(height // self.patch_size, width // self.patch_size).to(patches.dtype)
        if self.class_token is not None:
            token = (self.class_token + self.pos_embed[0, 0]).to(x.dtype)
            x = torch.cat((token.expand(len(x), 1, -1), x), dim=1)
        return self.dropout(self.norm(x))

    def _project(self, images: Tensor) -> Tensor:
        """images (B, 3, height, width) -> (B, N, D)."""
        weight, size = self.proj.weight, self.patch_size
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return self.proj(images).flatten(2).transpose(1, 2)
        # The same as a matrix product: on a CPU a convolution's gradient by its weights is many times slower in bf16.
        pixels = images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(pixels.flatten(3).flatten(1, 2), weight.flatten(1), self.proj.bias)

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, rows * columns, D) position embeddings of a grid of this shape."""
        patches = self.pos_embed if self.class_token is None else self.pos_embed[:, 1:]
        if (rows, columns) == self.grid:
            return patches
        wide = torch.promote_types(patches.dtype, torch.float32)
        grid = patches.to(wide).unflatten(1, self.grid).permute(0, 3, 1, 2)
        resized = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False, antialias=True)
        return resized.flatten(2).transpose(1, 2)


class VisionTransformer(ImageEncoder):
    """Stages: the patches, each block, and the last norm if there is one.

    patch_dropout: this part of an image's patches, drawn anew each time, is left out in training (FLIP, arXiv
    2212.00794); the class token stays.
    """

    patch_dropout = 0.0

    def __init__(self, model: CoCaConfig):
        width = model.image.width
        blocks = [TransformerBlock(model.image_block()) for _ in range(model.image.depth)]
        patch_embed = NormedPatchEmbed(model) if model.compat.image_patch_norm else PatchEmbed(model)
        norm = [nn.LayerNorm(width)] if model.compat.image_final_norm else []
        super().__init__([patch_embed, *blocks, *norm], width)

    def run_stages(self, x: Tensor, start: int, stop: int) -> Tensor:
        if start == 0 < stop and self.training and self.patch_dropout:
            x, start = self._drop_patches(self.stages[0](x)), 1
        return super().run_stages(x, start, stop)

    def _drop_patches(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, fewer, D)."""
        first = int(getattr(self.stages[0], "class_token", None) is not None)
        num_patches = x.shape[1] - first
        kept = max(1, round(num_patches * (1 - self.patch_dropout)))
        chosen = torch.rand(len(x), num_patches, device=x.device).topk(kept, dim=1).indices.sort(dim=1).values
        rows = torch.arange(len(x), device=x.device)[:, None]
        return torch.cat((x[:, :first], x[rows, chosen + first]), dim=1)
