"""What both vocabularies share: the texts that they take, special tokens, and how a text is framed by them.

`Tokenizer` checks the form when it reads a file.
"""

import re
from collections.abc import Sequence

import tokenizers
from tokenizers import processors

from opencoca.tokenizer.languages import language_token

SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")
_SURROGATE_PAIR, _SURROGATE = re.compile("[\ud800-\udbff][\udc00-\udfff]"), re.compile("[\ud800-\udfff]")


def assemble(
    parts: tokenizers.Tokenizer, special_tokens: tuple[str, str, str], languages: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """Makes a tokenizer of the same parts that frames texts by bos and eos, declares pad, and has no added tokens.

    languages: whose tokens the post-processor declares, too, without using them.
    """
    backend = tokenizers.Tokenizer(parts.model)
    backend.normalizer = parts.normalizer
    backend.pre_tokenizer = parts.pre_tokenizer
    backend.decoder = parts.decoder
    pad, bos, eos = special_tokens
    of_languages = [language_token(language) for language in languages]
    ids = {token: backend.token_to_id(token) for token in (*special_tokens, *of_languages)}
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(token, ids[token]) for token in (bos, eos, *of_languages)]
    )
    backend.enable_padding(pad_id=ids[pad], pad_token=pad)
    return backend


def require_text(text: object, position: int) -> str:
    """Returns `text` as a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"text number {position} is {text!r}, not a string; remove it or fill it in")
    return without_surrogates(text)


def without_surrogates(text: str) -> str:
    """Replaces surrogates, which JSON may hold: pairs by the characters that they encode, others by U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        paired = _SURROGATE_PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
        return _SURROGATE.sub("\ufffd", paired)
