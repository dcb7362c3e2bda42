"""Makes rows of captions: for the journal one for each image, for the output one for each caption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opencoca.recaption.captioner import CaptionedImage

Row = dict[str, Any]
"""A row as JSON can hold it."""
_DIGITS = 4  # further digits are rounding errors


def to_journal_row(image: CaptionedImage) -> Row:
    """Returns an image's row in the journal: {"image", "captions"} or {"image", "error"}.

    A caption has its similarity to the image if captions were reranked.
    """
    if image.error is not None:
        return {"image": image.image, "error": image.error}
    captions: list[Row] = []
    for found in image.captions:
        scores = {"log_probability": round(found.log_probability, _DIGITS), "length": found.length}
        if found.similarity is not None:
            scores["similarity"] = round(found.similarity, _DIGITS)
        captions.append({"caption": found.text, **scores})
    return {"image": image.image, "captions": captions}


def output_rows(row: Row) -> Iterator[Row]:
    """Makes a row for each caption in a row of the journal: the image and what is stored of the caption.

    Where an image has several captions, each row has the caption's rank, 0 for the best.
    """
    captions = row.get("captions", [])
    for rank, caption in enumerate(captions):
        yield {"image": row["image"], **({"rank": rank} if len(captions) > 1 else {}), **caption}
