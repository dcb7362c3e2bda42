"""Where samples come from, in which order, and how they become batches."""

from opencoca.data.captions import CaptionTokenizer, TokenizedCaptions, collate_captions
from opencoca.data.check import CheckReport, check_source, format_report
from opencoca.data.images import MAX_PIXELS, ImageError, ImageHeader, decode_image, read_header, to_rgb
from opencoca.data.iterate import ImageBatch, iterate_images
from opencoca.data.loader import CaptionBatch, TrainingLoader
from opencoca.data.order import EpochOrder
from opencoca.data.pack import PackSummary, pack_shards
from opencoca.data.sources import ImageFolder, ImageTextSource, Subset, TarShards, list_images, open_source
from opencoca.data.tables import CaptionTable, read_caption_table
from opencoca.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    EvalTransform,
    PreprocessConfig,
    TrainTransform,
    mentions_side,
    normalize,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "MAX_PIXELS",
    "CaptionBatch",
    "CaptionTable",
    "CaptionTokenizer",
    "CheckReport",
    "EpochOrder",
    "EvalTransform",
    "ImageBatch",
    "ImageError",
    "ImageFolder",
    "ImageHeader",
    "ImageTextSource",
    "PackSummary",
    "PreprocessConfig",
    "Subset",
    "TarShards",
    "TokenizedCaptions",
    "TrainTransform",
    "TrainingLoader",
    "check_source",
    "collate_captions",
    "decode_image",
    "format_report",
    "iterate_images",
    "list_images",
    "mentions_side",
    "normalize",
    "open_source",
    "pack_shards",
    "read_caption_table",
    "read_header",
    "to_rgb",
]
