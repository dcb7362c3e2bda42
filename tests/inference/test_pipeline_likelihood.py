"""What the pipeline does with likelihoods and attention: scores, labels and explanations equal the model's parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli_helpers import COLOURS, draw, save_tiny_model
from opencoca.inference.loading import load
from opencoca.inference.pipeline import Pipeline

LABELS = ["red", "deep blue", "{green}"]
TEMPLATES = ["a {} picture", "everything here is {}"]
TEXTS = ["a red picture", "everything here is blue", "a", "a picture of nothing that is longer than the context allows"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return load(save_tiny_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [draw(colour, seed) for seed, colour in enumerate(COLOURS.values())]


def definition(pipeline: Pipeline, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """(I, B) by the logits of all words."""
    rows = []
    for text in texts:
        batch = pipeline.tokenizer([text], pipeline.model.config.text.context_length)
        with torch.inference_mode():
            log_probs = pipeline.model.logits(pixels, batch.token_ids.expand(len(pixels), -1)).log_softmax(dim=-1)
        next_ids = batch.token_ids[:, 1:, None].expand(len(pixels), -1, -1)
        rows.append(log_probs[:, :-1].gather(2, next_ids).squeeze(2).sum(dim=1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_of_captions(pipeline: Pipeline, photographs: list[Image.Image], batch_size: int) -> None:
    found = pipeline.score_captions(photographs, TEXTS, batch_size=batch_size)
    assert (found.shape, found.dtype, found.is_inference()) == ((4, 4), torch.float32, False)
    torch.testing.assert_close(
        found, definition(pipeline, pipeline.preprocess(photographs), TEXTS), rtol=1e-5, atol=1e-4
    )


def test_the_blank_images_own_score_is_subtracted(pipeline: Pipeline, photographs: list[Image.Image]) -> None:
    plain = pipeline.score_captions(photographs, TEXTS)
    blank = definition(pipeline, torch.zeros(1, 3, 16, 16), TEXTS)
    for weight in (0.5, 1.0):
        found = pipeline.score_captions(photographs, TEXTS, prior_weight=weight)
        torch.testing.assert_close(found, plain - weight * blank, rtol=1e-4, atol=1e-4)


def test_one_text_and_no_images(pipeline: Pipeline, photographs: list[Image.Image]) -> None:
    assert pipeline.score_captions(photographs[0], TEXTS[0]).shape == (1, 1)
    assert pipeline.score_captions([], TEXTS).shape == (0, 4)
    assert pipeline.score_captions(photographs, []).shape == (4, 0)
    assert pipeline.classify([], LABELS, by="likelihood") == []


@pytest.mark.parametrize("by", ["likelihood", "both"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_labels_by_likelihood(pipeline: Pipeline, photographs: list[Image.Image], by: str, batch_size: int) -> None:
    texts = [template.replace("{}", label) for label in LABELS for template in TEMPLATES]
    pixels = pipeline.preprocess(photographs)
    information = definition(pipeline, pixels, texts) - definition(pipeline, torch.zeros(1, 3, 16, 16), texts)
    logits = information.view(4, 3, 2).mean(dim=2)
    if by == "both":
        cosines = pipeline.embed_images(photographs) @ pipeline.embed_labels(LABELS, TEMPLATES).T
        logits = logits + pipeline.model.logit_scale.item() * cosines
    found = pipeline.classify(photographs, LABELS, TEMPLATES, by=by, batch_size=batch_size)  # pyright: ignore
    for row, probabilities in zip(found, logits.softmax(dim=1), strict=True):
        assert {score.label: score.probability for score in row} == pytest.approx(
            dict(zip(LABELS, probabilities.tolist(), strict=True)), abs=1e-4
        )
        assert [score.probability for score in row] == sorted((score.probability for score in row), reverse=True)


def test_an_unknown_rule_is_named(pipeline: Pipeline, photographs: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="cannot classify by 'taste'; choose similarity, likelihood, both"):
        pipeline.classify(photographs, LABELS, by="taste")  # pyright: ignore
    with pytest.raises(ValueError, match="more than once"):
        pipeline.classify(photographs, ["a", "a"], by="likelihood")


def test_an_explanation_is_of_the_caption_and_the_photograph(
    pipeline: Pipeline, photographs: list[Image.Image], tmp_path: Path
) -> None:
    own = pipeline.explain(photographs[0])
    assert own.caption == pipeline.caption(photographs[0])[0]
    assert own.photograph.size == photographs[0].size
    given = pipeline.explain(photographs[0], "everything here is red")
    assert given.maps.words == ("everything", "here", "is", "red")
    assert given.maps.weights.shape == (1, 2, 4, 4)
    assert given.overlays().shape == (4, *reversed(photographs[0].size))
    likelihood = float(pipeline.score_captions(photographs[0], "everything here is red"))
    assert likelihood < float(given.maps.log_probs.sum()) < 0, "all but the end token"
    photographs[0].save(tmp_path / "photo.png")
    from_file = pipeline.explain(tmp_path / "photo.png", "everything here is red")
    torch.testing.assert_close(from_file.maps.weights, given.maps.weights)
    other = pipeline.explain(np.asarray(photographs[1]), "everything here is red")
    assert not torch.allclose(other.maps.weights, given.maps.weights)
    with pytest.raises(ValueError, match="has no words"):
        pipeline.explain(photographs[0], " ")
