"""Which languages captions are in: what a table's column says, or one for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from opencoca.system.messages import shown
from opencoca.tokenizer.languages import LanguageText


@dataclass(frozen=True)
class CaptionLanguages:
    """Where the languages of captions come from; without column and language, captions know none.

    column: of tables, that names each row's language.
    language: of the rows that are read where there is such a column; of all captions where there is none.
    known: those that may occur; None: any.
    column_must_be: whether tables without the column are an error.
    """

    column: str | None = None
    language: str | None = None
    known: Sequence[str] | None = None
    column_must_be: bool = True

    def __post_init__(self) -> None:
        if self.language is not None:
            self._check(self.language, "the language of captions")

    def of_row(self, cell: Any, where: str) -> str | None:
        """The language that a row's cell names; None for a row that is not read.

        Raises ValueError, which names row and value, for a cell without a language, or with one that is not known.
        """
        language = cell.strip() if isinstance(cell, str) else cell
        if not language or not isinstance(language, str):
            raise ValueError(f"{where} has no language in its column {shown(self.column)}, but {shown(cell, 40)}")
        if self.language is not None:
            return language if language == self.language else None
        self._check(language, f"{where}: the column {shown(self.column)}")
        return language

    def _check(self, language: str, where: str) -> None:
        if self.known is not None and language not in self.known:
            known = ", ".join(self.known) or "none"
            raise ValueError(f"{where} names the unknown language {shown(language, 40)}; known languages: {known}")


NO_LANGUAGES = CaptionLanguages()


def in_language(texts: Iterable[str], language: str | None) -> list[str]:
    """The texts, which know that they are in this language; None: as they are. Blank ones stay blank."""
    return list(texts) if language is None else [LanguageText(text, language) for text in texts]
