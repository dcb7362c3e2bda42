"""Vision Transformer: patches against an unfolded reference, positions for other sizes, stages."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoca.model.config import CoCaConfig, ImageEncoderConfig
from opencoca.model.encoders import build_image_encoder
from opencoca.model.encoders.vit import PatchEmbed, VisionTransformer

TINY = ImageEncoderConfig(image_size=(12, 20), patch_size=4, width=16, depth=3, num_heads=2, mlp_width=24)


def vit(config: ImageEncoderConfig = TINY) -> VisionTransformer:
    encoder = build_image_encoder(CoCaConfig(image=config))
    assert isinstance(encoder, VisionTransformer)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return encoder.eval()


def patch_embed(encoder: VisionTransformer) -> PatchEmbed:
    patches = encoder.stages[0]
    assert isinstance(patches, PatchEmbed)
    return patches


def test_patches_are_row_by_row_with_their_positions():
    patches, images = patch_embed(vit()), torch.randn(2, 3, 12, 20)
    embedded = patches(images)
    assert embedded.shape == (2, 15, 16)
    weight, bias = patches.proj.weight.flatten(1), patches.proj.bias
    for row in range(3):
        for column in range(5):
            index = 5 * row + column
            pixels = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
            torch.testing.assert_close(
                embedded[:, index], pixels @ weight.T + bias + patches.pos_embed[0, index], atol=1e-4, rtol=1e-4
            )


def test_every_patch_sees_every_patch():
    encoder, images = vit(), torch.randn(1, 3, 12, 20)
    changed = images.clone()
    changed[:, :, -1, -1] += 1
    assert (encoder(images) != encoder(changed)).any(dim=-1).all()


@given(st.integers(0, 5), st.integers(0, 5))
def test_stages_compose(first: int, second: int):
    torch.manual_seed(0)
    encoder, images = vit(), torch.randn(2, 3, 12, 20)
    first, second = sorted((first, second))
    assert encoder.num_stages == len(encoder.stages) == 5
    with torch.no_grad():
        x = encoder.run_stages(images, 0, first)
        x = encoder.run_stages(encoder.run_stages(x, first, second), second, encoder.num_stages)
        assert torch.equal(x, encoder(images))
    assert encoder.run_stages(images, 2, 2) is images
    assert encoder.width == x.shape[-1] == 16


def test_the_configured_size_takes_the_positions_as_they_are():
    patches = patch_embed(vit())
    assert patches.positions(3, 5) is patches.pos_embed
    # The same number of patches in another shape is another grid.
    assert not torch.equal(patches.positions(5, 3), patches.pos_embed)


@given(st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30)
def test_positions_of_every_grid(rows: int, columns: int):
    patches = patch_embed(vit())
    with torch.no_grad():
        assert patches.positions(rows, columns).shape == (1, rows * columns, 16)
        # Equal everywhere stays equal everywhere ...
        constant = torch.randn(16)
        patches.pos_embed.copy_(constant.expand_as(patches.pos_embed))
        torch.testing.assert_close(
            patches.positions(rows, columns), constant.expand(1, rows * columns, 16), atol=1e-5, rtol=1e-5
        )
        # ... a row's own value stays the same along the row, and a column's along the column.
        grid = torch.randn(3, 1, 16).expand(3, 5, 16)
        patches.pos_embed.copy_(grid.reshape(1, 15, 16))
        resized = patches.positions(rows, columns).view(rows, columns, 16)
        torch.testing.assert_close(resized, resized[:, :1].expand_as(resized), atol=1e-5, rtol=1e-5)
        grid = torch.randn(1, 5, 16).expand(3, 5, 16)
        patches.pos_embed.copy_(grid.reshape(1, 15, 16))
        resized = patches.positions(rows, columns).view(rows, columns, 16)
        torch.testing.assert_close(resized, resized[:1].expand_as(resized), atol=1e-5, rtol=1e-5)


def test_positions_keep_their_direction():
    """A slope stays a slope at double resolution, in its own direction."""
    patches = patch_embed(vit(replace(TINY, image_size=(32, 32))))
    with torch.no_grad():
        slope = torch.arange(8.0)[:, None, None].expand(8, 8, 16)
        patches.pos_embed.copy_(slope.reshape(1, 64, 16))
        resized = patches.positions(16, 16).view(16, 16, 16)
    assert (resized.diff(dim=0)[2:-2] > 0).all()
    assert resized.diff(dim=1).abs().max() < 1e-5
    # Cell centres: row r of 16 lies at (r + 0.5) / 2 - 0.5 of 8.
    torch.testing.assert_close(resized[4:12, 0, 0], (torch.arange(4.0, 12.0) + 0.5) / 2 - 0.5)


@pytest.mark.parametrize("size", [(288, 288), (576, 576), (288, 576), (90, 36)])
def test_the_papers_patches_at_other_sizes(size: tuple[int, int]):
    config = ImageEncoderConfig(width=8, depth=1, num_heads=1, mlp_width=8)
    with torch.no_grad():
        features = vit(config)(torch.randn(1, 3, *size))
    assert features.shape == (1, size[0] // 18 * (size[1] // 18), 8)
    assert features.isfinite().all()


def test_sizes_that_are_no_multiple_of_the_patch_are_an_error():
    with pytest.raises(ValueError, match="12 x 21 is not a multiple of patch_size 4"):
        vit()(torch.randn(1, 3, 12, 21))


def test_gradients_reach_every_parameter_at_another_size():
    encoder = vit()
    encoder(torch.randn(2, 3, 16, 12)).square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_dropout_is_on_in_training_alone():
    encoder, images = vit(replace(TINY, dropout=0.5)), torch.randn(1, 3, 12, 20)
    assert torch.equal(encoder(images), encoder(images))
    assert not torch.equal(encoder.train()(images), encoder(images))
