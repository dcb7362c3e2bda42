"""Image encoders behind one interface, so that what follows does not know which one it has.

Each is a module with ``width`` (channels of its features), ``num_stages``, ``stages``, ``forward`` (images (B, 3, H, W)
-> features (B, N, width)) and ``run_stages(x, start, stop)``, which runs a part of it: the output of stage k is the
input of stage k + 1, so that what a frozen beginning computes can be stored and the rest trained.
"""

from typing import Protocol

from torch import Tensor, nn

from opencoca.model.config import CoCaConfig


class ImageEncoder(Protocol):
    """What every image encoder offers."""

    width: int
    num_stages: int
    stages: nn.ModuleList

    def __call__(self, images: Tensor) -> Tensor: ...

    def run_stages(self, x: Tensor, start: int, stop: int) -> Tensor: ...


def build_image_encoder(model: CoCaConfig, module: nn.Module | None = None):
    """The encoder that the configuration names; a ``custom`` one is the module that is handed over.

    Raises ValueError if there is none of that name, and if a module is missing or not expected.
    """
    config = model.image
    kind, _, backbone = config.name.partition(":")
    if (kind == "custom") != (module is not None):
        given = "is missing" if module is None else "was given, but only the image encoder 'custom' takes one"
        raise ValueError(f"the image encoder is {config.name!r} and image_encoder, a module, {given}")
    if module is not None:
        from opencoca.model.encoders.custom import CustomEncoder

        return CustomEncoder(module, config.width)
    if kind == "vit":
        from opencoca.model.encoders.vit import VisionTransformer

        return VisionTransformer(model)
    if kind.startswith("efficientnet_lite") and kind[-1] in "012":
        from opencoca.model.encoders.efficientnet_lite import EfficientNetLite

        return EfficientNetLite(int(kind[-1]))
    if kind == "timm" and backbone:
        from opencoca.model.encoders.timm_backbone import TimmBackbone

        return TimmBackbone(backbone, image_size=config.image_size)
    raise ValueError(
        f"there is no image encoder {config.name!r}; known: vit, efficientnet_lite0, efficientnet_lite1, "
        "efficientnet_lite2, timm:MODEL"
    )
