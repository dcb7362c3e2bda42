"""Cached, compacted generation against the plain definition: the whole text through the whole model for each token."""

import itertools

import pytest
import torch

from opencoca.generation import GeneratedCaption, GenerationOptions, generate
from opencoca.generation.loop import _Work
from opencoca.generation.search import Extension
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = [
    "a brown dog runs over the grass",
    "two children play in the water",
    "a man in a red shirt climbs a rock",
    "the black dog jumps over the grass",
]
NUM_IMAGES = 12
CONTEXT_LENGTH = 14

TEXT_VARIANTS = {
    "learned": {},
    "rotary": {"positions": "rotary"},
    "parallel": {"block": "parallel", "activation": "swiglu", "norm_bias": False},
    "one_kv_head": {"num_kv_heads": 1},
    "tied_rotary_grouped": {"positions": "rotary", "num_kv_heads": 2, "tie_embeddings": True},
    "two_mlps": {"self_attn_mlp": True, "head_dim": 6},
}
POOLER_VARIANTS = {
    "cascade": {"num_queries": 5},
    "no_queries": {"num_queries": 0},
    "shared": {"arrangement": "shared", "num_queries": 4},
    "parallel_poolers": {"arrangement": "parallel", "num_queries": 3},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS * 3, 290)


def make_model(tokenizer: Tokenizer, text: dict | None = None, pooler: dict | None = None) -> CoCa:
    """A random float64 model whose captions differ from image to image and end at different lengths."""
    torch.manual_seed(0)
    text_config = {
        "vocab_size": tokenizer.vocab_size + 7,
        "context_length": CONTEXT_LENGTH,
        "width": 32,
        "unimodal_depth": 1,
        "multimodal_depth": 2,
        "num_heads": 4,
        "mlp_width": 48,
        **(text or {}),
    }
    config = CoCaConfig(
        embed_dim=24,
        image=ImageEncoderConfig(image_size=(16, 16), patch_size=8, width=24, depth=1, num_heads=2, mlp_width=32),
        pooler=PoolerConfig(num_heads=4, **(pooler or {"num_queries": 5})),
        text=TextConfig(**text_config),
    )
    model = CoCa(config).double().eval()
    with torch.no_grad():
        for layer in model.multimodal_decoder.layers:
            # Images and words must matter, and the end token must win now and then.
            layer.cross_block.attn.out_proj.weight.mul_(4)  # pyright: ignore
            layer.self_block.attn.out_proj.weight.mul_(4)  # pyright: ignore
        for parameter in (model.unimodal_decoder.token_embed.weight, model.lm_head.weight):
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
        model.lm_head.weight[tokenizer.eos_id] *= 4
    return model


def make_tokens(model: CoCa, num_images: int = NUM_IMAGES) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model.encode_image(torch.randn(num_images, 3, 16, 16, dtype=torch.float64)).tokens


def generate_slowly(
    model: CoCa, image_tokens: torch.Tensor, tokenizer: Tokenizer, options: GenerationOptions
) -> list[tuple[int, ...]]:
    """Token ids of each image's caption, without a cache, without a batch."""
    captions = []
    prompt = [tokenizer.bos_id, *tokenizer.encode(options.prefix)[1:-1]]
    for tokens in image_tokens:
        ids = list(prompt)
        while ids[-1] != tokenizer.eos_id and len(ids) < CONTEXT_LENGTH:
            num_new = len(ids) - len(prompt)
            if num_new == options.max_new_tokens:
                break
            with torch.inference_mode():
                words = model.unimodal_decoder(torch.tensor([ids]), with_cls=False).words
                logits = model.lm_head(model.decode(words, tokens[None]))[0, -1]
            order = logits.argsort(descending=True).tolist()
            forbidden = {tokenizer.bos_id, tokenizer.pad_id, *range(tokenizer.vocab_size, len(order))}
            if num_new < options.min_new_tokens:
                forbidden.add(tokenizer.eos_id)
            ids.append(next(token_id for token_id in order if token_id not in forbidden))
        captions.append(tuple(ids))
    return captions


def teacher_forced(model: CoCa, tokens: torch.Tensor, caption: GeneratedCaption) -> float:
    ids = torch.tensor([caption.token_ids])
    with torch.inference_mode():
        words = model.unimodal_decoder(ids[:, :-1], with_cls=False).words
        log_probs = model.lm_head(model.decode(words, tokens[None])).log_softmax(dim=-1)
    gained = log_probs[0].gather(1, ids[0, 1:, None]).squeeze(1)
    return float(gained[-caption.length :].sum())


@pytest.mark.parametrize(("text", "pooler"), list(itertools.product(TEXT_VARIANTS, POOLER_VARIANTS)))
def test_ids_equal_uncached_decoding(tokenizer, text, pooler):
    model = make_model(tokenizer, TEXT_VARIANTS[text], POOLER_VARIANTS[pooler])
    tokens = make_tokens(model)
    options = GenerationOptions()
    captions = generate(model, tokens, tokenizer, options)
    assert [caption.token_ids for caption in captions] == generate_slowly(model, tokens, tokenizer, options)
    for caption, image_tokens in zip(captions, tokens, strict=True):
        assert caption.log_probability == pytest.approx(teacher_forced(model, image_tokens, caption), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(max_new_tokens=1),
        GenerationOptions(max_new_tokens=4),
        GenerationOptions(max_new_tokens=9, min_new_tokens=6),
        GenerationOptions(max_new_tokens=9, min_new_tokens=9),
        GenerationOptions(prefix="a brown dog"),
        GenerationOptions(max_new_tokens=5, min_new_tokens=2, prefix="two"),
    ],
    ids=str,
)
def test_options_equal_uncached_decoding(tokenizer, options):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    captions = generate(model, tokens, tokenizer, options)
    assert [caption.token_ids for caption in captions] == generate_slowly(model, tokens, tokenizer, options)
    for caption, image_tokens in zip(captions, tokens, strict=True):
        num_words = caption.length - (caption.token_ids[-1] == tokenizer.eos_id)
        assert options.min_new_tokens <= num_words <= options.max_new_tokens
        assert caption.text.startswith(options.prefix)
        assert caption.log_probability == pytest.approx(teacher_forced(model, image_tokens, caption), abs=1e-4)


def test_the_test_model_ends_captions_at_different_lengths(tokenizer):
    """Without this the tests here would not see texts leave the batch."""
    model = make_model(tokenizer)
    captions = generate(model, make_tokens(model), tokenizer)
    assert len({caption.length for caption in captions}) >= 4
    assert len({caption.token_ids for caption in captions}) >= 8
    assert any(caption.token_ids[-1] != tokenizer.eos_id for caption in captions)


def test_a_caption_does_not_depend_on_its_batch(tokenizer):
    model = make_model(tokenizer, {"positions": "rotary"})
    tokens = make_tokens(model)
    together = generate(model, tokens, tokenizer)
    generator = torch.Generator().manual_seed(2)
    for size in (1, 2, 5, NUM_IMAGES):
        chosen = torch.randperm(NUM_IMAGES, generator=generator)[:size]
        for index, caption in zip(chosen.tolist(), generate(model, tokens[chosen], tokenizer), strict=True):
            assert caption.token_ids == together[index].token_ids
            assert caption.text == together[index].text
            assert caption.log_probability == pytest.approx(together[index].log_probability, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_when_texts_are_dropped_changes_nothing(tokenizer, monkeypatch, share):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    usual = generate(model, tokens, tokenizer)
    monkeypatch.setattr("opencoca.generation.loop._DROP_FROM_SHARE", share)
    assert [caption.token_ids for caption in generate(model, tokens, tokenizer)] == [c.token_ids for c in usual]


def test_finished_texts_are_not_computed_on(tokenizer, monkeypatch):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    monkeypatch.setattr("opencoca.generation.loop._DROP_FROM_SHARE", 0.0)
    rows = []
    step = model.decode_step
    monkeypatch.setattr(model, "decode_step", lambda ids, state: rows.append(ids.shape[0]) or step(ids, state))
    captions = generate(model, tokens, tokenizer)
    assert sum(rows) == sum(caption.length for caption in captions)


def test_captions_fit_the_context_and_decode(tokenizer):
    model = make_model(tokenizer)
    for caption in generate(model, make_tokens(model), tokenizer, GenerationOptions(max_new_tokens=1000)):
        assert len(caption.token_ids) <= CONTEXT_LENGTH
        assert caption.token_ids[0] == tokenizer.bos_id
        assert tokenizer.pad_id not in caption.token_ids
        assert caption.token_ids.count(tokenizer.bos_id) == 1
        assert tokenizer.eos_id not in caption.token_ids[:-1]
        assert caption.text == tokenizer.decode(caption.token_ids)


def test_searches_may_keep_several_texts_per_image(tokenizer, monkeypatch):
    """The loop under a search with two texts per image that begin differently and change places at every step."""

    class TwoStarts:
        texts_per_image = 2

        def __init__(self):
            self.num_steps = 0

        def extend(self, log_probs, totals, ended):
            self.num_steps += 1
            rows = torch.arange(log_probs.shape[0])
            best = log_probs.topk(2).indices
            takes_second = (rows % 2 == 1) & (self.num_steps == 1)
            token_ids = torch.where(takes_second, best[:, 1], best[:, 0])
            parents = rows ^ 1
            return Extension(parents, token_ids[parents])

    model = make_model(tokenizer)
    tokens = make_tokens(model)
    greedy = generate(model, tokens, tokenizer)
    found = []
    drop = _Work._drop_finished

    def collect(work, *args, **kwargs):
        texts = drop(work, *args, **kwargs)
        found.extend(texts.items())
        return texts

    monkeypatch.setattr(_Work, "_drop_finished", collect)
    monkeypatch.setattr("opencoca.generation.loop.Greedy", TwoStarts)
    generate(model, tokens, tokenizer)
    assert sorted(image for image, _ in found) == list(range(NUM_IMAGES))
    for image, texts in found:
        assert greedy[image].token_ids in [tuple(text.token_ids) for text in texts]
        for text in texts:
            caption = GeneratedCaption("", tuple(text.token_ids), text.log_probability, len(text.token_ids) - 1)
            assert text.log_probability == pytest.approx(teacher_forced(model, tokens[image], caption), abs=1e-4)
        assert texts[0].token_ids[1] != texts[1].token_ids[1]


def test_no_images_give_no_captions(tokenizer):
    model = make_model(tokenizer)
    assert generate(model, make_tokens(model)[:0], tokenizer) == []


def test_training_mode_is_refused(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="training mode"):
        generate(model.train(), make_tokens(model), tokenizer)


def test_a_prefix_without_room_is_refused(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="prefix"):
        generate(model, make_tokens(model), tokenizer, GenerationOptions(prefix="qzx" * 10))


@pytest.mark.parametrize("counts", [(0, 0), (5, 6), (5, -1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="new_tokens"):
        GenerationOptions(*counts)
