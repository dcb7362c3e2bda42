"""Naming: a network learns to say with names of classes what its image encoder's classifier says."""

import copy
from dataclasses import replace
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import pytest
import torch

from opencoca.data import decode_image
from opencoca.data.transforms import EvalTransform, PreprocessConfig
from opencoca.evaluation.prompts import load_imagenet_class_names
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.store.interop.efficientnet_weights import load_imagenet_weights
from opencoca.tasks import naming
from opencoca.tasks.naming import Namer
from opencoca.tokenizer import Tokenizer
from opencoca.train.trainer import Trainer
from train.helpers import tiny_recipe, write_pairs

CLASSES = 12


@pytest.fixture(scope="module")
def network() -> CoCa:
    config = CoCaConfig.named("tiny")
    image = replace(config.image, name="efficientnet_lite0", image_size=(64, 64))
    text = replace(config.text, vocab_size=Tokenizer.clip().vocab_size)
    torch.manual_seed(0)
    model = CoCa(replace(config, image=image, text=text)).eval()
    load_imagenet_weights(model.image_encoder)  # pyright: ignore[reportArgumentType]
    model.image_encoder.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def namer(network: CoCa) -> Namer:
    return Namer(network, Tokenizer.clip(), CLASSES)


@pytest.fixture(scope="module")
def features(network: CoCa) -> torch.Tensor:
    with torch.no_grad():
        return network.image_features(torch.randn(8, 3, 64, 64))


def test_the_classifier_knows_a_cat(network: CoCa, namer: Namer) -> None:
    photo = files("opencoca").joinpath("assets/photos/cat.jpg").read_bytes()
    image = EvalTransform(PreprocessConfig((224, 224), mean=(0.498, 0.498, 0.498), std=(0.502, 0.502, 0.502)))(
        decode_image(BytesIO(photo).read(), name="cat.jpg")
    )
    with torch.no_grad():
        logits = namer.logits(network.image_features(image[None]))
    names = load_imagenet_class_names()
    assert names[int(logits.argmax())] == "Egyptian Mau"
    assert float(logits.softmax(dim=1).max()) > 0.3


def test_imagined_features_are_possible_ones_of_other_classes(namer: Namer, features: torch.Tensor) -> None:
    torch.manual_seed(0)
    imagined = namer.imagine(features, 200)
    assert imagined.shape == (200, *features.shape[1:])
    assert float(imagined.min()) >= 0
    assert float(imagined.max()) <= 6
    shown, found = (set(namer.logits(each).argmax(dim=1).tolist()) for each in (features, imagined))
    assert len(found) > 10 * len(shown)


def test_the_loss_is_zero_where_the_similarities_say_what_the_classifier_says(
    network: CoCa, namer: Namer, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one real image and none imagined: similarities that are the classifier's logits, and others that are not."""
    first, embed = features[:1], torch.nn.functional.normalize(torch.randn(1, network.config.embed_dim), dim=-1)
    logits = namer.logits(first)
    right = 0.01 * logits[0, :, None] * embed / network.logit_scale.detach()

    def says(similarities: torch.Tensor) -> float:
        drawn = torch.arange(20, 20 + CLASSES)
        monkeypatch.setattr(namer, "_draw", lambda _: drawn)
        output = network.encode_text(torch.ones(CLASSES, 3, dtype=torch.int64))
        monkeypatch.setattr(network, "encode_text", lambda *_: output._replace(embed=similarities[drawn]))
        found = namer.loss(network, first, embed, 0.01 * logits)
        monkeypatch.undo()
        return float(found.detach())

    assert says(right) == pytest.approx(0, abs=1e-6)
    assert says(-right) > 1e-4


def test_training_by_naming_alone_brings_images_to_their_names(tmp_path: Path) -> None:
    """Over fresh draws of imagined images and classes, the loss falls well below that of equal probabilities."""
    pairs = write_pairs(tmp_path / "pairs", count=8)
    changes = {"task__contrastive_weight": 0.0, "task__caption_weight": 0.0, "encoder__frozen_stages": -1}
    changes |= {"model__image__name": "efficientnet_lite0", "encoder__init": "imagenet", "batch_size": 8}
    changes |= {"model__image__image_size": [64, 64], "task__naming_classes": 40, "optimizer__learning_rate": 0.01}
    trainer = Trainer(tiny_recipe(pairs, tmp_path / "run", task__naming_weight=1.0, **changes))
    assert [term.name for term in trainer.task.terms] == ["naming"]
    batch = next(iter(trainer.batches.iterate(0)))
    losses = [trainer.step(batch, step + 10, 1000).terms["naming"] for step in range(40)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_what_cannot_be_named_is_refused(network: CoCa) -> None:
    with pytest.raises(ValueError, match="needs an image encoder with a classifier"):
        Namer(CoCa(CoCaConfig.named("tiny")), Tokenizer.clip(), CLASSES)
    other = CoCa(network.config)
    with pytest.raises(ValueError, match=r"set encoder.init to imagenet"):
        Namer(other, Tokenizer.clip(), CLASSES)


def test_trained_stages_must_go_on_telling_the_classifier_the_same(
    network: CoCa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier reads an untrained copy; what trained features say else is added to the loss of real images."""
    monkeypatch.setattr("opencoca.tasks.naming.imagined_images", lambda _: 0)
    trained = copy.deepcopy(network)
    trained.image_encoder.stages[5:].requires_grad_(True)
    namer = Namer(trained, Tokenizer.clip(), CLASSES)
    images = torch.randn(4, 3, 64, 64)
    untrained = network.image_features(images)
    changed = untrained * torch.linspace(0, 2, untrained.shape[-1])
    said = namer.say(images, 0, changed)
    torch.testing.assert_close(said, namer.logits(untrained))
    embed = trained.pool_image(untrained).embed

    def loss(seen: torch.Tensor) -> float:
        torch.manual_seed(0)
        return float(namer.loss(trained, seen, embed, said).detach())

    same, drifted = loss(untrained), loss(changed)
    own = torch.nn.functional.kl_div(
        namer.logits(changed).log_softmax(1), said.log_softmax(1), reduction="sum", log_target=True
    )
    assert float(own) > 0.1
    assert drifted - same == pytest.approx(float(own), rel=1e-4)


def test_a_shortcut_begins_with_what_tells_the_classes_apart(network: CoCa, features: torch.Tensor) -> None:
    """With as many outputs as the classifier has directions, distances between features mean to it what they meant."""
    pooler = replace(network.config.pooler, add_mean=True)
    model = CoCa(replace(network.config, pooler=pooler))
    load_imagenet_weights(model.image_encoder)  # pyright: ignore[reportArgumentType]
    namer = Namer(model, Tokenizer.clip(), CLASSES)
    shortcut = model.mean_shortcut
    assert shortcut is not None
    begun = shortcut.proj.weight.detach().clone()
    torch.testing.assert_close(begun @ begun.T, 4 * torch.eye(len(begun)), atol=1e-4, rtol=0)
    differences = namer.weight - namer.weight.mean(dim=0)
    kept = 0.25 * (differences @ begun.T).square().sum() / differences.square().sum()
    random = torch.linalg.qr(torch.randn(begun.shape[1], len(begun)))[0].T
    assert float(kept) > 1.5 * float((differences @ random.T).square().sum() / differences.square().sum())
    with torch.no_grad():
        shortcut.proj.weight.mul_(0.5)
    Namer(model, Tokenizer.clip(), CLASSES)  # a trained one is left alone
    torch.testing.assert_close(shortcut.proj.weight.detach(), 0.5 * begun)


def test_a_frozen_encoder_may_have_been_trained_before(network: CoCa) -> None:
    later = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in later.image_encoder.stages[-2:].parameters():
            parameter.mul_(1.1)
    assert Namer(later, Tokenizer.clip(), CLASSES)._teacher is None


def test_names_learn_where_the_shortcut_takes_their_classes(
    network: CoCa, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One minus the cosine of a name and its class's own direction: 0 where they agree, 2 where they are opposite."""
    model = CoCa(replace(network.config, pooler=replace(network.config.pooler, add_mean=True))).eval()
    load_imagenet_weights(model.image_encoder)  # pyright: ignore[reportArgumentType]
    namer = Namer(model, Tokenizer.clip(), CLASSES)
    assert model.mean_shortcut is not None
    classes = torch.tensor([3, 500])
    with torch.no_grad():
        embeds = namer._class_embeds(model, classes)
        mean = (namer.weight - namer.weight.mean(dim=0))[classes]
        torch.testing.assert_close(embeds, model.project_vector(model.mean_shortcut(mean[:, None])))
        seen, said = model.pool_image(features).embed, namer.logits(features)
    names: list[torch.Tensor] = []

    def encode_text(*arguments: torch.Tensor) -> object:
        found = CoCa.encode_text(model, *arguments)
        names.append(found.embed.detach())
        return found

    monkeypatch.setattr(model, "encode_text", encode_text)

    def loss(sign: float) -> float:
        monkeypatch.setattr(namer, "_class_embeds", lambda network, classes: sign * names[-1])
        torch.manual_seed(0)
        return float(namer.loss(model, features, seen, said).detach())

    assert loss(-1.0) - loss(1.0) == pytest.approx(2 * naming._CLASSES * 12, rel=1e-4)  # 8 images and 4 imagined
