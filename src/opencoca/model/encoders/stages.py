"""What all image encoders are: stages that follow each other, so that the rest need not know which encoder it has."""

from collections.abc import Sequence

from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """Images (B, 3, H, W) -> image features (B, N, D), stage by stage: each takes what the one before it gives.

    What a frozen beginning computes can be stored, and the rest trained. width: D, what the poolers are built for.
    The last stage gives (B, N, D), or a map (B, D, rows, columns), whose positions are taken row by row.
    """

    def __init__(self, stages: Sequence[nn.Module], width: int):
        super().__init__()
        self.stages, self.num_stages, self.width = nn.ModuleList(stages), len(stages), width

    def forward(self, images: Tensor) -> Tensor:
        return self.run_stages(images, 0, self.num_stages)

    def run_stages(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Runs stages start .. stop - 1 on what stage ``start`` takes.

        Raises ValueError if the last stage gives anything but features.
        """
        assert 0 <= start <= stop <= self.num_stages, (start, stop, self.num_stages)
        for stage in self.stages[start:stop]:  # pyright: ignore[reportGeneralTypeIssues]
            x = stage(x)
        return self._as_features(x) if start < stop == self.num_stages else x

    def _as_features(self, output: object) -> Tensor:
        if isinstance(output, Tensor) and output.ndim == 4:
            output = output.flatten(2).transpose(1, 2)
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[2] == self.width:
            return output
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise ValueError(
            f"the image encoder {type(self.stages[0]).__name__} gives an output of {found} and not (batch, positions, "
            f"{self.width}); use one that gives the features of all positions, and their width as image.width"
        )
