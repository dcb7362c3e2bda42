"""Loads weights of torchmultimodal's CoCa (facebookresearch/multimodal, models/coca) as a CoCa.

It has the paper's layers, open_clip's shifted [CLS] mask, and always a projection before the embeddings.
Letters: D width of text and pooler, C width of the ViT, V vocabulary, T words, F width of an MLP, E embed_dim.
"""

import math
from dataclasses import replace
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, Compat, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.model.init import without_values
from opencoca.store.interop.tensor_reader import StateDictSource, TensorReader

_PRETRAINING = "model."
_SCALE = "contrastive_loss.logit_scale"
_CLASS_TOKEN = "vision_encoder.embeddings.cls_token"


def load_torchmultimodal(
    state_dict: StateDictSource,
    *,
    pooler_num_heads: int = 8,
    num_heads: int | None = None,
    multimodal_num_heads: int | None = None,
    image_num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    pad_id: int = 0,
) -> CoCa:
    """Makes a CoCa, in eval mode, that computes what torchmultimodal's `CoCaModel` computes with these weights.

    Next-word logits and both embeddings are equal for texts that are padded at their end with ``pad_id``, do not
    contain that id (their words see a pad id within a text, ours do not), and have no more words than their model has
    positions before [CLS].

    Args:
        state_dict: of a `CoCaModel` with pre-norm layers, GELU and the ViT of `coca_vit`, or of a `CoCaForPretraining`
            around it; or a file that holds one (`torch.save` or safetensors).
        pooler_num_heads, num_heads, multimodal_num_heads, image_num_heads: heads of the poolers, the text decoder, the
            multimodal decoder and the ViT, which the weights do not determine. None: heads of width 64.
        image_size: (height, width) in pixels of the images that the ViT takes; None: square.
        pad_id: their ``pad_idx``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read; a tensor is missing, of another shape, not finite, or has no place.
    """
    reader = TensorReader(state_dict)
    if reader.has_prefix(f"{_PRETRAINING}text_decoder."):
        reader.drop_prefix(_PRETRAINING)
    heads = _Heads(num_heads, multimodal_num_heads, image_num_heads, pooler_num_heads)
    config = _read_config(reader, heads, image_size, pad_id)
    tensors = _image_tensors(reader, config) | _pooler_tensors(reader, config) | _text_tensors(reader, config)
    reader.finish()
    with without_values():
        model = CoCa(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


class _Heads(NamedTuple):
    text: int | None
    multimodal: int | None
    image: int | None
    pooler: int


def _read_config(reader: TensorReader, heads: _Heads, image_size: tuple[int, int] | None, pad_id: int) -> CoCaConfig:
    label = reader.label
    vocab_size, width = reader.shape("text_decoder.embeddings.token_embeddings.weight", 2)
    if "multimodal_decoder.output_projection.weight" not in reader:
        raise ValueError(f"{label} has no multimodal_decoder.output_projection.weight: no words can be predicted")
    mlp = "transformer_decoder.layer.0.feedforward.model.0.weight"
    multimodal_heads = heads.multimodal or _heads_of_64(width)
    text_heads = heads.text or _heads_of_64(width)
    mlp_width, multimodal_mlp_width = (
        reader.shape(f"{half}.{mlp}", 2)[0] for half in ("text_decoder", "multimodal_decoder")
    )
    text = TextConfig(
        vocab_size=vocab_size,
        context_length=reader.shape("text_decoder.embeddings.position_embeddings", 2)[0] - 1,
        width=width,
        unimodal_depth=reader.count("text_decoder.transformer_decoder.layer."),
        multimodal_depth=reader.count("multimodal_decoder.transformer_decoder.layer."),
        num_heads=text_heads,
        mlp_width=mlp_width,
    )
    cascade = "vision_pooler.poolers.0.query" in reader
    query = "vision_pooler.poolers.0.query" if cascade else "vision_pooler.query"
    pooler = PoolerConfig(
        arrangement="cascade" if cascade else "shared",
        num_queries=reader.shape(query, 2)[0],
        num_heads=heads.pooler,
        project_queries=True,
    )
    config = CoCaConfig(
        embed_dim=reader.shape("text_decoder.text_projection.weight", 2)[0],
        image=_read_image_config(reader, heads, image_size),
        pooler=pooler,
        text=text,
        compat=Compat(
            image_class_token=_CLASS_TOKEN in reader,
            image_final_norm="vision_encoder.encoder.final_layer_norm.weight" in reader,
            pooler_norm_queries=True,
            text_multimodal_num_heads=None if multimodal_heads == text_heads else multimodal_heads,
            text_multimodal_mlp_width=None if multimodal_mlp_width == mlp_width else multimodal_mlp_width,
            text_hidden_id=pad_id,
            text_hide_next=True,
            project_embeds=True,
        ),
    )
    if _SCALE not in reader:
        return config
    scale = reader.take_scale(_SCALE)
    return replace(config, initial_temperature=1 / scale, max_logit_scale=max(100.0, 1.001 * scale))


def _read_image_config(reader: TensorReader, heads: _Heads, image_size: tuple[int, int] | None) -> ImageEncoderConfig:
    embed = "vision_encoder.embeddings."
    width, _, patch_size, _ = reader.shape(f"{embed}conv_projection.weight", 4)
    rows = reader.shape(f"{embed}position_embeddings", 3)[1] - (_CLASS_TOKEN in reader)
    if image_size is None:
        image_size = (isqrt(rows) * patch_size, isqrt(rows) * patch_size)
        if isqrt(rows) ** 2 != rows:
            raise ValueError(f"{reader.label}: positions of {rows} patches are no square; give image_size")
    return ImageEncoderConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=reader.count("vision_encoder.encoder.layer."),
        num_heads=heads.image or _heads_of_64(width),
        mlp_width=reader.shape("vision_encoder.encoder.layer.0.feedforward.model.0.weight", 2)[0],
    )


def _heads_of_64(width: int) -> int:
    return max(1, width // 64)


def _image_tensors(reader: TensorReader, config: CoCaConfig) -> dict[str, Tensor]:
    image, theirs, ours = config.image, "vision_encoder.", "image_encoder.stages."
    width, size = image.width, image.patch_size
    tensors = reader.affine(f"{theirs}embeddings.conv_projection", f"{ours}0.proj", width, 3, size, size)
    rows = image.image_size[0] // size * (image.image_size[1] // size) + config.compat.image_class_token
    tensors[f"{ours}0.pos_embed"] = reader.take(f"{theirs}embeddings.position_embeddings", 1, rows, width)
    if config.compat.image_class_token:
        tensors[f"{ours}0.class_token"] = reader.take(_CLASS_TOKEN, 1, 1, width).flatten()
    for index in range(image.depth):
        tensors |= _block(reader, f"{theirs}encoder.layer.{index}.", f"{ours}{index + 1}.", width, image.mlp_width)
    if config.compat.image_final_norm:
        norm = f"{ours}{image.depth + 1}"
        tensors |= reader.affine(f"{theirs}encoder.final_layer_norm", norm, width)
    return tensors


def _pooler_tensors(reader: TensorReader, config: CoCaConfig) -> dict[str, Tensor]:
    width, ours, theirs = config.text.width, "image_pooling.poolers.", "vision_pooler"
    if config.pooler.arrangement == "cascade":
        poolers = [
            (f"{theirs}.poolers.0", f"{ours}caption_pooler", config.pooler.num_queries, config.image.width),
            (f"{theirs}.poolers.1", f"{ours}contrastive_pooler", 1, width),
        ]
    else:
        poolers = [(theirs, f"{ours}pooler", config.pooler.num_queries, config.image.width)]
    tensors = {"image_proj.weight": reader.take("vision_proj.weight", config.embed_dim, width)}
    for pooler, our_pooler, num_queries, context_width in poolers:
        tensors[f"{our_pooler}.query"] = reader.take(f"{pooler}.query", num_queries, width)
        tensors |= reader.affine(f"{pooler}.ln_q", f"{our_pooler}.norm_query", width)
        tensors |= reader.affine(f"{pooler}.ln_k", f"{our_pooler}.norm_context", context_width)
        tensors |= reader.affine(f"{pooler}.ln_post", f"{our_pooler}.norm", width)
        tensors |= _attention(reader, f"{pooler}.attn", f"{our_pooler}.attn", width, context_width)
    return tensors


def _text_tensors(reader: TensorReader, config: CoCaConfig) -> dict[str, Tensor]:
    text, width = config.text, config.text.width
    embed, ours = "text_decoder.embeddings.", "unimodal_decoder."
    tensors = {
        f"{ours}token_embed.weight": reader.take(f"{embed}token_embeddings.weight", text.vocab_size, width),
        f"{ours}cls_embed": reader.take(f"{embed}cls_embedding", width),
        f"{ours}pos_embed": reader.take(f"{embed}position_embeddings", text.context_length + 1, width),
        "text_proj.weight": reader.take("text_decoder.text_projection.weight", config.embed_dim, width),
        "lm_head.weight": reader.take("multimodal_decoder.output_projection.weight", text.vocab_size, width),
    }
    tensors |= reader.affine("text_decoder.ln_final", f"{ours}norm", width)
    for index in range(text.unimodal_depth):
        layer = f"text_decoder.transformer_decoder.layer.{index}."
        tensors |= _block(reader, layer, f"{ours}blocks.{index}.", width, text.mlp_width)
    mlp_width = config.multimodal_block().mlp_width
    for index in range(text.multimodal_depth):
        layer = f"multimodal_decoder.transformer_decoder.layer.{index}."
        block = f"multimodal_decoder.layers.{index}."
        tensors |= reader.affine(f"{layer}attention_layernorm", f"{block}self_block.norm1", width)
        tensors |= _attention(reader, f"{layer}attention", f"{block}self_block.attn", width, width)
        tensors |= reader.affine(f"{layer}cross_attention_layernorm", f"{block}cross_block.norm1", width)
        tensors |= _attention(reader, f"{layer}cross_attention", f"{block}cross_block.attn", width, width)
        tensors |= reader.affine(f"{layer}feedforward_layernorm", f"{block}cross_block.norm2", width)
        tensors |= _mlp(reader, f"{layer}feedforward", f"{block}cross_block.mlp", width, mlp_width)
    tensors |= reader.affine(
        "multimodal_decoder.transformer_decoder.final_layer_norm", "multimodal_decoder.norm", width
    )
    scale = (
        reader.take(_SCALE)
        if _SCALE in reader
        else tensors["text_proj.weight"].new_tensor(math.log(1 / config.initial_temperature))
    )
    return tensors | {"log_logit_scale": scale}


def _attention(reader: TensorReader, theirs: str, ours: str, width: int, context_width: int) -> dict[str, Tensor]:
    """Takes an attention layer: theirs has three input projections or, in a ViT, one; ours has two."""
    tensors = reader.affine(f"{theirs}.output_proj", f"{ours}.out_proj", width, width)
    is_fused = f"{theirs}.input_proj.weight" in reader
    for part, row in (("weight", (context_width,)), ("bias", ())):
        if is_fused:
            fused = reader.take(f"{theirs}.input_proj.{part}", 3 * width, *row)
            tensors[f"{ours}.q_proj.{part}"] = fused[:width].clone()
            tensors[f"{ours}.kv_proj.{part}"] = fused[width:].clone()
        else:
            keys, values = (reader.take(f"{theirs}.{kind}_proj.{part}", width, *row) for kind in "kv")
            tensors[f"{ours}.kv_proj.{part}"] = torch.cat((keys, values))
    return tensors if is_fused else tensors | reader.affine(f"{theirs}.q_proj", f"{ours}.q_proj", width, width)


def _block(reader: TensorReader, theirs: str, ours: str, width: int, mlp_width: int) -> dict[str, Tensor]:
    """Takes a block of self-attention and an MLP."""
    tensors = reader.affine(f"{theirs}attention_layernorm", f"{ours}norm1", width)
    tensors |= reader.affine(f"{theirs}feedforward_layernorm", f"{ours}norm2", width)
    tensors |= _attention(reader, f"{theirs}attention", f"{ours}attn", width, width)
    return tensors | _mlp(reader, f"{theirs}feedforward", f"{ours}mlp", width, mlp_width)


def _mlp(reader: TensorReader, theirs: str, ours: str, width: int, mlp_width: int) -> dict[str, Tensor]:
    """Takes an MLP; with dropout, theirs has one more module before the second map."""
    down = 3 if f"{theirs}.model.3.weight" in reader else 2
    tensors = reader.affine(f"{theirs}.model.0", f"{ours}.up_proj", mlp_width, width)
    return tensors | reader.affine(f"{theirs}.model.{down}", f"{ours}.down_proj", width, mlp_width)
