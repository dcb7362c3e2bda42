"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from opencoca.system.files import atomic_write
from opencoca.train.report.charts import COLOURS, chart_svg, charts_of
from opencoca.train.report.live_view import working_figures
from opencoca.train.report.matrices import matrix_png, stored_matrices
from opencoca.train.report.run_log import RunLog

_THUMBNAIL_PIXELS = 220
_MOST_COLUMNS = 6
_STYLE = """
:root { --ink: #22211f; --soft: #77736b; --paper: #f3f1ec; --card: #fff; --line: #dedad1; --best: #fdf0e8 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 60px; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 24px; margin: 0 0 2px } h2 { font-size: 17px; margin: 34px 0 10px } p { margin: 4px 0 }
.soft { color: var(--soft) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px }
.card, table { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.card { padding: 8px } .card svg { width: 100%; height: auto; display: block }
.scroll { overflow-x: auto }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13.5px }
th, td { padding: 6px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
tr:last-child td { border-bottom: 0 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
table.captions { table-layout: fixed; min-width: 900px } .captions td { overflow-wrap: anywhere }
.captions th:first-child { width: 182px }
tr.best td { background: var(--best) } td img { display: block; border-radius: 6px; width: 160px; height: auto }
img.matrix { display: block; width: 100%; max-width: 900px; height: auto }
details { margin-top: 34px } summary { cursor: pointer; margin-bottom: 10px } summary h2 { display: inline }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px }
"""


def write_html(
    path: str | Path, runs: Sequence[RunLog], title: str, pictures: dict[str, Image.Image] | None = None
) -> Path:
    """Writes the page. pictures: photographs by key, of those whose captions the runs followed."""
    body = [
        f"<h1>{escape(title)}</h1>",
        *(_summary(run, number, len(runs) > 1) for number, run in enumerate(runs)),
        _charts(runs),
        _validations(runs),
        _matrices(runs),
        _captions(runs, pictures or {}),
        _events(runs),
        _recipes(runs),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )
    path = Path(path)
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    return path


def _summary(run: RunLog, number: int, many: bool) -> str:
    train = run.of("train")
    facts = [f"{run.last_step:,} steps"] if many else []  # of one run, the title says it
    if train:
        last = train[-1]
        facts.append(f"epoch {last.get('epoch', 0):g}")
        rates = ("images_per_sec", "tokens_per_sec", "model_flops_utilisation", "step_ms", "data_wait_ms")
        facts.append(working_figures(last | {name: _mean(train, name) for name in rates if name in last}))
    dot = (
        f'<span class="dot" style="background:{COLOURS[number % 7]}"></span><b>{escape(run.name)}</b>: ' if many else ""
    )
    return f'<p class="soft">{dot}{escape(" · ".join(facts))}</p>'


def _mean(lines: list[dict[str, Any]], name: str) -> float:
    values = [line[name] for line in lines if name in line]
    return sum(values) / max(1, len(values))


def _charts(runs: Sequence[RunLog]) -> str:
    drawn = [svg for chart in charts_of(runs) if (svg := chart_svg(chart, runs))]
    return '<div class="grid">' + "".join(f'<div class="card">{svg}</div>' for svg in drawn) + "</div>"


def _validations(runs: Sequence[RunLog]) -> str:
    rows = [(run, line) for run in runs for line in run.of("validation")]
    if not rows:
        return ""
    scores = [
        s for s in dict.fromkeys(s for run in runs for s in run.scores) if any(s.name in line for _, line in rows)
    ]
    many = len(runs) > 1
    best = {id(_best(run)) for run in runs}
    head = ["run"] * many + ["step", "epoch"]
    cells = "".join(f"<th>{name}</th>" for name in head)
    cells += "".join(f'<th class="number">{escape(score.label)}</th>' for score in scores)
    body = ""
    for run, line in rows:
        body += f'<tr class="{"best" if id(line) in best else ""}">'
        body += f"<td>{escape(run.name)}</td>" if many else ""
        body += f"<td>{line['step']:,}</td><td>{line.get('epoch', 0):g}</td>"
        for score in scores:
            value = f"{score.factor * line[score.name]:.{score.digits}f}" if score.name in line else ""
            body += f'<td class="number">{value}</td>'
        body += "</tr>"
    note = '<p class="soft">Scores x 100; the row in colour is the best of its run by task.select_by.</p>'
    return f'<h2>Validation</h2>{note}<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def _best(run: RunLog) -> dict[str, Any] | None:
    """The validation by which the best weights were chosen; None for a run that did not log it."""
    lines = [line for line in run.of("validation") if "selection" in line]
    return max(lines, key=lambda line: line["selection"]) if lines else None


def _matrices(runs: Sequence[RunLog]) -> str:
    found = [(run, matrix) for run in runs for matrix in stored_matrices(run.folder)]
    parts = []
    for run, matrix in found:
        data = base64.b64encode(matrix_png(matrix)).decode()
        name = f" ({run.name})" if len(runs) > 1 else ""
        alt = escape(f"{matrix.title}{name}")
        parts.append(f'<div class="card"><img class="matrix" alt="{alt}" src="data:image/png;base64,{data}"></div>')
    return "".join(parts)


def _captions(runs: Sequence[RunLog], pictures: dict[str, Image.Image]) -> str:
    parts = []
    for run in runs:
        lines = _spread([line for line in run.of("captions") if line.get("captions")], _MOST_COLUMNS)
        if not lines:
            continue
        keys = list(dict.fromkeys(key for line in lines for key in line["captions"]))
        has_pictures = any(key in pictures for key in keys)
        head = f"<th>{'photograph' if has_pictures else 'file'}</th>"
        head += "".join(f"<th>step {line['step']:,}</th>" for line in lines)
        body = ""
        for key in keys:
            picture = pictures.get(key)
            shown = f'<img alt="{escape(key)}" src="{_data_url(picture)}">' if picture else escape(key)
            body += f"<tr><td>{shown}</td>"
            body += "".join(f"<td>{escape(str(line['captions'].get(key, '')))}</td>" for line in lines) + "</tr>"
        name = f": {escape(run.name)}" if len(runs) > 1 else ""
        table = f'<div class="scroll"><table class="captions"><tr>{head}</tr>{body}</table></div>'
        parts.append(f"<h2>Captions over time{name}</h2>{table}")
    return "".join(parts)


def _spread(lines: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of the lines, evenly spaced, with the first and the last."""
    if len(lines) <= most:
        return lines
    return [lines[round(number * (len(lines) - 1) / (most - 1))] for number in range(most)]


def _data_url(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _events(runs: Sequence[RunLog]) -> str:
    rows = [(run, line) for run in runs for line in run.of("event")]
    if not rows:
        return ""
    body = ""
    for run, line in rows[-50:]:
        rest = ", ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, int | float) and k != "step")
        cells = (run.name, f"{line['step']:,}", str(line.get("event", "")), rest)
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    return f"<h2>Steps that changed nothing</h2><table><tr><th>run<th>step<th>what<th></tr>{body}</table>"


def _recipes(runs: Sequence[RunLog]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.recipe))
    if len(runs) > 1:
        keys = [key for key in keys if len({str(run.recipe.get(key)) for run in runs}) > 1]
    if not keys:
        return ""
    head = "<th>key</th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><td>{escape(key)}</td>"
        + "".join(f"<td>{escape(str(run.recipe.get(key, '')))}</td>" for run in runs)
        + "</tr>"
        for key in keys
    )
    table = f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
    if len(runs) > 1:
        return f"<h2>What the recipes differ in</h2>{table}"
    return f"<details><summary><h2>Recipe</h2></summary>{table}</details>"
