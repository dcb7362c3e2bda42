"""How weights of other projects, as `Compat` describes them, see texts: hidden ids, and other places of [CLS]."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.model.config import CoCaConfig
from opencoca.model.layers.layout import PackedTexts, TextLayout, TextPacker, pack_texts

# Stands for [CLS] among token ids; no word has it.
_CLS_ID = -1


class _ForeignTexts:
    """`pack_texts` with what the configuration's `Compat` changes."""

    def __init__(self, model: CoCaConfig):
        compat = model.compat
        self.context_length = model.text.context_length
        self.hidden_id, self.hide_next = compat.text_hidden_id, compat.text_hide_next
        self.cls_after_padding = compat.text_cls_position == "after_padding"

    def __call__(self, token_ids: Tensor, mask: Tensor, with_cls: bool) -> PackedTexts:
        words = None
        if with_cls and self.hide_next:
            # [CLS] looks at one padding position behind the words: it is computed like a word and then left out.
            words, real = TextLayout.of(mask.sum(dim=1)), mask
            has_room = mask.sum(dim=1, keepdim=True) < self.context_length
            token_ids = F.pad(token_ids, (0, 1), value=self.hidden_id)
            mask = torch.cat((mask, has_room), dim=1)
        texts = pack_texts(token_ids, mask, with_cls)
        if words is not None:
            kept = F.pad(real, (0, 1))[mask].nonzero().squeeze(1)
            texts = texts._replace(words=words, word_rows=texts.rows[kept])
        layout = replace(texts.layout, hidden=self._hidden(texts))
        if with_cls and self.cls_after_padding:
            layout = replace(layout, positions=layout.positions.index_fill(0, texts.cls_rows, mask.shape[1]))
        return texts._replace(layout=layout)

    def _hidden(self, texts: PackedTexts) -> Tensor | None:
        """(S,): which of the positions attention does not see; None = it sees all."""
        if self.hidden_id is None or not bool((texts.ids == self.hidden_id).any()):
            return None
        ids = texts.ids.new_full(texts.layout.positions.shape, _CLS_ID).index_copy_(0, texts.rows, texts.ids)
        hidden = ids == self.hidden_id
        return (hidden.roll(1) if self.hide_next else hidden) & (texts.layout.positions > 0)


def make_text_packer(model: CoCaConfig) -> TextPacker:
    """How the texts of this model are packed."""
    compat = model.compat
    is_plain = compat.text_hidden_id is None and compat.text_cls_position == "after_last_word"
    return pack_texts if is_plain else _ForeignTexts(model)
