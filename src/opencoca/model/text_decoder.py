"""The decoupled text decoder: a unimodal half that never sees the image, a multimodal half that does.

Paper, section 3.1 and figure 2. [CLS] is appended at the end of each text, where the causal order alone gives it the
right view: it sees every real word and itself, and no word sees it.
Letters: B batch, T text positions, S real positions of the batch, D width, V vocabulary, I images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import CoCaConfig
from opencoca.model.kernels.choice import CAUSAL, projects_words, trains_on_cpu
from opencoca.model.kernels.dropout import Dropout
from opencoca.model.kernels.image_attention import FoldedImages, SharedImages
from opencoca.model.kernels.packed_attention import PutRows, TakeRows
from opencoca.model.layers.attention import CachedWords, LookedAt, NextWords, SeenImages, SeenTokens, WordMemory
from opencoca.model.layers.blocks import make_block, make_norm
from opencoca.model.layers.foreign_texts import make_text_packer
from opencoca.model.layers.layout import TextLayout


@dataclass(frozen=True)
class Words:
    """Unimodal states of the words of a batch: states (S, D), packed as the layout says."""

    states: Tensor
    layout: TextLayout

    def padded(self) -> Tensor:
        """(B, T, D), zeros at padding."""
        return self.layout.pad(self.states)

    def with_next(self, ids: Tensor) -> tuple["Words", Tensor]:
        """All words but the last of each text, and the next word's id of each; ids (S,) of all words."""
        layout = self.layout
        is_first = layout.positions == 0
        kept = torch.cat((~is_first[1:], is_first.new_zeros(1))).nonzero().squeeze(1)
        slots = kept if layout.slots is None else layout.slots[kept]
        lengths = (layout.lengths - 1).clamp(min=0)
        rest = TextLayout(layout.batch_size, layout.length, lengths, layout.positions[kept], slots)
        return Words(TakeRows.apply(self.states, kept), rest), ids[kept + 1]


class UnimodalOutput(NamedTuple):
    """words, and the [CLS] vector (B, D) of each text (None where it was not asked for)."""

    words: Words
    cls: Tensor | None


class UnimodalDecoder(nn.Module):
    """Token ids -> word states and a [CLS] vector; causal self-attention only."""

    def __init__(self, model: CoCaConfig):
        super().__init__()
        block, config = model.unimodal_block(), model.text
        self.context_length = config.context_length
        self.pack = make_text_packer(model)
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
        texts = self.pack(token_ids, mask, with_cls)
        layout = texts.layout
        x = self.embed(texts.ids, layout.positions[texts.rows])
        if with_cls:
            cls = self.dropout(self.cls_vector().to(x.dtype).expand(layout.batch_size, -1))
            num_rows = len(layout.positions)
            x = PutRows.apply(x, texts.rows, num_rows) + PutRows.apply(cls, texts.cls_rows, num_rows)
        for block in self.blocks:
            x = block(x, layout, CAUSAL)
        if not with_cls:
            return UnimodalOutput(Words(x, texts.words), None)
        words = Words(TakeRows.apply(x, texts.word_rows), texts.words)
        return UnimodalOutput(words, self.norm(TakeRows.apply(x, texts.cls_rows)))

    def cls_vector(self) -> Tensor:
        """(D,): what the first block takes as [CLS]."""
        return self.cls_embed if self.pos_embed is None else self.cls_embed + self.pos_embed[-1]

    def step(self, x: Tensor, memories: Sequence[WordMemory], words: NextWords) -> Tensor:
        """x (R x T, D), embedded: the next words of texts -> their states (R x T, D); each block has its memory."""
        for block, memory in zip(self.blocks, memories, strict=True):
            x = block(x, CachedWords(memory, words))
        return x

    def embed_words_and_cls(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids, positions (B, T) -> (B x T, D) for the blocks; the last of each text is [CLS], of any id."""
        positions = torch.cat((positions[:, :-1], torch.zeros_like(positions[:, -1:])), dim=1)
        words = self.embed(token_ids, positions)
        words[:, -1] = self.cls_vector().to(words.dtype)
        return words.flatten(0, 1)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Words (S,) at these positions (S,) of their texts -> what the first block takes, (S, D)."""
        x = self.token_embed(ids)
        if self.pos_embed is not None:
            x = x + self.pos_embed[positions]
        return self.dropout(_to_compute_dtype(x))


class MultimodalLayer(nn.Module):
    """Causal self-attention over the words, then cross-attention to the image; `Compat` may add an MLP between them."""

    def __init__(self, config: CoCaConfig):
        super().__init__()
        block = config.multimodal_block()
        self.self_block = make_block(block, has_mlp=config.compat.text_self_attn_mlp)
        self.cross_block = make_block(block, config.text.width)

    def forward(self, x: Tensor, words: TextLayout | CachedWords, images: LookedAt) -> Tensor:
        return self.cross_block(self.self_block(x, words, CAUSAL), images)


class MultimodalDecoder(nn.Module):
    """Word states and image tokens -> hidden states that predict the next word."""

    def __init__(self, config: CoCaConfig):
        super().__init__()
        layers = nn.ModuleList(MultimodalLayer(config) for _ in range(config.text.multimodal_depth))
        self.layers: Sequence[MultimodalLayer] = layers  # pyright: ignore[reportAttributeAccessIssue]
        self.norm = make_norm(config.multimodal_block())

    def forward(self, x: Tensor, words: TextLayout | Sequence[CachedWords], images: Sequence[LookedAt]) -> Tensor:
        """x (S, D): states of packed words -> hidden (S, D).

        words: where they stand, or what each layer keeps of the words before them; images: what each layer looks at.
        """
        own_words = [words] * len(images) if isinstance(words, TextLayout) else words
        for layer, own, image in zip(self.layers, own_words, images, strict=True):
            x = layer(x, own, image)
        return self.norm(x)

    def look_at(self, words: Words, image_tokens: Tensor) -> list[LookedAt]:
        """What each layer looks at: the images in the form that is cheaper for words of B texts.

        image_tokens (I, Q, D): text row r looks at image r // (B / I). Raises ValueError if B is no multiple of I.
        """
        layout, num_images = words.layout, max(1, image_tokens.shape[0])
        if layout.batch_size % num_images:
            raise ValueError(f"{layout.batch_size} texts cannot be shared out evenly among {num_images} images")
        attn, norm = self.layers[0].cross_block.attn, self.layers[0].cross_block.norm_context
        sizes = len(words.states) / num_images, image_tokens.shape[1], attn.num_heads, attn.head_dim
        if not (trains_on_cpu(words.states) and projects_words(*sizes, attn.kv_proj)):
            return [SeenImages(*pair, layout) for pair in self.project_image(image_tokens)]
        words_per_image = layout.lengths.view(num_images, -1).sum(dim=1)
        images = SharedImages.of(_to_compute_dtype(image_tokens), words_per_image, attn.num_heads, norm)
        blocks = [layer.cross_block for layer in self.layers]
        return [SeenTokens(images, block.attn.kv_proj, block.norm_context, attn.num_kv_heads) for block in blocks]

    def project_image(self, image_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """image_tokens (I, Q, D) -> keys and values of every layer."""
        blocks = [layer.cross_block for layer in self.layers]
        return [block.attn.project_context(block.norm_context(image_tokens)) for block in blocks]

    def fold_image(self, image_tokens: Tensor, words_per_image: int) -> list[FoldedImages] | None:
        """image_tokens (I, Q, D) -> what every layer looks at in place of keys and values, without gradient.

        None where keys and values are no dearer for so many words an image, and on devices other than a CPU.
        """
        blocks, tokens = [layer.cross_block for layer in self.layers], image_tokens
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


def _to_compute_dtype(x: Tensor) -> Tensor:
    # Under autocast the residual stream is kept in the low precision too: half the memory traffic of the packed words.
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
