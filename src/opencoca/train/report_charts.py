"""Curves of one run or several, as pictures that a page holds inside of it."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opencoca.train.run_log import RunLog

# Okabe and Ito's colours, which people who see colours differently can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MOST_POINTS = 600


class Curve(NamedTuple):
    """One figure of the log: kind of line, its name there, and what it is multiplied by."""

    kind: str
    name: str
    label: str
    factor: float = 1.0


class Chart(NamedTuple):
    """Curves that share axes."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    is_logarithmic: bool = False


CHARTS = (
    Chart(
        "losses",
        "nats",
        (
            Curve("train", "caption_loss", "caption, train"),
            Curve("validation", "caption_loss", "caption, validation"),
            Curve("train", "contrastive_loss", "contrastive, train"),
            Curve("validation", "contrastive_loss", "contrastive, validation"),
        ),
    ),
    Chart(
        "captions of validation images",
        "x 100",
        (Curve("validation", "cider_d", "CIDEr-D", 100), Curve("validation", "bleu_4", "BLEU-4", 100)),
    ),
    Chart(
        "retrieval among validation images",
        "%",
        (
            Curve("validation", "image_to_text_r1", "image to text R@1", 100),
            Curve("validation", "text_to_image_r1", "text to image R@1", 100),
        ),
    ),
    Chart("learning rate", "", (Curve("train", "lr", "learning rate"),)),
    Chart("gradient norm, before clipping", "", (Curve("train", "grad_norm", "gradient norm"),), True),
    Chart("logit scale (1 / temperature)", "", (Curve("train", "logit_scale", "logit scale"),)),
    Chart(
        "speed",
        "a second",
        (Curve("train", "images_per_sec", "images"), Curve("train", "tokens_per_sec", "tokens")),
        True,
    ),
    Chart("model FLOP utilisation", "%", (Curve("train", "model_flops_utilisation", "utilisation", 100),)),
    Chart(
        "time of a step", "ms", (Curve("train", "step_ms", "step"), Curve("train", "data_wait_ms", "waits for data"))
    ),
    Chart("memory, the most so far", "GB", (Curve("train", "memory_bytes", "memory", 1e-9),)),
)


def chart_svg(chart: Chart, runs: Sequence[RunLog]) -> str | None:
    """An <svg> element; None if no run has any of its figures. One colour a run, or, of one run, one a curve."""
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, chart, runs)
    if not axes.lines:
        return None
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": chart.title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw(axes: Axes, chart: Chart, runs: Sequence[RunLog]) -> None:
    many = len(runs) > 1
    for run_number, run in enumerate(runs):
        for number, curve in enumerate(chart.curves):
            points = _thinned(run.points(curve.kind, curve.name, curve.factor))
            if not points:
                continue
            label = f"{run.name}: {curve.label}" if many else f"{curve.label} ({points[-1][1]:.4g})"
            # Of validation, points; of several curves of one run in a comparison, other dashes.
            style = "o--" if curve.kind == "validation" and chart.title == "losses" else "-"
            style = "o-" if curve.kind == "validation" and style == "-" else style
            colour = COLOURS[run_number % 7] if many else COLOURS[_colour(chart, number)]
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=colour,
                label=label.replace("$", r"\$"),
                markersize=3,
                linewidth=1.3,
                alpha=1.0 if number % 2 == 0 or not many else 0.55,
            )
    axes.set_title(chart.title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(chart.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if chart.is_logarithmic and axes.lines:
        axes.set_yscale("log")
    if axes.lines and (many or len(chart.curves) > 1):
        axes.legend(fontsize=7, framealpha=0.6)


def _colour(chart: Chart, number: int) -> int:
    return number // 2 if chart.title == "losses" else number


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Not more than a picture can show, the last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    step = len(points) / _MOST_POINTS
    return [points[int(number * step)] for number in range(_MOST_POINTS)] + points[-1:]
