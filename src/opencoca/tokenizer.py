"""The one owner of the vocabulary and of the special ids: text to token ids and back.

Two vocabularies exist: CLIP's (`Tokenizer.clip`), and one trained on the user's own captions (`train_tokenizer`).
Both are a `tokenizer.json` of the `tokenizers` library that any of its readers opens. The special ids stand in that
file (bos and eos in its post-processor, pad in its padding entry) but not among its added tokens: those are looked
for in the text, and a caption that spells out "<end>" must never become the end of a caption.

Letters: B batch, T text positions.
"""

import gzip
import html
import importlib.resources
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

FILE_NAME = "tokenizer.json"
MAX_VOCAB_SIZE = 65_536
_SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")
_MIN_VOCAB_SIZE = len(_SPECIAL_TOKENS) + 256  # every byte is a token: no text is out of vocabulary

_SURROGATE_PAIR, _SURROGATE = re.compile("[\ud800-\udbff][\udc00-\udfff]"), re.compile("[\ud800-\udfff]")

_CLIP_NUM_MERGES = 48_894
_CLIP_SPECIAL_TOKENS = ("!", "<start_of_text>", "<end_of_text>")  # its padding is id 0, which is also a word
_CLIP_WORD_END = "</w>"
# CLIP's pattern ignores case: a long s counts as an s after an apostrophe, and an iota below (U+0345), no letter itself
# but the lower case of one, as nothing.
_CLIP_WORDS = r"'[s\x{017f}]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{0345}]+"
_CLIP_REPLACED = (
    (r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]", ""),  # control characters
    (r"[\x{02bc}\x{2018}-\x{201b}]", "'"),  # curly quotes
    (r"[\x{201c}-\x{201f}]", '"'),
)


class TokenBatch(NamedTuple):
    """Texts as one batch, padded on the right to the longest of them."""

    token_ids: Tensor
    """(B, T) int64: bos, the words, eos, padding."""
    token_mask: Tensor
    """(B, T) bool: True where there is a token, False on padding."""


class Tokenizer:
    """Turns texts into token ids and back; made by `clip`, `load` or `train_tokenizer`.

    Attributes: `pad_id`, `bos_id`, `eos_id`, three different ids; `vocab_size`, the number of ids. In the CLIP
    vocabulary the padding id 0 is a word too ("!" inside a run of punctuation), so tell padding by the mask alone.

    A text may be any `str`; a lone surrogate, which is no character, is read as U+FFFD.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wraps `backend`, which must have the form described at the top of this module, else `ValueError`."""
        framing = backend.encode("").ids
        if backend.padding is None or len(framing) != 2:
            raise ValueError("no start, end and padding ids are declared in it")
        self._json = backend.to_str()
        self.pad_id: int = backend.padding["pad_id"]
        self.bos_id, self.eos_id = framing
        self.vocab_size: int = backend.get_vocab_size()
        if sorted(backend.get_vocab().values()) != list(range(self.vocab_size)):
            raise ValueError(f"its ids are not 0 to {self.vocab_size - 1}, each used once")
        if len({self.pad_id, *framing}) != 3 or not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"its special ids {self.pad_id}, {framing} are not three different ids of its vocabulary")
        if None in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
            raise ValueError("its normalizer, pre-tokenizer or decoder is missing")
        if backend.get_added_tokens_decoder() or backend.truncation is not None:
            raise ValueError("it has added tokens or truncation, which would change the meaning of a text")
        self._is_clip = getattr(backend.model, "end_of_word_suffix", None) == _CLIP_WORD_END
        backend.no_padding()  # ids come out ragged; __call__ pads
        self._normalizer = backend.normalizer
        if self._is_clip:  # _clean_as_clip does it all; what stands in the file is for other readers of it
            backend.normalizer = normalizers.Sequence([])
        self._backend = backend

    @classmethod
    def clip(cls) -> "Tokenizer":
        """The CLIP vocabulary: 49,408 ids, bos 49406, eos 49407, pad 0 (Radford et al. 2021, section 2.4).

        Text is cleaned as CLIP and open_clip do: mis-decoded and otherwise broken text repaired by ftfy, HTML
        entities resolved, whitespace collapsed, lower case. Ids equal theirs but for the literal texts
        "<start_of_text>" and "<end_of_text>", which are bos and eos there and plain words here, and for letters newer
        than the Unicode tables of the tokenizers library (docs/equality.md).
        Decoding puts a space after every word and punctuation mark: "it 's a dog ."
        """
        return cls(_build_clip_backend())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in the folder `path`, as `save` wrote it.

        Raises:
            ValueError: the file is missing, damaged, or no tokenizer of this form.
        """
        file = Path(path)
        if file.is_dir():
            file /= FILE_NAME
        remedy = "give a file that Tokenizer.save or `opencoca tokenizer train` wrote"
        if not file.is_file():
            raise ValueError(f"there is no tokenizer at {file}; {remedy}")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except OSError:
            raise
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise ValueError(f"{file} is damaged or no tokenizer.json ({error}); {remedy}") from error
        try:
            return cls(backend)
        except ValueError as error:
            raise ValueError(f"{file} is no tokenizer of OpenCoCa's form: {error}; {remedy}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the tokenizer to `path` (a name ending in .json, or a folder, created if need be); returns the file.

        The file appears whole or not at all: an older one stays as it was if writing fails (`OSError`).
        """
        file = Path(path)
        if file.suffix != ".json" or file.is_dir():
            file /= FILE_NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as stream:
                stream.write(self.to_json())
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        return file

    def to_json(self) -> str:
        """The content of the file that `save` writes; equal for equal tokenizers."""
        return self._json

    def normalize(self, text: str) -> str:
        """The text as the vocabulary sees it: what `decode(encode(text))` gives back for a trained tokenizer."""
        readable = self._readable([text])[0]
        # Less the space that marks the first word of a trained tokenizer.
        return readable if self._is_clip else self._normalizer.normalize_str(readable)[1:]

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, of any length: bos, words, eos."""
        return self._backend.encode(self._readable([text])[0]).ids

    def encode_batch(self, texts: Sequence[str], context_length: int) -> list[list[int]]:
        """Token ids of many texts, unpadded; one longer than `context_length` is cut and ends in eos.

        Runs on all cores: meant for tokenising a whole data set at once.

        Raises:
            ValueError: `context_length` is under 2, or a text is not a string (the first such is named).
        """
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}, but start and end alone take 2 positions")
        encodings = self._backend.encode_batch_fast(self._readable(texts))
        return [self._cut(encoding.ids, context_length) for encoding in encodings]

    def __call__(self, texts: str | Sequence[str], context_length: int) -> TokenBatch:
        """One text or several as a batch; T is the longest one's length, `context_length` at most.

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
        """The text of token ids (T,): up to the first eos, without bos and padding.

        Bytes that are not UTF-8, as a model may produce, become U+FFFD.

        Raises:
            ValueError: an id is outside of the vocabulary.
        """
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Sequence[Sequence[int] | Tensor] | Tensor) -> list[str]:
        """`decode` for each row of (B, T) ids; rows of a list may differ in length."""
        texts = self._backend.decode_batch([self._words(ids) for ids in batch], skip_special_tokens=False)
        return [text.removesuffix(" ") for text in texts] if self._is_clip else texts

    def _readable(self, texts: Sequence[str]) -> list[str]:
        """The texts as the backend takes them."""
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts, not the single text {texts[:40]!r}; put it in a list")
        texts = [_require_text(text, position) for position, text in enumerate(texts)]
        return [_clean_as_clip(text) for text in texts] if self._is_clip else texts

    def _cut(self, ids: list[int], context_length: int) -> list[int]:
        return ids if len(ids) <= context_length else [*ids[: context_length - 1], self.eos_id]

    def _words(self, ids: Sequence[int] | Tensor) -> list[int]:
        """The ids that stand for text."""
        ids = ids.tolist() if isinstance(ids, Tensor) else [int(token_id) for token_id in ids]
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is outside of the vocabulary of {self.vocab_size} ids")
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        elif self._is_clip:  # padding is a word as well, but no text ends with it
            while ids and ids[-1] == self.pad_id:
                ids.pop()
        dropped = {self.bos_id} if self._is_clip else {self.bos_id, self.pad_id}
        return [token_id for token_id in ids if token_id not in dropped]


def train_tokenizer(
    captions: Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = True,
    strip_final_period: bool = True,
    min_frequency: int = 2,
    show_progress: bool = False,
) -> Tokenizer:
    """Trains a byte-level BPE vocabulary on captions: pad 0, bos 1, eos 2, the 256 bytes, then merges by frequency.

    Every text has ids, and `decode(encode(text)) == normalize(text)` for every text. The normalisation is part of the
    tokenizer and of its file, so training and use agree. The same captions in the same order give the same file.

    Args:
        captions: read once, so a generator will do.
        vocab_size: 259 to 65,536. Fewer ids result where the captions do not hold enough frequent pairs.
        lowercase: whether upper and lower case are the same.
        strip_final_period: whether full stops at the end ("a dog ." and "a dog." alike) and whitespace at either end
            are dropped.
        min_frequency: a pair seen less often is not merged.
        show_progress: whether a progress bar is shown.

    Raises:
        ValueError: `vocab_size` or `min_frequency` is out of range, a caption is not a string, or there is no caption.
    """
    if not _MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; choose one from {_MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
    if min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency}; it must be 1 or more")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = _caption_normalizer(lowercase, strip_final_period)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=show_progress,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    num_captions = len(captions) if isinstance(captions, Sequence) else None
    backend.train_from_iterator(_checked(captions), trainer=trainer, length=num_captions)
    # The model keeps the special ids; the list of added tokens, which the trainer filled, stays behind.
    return Tokenizer(_assemble(backend, _SPECIAL_TOKENS))


def _caption_normalizer(lowercase: bool, strip_final_period: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lowercase else []
    steps.append(normalizers.NFC())  # after lower-casing, which may leave pairs that compose
    if strip_final_period:
        # The look-behind keeps the search linear: a match starts only where a run of stops and spaces does.
        final_stops = Regex(r"(?<![\p{White_Space}.])[\p{White_Space}.]++\z")
        steps += [normalizers.Strip(), normalizers.Replace(final_stops, "")]
    # A space before the first word makes it the same token as inside a sentence; decoding takes it off again.
    return normalizers.Sequence([*steps, normalizers.Prepend(" ")])


def _clean_as_clip(text: str) -> str:
    """The text as CLIP's vocabulary was made from: repaired, entities resolved, whitespace collapsed, lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # elsewhere there is nothing to repair
        import ftfy  # on first need: it takes as long to import as most commands take to start

        # Resolved twice more, for web text that was escaped twice.
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    return text if text.isascii() else _without_surrogates(text)


def _build_clip_backend() -> tokenizers.Tokenizer:
    """The CLIP tokenizer from its list of merges: bytes, bytes that end a word, merges, bos, eos, in this order."""
    asset = importlib.resources.files("opencoca").joinpath("assets/clip_vocab/merges.txt.gz")
    lines = gzip.decompress(asset.read_bytes()).decode("utf-8").splitlines()
    assert len(lines) == _CLIP_NUM_MERGES
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    # Visible bytes stand for themselves and come first; the others have stand-ins from U+0100 on.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(code) for code in [*visible, *range(0x100, 0x200 - len(visible))]]
    tokens = [*alphabet, *(char + _CLIP_WORD_END for char in alphabet), *(left + right for left, right in merges)]
    vocab = {token: token_id for token_id, token in enumerate([*tokens, *_CLIP_SPECIAL_TOKENS[1:]])}

    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=_CLIP_WORD_END))
    backend.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(Regex(pattern), content) for pattern, content in _CLIP_REPLACED),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Byte-level decoding reads U+0120 as a space; a plain space is no byte's stand-in.
    word_ends = decoders.Replace(_CLIP_WORD_END, "\u0120")
    backend.decoder = decoders.Sequence([word_ends, decoders.ByteLevel()])
    return _assemble(backend, _CLIP_SPECIAL_TOKENS)


def _assemble(parts: tokenizers.Tokenizer, special_tokens: tuple[str, str, str]) -> tokenizers.Tokenizer:
    """A tokenizer of the same parts that frames texts in bos and eos, declares pad, and has no added tokens."""
    backend = tokenizers.Tokenizer(parts.model)
    backend.normalizer = parts.normalizer
    backend.pre_tokenizer = parts.pre_tokenizer
    backend.decoder = parts.decoder
    pad, bos, eos = special_tokens
    ids = {token: backend.token_to_id(token) for token in special_tokens}
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, ids[bos]), (eos, ids[eos])]
    )
    backend.enable_padding(pad_id=ids[pad], pad_token=pad)
    return backend


def _checked(captions: Iterable[str]) -> Iterator[str]:
    """The captions one by one, each known to be text, at least one."""
    position = -1
    for position, caption in enumerate(captions):
        yield _require_text(caption, position)
    if position < 0:
        raise ValueError("there is no caption to train a tokenizer on; give a file or list that has some")


def _require_text(text: object, position: int) -> str:
    """`text` as a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"text number {position} is {text!r}, not a string; remove it or fill it in")
    return _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    """Surrogates, as JSON may hold them, in pairs become the characters that they stand for, others U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        paired = _SURROGATE_PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
        return _SURROGATE.sub("\ufffd", paired)
