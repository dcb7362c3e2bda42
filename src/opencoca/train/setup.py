"""What a training run is made of, before it begins: data, vocabulary, model, stored features.

Every process prepares its own; what is written (the recipe, a vocabulary, features) the main process writes first.
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from opencoca.data import PreprocessConfig, SampleSource, TrainTransform
from opencoca.data.identity import data_identity
from opencoca.distributed.world import World
from opencoca.inference.loading import load_model
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.model.encoders.efficientnet_lite import EfficientNetLite
from opencoca.model.init import without_values
from opencoca.model.transfer import Transfer, take_weights
from opencoca.store.interop.efficientnet_weights import load_imagenet_weights
from opencoca.store.model_folder import LoadedModel, load_model_folder
from opencoca.system.allocator import keep_freed_memory, limit_kernel_caches
from opencoca.system.devices import choose_device
from opencoca.system.memory_use import most_bytes
from opencoca.tasks import make_task
from opencoca.tokenizer import Tokenizer, train_tokenizer
from opencoca.train.batches import TrainBatches
from opencoca.train.checkpoints import Checkpoints
from opencoca.train.compute import prepare_compute
from opencoca.train.data_sources import open_train_source, open_val_source, training_order
from opencoca.train.feature_cache import FeatureCaches
from opencoca.train.optim.optimizer import freeze
from opencoca.train.parallel import check_processes, is_built_in_shards
from opencoca.train.recipe.recipe import Recipe
from opencoca.train.run_folder import Progress, RunData, RunFolder
from opencoca.train.validation import Validator


class RunSetup:
    """The parts of a run. The model is not yet spread over processes; val_source and validator: None without one.

    recipe: as it is stored with the run, with the precision that was chosen. data: what the run is bound to.
    total_steps: how many the whole run has.
    frozen_stages: how many of the image encoder's first stages are not trained.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        checkpoints: Checkpoints,
        world: World,
        continue_with: Sequence[str] = (),
    ):
        """Prepares a run in ``folder``, or what continues the one that has these checkpoints.

        continue_with: keys of the recipe that may differ from what the run began with.
        Raises ValueError for what the recipe gets wrong, FileNotFoundError for data that are not there.
        """
        self.device = device = choose_device(recipe.device, world.local_rank if world.size > 1 else None)
        if device.type == "cpu":
            limit_kernel_caches()
            keep_freed_memory()
        check_processes(recipe, world)
        check_size(recipe)
        start = load_start(recipe)
        languages = known_languages(recipe, start)
        self.train_source, self.val_source = open_train_source(recipe, languages), open_val_source(recipe, languages)
        self.task = make_task(recipe.task, self.train_source)
        steps = recipe.epochs * training_order(self.train_source, recipe).steps_per_epoch(recipe.batch_size)
        self.total_steps = min(steps, recipe.max_steps) if recipe.max_steps else steps
        world.on_main(folder.enter)
        continues, asked = checkpoints.exist(), recipe.precision
        progress = Progress(checkpoints.newest_step(), self.total_steps) if continues else None
        self.data = data = world.on_main(self._data)
        remember = partial(folder.remember, recipe, device, data, progress, continue_with)
        self.recipe = recipe = world.on_main(remember)
        if asked == "auto" and world.is_main:
            print(f"precision {recipe.precision} (chosen for {device})", file=sys.stderr)
        stored = folder.path / "tokenizer.json"
        tokenizer = make_tokenizer(recipe, start, self.train_source, stored, continues, world)
        # What validation writes is in the one language that is read, or in the first.
        self.tokenizer = tokenizer.in_language(recipe.data.language or next(iter(tokenizer.languages), None))
        self.preprocess = make_preprocess(recipe, start)
        torch.manual_seed(recipe.seed)
        model, transfer = make_model(recipe, self._config(), start, self.tokenizer)
        if transfer is not None and world.is_main and not continues:
            print(f"init_from {recipe.init_from.model}\n{textwrap.indent(transfer.describe(), '  ')}", file=sys.stderr)
        self.frozen_stages = freeze(model, recipe, self.task)
        said = self.task.prepare(model, self.tokenizer, begins=not continues)
        if said is not None and world.is_main:
            print(said, file=sys.stderr)
        prepare_compute(model, recipe, device)
        self._prepare_samples(model, world)
        self.model = model.eval()

    def _data(self) -> RunData:
        validation = None if self.val_source is None else data_identity(self.val_source)
        return RunData(data_identity(self.train_source), validation, (self.task.stored() or {}).get("classes"))

    def _config(self) -> CoCaConfig:
        """The architecture with the run's vocabulary and the task's layers."""
        wanted, size = self.recipe.model, self.tokenizer.vocab_size
        if self.recipe.tokenizer.source == "init_from":
            # A start model may have more ids than its tokenizer; its embeddings are taken whole.
            size = max(size, wanted.text.vocab_size)
        return self.task.configure(replace(wanted, text=replace(wanted.text, vocab_size=size)))

    def _prepare_samples(self, model: CoCa, world: World) -> None:
        recipe, task, data = self.recipe, self.task, self.recipe.data
        transform = TrainTransform(
            self.preprocess,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            flip_probability=data.flip_probability,
            color_jitter=data.color_jitter,
            rand_augment=data.rand_augment,
        )
        caches = FeatureCaches(recipe, model, self.frozen_stages, self.device, transform)
        cache = caches.open(self.train_source, "training images", world, augmented=True)
        self.batches = TrainBatches(recipe, task, self.train_source, self.tokenizer, transform, cache, world)
        self.validator = None
        if self.val_source is not None:
            cache = caches.open(self.val_source, "validation images", world, augmented=False)
            prepare = caches.evaluation
            self.validator = Validator(recipe, task, self.val_source, self.tokenizer, prepare, cache)


def check_size(recipe: Recipe) -> None:
    """Raises ValueError if the weights alone need more memory than there is, before any of them is made."""
    if is_built_in_shards(recipe):  # each process makes its own part
        return
    needed = 4 * count_parameters(recipe.model)
    if needed > (most := most_bytes()):
        raise ValueError(
            f"the network has {needed / 4e9:,.1f} billion parameters, and their {needed / 1e9:,.0f} GB are more than "
            f"the {most / 1e9:,.0f} GB of memory; give it less width or depth (size, model)"
        )


def count_parameters(config: CoCaConfig) -> int:
    """Returns the number of a network's parameters; networks of one layer each, and of two, tell what a layer has."""

    def count(image: int = 1, unimodal: int = 1, multimodal: int = 1) -> int:
        text = replace(config.text, unimodal_depth=unimodal, multimodal_depth=multimodal)
        with without_values():
            network = CoCa(replace(config, image=replace(config.image, depth=image), text=text))
        return sum(parameter.numel() for parameter in network.parameters())

    shallow, text = count(), config.text
    image_layers = (config.image.depth - 1) * (count(image=2) - shallow)
    unimodal_layers = (text.unimodal_depth - 1) * (count(unimodal=2) - shallow)
    return shallow + image_layers + unimodal_layers + (text.multimodal_depth - 1) * (count(multimodal=2) - shallow)


def load_start(recipe: Recipe) -> LoadedModel | None:
    """The model that the recipe's ``init_from`` names, on the CPU, in the types that it is stored in."""
    wanted = recipe.init_from
    if wanted.model is None:
        return None
    return load_model(wanted.model, weights=wanted.weights, checkpoint=wanted.checkpoint)


def make_preprocess(recipe: Recipe, start: LoadedModel | None) -> PreprocessConfig:
    """How images become the model's input: as the recipe says, and for the rest as the start model was trained."""
    data, size = recipe.data, recipe.model.image.image_size
    if start is None:
        return PreprocessConfig(size, data.mean, data.std, data.resize_mode)
    return replace(start.preprocess, image_size=size, mean=data.mean, std=data.std, resize_mode=data.resize_mode)


def known_languages(recipe: Recipe, start: LoadedModel | None) -> tuple[str, ...] | None:
    """Those of the vocabulary that `make_tokenizer` will make; None if the task reads no texts."""
    options = recipe.tokenizer
    if not any(recipe.task.uses):
        return None
    if options.source == "train":
        return options.languages
    if options.source == "init_from":
        return () if start is None else start.tokenizer.languages
    return () if options.source == "clip" else Tokenizer.load(options.source).languages


def make_tokenizer(
    recipe: Recipe, start: LoadedModel | None, source: SampleSource, stored: Path, continues: bool, world: World
) -> Tokenizer:
    """The vocabulary that the recipe names; a trained one is kept in the file ``stored``."""
    options = recipe.tokenizer
    if options.source == "clip":
        return Tokenizer.clip()
    if options.source == "init_from":
        assert start is not None  # the recipe checks it
        return start.tokenizer
    if options.source != "train":
        return Tokenizer.load(options.source)

    def train_it() -> None:
        if stored.is_file() and continues:  # without a checkpoint it may be that of another recipe
            return
        captions = [caption for image in range(len(source)) for caption in source.captions(image)]
        tokenizer = train_tokenizer(
            captions,
            options.vocab_size,
            lowercase=options.lowercase,
            strip_final_period=options.strip_final_period,
            min_frequency=options.min_frequency,
            languages=options.languages,
        )
        tokenizer.save(stored)

    world.on_main(train_it)
    return Tokenizer.load(stored)


def make_model(
    recipe: Recipe, config: CoCaConfig, start: LoadedModel | None = None, tokenizer: Tokenizer | None = None
) -> tuple[CoCa, Transfer | None]:
    """A new model with the weights of ``start``, or with those of the image encoder that the recipe names.

    Without either, one that will be sharded has no values yet, if it can do without them: see `ParallelModel`.
    tokenizer: the run's, which shares word embeddings with the start model if it is the same.
    """
    if start is None and is_built_in_shards(recipe):
        with without_values():
            return CoCa(config), None
    model = CoCa(config)
    transfer = None
    if start is not None:
        same = tokenizer is None or tokenizer.to_json() == start.tokenizer.to_json()
        transfer = take_weights(model, start.model, same_vocabulary=same)
    init, encoder = recipe.encoder.init, model.structure().image_encoder
    if init == "imagenet":
        if not isinstance(encoder, EfficientNetLite):
            raise ValueError(f"encoder.init imagenet is for efficientnet_lite, not {config.image.name}")
        load_imagenet_weights(encoder)
    elif init != "none":
        try:
            encoder.load_state_dict(load_model_folder(init).model.structure().image_encoder.state_dict())
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise ValueError(f"the image encoder of {init} does not fit this recipe's: {first[0].strip()}") from error
    return model, transfer
