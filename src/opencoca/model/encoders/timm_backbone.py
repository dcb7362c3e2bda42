"""Any backbone of the timm library as an image encoder; the one module that imports timm.

B batch, H W image height and width, N image features, D width.
"""

from importlib import import_module

from torch import Tensor, nn


class TimmBackbone(nn.Module):
    """Images (B, 3, H, W) to image features (B, N, D) by a timm model's `forward_features`, as one stage.

    A convolutional network gives one feature per position of its last map, row by row from the top left; a vision
    transformer gives its patch tokens, without class and register tokens.

    Args:
        name: timm's name of the model, such as "resnet50" or "vit_base_patch16_224".
        pretrained: load timm's weights of that name (timm downloads them).
        image_size: (height, width) or the side of square images, in pixels, for models that are built for one size;
            None keeps theirs.

    Raises:
        ValueError: timm is not installed, or does not know the model.
    """

    def __init__(self, name: str, pretrained: bool = False, image_size: int | tuple[int, int] | None = None):
        super().__init__()
        self.stages = nn.ModuleList([_TimmFeatures(_create_model(name, pretrained, image_size))])
        self.num_stages = 1
        self.width: int = self.stages[0].width  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to image features (B, N, D)."""
        return self.run_stages(images, 0, self.num_stages)

    def run_stages(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run stages start to stop - 1; the only one takes images (B, 3, H, W) and gives features (B, N, D)."""
        assert 0 <= start <= stop <= self.num_stages, (start, stop, self.num_stages)
        for stage in self.stages[start:stop]:  # pyright: ignore[reportGeneralTypeIssues]
            x = stage(x)
        return x


class _TimmFeatures(nn.Module):
    """A timm model whose features, in whatever layout it keeps them, come out as (B, N, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.width = int(model.num_features)  # pyright: ignore[reportArgumentType]
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.forward_features(images)  # pyright: ignore[reportCallIssue]
        if features.ndim == 3:
            features = features[:, self.num_prefix_tokens :]
        elif features.ndim == 4 and self.channels_last:
            features = features.flatten(1, 2)
        elif features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)
        if features.ndim != 3 or features.shape[2] != self.width:
            raise ValueError(
                f"The timm model {type(self.model).__name__} gives features of shape {tuple(features.shape)} and not "
                f"(batch, positions, {self.width}); use a backbone whose features are one map or one row of tokens."
            )
        return features


def _create_model(name: str, pretrained: bool, image_size: int | tuple[int, int] | None) -> nn.Module:
    try:
        timm = import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"The image encoder {name!r} is a timm model and timm cannot be imported ({error}): "
            "pip install 'opencoca[timm]'."
        ) from error
    if not timm.is_model(name.removeprefix("timm/").split(".")[0]):
        raise ValueError(f"timm {timm.__version__} has no model named {name!r}; timm.list_models('*') names them all.")
    # num_classes=0 leaves out the classifier, which forward_features never reaches.
    options = {"pretrained": pretrained, "num_classes": 0}
    if image_size is not None:
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError as error:
            # A network that takes every size has no such argument.
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **options)
