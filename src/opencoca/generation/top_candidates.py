"""The best few tokens of a vocabulary.

Letters: R texts, V vocabulary, k the number of tokens wanted.
"""

import torch
from torch import Tensor

# On a CPU selecting among 50,000 numbers takes as long as a layer; the maximum of runs of this length is quick.
_RUN = 64


def top_candidates(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of scores (R, V), in descending order, and their ids: (R, k) each.

    As `Tensor.topk`, about ten times as fast on a CPU: the k best lie in the k runs with the highest maxima.
    """
    num_rows, vocab_size = scores.shape
    num_runs = vocab_size // _RUN
    if scores.device.type != "cpu" or num_runs < 8 * k:
        return scores.topk(k, dim=1)
    runs = scores[:, : num_runs * _RUN].unflatten(1, (num_runs, _RUN))
    chosen = runs.amax(dim=2).topk(k, dim=1, sorted=False).indices
    places = (chosen[:, :, None] * _RUN + torch.arange(_RUN)).flatten(1)
    rest = torch.arange(num_runs * _RUN, vocab_size).expand(num_rows, -1)
    places = torch.cat((places, rest), dim=1)
    values, index = scores.gather(1, places).topk(k, dim=1)
    return values, places.gather(1, index)
