"""Pack any source into tar shards as img2dataset makes them: `key.jpg`, `key.txt`, `key.json`, `key.cls` per sample."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from opencoca.data.images import ImageError, decode_image, read_header
from opencoca.data.read_ahead import parallel_map
from opencoca.data.source import SampleSource
from opencoca.system.files import atomic_write

# Pillow's format names whose files go into a shard as they are; others are stored as PNG.
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_SETTINGS_FILE = "pack.json"
_ERRORS_FILE = "errors.jsonl"


@dataclass(frozen=True)
class PackSummary:
    """What `pack_shards` left in the folder."""

    num_shards: int
    num_shards_written: int  # the others were there already
    num_samples: int
    num_errors: int
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return asdict(self)


class _Packed(NamedTuple):
    error: str | None
    members: tuple[tuple[str, bytes], ...] = ()


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
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be 1 or more, got {samples_per_shard}")
    if resize is not None and resize < 1:
        raise ValueError(f"resize must be 1 or more pixels, got {resize}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be in 1..100, got {quality}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    settings = {"samples_per_shard": samples_per_shard, "resize": resize, "quality": quality if resize else None}
    _claim_folder(out_dir, {**settings, "source": _fingerprint(source)})

    starts = range(0, len(source), samples_per_shard)
    shards = [(out_dir / f"{number:05d}.tar", start) for number, start in enumerate(starts)]
    errors = _errors_of_finished_shards(out_dir)
    written = 0
    with tqdm(total=len(source), desc="packing", unit="image", disable=not progress) as bar:
        for path, start in shards:
            indices = range(start, min(start + samples_per_shard, len(source)))
            if not path.exists():
                errors += _write_shard(path, source, indices, resize, quality, num_workers, bar, errors)
                written += 1
            else:
                bar.update(len(indices))
    return PackSummary(
        num_shards=len(shards),
        num_shards_written=written,
        num_samples=len(source) - len(errors),
        num_errors=len(errors),
        size_bytes=sum(path.stat().st_size for path, _ in shards),
    )


def _write_shard(
    path: Path,
    source: SampleSource,
    indices: range,
    resize: int | None,
    quality: int,
    num_workers: int,
    bar: tqdm,
    earlier_errors: list[dict[str, str]],
) -> list[dict[str, str]]:
    """Write one shard and, before it appears, the list of errors with its own at the end; return its own."""
    errors: list[dict[str, str]] = []

    def pack(index: int) -> _Packed:
        return _pack_sample(source, index, resize, quality)

    with atomic_write(path) as partial:
        with tarfile.open(partial, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            results = parallel_map(pack, indices, num_workers, window=4 * max(1, num_workers))
            for index, packed in zip(indices, results, strict=True):
                if packed.error is not None:
                    errors.append({"shard": path.name, "key": source.key(index), "reason": packed.error})
                for suffix, data in packed.members:
                    # TarInfo's defaults (time 0, no owner) are what makes the bytes repeatable.
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                bar.update()
        _write_errors(path.parent, earlier_errors + errors)
    return errors


def _pack_sample(source: SampleSource, index: int, resize: int | None, quality: int) -> _Packed:
    key, captions, target = source.key(index), source.captions(index), source.target(index)
    try:
        images = source.open_images(index)
        if len(images) != 1:
            raise ValueError(f"the sample {key!r} has {len(images)} images; tar shards hold one a sample")
        data = images[0]
        header = read_header(data, name=key)
        if resize is None:
            image = decode_image(data, name=key)
            suffix = _SUFFIXES.get(header.format, "png")
            if header.format not in _SUFFIXES:
                data = _encode(image, "PNG")
        else:
            shrink = min(1.0, resize / min(header.width, header.height))
            size = max(1, round(header.width * shrink)), max(1, round(header.height * shrink))
            image = decode_image(data, name=key, draft_size=size)
            if image.size != size:
                image = image.resize(size, Image.Resampling.BICUBIC)
            suffix, data = "jpg", _encode(image, "JPEG", quality=quality)
    except ImageError as error:
        return _Packed(error.reason)
    except OSError as error:
        return _Packed(error.strerror or str(error))
    details = {
        "key": key,
        "caption": captions[0] if captions else None,
        "captions": captions,
        "width": image.width,
        "height": image.height,
        **({} if target is None or isinstance(target, str) else {"label": target}),
    }
    members = [(suffix, data)]
    if isinstance(target, str):
        members.append(("cls", target.encode()))
    if captions:
        members.append(("txt", captions[0].encode()))
    members.append(("json", json.dumps(details, ensure_ascii=False).encode()))
    return _Packed(None, tuple(members))


def _encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _fingerprint(source: SampleSource) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(source)):
        target = source.target(index)
        known = [source.key(index), source.captions(index), *([] if target is None else [target])]
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
            partial.write_bytes("".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors).encode())
