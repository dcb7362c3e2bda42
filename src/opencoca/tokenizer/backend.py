"""What both vocabularies share: special tokens, and how a text is framed by them.

`Tokenizer` checks the form when it reads a file.
"""

import tokenizers
from tokenizers import processors

SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")
CLIP_SPECIAL_TOKENS = ("!", "<start_of_text>", "<end_of_text>")  # its padding is id 0, which is also a word


def assemble(parts: tokenizers.Tokenizer, special_tokens: tuple[str, str, str]) -> tokenizers.Tokenizer:
    """Makes a tokenizer of the same parts that frames texts by bos and eos, declares pad, and has no added tokens."""
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
