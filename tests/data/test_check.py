import json

import numpy as np
import pytest
from PIL import Image

from opencoca.data import check_source, format_report, open_source

from .helpers import encode, gradient, huge_png, write_images


def noise(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.fixture
def source(tmp_path):
    """Two good images, a copy, a recompressed copy, one inverted, and every kind of trouble."""
    images = tmp_path / "images"
    write_images(images, ["a.jpg", "b.png"])
    (images / "copy.jpg").write_bytes((images / "a.jpg").read_bytes())
    (images / "near.jpg").write_bytes(encode(gradient(seed=0).resize((96, 64)), quality=60))
    inverted = Image.fromarray(255 - np.asarray(gradient(seed=0)))
    (images / "inverse.png").write_bytes(encode(inverted, "PNG"))
    (images / "cut.jpg").write_bytes(encode(noise(1))[:2000])
    (images / "text.jpg").write_text("no image")
    (images / "bomb.png").write_bytes(huge_png())
    rows = [
        {"image": "a.jpg", "captions": ["A dog  runs", "one two three four five"]},
        {"image": "b.png", "captions": ["a dog runs", ""]},
        {"image": "copy.jpg", "captions": []},
        {"image": "near.jpg", "captions": ["x"]},
        {"image": "inverse.png", "captions": ["y"]},
        *({"image": name, "captions": ["z z"]} for name in ("cut.jpg", "text.jpg", "bomb.png", "gone.jpg")),
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_source(images, tmp_path / "t.jsonl", strict=False)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_everything_is_found(source, num_workers, capsys):
    report = check_source(source, num_workers=num_workers, progress=False)
    assert capsys.readouterr().err == ""
    assert (report.num_images, report.num_captions) == (8, 8)
    assert (report.captions_per_image.min, report.captions_per_image.max) == (0, 2)
    assert report.captions_per_image.mean == 1.0
    assert {key: reason.split(" ")[0] for key, reason in report.broken_images}.keys() == {
        "cut.jpg",
        "text.jpg",
        "bomb.png",
    }
    reasons = dict(report.broken_images)
    assert "cut short" in reasons["cut.jpg"]
    assert "text file" in reasons["text.jpg"]
    assert "pixels" in reasons["bomb.png"]
    assert report.missing_images == ("gone.jpg",)
    assert report.images_without_captions == ("copy.jpg",)
    assert report.blank_captions == ("b.png", "copy.jpg")
    assert report.duplicate_images == (("a.jpg", "copy.jpg"),)
    assert report.near_duplicate_images == (("a.jpg", "near.jpg"),)
    assert report.duplicate_captions == (("z z", 3), ("a dog runs", 2))
    assert report.formats == {"JPEG": 3, "PNG": 2}
    assert report.modes == {"RGB": 5}
    assert (report.width.min, report.width.median, report.width.max) == (48, 48, 96)
    assert (report.height.min, report.height.max) == (32, 64)
    assert report.megapixels == (("under 0.01 MP", 5),)
    assert (report.caption_words.max, report.caption_words.median) == (5, 2)
    assert report.errors


def test_as_json_and_as_text(source):
    report = check_source(source, progress=False)
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["broken_images"][0][0] == "cut.jpg"
    assert stored["width"]["max"] == 96
    text = format_report(report, examples=2)
    for part in ("text.jpg: it is a text file", "gone.jpg", "3 x z z", "a.jpg, near.jpg", "... and 1 more"):
        assert part in text
    assert "bomb.png" not in text
    assert len({line.index("  ") > 0 for line in text.splitlines()[:16]}) == 1


def test_sound_data_has_no_errors(tmp_path):
    for seed in range(6):
        (tmp_path / f"{seed}.png").write_bytes(encode(noise(seed, 80 * (seed + 1)), "PNG"))
    report = check_source(open_source(tmp_path), progress=False)
    assert not report.errors
    assert report.near_duplicate_images == report.duplicate_images == ()
    assert report.megapixels == (("under 0.01 MP", 1), ("0.01 to 0.1 MP", 2), ("0.1 to 0.5 MP", 3))
    assert report.caption_words.max == 0
    assert "captions " in format_report(report)


def test_a_progress_bar(tmp_path, capsys):
    write_images(tmp_path, ["a.jpg"])
    check_source(open_source(tmp_path))
    assert "1/1" in capsys.readouterr().err


def test_images_with_many_pixels_can_be_refused(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    report = check_source(open_source(tmp_path), max_pixels=100, progress=False)
    assert "more than the 100 allowed" in report.broken_images[0][1]
    assert report.width.max == 0
