"""Tiny models, random data and a silent trainer, for a complete run in a second."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lit_align.algorithms.core.base import Algorithm
from lit_align.batches import Batch, Experience, OfflineResponse, PreferenceBatch, TextBatch
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.models.adapters.lora import LoRA
from lit_align.models.backbone import Backbone
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead
from lit_align.rewards.base import RewardFunction

SHARED = Path(__file__).parents[2] / "shared"
TINY = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = {
    **TINY,
    "vocab_size": 192,
    "max_position_embeddings": 128,
}  # has the vocabulary of the toy data


class RandomPrompts(LightningDataModule):
    """Prompts of five random tokens. Texts are the token ids."""

    def __init__(self, num_batches: int = 3, batch_size: int = 4):
        super().__init__()
        self.num_batches, self.batch_size = num_batches, batch_size
        self.tokenizer = SimpleNamespace(pad_token_id=0, __len__=lambda self: 32)
        self.stop_ids = [2]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def batch(self, number: int) -> Experience:
        """Return the batch of all ranks."""
        world = self.trainer.world_size if self.trainer else 1
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 32, (self.batch_size * world, 5), generator=generator)
        return Experience(
            columns={"prompt": [self.decode(row) for row in ids.tolist()]},
            prompts=ids,
            prompt_mask=torch.ones_like(ids, dtype=torch.bool),
            prompt_lengths=[5] * len(ids),
            is_new=[True] * len(ids),
        )

    def rank_rows(self, batch: Batch) -> Batch:
        """Return the rows r, r + W, ... of rank r of W."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return batch.rows(range(rank, len(batch), world))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.num_batches), batch_size=1, collate_fn=self.first)

    val_dataloader = predict_dataloader = train_dataloader

    def first(self, numbers: list[int]) -> Batch:
        return self.rank_rows(self.batch(numbers[0]))


class RandomOfflineResponses(RandomPrompts):
    """Random prompts with one to three offline responses. Every other one has no score."""

    def batch(self, number: int) -> Experience:
        batch = super().batch(number)
        source = random.Random(number)
        batch.offline_responses = [
            [self.response(source, has_score=number % 2 == 0) for number in range(1 + row % 3)]
            for row in range(len(batch))
        ]
        return batch

    def response(self, source: random.Random, has_score: bool) -> OfflineResponse:
        """Return a response of up to four tokens and a stop token."""
        tokens = [source.randrange(3, 32) for _ in range(source.randrange(5))]
        score, logprob = source.random(), -4.0 * len(tokens) - source.random()
        return OfflineResponse([*tokens, 2], *((score, logprob) if has_score else (None, None)))


class RandomTexts(RandomPrompts):
    """Four texts of 3, 8, 5 and 2 tokens. The first token is no target."""

    def batch(self, number: int) -> TextBatch:
        lengths = [3, 8, 5, 2]
        ids = torch.randint(3, 32, (4, 8), generator=torch.Generator().manual_seed(number))
        mask = torch.arange(8) < torch.tensor(lengths).unsqueeze(1)
        target_mask = mask & (torch.arange(8) > 0)
        return TextBatch(
            tokens=ids.where(mask, 0),
            token_mask=mask,
            target_mask=target_mask,
            lengths=lengths,
            is_new=[True, True, True, False],
        )


def scalar(**settings: Any) -> ScalarHead:
    """Return a network with a score head and the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ScalarHead(config=dict(TINY), **settings)


class RandomPairs(RandomPrompts):
    """Pairs whose chosen text ends in token 5 and whose rejected text ends in 6."""

    def batch(self, number: int) -> PreferenceBatch:
        generator = torch.Generator().manual_seed(number)
        chosen, rejected = torch.randint(7, 32, (2, 4, 6), generator=generator)
        chosen[:, 5], rejected[:, 3] = 5, 6
        full = torch.ones(4, 6, dtype=torch.bool)
        short = torch.arange(6).expand(4, 6) < 4
        return PreferenceBatch(
            chosen=chosen,
            chosen_mask=full,
            chosen_target_mask=full,
            chosen_lengths=[6] * 4,
            rejected=rejected.where(short, 0),
            rejected_mask=short,
            rejected_target_mask=short,
            rejected_lengths=[4] * 4,
            margin=torch.zeros(4),
            is_new=[True, True, True, False],
        )


class Count(RewardFunction):
    """Reward: how often a token occurs in the response."""

    def __init__(self, token: int = 5):
        self.token = token

    def __call__(self, batch: Experience) -> Tensor:
        return ((batch.responses == self.token) & batch.response_mask).sum(-1).float()


def tiny(**settings: Any) -> Policy:
    """Return a tiny Llama with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Policy(**{"config": dict(TINY), **settings})


def weights(module: torch.nn.Module) -> list[Tensor]:
    """Return unsharded copies of the trained weights."""
    tensors = [weight.detach() for weight in module.parameters() if weight.requires_grad]
    return [t.full_tensor() if isinstance(t, DTensor) else t.clone() for t in tensors]


def adapted(kind: type[Backbone], rank: int = 2, spread: float = 0.02, **settings: Any) -> Backbone:
    """Return the same random base and adapters each time. `spread` scales the frozen weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {**TINY, "initializer_range": spread}
        return kind(config=config, lora=LoRA(r=rank, lora_alpha=2 * rank), **settings)


def trained(algorithm: Algorithm) -> list[Tensor]:
    """Return the trained weights of all roles."""
    return [weight for network in algorithm.roles.values() for weight in weights(network)]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest distance of two equally placed tensors, relative to their norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


def trainer(folder, max_new_tokens: int = 6, **settings) -> Trainer:
    """Return a silent trainer on one CPU process that rolls out and counts tokens."""
    callbacks = [Rollout(max_new_tokens=max_new_tokens), Reward(Count())]
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    more = settings.pop("callbacks", [])
    return Trainer(callbacks=[*callbacks, *more], **{**defaults, **settings})


def ragged_rollout() -> Experience:
    """Return prompts of 3, 5 and 1 tokens with responses of 2, 1 and 4 tokens."""
    mask = torch.arange(5) >= 5 - torch.tensor([3, 5, 1]).unsqueeze(1)
    response_mask = torch.arange(4) < torch.tensor([2, 1, 4]).unsqueeze(1)
    ids = torch.arange(3, 30).view(3, 9)
    return Experience(
        prompts=ids[:, :5].where(mask, 0),
        prompt_mask=mask,
        prompt_lengths=[3, 5, 1],
        responses=ids[:, 5:].where(response_mask, 0),
        response_mask=response_mask,
        response_lengths=[2, 1, 4],
    )
