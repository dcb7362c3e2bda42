"""Cleans texts as CLIP does, and makes its tokenizer from its list of merges."""

import gzip
import html
import importlib.resources

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from opencoca.tokenizer.backend import assemble, without_surrogates

CLIP_WORD_END = "</w>"
_SPECIAL_TOKENS = ("!", "<start_of_text>", "<end_of_text>")  # its padding is id 0, which is also a word
_CLIP_NUM_MERGES = 48_894
# CLIP's pattern ignores case: a long s counts as an s after an apostrophe, and an iota below (U+0345), no letter itself
# but the lower case of one, as nothing.
_CLIP_WORDS = r"'[s\x{017f}]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{0345}]+"
_CLIP_REPLACED = (
    (r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]", ""),  # control characters
    (r"[\x{02bc}\x{2018}-\x{201b}]", "'"),  # curly quotes
    (r"[\x{201c}-\x{201f}]", '"'),
)


def clean_as_clip(text: str) -> str:
    """Cleans a text as CLIP does: repaired, HTML entities resolved, whitespace collapsed, lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # elsewhere there is nothing to repair
        import ftfy  # imported when first needed: it takes as long as most commands take to start

        # Resolved twice more, for web text that was escaped twice.
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    return text if text.isascii() else without_surrogates(text)


def build_clip_backend() -> tokenizers.Tokenizer:
    """Makes the CLIP tokenizer: its ids are bytes, bytes that end a word, merges, bos and eos, in this order."""
    asset = importlib.resources.files("opencoca").joinpath("assets/clip_vocab/merges.txt.gz")
    lines = gzip.decompress(asset.read_bytes()).decode("utf-8").splitlines()
    assert len(lines) == _CLIP_NUM_MERGES
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    # Visible bytes represent themselves and come first; the others are represented by characters from U+0100 on.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(code) for code in [*visible, *range(0x100, 0x200 - len(visible))]]
    tokens = [*alphabet, *(char + CLIP_WORD_END for char in alphabet), *(left + right for left, right in merges)]
    vocab = {token: token_id for token_id, token in enumerate([*tokens, *_SPECIAL_TOKENS[1:]])}

    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=CLIP_WORD_END))
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
    # Byte-level decoding reads U+0120 as a space; a plain space represents no byte.
    word_ends = decoders.Replace(CLIP_WORD_END, "\u0120")
    backend.decoder = decoders.Sequence([word_ends, decoders.ByteLevel()])
    return assemble(backend, _SPECIAL_TOKENS)
