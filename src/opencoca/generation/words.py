"""Words that captions must not or must contain, however a vocabulary splits them into tokens.

Words and texts are compared as what their tokens spell out: in a trained vocabulary a word begins with the stand-in
of a space, in CLIP's its last token has an end-of-word mark.
Letters: R texts in work, T tokens of each, V vocabulary.
"""

import json
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from opencoca.tokenizer import Tokenizer

_SPACE = "\u0120"  # byte-level vocabularies write a space so


class Spelling:
    """What the tokens of a vocabulary spell out.

    word_end: the mark at the end of a word, "" if words begin with a space instead.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        model = json.loads(tokenizer.to_json())["model"]
        self.word_end: str = model.get("end_of_word_suffix") or ""
        self.tokens = [""] * tokenizer.vocab_size
        vocab = model["vocab"]
        if isinstance(vocab, list):  # Unigram's has pairs of token and score, in the order of the ids
            vocab = {token: token_id for token_id, (token, _) in enumerate(vocab)}
        for token, token_id in vocab.items():
            self.tokens[token_id] = token
        # Padding of CLIP's is a word, too.
        for special in {*tokenizer.ids_without_text, tokenizer.eos_id} - {tokenizer.pad_id}:
            self.tokens[special] = ""
        self.id_of = {token: token_id for token_id, token in enumerate(self.tokens) if token}

    def spell(self, token_ids: Sequence[int]) -> str:
        return "".join(self.tokens[token_id] for token_id in token_ids)

    def token_ids(self, word: str, name: str) -> list[int]:
        """The tokens of a word or phrase. Raises ValueError if there are none."""
        ids = self.tokenizer.encode(word.strip())[self.tokenizer.prompt_length : -1]
        if not ids:
            raise ValueError(f"{name} has {word!r}, of which the model's vocabulary keeps nothing; leave it out")
        return ids

    def at_word_start(self, text: str) -> bool:
        """Whether a word may follow without becoming part of the one before it."""
        return not self.word_end or not text or text.endswith(self.word_end)

    def continues_word(self, token: str) -> bool:
        """Whether a token, spelled out, makes a word longer that stands before it."""
        return not self.word_end and bool(token) and token[0] != _SPACE and token[0].isalnum()

    def contains(self, text: str, word: str) -> bool:
        """Whether a text has this word, whole; both spelled out."""
        start = text.find(word)
        while start >= 0:
            rest = text[start + len(word) :]
            if not self.continues_word(rest) and self.at_word_start(text[:start]):
                return True
            start = text.find(word, start + 1)
        return False


@lru_cache(maxsize=4)
def _spelling(tokenizer: Tokenizer) -> Spelling:
    return Spelling(tokenizer)


class ForbidWords:
    """Forbids these words or phrases, however they are split into tokens.

    In a trained vocabulary this also forbids longer words that would be written as the forbidden one and more tokens.
    """

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer):
        self.spelling = _spelling(tokenizer)
        self.endings: list[tuple[str, int]] = []
        for word in words:
            for variant in {word, word.lower(), word.capitalize(), word.upper()}:
                spelled = self.spelling.spell(self.spelling.token_ids(variant, "forbidden_words"))
                for cut in range(len(spelled)):
                    # The text ends with the first part, and one token would be the other.
                    token_id = self.spelling.id_of.get(spelled[cut:])
                    if token_id is not None:
                        self.endings.append((spelled[:cut], token_id))

    def __call__(self, log_probs: Tensor, token_ids: Tensor) -> None:
        rows, columns = [], []
        for row, ids in enumerate(token_ids.tolist()):
            text = self.spelling.spell(ids)
            for begin, token_id in self.endings:
                if text.endswith(begin) and self.spelling.at_word_start(text[: len(text) - len(begin)]):
                    rows.append(row)
                    columns.append(token_id)
        if rows:
            log_probs[rows, columns] = -torch.inf


class RequireWords:
    """Requires all of these words or phrases: no text ends without them, and nothing else comes when room runs out."""

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer, prompt_length: int, max_length: int):
        self.spelling = _spelling(tokenizer)
        self.eos_id = tokenizer.eos_id
        self.prompt_length, self.max_length = prompt_length, max_length
        self.sequences = [self.spelling.token_ids(word, "required_words") for word in words]
        self.spelled = [self.spelling.spell(ids) for ids in self.sequences]
        self.ending = tuple(self.spelled)
        # A text may stand in the middle of a word when room runs out: one token more ends it.
        self.slack = 1 + bool(self.spelling.word_end)
        needed = sum(map(len, self.sequences)) + self.slack
        if needed > max_length - prompt_length:
            raise ValueError(
                f"required_words {', '.join(map(repr, words))} take up to {needed} tokens, but max_new_tokens and the "
                f"model's context leave {max_length - prompt_length}; raise max_new_tokens or require fewer words"
            )
        tokens = list(enumerate(self.spelling.tokens))
        mark = self.spelling.word_end
        self.word_ends = torch.tensor([token_id for token_id, token in tokens if mark and token.endswith(mark)])
        self.continuing = torch.tensor([token_id for token_id, token in tokens if self.spelling.continues_word(token)])

    def unmet(self, ids: list[int]) -> list[tuple[list[int], int]]:
        """The words that a text, prompt included, lacks: their tokens, and how many of these it ends with."""
        text = self.spelling.spell(ids)
        found = []
        for sequence, spelled in zip(self.sequences, self.spelled, strict=True):
            if self.spelling.contains(text, spelled):
                continue
            begun = max((k for k in range(1, len(sequence)) if ids[-k:] == sequence[:k]), default=0)
            found.append((sequence, begun))
        return found

    @staticmethod
    def missing(unmet: list[tuple[list[int], int]]) -> int:
        """How many tokens are missing; if several words are begun, only one of them can go on."""
        return sum(len(sequence) for sequence, _ in unmet) - max((begun for _, begun in unmet), default=0)

    def next_tokens(self, ids: list[int]) -> list[int]:
        """The tokens that bring a text nearer to having all words."""
        unmet = self.unmet(ids)
        if begun := [sequence[count] for sequence, count in unmet if count]:
            return begun
        return [sequence[0] for sequence, _ in unmet] if self.spelling.at_word_start(self.spelling.spell(ids)) else []

    def __call__(self, log_probs: Tensor, token_ids: Tensor) -> None:
        room = self.max_length - token_ids.shape[1]
        for row, ids in enumerate(token_ids.tolist()):
            if self.eos_id in ids:
                continue
            unmet = self.unmet(ids)
            if self.continuing.numel() and self.spelling.spell(ids).endswith(self.ending):
                # "dog" would become "doggedly", and be missing again.
                log_probs[row, self.continuing.to(log_probs.device)] = -torch.inf
            if not unmet:
                continue
            log_probs[row, self.eos_id] = -torch.inf
            if room <= self.missing(unmet) + self.slack:
                allowed = self.next_tokens(ids)
                index = torch.tensor(allowed) if allowed else self.word_ends
                index = index.to(log_probs.device)
                kept = log_probs[row, index]
                log_probs[row] = -torch.inf
                # A word that is necessary comes even if an earlier filter forbids it.
                log_probs[row, index] = kept.clamp(min=torch.finfo(kept.dtype).min / 1e6)
