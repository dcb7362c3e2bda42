"""The part of a recipe that says where the data are."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SourceRecipe:
    """One of several data sets.

    Args:
        images: folder of images, or tar shards (folder, pattern or URL).
        captions: table for a folder of images.
        weight: how often its images are seen, compared with a weight of 1, at which all images are seen equally often.
        labels: none (captions are sentences), captions (they are class labels, one or a list), or folders (an image's
            folder is its label).
        prompts: for labels: texts with {} where an image's labels go, shuffled and joined; one is drawn at each visit.
        separator: between several labels of one image.
        image_column: of the table.
        caption_column: of the table, or the field of a sample's json.
        language_column: of the table, with the language of each row's captions.
        language: of all captions; where the table has a language_column, the only one that is read.
    """

    images: str = ""
    captions: str | None = None
    weight: float = 1.0
    labels: Literal["none", "captions", "folders"] = "none"
    prompts: tuple[str, ...] = ("a photo of {}.",)
    separator: str = ", "
    image_column: str = "image"
    caption_column: str = "caption"
    language_column: str | None = None
    language: str | None = None


@dataclass(frozen=True)
class DataRecipe:
    """Where the pairs are and how images are prepared.

    Args:
        train_images: folder of images, or tar shards (folder, pattern or URL) or tables that hold captions too.
        train_captions: table (CSV, TSV, JSONL, JSON or Parquet) of captions; not needed for shards, for the metadata of
            an imagefolder, and for captions in text files beside the images.
        train_labels: such a table with classes (it may be that of captions), or folders: the folder that an image lies
            in names its class; not needed for shards.
        sources: several data sets, with weights, in place of train_images.
        val_images: as train_images; nothing is validated without it.
        val_captions: as train_captions.
        val_labels: as train_labels.
        image_column: column of images of these tables.
        caption_column: column of captions of these tables, or the field of a sample's json.
        label_column: column of classes of these tables, or the field of a sample's json.
        language_column: column of these tables with the language of each row's captions, for a vocabulary that has
            tokenizer.languages.
        language: of all captions of train_images and val_images; with a language_column, the only one that is read.
        image_member: ending of the members of tar shards that are a sample's image, such as seg.png; null = any image.
        text_member: ending of the members that are its text; null = txt.
        max_pixels: larger images count as damaged.
        captions_per_image: captions of one image in a batch; they share its encoding.
        resize_mode: how evaluation makes images fit: crop, pad or squash.
        mean: subtracted from RGB values in [0, 1].
        std: what the difference is divided by.
        crop_scale: part of the image's area that a training crop keeps, at least and at most.
        crop_ratio: width over height of a training crop, at least and at most.
        flip_probability: of mirroring; images whose captions say left or right never are.
        color_jitter: strength of random brightness, contrast and saturation, 0 to 1.
        rand_augment: operations of RandAugment on an image, and their magnitude, 0 to 30; null = none. The paper
            finetunes with [2, 20] and [1, 10].
        num_workers: processes that decode images; 0 decodes in the training process.
        drop_last: an epoch ends before a last batch that would be smaller.
        shuffle: samples (all of them), blocks (runs of 256 samples of tar shards, and the samples of shuffle_window
            such runs), or auto: blocks for remote shards, samples for what is local.
        shuffle_window: how many blocks have their samples mixed.
        index_dir: where `opencoca data index --index-dir` put the indexes; None = beside the shards.
        cache_dir: folder that keeps pieces of remote shards; None = every sample is a request of its own.
        cache_gb: largest size of that folder; the least recently used pieces make room.
        max_bad_share: part of the images that may turn out to be damaged or without caption before a run stops.
    """

    train_images: str = ""
    train_captions: str | None = None
    train_labels: str | None = None
    sources: list[SourceRecipe] | None = None
    val_images: str | None = None
    val_captions: str | None = None
    val_labels: str | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    label_column: str = "label"
    language_column: str | None = None
    language: str | None = None
    image_member: str | None = None
    text_member: str | None = None
    max_pixels: int = 178_956_970
    captions_per_image: int = 1
    resize_mode: Literal["crop", "pad", "squash"] = "crop"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip_probability: float = 0.5
    color_jitter: float = 0.0
    rand_augment: tuple[int, float] | None = None
    num_workers: int = 2
    drop_last: bool = True
    shuffle: Literal["auto", "samples", "blocks"] = "auto"
    shuffle_window: int = 64
    index_dir: str | None = None
    cache_dir: str | None = None
    cache_gb: float = 50.0
    max_bad_share: float = 0.1
