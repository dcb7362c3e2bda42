"""Weights of one CoCa taken over by another: what an addition to the architecture changes at first is nothing."""

from dataclasses import replace

import torch

from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.model.transfer import take_weights


def square(make_config, **changes: object) -> CoCaConfig:
    """A configuration whose embeddings are as wide as its texts."""
    config = make_config()
    return replace(config, embed_dim=config.text.width, **changes)


def test_projections_that_are_added_change_no_embedding(make_config) -> None:
    start = CoCa(square(make_config)).eval()
    assert not start.config.projects_embeds
    model = CoCa(square(make_config, compat=replace(start.config.compat, project_embeds=True))).eval()
    transfer = take_weights(model, start)
    assert set(transfer.adapted) == {"image_proj.weight", "text_proj.weight"}
    assert not transfer.new
    assert not transfer.left
    ids, images = torch.randint(3, 20, (2, 6)), torch.randn(2, 3, *start.config.image.image_size)
    torch.testing.assert_close(model.encode_text(ids).embed, start.encode_text(ids).embed, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_image(images).embed, start.encode_image(images).embed, rtol=0, atol=1e-6)


def test_projections_of_another_size_are_new(make_config) -> None:
    config = square(make_config)
    transfer = take_weights(CoCa(replace(config, embed_dim=config.embed_dim // 2)), CoCa(config))
    assert {"image_proj.weight", "text_proj.weight"} <= set(transfer.new)
