"""Fixtures of the data tests."""

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
    """A local folder with the chat tokenizer, whose pad token is its eos once loaded."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def shared_data() -> pathlib.Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared real data are not here")
    return SHARED / "data"
