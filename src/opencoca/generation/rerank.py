"""Reranking: candidates of one image ordered by what both halves of the model say of them.

The captioner gives a candidate's log-probability, the contrastive half the similarity of its text embedding and the
image's; the text embedding comes from the unimodal states that decoding has computed anyway.

Letters: I images, K candidates of an image, E embed_dim.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opencoca.generation.decoding.session import DecodingSession
from opencoca.generation.loop import generate
from opencoca.generation.options import GeneratedCaption, GenerationOptions
from opencoca.model.coca import CoCa, ImageOutput
from opencoca.tokenizer import Tokenizer

# Chosen for the shipped model on one half of Flickr8k's validation images: results/captioning.md.
DEFAULT_RERANK_WEIGHT = 0.04

MIN_SAMPLES = 8


def rerank_weight(rerank: bool | float) -> float | None:
    """The weight that ``rerank=`` means: None for False, the default one for True, else the number itself.

    Raises ValueError for a number outside of 0 to 1.
    """
    if isinstance(rerank, bool):
        return DEFAULT_RERANK_WEIGHT if rerank else None
    if not 0 <= rerank <= 1:
        raise ValueError(
            f"rerank is {rerank}; choose 0 (by log-probability alone) to 1 (by similarity alone), or True for "
            f"{DEFAULT_RERANK_WEIGHT}"
        )
    return float(rerank)


def candidate_options(options: GenerationOptions) -> GenerationOptions:
    """The same search or sampling with all that can be reranked: every beam; or the samples, at least MIN_SAMPLES.

    Raises ValueError if there is but one candidate.
    """
    if options.samples:
        return replace(options, num_captions=max(options.num_captions, MIN_SAMPLES))
    if options.num_beams == 1:
        raise ValueError(
            "greedy search finds one caption, which leaves nothing to rerank; set num_beams to 2 or more, or sample "
            "with temperature, top_k, top_p or min_p"
        )
    return replace(options, num_captions=options.num_beams)


def check_rerank(options: GenerationOptions, rerank: bool | float) -> None:
    """Raises ValueError if the weight is outside of 0 to 1, or if these options leave nothing to rerank."""
    if rerank_weight(rerank) is not None:
        candidate_options(options)


def generate_reranked(
    model: CoCa,
    images: ImageOutput,
    tokenizer: Tokenizer,
    options: GenerationOptions,
    weight: float,
    *,
    image_seeds: Sequence[int] | None = None,
    session: DecodingSession | None = None,
) -> list[tuple[GeneratedCaption, ...]]:
    """`generate` for images as `CoCa.encode_image` gives them, all candidates reranked, the best num_captions kept.

    Raises ValueError as `generate` and `candidate_options` do.
    """
    wide = candidate_options(options)
    found = generate(
        model, images.tokens, tokenizer, wide, image_seeds=image_seeds, with_text_embed=True, session=session
    )
    scale = model.logit_scale.item()
    return [
        rerank(candidates, embed, scale, weight)[: options.num_captions]
        for candidates, embed in zip(found, images.embed, strict=True)
    ]


def mixed_scores(
    log_probabilities: Tensor, lengths: Tensor, similarities: Tensor, logit_scale: float, weight: float
) -> Tensor:
    """(1 - weight) x mean log-probability of a token + weight x logit_scale x similarity, all (K,) -> (K,).

    Both parts are in nats: logit_scale x similarity is what the contrastive loss takes the softmax of.
    """
    return (1 - weight) * log_probabilities / lengths + weight * logit_scale * similarities


def rerank(
    candidates: Sequence[GeneratedCaption], image_embed: Tensor, logit_scale: float, weight: float
) -> tuple[GeneratedCaption, ...]:
    """The candidates of one image, best first, with their similarity and with the mixed score as their score.

    image_embed (E,), of length 1. Where scores are equal, the order given stays.

    Raises ValueError if a candidate was generated without its text embedding.
    """
    candidates = with_similarities(candidates, image_embed)
    scores = mixed_scores(
        torch.tensor([caption.log_probability for caption in candidates], dtype=torch.float64),
        torch.tensor([caption.length for caption in candidates], dtype=torch.float64),
        torch.tensor([caption.similarity for caption in candidates], dtype=torch.float64),
        logit_scale,
        weight,
    )
    scored = [replace(caption, score=score) for caption, score in zip(candidates, scores.tolist(), strict=True)]
    return tuple(sorted(scored, key=lambda caption: -caption.score))


def with_similarities(captions: Sequence[GeneratedCaption], image_embed: Tensor) -> list[GeneratedCaption]:
    """The captions of one image, in the order given, with their similarity to it; image_embed (E,), of length 1.

    Raises ValueError if a caption was generated without its text embedding.
    """
    if not captions:
        return []
    embeds = [caption.text_embed for caption in captions if caption.text_embed is not None]
    if len(embeds) < len(captions):
        raise ValueError("a caption has no text_embed; generate with text embeddings to compare it with its image")
    similarities = torch.stack(embeds).double().cpu() @ image_embed.double().cpu()
    return [replace(caption, similarity=value) for caption, value in zip(captions, similarities.tolist(), strict=True)]
