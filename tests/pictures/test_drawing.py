"""What pictures are made of."""

from pathlib import Path

from PIL import Image

from opencoca.pictures.drawing import PAPER, save_sheet, stacked


def test_sections_stand_below_one_another(tmp_path: Path) -> None:
    sections = [Image.new("RGB", (30, height), colour) for height, colour in ((10, "red"), (20, "blue"))]
    path = save_sheet(tmp_path / "sheet.png", stacked(sections, 40, PAPER, gap=3, margin=5))
    with Image.open(path) as sheet:
        assert sheet.size == (40, 5 + 10 + 3 + 20 + 5)
        paper = sheet.getpixel((0, 0))
        column = [sheet.getpixel((5, y)) for y in range(sheet.height)]
    red, blue = [(255, 0, 0)] * 10, [(0, 0, 255)] * 20
    assert column == [paper] * 5 + red + [paper] * 3 + blue + [paper] * 5
