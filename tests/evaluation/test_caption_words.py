"""What a word is, language by language."""

import pytest

from opencoca.evaluation.caption_metrics import caption_scores
from opencoca.evaluation.caption_words import caption_tokens, token_kind
from opencoca.evaluation.ptb_tokenizer import ptb_tokenize


def test_languages_without_spaces_are_cut_into_characters():
    assert caption_tokens("一只狗，在 雪地里跑。", "zh") == list("一只狗在雪地里跑")
    assert caption_tokens("犬とボール", "ja") == list("犬とボール")
    assert token_kind("zh-TW") == token_kind("th") == "characters"


def test_marks_belong_to_their_words():
    assert caption_tokens("काला कुत्ता, बर्फ में।", "hi") == ["काला", "कुत्ता", "बर्फ", "में"]
    assert token_kind("hi") == "words"


@pytest.mark.parametrize("language", [None, "en", "de", "fr", "cs", "ar"])
def test_others_have_the_tokens_of_published_figures(language):
    text = "Ein Junge steht am Ufer, winkt und sieht's."
    assert caption_tokens(text, language) == ptb_tokenize(text)
    assert token_kind(language) == "ptb"


def test_scores_count_characters():
    """Two of three characters agree, in sentences that share no word."""
    captions, references = {"a": "红的狗", "b": "猫"}, {"a": ["黑的狗"], "b": ["猫"]}
    assert caption_scores(captions, references, "zh").bleu_1 == pytest.approx(3 / 4)
    assert caption_scores(captions, references).bleu_1 == pytest.approx(1 / 2)
