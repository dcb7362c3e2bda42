"""A dual encoder without depth beside the deep one: an image is the mean and the maximum of its features, a text the
mean of its words' vectors, and either is mapped linearly.

Trained on a few thousand images, deep towers come to know those by heart. Linear maps with much dropout cannot, and err
on other images. They also take over, by least squares, what others have learned from far more: a sentence encoder's
vectors and the classifier that an image encoder comes with are nearly linear in words and in features (see
`tasks.sentences`). The similarities of both encoders are averaged, as an ensemble's are.

Letters: B batch, N image features, C their width, T positions of a text, V vocabulary, E embed_dim, L = dim,
K = class_dim.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.model.config import CoCaConfig
from opencoca.model.kernels.dropout import Dropout

# A text's class part of length l counts l times this power of l, at most 1: words of class names count, others do not.
_GATE = 3
# As a label, a text whose class part is shorter than this names no class: its part stays as short beside others.
_NAMES_NOTHING = 0.1


class LinearBranch(nn.Module):
    """Vectors (B, L + K) of images and of texts: L numbers that learn from pairs, and K that are fitted to classes.

    Those that learn have length 1, as an image's class part has; a text's is the shorter the less its words name.
    """

    def __init__(self, config: CoCaConfig, context_width: int):
        super().__init__()
        self.config = linear = config.linear
        self.image_dropout = Dropout(linear.image_dropout)
        self.image_proj = nn.Linear(2 * context_width, linear.dim, bias=False)
        self.class_proj = nn.Linear(context_width, linear.class_dim, bias=False) if linear.class_dim else None
        self.word_embed = nn.Embedding(config.text.vocab_size, linear.dim + linear.class_dim)
        self.log_logit_scale = nn.Parameter(torch.empty(()))

    def image_weights(self) -> tuple[int, int]:
        """How many weights map an image: of the part that is trained, and of the one that is fitted."""
        return self.image_proj.weight.numel(), 0 if self.class_proj is None else self.class_proj.weight.numel()

    def lacks_classes(self) -> bool:
        """Whether it has a class part that nothing was fitted to yet."""
        return self.class_proj is not None and not bool(self.class_proj.weight.any())

    def image_vectors(self, features: Tensor) -> Tensor:
        """features (B, N, C) of the image encoder -> (B, L + K)."""
        mean = features.mean(dim=1)
        pooled = torch.cat((mean, features.amax(dim=1)), dim=-1)
        parts = [self.image_proj(self.image_dropout(pooled))]
        if self.class_proj is not None:
            parts.append(self.class_proj(mean))
        return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1)

    def text_vectors(self, token_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """token_ids (B, T); token_mask (B, T), True = real (None: all are) -> (B, L + K), of the words' mean."""
        kept = torch.ones_like(token_ids, dtype=torch.bool) if token_mask is None else token_mask.bool()
        if self.training and self.config.word_dropout:
            kept = kept & (torch.rand(kept.shape, device=kept.device) >= self.config.word_dropout)
        words = self.word_embed(token_ids).float()
        weights = kept.float() / kept.sum(dim=1, keepdim=True).clamp(min=1)
        # No matrix product, which autocast would take in low precision. The class part is fitted, and not trained.
        mean = (weights.unsqueeze(-1) * words).sum(dim=1)
        learned, named = mean[:, : self.config.dim], mean[:, self.config.dim :].detach()
        gate = torch.linalg.vector_norm(named, dim=-1, keepdim=True).clamp(max=1) ** _GATE
        return torch.cat((F.normalize(learned, dim=-1), named * gate), dim=-1)

    def learned(self, vectors: Tensor) -> Tensor:
        """Vectors (..., L + K) of images or texts -> the part (..., L) that learns from pairs."""
        return vectors[..., : self.config.dim]

    def join(self, deep: Tensor, vectors: Tensor) -> Tensor:
        """deep (..., E), of length 1, and vectors (..., L + K) -> embeddings (..., E + L + K), of length 1.

        Inner products of embeddings are weighted means of the parts'.
        """
        config = self.config
        learned, named = vectors.to(deep.dtype).split((config.dim, config.class_dim), dim=-1)
        parts = (deep, config.weight**0.5 * learned, config.class_weight**0.5 * named)
        return F.normalize(torch.cat(parts, dim=-1), dim=-1)

    def as_labels(self, embeds: Tensor) -> Tensor:
        """Embeddings (..., E + L + K) of texts that are labels to classify by: the class part counts for more.

        It has the same length for all labels, but for those whose words name next to nothing.
        """
        config = self.config
        pairs, named = embeds.split((embeds.shape[-1] - config.class_dim, config.class_dim), dim=-1)
        # Of the rest, the deep part has length 1 and the learned one the root of its weight, before all are scaled.
        unit = torch.linalg.vector_norm(pairs, dim=-1, keepdim=True) / (1 + config.weight) ** 0.5
        length = torch.linalg.vector_norm(named, dim=-1, keepdim=True) / (unit * config.class_weight**0.5)
        named = named * (config.label_weight / length.clamp(min=_NAMES_NOTHING))
        return F.normalize(torch.cat((pairs, named), dim=-1), dim=-1)


def fit_words(texts: Sequence[Tensor], vectors: Tensor, vocab_size: int, ridge: float, weights: Tensor) -> Tensor:
    """Words' vectors (V, D) whose means over texts come nearest to what is wanted of these: ridge regression.

    texts: the ids of N texts; vectors (N, D): what is wanted; weights (N,): how much an error of each counts.
    ridge: what the squares of the words' vectors count. Needs memory for two matrices (U, U), U words that occur.
    """
    used, columns = torch.cat(list(texts)).unique(return_inverse=True)
    lengths = torch.tensor([len(text) for text in texts])
    rows = torch.repeat_interleave(torch.arange(len(texts)), lengths)
    entries = (weights.float().sqrt() / lengths.clamp(min=1))[rows]
    places, shape = torch.stack((rows, columns)), (len(texts), len(used))
    means = torch.sparse_coo_tensor(places, entries, shape, check_invariants=True).coalesce()
    back = means.t().coalesce()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        squares = torch.sparse.mm(back, means).to_dense()
    squares.diagonal().add_(ridge)
    products = torch.sparse.mm(back, vectors.float() * weights.float().sqrt().unsqueeze(1))
    found = torch.zeros(vocab_size, vectors.shape[1])
    found[used] = torch.cholesky_solve(products, torch.linalg.cholesky(squares))
    return found
