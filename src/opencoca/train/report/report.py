"""The reports of a run: a page with everything (report.html), and one picture of losses, scores and captions."""

import contextlib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from opencoca.data import SampleSource, decode_image
from opencoca.system.files import atomic_write
from opencoca.train.data_sources import open_val_source
from opencoca.train.recipe.recipe import load_recipe
from opencoca.train.report.html import write_html
from opencoca.train.report.metrics_log import read_metrics
from opencoca.train.report.run_log import RunLog, read_run

_SCORES = {
    "cider_d": "CIDEr-D",
    "bleu_4": "BLEU-4",
    "image_to_text_r1": "image to text R@1",
    "text_to_image_r1": "text to image R@1",
}


def write_report(folder: Path, source: SampleSource | None, captions: dict[str, str], title: str) -> Path:
    """Writes report.html and report.png from the run's metrics.jsonl; captions: by key, of the images to show.

    source: of the validation photographs; None = there are none to show. Returns the picture's path.
    """
    write_html(folder / "report.html", [read_run(folder)], title, followed_pictures([read_run(folder)], source))
    return _write_picture(folder, source, captions, title)


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
    captions_path = run.folder / "val_captions.json"
    captions = json.loads(captions_path.read_text(encoding="utf-8")) if captions_path.is_file() else {}
    return [page, _write_picture(run.folder, source, captions, title)]


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


def _write_picture(folder: Path, source: SampleSource | None, captions: dict[str, str], title: str) -> Path:
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


def _photographs(source: SampleSource, captions: dict[str, str], count: int = 8) -> list[tuple[Any, str]]:
    wanted = [i for i in range(len(source)) if source.key(i) in captions]
    chosen = wanted[:: max(1, len(wanted) // count)][:count]
    return [(decode_image(source.open_bytes(i)), captions[source.key(i)]) for i in chosen]
