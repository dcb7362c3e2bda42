"""The tokenizer: text to token ids, token ids to text, and its file.

Letters: B batch, T text positions.
"""

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import normalizers
from torch import Tensor

from opencoca.system.files import write_text
from opencoca.system.json_files import parse_json, read_bounded
from opencoca.system.messages import brief
from opencoca.tokenizer.backend import require_text
from opencoca.tokenizer.clip import CLIP_WORD_END, build_clip_backend, clean_as_clip
from opencoca.tokenizer.file_checks import check_tokenizer_content
from opencoca.tokenizer.languages import language_of, language_of_token, require_language

FILE_NAME = "tokenizer.json"
# Far more than any real file has, and than a caption.
MAX_FILE_BYTES, MAX_TEXT_LENGTH = 32_000_000, 100_000


class TokenBatch(NamedTuple):
    """Texts as one batch, padded on the right to the longest of them."""

    token_ids: Tensor
    """(B, T) int64: bos, the words, eos, padding."""
    token_mask: Tensor
    """(B, T) bool: True where there is a token, False on padding."""


class Tokenizer:
    """Turns texts into token ids and back; made by `clip`, `load` or `train_tokenizer`.

    Attributes: `pad_id`, `bos_id`, `eos_id`, three different ids; `vocab_size`, the number of ids; `context_length`,
    where texts are cut unless a call says otherwise (a `Pipeline`'s tokenizer has its model's; None: nowhere);
    `languages`, those that it has tokens for; `language`, of texts that do not know theirs (None: they get no
    token). In the CLIP vocabulary the padding id 0 is also a word ("!" inside a run of punctuation), so only the mask
    tells padding.

    A text may be any `str`; a lone surrogate, which is no character, is read as U+FFFD. A `LanguageText` is in its own
    language.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wraps `backend`, which must have the form that this package's docstring describes, else `ValueError`."""
        with _in_one_sentence("encode a text"):
            framing = backend.encode("").ids
        if backend.padding is None or len(framing) != 2:
            raise ValueError("no start, end and padding ids are declared in it")
        self._json = backend.to_str()
        self.pad_id: int = backend.padding["pad_id"]
        self.bos_id, self.eos_id = framing
        self.vocab_size: int = backend.get_vocab_size()
        self.context_length: int | None = None
        if sorted(backend.get_vocab().values()) != list(range(self.vocab_size)):
            raise ValueError(f"its ids are not 0 to {self.vocab_size - 1}, each used once")
        if len({self.pad_id, *framing}) != 3 or not all(0 <= i < self.vocab_size for i in (self.pad_id, *framing)):
            raise ValueError(f"its special ids {self.pad_id}, {framing} are not three different ids of its vocabulary")
        if None in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
            raise ValueError("its normalizer, pre-tokenizer or decoder is missing")
        if backend.get_added_tokens_decoder() or backend.truncation is not None:
            raise ValueError("it has added tokens or truncation, which would change the meaning of a text")
        self._language_ids = self._read_languages(backend)
        self.languages: tuple[str, ...] = tuple(self._language_ids)
        self.language: str | None = None
        self._is_clip = getattr(backend.model, "end_of_word_suffix", None) == CLIP_WORD_END
        backend.no_padding()  # ids come out ragged; __call__ pads
        self._normalizer = backend.normalizer
        if self._is_clip:  # clean_as_clip does it all; what stands in the file is for other readers of it
            backend.normalizer = normalizers.Sequence([])
        self._backend = backend

    @classmethod
    def clip(cls) -> "Tokenizer":
        """Makes the tokenizer of CLIP: 49,408 ids, bos 49406, eos 49407, pad 0 (Radford et al. 2021, section 2.4).

        Text is cleaned as CLIP and open_clip do: ftfy repairs mis-decoded text, HTML entities are resolved, whitespace
        is collapsed, letters become lower case. Ids equal theirs with two exceptions: the literal texts
        "<start_of_text>" and "<end_of_text>" are plain words here, and letters newer than the Unicode tables of the
        tokenizers library differ (docs/equality.md).
        Decoding puts a space after every word and punctuation mark: "it 's a dog ."
        """
        return cls(build_clip_backend())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in the folder `path`, as `save` wrote it.

        Raises:
            ValueError: the file is missing, damaged, or no tokenizer of this form. Its components, numbers and regular
                expressions are checked before the library sees them (`check_tokenizer_content`).
        """
        file = Path(path)
        if file.is_dir():
            file /= FILE_NAME
        remedy = "give a file that Tokenizer.save or `opencoca tokenizer train` wrote"
        if not file.is_file():
            raise ValueError(f"there is no tokenizer at {file}; {remedy}")
        text = read_bounded(file, MAX_FILE_BYTES)
        content = parse_json(text, file)
        try:
            check_tokenizer_content(content)
            with _in_one_sentence("be read"):
                backend = tokenizers.Tokenizer.from_str(text)
            return cls(backend)
        except ValueError as error:
            raise ValueError(f"{file} is no tokenizer of OpenCoCa's form: {error}; {remedy}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the tokenizer to `path` (a name ending in .json, or a folder, created if need be); returns the file.

        The file appears whole or not at all: an older one stays as it was if writing fails (`WriteError`).
        """
        file = Path(path)
        if file.suffix != ".json" or file.is_dir():
            file /= FILE_NAME
        write_text(file, self.to_json())
        return file

    def to_json(self) -> str:
        """Returns the content of the file that `save` writes; equal for equal tokenizers."""
        return self._json

    def normalize(self, text: str) -> str:
        """Returns the text as the vocabulary sees it; a trained tokenizer's `decode(encode(text))` gives the same."""
        readable = self._readable([text])[0]
        # A trained tokenizer marks the first word by a space, which is dropped here.
        if self._is_clip:
            return readable
        with _in_one_sentence("normalize this text"):
            return self._normalizer.normalize_str(readable)[1:]

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one text, of its first 100,000 characters at most: bos, language, words, eos."""
        readable = self._readable([text])[0]
        with _in_one_sentence("encode this text"):
            ids = self._backend.encode(readable).ids
        return self._with_language(ids, text)

    def with_context_length(self, context_length: int) -> "Tokenizer":
        """Returns this tokenizer with another `context_length`."""
        tokenizer = copy.copy(self)
        tokenizer.context_length = context_length
        return tokenizer

    def in_language(self, language: str | None) -> "Tokenizer":
        """Returns this tokenizer for texts in a language: its token follows bos, unless a text knows its own language.

        language: one of `languages`; None for no token. Raises ValueError for any other.
        """
        tokenizer = copy.copy(self)
        tokenizer.language = None if language is None else require_language(language, self.languages)
        return tokenizer

    @property
    def prompt_length(self) -> int:
        """The number of ids before the words of a text that does not know its language: bos, and the language."""
        return 1 if self.language is None else 2

    @property
    def ids_without_text(self) -> tuple[int, ...]:
        """The ids that no text has between its first word and eos: bos, padding and languages."""
        return (self.bos_id, self.pad_id, *self.language_ids)

    @property
    def language_ids(self) -> tuple[int, ...]:
        """The ids of `languages`."""
        return tuple(self._language_ids.values())

    def encode_batch(self, texts: Sequence[str], context_length: int | None = None) -> list[list[int]]:
        """Returns the token ids of many texts, unpadded; a text longer than `context_length` is cut and ends in eos.

        Runs on all cores: meant for tokenising a whole data set at once. context_length: None for the tokenizer's own.

        Raises:
            ValueError: `context_length` is under 2, or a text is not a string (the first such is named).
        """
        limit = self.context_length if context_length is None else context_length
        if limit is not None and limit < 2:
            raise ValueError(f"context_length is {limit}, but start and end alone take 2 positions")
        readable = self._readable(texts)
        with _in_one_sentence("encode these texts"):
            encodings = self._backend.encode_batch_fast(readable)
        rows = [self._with_language(found.ids, text) for found, text in zip(encodings, texts, strict=True)]
        return rows if limit is None else [self._cut(ids, limit) for ids in rows]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> TokenBatch:
        """Makes a batch of one text or several; T is the length of the longest, at most `context_length`.

        context_length: None for the tokenizer's own, which in a `Pipeline` is its model's.

        Raises:
            ValueError: as `encode_batch`.
        """
        rows = self.encode_batch([texts] if isinstance(texts, str) else texts, context_length)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        num_positions = max(map(len, rows), default=0)
        token_mask = torch.arange(num_positions) < lengths[:, None]
        token_ids = torch.full(token_mask.shape, self.pad_id, dtype=torch.int64)
        token_ids[token_mask] = torch.tensor([token_id for row in rows for token_id in row], dtype=torch.int64)
        return TokenBatch(token_ids, token_mask)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Returns the text of token ids (T,): up to the first eos, without bos, language and padding.

        Bytes that are not UTF-8, as a model may produce, become U+FFFD.

        Raises:
            ValueError: an id is outside of the vocabulary.
        """
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Sequence[Sequence[int] | Tensor] | Tensor) -> list[str]:
        """Decodes each row of (B, T) ids; rows of a list may differ in length."""
        words = [self._words(ids) for ids in batch]
        with _in_one_sentence("decode these ids"):
            texts = self._backend.decode_batch(words, skip_special_tokens=False)
        return [text.removesuffix(" ") for text in texts] if self._is_clip else texts

    def _readable(self, texts: Sequence[str]) -> list[str]:
        """Returns the texts in the form that the backend takes."""
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts, not the single text {texts[:40]!r}; put it in a list")
        texts = [require_text(text, position)[:MAX_TEXT_LENGTH] for position, text in enumerate(texts)]
        return [clean_as_clip(text) for text in texts] if self._is_clip else texts

    def _read_languages(self, backend: tokenizers.Tokenizer) -> dict[str, int]:
        """The ids of languages in their order: the post-processor declares their tokens, but no template uses them."""
        processor = json.loads(backend.post_processor.__getstate__())
        declared, templates = processor.get("special_tokens", {}), str((processor.get("single"), processor.get("pair")))
        names = {name: language_of_token(name) for name in declared if repr(name) not in templates}
        found = {language: declared[name]["ids"][0] for name, language in names.items() if language is not None}
        ids = {self.pad_id, self.bos_id, self.eos_id, *found.values()}
        if len(ids) != 3 + len(found) or not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"the ids of its languages {found} are not different ids of its vocabulary")
        return dict(sorted(found.items(), key=lambda pair: pair[1]))

    def _with_language(self, ids: list[int], text: str) -> list[int]:
        """The ids of a text, with its language's behind bos."""
        own = language_of(text)
        language = self.language if own is None else require_language(own, self.languages)
        return ids if language is None else [ids[0], self._language_ids[language], *ids[1:]]

    def _cut(self, ids: list[int], context_length: int) -> list[int]:
        return ids if len(ids) <= context_length else [*ids[: context_length - 1], self.eos_id]

    def _words(self, ids: Sequence[int] | Tensor) -> list[int]:
        """Returns the ids that are words: without bos, language, eos and padding."""
        ids = ids.tolist() if isinstance(ids, Tensor) else [int(token_id) for token_id in ids]
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is outside of the vocabulary of {self.vocab_size} ids")
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        elif self._is_clip:  # padding is a word as well, but no text ends with it
            while ids and ids[-1] == self.pad_id:
                ids.pop()
        dropped = {self.bos_id} if self._is_clip else set(self.ids_without_text)
        return [token_id for token_id in ids if token_id not in dropped]


@contextlib.contextmanager
def _in_one_sentence(doing: str) -> Iterator[None]:
    """Makes a ValueError of whatever the library raises: bare Exception, or what Rust panics become in Python."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"it cannot {doing} ({brief(error)})") from error
