"""An image encoder that someone else built: any module that gives one feature a position.

B batch, N image features, D width.
"""

from torch import Tensor, nn


class CustomEncoder(nn.Module):
    """Images (B, 3, H, W) to image features (B, N, D) by a module that does so, as one stage.

    Args:
        module: called with images; gives (B, N, D), or (B, D, rows, columns), whose positions are taken row by row.
        width: D, what the poolers are built for.
    """

    def __init__(self, module: nn.Module, width: int):
        super().__init__()
        self.stages = nn.ModuleList([module])
        self.num_stages = 1
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to image features (B, N, D)."""
        return self.run_stages(images, 0, self.num_stages)

    def run_stages(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run stages start to stop - 1; the only one takes images and gives features (B, N, D).

        Raises:
            ValueError: the module gives something else.
        """
        for stage in self.stages[start:stop]:  # pyright: ignore[reportGeneralTypeIssues]
            x = self._as_features(stage(x))
        return x

    def _as_features(self, output: object) -> Tensor:
        if isinstance(output, Tensor) and output.ndim == 4:
            output = output.flatten(2).transpose(1, 2)
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[2] == self.width:
            return output
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        name = type(self.stages[0]).__name__
        raise ValueError(
            f"the image encoder {name} gives an output of {found} and not (batch, positions, {self.width}); hand over "
            "a module that gives the features of all positions, and their width as image.width"
        )
