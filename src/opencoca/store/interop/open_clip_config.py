"""Converts configurations of open_clip's CoCa to a `CoCaConfig` and a `PreprocessConfig`, and back."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from opencoca.data.transforms import PreprocessConfig
from opencoca.model.config import CoCaConfig, Compat, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.store.interop.open_clip_options import DEFAULT_LOGIT_SCALE, VISION, OpenClipConfig, read_options
from opencoca.system.messages import brief, shown

# open_clip ignores its own option multimodal_cfg.mlp_ratio.
_MULTIMODAL_MLP_RATIO = 4
_RESIZE_MODES = {"shortest": "crop", "squash": "squash"}


def config_from_open_clip(options: Mapping[str, Any]) -> CoCaConfig:
    """Returns the configuration that gives the same outputs as open_clip's CoCa with these options.

    It sets what open_clip has and the paper has not: the [CLS] mask shifted by one (`Compat.text_hide_next`), one
    pooler for both purposes, two MLPs in each multimodal layer, projected embeddings.

    Raises ValueError that names the option if it is not supported, unknown or impossible.
    """
    model, vision, text, multimodal = read_options(options)
    activation = "quick_gelu" if model["quick_gelu"] else "gelu"
    has_pooler, is_shared = bool(vision["attentional_pool"]), vision["attentional_pool"] is True
    mlp_width, multimodal_mlp_width = int(text["width"] * text["mlp_ratio"]), _MULTIMODAL_MLP_RATIO * text["width"]
    return CoCaConfig(
        embed_dim=model["embed_dim"],
        image=ImageEncoderConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            depth=vision["layers"],
            num_heads=max(1, vision["width"] // vision["head_width"]),
            mlp_width=int(vision["width"] * vision["mlp_ratio"]),
            activation=activation,
        ),
        pooler=_read_pooler(vision) if has_pooler else PoolerConfig("class_token", num_queries=0, num_heads=1),
        text=TextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["context_length"],
            width=text["width"],
            unimodal_depth=text["layers"],
            multimodal_depth=multimodal["layers"],
            num_heads=text["heads"],
            mlp_width=mlp_width,
            activation=activation,
        ),
        initial_temperature=math.exp(-model["init_logit_scale"]),
        compat=Compat(
            image_class_token=True,
            image_patch_bias=False,
            image_pre_norm=not vision["no_ln_pre"],
            image_final_norm=not is_shared,
            image_layer_scale=vision["ls_init_value"],
            pooler_norm_queries=has_pooler,
            pooler_norm_output=is_shared or not has_pooler,
            text_self_attn_mlp=True,
            text_norm_image_tokens=True,
            text_multimodal_num_heads=multimodal["heads"] if multimodal["heads"] != text["heads"] else None,
            text_multimodal_mlp_width=multimodal_mlp_width if multimodal_mlp_width != mlp_width else None,
            text_layer_scale=text["ls_init_value"],
            text_hidden_id=text["pad_id"],
            text_hide_next=not text["correct_cls_mask"],
            project_embeds=True,
        ),
    )


def _read_pooler(vision: dict[str, Any]) -> PoolerConfig:
    return PoolerConfig(
        arrangement="shared" if vision["attentional_pool"] is True else vision["attentional_pool"],
        num_queries=vision["attn_pooler_queries"],
        num_heads=vision["attn_pooler_heads"],
        project_queries=True,
    )


def preprocess_from_open_clip(config: OpenClipConfig) -> PreprocessConfig:
    """Returns how open_clip prepares images for evaluation. Raises ValueError for an option that is not supported."""
    options, default = config.preprocess, PreprocessConfig()
    known = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
    resize_mode = str(options.get("resize_mode") or "shortest")
    supported = {
        "mode": options.get("mode", "RGB") == "RGB",
        "interpolation": (options.get("interpolation") or "bicubic") == "bicubic",
        "resize_mode": resize_mode in _RESIZE_MODES,
    }
    for name in [*(options.keys() - known), *(name for name, good in supported.items() if not good)]:
        named = f"preprocess_cfg.{brief(name, 60)} = {shown(options[name], 60)}"
        raise ValueError(f"open_clip's option {named} is not supported here")
    try:
        size = options.get("size") or config.model["vision_cfg"].get("image_size", VISION["image_size"])
        return PreprocessConfig.from_dict(
            {
                "image_size": size if isinstance(size, list | tuple) else (size, size),
                "mean": options.get("mean") or default.mean,
                "std": options.get("std") or default.std,
                "resize_mode": _RESIZE_MODES[resize_mode],
            }
        )
    except (TypeError, AttributeError) as error:
        reason = brief(error)
        raise ValueError(f"open_clip's option preprocess_cfg has a value of the wrong type: {reason}") from error


def preprocess_to_open_clip(preprocess: PreprocessConfig) -> dict[str, Any]:
    """Inverts `preprocess_from_open_clip`. Raises ValueError for a resize_mode that open_clip does not have."""
    modes = {ours: theirs for theirs, ours in _RESIZE_MODES.items()}
    if preprocess.resize_mode not in modes:
        raise ValueError(
            f"the model cannot be exported to open_clip: its images are resized by {preprocess.resize_mode!r}, which "
            f"open_clip does otherwise; it can have {' or '.join(modes)}"
        )
    return {
        "size": list(preprocess.image_size),
        "mode": "RGB",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": "bicubic",
        "resize_mode": modes[preprocess.resize_mode],
        "fill_color": 0,
    }


def config_to_open_clip(config: CoCaConfig) -> dict[str, Any]:
    """Inverts `config_from_open_clip`.

    Raises ValueError that names the fields in which the model differs from everything open_clip can build.
    """
    image, text, compat = config.image, config.text, config.compat
    height, width = image.image_size
    tower = {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width}
    options: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "init_logit_scale": math.log(1 / config.initial_temperature),
        "vision_cfg": {
            "image_size": height if height == width else [height, width],
            "layers": image.depth,
            "width": image.width,
            "head_width": image.width // image.num_heads,
            "mlp_ratio": _ratio(image.mlp_width, image.width),
            "patch_size": image.patch_size,
            "ls_init_value": compat.image_layer_scale,
            **_pooler_options(config.pooler),
            "no_ln_pre": not compat.image_pre_norm,
            "output_tokens": True,
        },
        "text_cfg": {
            **tower,
            "heads": text.num_heads,
            "layers": text.unimodal_depth,
            "mlp_ratio": _ratio(text.mlp_width, text.width),
            "ls_init_value": compat.text_layer_scale,
            "pad_id": compat.text_hidden_id or 0,
            "correct_cls_mask": not compat.text_hide_next,
            "embed_cls": True,
            "output_tokens": True,
        },
        "multimodal_cfg": {
            **tower,
            "heads": compat.text_multimodal_num_heads or text.num_heads,
            "layers": text.multimodal_depth,
            "ls_init_value": compat.text_layer_scale,
        },
        "custom_text": True,
    }
    _check_same(config, options)
    return _without_defaults(options)


def _pooler_options(pooler: PoolerConfig) -> dict[str, Any]:
    if pooler.arrangement == "class_token":
        return {}
    return {
        "attentional_pool": True if pooler.arrangement == "shared" else pooler.arrangement,
        "attn_pooler_queries": pooler.num_queries,
        "attn_pooler_heads": pooler.num_heads,
    }


def _check_same(config: CoCaConfig, options: dict[str, Any]) -> None:
    # The temperature is in the weights; its maximum and dropout concern training alone.
    ours = replace(
        config,
        image=replace(config.image, dropout=0.0),
        pooler=replace(config.pooler, dropout=0.0),
        text=replace(config.text, dropout=0.0),
    )
    sentence = "the model cannot be exported to open_clip, which has no model like it"
    try:
        theirs = config_from_open_clip(options)
    except ValueError as error:
        raise ValueError(f"{sentence}: {error}") from error
    theirs = replace(theirs, initial_temperature=config.initial_temperature, max_logit_scale=config.max_logit_scale)
    differences = [
        f"{name} is {mine!r} and would have to be {other!r}"
        for (name, mine), other in zip(_flat(ours.to_dict()), dict(_flat(theirs.to_dict())).values(), strict=True)
        if mine != other
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{sentence}: {'; '.join(differences[:3])}{more}")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return pairs


def _ratio(mlp_width: int, width: int) -> float | int:
    """Returns the ratio that open_clip multiplies by the width, rounding down, to get mlp_width."""
    ratio = mlp_width / width
    if ratio == int(ratio):
        return int(ratio)
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width


def _without_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Drops options that open_clip 3.3 does not know, where their values are what it does anyway."""
    for section in (options["vision_cfg"], options["text_cfg"], options["multimodal_cfg"]):
        for name in ("ls_init_value", "correct_cls_mask", "no_ln_pre", "pad_id"):
            if not section.get(name, True):
                del section[name]
    if not options["quick_gelu"]:
        del options["quick_gelu"]
    if math.isclose(options["init_logit_scale"], DEFAULT_LOGIT_SCALE):
        del options["init_logit_scale"]
    return options
