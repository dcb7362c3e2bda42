"""Languages of a vocabulary: tokens that no text forges, words in every script, files that keep them."""

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.inference.loading import available_models
from opencoca.tokenizer import LanguageText, Tokenizer, train_tokenizer
from opencoca.tokenizer.languages import texts_in

LANGUAGES = ("en", "zh", "hi", "ar")
CAPTIONS = [
    *("a dog runs in the snow .", "two dogs play", "the dog's ball"),
    *("一只狗在雪地里跑。", "两只狗在玩。", "穿着连衣裙的小女孩。"),
    *("काला कुत्ता बर्फ में दौड़ रहा है।", "कुत्ता और बच्चा"),
    *("كلب يجري في الثلج", "كلبان يلعبان"),
] * 3
NO_SURROGATES = st.characters(exclude_categories=["Cs"])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 500, languages=LANGUAGES)


def test_a_language_follows_the_start_and_is_dropped_by_decoding(tokenizer: Tokenizer):
    plain = tokenizer.encode("a dog")
    assert tokenizer.languages == LANGUAGES
    rows = [tokenizer.in_language(language).encode("a dog") for language in LANGUAGES]
    assert len({row[1] for row in rows} | {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}) == 3 + len(LANGUAGES)
    for row in rows:
        assert [row[0], *row[2:]] == plain
        assert tokenizer.decode(row) == "a dog"
    assert tokenizer.in_language("zh").in_language(None).encode("a dog") == plain


def test_texts_that_know_their_language_are_in_it(tokenizer: Tokenizer):
    texts = ["a dog", LanguageText("a dog", "ar"), LanguageText("a dog", "hi")]
    rows = tokenizer.in_language("zh").encode_batch(texts)
    assert rows == [tokenizer.in_language(language).encode("a dog") for language in ("zh", "ar", "hi")]
    assert tokenizer(texts).token_ids[1].tolist() == rows[1]
    assert tokenizer.encode_batch(texts, 3)[1] == [*rows[1][:2], tokenizer.eos_id]
    assert texts_in([*texts, LanguageText("狗", "zh")], "ar") == ("a dog", "a dog")


@given(st.text(NO_SURROGATES, max_size=20), st.sampled_from(LANGUAGES))
def test_no_text_forges_a_language(tokenizer: Tokenizer, text: str, language: str):
    for forged in (f"<|{language}|>", f"{text}<|{language}|>{text}", f"<|{language}|> {text}", text):
        ids = tokenizer.encode(forged)
        assert not set(ids[1:-1]) & set(tokenizer.ids_without_text)
        assert tokenizer.decode(ids) == tokenizer.normalize(forged)
        assert tokenizer.in_language("en").encode(forged)[2:] == ids[1:]


def test_a_file_keeps_the_languages(tokenizer: Tokenizer, tmp_path):
    read = Tokenizer.load(tokenizer.save(tmp_path))
    assert read.languages == LANGUAGES
    assert read.in_language("ar").encode("كلب") == tokenizer.in_language("ar").encode("كلب")
    assert read.to_json() == tokenizer.to_json()
    many = tuple(f"l{number:02}" for number in range(60))
    assert (
        Tokenizer.load(train_tokenizer(["a dog"], 400, languages=many).save(tmp_path / "many.json")).languages == many
    )


def test_tokens_that_a_template_uses_are_no_languages(tokenizer: Tokenizer, tmp_path):
    content = json.loads(tokenizer.to_json())
    piece = {"SpecialToken": {"id": "<|zh|>", "type_id": 0}}
    content["post_processor"]["pair"] += [piece]
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path / "t.json").languages == ("en", "hi", "ar")


def test_a_language_outside_of_the_vocabulary_is_refused(tokenizer: Tokenizer, tmp_path):
    content = json.loads(tokenizer.to_json())
    content["post_processor"]["special_tokens"]["<|zh|>"]["ids"] = [9999]
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"t\.json is no tokenizer .* languages"):
        Tokenizer.load(tmp_path / "t.json")


def test_words_keep_the_marks_of_their_letters():
    """A vowel sign that ended a word would keep what follows from ever joining what stands before."""
    one_word = train_tokenizer(["कुत्ता"] * 3, 400, languages=["hi"], min_frequency=1)
    assert len(one_word.encode("कुत्ता")) == 3
    assert len(train_tokenizer(["कुत्ता"] * 3, 400, min_frequency=1).encode("कुत्ता")) > 3


@pytest.mark.parametrize("text", ["一只狗。", "कुत्ता है।", "a dog .", "کتا ہے۔"])
def test_full_stops_of_every_script_are_dropped(tokenizer: Tokenizer, text: str):
    assert tokenizer.encode(text) == tokenizer.encode(text[:-1])
    kept = train_tokenizer(CAPTIONS, 500, languages=LANGUAGES, strip_final_period=False)
    assert kept.encode(text) != kept.encode(text[:-1])


def test_tokenizers_without_languages_are_as_they_were():
    trained = train_tokenizer(CAPTIONS, 500)
    for tokenizer in (trained, Tokenizer.clip(), *(Tokenizer.load(model.folder) for model in available_models())):
        assert tokenizer.languages == ()
        assert tokenizer.language is None
        assert tokenizer.prompt_length == 1
        with pytest.raises(ValueError, match="the model knows no languages, so 'zh' cannot be chosen"):
            tokenizer.in_language("zh")
        with pytest.raises(ValueError, match="the model knows no languages"):
            tokenizer.encode(LanguageText("a dog", "zh"))
    assert trained.encode("狗。") != trained.encode("狗")  # full stops are those of before


@pytest.mark.parametrize("languages", ["en", ["en", "en"], ["<en>"], [""], ["a|b"], [f"l{n}" for n in range(300)]])
def test_names_that_are_no_languages_are_refused(languages):
    with pytest.raises(ValueError, match=r"language"):
        train_tokenizer(CAPTIONS, 2000, languages=languages)


def test_an_unknown_language_names_those_that_are_known(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="there is no language 'de' here; known languages: en, zh, hi, ar"):
        tokenizer.in_language("de")


def test_texts_keep_their_language_when_copied():
    text = LanguageText("ein Hund", "de")
    assert text == "ein Hund"
    for again in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text), copy.copy(text)):
        assert (again, again.language) == ("ein Hund", "de")
    assert "de" in repr(text)
