"""EfficientNet-Lite against the published sizes, its own symmetries, and other projects' models."""

import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opencoca.model.config import CoCaConfig, ImageEncoderConfig
from opencoca.model.encoders import build_image_encoder
from opencoca.model.encoders.efficientnet_lite import ConvNorm, EfficientNetLite
from opencoca.model.encoders.timm_backbone import TimmBackbone
from opencoca.store.interop import efficientnet_weights
from opencoca.store.interop.efficientnet_weights import load_imagenet_weights

NATIVE_SIZES = {0: 224, 1: 240, 2: 260}


def randomize_norms(encoder: nn.Module, seed: int = 0) -> None:
    """Statistics, scales and biases that differ per channel, so that a mistake in one of them shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in encoder.modules():
        if isinstance(module, ConvNorm) and module.norm is not None:
            norm = module.norm
            with torch.no_grad():
                norm.weight.uniform_(0.7, 1.3, generator=generator)
                norm.bias.uniform_(-0.3, 0.3, generator=generator)
                norm.running_mean.uniform_(-0.3, 0.3, generator=generator)
                norm.running_var.uniform_(0.5, 1.5, generator=generator)


@pytest.fixture(scope="module")
def encoder() -> EfficientNetLite:
    torch.manual_seed(0)
    encoder = EfficientNetLite(0)
    randomize_norms(encoder)
    return encoder


@pytest.fixture(scope="module")
def pretrained() -> EfficientNetLite:
    encoder = EfficientNetLite(0)
    load_imagenet_weights(encoder)
    return encoder


@pytest.mark.parametrize(("variant", "with_classifier"), [(0, 4_652_008), (1, 5_416_680), (2, 6_092_072)])
def test_parameters_are_those_of_the_published_models(variant: int, with_classifier: int):
    with torch.device("meta"):
        encoder = EfficientNetLite(variant)
    classifier = 1280 * 1000 + 1000
    assert sum(parameter.numel() for parameter in encoder.parameters()) + classifier == with_classifier
    assert encoder.width == 1280
    assert encoder.num_stages == len(encoder.stages) == 8


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="no image encoder 'efficientnet_lite7'"):
        build_image_encoder(CoCaConfig(image=ImageEncoderConfig(name="efficientnet_lite7")))


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 97), width=st.integers(1, 97))
def test_images_of_any_size_and_shape(encoder: EfficientNetLite, height: int, width: int):
    with torch.no_grad():
        features = encoder(torch.randn(1, 3, height, width))
    assert features.shape == (1, math.ceil(height / 32) * math.ceil(width / 32), 1280)
    assert features.isfinite().all()


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (5, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("size", [(8, 8), (9, 6), (7, 13), (1, 2)])
def test_convolution_is_same_padded_then_normalised(kernel_size: int, stride: int, size: tuple[int, int]):
    layer = ConvNorm(2, 3, kernel_size, stride).double()
    randomize_norms(layer)
    image = torch.randn(1, 2, *size, dtype=torch.float64)
    conv, norm = layer.conv, layer.norm
    assert norm is not None

    # TensorFlow's definition: ceil(size / stride) outputs; missing zeros are shared, the odd one at the end.
    total = [max((math.ceil(s / stride) - 1) * stride + kernel_size - s, 0) for s in size]
    padded = torch.zeros(1, 2, size[0] + total[0], size[1] + total[1], dtype=torch.float64)
    top, left = total[0] // 2, total[1] // 2
    padded[:, :, top : top + size[0], left : left + size[1]] = image
    convolved = nn.functional.conv2d(padded, conv.weight, stride=stride)
    expected = nn.functional.batch_norm(
        convolved, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=1e-3
    ).clamp(0, 6)

    output = layer(image)
    assert output.shape[-2:] == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_stages_compose(encoder: EfficientNetLite):
    images = torch.randn(2, 3, 65, 33)
    with torch.no_grad():
        whole = encoder(images)
        for middle in range(encoder.num_stages + 1):
            prefix = encoder.run_stages(images, 0, middle)
            # A cache gives features back in plain memory order.
            assert torch.equal(encoder.run_stages(prefix.clone().contiguous(), middle, encoder.num_stages), whole)


def test_features_go_row_by_row(encoder: EfficientNetLite):
    images = torch.randn(1, 3, 64, 160)
    with torch.no_grad():
        feature_map = encoder.stages[-1][0](encoder.run_stages(images, 0, encoder.num_stages - 1))
        features = encoder(images)
    assert feature_map.shape[-2:] == (2, 5)
    torch.testing.assert_close(features[:, 7], feature_map[:, :, 1, 2])


def test_images_of_a_batch_do_not_meet(encoder: EfficientNetLite):
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        together = encoder(images)
        alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_train_mode_computes_what_eval_mode_does(encoder: EfficientNetLite):
    images = torch.randn(2, 3, 48, 48)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(encoder.train()(images), encoder.eval()(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_gradients_reach_every_trainable_parameter_and_no_frozen_one():
    encoder = EfficientNetLite(0)
    randomize_norms(encoder)
    encoder.stages[:5].requires_grad_(False)
    encoder(torch.randn(1, 3, 64, 64)).square().mean().backward()
    for index, stage in enumerate(encoder.stages):
        for parameter in stage.parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (index >= 5)


def test_gradient_through_the_norm_is_that_of_batch_norm():
    layer = ConvNorm(2, 3, kernel_size=3, activation=False).double()
    randomize_norms(layer)
    image = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    target = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    conv, norm = layer.conv, layer.norm
    assert norm is not None
    parameters = [conv.weight, norm.weight, norm.bias]

    reference = nn.functional.batch_norm(
        nn.functional.conv2d(image, conv.weight, padding=1),
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        eps=1e-3,
    )
    expected = torch.autograd.grad((reference * target).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad((layer(image) * target).sum(), parameters), expected)


def test_bfloat16_training_step_is_close_to_float32(pretrained: EfficientNetLite):
    images = torch.randn(1, 3, 64, 64)
    weights = [module.conv.weight for module in pretrained.stages[5:].modules() if isinstance(module, ConvNorm)]
    gradients = []
    for enabled in (False, True):
        with torch.no_grad():
            prefix = pretrained.run_stages(images, 0, 5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = pretrained.run_stages(prefix, 5, 8)
        gradients.append(torch.autograd.grad(features.float().mean(), weights))
    for exact, rounded in zip(*gradients, strict=True):
        assert nn.functional.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.9


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_imagenet_weights_fill_every_tensor(variant: int):
    encoder = EfficientNetLite(variant)
    for tensor in encoder.state_dict().values():
        tensor.fill_(math.nan)
    load_imagenet_weights(encoder)
    assert all(tensor.isfinite().all() for tensor in encoder.state_dict().values())


def test_missing_weights_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(efficientnet_weights, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"opencoca\[pretrained\]"):
        load_imagenet_weights(EfficientNetLite(0))


def test_wrong_weights_name_the_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "broken.pth"
    weights = torch.load(efficientnet_weights._find_weights(0), weights_only=True)
    del weights["_blocks.3._bn2.running_var"]
    torch.save(weights, path)
    monkeypatch.setattr(efficientnet_weights, "_find_weights", lambda variant: path)
    with pytest.raises(ValueError, match=r"broken\.pth.*_blocks\.3\._bn2\.running_var"):
        load_imagenet_weights(EfficientNetLite(0))


@pytest.mark.peers
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_equal_to_the_reference_implementation(variant: int):
    peer = import_module("efficientnet_lite_pytorch")
    reference = peer.EfficientNet.from_pretrained(
        f"efficientnet-lite{variant}", weights_path=str(efficientnet_weights._find_weights(variant))
    ).eval()
    encoder = EfficientNetLite(variant)
    load_imagenet_weights(encoder)
    images = torch.randn(1, 3, NATIVE_SIZES[variant], NATIVE_SIZES[variant])
    with torch.no_grad():
        expected = reference.extract_features(images).flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-4)


def test_timm_is_an_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"opencoca\[timm\]"):
        TimmBackbone("resnet18")


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "image_size", "num_features", "width"),
    [
        ("resnet18", 96, 9, 512),
        ("vit_tiny_patch16_224", 96, 36, 192),
        ("vit_small_patch14_reg4_dinov2", 98, 49, 384),
        ("swin_tiny_patch4_window7_224", None, 49, 768),
    ],
)
def test_timm_backbones_give_image_features(name: str, image_size: int | None, num_features: int, width: int):
    pytest.importorskip("timm")
    encoder = TimmBackbone(name, image_size=image_size).eval()
    images = torch.randn(2, 3, image_size or 224, image_size or 224)
    with torch.no_grad():
        features = encoder(images)
    assert features.shape == (2, num_features, width)
    assert (encoder.width, encoder.num_stages, len(encoder.stages)) == (width, 1, 1)
    with pytest.raises(ValueError, match="no-such-model"):
        TimmBackbone("no-such-model")
