"""What counts as a word when captions of a language are compared: Penn Treebank tokens, characters, or plain words."""

import unicodedata
from typing import Literal

from opencoca.evaluation.ptb_tokenizer import ptb_tokenize

TokenKind = Literal["ptb", "characters", "words"]

_WITHOUT_SPACES = frozenset(["zh", "yue", "ja", "th", "lo", "km", "my", "bo"])
# Their vowels are combining marks, which the Penn Treebank's rules would cut words at.
_WITH_MARKS = frozenset(["hi", "mr", "ne", "sa", "bn", "as", "gu", "pa", "or", "ta", "te", "kn", "ml", "si"])


def token_kind(language: str | None) -> TokenKind:
    """How captions of a language are cut: `ptb` as published figures are; where there are no spaces, `characters`.

    `words` are runs of letters, their marks and digits, for scripts whose vowels are marks. "zh-TW" is as "zh".
    """
    name = (language or "en").replace("_", "-").split("-")[0].lower()
    return "characters" if name in _WITHOUT_SPACES else "words" if name in _WITH_MARKS else "ptb"


def caption_tokens(caption: str, language: str | None = None) -> list[str]:
    """The tokens of a caption that count for BLEU, ROUGE-L and CIDEr-D: lower case, without punctuation."""
    kind = token_kind(language)
    if kind == "ptb":
        return ptb_tokenize(caption)
    text = unicodedata.normalize("NFC", caption.lower())
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text)
    return kept.split() if kind == "words" else list(kept.replace(" ", ""))
