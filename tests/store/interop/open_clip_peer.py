"""Random CoCas of open_clip's, and texts to compare them on, for the tests against open_clip."""

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from opencoca.model.coca import CoCa
from opencoca.store.interop.open_clip import config_from_open_clip, convert_state_dict

VOCAB_SIZE, CONTEXT = 97, 12


def small_options(
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    multimodal: dict[str, Any] | None = None,
    **model: Any,
) -> dict[str, Any]:
    """The options of a CoCa of some ten thousand parameters, with changes."""
    sizes = {"context_length": CONTEXT, "vocab_size": VOCAB_SIZE, "width": 32, "heads": 4}
    vit = {"image_size": 24, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2, "output_tokens": True}
    pooler = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 7}
    return {
        "embed_dim": 32,
        "vision_cfg": {**vit, **pooler, **(vision or {})},
        "text_cfg": {**sizes, "layers": 2, "embed_cls": True, "output_tokens": True, **(text or {})},
        "multimodal_cfg": {**sizes, "layers": 2, **(multimodal or {})},
        "custom_text": True,
        **model,
    }


def make_peer(options: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """open_clip's model, every parameter of it random, so that each one shows."""
    options = copy.deepcopy(options)
    options.pop("custom_text")
    # Their constructor of a text tower knows it, the options of a whole CoCa do not yet.
    correct_cls_mask = options["text_cfg"].pop("correct_cls_mask", False)
    torch.manual_seed(seed)
    peer = import_module("open_clip.coca_model").CoCa(**options)
    peer.text.correct_cls_mask = correct_cls_mask
    with torch.no_grad():
        nn.init.normal_(peer.text_decoder.text_projection, std=peer.text_decoder.width**-0.5)  # they leave it empty
        for parameter in peer.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peer.to(dtype).eval()


def convert_peer(peer: nn.Module, options: dict[str, Any]) -> CoCa:
    """The peer's weights, not copied where possible, in our model."""
    with torch.device("meta"):
        model = CoCa(config_from_open_clip(options))
    model.load_state_dict(convert_state_dict(peer.state_dict(), model, "the peer"), assign=True)
    return model.eval()


def make_texts(lengths: list[int], context: int, vocab_size: int, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids (B, context) padded with pad_id, and their mask; one word in four, never the first, is pad_id too."""
    ids = torch.randint(0, vocab_size, (len(lengths), context))
    ids = ids.where(torch.rand(ids.shape) > 0.25, pad_id)
    ids[:, 0] = vocab_size - 2
    mask = torch.arange(context) < torch.tensor(lengths)[:, None]
    return ids.where(mask, pad_id), mask
