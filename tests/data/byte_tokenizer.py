"""Byte tokenizer for tests, with one token per byte, and two chat templates."""

from __future__ import annotations

import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SHARED = pathlib.Path(__file__).parents[3] / "shared"

CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' + turn.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' }}"
    "{% if turn.role == 'assistant' %}{% generation %}{{ turn.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ turn.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, `merges`, <|eos|>, <|im_start|> and <|im_end|>, without pad."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [one + other for one, other in merges or []]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges or []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|eos|>"), AddedToken("<|im_start|>")])
    backend.add_special_tokens([AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")
