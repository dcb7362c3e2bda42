"""Trains a vocabulary on the user's own captions."""

from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from opencoca.tokenizer.backend import SPECIAL_TOKENS, assemble, require_text
from opencoca.tokenizer.languages import check_languages, language_token
from opencoca.tokenizer.tokenizer import Tokenizer

MAX_VOCAB_SIZE = 65_536
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # every byte is a token: no text is out of vocabulary

# What ends a sentence: the full stop, and for several languages the stops of Chinese, Hindi and Urdu.
_STOPS, _ALL_STOPS = ".", ".\u3002\uff0e\u0964\u06d4"
# Byte-level BPE's own words, but with a letter's marks: vowels are marks in Hindi, Bengali, Thai and others.
_WORDS_WITH_MARKS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    captions: Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = True,
    strip_final_period: bool = True,
    min_frequency: int = 2,
    languages: Sequence[str] = (),
    show_progress: bool = False,
) -> Tokenizer:
    """Trains a byte-level BPE vocabulary on captions: pad 0, bos 1, eos 2, languages, 256 bytes, merges by frequency.

    Every text has ids, and `decode(encode(text)) == normalize(text)` for every text. The normalisation is part of the
    tokenizer and of its file, so training and use agree. The same captions in the same order give the same file.

    Args:
        captions: read once, so a generator will do.
        vocab_size: 259 to 65,536; there are fewer ids if the captions have too few frequent pairs.
        lowercase: whether upper and lower case are the same.
        strip_final_period: whether full stops at the end ("a dog ." and "a dog." alike) and whitespace at either end
            are dropped.
        min_frequency: a pair seen less often is not merged.
        languages: such as ["en", "zh"], the default first: each has a token, which `Tokenizer.in_language` puts before
            a text. Words then keep the marks of their letters, and other scripts' full stops count as such.
        show_progress: whether a progress bar is shown.

    Raises:
        ValueError: `vocab_size` or `min_frequency` is out of range, a language has no usable name, a caption is not a
            string, or there is no caption.
    """
    check_languages(languages)
    least = MIN_VOCAB_SIZE + len(languages)
    if not least <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; choose one from {least} to {MAX_VOCAB_SIZE}")
    if min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency}; it must be 1 or more")
    backend = tokenizers.Tokenizer(models.BPE())
    stops = "" if not strip_final_period else _ALL_STOPS if languages else _STOPS
    backend.normalizer = _caption_normalizer(lowercase, stops)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if languages:
        words = pre_tokenizers.Split(Regex(_WORDS_WITH_MARKS), behavior="isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=show_progress,
        special_tokens=[*SPECIAL_TOKENS, *map(language_token, languages)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    num_captions = len(captions) if isinstance(captions, Sequence) else None
    backend.train_from_iterator(_checked(captions), trainer=trainer, length=num_captions)
    # The model keeps the special ids; the list of added tokens, which the trainer filled, is left out.
    return Tokenizer(assemble(backend, SPECIAL_TOKENS, languages))


def _caption_normalizer(lowercase: bool, stops: str) -> normalizers.Normalizer:
    """stops: characters that are dropped at the end, with the whitespace at either end."""
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lowercase else []
    steps.append(normalizers.NFC())  # after lower-casing, which may leave pairs of characters that compose
    if stops:
        # The look-behind keeps the search linear: a match starts only where a run of stops and spaces does.
        final_stops = Regex(rf"(?<![\p{{White_Space}}{stops}])[\p{{White_Space}}{stops}]++\z")
        steps += [normalizers.Strip(), normalizers.Replace(final_stops, "")]
    # A space before the first word makes it the same token as inside a sentence; decoding takes it off again.
    return normalizers.Sequence([*steps, normalizers.Prepend(" ")])


def _checked(captions: Iterable[str]) -> Iterator[str]:
    """Yields the captions; raises ValueError if one is no text or there is none."""
    position = -1
    for position, caption in enumerate(captions):
        yield require_text(caption, position)
    if position < 0:
        raise ValueError("there is no caption to train a tokenizer on; give a file or list that has some")
