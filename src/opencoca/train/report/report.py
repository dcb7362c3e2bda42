"""The reports of a run: a page with everything (report.html), and one picture of losses, scores and captions."""

import contextlib
import itertools
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image, ImageOps

from opencoca.data import SampleSource, decode_image
from opencoca.system.files import atomic_write
from opencoca.system.fonts import font_file
from opencoca.train.best_model import read_texts
from opencoca.train.data_sources import open_val_source
from opencoca.train.recipe.load import load_recipe
from opencoca.train.report.charts import Chart, charts_of, draw_curves
from opencoca.train.report.html import write_html
from opencoca.train.report.run_log import RunLog, read_run

_TILE, _TILE_FILL, _CAPTION_LINES = (480, 360), "#efece5", 3


def write_report(folder: Path, source: SampleSource | None, title: str) -> Path:
    """Writes report.html and report.png from what the run stored in its folder.

    source: the validation photographs; None = there are none to show. Returns the picture's path.
    """
    runs = [read_run(folder)]
    write_html(folder / "report.html", runs, title, followed_pictures(runs, source))
    return _write_picture(runs[0], source, title)


def report_runs(folders: Sequence[str | Path], output: str | Path | None = None) -> list[Path]:
    """Reports of runs that may still go on: of one, both files in its folder; of several, one page that compares them.

    Photographs come from where the first run's recipe says, if they are still there. output: the page.
    Raises ValueError if a folder is no run's, or two of them have the same name.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have the same name: {', '.join(names)}; rename a folder, to tell them apart")
    source = _source_of(runs[0])
    if len(runs) > 1:
        title = " against ".join(names) if len(runs) == 2 else f"{len(runs)} runs compared"
        return [write_html(output or "report.html", runs, title, followed_pictures(runs, source))]
    run = runs[0]
    title = f"{run.name}: {run.last_step:,} steps"
    page = write_html(output or run.folder / "report.html", runs, title, followed_pictures(runs, source))
    return [page, _write_picture(run, source, title)]


def followed_pictures(runs: Sequence[RunLog], source: SampleSource | None) -> dict[str, Image.Image]:
    """By key, the photographs whose captions the runs followed; those that cannot be read are left out."""
    keys = {key for run in runs for line in run.of("captions") for key in line.get("captions", {})}
    found: dict[str, Image.Image] = {}
    for index in range(len(source) if source is not None and keys else 0):
        assert source is not None
        key = source.key(index)
        if key in keys:
            with contextlib.suppress(OSError, ValueError):
                found[key] = decode_image(source.open_bytes(index))
    return found


def _source_of(run: RunLog) -> SampleSource | None:
    """The run's validation photographs; None if there are none, or not any more."""
    try:
        return open_val_source(load_recipe(run.folder / "recipe.json"))
    except (ValueError, OSError):
        return None


def _write_picture(run: RunLog, source: SampleSource | None, title: str) -> Path:
    photographs = _photographs(source, read_texts(run.folder)) if source is not None else []
    rows = -(-len(photographs) // 4)
    heights = [5.5, 3.8 * rows] if rows else [5.5]
    figure = Figure(figsize=(16, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    left, right = parts[0].subplots(1, 2)
    losses, *scores = (chart for chart in charts_of([run]) if chart.curves[0].kind == "validation" or chart.is_loss)
    draw_curves(left, losses, [run])
    curves = tuple(curve for chart in scores for curve in chart.curves)
    draw_curves(right, Chart("validation scores", "x 100", curves), [run])
    frames = parts[1].subplots(rows, 4, squeeze=False).flat if rows else ()
    for axes, shown in itertools.zip_longest(frames, photographs):
        axes.axis("off")
        if shown is not None:
            picture, text = shown
            axes.imshow(ImageOps.pad(picture, _TILE, color=_TILE_FILL))
            font = FontProperties(fname=font_file(text), size=10.5)
            axes.set_title(_caption(text), y=-0.03, va="top", fontproperties=font, linespacing=1.4)
    figure.suptitle(_literally(title), fontproperties=FontProperties(fname=font_file(title), size=12))
    path = run.folder / "report.png"
    with atomic_write(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that no font of this machine has
        figure.savefig(partial, dpi=70, format="png")
    return path


def _caption(text: str) -> str:
    """The text on as many lines as every caption has, so that the photographs form a grid."""
    lines = textwrap.wrap(text, 44, max_lines=_CAPTION_LINES, placeholder=" …")
    return _literally("\n".join(lines + [""] * (_CAPTION_LINES - len(lines))))


def _literally(text: str) -> str:
    """The text with its dollar signs masked, between which matplotlib would read a formula."""
    return text.replace("$", r"\$")


def _photographs(source: SampleSource, captions: dict[str, str], count: int = 8) -> list[tuple[Image.Image, str]]:
    wanted = [i for i in range(len(source)) if source.key(i) in captions]
    chosen = wanted[:: max(1, len(wanted) // count)][:count]
    return [(decode_image(source.open_bytes(i)), captions[source.key(i)]) for i in chosen]
