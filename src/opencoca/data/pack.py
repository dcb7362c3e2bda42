"""Packs any source into tar shards as img2dataset makes them: `key.jpg`, `key.txt`, `key.json`, `key.cls` a sample."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from opencoca.data.images import ImageError, decode_image, read_header
from opencoca.data.read_ahead import parallel_map
from opencoca.data.source import Sample, SampleSource
from opencoca.system.files import atomic_write

# Pillow's format names whose files go into a shard as they are; others are stored as PNG.
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_SETTINGS_FILE = "pack.json"
_ERRORS_FILE = "errors.jsonl"


@dataclass(frozen=True)
class PackSummary:
    """The content of a folder after `pack_shards`; shards that were there already are not counted as written."""

    num_shards: int
    num_shards_written: int
    num_samples: int
    errors: tuple[str, ...]  # a key and the reason why its image can't be read, for each that was left out
    size_bytes: int


@dataclass(frozen=True)
class _Settings:
    samples_per_shard: int
    resize: int | None
    quality: int | None  # None for images that are not resized

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be 1 or more, got {self.samples_per_shard}")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize must be 1 or more pixels, got {self.resize}")


def pack_shards(
    source: SampleSource,
    out_dir: str | Path,
    *,
    samples_per_shard: int = 1000,
    resize: int | None = None,
    quality: int = 95,
    num_workers: int = 4,
    progress: bool = True,
) -> PackSummary:
    """Write a source as `00000.tar`, `00001.tar`, ... into `out_dir`.

    The same source and settings give the same bytes. A shard appears whole or not at all; one that is there already is
    kept, so a stopped run continues when started again. Images that can't be decoded are left out and listed in
    `errors.jsonl`. A sample's json holds its `key` in the source, its first `caption` and all `captions`; a class is in
    its `.cls`, answers with weights are in its json as `label`.

    Args:
        source: what to pack.
        out_dir: made if it doesn't exist.
        samples_per_shard: images of the source per shard, broken ones included.
        resize: longest allowed shorter side in pixels; larger images are shrunk to it and stored as JPEG. None stores
            every file byte for byte.
        quality: of these JPEGs, 1 to 100.
        num_workers: threads that decode; 0 for none.
        progress: whether to show a progress bar.

    Raises:
        ValueError: settings out of range, `out_dir` was packed from another source or with other settings, a label that
            can't be used, or samples of several images, which shards don't hold.
        OSError: a shard can't be written; those before it are complete.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be in 1..100, got {quality}")
    settings = _Settings(samples_per_shard, resize, quality if resize else None)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    _claim_folder(out_dir, {**asdict(settings), "source": _fingerprint(source)})
    starts = range(0, len(source), samples_per_shard)
    paths = [out_dir / f"{number:05d}.tar" for number in range(len(starts))]
    errors = _errors_of_finished_shards(out_dir)
    written = 0
    with tqdm(total=len(source), desc="packing", unit="image", disable=not progress) as bar:
        for path, start in zip(paths, starts, strict=True):
            indices = range(start, min(start + samples_per_shard, len(source)))
            if not path.exists():
                errors += _write_shard(path, source, indices, settings, num_workers, errors, bar)
                written += 1
            else:
                bar.update(len(indices))
    size_bytes = sum(path.stat().st_size for path in paths)
    left_out = tuple(f"{error['key']}: {error['reason']}" for error in errors)
    return PackSummary(len(paths), written, len(source) - len(errors), left_out, size_bytes)


def _write_shard(
    path: Path,
    source: SampleSource,
    indices: range,
    settings: _Settings,
    num_workers: int,
    earlier_errors: list[dict[str, str]],
    bar: tqdm,
) -> list[dict[str, str]]:
    """Write one shard and, before it appears, the list of errors with its own at the end; return its own."""
    errors: list[dict[str, str]] = []

    def pack(index: int) -> list[tuple[str, bytes]] | str:
        try:
            return _members_of(source.key(index), source.read(index), settings)
        except ImageError as error:
            return error.reason
        except OSError as error:
            return error.strerror or str(error)

    with atomic_write(path) as partial:
        with tarfile.open(partial, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            results = parallel_map(pack, indices, num_workers, window=4 * max(1, num_workers))
            for index, packed in zip(indices, results, strict=True):
                bar.update()
                if isinstance(packed, str):
                    errors.append({"shard": path.name, "key": source.key(index), "reason": packed})
                    continue
                for suffix, data in packed:
                    # TarInfo's defaults (time 0, no owner) are what makes the bytes repeatable.
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        _write_errors(path.parent, earlier_errors + errors)
    return errors


def _members_of(key: str, sample: Sample, settings: _Settings) -> list[tuple[str, bytes]]:
    """The files of a sample in a shard: (suffix, content). Raises ImageError for an image that can't be decoded."""
    images, captions, target = sample
    if len(images) != 1:
        raise ValueError(f"the sample {key!r} has {len(images)} images; tar shards hold one a sample")
    image, suffix, data = _stored_image(images[0], key, settings)
    details: dict[str, Any] = {
        "key": key,
        "caption": captions[0] if captions else None,
        "captions": captions,
        "width": image.width,
        "height": image.height,
    }
    members = [(suffix, data)]
    if isinstance(target, str):
        members.append(("cls", target.encode(errors="replace")))
    elif target is not None:
        details["label"] = target
    if captions:
        members.append(("txt", captions[0].encode(errors="replace")))
    # A file's name may hold bytes of no encoding; in JSON they are written as escapes.
    return [*members, ("json", json.dumps(details, ensure_ascii=False).encode("utf-8", "backslashreplace"))]


def _stored_image(data: bytes, key: str, settings: _Settings) -> tuple[Image.Image, str, bytes]:
    """The decoded image, and the suffix and content of its file in a shard."""
    header = read_header(data, name=key)
    if settings.resize is None:
        image = decode_image(data, name=key)
        suffix = _SUFFIXES.get(header.format)
        return (image, suffix, data) if suffix else (image, "png", _encode(image, "PNG"))
    shrink = min(1.0, settings.resize / min(header.width, header.height))
    size = max(1, round(header.width * shrink)), max(1, round(header.height * shrink))
    image = decode_image(data, name=key, draft_size=size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image, "jpg", _encode(image, "JPEG", quality=settings.quality)


def _encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _fingerprint(source: SampleSource) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(source)):
        _, captions, target = source.read(index, images=False)
        known = [source.key(index), captions, *([] if target is None else [target])]
        digest.update(json.dumps(known).encode())
    return digest.hexdigest()


def _claim_folder(out_dir: Path, settings: dict[str, Any]) -> None:
    """Mark the folder as packed with these settings, or make sure that it was."""
    path = out_dir / _SETTINGS_FILE
    if not path.exists():
        if next(out_dir.glob("*.tar"), None) is not None:
            raise ValueError(f"the folder {str(out_dir)!r} holds other tar shards; choose another one")
        with atomic_write(path) as partial:
            partial.write_bytes(json.dumps(settings, indent=2).encode())
        return
    try:
        stored = json.loads(path.read_text())
    except ValueError:
        stored = None
    if stored != settings:
        reason = "from other images, captions or labels, or with other settings"
        raise ValueError(f"the folder {str(out_dir)!r} was packed {reason}; choose another one or empty it")


def _errors_of_finished_shards(out_dir: Path) -> list[dict[str, str]]:
    """Errors noted by earlier runs; those of a shard that never appeared will be found again."""
    path = out_dir / _ERRORS_FILE
    if not path.exists():
        return []
    errors = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [error for error in errors if (out_dir / error["shard"]).exists()]
    if len(kept) < len(errors):
        _write_errors(out_dir, kept)
    return kept


def _write_errors(out_dir: Path, errors: list[dict[str, str]]) -> None:
    if errors or (out_dir / _ERRORS_FILE).exists():
        with atomic_write(out_dir / _ERRORS_FILE) as partial:
            lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
            partial.write_bytes(lines.encode("utf-8", "backslashreplace"))
