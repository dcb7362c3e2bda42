"""The decoupled text decoder: a unimodal half that never sees the image, a multimodal half that does.

Paper, section 3.1 and figure 2. [CLS] is appended at the end of each text, where the causal order alone gives it the
right view: it sees every real word and itself, and no word sees it.
Letters: B batch, T text positions, S real positions of the batch, D width, V vocabulary, I images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import CoCaConfig
from opencoca.model.kernels.choice import projects_words, trains_on_cpu
from opencoca.model.kernels.image_attention import FoldedImages, SharedImages
from opencoca.model.layers.attention import ImageMemory, LookedAt, NextWords, SeenImages, WordMemory
from opencoca.model.layers.blocks import Dropout, TransformerBlock, make_block, make_norm
from opencoca.model.layers.layout import TextLayout, put_rows, take_rows

# Stands for [CLS] among token ids; no word has it.
_CLS_ID = -1


@dataclass(frozen=True)
class Words:
    """Unimodal states of the words of a batch: states (S, D), packed as the layout says."""

    states: Tensor
    layout: TextLayout

    def padded(self) -> Tensor:
        """(B, T, D), zeros at padding."""
        return self.layout.pad(self.states)


class UnimodalOutput(NamedTuple):
    """words, and the [CLS] vector (B, D) of each text (None where it was not asked for)."""

    words: Words
    cls: Tensor | None


class UnimodalDecoder(nn.Module):
    """Token ids -> word states and a [CLS] vector; causal self-attention only."""

    def __init__(self, model: CoCaConfig):
        super().__init__()
        block, config, compat = model.unimodal_block(), model.text, model.compat
        self.context_length = config.context_length
        self.hidden_id, self.hide_next = compat.text_hidden_id, compat.text_hide_next
        self.cls_after_padding = compat.text_cls_position == "after_padding"
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.cls_embed = nn.Parameter(torch.empty(config.width))
        learned = config.positions == "learned"
        # The last row is [CLS]'s own, wherever the text ends.
        self.pos_embed = nn.Parameter(torch.empty(config.context_length + 1, config.width)) if learned else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(make_block(block) for _ in range(config.unimodal_depth))
        self.norm = make_norm(block)

    def forward(self, token_ids: Tensor, token_mask: Tensor | None = None, with_cls: bool = True) -> UnimodalOutput:
        """token_ids (B, T) integers; token_mask (B, T), True = real (None: all are).

        Raises ValueError if T is more than context_length.
        """
        if token_ids.shape[1] > self.context_length:
            raise ValueError(f"texts of {token_ids.shape[1]} tokens do not fit context_length {self.context_length}")
        mask = torch.ones_like(token_ids, dtype=torch.bool) if token_mask is None else token_mask.bool()
        if not with_cls:
            layout, ids = TextLayout.from_mask(mask), token_ids[mask]
            states = self._run(self.embed(ids, layout.positions), self._hide(layout, ids))
            return UnimodalOutput(Words(states, layout), None)
        if not self.hide_next:
            return self._words_and_cls(token_ids, mask)
        # [CLS] looks at one padding position behind the words: it is computed like a word and then left out.
        has_room = mask.sum(dim=1, keepdim=True) < self.context_length
        padded_ids = F.pad(token_ids, (0, 1), value=self.hidden_id)
        padded_mask = torch.cat((mask, has_room), dim=1)
        words, cls = self._words_and_cls(padded_ids, padded_mask)
        kept = F.pad(torch.ones_like(mask), (0, 1))[padded_mask].nonzero().squeeze(1)
        return UnimodalOutput(Words(take_rows(words.states, kept), TextLayout.from_mask(mask)), cls)

    def _words_and_cls(self, token_ids: Tensor, mask: Tensor) -> UnimodalOutput:
        layout, ids = TextLayout.from_mask(mask), token_ids[mask]
        with_cls_layout = TextLayout.from_mask(F.pad(mask, (0, 1), value=True))
        # Packed rows are the words of a text and then its [CLS]: the running count of lengths says where each stands.
        cls_rows = (mask.sum(dim=1) + 1).cumsum(dim=0) - 1
        is_word = torch.ones(ids.shape[0] + mask.shape[0], dtype=torch.bool, device=ids.device)
        is_word[cls_rows] = False
        if self.cls_after_padding:
            positions = with_cls_layout.positions.masked_fill(~is_word, mask.shape[1])
            with_cls_layout = replace(with_cls_layout, positions=positions)
        word_rows = is_word.nonzero().squeeze(1)
        if self.hidden_id is not None:
            ids_and_cls = ids.new_full(is_word.shape, _CLS_ID)
            ids_and_cls[word_rows] = ids
            with_cls_layout = self._hide(with_cls_layout, ids_and_cls)
        words = self.embed(ids, layout.positions)
        cls = self.cls_embed if self.pos_embed is None else self.cls_embed + self.pos_embed[-1]
        cls = self.dropout(cls.to(words.dtype).expand(mask.shape[0], -1))
        x = put_rows(words, word_rows, is_word.shape[0]) + put_rows(cls, cls_rows, is_word.shape[0])
        x = self._run(x, with_cls_layout)
        return UnimodalOutput(Words(take_rows(x, word_rows), layout), self.norm(take_rows(x, cls_rows)))

    def step(self, x: Tensor, memories: Sequence[WordMemory], words: NextWords) -> Tensor:
        """x (R x T, D), embedded: the next words of texts -> their states (R x T, D); each block has its memory."""
        for block, memory in zip(self.blocks, memories, strict=True):
            x = block.step(x, memory, words)  # pyright: ignore[reportCallIssue]
        return x

    def embed_words_and_cls(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids, positions (B, T) -> (B x T, D) for the blocks; the last of each text is [CLS], of any id."""
        positions = torch.cat((positions[:, :-1], torch.zeros_like(positions[:, -1:])), dim=1)
        words = self.embed(token_ids, positions)
        cls = self.cls_embed if self.pos_embed is None else self.cls_embed + self.pos_embed[-1]
        words[:, -1] = cls.to(words.dtype)
        return words.flatten(0, 1)

    def _hide(self, layout: TextLayout, ids: Tensor) -> TextLayout:
        """The layout for attention over ids (S,), without what `hidden_id` hides."""
        if self.hidden_id is None or not bool((ids == self.hidden_id).any()):
            return layout
        visible = layout.pad(ids) != self.hidden_id
        if self.hide_next:
            visible = visible.roll(1, dims=1)
        visible[:, 0] = True
        return replace(layout, visible=visible)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Words (S,) at these positions (S,) of their texts -> what the first block takes, (S, D)."""
        x = self.token_embed(ids)
        if self.pos_embed is not None:
            x = x + self.pos_embed[positions]
        return self.dropout(_to_compute_dtype(x))

    def _run(self, x: Tensor, layout: TextLayout) -> Tensor:
        for block in self.blocks:
            x = block.self_attend(x, layout)  # pyright: ignore[reportCallIssue]
        return x


class MultimodalLayer(nn.Module):
    """Causal self-attention over the words, then cross-attention to the image; `Compat` may add an MLP between them."""

    def __init__(self, config: CoCaConfig):
        super().__init__()
        block = config.multimodal_block()
        self.self_block = make_block(block, has_mlp=config.compat.text_self_attn_mlp)
        self.cross_block = make_block(block, config.text.width)

    def forward(self, x: Tensor, images: LookedAt, layout: TextLayout) -> Tensor:
        x = self.self_block.self_attend(x, layout)
        return self.cross_block.cross_attend(x, images)


class MultimodalDecoder(nn.Module):
    """Word states and image tokens -> hidden states that predict the next word."""

    def __init__(self, config: CoCaConfig):
        super().__init__()
        self.layers = nn.ModuleList(MultimodalLayer(config) for _ in range(config.text.multimodal_depth))
        self.norm = make_norm(config.multimodal_block())

    def project_image(self, image_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """image_tokens (I, Q, D) -> keys and values of every layer."""
        return [block.project_context(image_tokens) for block in self._cross_blocks()]

    def fold_image(self, image_tokens: Tensor, words_per_image: int) -> list[FoldedImages] | None:
        """image_tokens (I, Q, D) -> what every layer looks at in place of keys and values, without gradient.

        None where keys and values are no dearer for so many words an image, and on devices other than a CPU.
        """
        blocks, tokens = self._cross_blocks(), image_tokens
        if not tokens.is_cpu or torch.is_autocast_enabled("cpu"):
            return None
        for attn in (block.attn for block in blocks):
            is_cheaper = projects_words(words_per_image, tokens.shape[1], attn.num_heads, attn.head_dim, attn.kv_proj)
            if attn.kv_proj.weight.dtype != tokens.dtype or not is_cheaper:
                return None
        norm = blocks[0].norm_context
        if isinstance(norm, nn.LayerNorm):
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps)
        return [
            FoldedImages.of(tokens, attn.kv_proj, block.norm_context, attn.num_heads, attn.num_kv_heads)
            for block in blocks
            for attn in (block.attn,)
        ]

    def _cross_blocks(self) -> list[TransformerBlock]:
        return [layer.cross_block for layer in self.layers]  # pyright: ignore[reportReturnType]

    def look_at(self, words: Words, image_tokens: Tensor) -> Tensor:
        """words of B texts, image_tokens (I, Q, D) -> hidden (S, D): `forward` over the images, in the cheaper form."""
        group, rest = divmod(words.layout.batch_size, max(1, image_tokens.shape[0]))
        cross: TransformerBlock = self.layers[0].cross_block  # pyright: ignore[reportAssignmentType]
        attn, words_per_image = cross.attn, words.states.shape[0] / max(1, image_tokens.shape[0])
        sizes = image_tokens.shape[1], attn.num_heads, attn.head_dim
        if rest or not trains_on_cpu(words.states) or not projects_words(words_per_image, *sizes, attn.kv_proj):
            return self(words, self.project_image(image_tokens))
        tokens = _to_compute_dtype(image_tokens)
        images = SharedImages.of(tokens, words.layout.words_per_image(group), attn.num_heads, cross.norm_context)
        x = words.states
        for layer in self.layers:
            x = layer(x, layer.cross_block.look_at(images), words.layout)  # pyright: ignore
        return self.norm(x)

    def forward(self, words: Words, images: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """words of B texts over I images (text row r looks at image r // (B / I)) -> hidden (S, D), packed.

        Raises ValueError if B is not a multiple of I.
        """
        num_texts, num_images = words.layout.batch_size, images[0][0].shape[0]
        if num_texts % num_images:
            raise ValueError(f"{num_texts} texts cannot be shared out evenly among {num_images} images")
        x = words.states
        for layer, keys_values in zip(self.layers, images, strict=True):
            x = layer(x, SeenImages(*keys_values, words.layout), words.layout)
        return self.norm(x)

    def step(
        self, x: Tensor, memories: Sequence[WordMemory], images: Sequence[ImageMemory], words: NextWords
    ) -> Tensor:
        """x (R x T, D): states of the next words -> hidden (R x T, D); each layer has its two memories."""
        for layer, memory, image in zip(self.layers, memories, images, strict=True):
            x = layer.self_block.step(x, memory, words)  # pyright: ignore
            x = layer.cross_block.step_across(x, image)  # pyright: ignore
        return self.norm(x)


def _to_compute_dtype(x: Tensor) -> Tensor:
    # Under autocast the residual stream is kept in the low precision too: half the memory traffic of the packed words.
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
