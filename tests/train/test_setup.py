"""The size of a network is known before any of it is made."""

from pathlib import Path

import pytest

from opencoca.model.coca import CoCa
from opencoca.train import setup
from opencoca.train.trainer import Trainer

from .helpers import Pairs, tiny_recipe


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ({"depth": 5}, {"unimodal_depth": 3, "multimodal_depth": 4, "tie_embeddings": True}),
        ({"depth": 2, "class_token": True, "pre_norm": True}, {"self_attn_mlp": True}),
        (
            {"name": "efficientnet_lite0", "image_size": (32, 32), "depth": 9},
            {"unimodal_depth": 1, "block": "parallel"},
        ),
    ],
)
def test_parameters_are_counted_without_most_of_the_layers(make_config, image: dict, text: dict) -> None:
    config = make_config(image, **text)
    assert setup.count_parameters(config) == sum(parameter.numel() for parameter in CoCa(config).parameters())


def test_a_network_that_no_memory_holds_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, pairs: Pairs, output: Path
) -> None:
    monkeypatch.setattr(setup, "most_bytes", lambda: 8e9)
    recipe = tiny_recipe(pairs, output, model__image__width=16_384, model__image__depth=500)
    with pytest.raises(ValueError, match=r"GB are more than the 8 GB of memory; give it less width or depth"):
        Trainer(recipe)
    assert not output.exists()
