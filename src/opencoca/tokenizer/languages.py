"""Languages of texts: what they are called ("zh"), the token that stands for one (`<|zh|>`), texts that know theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_LANGUAGES = 200
_NAME = re.compile(r"[A-Za-z0-9]{2,8}(?:[-_][A-Za-z0-9]{1,8}){0,3}")


class LanguageText(str):
    """A text that knows the language that it is in; a tokenizer puts the language's token before it.

    It is a string like any other. What is made of it (`strip`, slices) is a plain string, which has no language.
    """

    __slots__ = ("language",)
    language: str

    def __new__(cls, text: str, language: str) -> LanguageText:
        made = super().__new__(cls, text)
        made.language = language
        return made

    def __getnewargs__(self) -> tuple[str, str]:
        return str(self), self.language

    def __repr__(self) -> str:
        return f"LanguageText({super().__repr__()}, {self.language!r})"


def language_of(text: str) -> str | None:
    """The language that a text knows it is in; None for a plain string."""
    return text.language if isinstance(text, LanguageText) else None


def texts_in(texts: Sequence[str], language: str | None) -> tuple[str, ...]:
    """The texts that are in a language or do not know theirs; all if it is None."""
    return tuple(text for text in texts if language is None or language_of(text) in (None, language))


def language_token(language: str) -> str:
    return f"<|{language}|>"


def language_of_token(token: str) -> str | None:
    """The language that a special token stands for; None for one of another form."""
    name = token.removeprefix("<|").removesuffix("|>")
    return name if token == language_token(name) and _NAME.fullmatch(name) else None


def check_languages(languages: Sequence[str]) -> None:
    """Raises ValueError unless these are different names such as "zh" or "pt-BR", at most 200."""
    if isinstance(languages, str):
        raise ValueError(f"languages is the single text {languages[:40]!r}; give a list, such as ['en', 'zh']")
    for language in languages:
        if not isinstance(language, str) or not _NAME.fullmatch(language):
            raise ValueError(f"the language {language!r} is no name of one; use codes such as en, zh or pt-BR")
        if languages.count(language) > 1:
            raise ValueError(f"the language {language!r} is given more than once")
    if len(languages) > MAX_LANGUAGES:
        raise ValueError(f"there are {len(languages)} languages; a vocabulary has room for {MAX_LANGUAGES}")


def require_language(language: str, known: Sequence[str]) -> str:
    """Returns the language if it is a known one; raises ValueError, which names those, if not."""
    if not known:
        raise ValueError(f"the model knows no languages, so {language!r} cannot be chosen; leave the language out")
    if language not in known:
        raise ValueError(f"there is no language {language!r} here; known languages: {', '.join(known)}")
    return language
