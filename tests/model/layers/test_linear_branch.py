"""The linear branch: what its vectors are, how they join the deep ones, and the least squares that begin it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from opencoca.model.coca import CoCa
from opencoca.model.config import LinearConfig
from opencoca.model.layers.linear_branch import fit_words
from opencoca.model.traceable import TextGraph
from opencoca.model.transfer import take_weights

LINEAR = {"dim": 5, "class_dim": 3, "weight": 2.0, "class_weight": 4.0, "label_weight": 3.0}


@pytest.fixture
def model(make_config) -> CoCa:
    torch.manual_seed(0)
    model = CoCa(replace(make_config(), linear=LinearConfig(**LINEAR))).double().eval()
    assert model.linear_branch is not None
    assert model.linear_branch.class_proj is not None
    assert model.linear_branch.lacks_classes()
    with torch.no_grad():
        model.linear_branch.class_proj.weight.normal_()
    assert not model.linear_branch.lacks_classes()
    return model


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    return ids, torch.tensor([[True] * 4, [True, True, True, False]])


def features(model: CoCa, images: int = 2) -> torch.Tensor:
    return model.image_features(torch.randn(images, 3, *model.config.image.image_size, dtype=torch.float64))


def test_a_text_is_the_mean_of_its_words(model: CoCa) -> None:
    """Padding counts nothing; the order of words changes nothing; the class part is the shorter, the less it is."""
    branch, (ids, mask) = model.linear_branch, texts()
    assert branch is not None
    with torch.no_grad():
        branch.word_embed.weight[:, 5:].mul_(20)
    found = branch.text_vectors(ids, mask).double()
    for row, words in zip(found, ([1, 5, 6, 2], [1, 7, 2]), strict=True):
        mean = branch.word_embed.weight[words].mean(dim=0)
        torch.testing.assert_close(row[:5], F.normalize(mean[:5], dim=0), atol=1e-6, rtol=0)
        length = mean[5:].norm()
        assert 0 < float(length.detach()) < 1
        torch.testing.assert_close(row[5:], mean[5:] * length**3, atol=1e-6, rtol=0)
    turned = branch.text_vectors(ids[:1, [0, 2, 1, 3]], mask[:1])
    torch.testing.assert_close(turned, branch.text_vectors(ids[:1], mask[:1]))


def test_an_image_is_the_mean_and_the_maximum_of_its_features(model: CoCa) -> None:
    branch = model.linear_branch
    assert branch is not None
    assert branch.class_proj is not None
    seen = features(model)
    found = branch.image_vectors(seen).double()
    pooled = torch.cat((seen.mean(dim=1), seen.amax(dim=1)), dim=1)
    torch.testing.assert_close(found[:, :5], F.normalize(pooled @ branch.image_proj.weight.T, dim=1), atol=1e-6, rtol=0)
    named = F.normalize(seen.mean(dim=1) @ branch.class_proj.weight.T, dim=1)
    torch.testing.assert_close(found[:, 5:], named, atol=1e-6, rtol=0)


def test_similarities_are_weighted_means_of_the_parts(model: CoCa) -> None:
    """Those of one image to several texts, up to the length that each text's class part has."""
    branch, (ids, mask) = model.linear_branch, texts()
    assert branch is not None
    with torch.no_grad():
        branch.word_embed.weight[[5, 6], 5:] *= 60
    seen = features(model)
    image, text = model.pool_image(seen).embed, model.encode_text(ids, mask).embed
    assert image.shape == text.shape == (2, model.config.embed_size)
    labels = model.label_embeds(text)
    for embed in (image, text, labels):
        torch.testing.assert_close(embed.norm(dim=1), torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)
    parts = [(model.deep_embeds(image), model.deep_embeds(text))]
    vectors = branch.image_vectors(seen).double(), branch.text_vectors(ids, mask).double()
    parts += [tuple(v[:, :5] for v in vectors), tuple(v[:, 5:] for v in vectors)]  # pyright: ignore[reportArgumentType]
    length = vectors[1][:, 5:].norm(dim=1)
    assert float(length[0]) > 0.1 > float(length[1])
    # A label's class part has the length of label_weight, or what it has of it where it is short.
    for factor, found in ((torch.ones(2), text), (3 / length.clamp(min=0.1), labels)):
        wanted = sum(w * (i @ t.T) for w, (i, t) in zip((1.0, 2.0, 4.0 * factor), parts, strict=True))
        lengths = (3 + 4 * (factor * length).square()).sqrt() * 7**0.5
        torch.testing.assert_close(image @ found.T, wanted / lengths, atol=1e-6, rtol=0)
    learned = model.linear_embeds(seen, ids, mask)
    torch.testing.assert_close(learned[0].double(), parts[1][0])
    torch.testing.assert_close(learned[1].double(), parts[1][1])


def test_without_a_branch_nothing_is_added(make_config) -> None:
    plain = CoCa(make_config()).eval()
    ids, mask = texts()
    embed = plain.encode_text(ids, mask).embed
    assert embed.shape[1] == plain.config.embed_size == plain.config.embed_dim
    assert plain.label_embeds(embed) is embed
    assert plain.deep_embeds(embed) is embed
    with pytest.raises(ValueError, match="no linear branch"):
        plain.linear_embeds(torch.zeros(1, 1, 1), ids, mask)


def test_a_branch_that_is_added_changes_no_deep_embedding(model: CoCa) -> None:
    start = CoCa(replace(model.config, linear=LinearConfig())).double().eval()
    transfer = take_weights(model, start)
    assert not transfer.left
    assert all(name.startswith("linear_branch.") for name in transfer.new)
    ids, mask = texts()
    found, expected = model.encode_text(ids, mask).embed, start.encode_text(ids, mask).embed
    torch.testing.assert_close(model.deep_embeds(found), expected, atol=1e-12, rtol=0)


def test_words_of_another_vocabulary_are_new(model: CoCa) -> None:
    """So are columns that mean something else, though there are as many."""
    words = "linear_branch.word_embed.weight"
    again = CoCa(model.config).double()
    assert words in take_weights(again, model).copied
    assert words in take_weights(again, model, same_vocabulary=False).new
    turned = CoCa(replace(model.config, linear=replace(model.config.linear, dim=3, class_dim=5))).double()
    assert words in take_weights(turned, model).new


def test_autocast_changes_no_text(model: CoCa) -> None:
    """The mean of words and what follows are in float32, as images are."""
    branch, (ids, mask) = model.float().linear_branch, texts()
    assert branch is not None
    with torch.autocast("cpu", torch.bfloat16):
        found = branch.text_vectors(ids, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, branch.text_vectors(ids, mask), rtol=0, atol=0)


def test_what_is_fitted_has_no_gradient(model: CoCa) -> None:
    branch, (ids, mask) = model.linear_branch, texts()
    assert branch is not None
    image, text = model.pool_image(features(model)).embed, model.encode_text(ids, mask).embed
    (image @ text.T).square().sum().backward()
    gradient = branch.word_embed.weight.grad
    assert gradient is not None
    assert gradient[:, :5].any()
    assert not gradient[:, 5:].any()
    assert branch.class_proj is not None
    assert any(parameter is branch.class_proj.weight for parameter in model.unused_parameters(True, True))


def test_the_traced_text_is_the_same(model: CoCa) -> None:
    ids, mask = texts()
    torch.testing.assert_close(TextGraph(model)(ids, mask), model.encode_text(ids, mask).embed, atol=1e-6, rtol=0)


def test_words_and_channels_are_left_out_in_training_alone(make_config) -> None:
    torch.manual_seed(0)
    linear = LinearConfig(dim=8, image_dropout=0.5, word_dropout=0.5)
    branch = CoCa(replace(make_config(), linear=linear)).linear_branch
    assert branch is not None
    ids, seen = torch.arange(3, 23)[None], torch.rand(1, 4, branch.image_proj.in_features // 2)
    branch.eval()
    assert torch.equal(branch.text_vectors(ids), branch.text_vectors(ids))
    assert torch.equal(branch.image_vectors(seen), branch.image_vectors(seen))
    branch.train()
    assert not torch.allclose(branch.text_vectors(ids), branch.text_vectors(ids))
    assert not torch.allclose(branch.image_vectors(seen), branch.image_vectors(seen))


def test_least_squares_find_the_words_that_made_the_texts() -> None:
    torch.manual_seed(0)
    words = torch.randn(20, 4)
    ids = [torch.randint(20, (int(length),)) for length in torch.randint(1, 9, (400,))]
    wanted = torch.stack([words[row].mean(dim=0) for row in ids])
    found = fit_words(ids, wanted, 20, 1e-4, torch.ones(400))
    torch.testing.assert_close(found, words, atol=1e-2, rtol=0)
    # What counts nothing changes nothing; what counts much is met more closely.
    wrong = torch.cat((wanted, torch.ones(1, 4)))
    weights = torch.ones(401)
    weights[-1] = 0
    torch.testing.assert_close(fit_words([*ids, ids[0]], wrong, 20, 1e-4, weights), found, atol=1e-4, rtol=0)
    errors = []
    for weight in (1.0, 100.0):
        weights[-1] = weight
        again = fit_words([*ids, ids[0]], wrong, 20, 1e-4, weights)
        errors.append(float((again[ids[0]].mean(dim=0) - 1).norm()))
    assert errors[1] < 0.5 * errors[0]
    assert float(fit_words(ids, wanted, 20, 1e4, torch.ones(400)).norm()) < 0.1 * float(found.norm())
