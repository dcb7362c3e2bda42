"""How weights of other projects, as `Compat` describes them, see texts: hidden ids, and other places of [CLS]."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.model.config import CoCaConfig, Compat
from opencoca.model.layers.layout import PackedTexts, TextLayout, TextPacker, pack_texts

# Stands for [CLS] among token ids; no word has it.
_CLS_ID = -1


def make_text_packer(model: CoCaConfig) -> TextPacker:
    """How the texts of this model are packed."""
    compat = model.compat
    is_plain = compat.text_hidden_id is None and compat.text_cls_position == "after_last_word"
    return pack_texts if is_plain else partial(_pack_foreign_texts, compat, model.text.context_length)


def _pack_foreign_texts(
    compat: Compat, context_length: int, token_ids: Tensor, mask: Tensor, with_cls: bool
) -> PackedTexts:
    """`pack_texts` with what `Compat` changes."""
    words = None
    if with_cls and compat.text_hide_next:
        # [CLS] looks at one padding position behind the words: it is computed like a word and then left out.
        words, real = TextLayout.of(mask.sum(dim=1)), mask
        has_room = mask.sum(dim=1, keepdim=True) < context_length
        token_ids = F.pad(token_ids, (0, 1), value=compat.text_hidden_id)
        mask = torch.cat((mask, has_room), dim=1)
    texts = pack_texts(token_ids, mask, with_cls)
    if words is not None:
        kept = F.pad(real, (0, 1))[mask].nonzero().squeeze(1)
        texts = texts._replace(words=words, word_rows=texts.rows[kept])
    layout = replace(texts.layout, hidden=_hidden(texts, compat))
    if with_cls and compat.text_cls_position == "after_padding":
        layout = replace(layout, positions=layout.positions.index_fill(0, texts.cls_rows, mask.shape[1]))
    return texts._replace(layout=layout)


def _hidden(texts: PackedTexts, compat: Compat) -> Tensor | None:
    """(S,): which of the positions attention does not see; None = it sees all."""
    hidden_id = compat.text_hidden_id
    if hidden_id is None or not bool((texts.ids == hidden_id).any()):
        return None
    ids = texts.ids.new_full(texts.layout.positions.shape, _CLS_ID).index_copy_(0, texts.rows, texts.ids)
    hidden = ids == hidden_id
    return (hidden.roll(1) if compat.text_hide_next else hidden) & (texts.layout.positions > 0)
