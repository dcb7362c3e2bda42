"""Any backbone of the timm library as an image encoder; the one module that imports timm.

B batch, H W image height and width, N image features, D width.
"""

from importlib import import_module

from torch import Tensor, nn

from opencoca.model.encoders.stages import ImageEncoder


class TimmBackbone(ImageEncoder):
    """Images (B, 3, H, W) to image features (B, N, D) by a timm model's `forward_features`, as one stage.

    A convolutional network gives one feature per position of its last map, row by row from the top left; a vision
    transformer gives its patch tokens, without class and register tokens.

    name: timm's name of the model, such as "resnet50" or "vit_base_patch16_224". image_size: (height, width) or the
    side of square images, in pixels, for models that are built for one size; None keeps theirs.

    Raises ValueError if timm is not installed, or does not know the model.
    """

    def __init__(self, name: str, image_size: int | tuple[int, int] | None = None):
        features = _TimmFeatures(_create_model(name, image_size))
        super().__init__([features], features.width)


class _TimmFeatures(nn.Module):
    """A timm model whose features come out as (B, N, D), or as a map (B, D, rows, columns)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.width = int(model.num_features)  # pyright: ignore[reportArgumentType]
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0))
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.forward_features(images)  # pyright: ignore[reportCallIssue]
        if features.ndim == 3:
            return features[:, self.num_prefix_tokens :]
        return features.movedim(-1, 1) if self.channels_last and features.ndim == 4 else features


def _create_model(name: str, image_size: int | tuple[int, int] | None) -> nn.Module:
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
    options = {"pretrained": False, "num_classes": 0}
    if image_size is not None:
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError as error:
            # A network that takes every size has no such argument.
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **options)
