"""From the data section of a recipe to the source that a run reads, and the order in which it does."""

from collections.abc import Sequence

from opencoca.data import (
    LabelSource,
    MixedSource,
    SampleOrder,
    SampleSource,
    ShardStorage,
    allow_pixels,
    make_order,
    open_source,
)
from opencoca.data.languages import CaptionLanguages
from opencoca.data.opening import FOLDERS
from opencoca.train.recipe.data import DataRecipe, SourceRecipe
from opencoca.train.recipe.recipe import Recipe


def open_train_source(recipe: Recipe, known_languages: Sequence[str] | None = None) -> SampleSource:
    """The training pairs: one data set, or a mixture of several.

    known_languages: those of the run's vocabulary, in one of which every caption must be; None: nothing is checked.

    Raises ValueError for what the recipe gets wrong, FileNotFoundError for data that are not there.
    """
    data = recipe.data
    allow_pixels(data.max_pixels)
    if data.sources and data.train_images:
        raise ValueError("the recipe names both data.train_images and data.sources; put all into data.sources")
    if not data.sources:
        if not data.train_images:
            raise ValueError("the recipe names no data.train_images; add --data.train_images FOLDER")
        source = _open(data, data.train_images, data.train_captions, data.train_labels, known_languages)
    else:
        parts = [_open_part(part, data, known_languages) for part in data.sources]
        weights = [part.weight for part in data.sources]
        source = parts[0] if len(parts) == 1 else MixedSource(parts, weights)
    if recipe.tokenizer.source == "train" and source.is_remote:
        raise ValueError(
            "tokenizer.source train would read every remote shard for its captions first; make a vocabulary with "
            "`opencoca tokenizer train`, and set tokenizer.source to its file, or to clip"
        )
    return source


def open_val_source(recipe: Recipe, known_languages: Sequence[str] | None = None) -> SampleSource | None:
    """The validation pairs, if the recipe names any. Raises as `open_train_source` does."""
    data = recipe.data
    if data.val_images is None:
        return None
    if not data.val_images:
        raise ValueError("the recipe names no data.val_images; add --data.val_images FOLDER")
    return _open(data, data.val_images, data.val_captions, data.val_labels, known_languages)


def training_order(source: SampleSource, recipe: Recipe) -> SampleOrder:
    """The order of a run over ``source``."""
    data = recipe.data
    return make_order(
        source,
        recipe.seed,
        drop_last=data.drop_last and len(source) >= recipe.batch_size,
        micro_batches=recipe.accumulation_steps,
        window_blocks=data.shuffle_window,
        by_blocks={"samples": False, "blocks": True}.get(data.shuffle),
    )


def _open_part(part: SourceRecipe, data: DataRecipe, known_languages: Sequence[str] | None) -> SampleSource:
    if not part.images:
        raise ValueError("each of data.sources needs images: a folder, or tar shards")
    as_labels = part.labels == "captions"  # the column or field of captions holds class labels
    source = open_source(
        part.images,
        None if as_labels else part.captions,
        {"none": None, "captions": part.captions, "folders": FOLDERS}[part.labels],
        image_column=part.image_column,
        caption_column=part.caption_column,
        label_column=part.caption_column if as_labels else "label",
        languages=_languages(part, "each of data.sources", known_languages),
        storage=_storage(data),
    )
    return source if part.labels == "none" else LabelSource(source, part.prompts, part.separator, part.language)


def _open(
    data: DataRecipe, images: str, captions: str | None, labels: str | None, known_languages: Sequence[str] | None
) -> SampleSource:
    return open_source(
        images,
        captions,
        labels,
        image_column=data.image_column,
        caption_column=data.caption_column,
        label_column=data.label_column,
        languages=_languages(data, "data", known_languages),
        storage=_storage(data),
    )


def _languages(part: SourceRecipe | DataRecipe, name: str, known: Sequence[str] | None) -> CaptionLanguages:
    """Raises ValueError if a vocabulary with languages gets captions without, or the other way round."""
    says = bool(part.language_column or part.language)
    if known and not says:
        raise ValueError(
            f"the vocabulary has the languages {', '.join(known)}, so {name} must say which one captions are in: set "
            "language_column or language"
        )
    if says and known is not None and not known:
        raise ValueError(
            f"{name} says in which language captions are, but the vocabulary has none: set tokenizer.languages"
        )
    return CaptionLanguages(part.language_column, part.language, known)


def _storage(data: DataRecipe) -> ShardStorage:
    return ShardStorage(
        image_member=data.image_member,
        text_member=data.text_member,
        index_dir=data.index_dir,
        cache_dir=data.cache_dir,
        cache_gb=data.cache_gb,
    )
