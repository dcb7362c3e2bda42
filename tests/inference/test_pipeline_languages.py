"""A model of several languages writes and reads the one that is asked for, its first by default."""

from pathlib import Path

import pytest
import torch

from cli_helpers import save_tiny_model, write_colours
from opencoca.generation import GenerationOptions, generate
from opencoca.inference.loading import load
from opencoca.inference.pipeline import Pipeline
from opencoca.store.model_card import model_card
from opencoca.store.model_folder import LoadedModel
from opencoca.tokenizer import LanguageText

LANGUAGES = ("en", "zh", "de")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return load(save_tiny_model(tmp_path_factory.mktemp("model"), languages=LANGUAGES))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(write_colours(tmp_path_factory.mktemp("images")).glob("*.png"))


def ids_of(pipeline: Pipeline, language: str, prefix: str = "") -> list[int]:
    """The prompt, put together by hand."""
    place = LANGUAGES.index(language)
    return [pipeline.tokenizer.bos_id, 3 + place, *pipeline.tokenizer.in_language(None).encode(prefix)[1:-1]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefix": "a red"}, {"temperature": 1.0}])
def test_captions_begin_with_the_language(pipeline: Pipeline, photos: list[Path], options: dict):
    for language in LANGUAGES:
        prompt = ids_of(pipeline, language, options.get("prefix", ""))
        for (caption,) in pipeline.caption_details(photos, language=language, **options):
            assert list(caption.token_ids[: len(prompt)]) == prompt
            assert not set(caption.token_ids[len(prompt) :]) & set(pipeline.tokenizer.ids_without_text)
            assert caption.length == len(caption.token_ids) - len(prompt)
            assert caption.text == pipeline.tokenizer.decode(caption.token_ids)
            assert "<|" not in caption.text


def test_the_first_language_is_the_default(pipeline: Pipeline, photos: list[Path]):
    assert pipeline.languages == LANGUAGES
    assert pipeline.caption_details(photos) == pipeline.caption_details(photos, language="en")
    assert torch.equal(pipeline.embed_texts("a dog"), pipeline.embed_texts("a dog", language="en"))
    other = pipeline.in_language("de")
    assert other.caption(photos) == pipeline.caption(photos, language="de")
    assert pipeline.tokenizer.language == "en"  # the other is another one


def test_the_language_changes_what_is_said_and_read(pipeline: Pipeline, photos: list[Path]):
    said = {
        language: [c.log_probability for (c,) in pipeline.caption_details(photos, language=language)]
        for language in LANGUAGES
    }
    assert len(set(map(tuple, said.values()))) == 3
    read = {language: pipeline.embed_texts("a dog", language=language) for language in LANGUAGES}
    assert not torch.allclose(read["zh"], read["de"])
    assert torch.allclose(pipeline.embed_texts(LanguageText("a dog", "de")), read["de"])
    ids = torch.tensor([[*ids_of(pipeline, "zh", "a dog"), pipeline.tokenizer.eos_id]])
    with torch.inference_mode():
        expected = pipeline.model.encode_text(ids, torch.ones_like(ids, dtype=torch.bool)).embed
    torch.testing.assert_close(read["zh"], expected)
    similar = pipeline.similarity(photos, "a dog", language="de")
    torch.testing.assert_close(similar, pipeline.embed_images(photos) @ read["de"].T)


@pytest.mark.parametrize("by", ["similarity", "likelihood"])
def test_labels_are_in_the_language(pipeline: Pipeline, photos: list[Path], by: str):
    labels = ["rot", "blau"]
    found = pipeline.classify(photos, labels, language="de", by=by)
    assert found == pipeline.in_language("de").classify(photos, labels, "{}", by=by)  # English templates are left out
    assert found != pipeline.classify(photos, labels, "{}", by=by)
    assert found == pipeline.classify(photos, labels, ["{}"], language="de", by=by)
    assert pipeline.classify(photos, labels, language="de", templates="ein {}") != found


def test_a_score_is_that_of_the_words_after_the_language(pipeline: Pipeline, photos: list[Path]):
    """As a caption's own log-probability, it does not count the language, which is given."""
    for (caption,) in pipeline.caption_details(photos, GenerationOptions(max_new_tokens=12), language="zh"):
        if caption.token_ids[-1] != pipeline.tokenizer.eos_id:
            continue
        text = caption.text
        if pipeline.tokenizer.in_language("zh").encode(text) != list(caption.token_ids):
            continue
        scores = pipeline.score_captions(photos, text, language="zh")
        assert scores.max() >= caption.log_probability - 1e-3
    ids = torch.tensor([[*ids_of(pipeline, "zh", "a dog"), pipeline.tokenizer.eos_id]])
    pixels = pipeline.preprocess(photos)
    with torch.inference_mode():
        logits = pipeline.model.logits(pixels, ids[:, :-1].expand(len(photos), -1)).log_softmax(-1)
    gained = logits.gather(2, ids[:, 1:, None].expand(len(photos), -1, 1)).squeeze(2)
    torch.testing.assert_close(pipeline.score_captions(photos, "a dog", language="zh")[:, 0], gained[:, 1:].sum(dim=1))


def test_words_may_be_asked_for_in_every_language(pipeline: Pipeline, photos: list[Path]):
    ((found,),) = pipeline.caption_details(photos[0], language="zh", required_words=["red"])
    caption = found.text
    assert "red" in caption
    assert not set(found.token_ids[2:]) & set(pipeline.tokenizer.language_ids)
    word = caption.split()[0]
    assert word not in pipeline.caption(photos[0], language="zh", forbidden_words=[word])[0].split()


def test_maps_are_those_of_the_words(pipeline: Pipeline, photos: list[Path]):
    maps = pipeline.explain(photos[0], "a red picture", language="de").maps
    assert maps.words == ("a", "red", "picture")
    torch.testing.assert_close(maps.weights.sum(dim=-1), torch.ones(maps.weights.shape[:-1]))
    total = pipeline.score_captions(photos[0], "a red picture", language="de").item()
    ids = torch.tensor([[*ids_of(pipeline, "de", "a red picture")]])
    with torch.inference_mode():
        end = pipeline.model.logits(pipeline.preprocess(photos[0]), ids).log_softmax(-1)[
            0, -1, pipeline.tokenizer.eos_id
        ]
    assert float(maps.log_probs.sum() + end) == pytest.approx(total, abs=1e-3)


def test_a_prompt_that_leaves_no_room_is_refused(pipeline: Pipeline, photos: list[Path]):
    with pytest.raises(ValueError, match="leaves none for a caption"):
        pipeline.caption(photos[0], prefix="a red picture " * 20, language="zh")


def test_models_without_languages_refuse_them(tmp_path: Path, photos: list[Path]):
    plain = load(save_tiny_model(tmp_path))
    assert plain.languages == ()
    for use in (
        lambda: plain.caption(photos, language="zh"),
        lambda: plain.embed_texts("a dog", language="zh"),
        lambda: plain.classify(photos, ["a", "b"], language="zh"),
        lambda: plain.in_language("zh"),
    ):
        with pytest.raises(ValueError, match="the model knows no languages, so 'zh' cannot be chosen"):
            use()
    model = plain.model
    with torch.inference_mode():
        tokens = model.encode_image(plain.preprocess(photos)).tokens
    expected = [caption for (caption,) in generate(model, tokens, plain.tokenizer)]
    assert [caption for (caption,) in plain.caption_details(photos)] == expected
    assert expected[0].token_ids[0] == plain.tokenizer.bos_id


def test_an_unknown_language_names_the_known_ones(pipeline: Pipeline, photos: list[Path]):
    with pytest.raises(ValueError, match="no language 'fr' here; known languages: en, zh, de"):
        pipeline.caption(photos, language="fr")


def test_the_card_says_which_languages_there_are(pipeline: Pipeline):
    loaded = LoadedModel(pipeline.model, pipeline.tokenizer, pipeline.preprocess.config, {})
    card = model_card(loaded, "me/it", licence="mit")
    assert "language:\n- en\n- zh\n- de\n" in card
    assert "Languages: en, zh, de." in card
