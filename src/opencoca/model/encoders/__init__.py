"""Image encoders, one file each; `build_image_encoder` makes the one that a configuration names."""

from torch import nn

from opencoca.model.config import CoCaConfig
from opencoca.model.encoders.stages import ImageEncoder


def build_image_encoder(model: CoCaConfig, module: nn.Module | None = None) -> ImageEncoder:
    """The encoder that the configuration names; a ``custom`` one is the module that is handed over.

    Raises ValueError if there is none of that name, and if a module is missing or not expected.
    """
    config = model.image
    kind, _, backbone = config.name.partition(":")
    if (kind == "custom") != (module is not None):
        given = "is missing" if module is None else "was given, but only the image encoder 'custom' takes one"
        raise ValueError(f"the image encoder is {config.name!r} and image_encoder, a module, {given}")
    if module is not None:
        return ImageEncoder([module], config.width)
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
