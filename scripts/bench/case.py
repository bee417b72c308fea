"""What is measured: an algorithm, a model, a shape."""

from __future__ import annotations

from typing import NamedTuple

ONLINE = ("grpo", "rloo")
OFFLINE = ("dpo", "sft", "reward_model")
SMALL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
MEDIUM = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
LARGE = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 4608,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
HUGE = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
MODELS = {"1M": SMALL, "7M": MEDIUM, "0.5B": LARGE, "1.5B": HUGE}


class Shape(NamedTuple):
    """Number of tokens of a step, and their distribution over rows.

    Args:
        name: For the table.
        num_rows: Responses, texts or pairs per optimizer step.
        num_samples: Responses to one prompt.
        prompt: Tokens of the longest prompt.
        response: Tokens of the longest response.
        mean_response: Mean of geometric lengths, cut at `response`. 0: all have that length.
        rows_per_microbatch: Rows of full length in one micro-batch.
    """

    name: str
    num_rows: int
    num_samples: int
    prompt: int
    response: int
    mean_response: int
    rows_per_microbatch: int

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text."""
        return self.prompt + self.response


class Case(NamedTuple):
    """One line of the table.

    Args:
        algorithm: One of ONLINE or OFFLINE.
        model: One of MODELS.
        shape: Of a step.
        device: cpu, or cuda in bf16.
    """

    algorithm: str
    model: str
    shape: Shape
    device: str = "cpu"

    @property
    def is_online(self) -> bool:
        """True if responses are sampled."""
        return self.algorithm in ONLINE

    @property
    def folder_name(self) -> str:
        """A folder's name: cases of one name read the same model."""
        return f"{self.model} {self.shape.mean_response if self.is_online else 'texts'}"

    @property
    def is_bf16(self) -> bool:
        """True if weights are bfloat16."""
        return self.device != "cpu"


def shapes(algorithm: str, device: str) -> list[Shape]:
    """Return a shape of full responses, and one of geometric lengths as a stop token gives."""
    if device != "cpu":
        rows = 128 if algorithm in ONLINE else 64
        return [
            Shape("full", rows, 8, 128, 256, 0, 16),
            Shape("ragged", rows, 8, 128, 512, 128, 16),
        ]
    if algorithm in ONLINE:
        return [Shape("full", 32, 8, 32, 64, 0, 8), Shape("ragged", 32, 8, 32, 128, 32, 8)]
    rows = 8 if algorithm == "sft" else 4  # a pair has two texts
    return [
        Shape("full", 4 * rows, 1, 32, 96, 0, rows),
        Shape("ragged", 4 * rows, 1, 32, 224, 48, rows),
    ]
