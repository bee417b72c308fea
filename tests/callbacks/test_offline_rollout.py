"""Stored answers: rows beside sampled ones, drawn for their place in the batch of all ranks."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from tiny_models import RandomAnswers, tiny

from lit_align.algorithms.remax import ReMax
from lit_align.batches import Experience, OfflineResponse
from lit_align.callbacks.response_log import response_rows
from lit_align.callbacks.rollout import Rollout, draw_offline, truncate_as_sampled


class Asking(ReMax):
    """ReMax that asks for stored answers, too."""

    num_offline_samples = 2


def prompts(rows: list[int] | None = None) -> Experience:
    """Four prompts of five tokens with 1, 2, 3 and 1 answers."""
    batch = RandomAnswers().batch(0)
    return batch.rows(range(4) if rows is None else rows)


def rollout(batch: Experience, rank=0, world=1, iteration=0, kind=Asking) -> Experience:
    torch.manual_seed(0)
    data = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0),
        stop_ids=[2],
        decode=lambda ids: " ".join(map(str, ids)),
    )
    trainer = SimpleNamespace(
        global_rank=rank, world_size=world, datamodule=data, precision_plugin=Precision()
    )
    algorithm = kind(policy=tiny, num_samples=2)
    algorithm.policy, algorithm.iteration = tiny(), iteration
    Rollout(max_new_tokens=6).on_train_batch_start(trainer, algorithm, batch, 0)
    return batch


def test_stored_rows_stand_behind_all_others():
    batch = rollout(prompts())
    assert batch.group == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.is_greedy == [False] * 8 + [True] * 4 + [False] * 8
    assert batch.is_offline == [False] * 12 + [True] * 8
    assert batch.is_sampled == [True] * 8 + [False] * 12
    assert {len(field) for field in batch.fields().values()} == {20}
    assert batch.responses.shape == batch.sampling_logprobs.shape == (20, 6)
    assert not batch.sampling_logprobs[12:].any()


def test_they_change_nothing_for_the_sampled_ones():
    with_stored, without = rollout(prompts()), rollout(prompts(), kind=ReMax)
    assert torch.equal(with_stored.responses[:12], without.responses)
    assert without.is_offline == [False] * 12
    assert without.offline_scores == without.offline_logprobs == [None] * 12


def test_a_stored_row_is_just_another_row():
    batch = rollout(prompts())
    given = prompts().offline_responses
    for row in range(12, 20):
        length = batch.response_lengths[row]
        tokens = batch.responses[row].tolist()
        answer = OfflineResponse(
            tokens[:length], batch.offline_scores[row], batch.offline_logprobs[row]
        )
        assert answer in given[batch.group[row]]
        assert tokens[length:] == [0] * (6 - length)
        assert batch.response_mask[row].tolist() == [place < length for place in range(6)]
        assert not batch.truncated[row]
        assert batch.columns["completion"][row] == " ".join(map(str, tokens[: length - 1]))
        assert torch.equal(batch.prompts[row], prompts().prompts[batch.group[row]])


def test_a_table_tells_stored_answers_from_samples():
    rows = response_rows(rollout(prompts()))
    assert [row["stored"] for row in rows] == [False] * 12 + [True] * 8
    assert "stored" not in response_rows(rollout(prompts(), kind=ReMax))[0]


def test_each_answer_comes_once_while_there_are_enough():
    answers = [OfflineResponse([number, 2], None, None) for number in range(10, 13)]
    batch = prompts([0])
    batch.offline_responses = [answers]
    for number in range(1, 8):
        taken = [answer.tokens[0] for answer in draw_offline(batch, number, "train 0", 0, 1)]
        times = [taken.count(token) for token in (10, 11, 12)]
        assert sum(times) == number
        assert max(times) - min(times) <= 1


def test_each_iteration_draws_anew_and_a_resumed_one_the_same():
    answers = [OfflineResponse([number, 2], None, None) for number in range(3, 32)]
    batch = prompts()
    batch.offline_responses = [answers] * 4
    torch.manual_seed(0)
    first, again, second = (draw_offline(batch, 2, f"train {i}", 0, 1) for i in (0, 0, 1))
    assert first == again
    assert first != second
    assert len({tuple(answer.tokens) for answer in first}) > 4  # prompts draw apart
    torch.manual_seed(1)
    assert draw_offline(batch, 2, "train 0", 0, 1) != first


def test_two_ranks_draw_what_one_draws():
    whole = rollout(prompts())
    for rank in (0, 1):
        part = rollout(prompts([rank, rank + 2]), rank, world=2)
        rows = [row for row, group in enumerate(whole.group) if group % 2 == rank]
        assert torch.equal(part.responses, whole.responses[rows])
        assert part.offline_scores == [whole.offline_scores[row] for row in rows]


def test_an_answer_ends_where_a_policy_would_have_ended():
    answer = OfflineResponse([5, 6, 7, 2], 1.0, -3.0)
    assert truncate_as_sampled(answer, 4, [2]) == answer
    assert truncate_as_sampled(answer, 3, [2]) == OfflineResponse(
        [5, 6, 7], None, None
    )  # cut, without a stop
    assert truncate_as_sampled(answer, 9, [2, 6]) == OfflineResponse([5, 6], None, None)


def test_a_cut_answer_is_marked_as_cut():
    batch = prompts([0])
    batch.offline_responses = [[OfflineResponse([5] * 9 + [2], 1.0, -3.0)]]
    batch = rollout(batch)
    assert batch.truncated[-1]
    assert batch.response_lengths[-1] == 6
    assert batch.offline_scores[-1] is None


def test_data_without_answers_are_refused():
    batch = prompts()
    del batch.offline_responses
    with pytest.raises(ValueError, match="give `data` the class OfflineResponseData"):
        rollout(batch)
