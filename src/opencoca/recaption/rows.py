"""From captions to rows: of the journal, one an image, and of the output, one a caption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opencoca.generation import GeneratedCaption
from opencoca.recaption.engine import CaptionedImage

Row = dict[str, Any]
_DIGITS = 4  # beyond them is rounding


def caption_row(caption: GeneratedCaption) -> Row:
    """What is stored of a caption; its similarity to the image if captions were reranked."""
    row: Row = {
        "caption": caption.text,
        "log_probability": round(caption.log_probability, _DIGITS),
        "length": caption.length,
    }
    if caption.similarity is not None:
        row["similarity"] = round(caption.similarity, _DIGITS)
    return row


def to_journal_row(image: CaptionedImage) -> Row:
    """{"image", "captions"} of an image, or {"image", "error"}."""
    if image.error is not None:
        return {"image": image.image, "error": image.error}
    return {"image": image.image, "captions": [caption_row(caption) for caption in image.captions]}


def output_rows(row: Row) -> Iterator[Row]:
    """From a row of the journal one row a caption: the image, what is stored of the caption, and where there are
    several, the caption's rank among the image's, 0 for the best.
    """
    captions = row.get("captions", [])
    for rank, caption in enumerate(captions):
        yield {"image": row["image"], **({"rank": rank} if len(captions) > 1 else {}), **caption}


def image_rows(image: CaptionedImage) -> Iterator[Row]:
    """The same, of an image that has just been captioned."""
    return output_rows(to_journal_row(image))
