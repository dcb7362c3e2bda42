"""Initial values of a model that was built without any."""

import pytest
import torch

from opencoca.model.coca import CoCa
from opencoca.train.deferred_init import fill_initial_values


@pytest.mark.parametrize("tied", [False, True])
def test_values_depend_on_the_seed_alone(make_config, tied: bool) -> None:
    config = make_config(tie_embeddings=tied)
    torch.manual_seed(5)
    expected = CoCa(config).state_dict()
    with torch.device("meta"):
        model = CoCa(config)
    torch.rand(7)  # whatever was drawn before
    fill_initial_values(model, torch.device("cpu"), 5)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert (model.lm_head.weight is model.unimodal_decoder.token_embed.weight) == tied
