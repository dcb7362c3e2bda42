"""Chooses how many images to caption at a time: computes the memory of one, and divides the budget by it."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import torch

from opencoca.generation.decoding.arena import ArenaSize
from opencoca.generation.rerank import candidate_options
from opencoca.recaption.captioner import Captioner

# Larger batches gain nothing on a CPU; on a GPU, the waiting ones would fill the machine's memory.
_LARGEST_BATCH = {"cpu": 32, "cuda": 256}
_SHARE_OF_FREE = 0.5
# Kernels' scratch space and the allocator's gaps.
_OVERHEAD = 1.5
# Numbers that a convolutional encoder holds for each pixel: four maps of 100 channels at half the resolution.
_MOST_PER_PIXEL = 100
# Bytes for each logit: it and its log-probability in float32, each with a copy; and its place, where all are sorted.
_PER_LOGIT, _PER_SORTED_LOGIT = 16, 32
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Reads a number of bytes such as "4GB", "512 MiB", "800M" or "1e9". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{text!r} is no amount of memory; write it as in 4GB or 512MB")
    return value


def choose_batch_size(captioner: Captioner, num_images: int, budget_bytes: int | None = None) -> int:
    """Returns the largest power of two of images that fit into the budget (None: half of the free memory).

    It is at most 32 on a CPU and 256 on a GPU, and at least 1 even if that does not fit.
    """
    device = captioner.device
    budget = budget_bytes if budget_bytes is not None else int(_SHARE_OF_FREE * free_bytes(device))
    most = max(1, min(_LARGEST_BATCH.get(device.type, 32), num_images, budget // bytes_per_image(captioner)))
    return 1 << (most.bit_length() - 1)


def bytes_per_image(captioner: Captioner) -> int:
    """Computes from shapes how much memory each further image takes: rather too much than too little."""
    height, width = captioner.image_size
    # The batch itself and the next one as float32, and two more as bytes.
    waiting = 3 * height * width * (2 * 4 + 2)
    return waiting + int(_OVERHEAD * max(_encoder_bytes(captioner), _decoder_bytes(captioner)))


def _encoder_bytes(captioner: Captioner) -> int:
    """The most that the image encoder holds of one image at a time, and then its poolers."""
    config, (height, width) = captioner.pipeline.model.config, captioner.image_size
    image, text = config.image, config.text
    features = _num_features(captioner)
    if image.name == "vit":
        # The block's input and its norm, with queries, keys, values and their mixture, or with both sides of its MLP.
        numbers = features * (2 * image.width + max(5 * image.width, 3 * image.mlp_width))
    else:
        numbers = _MOST_PER_PIXEL * height * width
    pooled = (features + 2 * max(1, config.pooler.num_queries)) * (
        captioner.pipeline.model.structure().image_encoder.width + 4 * text.width
    )
    return max(numbers, pooled) * captioner.pipeline.dtype.itemsize


def _decoder_bytes(captioner: Captioner) -> int:
    """What decoding keeps of one image and of its texts, and a step's tensors of the vocabulary's size."""
    model, options = captioner.pipeline.model, captioner.options
    if captioner.rerank is not False:
        options = candidate_options(options)
    text, dtype = model.config.text, captioner.pipeline.dtype
    if captioner.device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    texts = options.texts_in_work
    # A token has at least one byte of the prefix.
    length = min(text.context_length, 1 + len(options.prefix.encode()) + options.max_new_tokens)
    tokens = model.config.pooler.num_queries or _num_features(captioner)
    kept = ArenaSize(1, texts, length, tokens).num_bytes(model, dtype)
    return kept + texts * text.vocab_size * (_PER_SORTED_LOGIT if options.samples else _PER_LOGIT)


def _num_features(captioner: Captioner) -> int:
    """The number of features that the image encoder makes of an image; for one that is not known, one in 16 x 16."""
    image, (height, width) = captioner.pipeline.model.config.image, captioner.image_size
    side = image.patch_size if image.name == "vit" else 16
    return 1 + (height // side) * (width // side)


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a GPU, or of the machine, within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    candidates = [_machine_free_bytes()]
    with contextlib.suppress(OSError, ValueError):  # control groups, version 2; "max" stands for no limit
        group = Path("/sys/fs/cgroup")
        candidates.append(
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + _cache_bytes(group)
        )
    return max(0, min(candidates))


def _cache_bytes(group: Path) -> int:
    """Returns the bytes of file cache that a control group would free if needed."""
    rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(rows.get("inactive_file", 0))


def _machine_free_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30  # neither is known on Windows
