"""Stored features are those that the frozen stages give, computed once, and never stale."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opencoca.model.encoders.vit import VisionTransformer
from opencoca.system.files import WriteError
from opencoca.train import feature_cache, train
from opencoca.train.trainer import Trainer

from .helpers import Pairs, draw, largest_file, read_lines, tiny_recipe, write_pairs

# Training images without any augmentation, so that both ways see the same pixels.
PLAIN: dict[str, Any] = {
    "data__crop_scale": [1.0, 1.0],
    "data__crop_ratio": [1.0, 1.0],
    "data__flip_probability": 0.0,
    "encoder__frozen_stages": 2,
}
CACHED: dict[str, Any] = {"encoder__cache_features": True, "encoder__cache_views": 1}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through the first stages, call by call."""
    calls: list[int] = []
    real = VisionTransformer.run_stages

    def counting(self: VisionTransformer, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if start == 0 and x.device.type != "meta":
            calls.append(len(x))
        return real(self, x, start, stop)

    monkeypatch.setattr(VisionTransformer, "run_stages", counting)
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_equal_running_the_stages(pairs: Pairs, tmp_path: Path, precision: str) -> None:
    settings = {**PLAIN, "precision": precision, "data__captions_per_image": 2}
    cached = Trainer(tiny_recipe(pairs, tmp_path / "cached", **settings, **CACHED))
    direct = Trainer(tiny_recipe(pairs, tmp_path / "direct", **settings))
    encoder = direct.model.image_encoder
    ours, theirs = cached.batches.iterate(0), direct.batches.iterate(0)
    for _ in range(5):
        stored, pixels = next(ours).to(torch.device("cpu")), next(theirs)
        assert (stored.from_stage, pixels.from_stage) == (2, 0)
        for field in ("sample_ids", "token_ids", "token_mask"):
            assert torch.equal(getattr(stored, field), getattr(pixels, field))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
            expected = encoder.run_stages(pixels.images, 0, 2).float()
        error = (stored.images - expected).abs().max() / expected.abs().max()
        assert error < (1e-3 if precision == "fp32" else 2e-2)


def test_training_is_the_same_with_and_without_the_cache(pairs: Pairs, tmp_path: Path) -> None:
    """Frozen stages have no dropout in either way, and what follows them has the same."""
    settings = {**PLAIN, "model__image__dropout": 0.3, "model__text__dropout": 0.1, "epochs": 3, "log_every_steps": 1}
    cached = read_lines(train(tiny_recipe(pairs, tmp_path / "cached", **settings, **CACHED)))
    direct = read_lines(train(tiny_recipe(pairs, tmp_path / "direct", **settings)))
    cached, direct = ([line for line in lines if "loss" in line] for lines in (cached, direct))
    assert len(cached) == len(direct) == 9
    for ours, theirs in zip(cached, direct, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("frozen", [1, 2, -1])
def test_frozen_stages_stay_as_they_were(pairs: Pairs, output: Path, frozen: int, is_cached: bool) -> None:
    settings: dict[str, Any] = {"encoder__frozen_stages": frozen, "encoder__cache_features": is_cached}
    trainer = Trainer(tiny_recipe(pairs, output, optimizer__weight_decay=0.5, **settings))
    before = {name: tensor.clone() for name, tensor in trainer.model.image_encoder.state_dict().items()}
    trainer.run()
    for name, tensor in trainer.model.image_encoder.state_dict().items():
        stage = int(name.split(".")[1])
        assert torch.equal(tensor, before[name]) == (frozen == -1 or stage < frozen), name


class TestViews:
    def trainer(self, pairs: Pairs, output: Path, **changes: Any) -> Trainer:
        settings = {"encoder__frozen_stages": 1, "encoder__cache_features": True, "encoder__cache_views": 4, **changes}
        return Trainer(tiny_recipe(pairs, output, **settings))

    def test_the_second_is_mirrored_unless_a_caption_speaks_of_sides(self, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path, count=6)
        text = pairs.table.read_text(encoding="utf-8")
        pairs.table.write_text(text.replace("a cat", "left of it a cat"), encoding="utf-8")
        trainer = self.trainer(pairs, tmp_path / "run", model__image__patch_size=8)
        assert trainer.batches.cache is not None
        views = trainer.batches.cache.features[:, :, :, :].astype(np.float32)
        assert views.shape == (4, 6, 16, 32)
        mirrored_equal = [np.array_equal(views[0, image], views[1, image]) for image in range(6)]
        assert mirrored_equal == [False, True, False, False, False, False]
        encoder = trainer.model.image_encoder
        source = trainer.train_source
        pixels = trainer.validator.transform(draw(0))  # pyright: ignore[reportOptionalMemberAccess]
        assert source.key(0) == "image0.png"
        with torch.no_grad():
            flipped = encoder.run_stages(pixels.flip(-1)[None], 0, 1)[0]
        assert np.allclose(views[1, 0], flipped.numpy(), atol=2e-3)
        assert not np.allclose(views[2], views[3], atol=1e-2)

    def test_all_are_used_and_chosen_anew_in_every_epoch(self, pairs: Pairs, output: Path) -> None:
        trainer = self.trainer(pairs, output, batch_size=10)
        assert trainer.batches.cache is not None
        features = torch.from_numpy(np.array(trainer.batches.cache.features))
        supply, used = trainer.batches.iterate(0), []
        for _ in range(12):
            batch = next(supply)
            rows = zip(batch.images, batch.sample_ids.tolist(), strict=True)
            matches = [[torch.equal(row, features[view, image]) for view in range(4)] for row, image in rows]
            assert all(any(match) for match in matches)
            used.append([match.index(True) for match in matches])
        assert {view for views in used for view in views} == {0, 1, 2, 3}
        assert len({tuple(sorted(views)) for views in used}) > 1

    def test_no_mirroring_where_the_recipe_has_none(self, pairs: Pairs, output: Path) -> None:
        trainer = self.trainer(pairs, output, data__flip_probability=0.0, encoder__cache_views=2, batch_size=10)
        assert trainer.batches.cache is not None
        features = torch.from_numpy(np.array(trainer.batches.cache.features[0]))
        supply = trainer.batches.iterate(0)
        for _ in range(5):
            batch = next(supply)
            assert torch.equal(batch.images, features[batch.sample_ids])


class TestComputedOnce:
    @pytest.fixture
    def setting(self, tmp_path: Path) -> tuple[Pairs, Callable[..., Trainer]]:
        pairs = write_pairs(tmp_path / "data", count=10)
        names = iter(range(100))

        def make(**changes: Any) -> Trainer:
            settings = {
                "encoder__frozen_stages": 2,
                "encoder__cache_features": True,
                "encoder__cache_views": 3,
                "encoder__cache_dir": str(tmp_path / "features"),
                **changes,
            }
            return Trainer(tiny_recipe(pairs, tmp_path / f"run{next(names)}", **settings))

        return pairs, make

    def test_by_the_first_run_alone(self, setting: tuple[Pairs, Callable[..., Trainer]], computed: list[int]) -> None:
        _, make = setting
        first = make()
        assert sum(computed) - 2 == 10 * 3 + 10  # views, validation images; and one sample for each of the two shapes
        computed.clear()
        second = make(optimizer__learning_rate=1e-4, model__text__dropout=0.1)
        assert computed == [1, 1]
        assert first.batches.cache is not None
        assert second.batches.cache is not None
        assert np.array_equal(first.batches.cache.features, second.batches.cache.features)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"seed": 1}, 40),  # other weights
            ({"model__image__num_heads": 4}, 40),  # the same weights, used otherwise
            ({"encoder__frozen_stages": 3}, 40),
            ({"precision": "bf16"}, 40),
            ({"data__mean": [0.4, 0.5, 0.5]}, 40),
            ({"data__resize_mode": "crop"}, 40),
            ({"encoder__cache_views": 2}, 20),  # the validation images have the one view that they had
            ({"data__crop_scale": [0.3, 1.0]}, 30),
            ({"data__color_jitter": 0.1}, 30),
        ],
        ids=str,
    )
    def test_again_when_the_recipe_changes_them(
        self,
        setting: tuple[Pairs, Callable[..., Trainer]],
        computed: list[int],
        changes: dict[str, Any],
        expected: int,
    ) -> None:
        _, make = setting
        make()
        computed.clear()
        make(**changes)
        assert sum(computed) - 2 == expected

    def test_again_when_an_image_is_replaced(
        self, setting: tuple[Pairs, Callable[..., Trainer]], computed: list[int]
    ) -> None:
        pairs, make = setting
        make()
        computed.clear()
        draw(99).save(pairs.images / "image3.png")
        changed = make()
        assert sum(computed) - 2 == 40
        assert changed.batches.cache is not None

    def test_again_when_the_file_was_cut(
        self, setting: tuple[Pairs, Callable[..., Trainer]], computed: list[int], tmp_path: Path
    ) -> None:
        _, make = setting
        make()
        for file in (tmp_path / "features").rglob("features.f16"):
            file.write_bytes(file.read_bytes()[:-2])
        computed.clear()
        make()
        assert sum(computed) - 2 == 40

    def test_an_interrupted_computation_goes_on(
        self,
        setting: tuple[Pairs, Callable[..., Trainer]],
        computed: list[int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        _, make = setting
        whole = make()
        shutil.move(tmp_path / "features", tmp_path / "whole")
        monkeypatch.setattr(feature_cache, "_BATCH", 1)  # progress is noted every 8 images
        computed.clear()
        real = VisionTransformer.run_stages

        def interrupted(*args: Any) -> torch.Tensor:
            if len(computed) > 1 + 3 * 9:  # one sample, then three views an image
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(VisionTransformer, "run_stages", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make()
        computed.clear()
        again = make()
        assert sum(computed) - 2 == 2 * 3 + 10
        assert whole.batches.cache is not None
        assert again.batches.cache is not None
        # One image at a time or ten: the same but for the rounding of the products.
        assert np.allclose(whole.batches.cache.features, again.batches.cache.features, atol=2e-3)


class TestBrokenImages:
    @pytest.fixture
    def damaged(self, tmp_path: Path) -> Pairs:
        pairs = write_pairs(tmp_path / "data", count=12)
        (pairs.images / "image4.png").write_bytes(b"\x89PNG and then nothing of it")
        return pairs

    def test_one_is_reported_and_left_out(self, damaged: Pairs, output: Path) -> None:
        recipe = tiny_recipe(damaged, output, encoder__frozen_stages=1, encoder__cache_features=True, batch_size=6)
        with pytest.warns(UserWarning, match=r"1 of 12 .* images are left out: .*image4\.png") as caught:
            trainer = Trainer(recipe)
        assert len([w for w in caught if "left out" in str(w.message)]) == 2  # of training, of validation
        supply = trainer.batches.iterate(0)
        seen = {image for _ in range(8) for image in next(supply).sample_ids.tolist()}
        assert seen == set(range(12)) - {4}
        trainer.run()
        captions = (output / "val_captions.json").read_text(encoding="utf-8")
        assert "image3.png" in captions
        assert "image4.png" not in captions
        validation = [line for line in read_lines(output) if line["kind"] == "validation"][-1]
        assert validation["num_images"] == 11

    def test_it_is_remembered(self, damaged: Pairs, tmp_path: Path, computed: list[int]) -> None:
        for name in ("first", "second"):
            settings = {"encoder__frozen_stages": 1, "encoder__cache_features": True}
            computed.clear()
            with pytest.warns(UserWarning, match=r"image4\.png"):
                Trainer(tiny_recipe(damaged, tmp_path / name, encoder__cache_dir=str(tmp_path / "cache"), **settings))
        assert computed == [1, 1]

    def test_without_a_cache_it_is_reported_too(self, damaged: Pairs, output: Path) -> None:
        with pytest.warns(UserWarning, match=r"image4\.png"):
            train(tiny_recipe(damaged, output, batch_size=12))
        validation = [line for line in read_lines(output) if line["kind"] == "validation"][-1]
        assert validation["num_images"] == 11

    def test_many_are_an_error(self, damaged: Pairs, output: Path) -> None:
        (damaged.images / "image7.png").write_text("words", encoding="utf-8")
        recipe = tiny_recipe(damaged, output, encoder__frozen_stages=1, encoder__cache_features=True)
        with pytest.raises(ValueError, match=r"2 of 12 training images are left out.*more than 10%"):
            Trainer(recipe)


def test_a_full_disk_is_one_error_and_space_mends_it(pairs: Pairs, output: Path) -> None:
    recipe = tiny_recipe(pairs, output, encoder__frozen_stages=1, encoder__cache_features=True)
    with largest_file(15_000), pytest.raises(WriteError) as error:
        Trainer(recipe)
    message = str(error.value)
    assert "no room for" in message
    assert "encoder.cache_dir" in message
    assert "\n" not in message
    assert not list(output.rglob("features.f16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Trainer(recipe).batches.cache is not None
