"""Search: which of the texts in work go on, and by which token.

Letters: R texts in work, I images in work, V vocabulary; R = I x texts_per_image, the texts of one image together.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Extension(NamedTuple):
    """The next texts in work: text ``parents[r]`` (R,) of the present ones, longer by ``token_ids[r]`` (R,)."""

    parents: Tensor
    token_ids: Tensor


class Search(Protocol):
    """Chooses how texts go on. A text that has ended stays in work, whatever is chosen, until its image's all have.

    log_probs (R, V): of the next tokens, those forbidden at -inf; totals (R,): log-probability of each text so far;
    ended (R,): whether it has its end token. Parents of a text are texts of the same image.
    """

    texts_per_image: int

    def extend(self, log_probs: Tensor, totals: Tensor, ended: Tensor) -> Extension: ...


class Greedy:
    """One text per image, each longer by its most probable token."""

    texts_per_image = 1

    def extend(self, log_probs: Tensor, totals: Tensor, ended: Tensor) -> Extension:
        return Extension(torch.arange(log_probs.shape[0], device=log_probs.device), log_probs.argmax(dim=-1))
