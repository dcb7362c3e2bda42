"""The tokenizer that the tests of generation share."""

import pytest
from captioner import make_tokenizer

from opencoca.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()
