"""Beam search against a slow one without caches, batches or tensors, and against transformers' (marker peers)."""

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from captioner import NUM_IMAGES, forbidden_ids, make_model, make_tokens, next_log_probs, teacher_forced

from opencoca.generation import GenerationOptions, generate
from opencoca.generation.beam_search import BeamSearch
from opencoca.generation.decoding.session import DecodingSession
from opencoca.generation.search import Limits
from opencoca.model.coca import CoCa
from opencoca.tokenizer import Tokenizer

HIDDEN_ID = 242  # a word that the random model writes often

OPTIONS = [
    GenerationOptions(num_beams=2),
    GenerationOptions(num_beams=5, num_captions=5),
    GenerationOptions(num_beams=4, num_captions=2, length_penalty=2.5, early_stopping=True),
    GenerationOptions(num_beams=4, num_captions=4, length_penalty=-1.0),
    GenerationOptions(num_beams=3, length_penalty=0.0, early_stopping="never"),
    GenerationOptions(num_beams=4, num_captions=3, length_penalty=1.5, early_stopping="never", max_new_tokens=8),
    GenerationOptions(num_beams=3, min_new_tokens=5, max_new_tokens=7, num_captions=3),
    GenerationOptions(num_beams=4, num_captions=2, prefix="a brown dog"),
    GenerationOptions(num_beams=3, num_captions=3, repetition_penalty=1.4, no_repeat_ngram=2),
    GenerationOptions(num_beams=6, num_groups=3, diversity_penalty=0.7, num_captions=6),
    GenerationOptions(num_beams=4, num_groups=4, diversity_penalty=1.5, num_captions=4, early_stopping=True),
    GenerationOptions(num_beams=6, num_groups=2, num_captions=6, max_new_tokens=6),
]


class SlowGroup:
    """One group of beams of one image: lists of (score, log-probability, token ids)."""

    def __init__(self, options: GenerationOptions, prompt: list[int]):
        self.size = options.num_beams // options.num_groups
        self.options = options
        self.beams = [(0.0, 0.0, prompt)]
        self.finished: list[tuple[float, float, list[int]]] = []
        self.done = False

    def finish(self, score: float, log_prob: float, ids: list[int], length: int) -> None:
        self.finished.append((score / length**self.options.length_penalty, log_prob, ids))
        self.finished = sorted(self.finished, reverse=True)[: self.size]

    def check(self, best: float, length: int, max_new: int) -> None:
        if len(self.finished) < self.size:
            return
        rule, penalty = self.options.early_stopping, self.options.length_penalty
        if rule == "never" and penalty > 0:
            length = max_new
        self.done |= rule is True or self.finished[-1][0] >= best / length**penalty


def search_slowly(
    model: CoCa, tokens: torch.Tensor, tokenizer: Tokenizer, options: GenerationOptions
) -> list[tuple[float, float, list[int]]]:
    prompt = [tokenizer.bos_id, *tokenizer.encode(options.prefix)[1:-1]]
    max_new = min(options.max_new_tokens, model.config.text.context_length - len(prompt))
    groups = [SlowGroup(options, prompt) for _ in range(options.num_groups)]
    for length in range(1, max_new + 1):
        used: list[int] = []
        for group in groups:
            if group.done:
                continue
            ways = []
            for score, log_prob, ids in group.beams:
                own = next_log_probs(model, ids, tokens).tolist()
                for token_id, gained in enumerate(filtered(own, ids, prompt, model, tokenizer, options)):
                    gained -= options.diversity_penalty * used.count(token_id)
                    ways.append((score + gained, log_prob + own[token_id], [*ids, token_id]))
            best = sorted(ways, key=lambda way: -way[0])[: 2 * group.size]
            for score, log_prob, ids in best[: group.size]:
                if ids[-1] == tokenizer.eos_id:
                    group.finish(score, log_prob, ids, length)
            group.beams = [way for way in best if way[2][-1] != tokenizer.eos_id][: group.size]
            used += [ids[-1] for _, _, ids in group.beams]
            group.check(best[0][0], length, max_new)
        if all(group.done for group in groups):
            break
    for group in groups:
        if not group.done:
            for score, log_prob, ids in group.beams:
                group.finish(score, log_prob, ids, len(ids) - len(prompt))
    return sorted((found for group in groups for found in group.finished), key=lambda found: -found[0])


def filtered(
    log_probs: list[float],
    ids: list[int],
    prompt: list[int],
    model: CoCa,
    tokenizer: Tokenizer,
    options: GenerationOptions,
) -> list[float]:
    values = [value * options.repetition_penalty if i in ids else value for i, value in enumerate(log_probs)]
    for token_id in forbidden_ids(model, tokenizer):
        values[token_id] = -math.inf
    if len(ids) - len(prompt) < options.min_new_tokens:
        values[tokenizer.eos_id] = -math.inf
    n = options.no_repeat_ngram
    if n:
        ngrams = {tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)}
        for token_id in range(len(values)):
            if (*ids[len(ids) - n + 1 :], token_id) in ngrams:
                values[token_id] = -math.inf
    return values


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ids_and_scores_equal_a_slow_search(tokenizer, options):
    model = make_model(tokenizer)
    tokens = make_tokens(model, 4)
    for image, found in enumerate(generate(model, tokens, tokenizer, options)):
        expected = search_slowly(model, tokens[image], tokenizer, options)[: options.num_captions]
        assert [caption.score for caption in found] == pytest.approx([score for score, _, _ in expected], abs=1e-5)
        assert sorted(caption.token_ids for caption in found) == sorted(tuple(ids) for _, _, ids in expected)
        by_ids = {tuple(ids): log_prob for _, log_prob, ids in expected}
        for caption in found:
            assert caption.log_probability == pytest.approx(by_ids[caption.token_ids], abs=1e-4)
            assert caption.log_probability == pytest.approx(teacher_forced(model, tokens[image], caption), abs=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        {"positions": "rotary", "num_kv_heads": 2},
        {"block": "parallel", "num_kv_heads": 1},
        {"self_attn_mlp": True, "head_dim": 6},
        {"hidden_id": HIDDEN_ID},
        {"hidden_id": HIDDEN_ID, "hide_next": True},
    ],
    ids=str,
)
def test_every_kind_of_decoder_shares_cache_rows_rightly(tokenizer, text):
    model = make_model(tokenizer, text)
    tokens = make_tokens(model, 3)
    options = GenerationOptions(num_beams=4, num_captions=2, prefix="a dog", length_penalty=0.5)
    for image, found in enumerate(generate(model, tokens, tokenizer, options)):
        expected = search_slowly(model, tokens[image], tokenizer, options)[:2]
        assert [caption.token_ids for caption in found] == [tuple(ids) for _, _, ids in expected]


def test_the_hidden_word_is_written(tokenizer):
    """Without this the test above would not see what a hidden word changes."""
    options = GenerationOptions(num_beams=4, num_captions=2, prefix="a dog", length_penalty=0.5)
    found = []
    for text in ({}, {"hidden_id": HIDDEN_ID}):
        model = make_model(tokenizer, text)
        found.append([[c.token_ids for c in one] for one in generate(model, make_tokens(model, 3), tokenizer, options)])
    assert any(HIDDEN_ID in ids[:-1] for captions in found[1] for ids in captions)
    assert found[0] != found[1]


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[7], OPTIONS[9]], ids=str)
def test_captions_do_not_depend_on_their_batch(tokenizer, options):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    together = generate(model, tokens, tokenizer, options)
    generator = torch.Generator().manual_seed(3)
    for size in (1, 3, NUM_IMAGES):
        chosen = torch.randperm(NUM_IMAGES, generator=generator)[:size]
        for image, found in zip(chosen.tolist(), generate(model, tokens[chosen], tokenizer, options), strict=True):
            assert [caption.token_ids for caption in found] == [caption.token_ids for caption in together[image]]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_when_images_are_dropped_changes_nothing(tokenizer, monkeypatch, share):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    options = GenerationOptions(num_beams=3, num_captions=3, early_stopping=True)
    usual = generate(model, tokens, tokenizer, options, with_text_embed=True)
    monkeypatch.setattr("opencoca.generation.loop._DROP_FROM_SHARE", share)
    again = generate(model, tokens, tokenizer, options, with_text_embed=True)
    for before, after in zip(usual, again, strict=True):
        assert [caption.token_ids for caption in before] == [caption.token_ids for caption in after]
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one.text_embed, other.text_embed)


@pytest.mark.parametrize("changes", [{}, {"min_new_tokens": 4}, {"repetition_penalty": 1.7}, {"no_repeat_ngram": 1}])
def test_one_beam_equals_greedy(tokenizer, monkeypatch, changes):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    # A beam goes on beyond an end that is not its best: stopping at the first is what makes it greedy.
    options = GenerationOptions(early_stopping=True, **changes)
    greedy = generate(model, tokens, tokenizer, options)

    def one_beam(options, limits, prompt, image_seeds):
        return BeamSearch(options, limits, prompt, limits.max_length)

    monkeypatch.setattr("opencoca.generation.loop.SingleTexts", one_beam)
    for (text,), (beam,) in zip(greedy, generate(model, tokens, tokenizer, options), strict=True):
        assert beam.token_ids == text.token_ids
        assert beam.log_probability == pytest.approx(text.log_probability, abs=1e-5)


def test_groups_without_penalty_find_the_same_and_with_one_differ(tokenizer):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    options = GenerationOptions(num_beams=4, num_groups=2, num_captions=4)
    alike = [{caption.token_ids for caption in found} for found in generate(model, tokens, tokenizer, options)]
    varied = replace(options, diversity_penalty=2.0)
    different = [{caption.token_ids for caption in found} for found in generate(model, tokens, tokenizer, varied)]
    assert all(len(texts) == 2 for texts in alike)
    assert all(len(texts) >= 3 for texts in different)


@pytest.mark.parametrize(("penalty", "texts_an_image"), [(0.0, 2), (0.5, 6)])
def test_groups_that_find_the_same_are_searched_once(tokenizer, monkeypatch, penalty, texts_an_image):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    rows = set()
    step = DecodingSession.step
    monkeypatch.setattr(DecodingSession, "step", lambda *args: rows.add(len(args[1])) or step(*args))
    options = GenerationOptions(num_beams=6, num_groups=3, num_captions=6, diversity_penalty=penalty, min_new_tokens=4)
    found = generate(model, tokens, tokenizer, options)
    assert max(rows) == texts_an_image * len(tokens)
    assert all(len(texts) == 6 for texts in found)
    if not penalty:
        one_group = generate(model, tokens, tokenizer, GenerationOptions(num_beams=2, num_captions=2, min_new_tokens=4))
        for texts, (best, second) in zip(found, one_group, strict=True):
            assert texts == (best,) * 3 + (second,) * 3


def test_more_candidates_than_words_are_no_candidates():
    """Beams at -inf, as filters may leave them, are no result."""
    search = BeamSearch(GenerationOptions(num_beams=2), Limits(1, 3, 0), torch.tensor([[5]]), 5)
    allowed = torch.full((1, 6), -torch.inf)
    allowed[0, 3] = -1.0
    visible = torch.ones(1, 5, dtype=torch.bool)
    search.extend(allowed, allowed, visible)
    search.extend(allowed.expand(2, -1), allowed.expand(2, -1), visible.expand(2, -1))
    (found,) = search.results(torch.tensor([0]))
    assert [candidate.token_ids for candidate in found] == [[5, 3, 3]]
    assert found[0].score == pytest.approx(-1.0)


def peer_captions(
    model: CoCa, tokens: torch.Tensor, tokenizer: Tokenizer, options: GenerationOptions
) -> list[list[tuple[list[int], float]]]:
    """What transformers finds with our network: token ids and score of each caption of each image."""
    transformers, outputs = import_module("transformers"), import_module("transformers.modeling_outputs")

    class Peer(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = transformers.PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self):
            super().__init__(transformers.PretrainedConfig(vocab_size=model.config.text.vocab_size))
            self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def prepare_inputs_for_generation(self, input_ids, **_):
            return {"input_ids": input_ids}

        def forward(self, input_ids, **_):
            words = model.unimodal_decoder(input_ids, with_cls=False).words
            return outputs.CausalLMOutput(logits=model.lm_head(model.decode(words, tokens)).float())

    prompt = tokenizer.encode(options.prefix)[:-1]
    max_length = min(len(prompt) + options.max_new_tokens, model.config.text.context_length)
    grouped = {"num_beam_groups": options.num_groups, "diversity_penalty": options.diversity_penalty}
    found = Peer().generate(
        torch.tensor(prompt).repeat(len(tokens), 1),
        max_length=max_length,
        min_new_tokens=options.min_new_tokens or None,
        num_beams=options.num_beams,
        num_return_sequences=options.num_captions,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram,
        suppress_tokens=sorted(forbidden_ids(model, tokenizer)),
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        do_sample=False,
        use_cache=False,
        output_scores=True,
        return_dict_in_generate=True,
        **(grouped if options.num_groups > 1 else {}),
    )
    captions = []
    for ids in found.sequences.tolist():
        ends = tokenizer.eos_id in ids
        captions.append(ids[: ids.index(tokenizer.eos_id) + 1] if ends else ids)
    pairs = list(zip(captions, found.sequences_scores.tolist(), strict=True))
    return [pairs[start : start + options.num_captions] for start in range(0, len(pairs), options.num_captions)]


@pytest.mark.peers
@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
def test_ids_and_scores_equal_those_of_transformers(tokenizer, options):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    with torch.inference_mode():
        expected = peer_captions(model, tokens, tokenizer, options)
    for found, theirs in zip(generate(model, tokens, tokenizer, options), expected, strict=True):
        assert [caption.score for caption in found] == pytest.approx([score for _, score in theirs], rel=1e-6, abs=1e-6)
        assert sorted(caption.token_ids for caption in found) == sorted(tuple(ids) for ids, _ in theirs)
