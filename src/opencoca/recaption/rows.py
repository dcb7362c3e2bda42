"""Makes rows of captions: for the journal one for each image, for the output one for each caption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opencoca.generation import GeneratedCaption
from opencoca.recaption.captioner import CaptionedImage

Row = dict[str, Any]
"""A row as JSON can hold it."""
_DIGITS = 4  # further digits are rounding errors


def caption_row(caption: GeneratedCaption) -> Row:
    """Returns what is stored of a caption, with its similarity to the image if captions were reranked."""
    row: Row = {
        "caption": caption.text,
        "log_probability": round(caption.log_probability, _DIGITS),
        "length": caption.length,
    }
    if caption.similarity is not None:
        row["similarity"] = round(caption.similarity, _DIGITS)
    return row


def to_journal_row(image: CaptionedImage) -> Row:
    """Returns an image's row in the journal: {"image", "captions"} or {"image", "error"}."""
    if image.error is not None:
        return {"image": image.image, "error": image.error}
    return {"image": image.image, "captions": [caption_row(caption) for caption in image.captions]}


def output_rows(row: Row) -> Iterator[Row]:
    """Makes a row for each caption in a row of the journal: the image and what is stored of the caption.

    Where an image has several captions, each row has the caption's rank, 0 for the best.
    """
    captions = row.get("captions", [])
    for rank, caption in enumerate(captions):
        yield {"image": row["image"], **({"rank": rank} if len(captions) > 1 else {}), **caption}


def image_rows(image: CaptionedImage) -> Iterator[Row]:
    """Makes the output's rows of an image that has just been captioned."""
    return output_rows(to_journal_row(image))
