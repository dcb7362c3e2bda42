"""Recomputed and compiled blocks, frozen parts, patch dropout: what changes and what must not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opencoca.model.layers.blocks import TransformerBlock
from opencoca.model.structure import PARTS
from opencoca.train import train
from opencoca.train.optim.adafactor import Adafactor
from opencoca.train.optim.muon import Muon
from opencoca.train.optim.optimizer import parameter_groups
from opencoca.train.trainer import Trainer

from .helpers import Pairs, run_until_stopped, tiny_recipe


def gradients_of(trainer: Trainer) -> dict[str, Tensor]:
    trainer.model.train()
    trainer.step.batch_gradient(next(trainer.batches.iterate(0)), 0)
    named = trainer.model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def count_kept(trainer: Trainer) -> int:
    """Bytes that are kept between forward and backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gradients_of(trainer)
    return sum(kept.values())


class TestRecompute:
    @pytest.mark.parametrize("dropout", [0.3, pytest.param(0.0, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize(("kind", "every"), [("image", 1), ("text", 1), ("all", 1), ("all", 2)])
    def test_gradients_are_the_same_dropout_included(
        self, pairs: Pairs, tmp_path: Path, kind: str, every: int, precision: str, dropout: float
    ) -> None:
        changes: dict[str, Any] = {"precision": precision, "data__captions_per_image": 2}
        changes |= {"model__image__dropout": dropout, "model__text__dropout": dropout}
        plain = gradients_of(Trainer(tiny_recipe(pairs, tmp_path / "plain", **changes)))
        recipe = tiny_recipe(
            pairs, tmp_path / "again", compute__recompute=kind, compute__recompute_every=every, **changes
        )
        again = gradients_of(Trainer(recipe))
        assert plain.keys() == again.keys()
        for name, grad in plain.items():
            assert torch.equal(again[name], grad), name

    def test_less_is_kept(self, pairs: Pairs, tmp_path: Path) -> None:
        def kept(kind: str, every: int = 1) -> int:
            changes: dict[str, Any] = {"compute__recompute": kind, "compute__recompute_every": every}
            return count_kept(Trainer(tiny_recipe(pairs, tmp_path / f"{kind}{every}", **changes)))

        none, image, text, half, everything = kept("none"), kept("image"), kept("text"), kept("all", 2), kept("all")
        assert everything < min(image, text)
        assert max(image, text) < none
        assert everything < half < none

    def test_validation_recomputes_nothing(self, pairs: Pairs, output: Path) -> None:
        model = Trainer(tiny_recipe(pairs, output, compute__recompute="all")).model.eval()
        assert all(module.recompute for module in model.modules() if isinstance(module, TransformerBlock))
        with torch.no_grad():
            assert model.logits(torch.randn(1, 3, 32, 32), torch.tensor([[1, 2]])).isfinite().all()

    def test_needs_blocks(self, pairs: Pairs, output: Path) -> None:
        recipe = tiny_recipe(pairs, output, compute__recompute="image", model__image__name="efficientnet_lite0")
        with pytest.raises(ValueError, match="recompute image needs an image encoder with transformer blocks"):
            Trainer(recipe)


class TestCompile:
    def test_without_a_compiler(self, pairs: Pairs, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler on a CPU"):
            Trainer(tiny_recipe(pairs, output, compute__compile=True))

    @pytest.mark.slow
    def test_gradients_are_the_same(self, pairs: Pairs, tmp_path: Path) -> None:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("there is no C++ compiler")
        plain = gradients_of(Trainer(tiny_recipe(pairs, tmp_path / "plain")))
        compiled = gradients_of(Trainer(tiny_recipe(pairs, tmp_path / "compiled", compute__compile=True)))
        assert plain.keys() == compiled.keys()
        for name, grad in plain.items():
            assert float((compiled[name] - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-6, name


class TestParts:
    @pytest.mark.parametrize("frozen", [["image_encoder"], ["image_encoder", "image_pooling"], ["unimodal_decoder"]])
    def test_what_is_frozen_stays(self, pairs: Pairs, output: Path, frozen: list[str]) -> None:
        changes: dict[str, Any] = {"optimizer__frozen": frozen, "model__text__tie_embeddings": False}
        trainer = Trainer(tiny_recipe(pairs, output, **changes))
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.run()
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, before[name]) == name.startswith(tuple(frozen)), name

    def test_parts_have_their_own_learning_rates(self, pairs: Pairs, output: Path) -> None:
        rates = {"image_encoder": 1e-5, "multimodal_decoder": 3e-4}
        trainer = Trainer(tiny_recipe(pairs, output, optimizer__learning_rates=rates, optimizer__learning_rate=1e-3))
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        for group in trainer.state.optimizer.param_groups:
            for parameter in group["params"]:
                part = names[id(parameter)].split(".")[0]
                assert group["peak_lr"] == rates.get(part, 1e-3)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"optimizer__frozen": ["vision"]}, "optimizer.frozen names 'vision', which is none of image_encoder"),
            ({"optimizer__learning_rates": {"vision": 1.0}}, "optimizer.learning_rates names 'vision'"),
            ({"optimizer__learning_rates": {"heads": 0.0}}, "must be more than 0"),
            ({"optimizer__learning_rates": {"heads": 1.0}, "optimizer__frozen": ["heads"]}, "both name heads"),
            ({"optimizer__frozen": list(PARTS)}, "names every part"),
            (
                {"optimizer__learning_rates": {"image_encoder": 1.0}, "encoder__learning_rate": 1.0},
                "both set that of the image encoder",
            ),
            ({"optimizer__name": "adafactor", "distributed__strategy": "fsdp"}, "adafactor does not work with"),
            ({"optimizer__name": "muon", "distributed__strategy": "fsdp"}, "muon does not work with"),
            ({"optimizer__layer_decay": 1.5}, "layer_decay 1.5 must be more than 0 and at most 1"),
            ({"encoder__patch_dropout": 1.0}, "patch_dropout 1.0 must be at least 0 and less than 1"),
            ({"compute__recompute_every": 0}, "recompute_every 0 must be at least 1"),
        ],
    )
    def test_impossible_choices(self, pairs: Pairs, output: Path, changes: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            tiny_recipe(pairs, output, **changes)


class TestLayerDecay:
    def test_rates_fall_by_the_factor(self, pairs: Pairs, output: Path) -> None:
        recipe = tiny_recipe(pairs, output, optimizer__layer_decay=0.5, optimizer__learning_rate=1.0)
        model = Trainer(recipe).model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in parameter_groups(model, recipe):
            for parameter in group["params"]:
                assert group["peak_lr"] == 0.5 ** model.structure().layers_behind(names[id(parameter)])


class TestPatchDropout:
    @pytest.mark.parametrize("class_token", [False, True])
    def test_training_sees_fewer_patches(self, pairs: Pairs, output: Path, class_token: bool) -> None:
        recipe = tiny_recipe(pairs, output, encoder__patch_dropout=0.5, model__compat__image_class_token=class_token)
        encoder = Trainer(recipe).model.image_encoder
        images = torch.randn(3, 3, 32, 32)
        seen = encoder.train()(images)
        assert seen.shape[1] == 8 + class_token
        assert encoder.eval()(images).shape[1] == 16 + class_token
        start = encoder.run_stages(images, 0, 1)
        torch.manual_seed(5)
        kept = encoder.train().run_stages(images, 0, 1)
        for image in range(3):
            rows = [int((start[image] == row).all(1).nonzero()[0]) for row in kept[image]]
            assert rows == sorted(set(rows))
            assert not class_token or rows[0] == 0
        others = encoder.run_stages(images, 0, 1)
        assert not torch.equal(kept, others)

    def test_needs_a_vit(self, pairs: Pairs, output: Path) -> None:
        recipe = tiny_recipe(pairs, output, encoder__patch_dropout=0.5, model__image__name="efficientnet_lite0")
        with pytest.raises(ValueError, match="patch_dropout needs the image encoder vit"):
            Trainer(recipe)


class TestOtherOptimizers:
    @pytest.mark.parametrize("kind", [Adafactor, Muon])
    def test_trains_and_resumes_bit_for_bit(self, pairs: Pairs, tmp_path: Path, kind: type) -> None:
        changes: dict[str, Any] = {"optimizer__name": kind.__name__.lower(), "epochs": 3}
        whole = Trainer(tiny_recipe(pairs, tmp_path / "whole", **changes))
        assert isinstance(whole.state.optimizer, kind)
        whole.run()
        recipe = tiny_recipe(pairs, tmp_path / "halves", **changes)
        run_until_stopped(recipe, steps=2)
        train(recipe)
        halves = Trainer(recipe)
        halves.run()
        for (name, ours), (_, expected) in zip(
            halves.model.named_parameters(), whole.model.named_parameters(), strict=True
        ):
            assert torch.equal(ours, expected), name
