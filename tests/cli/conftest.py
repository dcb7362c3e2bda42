"""A small model and a folder of images, as most commands need them."""

from pathlib import Path

import pytest

from cli_helpers import save_tiny_model, write_colours


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "images")
