"""One tiny model for all tests of runs."""

from pathlib import Path

import pytest

from cli_helpers import save_tiny_model
from opencoca.inference.loading import load
from opencoca.inference.pipeline import Pipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> Pipeline:
    return load(model_folder, "cpu")
