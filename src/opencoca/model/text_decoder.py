"""The decoupled text decoder: a unimodal half that never sees the image, a multimodal half that does.

Paper, section 3.1 and figure 2. [CLS] is appended at the end of each text, where the causal order alone gives it the
right view: it sees every real word and itself, and no word sees it.
Letters: B batch, T text positions, S real positions of the batch, D width, V vocabulary, I images.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opencoca.model.attention import KeyValueCache
from opencoca.model.blocks import CrossKeysValues, Dropout, TransformerBlock, make_block, make_norm
from opencoca.model.config import TextConfig
from opencoca.model.layout import TextLayout, put_rows, take_rows


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

    def __init__(self, config: TextConfig):
        super().__init__()
        block = config.block_config()
        self.context_length = config.context_length
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
        layout = TextLayout.from_mask(mask)
        ids = token_ids[mask]
        if not with_cls:
            states = self._run(self._embed(ids, layout.positions), layout)
            return UnimodalOutput(Words(states, layout), None)
        is_cls_slot = torch.nn.functional.pad(mask, (0, 1), value=True)
        with_cls_layout = TextLayout.from_mask(is_cls_slot)
        # Packed rows are the words of a text and then its [CLS]: the running count of lengths says where each stands.
        cls_rows = (mask.sum(dim=1) + 1).cumsum(dim=0) - 1
        is_word = torch.ones(ids.shape[0] + mask.shape[0], dtype=torch.bool, device=ids.device)
        is_word[cls_rows] = False
        word_rows = is_word.nonzero().squeeze(1)
        words = self._embed(ids, layout.positions)
        cls = self.cls_embed if self.pos_embed is None else self.cls_embed + self.pos_embed[-1]
        cls = self.dropout(cls.to(words.dtype).expand(mask.shape[0], -1))
        x = put_rows(words, word_rows, is_word.shape[0]) + put_rows(cls, cls_rows, is_word.shape[0])
        x = self._run(x, with_cls_layout)
        return UnimodalOutput(Words(take_rows(x, word_rows), layout), self.norm(take_rows(x, cls_rows)))

    def step(self, token_ids: Tensor, caches: list[KeyValueCache]) -> Words:
        """token_ids (B, T): the next T words of each text, all real -> their states; extends the caches."""
        batch_size, length = token_ids.shape
        layout = TextLayout.dense(batch_size, length, token_ids.device, start=caches[0].length)
        x = self._embed(token_ids.flatten(), layout.positions)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.self_attend(x, layout, cache)  # pyright: ignore[reportCallIssue]
        return Words(x, layout)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.token_embed(ids)
        if self.pos_embed is not None:
            x = x + self.pos_embed[positions]
        return self.dropout(_to_compute_dtype(x))

    def _run(self, x: Tensor, layout: TextLayout) -> Tensor:
        for block in self.blocks:
            x = block.self_attend(x, layout)  # pyright: ignore[reportCallIssue]
        return x


class MultimodalLayer(nn.Module):
    """Causal self-attention over the words, then cross-attention to the image; where the MLPs are is configuration."""

    def __init__(self, config: TextConfig, context_width: int):
        super().__init__()
        block = config.block_config()
        self.self_block = make_block(block, has_mlp=config.self_attn_mlp)
        self.cross_block = make_block(block, context_width, has_mlp=config.cross_attn_mlp)

    def forward(
        self, x: Tensor, keys_values: CrossKeysValues, layout: TextLayout, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = self.self_block.self_attend(x, layout, cache)
        return self.cross_block.cross_attend(x, keys_values, layout)


class MultimodalDecoder(nn.Module):
    """Word states and image tokens -> hidden states that predict the next word."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(MultimodalLayer(config, config.width) for _ in range(config.multimodal_depth))
        self.norm = make_norm(config.block_config())

    def project_image(self, image_tokens: Tensor) -> list[CrossKeysValues]:
        """image_tokens (I, Q, D) -> keys and values of every layer, computed once for all words to come."""
        blocks: list[TransformerBlock] = [layer.cross_block for layer in self.layers]  # pyright: ignore
        return [block.attn.project_context(image_tokens) for block in blocks]

    def forward(
        self,
        words: Words,
        image_keys_values: list[CrossKeysValues],
        caches: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """words of B texts over I images (text row r looks at image r // (B / I)) -> hidden (S, D), packed.

        Raises ValueError if B is not a multiple of I.
        """
        num_texts, num_images = words.layout.batch_size, image_keys_values[0][0].shape[0]
        if num_texts % num_images:
            raise ValueError(f"{num_texts} texts cannot be shared out evenly among {num_images} images")
        x = words.states
        for index, (layer, keys_values) in enumerate(zip(self.layers, image_keys_values, strict=True)):
            x = layer(x, keys_values, words.layout, caches[index] if caches is not None else None)
        return self.norm(x)


def _to_compute_dtype(x: Tensor) -> Tensor:
    # Under autocast the residual stream is kept in the low precision too: half the memory traffic of the packed words.
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
