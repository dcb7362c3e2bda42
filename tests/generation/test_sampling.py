"""Sampling: what may be drawn against a float64 reference, how often it is drawn, and what a seed fixes."""

import math

import pytest
import torch
from captioner import NUM_IMAGES, make_model, make_tokens, teacher_forced
from hypothesis import given
from hypothesis import strategies as st

from opencoca.generation import GenerationOptions, generate, seed_of_name, seeds_of_images
from opencoca.generation.sampling import Draws, draw, drawable_tokens, text_seeds, uniform_numbers

VOCAB = 40


def reference(log_probs: list[float], options: GenerationOptions) -> dict[int, float]:
    """The probability of each token that may be drawn, by the definitions."""
    temperature = 1.0 if options.temperature is None else options.temperature
    weights = {i: math.exp(x / temperature) for i, x in enumerate(log_probs) if x > -math.inf}
    if options.top_k:
        weights = dict(sorted(weights.items(), key=lambda item: -item[1])[: options.top_k])
    if options.top_p < 1:
        kept, reached, total = {}, 0.0, sum(weights.values())
        for token_id, weight in sorted(weights.items(), key=lambda item: -item[1]):
            if reached >= options.top_p:
                break
            kept[token_id] = weight
            reached += weight / total
        weights = kept
    least = options.min_p * max(weights.values())
    weights = {i: weight for i, weight in weights.items() if weight >= least}
    return {i: weight / sum(weights.values()) for i, weight in weights.items()}


@given(
    seed=st.integers(0, 10_000),
    temperature=st.none() | st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB, 2 * VOCAB]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    num_forbidden=st.integers(0, VOCAB - 1),
)
def test_what_may_be_drawn_equals_the_definitions(seed, temperature, top_k, top_p, min_p, num_forbidden):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(3, VOCAB, dtype=torch.float64, generator=generator)).log_softmax(dim=1)
    forbidden = torch.randperm(VOCAB, generator=generator)[:num_forbidden]
    log_probs[:, forbidden] = -torch.inf
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    draws = drawable_tokens(log_probs, options)
    for row in range(3):
        found = {
            token_id: probability
            for token_id, probability in zip(
                draws.token_ids[row].tolist(), draws.log_probs[row].exp().tolist(), strict=True
            )
            if probability > 0
        }
        assert found == pytest.approx(reference(log_probs[row].tolist(), options), abs=1e-9)
        assert (draws.token_ids[row].diff() > 0).all()


def test_a_large_nucleus_of_a_large_vocabulary():
    """More tokens than are looked at first."""
    torch.manual_seed(1)
    log_probs = torch.randn(2, 20_000, dtype=torch.float64).log_softmax(dim=1)
    options = GenerationOptions(top_p=0.7)
    draws = drawable_tokens(log_probs, options)
    for row in range(2):
        kept = draws.token_ids[row][draws.log_probs[row] > -torch.inf]
        assert set(kept.tolist()) == set(reference(log_probs[row].tolist(), options))


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3])
    num_draws = 20_000
    draws = Draws(probabilities.log().expand(num_draws, -1), torch.arange(5).expand(num_draws, -1))
    uniforms = uniform_numbers(5, torch.arange(num_draws), 3)[:, 1]
    counts = torch.bincount(draw(draws, uniforms), minlength=5) / num_draws
    torch.testing.assert_close(counts, probabilities, atol=0.015, rtol=0)
    assert counts[0] == counts[3] == 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_may_be(uniform):
    log_probs = torch.tensor([[-torch.inf, math.log(0.5), math.log(0.5), -torch.inf]])
    drawn = draw(Draws(log_probs, torch.tensor([[3, 4, 6, 9]])), torch.tensor([uniform], dtype=torch.float64))
    assert drawn.item() == (4 if uniform == 0 else 6)


def test_uniform_numbers_are_uniform_and_depend_on_seed_text_and_position():
    texts = text_seeds(torch.arange(2000), 2)
    assert len(set(texts.tolist())) == 4000
    numbers = uniform_numbers(0, texts, 10)
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1) / numbers.numel()
    torch.testing.assert_close(counts, torch.full((20,), 0.05, dtype=counts.dtype), atol=0.004, rtol=0)
    for other in (numbers.roll(1, 0), numbers.roll(1, 1), uniform_numbers(1, texts, 10)):
        correlation = torch.corrcoef(torch.stack((numbers.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 0.02
    torch.testing.assert_close(uniform_numbers(0, texts[7:9], 4), numbers[7:9, :4], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(temperature=1.3, num_captions=3, seed=4),
        GenerationOptions(top_k=5, prefix="a dog"),
        GenerationOptions(top_p=0.8, temperature=1.5, num_captions=2),
        GenerationOptions(min_p=0.02, temperature=2.0, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_a_seed_gives_an_image_the_same_captions_in_every_batch(tokenizer, options):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    seeds = [seed_of_name(f"photo{i}.jpg") for i in range(NUM_IMAGES)]
    together = generate(model, tokens, tokenizer, options, image_seeds=seeds)
    for chosen in ([3], [9, 0], list(range(NUM_IMAGES))[::-1]):
        found = generate(model, tokens[chosen], tokenizer, options, image_seeds=[seeds[i] for i in chosen])
        for image, captions in zip(chosen, found, strict=True):
            assert [c.token_ids for c in captions] == [c.token_ids for c in together[image]]
    for captions, image_tokens in zip(together, tokens, strict=True):
        assert [c.score for c in captions] == sorted((c.score for c in captions), reverse=True)
        for caption in captions:
            assert caption.log_probability == pytest.approx(teacher_forced(model, image_tokens, caption), abs=1e-4)


def test_other_seeds_give_other_captions(tokenizer):
    model = make_model(tokenizer)
    tokens = make_tokens(model)[:1].expand(6, -1, -1)

    def write(seed: int, image_seeds: list[int]) -> list[tuple[int, ...]]:
        options = GenerationOptions(temperature=2.0, seed=seed)
        return [c.token_ids for (c,) in generate(model, tokens, tokenizer, options, image_seeds=image_seeds)]

    assert len(set(write(0, [5] * 6))) == 1
    assert len(set(write(0, list(range(6))))) >= 5
    assert write(0, [5] * 6) != write(1, [5] * 6)
    several = GenerationOptions(temperature=2.0, num_captions=4)
    (captions,) = generate(model, tokens[:1], tokenizer, several)
    assert len({caption.token_ids for caption in captions}) >= 3


def test_one_token_to_choose_from_is_greedy(tokenizer):
    model = make_model(tokenizer)
    tokens = make_tokens(model)
    greedy = generate(model, tokens, tokenizer)
    for options in (GenerationOptions(top_k=1), GenerationOptions(min_p=1.0), GenerationOptions(temperature=0)):
        found = generate(model, tokens, tokenizer, options)
        assert [c.token_ids for (c,) in found] == [c.token_ids for (c,) in greedy]


def test_image_seeds_are_counted(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="2 image_seeds for 12 images"):
        generate(model, make_tokens(model), tokenizer, image_seeds=[1, 2])


def test_seeds_of_images_are_made_of_the_pixels():
    pixels = torch.rand(3, 3, 4, 5)
    seeds = seeds_of_images(pixels)
    assert len(set(seeds)) == 3
    assert seeds_of_images(pixels[[2, 0]].clone()) == [seeds[2], seeds[0]]
    pixels[1, 2, 3, 4] += 0.5
    assert [a == b for a, b in zip(seeds_of_images(pixels), seeds, strict=True)] == [True, False, True]
