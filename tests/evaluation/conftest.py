"""The peer that caption scores are compared with."""

import importlib.util
import shutil

import pycocoevalcap_peer
import pytest


@pytest.fixture
def coco_peer():
    """Tokens and scores of pycocoevalcap. Tests that use it are marked ``java``; they fail, not skip, without it."""
    if shutil.which("java") is None:
        pytest.fail("Tests marked java need a Java runtime, and there is no java on the PATH.")
    if importlib.util.find_spec("pycocoevalcap") is None:
        pytest.fail("Tests marked java need pycocoevalcap: pip install 'opencoca[coco-metrics]'.")
    return pycocoevalcap_peer
