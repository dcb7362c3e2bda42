"""Text embeddings of captions from the states that decoding has computed: a few positions of each text are missing.

Letters: C cache rows, P texts of a row, B = C P texts, T closing words of each, N cache entries, E embed_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opencoca.data.captions import collate_captions
from opencoca.generation.decoding.state import DecodingState, hidden_words
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.model.layers.attention import NextWords


def embed_decoded(
    model: CoCa, state: DecodingState, rows: Tensor, seen: Tensor, texts: Sequence[Sequence[int]], eos_id: int
) -> Tensor:
    """text_embed (C, P, E) of texts whose words, all but the last, are in the caches; the state stays as it is.

    rows (C,): the cache rows; seen (C, P, N): which of their entries hold each text's words; texts: the token ids
    of all C x P texts. One that has no end token is closed by one, in place of its last word if there is no room.
    Computes the last word, the end token and [CLS] of each text, in the unimodal half alone.
    """
    num_rows, per_row, _ = seen.shape
    closing = _Closing.of(texts, eos_id, model.config, seen.device)
    entries, num_slots = state.num_entries, closing.token_ids.shape[1]
    extra = per_row * num_slots
    # A text sees its own words, and of its closing words those before it that are there.
    in_cache = seen[:, :, :entries]
    if state.hidden is not None:
        in_cache = in_cache & ~state.hidden[rows, None, :entries]
    before = torch.ones(num_slots, num_slots, dtype=torch.bool, device=seen.device).tril()
    itself = torch.eye(num_slots, dtype=torch.bool, device=seen.device)
    in_closing = (before & closing.visible[:, None]) | (itself & ~closing.used[:, :, None])
    same_text = torch.eye(per_row, dtype=torch.bool, device=seen.device)
    in_closing = in_closing.view(num_rows, per_row, num_slots, 1, num_slots) & same_text[:, None, :, None]
    visible = torch.cat((in_cache.repeat_interleave(num_slots, dim=1), in_closing.reshape(num_rows, extra, -1)), dim=2)
    words = NextWords(closing.positions.flatten(), slice(entries, entries + extra), visible)
    branches = [cache.branch(rows, entries, extra) for cache in state.unimodal]
    embeds = model.embed_last(closing.token_ids, words, branches, closing.whole, closing.whole_mask)
    return embeds.unflatten(0, (num_rows, per_row))


@dataclass(frozen=True)
class _Closing:
    """The words that follow the cached words of each text, (B, T) each, T = 3 or 4: a last word, the end token, what
    `Compat.text_hide_next` puts behind it, [CLS] (any id). used: whether there is such a word; visible: whether
    attention sees it. whole, whole_mask (B, L): all words of each text, and the end token."""

    token_ids: Tensor
    positions: Tensor
    used: Tensor
    visible: Tensor
    whole: Tensor
    whole_mask: Tensor

    @staticmethod
    def of(texts: Sequence[Sequence[int]], eos_id: int, config: CoCaConfig, device: torch.device) -> "_Closing":
        context_length, compat = config.text.context_length, config.compat
        ids, places, used, before, wholes = [], [], [], [], []
        for text in texts:
            body = [*text[:-1]] if text[-1] == eos_id else [*text][: context_length - 1]
            wholes.append([*body, eos_id])
            num_cached = len(text) - 1
            extra = len(body) > num_cached
            has_room = compat.text_hide_next and len(body) + 1 < context_length
            pad = compat.text_hidden_id if compat.text_hidden_id is not None else eos_id
            end = len(body)
            ids.append([body[-1] if extra else eos_id, eos_id, pad, eos_id])
            places.append([end - 1 if extra else end, end, end + has_room, end + 1 + has_room])
            used.append([extra, True, has_room, True])
            before.append([body[num_cached - 1] if extra else eos_id, body[-1], eos_id, pad if has_room else eos_id])
        # The third is there for text_hide_next only.
        kept = [0, 1, 2, 3] if compat.text_hide_next else [0, 1, 3]
        token_ids, positions, is_used, previous = (
            torch.tensor(x, device=device)[:, kept] for x in (ids, places, used, before)
        )
        visible = is_used
        if compat.text_hidden_id is not None:
            visible = is_used & ~hidden_words(compat, token_ids, previous)
        whole, whole_mask = (part.to(device) for part in collate_captions(wholes, eos_id))
        return _Closing(token_ids, positions, is_used, visible, whole, whole_mask)
