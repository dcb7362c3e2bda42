"""Curves of one run or several, as pictures that a page holds inside of it."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from opencoca.train.report.metrics_log import followed
from opencoca.train.report.run_log import RunLog

# Okabe and Ito's colours, which people who see colours differently can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SOFT = "#55524c"
_MOST_POINTS = 600


class Curve(NamedTuple):
    """One figure of the log: kind of line, its name there, and what it is multiplied by."""

    kind: str
    name: str
    label: str
    factor: float = 1.0


class Chart(NamedTuple):
    """Curves that share axes; is_loss: curves of training and of validation take turns."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    is_logarithmic: bool = False
    is_loss: bool = False


_ENGINE = (
    Chart("learning rate", "", (Curve("train", "lr", "learning rate"),)),
    Chart("gradient norm, before clipping", "", (Curve("train", "grad_norm", "gradient norm"),), True),
    Chart(
        "speed",
        "a second",
        (Curve("train", "images_per_sec", "images"), Curve("train", "tokens_per_sec", "tokens")),
        True,
    ),
    Chart("model FLOP utilisation", "%", (Curve("train", "model_flops_utilisation", "utilisation", 100),)),
    Chart(
        "time of a step",
        "ms",
        (Curve("train", "step_ms", "step"), Curve("train", "data_wait_ms", "waits for data")),
        True,
    ),
    Chart("memory, the most so far", "GB", (Curve("train", "memory_bytes", "memory", 1e-9),)),
)


def charts_of(runs: Sequence[RunLog]) -> list[Chart]:
    """The charts of runs: losses, the scores of their tasks, what else their tasks follow, and the engine's figures."""
    logged = list(dict.fromkeys(name for run in runs for line in run.of("train") for name in line))
    losses = [name for name in logged if name.endswith("_loss")] or ["loss"]
    kinds = ("train", "validation")
    curves = [Curve(kind, name, f"{_words(name.removesuffix('_loss'))}, {kind}") for name in losses for kind in kinds]
    charts = [Chart("losses", "nats", tuple(curves), is_loss=True)]
    titled: dict[str, list[Curve]] = {}
    for score in dict.fromkeys(score for run in runs for score in run.scores):
        if score.chart is not None:
            curve = Curve("validation", score.name, score.label, score.factor)
            titled.setdefault(score.chart, []).append(curve)
    charts += [Chart(title, "x 100", tuple(curves)) for title, curves in titled.items()]
    monitors = dict.fromkeys(name for run in runs for line in run.of("train") for name in followed(line))
    charts += [Chart(_words(name), "", (Curve("train", name, _words(name)),)) for name in monitors]
    return [*charts, *_ENGINE]


def _words(name: str) -> str:
    return name.replace("_", " ")


def chart_svg(chart: Chart, runs: Sequence[RunLog]) -> str | None:
    """An <svg> element; None if no run has any of its figures.

    In a chart of one run every curve has its colour; among several runs each has one of `COLOURS`, as on the page, and
    curves differ in style.
    """
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")  # as wide as a page of three columns shows it
    axes = figure.add_subplot()
    _draw(axes, chart, runs)
    if not axes.lines:
        return None
    _furnish(axes, chart)
    if len(chart.curves) > 1:
        # Below the curves, of which it would hide some.
        keys = _keys(axes, many=len(runs) > 1)
        figure.legend(handles=keys, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": chart.title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw_curves(axes: Axes, chart: Chart, runs: Sequence[RunLog]) -> None:
    """A chart on given axes, with a legend below the curves."""
    _draw(axes, chart, runs)
    _furnish(axes, chart)
    if axes.lines:
        keys = _keys(axes, many=len(runs) > 1)
        axes.legend(handles=keys, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=9, frameon=False)


def _draw(axes: Axes, chart: Chart, runs: Sequence[RunLog]) -> None:
    many = len(runs) > 1
    for run_number, run in enumerate(runs):
        for number, curve in enumerate(chart.curves):
            points = _thinned(run.points(curve.kind, curve.name, curve.factor))
            if not points:
                continue
            shade = _colour(chart, number)
            axes.plot(
                *zip(*points, strict=True),
                _style(chart, curve),
                color=COLOURS[run_number % 7] if many else COLOURS[shade],
                label=curve.label if many else f"{curve.label} ({_short(points[-1][1])})",
                markersize=3,
                linewidth=1.3,
                alpha=0.5 if many and shade else 1.0,
            )


def _style(chart: Chart, curve: Curve) -> str:
    """The line's style: points for validation, dashed between them where curves of training share the axes."""
    if curve.kind != "validation":
        return "-"
    return "o--" if any(other.kind == "train" for other in chart.curves) else "o-"


def _furnish(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.title, fontsize=10.5, fontweight="bold", loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(chart.unit, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.is_logarithmic:
        _logarithmic(axes)
    axes.tick_params(which="both", labelsize=9)


def _keys(axes: Axes, *, many: bool) -> list[Line2D]:
    """The legend's lines; many: runs have colours of their own, and one key stands for all of them."""
    by_label = {str(line.get_label()): line for line in axes.lines}
    return [
        Line2D([], [], color=_SOFT if many else line.get_color(), linestyle=line.get_linestyle(), linewidth=1.3,
               marker=line.get_marker(), markersize=3, alpha=line.get_alpha(), label=label)
        for label, line in by_label.items()
    ]  # fmt: skip


def _logarithmic(axes: Axes) -> None:
    """A logarithmic scale with plain numbers, enough of them to read values off."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0) if high > 4 * low else (1.0, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-6 else "0"


def _colour(chart: Chart, number: int) -> int:
    return number // 2 if chart.is_loss else number


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most as many points as a picture can show; the last one is among them."""
    if len(points) <= _MOST_POINTS:
        return points
    step = len(points) / _MOST_POINTS
    return [points[int(number * step)] for number in range(_MOST_POINTS)] + points[-1:]
