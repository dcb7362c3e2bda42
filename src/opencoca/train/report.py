"""The picture at the end of a run: curves of losses and scores, and validation photographs with their captions."""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opencoca.data import ImageTextSource, decode_image
from opencoca.files import atomic_write
from opencoca.train.metrics_log import read_metrics

_SCORES = {
    "cider_d": "CIDEr-D",
    "bleu_4": "BLEU-4",
    "image_to_text_r1": "image to text R@1",
    "text_to_image_r1": "text to image R@1",
}


def write_report(folder: Path, source: ImageTextSource | None, captions: dict[str, str], title: str) -> Path:
    """Draws report.png from the run's metrics.jsonl; captions: by key, of the images to show. Returns its path."""
    metrics = read_metrics(folder / "metrics.jsonl")
    photographs = _photographs(source, captions) if source is not None else []
    figure = Figure(figsize=(16, 5 + 4.2 * ((len(photographs) + 3) // 4)), layout="constrained")
    rows = 1 + (len(photographs) + 3) // 4
    grid = figure.add_gridspec(rows, 4, height_ratios=[1.2] + [1.0] * (rows - 1))
    _draw_losses(figure.add_subplot(grid[0, :2]), metrics)
    _draw_scores(figure.add_subplot(grid[0, 2:]), metrics)
    for index, (picture, caption) in enumerate(photographs):
        axes = figure.add_subplot(grid[1 + index // 4, index % 4])
        axes.imshow(picture)
        axes.set_title(_literally(textwrap.fill(caption, 38)), fontsize=10)
        axes.axis("off")
    figure.suptitle(_literally(title))
    path = folder / "report.png"
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=70, format="png")
    return path


def _draw_losses(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    for name, color in (("caption_loss", "tab:blue"), ("contrastive_loss", "tab:orange")):
        for kind, style in (("train", "-"), ("validation", "o--")):
            points = [(line["step"], line[name]) for line in metrics if line["kind"] == kind and name in line]
            if points:
                label = f"{name.replace('_', ' ')}, {kind}"
                axes.plot(
                    *zip(*points, strict=True), style, color=color, alpha=0.6 if kind == "train" else 1, label=label
                )
    axes.set(xlabel="step", ylabel="nats", title="losses")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)


def _literally(text: str) -> str:
    """Without the formulas that matplotlib would see between two dollar signs."""
    return text.replace("$", r"\$")


def _draw_scores(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    for name, label in _SCORES.items():
        points = [(m["step"], 100 * m[name]) for m in metrics if m["kind"] == "validation" and name in m]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=f"{label} (last {points[-1][1]:.1f})")
    axes.set(xlabel="step", ylabel="x 100", title="validation scores")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _photographs(source: ImageTextSource, captions: dict[str, str], count: int = 8) -> list[tuple[Any, str]]:
    wanted = [i for i in range(len(source)) if source.key(i) in captions]
    chosen = wanted[:: max(1, len(wanted) // count)][:count]
    return [(decode_image(source.open_bytes(i)), captions[source.key(i)]) for i in chosen]
