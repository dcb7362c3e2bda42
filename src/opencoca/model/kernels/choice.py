"""What may see what in attention, and when which way to compute it takes less time.

Letters: B batch, T query positions, N key positions, H heads, d head width.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from opencoca.model.kernels.linear import Linear

# Projecting the words and not the image must need so much fewer products: they are smaller ones, too.
_LEAST_GAIN = 1.3
# Words of an image that padding adds to them, about.
_PADDING = 2


class Mask(NamedTuple):
    """What each query sees.

    kind: ``bidirectional``, all keys; ``causal``, the last query all keys, the one before it all but the last, and so
    on; ``prefix``, the same, but that the first ``prefix`` keys are seen by all; ``free``, what ``visible`` says.
    visible (B, N) or (B, T, N): keys that are False are not seen, whatever the kind.
    """

    kind: Literal["bidirectional", "causal", "prefix", "free"]
    prefix: int = 0
    visible: Tensor | None = None

    def tensor(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """True = sees: (T, N), (B, 1, 1, N) or (B, 1, T, N); None = all queries see everything."""
        order = None
        if self.kind in ("causal", "prefix") and num_queries > 1:
            order = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
            order[:, : self.prefix] = True
        if self.visible is None:
            return order
        visible = self.visible[:, None] if self.visible.dim() == 3 else self.visible[:, None, None]
        return visible if order is None else visible & order


EVERYTHING, CAUSAL = Mask("bidirectional"), Mask("causal")


def projects_words(words_per_image: float, num_tokens: int, num_heads: int, head_dim: int, kv_proj: nn.Linear) -> bool:
    """Whether cross-attention over image tokens needs clearly fewer products without keys and values."""
    if type(kv_proj) not in (nn.Linear, Linear) or type(kv_proj.weight) is not nn.Parameter:
        return False  # weights that are sharded, or no floating-point numbers, cannot be folded
    words, width = words_per_image + _PADDING, num_heads * head_dim
    absorbed = 2 * words * num_heads * kv_proj.in_features * (head_dim + num_tokens)
    projected = num_tokens * kv_proj.in_features * kv_proj.out_features + 2 * words_per_image * num_tokens * width
    return _LEAST_GAIN * absorbed < projected


def trains_on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU and has a gradient."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad and x.numel() > 0
