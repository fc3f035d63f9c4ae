"""A tiny tokenizer, for the calibration tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.word_tokenizer import save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
