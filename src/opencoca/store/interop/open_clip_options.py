"""The options of open_clip's CoCa: its named configurations, and a reader for others in JSON files.

An unknown option is an error that names it: nothing is left out silently. open_clip ignores some of
its own options for CoCa (``multimodal_cfg.n_queries``, for one); those are ignored here as well.
"""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from opencoca.system.json_files import read_json
from opencoca.system.messages import brief, shown
from opencoca.system.notice import Notice

CONFIG_FILE = "open_clip_config.json"
_MAX_CONFIG_BYTES = 1_000_000
DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)

# Options of open_clip 3.3 and their defaults.
_CUSTOM_BLOCKS = {
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_MODEL = {
    "embed_dim": None,
    "vision_cfg": None,
    "text_cfg": None,
    "multimodal_cfg": None,
    "quick_gelu": False,
    "init_logit_scale": DEFAULT_LOGIT_SCALE,
    "init_logit_bias": None,
}
VISION = {
    **_CUSTOM_BLOCKS,
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "ls_init_value": None,
    "patch_dropout": 0.0,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "timm_model_name": None,
}
_TEXT = {
    **_CUSTOM_BLOCKS,
    "context_length": 77,
    "vocab_size": 49408,
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "embed_cls": False,
    "pad_id": 0,
    "no_causal_mask": False,
    "correct_cls_mask": False,
    "proj_bias": False,
    "proj_type": "linear",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "hf_model_name": None,
}
_MULTIMODAL = {
    "context_length": 77,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "ls_init_value": None,
}
# What a model of the CoCa family has, so that open_clip never looks at these.
_IGNORED = {
    "": {"custom_text", "nonscalar_logit_scale", "pad_id"},
    "vision_cfg": {"timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"},
    "text_cfg": {"eos_id", "pool_type", "final_ln_after_pool", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
    "multimodal_cfg": {"dim_head", "n_queries", "attn_pooler_heads"} | (set(_TEXT) - set(_MULTIMODAL)),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_image_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) else [value]
    return len(sides) in (1, 2) and all(map(_is_count, sides))


_COUNTS = (
    *("layers", "width", "head_width", "patch_size", "attn_pooler_queries", "attn_pooler_heads"),
    *("context_length", "vocab_size", "heads", "embed_dim"),
)
# What an option may be; one that is not listed must have its default.
_ALLOWED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_COUNTS, _is_count),
    **dict.fromkeys(("vision_cfg", "text_cfg", "multimodal_cfg"), lambda value: isinstance(value, Mapping)),
    **dict.fromkeys(("no_ln_pre", "correct_cls_mask", "quick_gelu"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("mlp_ratio", "patch_dropout"), lambda value: _is_number(value) and 0 <= value < 1e4),
    **dict.fromkeys(("act_kwargs", "norm_kwargs", "tokenizer_kwargs"), lambda value: value in (None, {})),
    **dict.fromkeys(("output_tokens", "embed_cls"), lambda value: value is True),
    "pad_id": lambda value: _is_count(value, least=0),
    "init_logit_scale": lambda value: _is_number(value) and abs(value) <= 50,
    "ls_init_value": lambda value: value is None or _is_number(value),
    "image_size": _is_image_size,
    "attentional_pool": lambda value: value in (False, True, "cascade", "parallel"),
    "block_type": lambda value: value in (None, "default", "custom"),
    "pos_embed_type": lambda value: value in ("learnable", "sin_cos_2d"),  # stored as a table in either case
}


@dataclass(frozen=True)
class OpenClipConfig:
    """A configuration file of open_clip: options of the model, and of the preprocessing if the file has them."""

    name: str
    model: dict[str, Any]
    preprocess: dict[str, Any] = field(default_factory=dict)


def _coca(embed_dim: int, vision: dict[str, Any], width: int, heads: int, vocab_size: int) -> dict[str, Any]:
    tower = {"context_length": 76, "vocab_size": vocab_size, "width": width, "heads": heads, "layers": 12}
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {**vision, "output_tokens": True},
        "text_cfg": {**tower, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": dict(tower),
        "custom_text": True,
    }


def _pooled_vit(layers: int, width: int, patch_size: int) -> dict[str, Any]:
    sizes = {"image_size": 224, "layers": layers, "width": width, "patch_size": patch_size}
    return {**sizes, "attentional_pool": True, "attn_pooler_heads": 8}


CONFIGS: dict[str, dict[str, Any]] = {
    "coca_ViT-B-32": _coca(512, _pooled_vit(12, 768, 32), 512, 8, 49408),
    "coca_ViT-L-14": _coca(768, _pooled_vit(24, 1024, 14), 768, 12, 49408),
    "coca_base": _coca(512, {"image_size": 288, "layers": 12, "width": 768, "patch_size": 18}, 768, 12, 64000),
}


def read_config(name_or_path: str | os.PathLike[str]) -> OpenClipConfig:
    """Reads a configuration by its name in `CONFIGS`, from a JSON file, or from a folder with open_clip_config.json.

    Raises:
        FileNotFoundError: there is neither such a name nor such a file.
        ValueError: the file is not JSON, or not a configuration of open_clip's.
    """
    name = os.fspath(name_or_path)
    if name in CONFIGS:
        return OpenClipConfig(name, CONFIGS[name])
    path = Path(name)
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no open_clip model {name!r} and no such file; known: {', '.join(CONFIGS)}, or give the model's "
            "configuration as a JSON file"
        )
    content = read_json(file, _MAX_CONFIG_BYTES)
    model = content.get("model_cfg", content) if isinstance(content, dict) else None
    preprocess = content.get("preprocess_cfg", {}) if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(preprocess, dict) or "vision_cfg" not in model:
        raise ValueError(f"{file} is no open_clip configuration: it has no vision_cfg")
    return OpenClipConfig(file.parent.name if file.name == CONFIG_FILE else file.stem, model, preprocess)


class Options(NamedTuple):
    """All options of a model by section, with defaults filled in; every one is supported."""

    model: dict[str, Any]
    vision: dict[str, Any]
    text: dict[str, Any]
    multimodal: dict[str, Any]


def read_options(options: Mapping[str, Any]) -> Options:
    """Checks the options of a model (``model_cfg``) and fills in open_clip's defaults.

    Raises ValueError that names the option if it is not supported, unknown or impossible.
    """
    if "multimodal_cfg" not in options:
        raise ValueError(
            "open_clip's option multimodal_cfg is missing: this is the configuration of a CLIP, not a CoCa"
        )
    model = _read(options, _MODEL, "")
    read = Options(
        model,
        _read(model["vision_cfg"], VISION, "vision_cfg"),
        _read(model["text_cfg"], _TEXT, "text_cfg"),
        _read(model["multimodal_cfg"], _MULTIMODAL, "multimodal_cfg"),
    )
    _check_widths(*read)
    return read


def _read(options: Mapping[str, Any], defaults: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Returns the options of a section with defaults filled in; raises ValueError for one that is not supported."""
    values = dict(defaults)
    for name, value in options.items():
        label = f"{section}.{name}" if section else name
        if name in defaults:
            values[name] = value
        elif name not in _IGNORED[section]:
            raise ValueError(
                f"open_clip's option {brief(label)} is unknown here, so that the model cannot be converted"
            )
    for name, value in values.items():
        label = f"{section}.{name}" if section else name
        if not (_ALLOWED[name](value) if name in _ALLOWED else value == defaults[name]):
            raise ValueError(f"open_clip's option {label} = {shown(value, 60)} is not supported here")
    if values.get("patch_dropout"):
        warnings.warn(
            f"open_clip's option {section}.patch_dropout = {values['patch_dropout']} drops patches in training and is "
            "not carried over; outputs are the same",
            Notice,
            stacklevel=4,
        )
    return values


def _check_widths(model: dict, vision: dict, text: dict, multimodal: dict) -> None:
    if multimodal["width"] != text["width"]:
        raise ValueError(
            f"open_clip's option multimodal_cfg.width = {multimodal['width']} must be text_cfg.width, {text['width']}"
        )
    if multimodal["context_length"] < text["context_length"]:
        raise ValueError(
            f"open_clip's option multimodal_cfg.context_length = {multimodal['context_length']} must be at least "
            f"text_cfg.context_length, {text['context_length']}"
        )
    pool = vision["attentional_pool"]
    if pool and model["embed_dim"] != text["width"]:
        raise ValueError(
            f"open_clip's option embed_dim = {model['embed_dim']} must be text_cfg.width, {text['width']}, where "
            "vision_cfg.attentional_pool is set: the pooler makes image tokens of that width"
        )
    if pool is not True and vision["width"] != (model["embed_dim"] if pool else text["width"]):
        raise ValueError(
            f"open_clip's option vision_cfg.width = {vision['width']} must be that of the image tokens, "
            f"{text['width']}, where vision_cfg.attentional_pool = {pool!r}"
        )
    if (text["ls_init_value"] is None) != (multimodal["ls_init_value"] is None):
        raise ValueError(
            "open_clip's option ls_init_value must be set in both of text_cfg and multimodal_cfg, or in none"
        )
