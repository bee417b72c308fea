"""Responses that are empty, truncated or all padding, and equal scores: no metric is NaN."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import RandomPrompts, adapted, scalar, tiny, trained, trainer
from torch.optim import SGD

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.grpovi import GRPOVI
from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.rloo import RLOO
from lit_align.algorithms.rto import RTO
from lit_align.algorithms.spr import SPR
from lit_align.callbacks.reward import Reward
from lit_align.models.hydra import Hydra, JointHydra
from lit_align.models.policy import Policy
from lit_align.rewards.rules import Length

ALGORITHMS = {
    "ReMax": partial(ReMax, num_samples=2, kl_to_go=True, advantage_clip=5.0),
    "ReMax, per token": partial(ReMax, loss_aggregation="token_mean", gamma=0.99),
    "GRPO": partial(GRPO, num_samples=2),
    "GRPO, per token, two epochs": partial(
        GRPO, num_samples=2, loss_aggregation="token_mean", update_epochs=2
    ),
    "GRPOVI": partial(GRPOVI, num_samples=2, min_score=-1.0, max_score=0.0),
    "GRPOVI, running bounds": partial(
        GRPOVI, num_samples=2, running_bounds=True, advantage_scale="none"
    ),
    "RLOO": partial(RLOO, num_samples=2, update_epochs=2),
    "PPO": partial(PPO, critic=scalar, normalize_scores=True, kl_target=1.0),
    "PPO, KL in the loss": partial(
        PPO, critic=scalar, kl_in_loss=True, loss_aggregation="sequence_mean"
    ),
    "HydraPPO": partial(HydraPPO, policy=partial(adapted, Hydra)),
    "HydraPPO, joint": partial(
        HydraPPO, policy=partial(adapted, JointHydra), whiten_advantages=True
    ),
    "RTO": partial(RTO, critic=scalar, dpo=partial(adapted, Policy), dpo_clip=0.05),
    "SPR": partial(SPR, num_samples=2),
}


class EmptyResponses(Callback):
    """Empties some responses, as in a rollout that is all padding."""

    def __init__(self, rows: slice):
        self.rows = rows

    def on_train_batch_start(self, trainer, algorithm, batch, batch_idx):
        batch.response_mask[self.rows] = False
        batch.responses[self.rows] = 0
        for row in range(len(batch))[self.rows]:
            batch.response_lengths[row] = 0


def fit(folder, algorithm: OnlineAlgorithm, rows: slice, **settings) -> dict[str, float]:
    """Return the metrics of two rollouts of 4 prompts in which `rows` are empty."""
    torch.manual_seed(0)
    run = trainer(folder, limit_val_batches=0, callbacks=[EmptyResponses(rows)], **settings)
    run.callbacks[1] = Reward(Length(target=3))
    run.fit(algorithm, RandomPrompts(2))
    return {name: float(value) for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 2), slice(None)], ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_empty_responses_give_no_nan_and_no_gradient(tmp_path, name, rows):
    """One response, both responses to a prompt, or all responses are empty."""
    build = partial(ALGORITHMS[name], optimizer=lambda params: SGD(params, lr=0.1))
    algorithm = build(**{"policy": tiny, **ALGORITHMS[name].keywords})
    metrics = fit(tmp_path, algorithm, rows)
    assert all(map(math.isfinite, metrics.values())), metrics
    start = build(**{"policy": tiny, **ALGORITHMS[name].keywords})
    start.configure_model()
    pairs = list(zip(trained(start), trained(algorithm), strict=True))
    assert all(after.isfinite().all() for _, after in pairs)
    assert all(map(torch.equal, *zip(*pairs, strict=True))) == (rows == slice(None))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_truncated_responses_of_one_token_give_no_nan(tmp_path, name):
    """All scores are equal, so there is no variance to whiten with."""
    build = partial(ALGORITHMS[name], optimizer=lambda params: SGD(params, lr=0.1))
    algorithm = build(**{"policy": tiny, **ALGORITHMS[name].keywords})
    metrics = fit(tmp_path, algorithm, slice(0, 0), max_new_tokens=1)
    assert all(map(math.isfinite, metrics.values())), metrics
    assert metrics["reward_std"] == pytest.approx(0, abs=1e-6)
    if "frac_reward_zero_std" in metrics:
        assert metrics["frac_reward_zero_std"] == 1
    assert all(weight.isfinite().all() for weight in trained(algorithm))
