"""The report's page and the live view: what they show, and that the page needs nothing else."""

import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from opencoca.cli import main
from opencoca.data import open_source
from opencoca.train import train
from opencoca.train.report.charts import COLOURS, charts_of, draw_curves
from opencoca.train.report.html import write_html
from opencoca.train.report.live_view import LiveView, duration, learning_figures, working_figures
from opencoca.train.report.metrics_log import MetricsLog
from opencoca.train.report.report import followed_pictures, report_runs
from opencoca.train.report.run_log import read_run
from opencoca.train.validation import fixed_photographs

from ..helpers import Pairs, tiny_recipe

LINE = {
    "loss": 3.2,
    "contrastive_loss": 1.25,
    "caption_loss": 0.975,
    "grad_norm": 0.5,
    "logit_scale": 14.3,
    "lr": 8e-4,
    "images_per_sec": 123.0,
    "tokens_per_sec": 19000.0,
    "step_ms": 100.0,
    "data_wait_ms": 25.0,
    "model_flops_utilisation": 0.43,
    "memory_bytes": 2.1e9,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pairs: Pairs) -> Path:
    """A run that has ended, with its report not yet drawn."""
    output = tmp_path_factory.mktemp("report") / "first run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opencoca.train.trainer.write_report", lambda *_: None)
        return train(tiny_recipe(pairs, output, log_every_steps=1, report_images=3))


@pytest.fixture(scope="module")
def reported(run: Path) -> list[Path]:
    """The page and the picture of the run."""
    return report_runs([run])


class Tags(HTMLParser):
    """Every tag with what it refers to; fails on tags that are not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.references, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.open.append(tag)


def test_the_page_holds_everything(run: Path, reported: list[Path]) -> None:
    assert [path.name for path in reported] == ["report.html", "report.png"]
    page = reported[0].read_text(encoding="utf-8")
    assert all(ref.startswith(("data:image/jpeg;base64,", "#")) for ref in Tags(page).references)
    assert "<script" not in page
    assert "@import" not in page
    assert page.count("data:image/jpeg") == 3
    for title in ("losses", "gradient norm", "logit scale", "model FLOP utilisation", "memory", "time of a step"):
        assert title in page
    captions = read_run(run).of("captions")
    assert [line["step"] for line in captions] == [2, 4]
    assert len(captions[0]["captions"]) == 3
    assert "step 4" in page


def test_no_legend_of_the_picture_lies_over_a_curve(run: Path) -> None:
    log = read_run(run)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, charts_of([log])[0], [log])
    figure.draw_without_rendering()
    legend = axes.get_legend()
    assert legend is not None
    box, curves = legend.get_window_extent(), axes.get_window_extent()
    assert len(legend.get_texts()) >= 2
    assert box.y1 < curves.y0
    assert box.y0 >= 0, "and it is within the picture"


def test_the_photographs_of_the_picture_form_a_grid(run: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tall and wide ones, with short and long captions in any script, have frames of one size, in rows and columns."""
    sizes = [(300, 100), (100, 300), (200, 200), (40, 30), (500, 20)]
    texts = ["a dog", "a very long caption " * 20, "猫が眠っている \U00020000", "costs $5 or $6", "a\ncat"]
    photographs = [(Image.new("RGB", size, "red"), text) for size, text in zip(sizes, texts, strict=True)]
    monkeypatch.setattr("opencoca.train.report.report._photographs", lambda *_: photographs)
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of characters that no font has, too
        report_runs([run])
    frames = [axes.get_window_extent() for axes in drawn[-1].axes if axes.images]
    assert len(frames) == 5
    assert len({(round(frame.width), round(frame.height)) for frame in frames}) == 1
    assert len({round(frame.y0) for frame in frames[:4]}) == 1
    assert round(frames[4].x0) == round(frames[0].x0)
    assert frames[4].y1 < frames[0].y0


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def test_a_browser_shows_the_page(reported: list[Path], tmp_path: Path) -> None:
    """In Chromium, without a network: all texts and photographs are seen, and nothing is wider than the window."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    told = """<script>onload = () => document.title = JSON.stringify({
        wide: document.documentElement.scrollWidth, window: innerWidth,
        pictures: [...document.images].map(image => image.complete && image.naturalWidth && image.width)})</script>"""
    page = tmp_path / "page.html"
    page.write_text(reported[0].read_text(encoding="utf-8") + told, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,2600"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [browser, *options, f"--screenshot={shot}", "--dump-dom", page.as_uri()], capture_output=True, timeout=60
    )
    dom = done.stdout.decode()
    measured = json.loads(re.search("<title>(.*?)</title>", dom)[1])  # pyright: ignore
    assert measured["wide"] <= measured["window"]
    assert len(measured["pictures"]) == 3
    assert all(measured["pictures"])
    for title in ("losses", "learning rate", "image0.png"):
        assert title in dom
    with Image.open(shot) as seen:
        assert seen.size == (1100, 2600)
        pixels = np.asarray(seen.convert("RGB")).astype(int)
    for colour in COLOURS[:2]:
        drawn = np.abs(pixels - 255 * np.array(matplotlib.colors.to_rgb(colour))).max(axis=-1) < 12
        assert drawn.sum() > 200, colour  # a short and a long curve, a few pixels wide


def test_several_runs_are_compared(run: Path, pairs: Pairs, tmp_path: Path) -> None:
    second = tmp_path / "second"
    train(tiny_recipe(pairs, second, log_every_steps=1, optimizer__learning_rate=1e-3))
    output = tmp_path / "both.html"
    assert main(["report", str(run), str(second), "--output", str(output)]) == 0
    page = output.read_text(encoding="utf-8")
    for name, colour in zip(("first run", "second"), COLOURS, strict=False):
        assert f'<span class="dot" style="background:{colour}"></span><b>{name}</b>: ' in page
        assert f"stroke: {colour}" in page
    assert "<td>optimizer.learning_rate</td><td>0.002</td><td>0.001</td>" in page
    assert "batch_size" not in page


def test_without_its_photographs(run: Path, tmp_path: Path) -> None:
    log = read_run(run)
    page = write_html(tmp_path / "page.html", [log], "<b>&").read_text(encoding="utf-8")
    assert "data:image" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "image0.png" in page


def test_what_a_model_writes_cannot_become_a_part_of_the_page(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write("captions", 1, {"captions": {"a<img src=x>.jpg": "<script>alert(1)</script>"}})
    log.write("event", 2, {"event": "spike", "count": 1})
    log.close()
    page = write_html(tmp_path / "page.html", [read_run(tmp_path)], "x").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<img src=x>" not in page
    assert "spike" in page


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "has no line yet" in capsys.readouterr().err


def test_two_runs_of_one_name(run: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        report_runs([run, run])


def test_pictures_are_those_of_the_captions(run: Path, pairs: Pairs) -> None:
    source = open_source(pairs.images, pairs.table)
    keys = fixed_photographs(source, list(range(len(source))), 3)
    pictures = followed_pictures([read_run(run)], source)
    assert set(pictures) == set(keys)
    assert all(isinstance(picture, Image.Image) for picture in pictures.values())
    assert fixed_photographs(source, list(range(len(source))), 0) == []
    assert len(fixed_photographs(source, list(range(len(source))), 99)) == len(source)


def test_figures_in_words() -> None:
    assert learning_figures(LINE) == (
        "loss 3.200 (contrastive 1.250, caption 0.975)  grad norm 0.50  logit scale 14.3  lr 8.00e-04"
    )
    assert working_figures(LINE) == "123 images/s  19.0k tokens/s  MFU 43%  memory 2.1 GB  data wait 25%"
    assert [duration(s) for s in (5, 90, 5400, 200_000)] == ["5 s", "1.5 min", "1.5 h", "2.3 days"]


def test_a_log_file_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with LiveView(10, 4, stream=stream) as view:
        view.advance()
        view.show(LINE)
        view.write("epoch 1: fine")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 5/10 (50%)  loss 3.200")
    assert "left" in lines[0]
    assert lines[1] == "epoch 1: fine"
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_a_bar_and_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # pyright: ignore[reportAttributeAccessIssue]
    with LiveView(2, stream=stream) as view:
        view.advance()
        view.show(LINE)
        view.write("epoch 1: fine")
    text = re.sub(r"\x1b\[[A-Z]", "", stream.getvalue())
    assert "training" in text
    assert learning_figures(LINE) in text
    assert working_figures(LINE) in text
    assert "epoch 1: fine\n" in text


def test_a_hidden_one_says_nothing() -> None:
    stream = io.StringIO()
    with LiveView(2, hidden=True, stream=stream) as view:
        view.advance()
        view.show(LINE)
        view.write("x")
    assert stream.getvalue() == ""


def test_tensorboard_gets_the_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    log.write("captions", 3, {"epoch": 1.0, "captions": {"a.jpg": "a dog"}})
    log.close()
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"a dog" in written
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["captions"] == {"a.jpg": "a dog"}
    assert sys.modules.get("tensorboard") is not None
