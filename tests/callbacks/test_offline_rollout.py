"""Offline responses in a rollout: their rows, and draws that do not depend on the ranks."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from tiny_models import RandomOfflineResponses, tiny

from lit_align.algorithms.remax import ReMax
from lit_align.batches import Experience, OfflineResponse
from lit_align.callbacks.response_log import response_rows
from lit_align.callbacks.rollout import Rollout
from lit_align.data.offline_responses import draw_offline, truncate_as_sampled


class OfflineReMax(ReMax):
    """ReMax with two offline responses per prompt."""

    num_offline_samples = 2


def prompts(rows: list[int] | None = None) -> Experience:
    """Return four prompts of five tokens with 1, 2, 3 and 1 offline responses."""
    batch = RandomOfflineResponses().batch(0)
    return batch.rows(range(4) if rows is None else rows)


def rollout(batch: Experience, rank=0, world=1, iteration=0, kind=OfflineReMax) -> Experience:
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


def test_offline_rows_are_last():
    batch = rollout(prompts())
    assert batch.group == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.is_greedy == [False] * 8 + [True] * 4 + [False] * 8
    assert batch.is_offline == [False] * 12 + [True] * 8
    assert batch.is_sampled == [True] * 8 + [False] * 12
    assert {len(field) for field in batch.fields().values()} == {20}
    assert batch.responses.shape == batch.sampling_logprobs.shape == (20, 6)
    assert not batch.sampling_logprobs[12:].any()


def test_offline_rows_do_not_change_sampled_rows():
    with_offline, without = rollout(prompts()), rollout(prompts(), kind=ReMax)
    assert torch.equal(with_offline.responses[:12], without.responses)
    assert without.is_offline == [False] * 12
    assert without.offline_scores == without.offline_logprobs == [None] * 12


def test_offline_rows_have_fields_of_sampled_rows():
    batch = rollout(prompts())
    given = prompts().offline_responses
    for row in range(12, 20):
        length = batch.response_lengths[row]
        tokens = batch.responses[row].tolist()
        response = OfflineResponse(
            tokens[:length], batch.offline_scores[row], batch.offline_logprobs[row]
        )
        assert response in given[batch.group[row]]
        assert tokens[length:] == [0] * (6 - length)
        assert batch.response_mask[row].tolist() == [index < length for index in range(6)]
        assert not batch.truncated[row]
        assert batch.columns["completion"][row] == " ".join(map(str, tokens[: length - 1]))
        assert torch.equal(batch.prompts[row], prompts().prompts[batch.group[row]])


def test_response_log_marks_offline_responses():
    rows = response_rows(rollout(prompts()))
    assert [row["stored"] for row in rows] == [False] * 12 + [True] * 8
    assert "stored" not in response_rows(rollout(prompts(), kind=ReMax))[0]


def test_responses_repeat_only_if_too_few():
    responses = [OfflineResponse([number, 2], None, None) for number in range(10, 13)]
    batch = prompts([0])
    batch.offline_responses = [responses]
    for number in range(1, 8):
        taken = [response.tokens[0] for response in draw_offline(batch, number, "train 0", 0, 1)]
        times = [taken.count(token) for token in (10, 11, 12)]
        assert sum(times) == number
        assert max(times) - min(times) <= 1


def test_draws_depend_on_iteration_and_seed():
    responses = [OfflineResponse([number, 2], None, None) for number in range(3, 32)]
    batch = prompts()
    batch.offline_responses = [responses] * 4
    torch.manual_seed(0)
    first, again, second = (draw_offline(batch, 2, f"train {i}", 0, 1) for i in (0, 0, 1))
    assert first == again
    assert first != second
    assert len({tuple(response.tokens) for response in first}) > 4  # each prompt has its own draw
    torch.manual_seed(1)
    assert draw_offline(batch, 2, "train 0", 0, 1) != first


def test_two_ranks_draw_as_one_rank():
    one_rank = rollout(prompts())
    for rank in (0, 1):
        part = rollout(prompts([rank, rank + 2]), rank, world=2)
        rows = [row for row, group in enumerate(one_rank.group) if group % 2 == rank]
        assert torch.equal(part.responses, one_rank.responses[rows])
        assert part.offline_scores == [one_rank.offline_scores[row] for row in rows]


def test_offline_response_is_truncated_as_sampled():
    response = OfflineResponse([5, 6, 7, 2], 1.0, -3.0)
    assert truncate_as_sampled(response, 4, [2]) == response
    cut = OfflineResponse([5, 6, 7], None, None)  # without a stop
    assert truncate_as_sampled(response, 3, [2]) == cut
    assert truncate_as_sampled(response, 9, [2, 6]) == OfflineResponse([5, 6], None, None)


def test_cut_offline_response_is_marked_truncated():
    batch = prompts([0])
    batch.offline_responses = [[OfflineResponse([5] * 9 + [2], 1.0, -3.0)]]
    batch = rollout(batch)
    assert batch.truncated[-1]
    assert batch.response_lengths[-1] == 6
    assert batch.offline_scores[-1] is None


def test_data_without_offline_responses_are_refused():
    batch = prompts()
    del batch.offline_responses
    with pytest.raises(ValueError, match="Use --data OfflineResponseData"):
        rollout(batch)
