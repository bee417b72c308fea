"""Short runs of every algorithm, for the table of `bench_memory.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.optim import AdamW
from torch.utils.data import DataLoader

from bench.formulas import ADAPTER, DENSITY, RANK, Size, Static, head_state, state
from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.grpovi import GRPOVI
from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.rto import RTO
from lit_align.algorithms.sft import SFT
from lit_align.algorithms.spr import SPR
from lit_align.batches import Batch, Experience, TextBatch
from lit_align.callbacks.memory import Memory, PhasePeak
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.data.text import load_tokenizer
from lit_align.models.adapters.lora import LoRA
from lit_align.models.hydra import Hydra, JointHydra
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead
from lit_align.models.sltrain import SLTrain
from lit_align.optim.galore import GaLore
from lit_align.rewards.base import RewardFunction
from lit_align.rewards.reward_model import ModelReward
from lit_align.rewards.shared_backbone import SharedBackboneReward
from lit_align.runs.allocations import storage_bytes

PROMPTS, SAMPLES, PROMPT_TOKENS = 4, 4, 16  # rows are prompts x samples; tokens of a prompt


class Row(NamedTuple):
    """A line of the table.

    Args:
        algorithm: And its layout.
        method: AdamW, GaLore or SLTrain.
        peaks: Of each phase.
        offloaded_bytes: Bytes of networks that are offloaded in the update.
        expected: By formula.
    """

    algorithm: str
    method: str
    peaks: dict[str, PhasePeak]
    offloaded_bytes: int
    expected: Static

    @property
    def static(self) -> tuple[int, int, int]:
        """Measured bytes of weights, gradients and optimizer state in the update."""
        update = self.peaks["update"]
        return update.parameters, update.gradients, update.optimizer_state

    @property
    def update(self) -> int:
        """Peak of the update without the offloaded networks."""
        return self.peaks["update"].peak - self.offloaded_bytes


class RandomTexts(LightningDataModule):
    """Random prompts of one length, or texts as long as a prompt with its response.

    Args:
        rows: Rows of a batch.
        response_tokens: Tokens of a response. 0 makes prompts only.
    """

    def __init__(self, rows: int, response_tokens: int):
        super().__init__()
        self.rows, self.width = rows, PROMPT_TOKENS + response_tokens
        self.tokenizer, self.stop_ids = load_tokenizer("toy"), list[int]()

    def decode(self, ids: list[int]) -> str:
        """Text of tokens."""
        return str(self.tokenizer.decode(ids))

    def batch(self, numbers: list[int]) -> Batch:
        """Return the batch of that number."""
        generator = torch.Generator().manual_seed(numbers[0])
        ids = torch.randint(4, 190, (self.rows, self.width), generator=generator)
        real, lengths = torch.ones_like(ids, dtype=torch.bool), [self.width] * self.rows
        if self.width > PROMPT_TOKENS:
            loss_mask = real & (torch.arange(self.width) >= PROMPT_TOKENS)
            return TextBatch(
                tokens=ids,
                token_mask=real,
                target_mask=loss_mask,
                lengths=lengths,
                is_new=[True] * self.rows,
            )
        return Experience(
            columns={"prompt": [self.decode(row) for row in ids.tolist()]},
            prompts=ids,
            prompt_mask=real,
            prompt_lengths=lengths,
            is_new=[True] * self.rows,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Two batches: the first one makes the optimizer's state."""
        return DataLoader(range(2), batch_size=1, collate_fn=self.batch)


class Case(NamedTuple):
    """What is measured.

    Args:
        algorithm: And its layout.
        method: AdamW, GaLore or SLTrain.
        build: Makes the algorithm.
        reward: Makes the judge, if there is one.
        prompts: Per batch.
        expected: By formula.
    """

    algorithm: str
    method: str
    build: Callable[[], Algorithm]
    reward: Callable[[], RewardFunction] | None
    prompts: int
    expected: Static


def algorithms(size: Size, base: str, method: str) -> Iterator[Case]:
    """Every algorithm with models of its own, by one method.

    Args:
        size: Of all models.
        base: Folder of a two-headed one.
        method: AdamW, GaLore or SLTrain.
    """
    half, sltrain = {"dtype": "bfloat16"}, SLTrain(RANK, alpha=4, density=DENSITY)
    own = {"config": size.config, "sltrain": sltrain} if method == "SLTrain" else {"path": base}
    policy, critic = partial(Policy, **own), partial(ScalarHead, **own)
    optimizer = partial(GaLore, rank=RANK) if method == "GaLore" else AdamW
    common = {"policy": policy, "optimizer": partial(optimizer, lr=1e-3)}
    online = {**common, "reference": partial(Policy, **own, **half)}
    reward, reward_weights = partial(ModelReward, base, **half), sum(size.dense) + size.hidden
    group, rows = {**online, "num_samples": SAMPLES}, PROMPTS * SAMPLES
    acting = {**online, "critic": critic}
    trunk = size.slim if method == "SLTrain" else size.dense
    sign = {"AdamW": "16 N", "GaLore": "8 N + S", "SLTrain": "16 N'"}[method]
    small = "N'" if method == "SLTrain" else "N"
    ranked = RANK if method == "GaLore" else None

    def expected(networks: int, frozen: int, words: str) -> Static:
        trained = [*trunk, *([*trunk, size.hidden] if networks == 2 else [])]
        return Static(
            trained,
            frozen,
            networks * state(size, trunk, ranked) + (networks - 1) * head_state(size, ranked),
            words,
        )

    one, two = expected(1, sum(trunk) + reward_weights, f"{sign} + 2 {small} + 2 N"), f"2 ({sign})"
    yield Case("SFT", method, partial(SFT, **common), None, rows, expected(1, 0, sign))
    both = expected(2, sum(trunk) + reward_weights, f"{two} + 2 {small} + 2 N")
    yield Case("PPO", method, partial(PPO, **acting), reward, rows, both)
    for kind in (ReMax, GRPO, GRPOVI, SPR):
        build = partial(kind, **group)
        yield Case(kind.__name__, method, build, reward, PROMPTS, one)
    rto = partial(RTO, **acting, dpo=partial(Policy, base, **half))
    more = sum(trunk) + reward_weights + sum(size.dense)
    words = f"{two} + 2 {small} + 4 N"
    yield Case("RTO", method, rto, reward, rows, expected(2, more, words))


def layouts(size: Size, base: str) -> Iterator[Case]:
    """Yield the layouts of arXiv:2309.00754 that have adapters."""
    half = {"dtype": "bfloat16", "lora": LoRA(ADAPTER, lora_alpha=8)}
    n, head, one = sum(size.dense), size.hidden, size.adapter

    def static(adapters: int, frozen: int, words: str) -> Static:
        trained = [*one * adapters, head]
        return Static(trained, frozen, sum(8 * number + 4 for number in trained), words)

    optimizer = partial(AdamW, lr=1e-3)
    models = {"policy": partial(Policy, base, **half), "critic": partial(ScalarHead, base, **half)}
    alone = {"reference": partial(Policy, base, dtype="bfloat16")}
    reward, rows = partial(ModelReward, base, dtype="bfloat16"), PROMPTS * SAMPLES
    ppo = partial(PPO, **models, optimizer=optimizer)
    lora = static(2, 4 * n + 2 * head, "8 N + 32 L")
    yield Case("LoRA-PPO", "AdamW", partial(ppo, **alone), reward, rows, lora)
    dynamic = static(2, 2 * n + head, "4 N + 32 L")
    yield Case("DL-PPO", "AdamW", ppo, SharedBackboneReward, rows, dynamic)
    for name, kind, adapters in (("J-Hydra-PPO", JointHydra, 1), ("Hydra-PPO", Hydra, 2)):
        build = partial(HydraPPO, partial(kind, base, **half), optimizer=optimizer)
        expected = static(adapters, n + head, f"2 N + {16 * adapters} L")
        yield Case(name, "AdamW", build, SharedBackboneReward, rows, expected)


def measured(case: Case, folder: str, response_tokens: int) -> Row:
    """One run.

    Args:
        case: What is run.
        folder: For what it writes.
        response_tokens: Tokens of a response.
    """
    torch.manual_seed(0)
    algorithm, memory = case.build(), Memory()
    reward = case.reward() if case.reward else None
    rollout_callbacks = [Rollout(max_new_tokens=response_tokens), Reward(reward)] if reward else []
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[memory, *rollout_callbacks],
    )
    online = isinstance(algorithm, OnlineAlgorithm)
    trainer.fit(algorithm, RandomTexts(case.prompts, 0 if online else response_tokens))
    networks = dict(algorithm.named_children())
    frozen = [each for name, each in networks.items() if name not in algorithm.roles]
    others = [role.network for role in reward.all_roles()] if reward else []
    frozen += [each for each in others if each not in networks.values()]
    offloaded_bytes = storage_bytes(
        (weight for each in frozen for weight in each.parameters()), torch.device("cpu")
    )
    return Row(case.algorithm, case.method, memory.peaks, offloaded_bytes, case.expected)
