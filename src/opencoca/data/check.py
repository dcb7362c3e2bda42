"""Look at every image, caption and label of a data set before anything is trained on it, and say what is wrong."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from opencoca.data.images import MAX_PIXELS, ImageError, decode_image, read_header
from opencoca.data.read_ahead import parallel_map
from opencoca.data.source import SampleSource
from opencoca.data.targets import target_names

_MEGAPIXEL_EDGES = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
# Two thumbnails of 8 x 8 pixels count as the same picture up to this mean difference, out of 255.
_NEAR_DUPLICATE_DIFFERENCE = 4.0


@dataclass(frozen=True)
class Spread:
    """Statistics of a set of numbers; all zero if it is empty."""

    min: float
    mean: float
    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        array = np.asarray(list(values), dtype=np.float64)
        if not array.size:
            return cls(0.0, 0.0, 0.0, 0.0, 0.0)
        median, p99 = np.percentile(array, [50, 99])
        return cls(float(array.min()), float(array.mean()), float(median), float(p99), float(array.max()))


@dataclass(frozen=True)
class CheckReport:
    """What `check_source` found. Images are named by their keys; groups of duplicates hold 2 or more.

    Attributes:
        num_images: samples in the source, broken ones included, missing ones not.
        num_captions: captions that aren't blank.
        captions_per_image: over all images.
        width, height: in pixels, over the images that can be decoded.
        megapixels: (range, number of images), small to large, empty ranges left out.
        formats, modes: number of images by Pillow's name.
        broken_images: (key, reason).
        missing_images: named by a table or shard, but absent.
        images_without_captions: keys.
        blank_captions: the key of an image once per blank caption of its.
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
    missing_images: tuple[str, ...]
    images_without_captions: tuple[str, ...]
    blank_captions: tuple[str, ...]
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
    def has_errors(self) -> bool:
        """Whether something is broken or missing; see `errors`."""
        return any(self.errors.values())

    @property
    def errors(self) -> dict[str, tuple[Any, ...]]:
        """What is broken or missing, by kind. Duplicates are no error, nor is a source without any caption or label."""
        return {
            "broken images": self.broken_images,
            "missing images": self.missing_images,
            "images without captions": self.images_without_captions if self.num_captions else (),
            "blank captions": self.blank_captions,
            "images without label": self.images_without_target if self.num_targets else (),
            "unusable labels": self.unusable_targets,
        }

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return asdict(self)


class _ImageFacts(NamedTuple):
    error: str | None
    digest: bytes = b""
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    thumbnail: np.ndarray | None = None  # (64,) uint8


def check_source(
    source: SampleSource, *, num_workers: int = 4, max_pixels: int = MAX_PIXELS, progress: bool = True
) -> CheckReport:
    """Decode every image and look at every caption and target. Of a sample with several images, each counts.

    Args:
        source: opened with `strict=False`, so that missing images are counted instead of an error.
        num_workers: threads that decode; 0 for none.
        max_pixels: images with more count as broken.
        progress: whether to show a progress bar.
    """

    def examine(index: int) -> list[_ImageFacts]:
        return _examine(source, index, max_pixels)

    results = parallel_map(examine, range(len(source)), num_workers, window=4 * max(1, num_workers))
    bar = tqdm(results, total=len(source), desc="checking images", unit="image", disable=not progress)
    names = [source.key(index) for index in range(len(source))]
    images = [(key, fact) for key, facts in zip(names, bar, strict=True) for fact in facts]
    keys, facts = [key for key, _ in images], [fact for _, fact in images]
    captions = [source.captions(index) for index in range(len(source))]
    texts = [caption for own in captions for caption in own]
    targets = _Targets(source)
    good = [index for index, fact in enumerate(facts) if fact.error is None]
    repeated = Counter(" ".join(text.casefold().split()) for text in texts)
    return CheckReport(
        num_images=len(source),
        num_captions=len(texts),
        captions_per_image=Spread.of(map(len, captions)),
        width=Spread.of(facts[index].width for index in good),
        height=Spread.of(facts[index].height for index in good),
        megapixels=_histogram([facts[index].width * facts[index].height / 1e6 for index in good]),
        formats=dict(Counter(facts[index].format for index in good).most_common()),
        modes=dict(Counter(facts[index].mode for index in good).most_common()),
        broken_images=tuple((key, fact.error) for key, fact in zip(keys, facts, strict=True) if fact.error is not None),
        missing_images=source.missing_images,
        images_without_captions=tuple(key for key, own in zip(names, captions, strict=True) if not own),
        blank_captions=source.blank_captions,
        duplicate_images=_groups((facts[index].digest, keys[index]) for index in good),
        near_duplicate_images=_near_duplicates([(keys[index], facts[index]) for index in good]),
        duplicate_captions=tuple((text, count) for text, count in repeated.most_common() if count > 1),
        caption_words=Spread.of(len(text.split()) for text in texts),
        num_targets=targets.count,
        classes=tuple(targets.classes.most_common()),
        answers=tuple(targets.answers.most_common()),
        images_without_target=tuple(targets.absent),
        unusable_targets=tuple(targets.unusable),
    )


class _Targets:
    """The classes and answers of a source, counted, and which samples have none."""

    def __init__(self, source: SampleSource):
        self.classes: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.absent: list[str] = []
        self.unusable: list[tuple[str, str]] = []
        for index in range(len(source)):
            try:
                target = source.target(index)
            except ValueError as error:
                self.unusable.append((source.key(index), str(error)))
                continue
            if target is None:
                self.absent.append(source.key(index))
            else:
                (self.classes if isinstance(target, str) else self.answers).update(target_names(target))
        self.count = len(source) - len(self.absent) - len(self.unusable)


def _examine(source: SampleSource, index: int, max_pixels: int) -> list[_ImageFacts]:
    try:
        images = source.open_images(index)
    except ImageError as error:
        return [_ImageFacts(error.reason)]
    except OSError as error:
        return [_ImageFacts(error.strerror or str(error))]
    return [_facts_of(data, source.key(index), max_pixels) for data in images]


def _facts_of(data: bytes, name: str, max_pixels: int) -> _ImageFacts:
    try:
        header = read_header(data, max_pixels=max_pixels, name=name)
        image = decode_image(data, max_pixels=max_pixels, name=name)
    except ImageError as error:
        return _ImageFacts(error.reason)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    thumbnail = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).reshape(64)
    return _ImageFacts(None, digest, header.width, header.height, header.format, header.mode, thumbnail)


def _groups(items: Iterable[tuple[Hashable, str]]) -> tuple[tuple[str, ...], ...]:
    """Names that share an identity with others, in order of first appearance."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for identity, name in items:
        groups[identity].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _near_duplicates(images: list[tuple[str, _ImageFacts]]) -> tuple[tuple[str, ...], ...]:
    """Images with equal average hash (which of 8 x 8 pixels are above the mean), whose pixels agree closely too."""
    distinct = {fact.digest: (key, fact) for key, fact in reversed(images)}
    buckets: dict[bytes, list[tuple[str, np.ndarray]]] = defaultdict(list)
    for key, fact in reversed(distinct.values()):
        assert fact.thumbnail is not None
        average_hash = np.packbits(fact.thumbnail > fact.thumbnail.mean()).tobytes()
        buckets[average_hash].append((key, fact.thumbnail))
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

    def spread(value: Spread, digits: int = 0) -> str:
        parts = (f"{name} {getattr(value, name):,.{digits}f}" for name in ("min", "mean", "median", "p99", "max"))
        return ", ".join(parts)

    def counts(items: Iterable[tuple[str, int]]) -> str:
        return ", ".join(f"{name}: {count:,}" for name, count in items) or "-"

    rows = [
        ("images", f"{report.num_images:,}"),
        ("captions", f"{report.num_captions:,}"),
        ("captions per image", spread(report.captions_per_image, 1)),
        ("words per caption", spread(report.caption_words, 1)),
        ("width (pixels)", spread(report.width)),
        ("height (pixels)", spread(report.height)),
        ("sizes", counts(report.megapixels)),
        ("formats", counts(report.formats.items())),
        ("modes", counts(report.modes.items())),
        *_target_rows(report),
    ]
    findings: list[tuple[str, list[str]]] = [
        ("broken images", [f"{key}: {reason}" for key, reason in report.broken_images]),
        ("missing images", list(report.missing_images)),
        ("images without captions", list(report.images_without_captions)),
        ("blank captions", list(report.blank_captions)),
        ("duplicate images (groups)", [", ".join(group) for group in report.duplicate_images]),
        ("near-duplicate images (groups)", [", ".join(group) for group in report.near_duplicate_images]),
        ("repeated captions", [f"{count} x {text}" for text, count in report.duplicate_captions]),
    ]
    if report.num_targets or report.unusable_targets:
        findings.append(("images without label", list(report.images_without_target)))
        findings.append(("unusable labels", [reason for _, reason in report.unusable_targets]))
    rows += [(name, f"{len(found):,}") for name, found in findings]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for name, found in findings:
        if found:
            lines += ["", f"{name}:"] + [f"  {item}" for item in found[:examples]]
            if len(found) > examples:
                lines.append(f"  ... and {len(found) - examples:,} more")
    return "\n".join(lines)


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
