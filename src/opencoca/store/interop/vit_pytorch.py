"""Converts weights of vit_pytorch's vision transformers: `ViT` and `SimpleViT`, with or without patch dropout.

Our encoder returns what its `Extractor` returns: the features of all positions after the last norm.
Letters: D width, C pixels of a patch, I heads x head width, F width of the MLP.
"""

from math import isqrt

import torch
from torch import Tensor

from opencoca.model.config import BlockConfig, CoCaConfig, Compat, ImageEncoderConfig
from opencoca.store.interop.tensor_reader import TensorReader

_HINT = "hand the encoder over as a module: image_encoder="


def vit_config(
    reader: TensorReader, prefix: str, head_dim: int, image_size: int | tuple[int, int] | None
) -> tuple[ImageEncoderConfig, Compat]:
    """Derives the configuration of the encoder whose weights begin with ``prefix``; head_dim gives the number of heads.

    Raises ValueError if it is another kind of network, or if its image size must be given and is not.
    """
    embed = f"{prefix}to_patch_embedding."
    if f"{embed}3.weight" not in reader or not reader.has_prefix(f"{prefix}transformer.layers.0.0.to_qkv."):
        raise ValueError(f"{reader.label}: {prefix}* is no ViT or SimpleViT of a recent vit_pytorch; {_HINT}")
    width, patch_values = reader.shape(f"{embed}2.weight", 2)
    patch_size = isqrt(patch_values // 3)
    if 3 * patch_size**2 != patch_values:
        raise ValueError(f"{reader.label}: {embed}2.weight is of {patch_values} pixels, no square of three; {_HINT}")
    layer = f"{prefix}transformer.layers.0."
    inner = reader.shape(f"{layer}0.to_qkv.weight", 2)[0] // 3
    if not reader.has_prefix(f"{layer}0.to_out."):
        head_dim = inner
    if inner % head_dim:
        raise ValueError(f"{reader.label}: {layer}0.to_qkv.weight cannot be shared among heads of width {head_dim}")
    learned = f"{prefix}pos_embedding" in reader
    has_class_token = learned and reader.tensors.get(f"{prefix}cls_token", torch.empty(0)).numel() > 0
    if learned and image_size is None:
        rows = reader.tensors[f"{prefix}pos_embedding"].numel() // width - has_class_token
        image_size = isqrt(rows) * patch_size
        if isqrt(rows) ** 2 != rows:
            raise ValueError(f"{reader.label}: {prefix}pos_embedding is of {rows} patches, no square; give image_size")
    if image_size is None:
        raise ValueError(f"{reader.label} does not say for which image size its SimpleViT is; give image_size")
    image = ImageEncoderConfig(
        name="vit",
        image_size=image_size,  # pyright: ignore[reportArgumentType]
        patch_size=patch_size,
        width=width,
        depth=reader.count(f"{prefix}transformer.layers."),
        num_heads=inner // head_dim,
        mlp_width=reader.shape(f"{layer}1.net.1.weight", 2)[0],
        head_dim=head_dim,
    )
    compat = Compat(
        image_patch_norm=True,
        image_positions="learned" if learned else "sincos",
        image_class_token=has_class_token,
        image_final_norm=f"{prefix}transformer.norm.weight" in reader,
    )
    return image, compat


def vit_tensors(reader: TensorReader, prefix: str, model: CoCaConfig) -> dict[str, Tensor]:
    """Returns the weights under the names of our vision transformer. Raises ValueError as the reader does."""
    config = model.image
    width = config.width
    tensors = _patch_tensors(reader, prefix, model)
    for index in range(config.depth):
        layer = f"{prefix}transformer.layers.{index}."
        tensors |= _block_tensors(reader, layer, model.image_block(), f"stages.{index + 1}.")
    if model.compat.image_final_norm:
        tensors |= reader.affine(f"{prefix}transformer.norm", f"stages.{config.depth + 1}", width)
    # The classifier after the features.
    reader.skip(f"{prefix}mlp_head.", f"{prefix}linear_head.", f"{prefix}cls_token")
    return tensors


def _patch_tensors(reader: TensorReader, prefix: str, model: CoCaConfig) -> dict[str, Tensor]:
    config, compat = model.image, model.compat
    width, size = config.width, config.patch_size
    values = 3 * size**2
    embed = f"{prefix}to_patch_embedding."
    scale, shift = reader.take(f"{embed}1.weight", values), reader.take(f"{embed}1.bias", values)
    weight, bias = reader.take(f"{embed}2.weight", width, values), reader.take(f"{embed}2.bias", width)
    bias = bias + weight @ shift
    # The pixels of their patches are ordered by row, column, colour; ours by colour first.
    weight = (weight * scale).unflatten(1, (size, size, 3)).permute(0, 3, 1, 2).flatten(1).contiguous()
    tensors = {"stages.0.proj.weight": weight, "stages.0.proj.bias": bias}
    tensors |= reader.affine(f"{embed}3", "stages.0.norm", width)
    if compat.image_class_token:
        shape = reader.tensors[f"{prefix}cls_token"].shape
        tensors["stages.0.class_token"] = reader.take(f"{prefix}cls_token", *shape).reshape(-1)
    if compat.image_positions == "learned":
        rows = config.image_size[0] // size * (config.image_size[1] // size) + compat.image_class_token
        # Older versions keep a leading dimension of one.
        leading = reader.tensors[f"{prefix}pos_embedding"].shape[:-2]
        positions = reader.take(f"{prefix}pos_embedding", *leading, rows, width)
        tensors["stages.0.pos_embed"] = positions.reshape(rows, width)
    return tensors


def _block_tensors(reader: TensorReader, layer: str, config: BlockConfig, ours: str) -> dict[str, Tensor]:
    width, inner, mlp_width = config.width, config.head_dim * config.num_heads, config.mlp_width
    tensors = reader.affine(f"{layer}0.norm", f"{ours}norm1", width)
    tensors |= reader.affine(f"{layer}1.net.0", f"{ours}norm2", width)
    qkv = reader.take(f"{layer}0.to_qkv.weight", 3 * inner, width)
    tensors[f"{ours}attn.q_proj.weight"] = qkv[:inner].clone()
    tensors[f"{ours}attn.kv_proj.weight"] = qkv[inner:].clone()
    # Linear maps without a bias get one of zeros.
    tensors[f"{ours}attn.q_proj.bias"] = qkv.new_zeros(inner)
    tensors[f"{ours}attn.kv_proj.bias"] = qkv.new_zeros(2 * inner)
    tensors |= _out_proj_tensors(reader, f"{layer}0.to_out.", width, inner, f"{ours}attn.out_proj.", qkv)
    # Some of their classes have a dropout in between.
    down = f"{layer}1.net.{3 if f'{layer}1.net.3.weight' in reader else 4}"
    tensors |= reader.affine(f"{layer}1.net.1", f"{ours}mlp.up_proj", mlp_width, width)
    return tensors | reader.affine(down, f"{ours}mlp.down_proj", width, mlp_width)


def _out_proj_tensors(
    reader: TensorReader, theirs: str, width: int, inner: int, ours: str, like: Tensor
) -> dict[str, Tensor]:
    if not reader.has_prefix(theirs):
        # One head of the whole width is not projected back.
        return {f"{ours}weight": torch.eye(width, dtype=like.dtype), f"{ours}bias": like.new_zeros(width)}
    name = f"{theirs}0." if f"{theirs}0.weight" in reader else theirs
    bias = reader.take(f"{name}bias", width) if f"{name}bias" in reader else like.new_zeros(width)
    return {f"{ours}weight": reader.take(f"{name}weight", width, inner), f"{ours}bias": bias}
