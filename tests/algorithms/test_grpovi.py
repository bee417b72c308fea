"""GRPOVI: scores of increased variance on worked examples, bounds and weights."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import RandomPrompts, tiny, trainer

from lit_align.algorithms import grpovi
from lit_align.algorithms.grpovi import GRPOVI
from lit_align.batches import Experience
from lit_align.errors import UserError


def group(probs, scores, lengths=None) -> Experience:
    """Return the responses to one prompt, with these probabilities under the reference."""
    lengths = lengths or [1] * len(probs)
    width = max(lengths)
    share = torch.tensor(probs, dtype=torch.float64).log() / torch.tensor(lengths)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return Experience(
        ref_logprobs=share.unsqueeze(1).expand(-1, width),
        logprobs=torch.zeros(len(probs), width, dtype=torch.float64),
        response_mask=mask,
        scores=torch.tensor(scores, dtype=torch.float64),
    )


def shaped(algorithm, batch) -> list[float]:
    """Return the scores of increased variance of a single group."""
    return algorithm.shape_scores(batch.scores.view(1, -1), batch)[0].tolist()


def test_equal_probabilities_move_scores_to_the_bounds():
    batch = group([0.25] * 4, [0.9, 0.6, 0.4, 0.1])
    assert shaped(GRPOVI(policy=tiny), batch) == pytest.approx([1, 1, 0, 0])


def test_one_score_between_the_bounds_keeps_the_weighted_mean():
    batch = group([0.1, 0.5, 0.15, 0.25], [0.2, 0.4, 0.9, 0.1])
    assert shaped(GRPOVI(policy=tiny), batch) == pytest.approx([0, 0.46, 1, 0])


def test_equal_scores_stay_equal_unless_ties_are_split():
    batch = group([0.25] * 4, [0.5] * 4)
    assert shaped(GRPOVI(policy=tiny), batch) == pytest.approx([0.5] * 4)
    assert shaped(GRPOVI(policy=tiny, split_ties=True), batch) == pytest.approx([1, 1, 0, 0])


def test_scores_move_to_other_bounds():
    batch = group([0.25] * 4, [8.0, 2.0, -2.0, -8.0])
    assert shaped(GRPOVI(policy=tiny, min_score=-10, max_score=10), batch) == pytest.approx(
        [10, 10, -10, -10]
    )


def test_response_weights_are_log_probs_of_responses():
    batch = group([0.8, 0.2], [1.0, 0.0], lengths=[1, 2])
    batch.logprobs = torch.tensor([[-1.0, 0.0], [-2.0, -3.0]])
    nats = [math.log(0.8), math.log(0.2)]
    assert grpovi.reference_likelihood(batch).tolist() == pytest.approx(nats)
    mean = [nats[0], nats[1] / 2]
    assert grpovi.mean_reference_likelihood(batch).tolist() == pytest.approx(mean)
    assert grpovi.policy_likelihood(batch).tolist() == [-1.0, -5.0]
    assert grpovi.equal_weights(batch).tolist() == [0.0, 0.0]


class SingleRankGRPOVI(GRPOVI):
    """GRPOVI on one rank without a Trainer."""

    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda value, reduce_op: value))


def test_running_bounds_are_the_extremes_so_far():
    algorithm = SingleRankGRPOVI(policy=tiny, running_bounds=True)
    first = shaped(algorithm, group([0.25] * 4, [3.0, 2.0, 1.0, 0.0]))
    assert first == pytest.approx([3, 3, 0, 0])
    second = shaped(algorithm, group([0.25] * 4, [2.0, 2.0, 1.0, 1.0]))
    assert algorithm.range.bounds.tolist() == [0.0, 3.0]
    assert second == pytest.approx([3, 3, 0, 0])
    at_start = SingleRankGRPOVI(policy=tiny, running_bounds=True)
    assert shaped(at_start, group([0.5, 0.5], [2.0, 2.0])) == [2, 2]


@pytest.mark.parametrize("running", [True, False])
def test_only_running_bounds_are_saved(tmp_path, running):
    algorithm = GRPOVI(policy=tiny, num_samples=2, running_bounds=running)
    run = trainer(tmp_path)
    run.fit(algorithm, RandomPrompts(2))
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert ("range.bounds" in state) == running
    if running:
        again = GRPOVI(policy=tiny, num_samples=2, running_bounds=True)
        trainer(tmp_path, max_epochs=2).fit(again, RandomPrompts(1), ckpt_path=tmp_path / "x.ckpt")
        assert again.range.bounds[1] >= algorithm.range.bounds[1]


def test_the_logged_reward_is_the_raw_score(run):
    logged = run(GRPOVI(policy=tiny, num_samples=2, max_score=100.0)).callback_metrics
    assert logged["reward"] == logged["rewards/count/mean"]


@pytest.mark.parametrize(("min_score", "max_score"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_a_min_score_that_is_not_below_max_score_is_refused(min_score, max_score):
    message = f"min_score must be below max_score, found {min_score} and {max_score}. Set"
    with pytest.raises(UserError, match=message):
        GRPOVI(policy=tiny, min_score=min_score, max_score=max_score)


def test_scores_that_differ_in_the_last_digits_are_not_ties():
    """In float32, 1e-8 - (-1) is 1. The order of the scores must stay."""
    batch = group([0.25] * 4, [3e-8, 2e-8, 1e-8, 0.0])
    batch.scores = batch.scores.float()
    raised = shaped(GRPOVI(policy=tiny, min_score=-1.0, max_score=1.0), batch)
    assert raised == pytest.approx([1, 1, -1, -1], abs=1e-6)
    assert raised == sorted(raised, reverse=True)


def test_scores_at_float32_bounds_stay_bitwise_equal():
    batch = group([0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.7])
    batch.scores = batch.scores.float()
    algorithm = GRPOVI(policy=tiny, min_score=0.1, max_score=0.7)
    assert torch.equal(algorithm.shape_scores(batch.scores.view(1, -1), batch)[0], batch.scores)
