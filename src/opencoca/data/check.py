"""A check of every image, caption and label of a data set, before anything is trained on it."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from opencoca.data.images import ImageError, ImageHeader, decode_image, read_header
from opencoca.data.read_ahead import parallel_map
from opencoca.data.source import SampleSource
from opencoca.data.targets import Target

_MEGAPIXEL_EDGES = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
# Two thumbnails of 8 x 8 pixels count as the same picture up to this mean difference, out of 255.
_NEAR_DUPLICATE_DIFFERENCE = 4.0


@dataclass(frozen=True)
class Spread:
    """Statistics of a set of numbers; all zero if it is empty."""

    min: float = 0.0
    mean: float = 0.0
    median: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        array = np.asarray(list(values), dtype=np.float64)
        if not array.size:
            return cls()
        median, p99 = np.percentile(array, [50, 99])
        return cls(float(array.min()), float(array.mean()), float(median), float(p99), float(array.max()))

    def describe(self, digits: int = 0) -> str:
        """Writes all numbers in one line, with this number of digits after the point."""
        return ", ".join(f"{name} {value:,.{digits}f}" for name, value in asdict(self).items())


class Finding(NamedTuple):
    """What was found of one kind, and whether that is a fault of the data."""

    name: str
    items: Sequence[str]
    is_error: bool = True


@dataclass(frozen=True)
class CheckReport:
    """The findings of `check_source`. Images are named by their keys; groups of duplicates hold 2 or more.

    Attributes:
        num_images: samples in the source, broken ones included, missing ones not.
        num_captions: captions that aren't blank.
        captions_per_image: over all images.
        width, height: in pixels, over the images that can be decoded.
        megapixels: (range, number of images), small to large, empty ranges left out.
        formats, modes: number of images by Pillow's name.
        broken_images: (key, reason).
        damaged_files: (file, reason): shards that are damaged, by which it isn't known what else is lost.
        missing_images: named by a table or shard, but absent.
        images_without_captions: keys.
        blank_captions: the key of an image once for each of its blank captions.
        unusable_captions: (key, reason).
        duplicate_images: groups of images with the same bytes.
        near_duplicate_images: groups of images that look the same at 8 x 8 grey pixels, one per set of same bytes.
        duplicate_captions: (caption, how often), the repeated ones; case and spacing aside.
        caption_words: words per caption.
        num_targets: samples with a class or answers.
        classes: (class, number of samples), the most frequent first.
        answers: (answer, number of samples that it is one of), where samples have several, the most frequent first.
        images_without_target: keys.
        unusable_targets: (key, reason).
    """

    num_images: int
    num_captions: int
    captions_per_image: Spread
    width: Spread
    height: Spread
    megapixels: tuple[tuple[str, int], ...]
    formats: dict[str, int]
    modes: dict[str, int]
    broken_images: tuple[tuple[str, str], ...]
    damaged_files: tuple[tuple[str, str], ...]
    missing_images: tuple[str, ...]
    images_without_captions: tuple[str, ...]
    blank_captions: tuple[str, ...]
    unusable_captions: tuple[tuple[str, str], ...]
    duplicate_images: tuple[tuple[str, ...], ...]
    near_duplicate_images: tuple[tuple[str, ...], ...]
    duplicate_captions: tuple[tuple[str, int], ...]
    caption_words: Spread
    num_targets: int
    classes: tuple[tuple[str, int], ...]
    answers: tuple[tuple[str, int], ...]
    images_without_target: tuple[str, ...]
    unusable_targets: tuple[tuple[str, str], ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything that is wrong or remarkable, by kind; a source without any caption or label lacks none."""
        groups, near = ([", ".join(keys) for keys in of] for of in (self.duplicate_images, self.near_duplicate_images))
        repeated = [f"{count} x {text}" for text, count in self.duplicate_captions]
        return (
            Finding("broken images", [f"{key}: {reason}" for key, reason in self.broken_images]),
            Finding("damaged shards", [f"{file}: {reason}" for file, reason in self.damaged_files]),
            Finding("missing images", self.missing_images),
            Finding("images without captions", self.images_without_captions, self.num_captions > 0),
            Finding("blank captions", self.blank_captions),
            Finding("unusable captions", [reason for _, reason in self.unusable_captions]),
            Finding("duplicate images (groups)", groups, False),
            Finding("near-duplicate images (groups)", near, False),
            Finding("repeated captions", repeated, False),
            Finding("images without label", self.images_without_target, self.num_targets > 0),
            Finding("unusable labels", [reason for _, reason in self.unusable_targets]),
        )

    @property
    def errors(self) -> dict[str, Sequence[str]]:
        """Broken and missing things by kind."""
        return {name: items for name, items, is_error in self.findings if items and is_error}

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return asdict(self)


class _ImageFacts(NamedTuple):
    """What is found of an image; one that can't be decoded has an error and nothing else."""

    key: str
    error: str | None
    header: ImageHeader = ImageHeader(0, 0, "", "")
    digest: bytes = b""
    thumbnail: np.ndarray = np.zeros(0, np.uint8)  # (64,)


class _SampleFacts(NamedTuple):
    key: str
    images: list[_ImageFacts]
    captions: tuple[str, ...]
    caption_error: str | None
    target: Target | None
    target_error: str | None


def check_source(
    source: SampleSource, *, num_workers: int = 4, max_pixels: int | None = None, progress: bool = True
) -> CheckReport:
    """Decode every image and look at every caption and target. Of a sample with several images, each counts.

    Args:
        source: opened with `strict=False`, so that missing images are counted instead of an error.
        num_workers: threads that decode; 0 for none.
        max_pixels: images with more count as broken; None as `decode_image` has it.
        progress: whether to show a progress bar.
    """
    examine = functools.partial(_examine, source, max_pixels)
    results = parallel_map(examine, range(len(source)), num_workers, window=4 * max(1, num_workers))
    samples = list(tqdm(results, total=len(source), desc="checking images", unit="image", disable=not progress))
    images = [image for sample in samples for image in sample.images]
    good = [image for image in images if image.error is None]
    headers = [image.header for image in good]
    texts = [caption for sample in samples for caption in sample.captions]
    repeated = Counter(" ".join(text.casefold().split()) for text in texts)
    targets = [sample.target for sample in samples if sample.target is not None]
    return CheckReport(
        num_images=len(source),
        num_captions=len(texts),
        captions_per_image=Spread.of(len(sample.captions) for sample in samples),
        width=Spread.of(header.width for header in headers),
        height=Spread.of(header.height for header in headers),
        megapixels=_histogram([header.width * header.height / 1e6 for header in headers]),
        formats=dict(Counter(header.format for header in headers).most_common()),
        modes=dict(Counter(header.mode for header in headers).most_common()),
        broken_images=tuple((image.key, image.error) for image in images if image.error is not None),
        damaged_files=tuple((lost.file, lost.reason) for lost in source.lost if not lost.key),
        missing_images=source.missing_images,
        images_without_captions=tuple(s.key for s in samples if not s.captions and s.caption_error is None),
        blank_captions=source.blank_captions,
        unusable_captions=tuple((s.key, s.caption_error) for s in samples if s.caption_error is not None),
        duplicate_images=_groups((image.digest, image.key) for image in good),
        near_duplicate_images=_near_duplicates(good),
        duplicate_captions=tuple((text, count) for text, count in repeated.most_common() if count > 1),
        caption_words=Spread.of(len(text.split()) for text in texts),
        num_targets=len(targets),
        classes=tuple(Counter(target for target in targets if isinstance(target, str)).most_common()),
        answers=tuple(Counter(name for t in targets if not isinstance(t, str) for name in t).most_common()),
        images_without_target=tuple(s.key for s in samples if s.target is None and s.target_error is None),
        unusable_targets=tuple((s.key, s.target_error) for s in samples if s.target_error is not None),
    )


def _examine(source: SampleSource, max_pixels: int | None, index: int) -> _SampleFacts:
    key, captions, caption_error, target, target_error = source.key(index), (), None, None, None
    try:
        data = source.read(index, texts=False, target=False).images
        images = [_facts_of(image, key, max_pixels) for image in data]
    except ImageError as error:
        images = [_ImageFacts(key, error.reason)]
    except OSError as error:
        images = [_ImageFacts(key, error.strerror or str(error))]
    try:
        captions = source.captions(index)
    except (ValueError, OSError) as error:
        caption_error = str(error)
    try:
        target = source.target(index)
    except (ValueError, OSError) as error:
        target_error = str(error) if str(error) != caption_error else None
    return _SampleFacts(key, images, captions, caption_error, target, target_error)


def _facts_of(data: bytes, key: str, max_pixels: int | None) -> _ImageFacts:
    try:
        header = read_header(data, max_pixels=max_pixels, name=key)
        image = decode_image(data, max_pixels=max_pixels, name=key)
    except ImageError as error:
        return _ImageFacts(key, error.reason)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    thumbnail = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).reshape(64)
    return _ImageFacts(key, None, header, digest, thumbnail)


def _groups(items: Iterable[tuple[Hashable, str]]) -> tuple[tuple[str, ...], ...]:
    """Names that share an identity with others, in order of first appearance."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for identity, name in items:
        groups[identity].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _near_duplicates(images: list[_ImageFacts]) -> tuple[tuple[str, ...], ...]:
    """Images with equal average hash (which of 8 x 8 pixels are above the mean), whose pixels agree closely too."""
    distinct = {image.digest: image for image in reversed(images)}
    buckets: dict[bytes, list[tuple[str, np.ndarray]]] = defaultdict(list)
    for image in reversed(distinct.values()):
        average_hash = np.packbits(image.thumbnail > image.thumbnail.mean()).tobytes()
        buckets[average_hash].append((image.key, image.thumbnail))
    groups: list[tuple[str, ...]] = []
    for bucket in buckets.values():
        while len(bucket) > 1:
            thumbnails = np.stack([thumbnail for _, thumbnail in bucket]).astype(np.float32)
            alike = np.abs(thumbnails - thumbnails[0]).mean(axis=1) <= _NEAR_DUPLICATE_DIFFERENCE
            if alike.sum() > 1:
                groups.append(tuple(key for (key, _), same in zip(bucket, alike, strict=True) if same))
            bucket = [item for item, same in zip(bucket, alike, strict=True) if not same]
    return tuple(groups)


def _histogram(megapixels: list[float]) -> tuple[tuple[str, int], ...]:
    names = [f"under {_MEGAPIXEL_EDGES[0]:g} MP"]
    names += [f"{low:g} to {high:g} MP" for low, high in itertools.pairwise(_MEGAPIXEL_EDGES)]
    names += [f"{_MEGAPIXEL_EDGES[-1]:g} MP and more"]
    counts = np.bincount(np.digitize(megapixels, _MEGAPIXEL_EDGES), minlength=len(names)) if megapixels else []
    return tuple((name, int(count)) for name, count in zip(names, counts, strict=False) if count)


def format_report(report: CheckReport, *, examples: int = 5) -> str:
    """The report as a table to print; of everything that is wrong, the first `examples`."""

    def counts(items: Iterable[tuple[str, int]]) -> str:
        return ", ".join(f"{name}: {count:,}" for name, count in items) or "-"

    rows = [
        ("images", f"{report.num_images:,}"),
        ("captions", f"{report.num_captions:,}"),
        ("captions per image", report.captions_per_image.describe(1)),
        ("words per caption", report.caption_words.describe(1)),
        ("width (pixels)", report.width.describe()),
        ("height (pixels)", report.height.describe()),
        ("sizes", counts(report.megapixels)),
        ("formats", counts(report.formats.items())),
        ("modes", counts(report.modes.items())),
        *_target_rows(report),
    ]
    labelled = report.num_targets or report.unusable_targets
    findings = report.findings if labelled else report.findings[:-2]  # the last two are about labels
    rows += [(name, f"{len(found):,}") for name, found, _ in findings]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for name, found, _ in findings:
        if found:
            lines += ["", f"{name}:"] + [f"  {_on_one_line(item)}" for item in found[:examples]]
            if len(found) > examples:
                lines.append(f"  ... and {len(found) - examples:,} more")
    return "\n".join(lines)


def _on_one_line(item: str) -> str:
    """Escapes what would begin a new line or change colours; a file's name may hold it."""
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in item)


def _target_rows(report: CheckReport, examples: int = 3) -> list[tuple[str, str]]:
    """Rows of the table about classes and answers; none for a source without targets."""
    rows = [("images with a label", f"{report.num_targets:,}")] if report.num_targets else []
    for name, found in (("classes", report.classes), ("answers", report.answers)):
        if found:
            most, rarest = (
                ", ".join(f"{label} ({count:,})" for label, count in some)
                for some in (found[:examples], found[::-1][:examples])
            )
            rows.append((name, f"{len(found):,}; most frequent: {most}; rarest: {rarest}"))
    return rows
