"""Counted operations against the rows that the layers of a real model saw, and the pairs that attention compares."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.system.devices import DEVICES, find_device, measured_flops, peak_flops
from opencoca.tasks.pretraining import PretrainingOptions
from opencoca.train.flops import ModelFlops
from opencoca.train.recipe.recipe import EncoderRecipe, OptimizerRecipe, Recipe

CONFIG = CoCaConfig(
    embed_dim=24,
    image=ImageEncoderConfig(image_size=(32, 32), patch_size=8, width=32, depth=3, num_heads=2, mlp_width=48),
    pooler=PoolerConfig(num_queries=5, num_heads=2),
    text=TextConfig(
        vocab_size=70,
        context_length=12,
        width=40,
        unimodal_depth=2,
        multimodal_depth=3,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=56,
    ),
)
LENGTHS = [3, 7, 12, 5]


def recipe(**changes: object) -> Recipe:
    return Recipe(model=CONFIG, **changes)  # pyright: ignore[reportArgumentType]


def linear_flops(config: CoCaConfig, lengths: list[int]) -> dict[str, float]:
    """2 x rows x in x out of every linear map in one forward pass of a real model, by part."""
    model, found = CoCa(config), {}

    def hook(part: str):
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].numel() // args[0].shape[-1]
            found[part] = found.get(part, 0) + 2 * rows * module.weight.numel()  # pyright: ignore

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name.split(".")[0]))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        model(torch.randn(len(lengths), 3, 32, 32), torch.ones(mask.shape, dtype=torch.int64), mask)
    return found


def test_every_part_is_what_its_layers_do() -> None:
    seen = linear_flops(CONFIG, LENGTHS)
    counted = ModelFlops(CONFIG, recipe())(len(LENGTHS), LENGTHS)
    num_images, patches, tokens = len(LENGTHS), 16, 5
    # The first layer needs no gradient by its input; attention is two products, each with two gradients.
    patch_embed = 2 * num_images * patches * 3 * 64 * 32
    image = 3 * (seen["image_encoder"] + 3 * 2 * 2 * num_images * patches**2 * 32) + 2 * patch_embed
    assert counted.image_encoder == image
    with_cls = sum((n + 1) * (n + 2) // 2 for n in LENGTHS)
    assert counted.unimodal == 3 * (seen["unimodal_decoder"] + seen["text_proj"] + 2 * 2 * 2 * with_cls * 40)
    inputs = sum(n - 1 for n in LENGTHS)
    pairs = sum(n * (n - 1) // 2 for n in LENGTHS) + inputs * tokens
    assert counted.multimodal == 3 * (seen["multimodal_decoder"] + 3 * 2 * 2 * pairs * 40)
    assert counted.vocabulary_loss == 3 * 2 * inputs * 70 * 40
    assert counted.contrastive_loss == 3 * 2 * 4 * 4 * 24
    pooler_attention = 2 * 2 * num_images * (tokens * patches + tokens) * 40
    assert counted.poolers == 3 * (seen["image_pooling"] + seen["image_proj"] + pooler_attention)
    assert counted.total == sum(counted)


def test_padding_and_order_cost_nothing() -> None:
    count = ModelFlops(CONFIG, recipe())
    assert count(4, LENGTHS) == count(4, torch.tensor(LENGTHS[::-1]))
    assert count(4, [5] * 4).total < count(4, [6] * 4).total


def test_what_is_frozen_or_unwanted_costs_less() -> None:
    whole = ModelFlops(CONFIG, recipe())(4, LENGTHS)
    frozen = ModelFlops(CONFIG, recipe(encoder=EncoderRecipe(frozen_stages=-1)))(4, LENGTHS)
    patch_embed = 2 * 4 * 16 * 3 * 64 * 32
    assert frozen.image_encoder == (whole.image_encoder + patch_embed) / 3
    assert frozen.poolers == whole.poolers * 2 / 3
    assert frozen.multimodal == whole.multimodal
    cached = ModelFlops(CONFIG, recipe(encoder=EncoderRecipe(frozen_stages=-1, cache_features=True)))(4, LENGTHS)
    assert cached.image_encoder == 0
    locked = ModelFlops(CONFIG, recipe(optimizer=OptimizerRecipe(frozen=["image_encoder"])))(4, LENGTHS)
    assert locked.image_encoder == frozen.image_encoder
    dual = ModelFlops(CONFIG, recipe(task=PretrainingOptions(caption_weight=0, select_by="loss")))(4, LENGTHS)
    assert (dual.multimodal, dual.vocabulary_loss) == (0, 0)
    assert dual.unimodal == whole.unimodal
    captioner = ModelFlops(CONFIG, recipe(task=PretrainingOptions(contrastive_weight=0, select_by="loss")))(4, LENGTHS)
    assert captioner.contrastive_loss == 0
    assert captioner.unimodal < whole.unimodal


def test_other_image_encoders() -> None:
    config = replace(CONFIG, image=ImageEncoderConfig(name="efficientnet_lite0", image_size=(64, 64)))
    one, two = (ModelFlops(config, recipe())(n, [4] * n).image_encoder for n in (1, 2))
    assert two == 2 * one > 0


def test_fewer_patches_cost_less() -> None:
    half = ModelFlops(CONFIG, recipe(encoder=EncoderRecipe(patch_dropout=0.5)))(4, LENGTHS)
    whole = ModelFlops(CONFIG, recipe())(4, LENGTHS)
    assert 0.4 * whole.image_encoder < half.image_encoder < 0.6 * whole.image_encoder


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_devices_are_known_by_what_drivers_call_them(name: str, key: str) -> None:
    assert find_device(name) is DEVICES[key] is find_device(key)


def test_a_device_that_is_not_known() -> None:
    assert find_device("Voodoo 2") is None


def test_the_rate_of_a_cpu_is_measured() -> None:
    rate = peak_flops(torch.device("cpu"), "fp32")
    assert 1e8 < rate < 1e15
    assert measured_flops(torch.device("cpu"), "fp32") == rate
