"""Turns text into token ids and back; the only place that knows the vocabulary and the special ids.

There are two vocabularies: CLIP's (`Tokenizer.clip`), and one trained on the user's own captions (`train_tokenizer`).
Both are a `tokenizer.json` that the `tokenizers` library reads. The special ids stand in that file (bos and eos in its
post-processor, pad in its padding entry), but not among its added tokens: the library looks for those in the text, and
a caption that spells out "<end>" must not end there. The same holds for the tokens of languages (`<|zh|>`), which a
trained vocabulary may have: the post-processor declares them, and `Tokenizer` puts them behind bos.
"""

from opencoca.tokenizer.languages import LanguageText, language_of, require_language
from opencoca.tokenizer.tokenizer import FILE_NAME, TokenBatch, Tokenizer
from opencoca.tokenizer.training import MAX_VOCAB_SIZE, train_tokenizer

__all__ = [
    "FILE_NAME",
    "MAX_VOCAB_SIZE",
    "LanguageText",
    "TokenBatch",
    "Tokenizer",
    "language_of",
    "require_language",
    "train_tokenizer",
]
