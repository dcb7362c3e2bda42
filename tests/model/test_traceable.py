"""Padded graphs against the packed network, in float64, over every arrangement that changes a text's computation."""

import pytest
import torch

from opencoca.model.traceable import DecoderGraph, ImageGraph, TextGraph, empty_cache

CONFIGS = {
    "paper": {},
    "rotary, one key-value head, parallel": {
        "positions": "rotary",
        "num_kv_heads": 1,
        "block": "parallel",
        "activation": "swiglu",
        "norm_bias": False,
        "linear_bias": False,
    },
    "grouped key-value heads, [CLS] after padding": {
        "positions": "rotary",
        "num_kv_heads": 2,
        "cls_position": "after_padding",
    },
    "hidden id": {"hidden_id": 0},
    "hidden id, shifted": {"hidden_id": 0, "hide_next": True},
    "hidden id, shifted, [CLS] after padding": {
        "hidden_id": 0,
        "hide_next": True,
        "positions": "rotary",
        "cls_position": "after_padding",
    },
    "halves of different widths": {"multimodal_num_heads": 2, "multimodal_mlp_width": 20, "self_attn_mlp": True},
    "norms and scales": {
        "norm_image_tokens": True,
        "layer_scale": 0.3,
        "activation": "quick_gelu",
        "pooler": {"arrangement": "shared"},
    },
}


@pytest.fixture(params=CONFIGS)
def model(request, make_model):
    return make_model(**CONFIGS[request.param]).double()


def small_ids(*shape):
    """Few different ids, so that one which is hidden stands in many places."""
    return torch.randint(0, 4, shape)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 5, 11, 12])
def test_text_graph_equals_the_packed_network(model, length):
    ids = small_ids(16, length)
    lengths = torch.randint(1, length + 1, (16,))
    lengths[0], lengths[1] = length, 1
    mask = torch.arange(length) < lengths[:, None]
    torch.testing.assert_close(TextGraph(model)(ids, mask), model.encode_text(ids, mask).embed, rtol=0, atol=1e-12)


@torch.inference_mode()
@pytest.mark.parametrize("first", [1, 4])
def test_decoder_graph_equals_the_whole_pass_word_by_word(model, first):
    pixels, ids = torch.randn(9, 3, 12, 12).double(), small_ids(9, 12)
    expected = model.logits(pixels, ids)
    image_cache = ImageGraph(model)(pixels)[2]
    caches = [empty_cache(model, 9, half).double() for half in ("unimodal", "multimodal")]
    for end in range(first, 13):
        logits, *caches = DecoderGraph(model)(ids[:, :end], *caches, image_cache)
        torch.testing.assert_close(logits, expected[:, end - 1], rtol=0, atol=1e-12)


@torch.inference_mode()
def test_rows_of_the_caches_can_be_selected(make_model):
    model = make_model()
    pixels, ids = torch.randn(2, 3, 12, 12), small_ids(2, 6)
    image_cache = ImageGraph(model)(pixels)[2]
    decoder = DecoderGraph(model)
    caches = [empty_cache(model, 2, half) for half in ("unimodal", "multimodal")]
    _, *caches = decoder(ids[:, :4], *caches, image_cache)
    rows = torch.tensor([1, 0, 1])
    logits, *_ = decoder(ids[rows], *(cache[:, :, rows] for cache in caches), image_cache[:, :, rows])
    torch.testing.assert_close(logits, model.logits(pixels[rows], ids[rows])[:, -1])


@torch.inference_mode()
def test_image_graph_gives_what_the_model_gives(model):
    pixels = torch.randn(3, 3, 12, 12).double()
    tokens, embed, cache = ImageGraph(model)(pixels)
    expected = model.encode_image(pixels)
    assert torch.equal(tokens, expected.tokens)
    assert torch.equal(embed, expected.embed)
    for (keys, values), layer in zip(model.multimodal_decoder.project_image(tokens), cache, strict=True):
        assert torch.equal(layer[0], keys)
        assert torch.equal(layer[1], values)
