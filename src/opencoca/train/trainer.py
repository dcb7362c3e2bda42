"""A training run from recipe to report: sets up, loops over steps, validates, keeps checkpoints, survives interruption.

What a step computes is in step.py; where batches come from, in batches.py; what is scored, in validation.py. One process;
a distributed engine replaces the batches' slice, the gather of embeddings and the gradient reduction, not this loop.
"""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from opencoca.data import EvalTransform, ImageTextSource, PreprocessConfig, TrainTransform, open_source
from opencoca.interop.efficientnet_weights import load_imagenet_weights
from opencoca.model.coca import CoCa
from opencoca.model.image_encoders.efficientnet_lite import EfficientNetLite
from opencoca.model_folder import load_model_folder, save_model_folder
from opencoca.tokenizer import Tokenizer, train_tokenizer
from opencoca.train.batches import TrainBatches
from opencoca.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from opencoca.train.feature_cache import CacheViews, FeatureCache, open_feature_cache
from opencoca.train.memory import keep_freed_memory
from opencoca.train.metrics_log import MetricsLog
from opencoca.train.optimizer import WeightAverage, build_optimizer, freeze_image_stages, freeze_unused
from opencoca.train.recipe import Recipe
from opencoca.train.report import write_report
from opencoca.train.step import StepMetrics, TrainStep
from opencoca.train.validation import ValidationScores, Validator


class TrainingInterrupted(Exception):
    """The run was asked to stop and saved its state; running the same command again continues it."""


class Trainer:
    """``Trainer(recipe).run()`` trains, or continues what an earlier call began in the same folder."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = Path(recipe.output)
        self.device = _pick_device(recipe.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.train_source = _open(recipe.data.train_images, recipe.data.train_captions, "train")
        has_val = recipe.data.val_images is not None
        self.val_source = _open(recipe.data.val_images or "", recipe.data.val_captions, "val") if has_val else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._make_tokenizer()
        text = replace(recipe.model.text, vocab_size=self.tokenizer.vocab_size)
        self.config = replace(recipe.model, text=text)
        self.preprocess = PreprocessConfig(
            self.config.image.image_size, recipe.data.mean, recipe.data.std, recipe.data.resize_mode
        )
        torch.manual_seed(recipe.seed)
        self.model = self._make_model()
        self._check_same_recipe()
        stages = freeze_image_stages(self.model, recipe.encoder.frozen_stages)
        freeze_unused(self.model, recipe.loss.contrastive_weight != 0, recipe.loss.caption_weight != 0)
        self.cached_stages = stages if recipe.encoder.cache_features else 0
        self.average = WeightAverage(self.model, recipe.optimizer.ema_decay) if recipe.optimizer.ema_decay else None
        self.batches = self._make_batches()
        self.validator = self._make_validator()
        steps = recipe.epochs * self.batches.steps_per_epoch
        self.total_steps = min(steps, recipe.max_steps) if recipe.max_steps else steps
        progress = {"step": 0, "best": None, "best_step": 0, "seconds": 0.0}
        self.state = TrainState(self.model, build_optimizer(self.model, recipe), self.average, progress)
        self.step = TrainStep(self.model, self.state.optimizer, self.average, recipe)
        self._stop_asked = False

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "last.safetensors"

    def run(self) -> Path:
        """Trains to the end; returns the folder, which is then a model folder with the best weights.

        Raises TrainingInterrupted after Ctrl-C or SIGTERM (the state is saved), NonFiniteLossError, and OSError if
        something cannot be written (the checkpoint before it stays).
        """
        if self.checkpoint_path.is_file():
            load_checkpoint(self.checkpoint_path, self.state)
        done = self.state.progress["step"]
        log = MetricsLog(self.folder / "metrics.jsonl", done, self.recipe.tensorboard)
        previous = {name: signal.signal(name, self._ask_to_stop) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            if done < self.total_steps:
                self._loop(log)
            return self._finish()
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)

    def _loop(self, log: MetricsLog) -> None:
        progress = self.state.progress
        self.model.train()
        supply = self.batches.iterate(progress["step"])
        bar = tqdm(total=self.total_steps, initial=progress["step"], desc="training", unit="step", dynamic_ncols=True)
        window = _Window()
        saved = started = time.monotonic()
        while progress["step"] < self.total_steps:
            waited = time.monotonic()
            batch = next(supply)
            window.add_wait(time.monotonic() - waited)
            metrics = self.step(batch, progress["step"], self.total_steps)
            progress["step"] += 1
            window.add(metrics, len(batch.image_ids), int(batch.token_mask.sum()))
            bar.update()
            if progress["step"] % self.recipe.log_every_steps == 0 or progress["step"] == self.total_steps:
                line = window.flush()
                log.write("train", progress["step"], line | {"epoch": self._epoch()})
                bar.set_postfix({name: f"{line[name]:.3g}" for name in ("loss", "lr") if name in line})
            at_validation = self._is_validation_step()
            if at_validation:
                self._validate(log, bar)
            if at_validation or self._stop_asked or time.monotonic() - saved > 60 * self.recipe.checkpoint_minutes:
                progress["seconds"] += time.monotonic() - started
                saved = started = time.monotonic()
                save_checkpoint(self.checkpoint_path, self.state)
            if self._stop_asked and progress["step"] < self.total_steps:
                bar.close()
                raise TrainingInterrupted(
                    f"stopped after step {progress['step']} of {self.total_steps}; the same command continues from there"
                )
        bar.close()

    def _epoch(self) -> float:
        return round(self.state.progress["step"] / self.batches.steps_per_epoch, 3)

    def _is_validation_step(self) -> bool:
        every = self.recipe.validate_every_epochs * self.batches.steps_per_epoch
        step = self.state.progress["step"]
        return step % every == 0 or step == self.total_steps

    def _validate(self, log: MetricsLog, bar: tqdm) -> None:
        """Scores the averaged weights (if there are) and keeps them as the run's model if they are the best so far."""
        progress = self.state.progress
        if self.average is not None:
            self.average.swap(self.model)
        try:
            result = self.validator(self.model) if self.validator is not None else None
            score = result.selection(self.recipe.select_by) if result is not None else float(progress["step"])
            if result is not None:
                log.write("validation", progress["step"], result.scores | {"epoch": self._epoch()})
                bar.write(_validation_line(self._epoch(), result))
            if progress["best"] is None or score > progress["best"]:
                self._keep_best(result)
                progress["best"], progress["best_step"] = score, progress["step"]
        finally:
            if self.average is not None:
                self.average.swap(self.model)

    def _keep_best(self, result: ValidationScores | None) -> None:
        info: dict[str, Any] = {"recipe": self.recipe.to_dict(), "step": self.state.progress["step"]}
        if result is not None:
            info["validation"] = result.scores
            (self.folder / "val_captions.json").write_text(json.dumps(result.captions, indent=0), encoding="utf-8")
        save_model_folder(self.folder, self.model, self.tokenizer, self.preprocess, info=info)

    def _finish(self) -> Path:
        captions_path = self.folder / "val_captions.json"
        captions = json.loads(captions_path.read_text(encoding="utf-8")) if captions_path.is_file() else {}
        minutes = self.state.progress["seconds"] / 60
        best = f"best weights: step {self.state.progress['best_step']}"
        title = f"{self.folder.name}: {self.total_steps} steps in {minutes:.0f} minutes, {best}"
        write_report(self.folder, self.val_source, captions, title)
        return self.folder

    def _ask_to_stop(self, *_: object) -> None:
        if self._stop_asked:
            raise KeyboardInterrupt
        self._stop_asked = True

    def _make_tokenizer(self) -> Tokenizer:
        options = self.recipe.tokenizer
        stored = self.folder / "tokenizer.json"
        if options.source == "clip":
            return Tokenizer.clip()
        if options.source != "train":
            return Tokenizer.load(options.source)
        if stored.is_file():
            return Tokenizer.load(stored)
        source = self.train_source
        captions = [caption for image in range(len(source)) for caption in source.captions(image)]
        tokenizer = train_tokenizer(
            captions,
            options.vocab_size,
            lowercase=options.lowercase,
            strip_final_period=options.strip_final_period,
            min_frequency=options.min_frequency,
        )
        tokenizer.save(stored)
        return tokenizer

    def _make_model(self) -> CoCa:
        model = CoCa(self.config)
        init = self.recipe.encoder.init
        if init == "imagenet":
            if not isinstance(model.image_encoder, EfficientNetLite):
                raise ValueError(f"encoder.init imagenet is for efficientnet_lite, not {self.config.image.name}")
            load_imagenet_weights(model.image_encoder)
        elif init != "none":
            encoder = load_model_folder(init).model.image_encoder
            try:
                model.image_encoder.load_state_dict(encoder.state_dict())
            except RuntimeError as error:
                raise ValueError(f"the image encoder of {init} does not fit this recipe's: {error}") from error
        return model.to(self.device)

    def _check_same_recipe(self) -> None:
        """The run's folder remembers its recipe: continuing with another one would mix two runs."""
        path = self.folder / "recipe.json"
        ours = json.loads(json.dumps(self.recipe.to_dict()))
        if path.is_file() and self.checkpoint_path.is_file():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(_differences(theirs, ours))
            if differing:
                raise ValueError(
                    f"{self.folder} holds a run of another recipe (differs in {', '.join(differing[:5])}); "
                    "choose another --output, or delete that folder"
                )
        path.write_text(json.dumps(ours, indent=2), encoding="utf-8")

    def _transforms(self) -> tuple[EvalTransform, TrainTransform]:
        data = self.recipe.data
        training = TrainTransform(
            self.preprocess,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            flip_probability=data.flip_probability,
            color_jitter=data.color_jitter,
        )
        return EvalTransform(self.preprocess), training

    def _cache(self, source: ImageTextSource, training: bool, label: str) -> FeatureCache | None:
        if not self.cached_stages:
            return None
        evaluation, augmenting = self._transforms()
        count = self.recipe.encoder.cache_views if training else 1
        views = CacheViews(evaluation, augmenting if training else None, count, self.recipe.seed)
        folder = Path(self.recipe.encoder.cache_dir or self.folder / "features")
        encoder = self.model.image_encoder
        return open_feature_cache(folder, encoder, self.cached_stages, source, views, self.device, label)

    def _make_batches(self) -> TrainBatches:
        _, training = self._transforms()
        cache = self._cache(self.train_source, True, "training images")
        context = self.config.text.context_length
        return TrainBatches(
            self.recipe, self.train_source, self.tokenizer, training, context, cache, self.cached_stages
        )

    def _make_validator(self) -> Validator | None:
        if self.val_source is None:
            return None
        evaluation, _ = self._transforms()
        cache = self._cache(self.val_source, False, "validation images")
        return Validator(self.recipe, self.val_source, self.tokenizer, evaluation, cache, self.cached_stages)


class _Window:
    """Metrics between two lines of the log: means of the losses, rates, and where the time went."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.metrics: list[StepMetrics] = []
        self.images = self.tokens = 0
        self.wait = 0.0
        self.start = time.monotonic()

    def add_wait(self, seconds: float) -> None:
        self.wait += seconds

    def add(self, metrics: StepMetrics, images: int, tokens: int) -> None:
        self.metrics.append(metrics)
        self.images += images
        self.tokens += tokens

    def flush(self) -> dict[str, float]:
        seconds, steps = time.monotonic() - self.start, len(self.metrics)
        rows = [metrics.to_dict() for metrics in self.metrics]
        means = {name: sum(row[name] for row in rows) / steps for name in rows[0]}
        means |= {"lr": rows[-1]["lr"], "logit_scale": rows[-1]["logit_scale"]}
        means |= {"images_per_sec": self.images / seconds, "tokens_per_sec": self.tokens / seconds}
        means |= {"step_ms": 1e3 * seconds / steps, "data_wait_ms": 1e3 * self.wait / steps}
        self._reset()
        return means


def _open(images: str, captions: str | None, label: str) -> ImageTextSource:
    if not images:
        raise ValueError(f"the recipe names no data.{label}_images; add --data.{label}_images FOLDER")
    return open_source(images, captions)


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is none of auto, cpu, cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but there is no CUDA device; use --device cpu")
    return device


def _differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = first.keys() | second.keys()
        return [d for key in keys for d in _differences(first.get(key), second.get(key), f"{prefix}{key}.")]
    return [] if first == second else [prefix.rstrip(".")]


def _validation_line(epoch: float, result: ValidationScores) -> str:
    shown = {
        "val loss": ("loss", 1),
        "CIDEr-D": ("cider_d", 100),
        "BLEU-4": ("bleu_4", 100),
        "i2t R@1": ("image_to_text_r1", 100),
        "t2i R@1": ("text_to_image_r1", 100),
    }
    parts = [f"{k} {f * result.scores[name]:.2f}" for k, (name, f) in shown.items() if name in result.scores]
    return f"epoch {epoch:g}: " + "  ".join(parts)
