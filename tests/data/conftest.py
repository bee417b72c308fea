"""Fixtures of the data tests: byte tokenizers and the shared data."""

from __future__ import annotations

import pathlib

import pytest
from byte_tokenizer import CHATML, SHARED, byte_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def chat() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def chat_path(tmp_path: pathlib.Path) -> str:
    """Return a local folder with the chat tokenizer. Loading sets its pad token to eos."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def shared_data() -> pathlib.Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared real data are not here")
    return SHARED / "data"
