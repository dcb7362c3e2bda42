"""The states of this process's random number generators as tensors: PyTorch's, Python's and NumPy's."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int, rank: int) -> None:
    """Seeds the generators of Python and NumPy, which nothing else seeds: two runs of a recipe are equal."""
    words = np.random.SeedSequence([seed, rank]).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)  # noqa: NPY002


def random_state() -> dict[str, Tensor]:
    """The states of all generators, by name; CUDA's is that of the current device."""
    _, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy, dict)
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([numpy["state"]["pos"], numpy["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Puts back what `random_state` gave. Raises KeyError, RuntimeError, TypeError or ValueError for anything else."""
    torch.set_rng_state(state["torch"])
    if "python" in state:
        gauss = state["python_gauss"].tolist()
        random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
        position, has_gauss = state["numpy_position"].tolist()
        words = state["numpy"].numpy().astype(np.uint32)
        np.random.set_state(  # noqa: NPY002
            {
                "bit_generator": "MT19937",
                "state": {"key": words, "pos": position},
                "has_gauss": has_gauss,
                "gauss": float(state["numpy_gauss"]),
            }
        )
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
