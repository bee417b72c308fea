"""What goes wrong on one rank ends all of them, with its message."""

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
    """Adds up the token ids, and breaks on one rank."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def __call__(self, batch):
        if distributed.get_rank() == self.rank:
            raise KeyError("no such word")
        return (batch.responses * batch.response_mask).sum(-1).float()


def failing(folder, strategy, rank):
    """The message with which a rank ends."""
    run = trainer(folder, devices=2, strategy=strategy)
    run.callbacks[1] = Reward(FailsOn(rank))
    with pytest.raises(RewardError) as error:
        run.fit(ReMax(policy=tiny), RandomPrompts(2, 2))
    return str(error.value)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_reward_that_fails_on_one_rank_ends_both(two_ranks, tmp_path, strategy, rank):
    said = two_ranks(failing, tmp_path, strategy, rank)
    assert "raised KeyError: 'no such word'" in said[rank]
    assert said[1 - rank] == f"on rank {rank}: {said[rank]}"


def skipping(folder):
    """Weights and metrics of a run in which one rank has no answer left to learn from."""
    algorithm = ReMax(policy=tiny, microbatch_tokens=40)
    run = trainer(folder, devices=2, strategy="fsdp2")
    run.callbacks[1] = Reward(FailsOn(1), skip_failed_prompts=True)
    run.fit(algorithm, RandomPrompts(2, 2))
    return weights(algorithm.policy), float(run.callback_metrics["rewards/skipped_prompts"])


def test_a_rank_without_answers_still_takes_part(two_ranks, tmp_path):
    (one, skipped), (other, same) = two_ranks(skipping, tmp_path)
    assert skipped == same == 2  # both prompts of the second rank
    assert all(bool(mine.isfinite().all()) for mine in one)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert distance(one, weights(tiny())) > 1e-6


class UnevenPrompts(RandomPrompts):
    """Answers end at once on the second rank: every token but one is a stop there."""

    @property
    def stop_ids(self):
        rank = self.trainer.global_rank if self.trainer else 0
        return [*range(3, 32)] if rank else [2]

    @stop_ids.setter
    def stop_ids(self, ids):
        pass


def uneven(folder, gather):
    """Lengths of the answers, and the passes that the update took, by rank."""
    algorithm = GRPO(policy=tiny, num_samples=2, microbatch_tokens=8)
    run = trainer(folder, devices=2, strategy=FSDP2(gather_for_generation=gather))
    lengths = []
    prepare = algorithm.prepare
    algorithm.prepare = lambda batch: lengths.extend(batch.response_lengths) or prepare(batch)
    run.fit(algorithm, UnevenPrompts(2, 2))
    return lengths, {k: float(v) for k, v in run.callback_metrics.items()}


@pytest.mark.parametrize("gather", [True, False])
def test_ranks_may_answer_at_different_lengths(two_ranks, tmp_path, gather):
    (long, metrics), (short, same) = two_ranks(uneven, tmp_path, gather)
    assert max(short) < 6 == max(long)
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    assert {k: v for k, v in metrics.items() if "rewards/" not in k} == pytest.approx(
        {k: v for k, v in same.items() if "rewards/" not in k}
    )
