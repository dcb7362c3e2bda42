"""One optimizer step: what it refuses, what accumulation and a weight of 0 mean, and what clipping bounds."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opencoca.data import Batch
from opencoca.model.kernels.linear import pack_weights
from opencoca.train import train
from opencoca.train.step import NonFiniteLossError, TrainStep
from opencoca.train.trainer import Trainer

from .helpers import AfterCall, Pairs, content, files_of_checkpoints, read_lines, tiny_recipe

SAVE_EVERY_STEP: dict[str, Any] = {"checkpoint_minutes": 0.0, "checkpoint__in_background": False}


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """All that a step may change."""
    found = {f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for parameter, values in trainer.state.optimizer.state.items():
        found |= {f"{key}/{names[id(parameter)]}": torch.as_tensor(value) for key, value in values.items()}
    if trainer.average is not None:
        found |= {f"average/{name}": tensor for name, tensor in trainer.average.state().items()}
        found["updates"] = torch.tensor(trainer.average.updates)
    return copy.deepcopy(found)


def first_batch(trainer: Trainer) -> Batch:
    return next(trainer.batches.iterate(0))


def with_inputs(batch: Batch, inputs: Tensor) -> Batch:
    return replace(batch, images=inputs)


class TestNonFiniteLoss:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("accumulation_steps", [1, 2])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_a_bad_pixel_changes_nothing(
        self, pairs: Pairs, output: Path, value: float, accumulation_steps: int, precision: str
    ) -> None:
        changes: dict[str, Any] = {"accumulation_steps": accumulation_steps, "precision": precision}
        trainer = Trainer(tiny_recipe(pairs, output, optimizer__ema_decay=0.9, **changes))
        batch = first_batch(trainer)
        trainer.step(batch, 0, 4)
        before = snapshot(trainer)
        inputs = batch.images.clone()
        inputs[-1, 0, 3, 3] = value
        with pytest.raises(NonFiniteLossError, match=r"step 1: .*no parameter was changed"):
            trainer.step(with_inputs(batch, inputs), 1, 4)
        after = snapshot(trainer)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        # Nor is anything of it left over for the next step.
        trainer.step(batch, 1, 4)
        assert all(tensor.isfinite().all() for tensor in snapshot(trainer).values())

    def test_a_poisoned_parameter_stops_the_run_and_leaves_its_files(self, pairs: Pairs, output: Path) -> None:
        trainer = Trainer(tiny_recipe(pairs, output, optimizer__ema_decay=0.9, **SAVE_EVERY_STEP, epochs=3))
        poisoned: dict[str, Any] = {}

        def poison() -> None:
            with torch.no_grad():
                trainer.model.unimodal_decoder.cls_embed[0] = float("nan")
            poisoned["state"] = snapshot(trainer)

        trainer.step = AfterCall(trainer.step, {4}, lambda: None)  # pyright: ignore
        supply = trainer.batches.iterate

        def poisoning(step: int) -> Any:
            for number, batch in enumerate(supply(step)):
                if number == 3:
                    poisoned["files"] = content(output) | files_of_checkpoints(output)
                    poison()
                yield batch

        trainer.batches.iterate = poisoning
        with pytest.raises(NonFiniteLossError, match="step 3"):
            trainer.run()
        after = snapshot(trainer)
        assert all(torch.equal(after[key].nan_to_num(7), kept.nan_to_num(7)) for key, kept in poisoned["state"].items())
        assert content(output) | files_of_checkpoints(output) == poisoned["files"]
        assert "checkpoints/step-00000003/rank-00000.safetensors" in poisoned["files"]

    def test_a_huge_learning_rate_is_stopped(self, pairs: Pairs, output: Path) -> None:
        recipe = tiny_recipe(pairs, output, optimizer__learning_rate=1e36, optimizer__warmup_steps=0, epochs=10)
        with pytest.raises(NonFiniteLossError, match=r"Lower optimizer\.learning_rate"):
            train(recipe)


def test_weights_that_were_rearranged_for_decoding_are_not_used_after_a_step(pairs: Pairs, output: Path) -> None:
    trainer = Trainer(tiny_recipe(pairs, output, loss__contrastive_weight=0.0))
    batch, model = first_batch(trainer), trainer.model.eval()
    packed = pack_weights(model)
    for step in range(3):
        trainer.step(batch, step, 4)
    with torch.no_grad():
        found = model(batch.images, batch.token_ids, batch.token_mask).hidden
        expected = copy.deepcopy(model)(batch.images, batch.token_ids, batch.token_mask).hidden
    assert packed
    assert torch.equal(found, expected)


class GradientRecorder:
    """The gradients that the optimizer was given, by name."""

    def __init__(self, trainer: Trainer):
        self.grads: dict[str, Tensor] = {}
        self.trainer = trainer
        trainer.state.optimizer.register_step_pre_hook(self._record)

    def _record(self, *_: object) -> None:
        named = self.trainer.model.named_parameters()
        self.grads = {name: p.grad.clone() for name, p in named if p.grad is not None}


def gradients_of(recipe: Any, batch: Batch | None = None) -> tuple[dict[str, Tensor], Any]:
    trainer = Trainer(recipe)
    recorder = GradientRecorder(trainer)
    metrics = trainer.step(first_batch(trainer) if batch is None else batch, 0, 10)
    return recorder.grads, metrics


class TestAccumulation:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("accumulation_steps", [2, 4, 8])
    def test_captioning_gradients_are_those_of_the_whole_batch(
        self, pairs: Pairs, tmp_path: Path, accumulation_steps: int, reduction: str
    ) -> None:
        changes: dict[str, Any] = {
            "batch_size": 8,
            "data__captions_per_image": 2,
            "loss__contrastive_weight": 0.0,
            "loss__caption_reduction": reduction,
            "loss__label_smoothing": 0.1,
            "optimizer__grad_clip": 0.0,
        }
        whole, one = gradients_of(tiny_recipe(pairs, tmp_path / "whole", **changes))
        parts, many = gradients_of(
            tiny_recipe(pairs, tmp_path / "parts", accumulation_steps=accumulation_steps, **changes)
        )
        assert whole.keys() == parts.keys()
        for name, expected in whole.items():
            tolerance = 1e-6 * max(1.0, float(expected.abs().max()))
            assert torch.allclose(parts[name], expected, rtol=0, atol=tolerance), name
        assert many.loss == pytest.approx(one.loss, rel=1e-6)
        assert many.terms["caption"] == pytest.approx(one.terms["caption"], rel=1e-6)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)

    def test_captions_differ_in_length(self, pairs: Pairs, output: Path) -> None:
        batch = first_batch(Trainer(tiny_recipe(pairs, output, batch_size=8, data__captions_per_image=2)))
        halves = [half.num_tokens for half in batch.split(1)[0].split(2)]
        assert halves[0] != halves[1]  # or equal weights would pass the test above

    def test_contrastive_gradient_is_the_mean_of_the_micro_batches(self, pairs: Pairs, tmp_path: Path) -> None:
        changes = {"batch_size": 8, "loss__caption_weight": 0.0, "optimizer__grad_clip": 0.0}
        recipe = tiny_recipe(pairs, tmp_path / "parts", accumulation_steps=2, **changes)
        batch = first_batch(Trainer(recipe))
        together, metrics = gradients_of(recipe, batch)
        halves = [gradients_of(tiny_recipe(pairs, tmp_path / "half", **changes), half) for half in batch.split(2)]
        for name, grad in together.items():
            expected = (halves[0][0][name] + halves[1][0][name]) / 2
            assert torch.allclose(grad, expected, atol=1e-6), name
        assert metrics.terms["contrastive"] == pytest.approx(
            sum(m.terms["contrastive"] for _, m in halves) / 2, rel=1e-6
        )

    @pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 7])
    def test_any_split_gives_back_all_rows_in_order(self, pairs: Pairs, output: Path, parts: int) -> None:
        batch = first_batch(Trainer(tiny_recipe(pairs, output, batch_size=5, data__captions_per_image=3)))
        pieces = list(batch.split(1)[0].split(parts))
        assert len(pieces) == parts
        assert all(len(piece.token_ids) == 3 * len(piece.sample_ids) == 3 * len(piece.images) for piece in pieces)
        sizes = [len(piece.sample_ids) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1
        for field in ("images", "sample_ids", "token_ids", "token_mask"):
            assert torch.equal(torch.cat([getattr(piece, field) for piece in pieces]), getattr(batch, field))


# Which parameters only the one loss needs, in a model with projections and an untied head.
ONLY_CONTRASTIVE = (
    "image_pooling.poolers.contrastive_pooler.",
    "unimodal_decoder.cls_embed",
    "unimodal_decoder.norm.",
    "image_proj.",
    "text_proj.",
    "log_logit_scale",
)
ONLY_CAPTIONING = ("multimodal_decoder.", "lm_head.")
CONTRASTIVE_SCORES = {"contrastive_loss", "image_to_text_r1", "text_to_image_r1", "num_texts"}
CAPTIONING_SCORES = {"caption_loss", "bleu_4", "cider_d", "rouge_l"}


class TestOneLossAlone:
    @pytest.mark.parametrize("arrangement", ["cascade", "parallel", "shared"])
    @pytest.mark.parametrize("kept", ["contrastive", "caption"])
    def test_trains_and_leaves_the_other_half_alone(
        self, pairs: Pairs, output: Path, kept: str, arrangement: str
    ) -> None:
        dropped = "caption" if kept == "contrastive" else "contrastive"
        changes: dict[str, Any] = {f"loss__{dropped}_weight": 0.0, "model__pooler__arrangement": arrangement}
        changes |= {"model__text__tie_embeddings": False, "epochs": 12, "batch_size": 10, "validate_every_epochs": 6}
        trainer = Trainer(tiny_recipe(pairs, output, log_every_steps=1, **changes))
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.run()
        unused = list(ONLY_CAPTIONING if kept == "contrastive" else ONLY_CONTRASTIVE)
        if (kept, arrangement) == ("contrastive", "parallel"):
            unused.append("image_pooling.poolers.caption_pooler.")
        for name, parameter in trainer.model.named_parameters():
            is_unused = name.startswith(tuple(unused))
            assert torch.equal(parameter, before[name]) == is_unused, name

        lines = read_lines(output)
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
        theirs, others = (
            (CONTRASTIVE_SCORES, CAPTIONING_SCORES)
            if kept == "contrastive"
            else (CAPTIONING_SCORES, CONTRASTIVE_SCORES)
        )
        for line in lines:
            assert not others & line.keys()
            assert theirs <= line.keys() or line["kind"] != "validation"
        assert any(line["kind"] == "validation" for line in lines)

    def test_both_losses_train_everything(self, pairs: Pairs, output: Path) -> None:
        trainer = Trainer(tiny_recipe(pairs, output, model__text__tie_embeddings=False))
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.run()
        same = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
        assert same == []

    def test_total_is_the_weighted_sum(self, pairs: Pairs, output: Path) -> None:
        _, metrics = gradients_of(tiny_recipe(pairs, output, loss__contrastive_weight=0.7, loss__caption_weight=1.9))
        assert metrics.loss == pytest.approx(
            0.7 * metrics.terms["contrastive"] + 1.9 * metrics.terms["caption"], rel=1e-6
        )


class TestClipping:
    @pytest.mark.parametrize("limit", [1e-3, 0.1, 1e6])
    def test_bounds_the_norm_and_keeps_the_direction(self, pairs: Pairs, tmp_path: Path, limit: float) -> None:
        free, metrics = gradients_of(tiny_recipe(pairs, tmp_path / "free", optimizer__grad_clip=0.0))
        clipped, same = gradients_of(tiny_recipe(pairs, tmp_path / "clipped", optimizer__grad_clip=limit))
        norm = torch.stack([grad.double().square().sum() for grad in free.values()]).sum().sqrt().item()
        assert metrics.grad_norm == same.grad_norm == pytest.approx(norm, rel=1e-5)
        scale = min(1.0, limit / norm)
        for name, grad in free.items():
            assert torch.allclose(clipped[name], grad * scale, rtol=1e-4, atol=1e-12), name


def test_a_step_is_that_of_adamw(pairs: Pairs, output: Path) -> None:
    """Three steps against the formulas (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), in float64."""
    trainer = Trainer(tiny_recipe(pairs, output, optimizer__decay="constant", optimizer__warmup_steps=2))
    recorder, options = GradientRecorder(trainer), trainer.recipe.optimizer
    values = {name: parameter.detach().double().clone() for name, parameter in trainer.model.named_parameters()}
    means = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in values.items()}
    decays = {id(p): group["weight_decay"] for group in trainer.state.optimizer.param_groups for p in group["params"]}
    supply = trainer.batches.iterate(0)
    for step in range(3):
        metrics = trainer.step(next(supply), step, 10)
        lr = options.learning_rate * min(1.0, (step + 1) / 2)
        assert metrics.lr == pytest.approx(lr)
        for name, parameter in trainer.model.named_parameters():
            grad, (first, second) = recorder.grads[name].double(), means[name]
            first.lerp_(grad, 1 - options.betas[0])
            second.lerp_(grad.square(), 1 - options.betas[1])
            unbiased = [m / (1 - b ** (step + 1)) for m, b in zip((first, second), options.betas, strict=True)]
            values[name] *= 1 - lr * decays[id(parameter)]
            values[name] -= lr * unbiased[0] / (unbiased[1].sqrt() + options.eps)
            assert torch.allclose(parameter.detach().double(), values[name], atol=2e-5), name


def test_train_step_is_called_with_what_it_needs_alone(pairs: Pairs, output: Path) -> None:
    """The step works on a batch made by hand: it opens no file and asks no loader."""
    trainer = Trainer(tiny_recipe(pairs, output))
    step = TrainStep(trainer.model, trainer.state.optimizer, None, trainer.recipe)
    ids = torch.tensor([[1, 5, 6, 2], [1, 9, 2, 0]])
    batch = Batch(torch.tensor([0, 1]), torch.randn(2, 3, 32, 32), ids, ids != 0)
    losses = [step(batch, number, 30).loss for number in range(30)]
    assert losses[-1] < 0.75 * losses[0]
