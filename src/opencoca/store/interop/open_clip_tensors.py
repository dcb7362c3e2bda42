"""Maps the tensors of open_clip's CoCa to ours and back.

Letters: D width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.model.config import CoCaConfig

Convert = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class TensorMap:
    """Tensors of theirs with the same content as tensors of ours; `into_ours` and `into_theirs` are inverses."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    into_ours: Convert
    into_theirs: Convert

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Returns our names and tensors, made from theirs."""
        yield from zip(self.ours, self.into_ours([tensors[name] for name in self.theirs]), strict=True)

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Returns their names and tensors, made from ours."""
        yield from zip(self.theirs, self.into_theirs([tensors[name] for name in self.ours]), strict=True)


def tensor_maps(config: CoCaConfig) -> list[TensorMap]:
    """Returns maps that cover every tensor of an open_clip CoCa of this configuration once."""
    maps = [
        _same("logit_scale", "log_logit_scale"),
        _same("text.token_embedding.weight", "unimodal_decoder.token_embed.weight"),
        _same("text.cls_emb", "unimodal_decoder.cls_embed"),
        _same("text.positional_embedding", "unimodal_decoder.pos_embed"),
        _transposed("text.text_projection", "text_proj.weight"),
        _transposed("visual.proj", "image_proj.weight"),
        _transposed("text_decoder.text_projection", "lm_head.weight"),
        *_norm("text.ln_final", "unimodal_decoder.norm"),
        *_norm("text_decoder.ln_final", "multimodal_decoder.norm"),
        *_image_encoder(config),
        *_poolers(config),
    ]
    has_scale = config.compat.text_layer_scale is not None
    for index in range(config.text.unimodal_depth):
        maps += _block(f"text.transformer.resblocks.{index}", f"unimodal_decoder.blocks.{index}", has_scale)
    for index in range(config.text.multimodal_depth):
        ours = f"multimodal_decoder.layers.{index}"
        maps += _block(f"text_decoder.resblocks.{index}", f"{ours}.self_block", has_scale)
        maps += _block(f"text_decoder.cross_attn.{index}", f"{ours}.cross_block", has_scale)
        maps += _norm(f"text_decoder.cross_attn.{index}.ln_1_kv", f"{ours}.cross_block.norm_context")
    return maps


def _image_encoder(config: CoCaConfig) -> list[TensorMap]:
    image, compat, first = config.image, config.compat, "image_encoder.stages.0"
    maps = [
        _same("visual.conv1.weight", f"{first}.proj.weight"),
        _same("visual.class_embedding", f"{first}.class_token"),
        TensorMap(
            ("visual.positional_embedding",),
            (f"{first}.pos_embed",),
            lambda tensors: [tensors[0].unsqueeze(0)],
            lambda tensors: [tensors[0].squeeze(0)],
        ),
    ]
    if compat.image_pre_norm:
        maps += _norm("visual.ln_pre", f"{first}.norm")
    for index in range(image.depth):
        ours = f"image_encoder.stages.{index + 1}"
        maps += _block(f"visual.transformer.resblocks.{index}", ours, compat.image_layer_scale is not None)
    if compat.image_final_norm:
        maps += _norm("visual.ln_post", f"image_encoder.stages.{image.depth + 1}")
    return maps


def _poolers(config: CoCaConfig) -> list[TensorMap]:
    arrangement, ours = config.pooler.arrangement, "image_pooling.poolers"
    is_square = config.image.width == config.text.width
    if arrangement == "class_token":
        return []
    if arrangement == "shared":
        return [
            *_pooler("visual.attn_pool", f"{ours}.pooler", is_square),
            *_norm("visual.ln_post", f"{ours}.pooler.norm"),
        ]
    return [
        *_pooler("visual.attn_pool", f"{ours}.caption_pooler", is_square),
        *_pooler("visual.attn_pool_contrastive", f"{ours}.contrastive_pooler", is_square),
    ]


def _pooler(theirs: str, ours: str, is_square: bool) -> list[TensorMap]:
    """Maps a pooler; is_square: queries and features have one width, and PyTorch stores their projections together."""
    maps = [
        _same(f"{theirs}.query", f"{ours}.query"),
        *_norm(f"{theirs}.ln_q", f"{ours}.norm_query"),
        *_norm(f"{theirs}.ln_k", f"{ours}.norm_context"),
        *_linear(f"{theirs}.attn.out_proj", f"{ours}.attn.out_proj"),
        _split_projections(f"{theirs}.attn.in_proj_bias", f"{ours}.attn", "bias"),
    ]
    if is_square:
        return [*maps, _split_projections(f"{theirs}.attn.in_proj_weight", f"{ours}.attn", "weight")]
    keys_and_values = TensorMap(
        (f"{theirs}.attn.k_proj_weight", f"{theirs}.attn.v_proj_weight"),
        (f"{ours}.attn.kv_proj.weight",),
        lambda tensors: [torch.cat(list(tensors))],
        lambda tensors: tensors[0].chunk(2),
    )
    return [*maps, _same(f"{theirs}.attn.q_proj_weight", f"{ours}.attn.q_proj.weight"), keys_and_values]


def _block(theirs: str, ours: str, has_scale: bool) -> list[TensorMap]:
    maps = [
        *_norm(f"{theirs}.ln_1", f"{ours}.norm1"),
        _split_projections(f"{theirs}.attn.in_proj_weight", f"{ours}.attn", "weight"),
        _split_projections(f"{theirs}.attn.in_proj_bias", f"{ours}.attn", "bias"),
        *_linear(f"{theirs}.attn.out_proj", f"{ours}.attn.out_proj"),
        *_norm(f"{theirs}.ln_2", f"{ours}.norm2"),
        *_linear(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up_proj"),
        *_linear(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down_proj"),
    ]
    if has_scale:
        maps += [_same(f"{theirs}.ls_{index}.gamma", f"{ours}.scale{index}.factor") for index in (1, 2)]
    return maps


def _split_projections(theirs: str, attn: str, kind: str) -> TensorMap:
    """Maps one tensor of 3 D rows, for queries, keys and values, to our query and key-value projections."""

    def split(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        width = tensors[0].shape[0] // 3
        return tensors[0].split((width, 2 * width))

    return TensorMap(
        (theirs,),
        (f"{attn}.q_proj.{kind}", f"{attn}.kv_proj.{kind}"),
        split,
        lambda tensors: [torch.cat(list(tensors))],
    )


def _same(theirs: str, ours: str) -> TensorMap:
    return TensorMap((theirs,), (ours,), lambda tensors: tensors, lambda tensors: tensors)


def _transposed(theirs: str, ours: str) -> TensorMap:
    return TensorMap((theirs,), (ours,), lambda tensors: [tensors[0].T], lambda tensors: [tensors[0].T])


def _norm(theirs: str, ours: str) -> list[TensorMap]:
    return [_same(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]


_linear = _norm  # a norm and a linear map have tensors of the same names
