"""The text embedding that comes with a caption against that of a pass over its tokens."""

import pytest
import torch
from captioner import CONTEXT_LENGTH, make_model, make_tokens

from opencoca.generation import GenerationOptions, generate

SEARCHES = [
    GenerationOptions(),
    GenerationOptions(max_new_tokens=3),
    GenerationOptions(num_beams=4, num_captions=3, prefix="a dog"),
    GenerationOptions(num_beams=4, num_captions=4, num_groups=2, diversity_penalty=1.0, max_new_tokens=5),
    GenerationOptions(temperature=1.5, num_captions=3),
]
DECODERS = [
    {},
    {"positions": "rotary", "num_kv_heads": 2},
    {"block": "parallel", "num_kv_heads": 1},
    {"hidden_id": 242},
    {"hidden_id": 242, "hide_next": True},
    {"hidden_id": 242, "hide_next": True, "context_length": 20},
]


@pytest.mark.parametrize(("text", "linear"), [*((text, {}) for text in DECODERS), ({}, {"dim": 6})], ids=str)
@pytest.mark.parametrize("options", SEARCHES, ids=range(len(SEARCHES)))
def test_equals_encode_text(tokenizer, text, linear, options):
    model = make_model(tokenizer, text, linear=linear)
    context_length = text.get("context_length", CONTEXT_LENGTH)
    cut = []
    for captions in generate(model, make_tokens(model), tokenizer, options, with_text_embed=True):
        assert len(captions) == options.num_captions
        for caption in captions:
            ids = list(caption.token_ids)
            if ids[-1] != tokenizer.eos_id:
                cut.append(len(ids))
                ids = [*ids[: context_length - 1], tokenizer.eos_id]
            with torch.inference_mode():
                expected = model.encode_text(torch.tensor([ids])).embed[0]
            assert caption.text_embed is not None
            assert caption.text_embed.dtype == torch.float32
            torch.testing.assert_close(caption.text_embed, expected.float(), atol=1e-5, rtol=0)
    if options.max_new_tokens == 3:
        assert cut


def test_it_is_made_on_demand_and_without_a_second_pass(tokenizer, monkeypatch):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    assert all(c.text_embed is None for (c,) in generate(model, tokens, tokenizer))
    monkeypatch.setattr(model, "encode_text", None)
    monkeypatch.setattr(model.unimodal_decoder, "forward", None)
    assert all(c.text_embed is not None for (c,) in generate(model, tokens, tokenizer, with_text_embed=True))
