"""A training run from recipe to report: sets up, loops over steps, validates, keeps checkpoints, survives interruption.

What a step computes is in step.py; where batches come from, in batches.py; what is scored, in validation.py. One
process; a distributed engine replaces the batches' slice, the gather of embeddings and the gradient reduction, not this
loop.
"""

import json
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from opencoca.data import EvalTransform, ImageTextSource, PreprocessConfig, TrainTransform, open_source
from opencoca.data.loader import MAX_BROKEN_SHARE
from opencoca.files import atomic_write
from opencoca.interop.efficientnet_weights import load_imagenet_weights
from opencoca.model.coca import CoCa
from opencoca.model.image_encoders.efficientnet_lite import EfficientNetLite
from opencoca.model_folder import load_model_folder, save_model_folder
from opencoca.tokenizer import Tokenizer, train_tokenizer
from opencoca.train.batches import TrainBatch, TrainBatches
from opencoca.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from opencoca.train.feature_cache import CacheViews, FeatureCache, open_feature_cache
from opencoca.train.memory import keep_freed_memory, release_freed_memory
from opencoca.train.metrics_log import MetricsLog, MetricsWindow
from opencoca.train.optimizer import WeightAverage, build_optimizer, freeze_image_stages, freeze_unused
from opencoca.train.recipe import Recipe
from opencoca.train.report import write_report
from opencoca.train.run_folder import remember_recipe
from opencoca.train.step import TrainStep
from opencoca.train.validation import ValidationScores, Validator

_RELEASE_EVERY_STEPS = 20


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
        remember_recipe(self.folder, recipe, continues=self.checkpoint_path.is_file())
        self.tokenizer = self._make_tokenizer()
        text = replace(recipe.model.text, vocab_size=self.tokenizer.vocab_size)
        self.config = replace(recipe.model, text=text)
        self.preprocess = PreprocessConfig(
            self.config.image.image_size, recipe.data.mean, recipe.data.std, recipe.data.resize_mode
        )
        torch.manual_seed(recipe.seed)
        self.model = self._make_model()
        stages = freeze_image_stages(self.model, recipe.encoder.frozen_stages)
        freeze_unused(self.model, recipe.loss.contrastive_weight != 0, recipe.loss.caption_weight != 0)
        self.frozen_stages = stages
        self.cached_stages = stages if recipe.encoder.cache_features else 0
        self.average = WeightAverage(self.model, recipe.optimizer.ema_decay) if recipe.optimizer.ema_decay else None
        self.batches = self._make_batches()
        self.validator = self._make_validator()
        steps = recipe.epochs * self.batches.steps_per_epoch
        self.total_steps = min(steps, recipe.max_steps) if recipe.max_steps else steps
        progress = {"step": 0, "best": None, "best_step": 0, "seconds": 0.0, "window": {}}
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
        # Only the main thread may handle signals; in another one, stopping is the caller's affair.
        handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {name: signal.signal(name, self._ask_to_stop) for name in handled}
        try:
            if done < self.total_steps:
                self._loop(log)
            return self._finish()
        finally:
            log.close()
            for name, handler in previous.items():
                signal.signal(name, handler)

    def _loop(self, log: MetricsLog) -> None:
        progress = self.state.progress
        supply = self.batches.iterate(progress["step"])
        window = MetricsWindow(progress.get("window"))
        self._set_train_mode()
        saved = time.monotonic()
        with tqdm(total=self.total_steps, initial=progress["step"], desc="training", unit="step") as bar:
            while progress["step"] < self.total_steps:
                validated = self._advance(supply, window) and self._report_step(log, window, bar)
                now = time.monotonic()
                if validated or self._stop_asked or now - saved > 60 * self.recipe.checkpoint_minutes:
                    progress |= {"seconds": progress["seconds"] + now - saved, "window": window.state()}
                    saved = now
                    save_checkpoint(self.checkpoint_path, self.state)
                if self._stop_asked and progress["step"] < self.total_steps:
                    where = f"step {progress['step']} of {self.total_steps}"
                    raise TrainingInterrupted(f"stopped after {where}; the same command continues from there")

    def _advance(self, supply: Iterator[TrainBatch], window: MetricsWindow) -> bool:
        """One step; False if there was none, because the signal to stop has ended the worker processes as well."""
        began = time.monotonic()
        try:
            batch = next(supply)
        except RuntimeError:
            if self._stop_asked:
                return False
            raise
        waited = time.monotonic() - began
        metrics = self.step(batch, self.state.progress["step"], self.total_steps)
        self.state.progress["step"] += 1
        if self.device.type == "cpu" and self.state.progress["step"] % _RELEASE_EVERY_STEPS == 0:
            release_freed_memory()
        tokens = int(batch.token_mask.sum())
        window.add(metrics, len(batch.image_ids), tokens, waited, time.monotonic() - began)
        return True

    def _report_step(self, log: MetricsLog, window: MetricsWindow, bar: tqdm) -> bool:
        """Writes metrics and validates where they are due; True if it validated."""
        step = self.state.progress["step"]
        bar.update()
        if step % self.recipe.log_every_steps == 0 or step == self.total_steps:
            line = window.flush()
            log.write("train", step, line | {"epoch": self._epoch()})
            bar.set_postfix({name: f"{line[name]:.3g}" for name in ("loss", "lr")})
        validates = step % (self.recipe.validate_every_epochs * self.batches.steps_per_epoch) == 0
        if validates or step == self.total_steps:
            self._validate(log, bar)
            self._set_train_mode()
            return True
        return False

    def _set_train_mode(self) -> None:
        # Dropout in what is frozen would only add noise; cached features have none either.
        self.model.train()
        self.model.image_encoder.stages[: self.frozen_stages].eval()

    def _epoch(self) -> float:
        return round(self.state.progress["step"] / self.batches.steps_per_epoch, 3)

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
            with atomic_write(self.folder / "val_captions.json") as partial:
                partial.write_text(json.dumps(result.captions, indent=0), encoding="utf-8")
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
        if stored.is_file() and self.checkpoint_path.is_file():
            return Tokenizer.load(stored)  # without a checkpoint it may be that of another recipe
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
                first = str(error).splitlines()[1:2] or [str(error)]
                raise ValueError(
                    f"the image encoder of {init} does not fit this recipe's: {first[0].strip()}"
                ) from error
        return model.to(self.device).eval()

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
        cache = open_feature_cache(
            folder, encoder, self.cached_stages, source, views, self.device, label, self.recipe.precision
        )
        if cache.broken:
            message = f"{len(cache.broken)} of {len(source)} {label} are left out: {next(iter(cache.broken.values()))}"
            if len(cache.broken) > MAX_BROKEN_SHARE * len(source):
                raise ValueError(f"{message}; that is more than {MAX_BROKEN_SHARE:.0%}, remove or repair them")
            warnings.warn(message, stacklevel=2)
        return cache

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
