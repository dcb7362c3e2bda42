"""Pictures of matrices of counts that a task's validation stores, such as which classes are taken for which."""

import io
import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from opencoca.evaluation.runner import CountMatrix

_MOST_NAMES = 60


def stored_matrices(folder: Path) -> list[CountMatrix]:
    """The matrices that the run in ``folder`` keeps with its best model."""
    found = []
    for path in sorted(folder.glob("val_*.json")):
        matrix = CountMatrix.from_json(json.loads(path.read_text(encoding="utf-8")))
        if matrix is not None:
            found.append(matrix)
    return found


def matrix_png(matrix: CountMatrix) -> bytes:
    """The matrix as a picture: each row divided by its sum, so that rare classes can be read as well."""
    count = len(matrix.labels)
    side = min(16.0, 3.5 + 0.16 * count)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    counts = np.array(matrix.counts)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    if count <= _MOST_NAMES:
        names = [textwrap.shorten(label.replace("$", r"\$"), 24, placeholder="…") for label in matrix.labels]
        axes.set_xticks(range(count), names, rotation=90, fontsize=7)
        axes.set_yticks(range(count), names, fontsize=7)
    axes.set(title=matrix.title, xlabel=matrix.columns, ylabel=matrix.rows)
    figure.colorbar(image, ax=axes, shrink=0.6, label=f"% of each row ({matrix.rows})")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90, format="png")
    return buffer.getvalue()
