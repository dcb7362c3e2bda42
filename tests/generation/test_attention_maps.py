"""Attention maps: the recomputed weights reproduce what the modules compute, and land on the right words and places."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.generation.attention_maps import (
    WordMaps,
    feature_grid,
    split_words,
    word_maps,
)
from opencoca.model.attention_maps import cross_attention, pooler_attention, text_attention_weights
from opencoca.model.coca import CoCa
from opencoca.model.layers.attention import SeenImages
from opencoca.model.layers.layout import TextLayout
from opencoca.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = ["a brown dog runs over the grass", "two children play in the water", "a man in a red shirt climbs a rock"]
TEXT_VARIANTS = {
    "plain": {},
    "rotary": {"positions": "rotary", "self_attn_mlp": True},
    "parallel": {"block": "parallel", "activation": "swiglu"},
    "grouped": {"num_kv_heads": 2, "head_dim": 6},
}
POOLERS = {
    "queries": {"num_queries": 5},
    "projected": {"num_queries": 5, "project_queries": True},
    "shared": {"arrangement": "shared", "num_queries": 4},
    "parallel": {"arrangement": "parallel", "num_queries": 3},
    "features": {"num_queries": 0},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS * 3, 400)


def make(make_model, tokenizer: Tokenizer, pooler: dict | None = None, image: dict | None = None, **text) -> CoCa:
    context = {"vocab_size": tokenizer.vocab_size, "context_length": 40}
    return make_model(image=image, pooler=pooler, **{**context, **text}).double()


@pytest.mark.parametrize("text", TEXT_VARIANTS)
@pytest.mark.parametrize("per_image", [1, 3])
def test_weights_times_values_are_the_modules_output(make_model, text, per_image):
    model = make_model(**TEXT_VARIANTS[text]).double()
    attn = model.multimodal_decoder.layers[1].cross_block.attn
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1, 6, 3])[:, None]
    layout = TextLayout.of(mask.sum(dim=1))
    x, context = torch.randn(int(mask.sum()), 16).double(), torch.randn(6 // per_image, 5, 16).double()
    with torch.inference_mode():
        keys, values = attn.project_context(context)
        weights = text_attention_weights(attn, x, keys, layout)
        heads_per_value = attn.num_heads // attn.num_kv_heads
        values_of_text = values.repeat_interleave(per_image, 0).repeat_interleave(heads_per_value, 1)
        mixed = attn.out_proj(layout.pack((weights @ values_of_text).transpose(1, 2).flatten(2)))
        torch.testing.assert_close(mixed, attn(x, SeenImages(keys, values, layout)))
    assert weights.shape == (6, attn.num_heads, 6, 5)


@pytest.mark.parametrize("pooler", POOLERS)
def test_pooler_weights_times_values_are_the_image_tokens(make_model, pooler):
    model = make_model(pooler=POOLERS[pooler]).double()
    with torch.inference_mode():
        features = model.image_encoder(torch.randn(2, 3, 12, 12).double())
        weights = pooler_attention(model, features)
        tokens = model.pool_image(features).tokens
        if pooler == "features":
            assert weights is None
            assert tokens.shape[1] == features.shape[1]
            return
        poolers = model.image_pooling.poolers
        module = poolers.pooler if pooler == "shared" else poolers.caption_pooler
        _, values = module.attn.project_context(module.norm_context(features))
        mixed = module.norm(module.attn.out_proj((weights @ values).transpose(1, 2).flatten(2)))
    assert weights.shape == (2, 2, tokens.shape[1], 9)
    torch.testing.assert_close(mixed, tokens)


@pytest.mark.parametrize("text", TEXT_VARIANTS)
def test_the_pass_ends_where_the_models_does(make_model, text):
    model = make_model(**TEXT_VARIANTS[text]).double()
    images, ids = torch.randn(2, 3, 12, 12).double(), torch.randint(0, 37, (4, 7))
    with torch.inference_mode():
        weights, hidden = cross_attention(model, ids, model.encode_image(images).tokens)
        torch.testing.assert_close(model.lm_head(hidden), model.logits(images, ids))
    assert weights.shape == (2, 4, 4, 7, 5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 4, 7).double())


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("image", [{}, {"patch_norm": True, "class_token": True}], ids=["patches", "class_token"])
def test_word_maps(make_model, tokenizer, pooler, image):
    model = make(make_model, tokenizer, POOLERS[pooler], image)
    pixels = torch.randn(3, 12, 12).double()
    maps = word_maps(model, tokenizer, pixels, "Two children  zigzag in the water")
    assert maps.words == ("two", "children", "zigzag", "in", "the", "water")
    num_features = 9 + len(image) // 2
    assert maps.weights.shape == (2, 4, 6, num_features)
    assert maps.grid == (3, 3)
    torch.testing.assert_close(maps.weights.sum(dim=-1), torch.ones(2, 4, 6).double())
    assert maps.mean().shape == (6, 3, 3)
    sums = maps.mean().sum(dim=(1, 2))
    class_share = maps.weights[..., : num_features - 9].sum(dim=-1).mean(dim=(0, 1))
    torch.testing.assert_close(sums, 1 - class_share)
    batch = tokenizer(["Two children  zigzag in the water"], 40)
    with torch.inference_mode():
        log_probs = model.logits(pixels[None], batch.token_ids).log_softmax(dim=-1)[0]
    gained = log_probs[:-1].gather(1, batch.token_ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(maps.log_probs.sum(), gained[:-1].sum())
    assert int(maps.log_probs.argmin()) == 2, "the word of many tokens is the least likely"


def test_a_words_map_is_that_of_the_position_that_predicts_it(make_model, tokenizer):
    """Words after a word leave its map as it is; the word before it changes it, the word itself does not."""
    model = make(make_model, tokenizer)
    pixels = torch.randn(3, 12, 12).double()

    def maps(text: str) -> torch.Tensor:
        return word_maps(model, tokenizer, pixels, text).weights

    torch.testing.assert_close(maps("a brown dog runs")[:, :, :3], maps("a brown dog")[:, :, :3])
    torch.testing.assert_close(maps("a brown dog")[:, :, 2], maps("a brown man")[:, :, 2])
    assert not torch.allclose(maps("a brown dog")[:, :, 2], maps("a red dog")[:, :, 2])


def test_a_map_follows_the_place_that_is_looked_at(make_model, tokenizer):
    """Keys that answer one image feature alone: all attention of all words lies on its cell."""
    model = make(make_model, tokenizer, {"num_queries": 0})
    with torch.no_grad():
        for layer in model.multimodal_decoder.layers:
            attn = layer.cross_block.attn
            attn.q_proj.weight.zero_()
            attn.q_proj.bias.fill_(1)
            keys = attn.kv_proj.weight[: attn.kv_proj.weight.shape[0] // 2]
            keys.copy_(torch.full_like(keys, 0))
            attn.kv_proj.bias[: len(keys)] = 0
            keys[:, 0] = 500
    features = torch.zeros(1, 9, 24).double()
    features[0, 5, :] = torch.linspace(1, -1, 24).double()
    model.image_encoder.run_stages = lambda *_: features  # pyright: ignore
    with torch.no_grad():
        tokens = model.pool_image(features).tokens
        best = int(tokens[0, :, 0].argmax())
    grid = word_maps(model, tokenizer, torch.randn(3, 12, 12).double(), "a dog").mean()
    assert grid.flatten(1).argmax(dim=1).tolist() == [best, best]
    assert float(grid.flatten(1).amax(dim=1).min()) > 0.99


def test_layers_are_chosen():
    weights = torch.rand(3, 2, 4, 6)
    maps = WordMaps(tuple("abcd"), weights, (2, 3), torch.zeros(4))
    torch.testing.assert_close(maps.mean([-1]), weights[2].mean(dim=0).view(4, 2, 3))
    torch.testing.assert_close(maps.mean([0, 2]), weights[[0, 2]].mean(dim=(0, 1)).view(4, 2, 3))
    torch.testing.assert_close(maps.mean(), maps.mean([0, 1, 2]))
    with pytest.raises(ValueError, match="no layer 3"):
        maps.mean([0, 3])
    with pytest.raises(ValueError, match="no layers"):
        maps.mean([])


def test_a_text_without_words_is_refused(make_model, tokenizer):
    model = make(make_model, tokenizer)
    with pytest.raises(ValueError, match="has no words"):
        word_maps(model, tokenizer, torch.randn(3, 12, 12).double(), "  ")


@given(st.integers(1, 24), st.integers(1, 24), st.integers(4, 40), st.booleans())
def test_grids_are_found(rows, columns, cell, class_token):
    """Square cells give their grid back, with a class token before them or without."""
    size = rows * cell, columns * cell
    assert feature_grid(rows * columns + class_token, size) == (rows, columns)


def test_a_grid_that_was_rounded_is_found_and_none_is_not():
    assert feature_grid(81, (260, 260)) == (9, 9)
    assert feature_grid(9 * 10, (260, 300)) == (9, 10)
    with pytest.raises(ValueError, match="form no grid"):
        feature_grid(23, (224, 224))


@pytest.mark.parametrize("clip", [False, True])
def test_every_token_has_its_word(tokenizer, clip):
    vocabulary = Tokenizer.clip() if clip else tokenizer
    text = "a brown dog, unbelievably quick: zigzagging über grass"
    ids = vocabulary.encode(text)[1:-1]
    words, word_of_token = split_words(vocabulary, ids)
    assert " ".join(words) == " ".join(vocabulary.decode(ids).split())
    assert len(word_of_token) == len(ids) > len(words)
    assert sorted(set(word_of_token)) == list(range(len(words)))
    assert word_of_token == sorted(word_of_token)
    for number, word in enumerate(words):
        own = [token_id for token_id, at in zip(ids, word_of_token, strict=True) if at == number]
        assert vocabulary.decode(own).split() == [word]
