"""The one owner of the vocabulary and of the special ids: text to token ids and back.

Two vocabularies exist: CLIP's (`Tokenizer.clip`), and one trained on the user's own captions (`train_tokenizer`).
Both are a `tokenizer.json` of the `tokenizers` library that any of its readers opens. The special ids stand in that
file (bos and eos in its post-processor, pad in its padding entry) but not among its added tokens: those are looked
for in the text, and a caption that spells out "<end>" must never become the end of a caption.
"""

from opencoca.tokenizer.tokenizer import FILE_NAME, TokenBatch, Tokenizer
from opencoca.tokenizer.training import MAX_VOCAB_SIZE, train_tokenizer

__all__ = ["FILE_NAME", "MAX_VOCAB_SIZE", "TokenBatch", "Tokenizer", "train_tokenizer"]
