"""A failure on one rank ends all ranks with the same message."""

import pytest
import torch
from tiny_models import Count, RandomPrompts, distance, tiny, trainer, weights
from torch import distributed

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.remax import ReMax
from lit_align.callbacks.reward import Reward
from lit_align.models.parallel.fsdp2 import FSDP2
from lit_align.rewards.base import RewardError


class FailsOn(Count):
    """Reward that sums token ids, and raises on one rank."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def __call__(self, batch):
        if distributed.get_rank() == self.rank:
            raise KeyError("no such word")
        return (batch.responses * batch.response_mask).sum(-1).float()


def failure_message(folder, strategy, rank):
    """Return the message of the error on this rank."""
    run = trainer(folder, devices=2, strategy=strategy)
    run.callbacks[1] = Reward(FailsOn(rank))
    with pytest.raises(RewardError) as error:
        run.fit(ReMax(policy=tiny), RandomPrompts(2, 2))
    return str(error.value)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_reward_that_fails_on_one_rank_ends_both(two_ranks, tmp_path, strategy, rank):
    messages = two_ranks(failure_message, tmp_path, strategy, rank)
    assert "raised KeyError: 'no such word'" in messages[rank]
    assert messages[1 - rank] == f"on rank {rank}: {messages[rank]}"


def fit_with_skipped_prompts(folder):
    """Return weights and skipped prompts of a run in which one rank skips all its prompts."""
    algorithm = ReMax(policy=tiny, microbatch_tokens=40)
    run = trainer(folder, devices=2, strategy="fsdp2")
    run.callbacks[1] = Reward(FailsOn(1), skip_failed_prompts=True)
    run.fit(algorithm, RandomPrompts(2, 2))
    return weights(algorithm.policy), float(run.callback_metrics["rewards/skipped_prompts"])


def test_a_rank_without_scored_responses_takes_part(two_ranks, tmp_path):
    (one, skipped), (other, same) = two_ranks(fit_with_skipped_prompts, tmp_path)
    assert skipped == same == 2  # both prompts of the second rank
    assert all(bool(mine.isfinite().all()) for mine in one)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert distance(one, weights(tiny())) > 1e-6


class UnevenPrompts(RandomPrompts):
    """Prompts whose responses end at once on the second rank, where most tokens are stops."""

    @property
    def stop_ids(self):
        rank = self.trainer.global_rank if self.trainer else 0
        return [*range(3, 32)] if rank else [2]

    @stop_ids.setter
    def stop_ids(self, ids):
        pass


def fit_uneven(folder, gather):
    """Return the response lengths and the metrics of this rank."""
    algorithm = GRPO(policy=tiny, num_samples=2, microbatch_tokens=8)
    run = trainer(folder, devices=2, strategy=FSDP2(gather_for_generation=gather))
    lengths = []
    prepare = algorithm.prepare
    algorithm.prepare = lambda batch: lengths.extend(batch.response_lengths) or prepare(batch)
    run.fit(algorithm, UnevenPrompts(2, 2))
    return lengths, {k: float(v) for k, v in run.callback_metrics.items()}


@pytest.mark.parametrize("gather", [True, False])
def test_ranks_can_have_different_response_lengths(two_ranks, tmp_path, gather):
    (long, metrics), (short, same) = two_ranks(fit_uneven, tmp_path, gather)
    assert max(short) < 6 == max(long)
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    assert {k: v for k, v in metrics.items() if "rewards/" not in k} == pytest.approx(
        {k: v for k, v in same.items() if "rewards/" not in k}
    )
