"""Self-critical training: what samples earn, and that likelier captions become better ones."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from opencoca.data import ImageFolder
from opencoca.generation.options import GeneratedCaption
from opencoca.tasks import make_task
from opencoca.tasks.pretraining import Pretraining, PretrainingOptions
from opencoca.tasks.self_critical import SelfCritic
from opencoca.tokenizer import LanguageText, train_tokenizer
from opencoca.train.trainer import Trainer
from train.helpers import Pairs, tiny_recipe, write_pairs

IMAGES, SAMPLES = 4, 3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=6, captions_per_image=2)


@pytest.fixture
def trainer(pairs: Pairs, tmp_path: Path) -> Trainer:
    changes = {"task__caption_weight": 0.0, "task__contrastive_weight": 0.0, "model__text__dropout": 0.3}
    recipe = tiny_recipe(pairs, tmp_path / "run", task__reward_weight=1.0, task__reward_samples=SAMPLES, **changes)
    return Trainer(recipe)


def critic_of(trainer: Trainer) -> SelfCritic:
    assert isinstance(trainer.task, Pretraining)
    critic = trainer.task._critic
    assert critic is not None
    return critic


def written(critic: SelfCritic, texts: Sequence[str], ends: bool = True) -> list[GeneratedCaption]:
    ids = [tuple(critic.tokenizer.encode(text)) for text in texts]
    return [GeneratedCaption(t, i if ends else i[:-1], 0.0, 1) for t, i in zip(texts, ids, strict=True)]


def test_captions_that_people_would_write_earn_most(trainer: Trainer) -> None:
    critic = critic_of(trainer)
    own, other = critic.source.captions(0)[0], critic.source.captions(1)[0]
    right, longer, wrong = critic.rewards(0, written(critic, [own, f"{own} with a", other]))
    assert right > longer > wrong
    assert right > 3.0, "of at most 10, and one of two references is another text"


def test_a_caption_without_its_end_earns_less(trainer: Trainer) -> None:
    critic = critic_of(trainer)
    text = critic.source.captions(0)[:1]
    assert critic.rewards(0, written(critic, text))[0] > critic.rewards(0, written(critic, text, ends=False))[0]


def test_advantages_are_those_over_the_other_samples(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the states give every sampled caption the log-probability that it was drawn with."""
    critic, model = critic_of(trainer), trainer.model
    seen: list[list[GeneratedCaption]] = []

    def rewards(index: int, texts: Sequence[GeneratedCaption]) -> list[float]:
        seen.append(list(texts))
        return [10.0 * index, 2.0, 3.0]

    monkeypatch.setattr(critic, "rewards", rewards)
    features = model.image_features(torch.randn(IMAGES, 3, 32, 32))
    model.eval()
    sampled = critic.sample(model, features, torch.arange(IMAGES))
    lengths = [text.length for texts in seen for text in texts]
    assert len(sampled.next_ids) == sum(lengths)
    assert len({text.text for texts in seen for text in texts}) > 1
    losses = F.cross_entropy(model.word_logits(sampled.hidden), sampled.next_ids, reduction="none").split(lengths)
    expected = [text.log_probability for texts in seen for text in texts]
    torch.testing.assert_close(torch.stack([-part.sum() for part in losses]), torch.tensor(expected))
    firsts = torch.stack([part[0] for part in sampled.advantages.split(lengths)]).view(IMAGES, SAMPLES)
    for index, found in enumerate(firsts.tolist()):
        own = 10.0 * index
        assert found == pytest.approx([own - 2.5, 2.0 - (own + 3.0) / 2, 3.0 - (own + 2.0) / 2])
    with torch.no_grad():
        by_hand = sum(a * -t for a, t in zip(firsts.flatten().tolist(), expected, strict=True))
    assert float(sampled.loss(model).detach()) == pytest.approx(by_hand, rel=1e-4)
    assert not model.training
    model.train()
    critic.sample(model, features, torch.arange(IMAGES))
    assert model.training


def test_training_by_reward_alone_raises_the_reward(pairs: Pairs, tmp_path: Path) -> None:
    changes = {"optimizer__learning_rate": 0.01, "val_max_new_tokens": 8, "epochs": 1, "max_steps": 1}
    recipe = tiny_recipe(pairs, tmp_path / "run", task__reward_weight=1.0, **changes)
    trainer = Trainer(recipe)
    critic = critic_of(trainer)
    # That one word earns, so that a few steps suffice.
    critic.rewards = lambda index, texts: [float("boat" in text.text) for text in texts]  # pyright: ignore
    batch, means = next(iter(trainer.batches.iterate(0))), []
    for step in range(25):
        trainer.step(batch, step + 10, 1000)
        means.append(critic.mean_reward)
    assert sum(means[-3:]) / 3 > 0.5 + sum(means[:3]) / 3


def test_options_that_would_learn_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="are all 0"):
        PretrainingOptions(contrastive_weight=0, caption_weight=0)
    with pytest.raises(ValueError, match=r"task.reward_samples 1 must be 2"):
        PretrainingOptions(reward_weight=1.0, reward_samples=1)
    task = make_task(PretrainingOptions(contrastive_weight=0, caption_weight=0, reward_weight=2.0))
    assert [(term.name, term.weight) for term in task.terms] == [("reward", 2.0)]
    assert [term.name for term in task.validated().terms] == ["caption"]


def test_samples_are_compared_with_captions_in_their_language(pairs: Pairs) -> None:
    """Chinese ones by characters; an image that nobody described in it teaches nothing."""
    captions = {"a": ("a dog", "一只黑狗"), "b": ("a cat", "两只猫"), "c": ("a bird",)}
    spoken = {k: tuple(LanguageText(t, "en" if t.isascii() else "zh") for t in own) for k, own in captions.items()}
    source = ImageFolder(pairs.images, spoken, spoken)
    tokenizer = train_tokenizer(["a dog 一只黑狗"] * 3, 300, languages=["en", "zh"])
    critic = SelfCritic(source, tokenizer.in_language("zh"), 2, 8)
    right, wrong, english = critic.rewards(0, written(critic, ["一只白狗", "两只猫", "a dog"]))
    assert right > max(wrong, english)
    assert critic.rewards(2, written(critic, ["a bird", "一只鸟"])) == [0.0, 0.0]
