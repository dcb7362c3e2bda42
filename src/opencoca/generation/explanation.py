"""A caption explained: the maps of its words, laid over the photograph that the model saw.

Letters: W words, L layers, H heads, N image features; sizes and boxes are in pixels of the upright photograph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from opencoca.data.transforms import PreprocessConfig
from opencoca.generation.attention_maps import WordMaps

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Explanation:
    """A photograph, a caption and where in the photograph each of its words looks.

    photograph: upright, RGB. caption: the model's own or the one that was given. maps: the attention weights.
    box: the part of the photograph that the model saw (left, top, right, bottom); it reaches beyond the photograph
        where the model pads.
    """

    photograph: Image.Image
    caption: str
    maps: WordMaps
    box: Box

    def overlays(self, size: tuple[int, int] | None = None, layers: Sequence[int] | None = None) -> Tensor:
        """(W, height, width): for each word how much every pixel is looked at, 0 to 1, 1 being the word's most.

        size: (width, height) that the photograph is shown in; None: its own, which is large for many words.
        layers: as in `WordMaps.mean`.
        """
        size = self.photograph.size if size is None else size
        scale = size[0] / self.photograph.width, size[1] / self.photograph.height
        left, top, right, bottom = self.box
        box = left * scale[0], top * scale[1], right * scale[0], bottom * scale[1]
        spread = spread_over(self.maps.mean(layers), size, box)
        return spread / spread.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(spread.dtype).tiny)


def visible_box(size: tuple[int, int], config: PreprocessConfig) -> Box:
    """What a model sees of a photograph of this (width, height): left, top, right, bottom, see `Explanation.box`."""
    target = config.image_size[1], config.image_size[0]
    if config.resize_mode == "squash":
        return 0.0, 0.0, float(size[0]), float(size[1])
    crops = config.resize_mode == "crop"
    scale = (max if crops else min)(target[0] / size[0], target[1] / size[1])
    ends = []
    for side, wanted in zip(size, target, strict=True):
        # Whole pixels, rounded as `EvalTransform` rounds them.
        if crops:
            resized = max(wanted, int(side * scale + 1e-6))
            start = round((resized - wanted) / 2)
        else:
            resized = min(wanted, max(1, round(side * scale)))
            start = -((wanted - resized) // 2)
        ends.append((start * side / resized, (start + wanted) * side / resized))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def spread_over(maps: Tensor, size: tuple[int, int], box: Box) -> Tensor:
    """Maps (W, rows, columns) that cover a box of a picture of this (width, height) -> (W, height, width), at least 0.

    Bicubic between the centres of the cells; 0 where the picture is outside of the box.
    """
    left, top, right, bottom = box

    def places(length: int, start: float, end: float) -> Tensor:
        # The centre of each pixel, from -1 to 1 inside the box.
        return (torch.arange(length, dtype=torch.float32) + 0.5 - start) / (end - start) * 2 - 1

    x, y = places(size[0], left, right), places(size[1], top, bottom)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    sampled = F.grid_sample(
        maps.float().unsqueeze(0), points.unsqueeze(0), mode="bicubic", padding_mode="border", align_corners=False
    )
    inside = (y.abs() <= 1)[:, None] & (x.abs() <= 1)[None, :]
    return sampled[0].clamp(min=0) * inside
