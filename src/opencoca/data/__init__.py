"""Sources of samples, the order in which they are seen, and the batches made of them."""

from opencoca.data.batch import Batch
from opencoca.data.captions import TokenizedCaptions, collate_captions
from opencoca.data.check import check_source, format_report
from opencoca.data.images import ImageError, allow_pixels, decode_image, read_header
from opencoca.data.iterate import ImageBatch, iterate_images
from opencoca.data.labels import LabelSource
from opencoca.data.loader import TrainingLoader
from opencoca.data.mixture import MixedOrder, MixedSource, make_order
from opencoca.data.opening import find_shards, list_images, open_labelled, open_source
from opencoca.data.order import BlockOrder, EpochOrder, SampleOrder
from opencoca.data.pack import pack_shards
from opencoca.data.quarantine import Quarantine, read_quarantine
from opencoca.data.remote import RemoteReadError, RetryPolicy
from opencoca.data.rgb import to_rgb
from opencoca.data.shard_index import index_shards, load_index
from opencoca.data.source import BadSample, Sample, SampleSource
from opencoca.data.sources import ImageFolder, JoinedSource, Subset
from opencoca.data.table_images import TableImages
from opencoca.data.tables import read_table
from opencoca.data.tar_source import ShardStorage, TarShards
from opencoca.data.targets import Target
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
    "BadSample",
    "Batch",
    "BlockOrder",
    "EpochOrder",
    "EvalTransform",
    "ImageBatch",
    "ImageError",
    "ImageFolder",
    "JoinedSource",
    "LabelSource",
    "MixedOrder",
    "MixedSource",
    "PreprocessConfig",
    "Quarantine",
    "RemoteReadError",
    "RetryPolicy",
    "Sample",
    "SampleOrder",
    "SampleSource",
    "ShardStorage",
    "Subset",
    "TableImages",
    "TarShards",
    "Target",
    "TokenizedCaptions",
    "TrainTransform",
    "TrainingLoader",
    "allow_pixels",
    "check_source",
    "collate_captions",
    "decode_image",
    "find_shards",
    "format_report",
    "index_shards",
    "iterate_images",
    "list_images",
    "load_index",
    "make_order",
    "mentions_side",
    "normalize",
    "open_labelled",
    "open_source",
    "pack_shards",
    "read_header",
    "read_quarantine",
    "read_table",
    "to_rgb",
]
