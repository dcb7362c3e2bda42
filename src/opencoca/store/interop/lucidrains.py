"""Loads weights of `coca_pytorch.CoCa` (lucidrains' CoCa-pytorch, 0.1.0) as a CoCa.

Its texts run through parallel blocks with one shared key-value head, SwiGLU and rotary positions (PaLM, arXiv
2204.02311); one pooler of Q + 1 queries gives the image vector and the image tokens.
Letters: D width, V vocabulary, Q image tokens, H heads, d head width, F width of the MLPs, E embed_dim, C width of the
image features.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opencoca.model.coca import CoCa
from opencoca.model.config import BlockConfig, CoCaConfig, Compat, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.model.init import without_values
from opencoca.store.interop.tensor_reader import StateDictSource, TensorReader
from opencoca.store.interop.vit_pytorch import vit_config, vit_tensors

_ENCODER, _POOL = "img_encoder.", "img_attn_pool."


def load_lucidrains(
    state_dict: StateDictSource,
    image_encoder: nn.Module | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    image_head_dim: int = 64,
    context_length: int = 512,
) -> CoCa:
    """Makes a CoCa, in eval mode, that computes what `coca_pytorch.CoCa` computes with these weights.

    Next-word logits, both embeddings and the temperature are equal for texts that are padded at their end
    (token_mask True = word) to the same number of columns: the position of their [CLS] is behind the padding.

    Args:
        state_dict: the CoCa's state dict, or a file that holds it (`torch.save` or safetensors).
        image_encoder: a module that gives the features (B, N, C) of all positions. It is filled, in place, with the
            weights under ``img_encoder.`` if there are any. None: those weights are a ViT or SimpleViT of vit_pytorch,
            which is converted.
        image_size: (height, width) in pixels of the images that the vit_pytorch encoder takes; needed for a SimpleViT,
            while a ViT's weights determine it.
        image_head_dim: width of that encoder's heads (64 by default in vit_pytorch).
        context_length: the most words that a text may have; their model has no limit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read; a tensor is missing, of another shape, not finite, or has no place.
    """
    reader = TensorReader(state_dict)
    config = _read_config(reader, image_encoder is not None, image_size, image_head_dim, context_length)
    if image_encoder is None and config.image.name == "custom":
        raise ValueError(f"{reader.label} holds no image encoder; hand yours over: image_encoder=")
    tensors = _model_tensors(reader, config)
    if image_encoder is None:
        encoder = vit_tensors(reader, _vit_prefix(reader), config)
        tensors |= {f"image_encoder.{name}": tensor for name, tensor in encoder.items()}
    elif reader.has_prefix(_ENCODER):
        _fill(image_encoder, reader)
    reader.finish()
    with without_values():
        model = CoCa(config, image_encoder=image_encoder)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name in missing if image_encoder is None or not name.startswith("image_encoder.")]
    tied = ["lm_head.weight"] if config.text.tie_embeddings else []
    assert missing == tied, missing
    assert not unexpected, unexpected
    model.tie_head()
    return model.eval()


class _Sizes(NamedTuple):
    width: int
    num_heads: int
    head_dim: int
    mlp_width: int
    context_width: int


def _read_sizes(reader: TensorReader) -> _Sizes:
    width = reader.shape("token_emb.weight", 2)[1]
    key_values, context_width = reader.shape(f"{_POOL}to_kv.weight", 2)
    head_dim = key_values // 2
    inner = reader.shape(f"{_POOL}to_q.weight", 2)[0]
    if head_dim < 1 or inner % head_dim:
        raise ValueError(f"{reader.label}: {_POOL}to_q.weight, {inner} rows, are not heads of width {head_dim}")
    fused = "unimodal_layers.0.fn.fused_attn_ff_proj.weight"
    return _Sizes(
        width=width,
        num_heads=inner // head_dim,
        head_dim=head_dim,
        mlp_width=(reader.shape(fused, 2)[0] - inner - 2 * head_dim) // 2,
        context_width=context_width,
    )


def _read_config(
    reader: TensorReader,
    handed_over: bool,
    image_size: int | tuple[int, int] | None,
    image_head_dim: int,
    context_length: int,
) -> CoCaConfig:
    sizes = _read_sizes(reader)
    if handed_over or not reader.has_prefix(_ENCODER):
        image, compat = ImageEncoderConfig(name="custom", width=sizes.context_width), Compat()
        image = image if image_size is None else replace(image, image_size=image_size)
    else:
        image, compat = vit_config(reader, _vit_prefix(reader), image_head_dim, image_size)
    vocab_size = reader.shape("token_emb.weight", 2)[0]
    head = reader.tensors.get("to_logits.1.weight")
    scale = reader.take_scale("temperature", 1)
    text = TextConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        width=sizes.width,
        unimodal_depth=reader.count("unimodal_layers."),
        multimodal_depth=reader.count("multimodal_layers."),
        num_heads=sizes.num_heads,
        num_kv_heads=1,
        head_dim=sizes.head_dim,
        mlp_width=sizes.mlp_width,
        block="parallel",
        positions="rotary",
        activation="swiglu",
        norm_bias=False,
        linear_bias=False,
        # Safetensors files leave out shared tensors.
        tie_embeddings=head is None or torch.equal(head, reader.tensors["token_emb.weight"]),
    )
    return CoCaConfig(
        embed_dim=reader.shape("text_to_latents.to_latents.weight", 2)[0],
        image=image,
        pooler=PoolerConfig(
            arrangement="shared",
            num_queries=reader.shape("img_queries", 2)[0],
            num_heads=sizes.num_heads,
            num_kv_heads=1,
            project_queries=True,
        ),
        text=text,
        initial_temperature=1 / scale,
        max_logit_scale=max(100.0, 1.001 * scale),  # theirs has no limit
        compat=replace(
            compat,
            pooler_head_dim=sizes.head_dim,
            pooler_norm_bias=False,
            pooler_linear_bias=False,
            pooler_norm_queries=True,
            text_cls_position="after_padding",
            text_self_attn_mlp=True,
            project_embeds=True,
        ),
    )


def _model_tensors(reader: TensorReader, config: CoCaConfig) -> dict[str, Tensor]:
    """Converts all tensors but those of the image encoder."""
    width, vocab_size = config.text.width, config.text.vocab_size
    tensors = {
        "unimodal_decoder.token_embed.weight": reader.take("token_emb.weight", vocab_size, width),
        "unimodal_decoder.cls_embed": reader.take("text_cls_token", width),
        "unimodal_decoder.norm.weight": _take_norm(reader, "text_cls_norm", width),
        "multimodal_decoder.norm.weight": _take_norm(reader, "to_logits.0", width),
        "image_proj.weight": reader.take("img_to_latents.to_latents.weight", config.embed_dim, width),
        "text_proj.weight": reader.take("text_to_latents.to_latents.weight", config.embed_dim, width),
        "log_logit_scale": reader.take("temperature", 1).squeeze(0),
    }
    if "to_logits.1.weight" in reader:
        head = reader.take("to_logits.1.weight", vocab_size, width)
        tensors |= {} if config.text.tie_embeddings else {"lm_head.weight": head}
    tensors |= _pooler_tensors(reader, config)
    block = config.unimodal_block()  # the multimodal half's are alike
    for index in range(config.text.unimodal_depth):
        theirs = f"unimodal_layers.{index}.fn."
        tensors |= _self_block_tensors(reader, theirs, block, f"unimodal_decoder.blocks.{index}.")
    for index in range(config.text.multimodal_depth):
        theirs, ours = f"multimodal_layers.{index}.", f"multimodal_decoder.layers.{index}."
        tensors |= _self_block_tensors(reader, f"{theirs}0.fn.", block, f"{ours}self_block.")
        tensors |= _cross_block_tensors(reader, f"{theirs}1.fn.", block, f"{ours}cross_block.")
    return tensors


def _pooler_tensors(reader: TensorReader, config: CoCaConfig) -> dict[str, Tensor]:
    pooler, width, ours = config.pooler, config.text.width, "image_pooling.poolers.pooler."
    block = config.pooler_block()
    inner, context_width = block.num_heads * block.head_dim, reader.shape(f"{_POOL}to_kv.weight", 2)[1]
    return {
        f"{ours}query": reader.take("img_queries", pooler.num_queries, width),
        f"{ours}norm_query.weight": _take_norm(reader, f"{_POOL}norm", width),
        f"{ours}attn.q_proj.weight": reader.take(f"{_POOL}to_q.weight", inner, width),
        f"{ours}norm_context.weight": _take_norm(reader, f"{_POOL}context_norm", context_width),
        f"{ours}attn.kv_proj.weight": reader.take(f"{_POOL}to_kv.weight", 2 * block.head_dim, context_width),
        f"{ours}attn.out_proj.weight": reader.take(f"{_POOL}to_out.weight", width, inner),
        f"{ours}norm.weight": _take_norm(reader, "img_attn_pool_norm", width),
    }


def _self_block_tensors(reader: TensorReader, theirs: str, block: BlockConfig, ours: str) -> dict[str, Tensor]:
    width, inner = block.width, block.num_heads * block.head_dim
    parts = (inner, 2 * block.head_dim, 2 * block.mlp_width)
    fused = reader.take(f"{theirs}fused_attn_ff_proj.weight", sum(parts), width)
    queries, keys_values, up = (part.clone() for part in fused.split(parts))
    _check_rotary(reader, f"{theirs}rotary_emb.inv_freq", block.head_dim)
    return {
        f"{ours}norm1.weight": _take_norm(reader, f"{theirs}norm", width),
        f"{ours}attn.q_proj.weight": queries,
        f"{ours}attn.kv_proj.weight": keys_values,
        f"{ours}attn.out_proj.weight": reader.take(f"{theirs}attn_out.weight", width, inner),
        f"{ours}mlp.up_proj.weight": up,
        f"{ours}mlp.down_proj.weight": reader.take(f"{theirs}ff_out.1.weight", width, block.mlp_width),
    }


def _cross_block_tensors(reader: TensorReader, theirs: str, block: BlockConfig, ours: str) -> dict[str, Tensor]:
    width, inner, mlp_width = block.width, block.num_heads * block.head_dim, block.mlp_width
    return {
        f"{ours}norm1.weight": _take_norm(reader, f"{theirs}norm", width),
        f"{ours}attn.q_proj.weight": reader.take(f"{theirs}to_q.weight", inner, width),
        f"{ours}attn.kv_proj.weight": reader.take(f"{theirs}to_kv.weight", 2 * block.head_dim, width),
        f"{ours}attn.out_proj.weight": reader.take(f"{theirs}to_out.weight", width, inner),
        f"{ours}mlp.up_proj.weight": reader.take(f"{theirs}ff.0.weight", 2 * mlp_width, width),
        f"{ours}mlp.down_proj.weight": reader.take(f"{theirs}ff.2.weight", width, mlp_width),
    }


def _take_norm(reader: TensorReader, name: str, width: int) -> Tensor:
    """Takes the scale of a norm; the shift that their norms store is a constant zero."""
    if f"{name}.beta" in reader and bool(reader.take(f"{name}.beta", width).any()):
        raise ValueError(f"{reader.label}: {name}.beta is not zero, as it is in every coca_pytorch.CoCa")
    return reader.take(f"{name}.gamma", width)


def _check_rotary(reader: TensorReader, name: str, head_dim: int) -> None:
    """Checks that their stored frequencies are those that our network computes."""
    if name not in reader:
        return
    stored = reader.take(name, head_dim // 2).double()
    expected = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if not torch.allclose(stored, expected, rtol=1e-2, atol=0):
        raise ValueError(f"{reader.label}: {name} are not the frequencies 10000^(-2i / {head_dim}) of rotary positions")


def _vit_prefix(reader: TensorReader) -> str:
    """Returns the prefix of the encoder's names; inside an `Extractor` they are one level deeper."""
    return f"{_ENCODER}vit." if reader.has_prefix(f"{_ENCODER}vit.") else _ENCODER


def _fill(module: nn.Module, reader: TensorReader) -> None:
    expected: Mapping[str, Tensor] = module.state_dict()
    tensors = {}
    for name, tensor in expected.items():
        theirs = _ENCODER + name
        if tensor.is_floating_point():
            tensors[name] = reader.take(theirs, *tensor.shape)
        elif theirs in reader:
            tensors[name] = reader.tensors[theirs]
            reader.taken.add(theirs)
    module.load_state_dict(tensors, strict=False)
