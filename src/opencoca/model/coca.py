"""CoCa: one network that embeds images and texts and writes captions. arXiv 2205.01917, figure 2.

images - ImageEncoder - ImagePooling - image tokens and image_embed
text   - UnimodalDecoder - text_embed, and word states - MultimodalDecoder over the image tokens - lm_head

Letters: B texts, I images (B is a multiple of I: consecutive texts share an image), N image features, Q image tokens,
T text positions, S words that have a next word, D width, E embed_dim, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import CoCaConfig
from opencoca.model.encoders import build_image_encoder
from opencoca.model.encoders.vit import VisionTransformer
from opencoca.model.init import init_weights
from opencoca.model.kernels.image_attention import FoldedImages
from opencoca.model.kernels.linear import Linear
from opencoca.model.layers.attention import CachedWords, Memories, NextWords, SeenImages, WordMemory
from opencoca.model.layers.linear_branch import LinearBranch
from opencoca.model.layers.poolers import ImagePooling, PooledImage, TaskHead
from opencoca.model.structure import Part, Structure, numbered
from opencoca.model.text_decoder import MultimodalDecoder, UnimodalDecoder, Words


class ImageOutput(NamedTuple):
    """tokens (I, Q, D) for the decoder; embed (I, E), of length 1."""

    tokens: Tensor
    embed: Tensor


class TextOutput(NamedTuple):
    """words: unimodal states of the words; embed (B, E), of length 1."""

    words: Words
    embed: Tensor


class CoCaOutput(NamedTuple):
    """What both losses are computed from.

    image_embed (I, E) and text_embed (B, E), of length 1 (None without the contrastive half);
    hidden (S, D): the states of all words that have a next word, text by text, and next_ids (S,): those next words
    (None without the captioning half); logit_scale: scalar, 1 / temperature.
    """

    image_embed: Tensor | None
    text_embed: Tensor | None
    hidden: Tensor | None
    next_ids: Tensor | None
    logit_scale: Tensor


class CoCa(nn.Module):
    """The model. ``CoCa(CoCaConfig.named("base"))`` is the paper's Base, randomly initialised."""

    def __init__(self, config: CoCaConfig, image_encoder: nn.Module | None = None):
        """image_encoder: images (B, 3, height, width) -> features (B, N, D), for an encoder named ``custom``."""
        super().__init__()
        self.config = config
        width = config.text.width
        self.image_encoder = build_image_encoder(config, image_encoder)
        self.image_pooling = ImagePooling(config, self.image_encoder.width)
        self.unimodal_decoder = UnimodalDecoder(config)
        self.multimodal_decoder = MultimodalDecoder(config)
        self.lm_head = Linear(width, config.text.vocab_size, bias=False)
        self.tie_head()
        projected = config.projects_embeds
        self.image_proj = nn.Linear(width, config.embed_dim, bias=False) if projected else nn.Identity()
        self.text_proj = nn.Linear(width, config.embed_dim, bias=False) if projected else nn.Identity()
        self.log_logit_scale = nn.Parameter(torch.empty(()))
        self.linear_branch = LinearBranch(config, self.image_encoder.width) if config.linear.dim else None
        self.task_head = None if config.head is None else TaskHead(config.head, self.image_encoder.width)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew, but those of an image encoder that fills its own."""
        init_weights(self)
        with torch.no_grad():
            for branch in (self, self.linear_branch):
                if branch is not None:
                    branch.log_logit_scale.fill_(math.log(1 / self.config.initial_temperature))

    def tie_head(self) -> None:
        """Makes the vocabulary head use the embedding's weights, in whatever form they are, if both are to be one."""
        if self.config.text.tie_embeddings:
            embedding = self.unimodal_decoder.token_embed
            for name, tensor in (*embedding.named_parameters(), *embedding.named_buffers()):
                setattr(self.lm_head, name, tensor)

    def stored_weights(self) -> dict[str, Tensor]:
        """All weights and buffers, once: without the head's where it shares the embedding's."""
        is_tied = self.config.text.tie_embeddings
        return {name: t for name, t in self.state_dict().items() if not (is_tied and name.startswith("lm_head."))}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the weights are computed with."""
        return self.unimodal_decoder.token_embed.weight.dtype

    @property
    def vocab_weight(self) -> Tensor:
        """(V, D): what states of words are multiplied with to become logits, for losses that build them in parts."""
        return self.lm_head.weight

    def structure(self) -> Structure:
        """The parts of this network and the order of their layers."""
        encoder, text = self.image_encoder, self.config.text
        # An embedding that is the vocabulary head as well is as near to the outputs as to the inputs.
        stem = ("unimodal_decoder.cls_embed", "unimodal_decoder.pos_embed")
        stem += () if text.tie_embeddings else ("unimodal_decoder.token_embed",)
        stages = numbered("image_encoder.stages", encoder.num_stages)
        unimodal = numbered("unimodal_decoder.blocks", text.unimodal_depth)
        multimodal = numbered("multimodal_decoder.layers", text.multimodal_depth)
        parts = (
            Part("image_encoder", ("image_encoder",), "image", layers=stages),
            Part("image_pooling", ("image_pooling",)),
            Part("unimodal_decoder", ("unimodal_decoder",), "text", stem, unimodal),
            Part("multimodal_decoder", ("multimodal_decoder",), "text", layers=multimodal),
            Part("heads", ("lm_head", "image_proj", "text_proj", "log_logit_scale")),
            Part("linear_branch", ("linear_branch",)),
            Part("task_head", ("task_head",)),
        )
        return Structure(self, encoder, parts)

    def unused_parameters(self, contrastive: bool, captioning: bool) -> Iterator[nn.Parameter]:
        """What `forward` never reaches where a half is switched off, and what is fitted and not trained."""
        unused = self.image_pooling.unused(captioning, contrastive)
        unused += [] if self.task_head is None else [self.task_head]
        if contrastive and self.linear_branch is not None and self.linear_branch.class_proj is not None:
            unused.append(self.linear_branch.class_proj)
        if not captioning:
            unused += [self.multimodal_decoder, *([] if self.config.text.tie_embeddings else [self.lm_head])]
        if not contrastive:
            unused += [self.unimodal_decoder.norm, self.text_proj, self.image_proj]
            unused += [] if self.linear_branch is None else [self.linear_branch]
            yield from (self.unimodal_decoder.cls_embed, self.log_logit_scale)
        yield from chain.from_iterable(module.parameters() for module in unused)

    def set_patch_dropout(self, share: float) -> None:
        """The share of an image's patches that training leaves out, drawn anew each time.

        Raises ValueError if the image encoder has no patches to leave out.
        """
        if isinstance(self.image_encoder, VisionTransformer):
            self.image_encoder.patch_dropout = share
        elif share:
            raise ValueError(f"encoder.patch_dropout needs the image encoder vit, not {self.config.image.name}")

    @property
    def logit_scale(self) -> Tensor:
        """1 / temperature, a scalar, at most max_logit_scale."""
        return self._scale(self.log_logit_scale)

    @property
    def linear_logit_scale(self) -> Tensor | None:
        """The linear branch's own, with which it is trained; None without one."""
        return None if self.linear_branch is None else self._scale(self.linear_branch.log_logit_scale)

    def _scale(self, logarithm: Tensor) -> Tensor:
        return logarithm.exp().clamp(max=self.config.max_logit_scale)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Brings the stored scales back to their maximum: beyond it, they would have no gradient to return with."""
        for branch in (self, self.linear_branch):
            if branch is not None:
                branch.log_logit_scale.clamp_(max=math.log(self.config.max_logit_scale))

    def image_features(self, images: Tensor, from_stage: int = 0, to_stage: int | None = None) -> Tensor:
        """images (I, 3, height, width), or what stage ``from_stage`` of the image encoder takes -> features (I, N, C).

        to_stage: what this stage takes instead of the features.
        """
        encoder = self.image_encoder
        return encoder.run_stages(images, from_stage, encoder.num_stages if to_stage is None else to_stage)

    def head_logits(self, features: Tensor) -> Tensor:
        """features (I, N, C) of the image encoder -> what the task's head makes of them (I, num_outputs).

        Raises ValueError if the model has none.
        """
        if self.task_head is None:
            raise ValueError("this model has no task head: its configuration has none")
        return self.task_head(features)

    def encode_image(self, images: Tensor) -> ImageOutput:
        """images (I, 3, height, width), preprocessed -> tokens and embedding."""
        return self.pool_image(self.image_features(images))

    def pool_features(self, features: Tensor, captioning: bool = True, contrastive: bool = True) -> PooledImage:
        """features (I, N, C) -> the tokens and the vector of each image, as far as they are wanted.

        With a linear branch, its vector stands behind the pooled one.
        """
        tokens, vector = self.image_pooling(features, captioning, contrastive)
        if vector is not None and self.linear_branch is not None:
            vector = torch.cat((vector, self.linear_branch.image_vectors(features).to(vector.dtype)), dim=-1)
        return PooledImage(tokens, vector)

    def pool_image(self, features: Tensor) -> ImageOutput:
        """features (I, N, C) of the image encoder -> tokens and embedding."""
        tokens, vector = self.pool_features(features)
        assert tokens is not None
        assert vector is not None
        return ImageOutput(tokens, self.project_vector(vector))

    def project_vector(self, vector: Tensor) -> Tensor:
        """Image vectors (..., D), as `pool_features` gives them -> image_embed (..., E)."""
        return self._project(self.image_proj, vector)

    def _project(self, proj: nn.Module, vector: Tensor) -> Tensor:
        if self.linear_branch is None:
            return _unit(proj(vector))
        width = self.config.text.width
        return self.linear_branch.join(_unit(proj(vector[..., :width])), vector[..., width:])

    def encode_text(self, token_ids: Tensor, token_mask: Tensor | None = None) -> TextOutput:
        """token_ids (B, T), token_mask (B, T) True = real -> word states and embedding."""
        words, cls = self.unimodal_decoder(token_ids, token_mask)
        assert cls is not None
        return TextOutput(words, self.project_text(cls, token_ids, token_mask))

    def project_text(self, cls: Tensor, token_ids: Tensor, token_mask: Tensor | None) -> Tensor:
        """[CLS] vectors (B, D) of these texts, see `encode_text` -> text_embed (B, E)."""
        if self.linear_branch is not None:
            cls = torch.cat((cls, self.linear_branch.text_vectors(token_ids, token_mask).to(cls.dtype)), dim=-1)
        return self._project(self.text_proj, cls)

    def label_embeds(self, embeds: Tensor) -> Tensor:
        """text_embed (..., E) of labels to classify by -> what images are compared with: the same without a branch."""
        return embeds if self.linear_branch is None else self.linear_branch.as_labels(embeds)

    def deep_embeds(self, embeds: Tensor) -> Tensor:
        """image_embed or text_embed (..., E) -> the deep encoder's part of it, of length 1."""
        return embeds if self.linear_branch is None else F.normalize(embeds[..., : self.config.embed_dim], dim=-1)

    def linear_embeds(self, features: Tensor, token_ids: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """features (I, N, C) and texts (B, T) -> what of the linear branch's vectors learns from pairs, (I, L), (B, L).

        Raises ValueError if the model has no linear branch.
        """
        branch = self.linear_branch
        if branch is None:
            raise ValueError("this model has no linear branch: its configuration has none (model.linear)")
        images, texts = branch.image_vectors(features), branch.text_vectors(token_ids, token_mask)
        return branch.learned(images), branch.learned(texts)

    def decode(self, words: Words, image_tokens: Tensor) -> Tensor:
        """words of B texts, image_tokens (I, Q, D) -> hidden (B, T, D), zeros at padding."""
        return words.layout.pad(self.decode_packed(words, image_tokens))

    def decode_packed(self, words: Words, image_tokens: Tensor) -> Tensor:
        """words of B texts, image_tokens (I, Q, D) -> hidden (S, D), packed as the words are."""
        seen = self.multimodal_decoder.look_at(words, image_tokens)
        return self.multimodal_decoder(words.states, words.layout, seen)

    def logits(self, images: Tensor, token_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Next-word logits (B, T, V) after every word, for those who want them all; training never builds them."""
        words = self.word_states(token_ids, token_mask)
        return self.word_logits(self.decode(words, self.encode_image(images).tokens))

    def word_states(self, token_ids: Tensor, token_mask: Tensor | None = None) -> Words:
        """token_ids (B, T), token_mask (B, T) True = real -> unimodal states of the words, without [CLS]."""
        return self.unimodal_decoder(token_ids, token_mask, with_cls=False).words

    def project_image(self, image_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """image_tokens (I, Q, D) -> keys and values of every layer, for `hidden_states`."""
        return self.multimodal_decoder.project_image(image_tokens)

    def hidden_states(self, words: Words, keys_values: list[tuple[Tensor, Tensor]]) -> Tensor:
        """words of B texts over the keys and values of I images -> hidden (S, D), packed as the words are."""
        seen = [SeenImages(*pair, words.layout) for pair in keys_values]
        return self.multimodal_decoder(words.states, words.layout, seen)

    def decoder_modules(self) -> tuple[nn.Module, ...]:
        """What `step` passes through."""
        return self.unimodal_decoder, self.multimodal_decoder, self.lm_head

    def fold_image(self, image_tokens: Tensor, words_per_image: int) -> list[FoldedImages] | None:
        """image_tokens (I, Q, D) -> images for `step`, where they are cheaper than keys and values; else None."""
        return self.multimodal_decoder.fold_image(image_tokens, words_per_image)

    def step(self, token_ids: Tensor, words: tuple[NextWords, NextWords], memories: Memories) -> Tensor:
        """token_ids (R, T): the next words of texts -> logits (R, V) after the last of them; memories keep the words.

        words: the same words as the two halves are to take them. Without gradient, in evaluation mode.
        """
        x = self.unimodal_decoder.embed(token_ids.flatten(), words[0].positions)
        x = self.unimodal_decoder.step(x, memories.unimodal, words[0])
        cached = [CachedWords(memory, words[1]) for memory in memories.multimodal]
        hidden = self.multimodal_decoder(x, cached, memories.images)
        return self.lm_head(hidden.view(*token_ids.shape, -1)[:, -1])

    def embed_last(
        self,
        token_ids: Tensor,
        words: NextWords,
        memories: Sequence[WordMemory],
        texts: Tensor,
        text_mask: Tensor,
    ) -> Tensor:
        """token_ids (R, T): the last words of texts, and [CLS] for the last id -> text_embed (R, E).

        texts (R, L), text_mask (R, L), True = real: all words of each.
        """
        decoder = self.unimodal_decoder
        x = decoder.embed_words_and_cls(token_ids, words.positions.view_as(token_ids))
        states = decoder.step(x, memories, words).view(*token_ids.shape, -1)
        return self.project_text(decoder.norm(states[:, -1]), texts, text_mask)

    def word_logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> next-word logits (..., V)."""
        return self.lm_head(hidden)

    def forward(
        self,
        images: Tensor,
        token_ids: Tensor,
        token_mask: Tensor | None = None,
        *,
        from_stage: int = 0,
        contrastive: bool = True,
        captioning: bool = True,
    ) -> CoCaOutput:
        """One pass that gives both losses their inputs.

        images (I, 3, height, width), or what the image encoder's stage ``from_stage`` takes (its cached features);
        token_ids (B, T), token_mask (B, T) True = real. A half that is switched off costs nothing.
        """
        features = self.image_encoder.run_stages(images, from_stage, self.image_encoder.num_stages)
        image_tokens, image_vector = self.pool_features(features, captioning, contrastive)
        image_embed = None if image_vector is None else self.project_vector(image_vector)
        words, cls = self.unimodal_decoder(token_ids, token_mask, with_cls=contrastive)
        text_embed = None if cls is None else self.project_text(cls, token_ids, token_mask)
        hidden = next_ids = None
        if captioning:
            mask = torch.ones_like(token_ids, dtype=torch.bool) if token_mask is None else token_mask.bool()
            words, next_ids = words.with_next(token_ids[mask])
            assert image_tokens is not None
            hidden = self.decode_packed(words, image_tokens)
        return CoCaOutput(image_embed, text_embed, hidden, next_ids, self.logit_scale)


def _unit(x: Tensor) -> Tensor:
    """Scaled to length 1, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
