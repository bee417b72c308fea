"""Numbers and bytes of small Llamas by hand, for the table of `bench_memory.py`."""

from __future__ import annotations

from typing import NamedTuple

from lit_align.optim.galore import num_state_values

RANK, DENSITY, ADAPTER = 16, 0.03, 4  # of GaLore and SLTrain; rank of LoRA


class Size(NamedTuple):
    """A Llama with tied embeddings, and its numbers by hand.

    Args:
        vocabulary: V.
        hidden: H.
        mlp: Width of the MLP.
        blocks: How many.
    """

    vocabulary: int
    hidden: int
    mlp: int
    blocks: int

    @property
    def config(self) -> dict[str, object]:
        """For transformers."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": None,  # so that every response has the maximum length
            "pad_token_id": 0,
        }

    @property
    def linears(self) -> list[tuple[int, int]]:
        """[out, in] of the blocks' linear layers."""
        h, m = self.hidden, self.mlp
        return ([(h, h)] * 4 + [(m, h)] * 2 + [(h, m)]) * self.blocks

    @property
    def outside(self) -> list[int]:
        """Numbers of each other tensor: the embedding, and the norms."""
        return [self.vocabulary * self.hidden] + [self.hidden] * (2 * self.blocks + 1)

    @property
    def dense(self) -> list[int]:
        """Numbers of each tensor of the trunk; N is their sum."""
        return [out * into for out, into in self.linears] + self.outside

    @property
    def slim(self) -> list[int]:
        """Numbers of each tensor of a trunk of SLTrain: A, B and the entries of S, and the rest."""
        parts = [
            (RANK * i, o * RANK, int(DENSITY * o * i))
            if (o + i) * RANK + int(DENSITY * o * i) < o * i
            else (o * i,)
            for o, i in self.linears
        ]
        return [number for layer in parts for number in layer] + self.outside

    @property
    def adapter(self) -> list[int]:
        """Numbers of each factor of a LoRA on all linear layers; L is their sum."""
        return [ADAPTER * side for layer in self.linears for side in layer]


class Static(NamedTuple):
    """What a formula counts.

    Args:
        trained: Numbers of each tensor that trains, in fp32.
        frozen: Numbers that do not, in bf16.
        state: Bytes of the optimizer.
        paper: The formula in words, with 16 bytes a weight that trains and 2 a frozen one.
    """

    trained: list[int]
    frozen: int
    state: int
    paper: str

    @property
    def bytes(self) -> tuple[int, int, int]:
        """Weights, gradients and optimizer state."""
        trained = 4 * sum(self.trained)
        return trained + 2 * self.frozen, trained, self.state


def state(size: Size, tensors: list[int], rank: int | None) -> int:
    """Return the bytes of an optimizer for a backbone, with a step counter per tensor.

    Args:
        size: Size of the backbone.
        tensors: Number of values of each tensor.
        rank: Rank of GaLore, or None for AdamW.
    """
    if rank is None:
        return sum(8 * number + 4 for number in tensors)
    projected = sum(4 * num_state_values(*layer, rank) for layer in size.linears)
    return projected + sum(8 * number for number in size.outside) + 8 * len(tensors)


def head_state(size: Size, rank: int | None) -> int:
    """Return the same for a score head. GaLore counts steps in 8 bytes, AdamW in 4."""
    return 8 * size.hidden + (4 if rank is None else 8)
