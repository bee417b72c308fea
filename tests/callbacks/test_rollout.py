"""Rollout: rows, masks and texts, and samples that do not depend on the ranks."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from tiny_models import tiny

from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.sft import SFT
from lit_align.batches import Experience
from lit_align.callbacks.rollout import Rollout
from lit_align.models.generation.decode import SamplingParams

STOPS = [2, *range(8, 14)]  # with random weights, some responses stop and some do not


def fake_trainer(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """Return a trainer with the attributes that Rollout reads: rank, data and precision."""
    data = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0),
        stop_ids=STOPS,
        decode=lambda ids: " ".join(map(str, ids)),
    )
    return SimpleNamespace(
        global_rank=rank, world_size=world, datamodule=data, precision_plugin=Precision()
    )


def sampler(num_samples: int = 2, iteration: int = 0) -> ReMax:
    """Return ReMax with a policy and without a Trainer."""
    algorithm = ReMax(policy=tiny, num_samples=num_samples)
    algorithm.policy, algorithm.iteration = tiny(), iteration
    return algorithm


def copied(prompts: Experience) -> Experience:
    return prompts.rows(range(len(prompts)))


def train(prompts: Experience, rank=0, world=1, iteration=0, **settings) -> Experience:
    """Return the rollout of one rank: two samples and one greedy response per prompt."""
    torch.manual_seed(0)
    batch, rollout = copied(prompts), Rollout(**{"max_new_tokens": 6, **settings})
    algorithm = sampler(iteration=iteration)
    rollout.on_train_batch_start(fake_trainer(rank, world), algorithm, batch, 0)
    return batch


def test_samples_of_prompt_are_adjacent_and_greedy_rows_last(prompts):
    batch = train(prompts)
    assert batch.group == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3]
    assert batch.is_greedy == [False] * 8 + [True] * 4
    assert batch.columns["prompt"] == ["abcd"[row] for row in batch.group]
    assert batch.prompt_lengths == [[3, 5, 1, 4][row] for row in batch.group]
    assert torch.equal(batch.prompts, prompts.prompts[batch.group])
    assert batch.responses.shape == batch.sampling_logprobs.shape == (12, 6)


def test_masks_lengths_and_texts_match_tokens(prompts):
    batch = train(prompts)
    assert set(batch.truncated) == {True, False}
    for row, tokens in enumerate(batch.responses.tolist()):
        ends = [index for index, token in enumerate(tokens) if token in STOPS]
        length = ends[0] + 1 if ends else 6
        assert batch.response_lengths[row] == length
        assert batch.truncated[row] == (not ends)
        assert batch.response_mask[row].tolist() == [index < length for index in range(6)]
        text_tokens = tokens[: length - 1] if ends else tokens
        assert batch.columns["completion"][row] == " ".join(map(str, text_tokens))


def test_masks_and_texts_by_hand():
    talk = [{"role": "user", "content": "and you?"}]
    batch = Experience(
        columns={"prompt": ["a", "b", talk]},
        responses=torch.tensor([[5, 6, 2, 0], [2, 9, 9, 9], [5, 5, 5, 5]]),
    )
    Rollout().add_masks_and_texts(fake_trainer(), batch, [2])
    assert batch.response_lengths == [3, 1, 4]
    assert batch.truncated == [False, False, True]
    assert batch.response_mask.sum(-1).tolist() == [3, 1, 4]
    message = [{"role": "assistant", "content": "5 5 5 5"}]
    assert batch.columns["completion"] == ["5 6", "", message]


def test_stop_ids_are_those_of_policy_and_tokenizer():
    assert Rollout().stop_ids(fake_trainer(), sampler()) == STOPS
    assert sampler().policy.stop_ids == [2]


def test_noise_of_two_ranks_equals_one_rank():
    rollout = Rollout(max_new_tokens=3)
    one = rollout.uniform_noise(fake_trainer(), 4, 2, "train 0").view(4, 2, 3)
    ranks = [
        rollout.uniform_noise(fake_trainer(r, 2), 2, 2, "train 0").view(2, 2, 3) for r in (0, 1)
    ]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), one)
    assert one.unique().numel() == one.numel()


def test_responses_of_two_ranks_equal_one_rank(prompts):
    one_rank = train(prompts)
    for rank in (0, 1):
        part = train(prompts.rows([rank, rank + 2]), rank, world=2)
        rows = [row for row, group in enumerate(one_rank.group) if group % 2 == rank]
        assert torch.equal(part.responses, one_rank.responses[rows])


def test_samples_depend_on_iteration_and_repeat(prompts):
    first, again, second = train(prompts), train(prompts), train(prompts, iteration=1)
    assert torch.equal(first.responses, again.responses)
    assert not torch.equal(first.responses[:8], second.responses[:8])
    assert torch.equal(first.responses[8:], second.responses[8:])  # greedy rows need no noise


def test_noise_depends_on_seed():
    def noise(seed):
        torch.manual_seed(seed)
        return Rollout(max_new_tokens=2).uniform_noise(fake_trainer(), 2, 1, "train 0")

    assert not torch.equal(noise(0), noise(1))


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_test_batch_start"])
def test_evaluation_decodes_once_greedily(prompts, hook):
    batch = copied(prompts)
    getattr(Rollout(max_new_tokens=6), hook)(fake_trainer(), sampler(), batch, 0)
    assert batch.group == [0, 1, 2, 3]
    assert batch.is_greedy == [True] * 4
    assert torch.equal(batch.responses, train(prompts).responses[8:])


def test_predict_samples_or_decodes_greedily(prompts):
    responses = []
    for greedily in (False, True):
        batch, rollout = copied(prompts), Rollout(max_new_tokens=6, predict_greedy=greedily)
        torch.manual_seed(0)
        rollout.on_predict_batch_start(fake_trainer(), sampler(), batch, 0)
        assert batch.group == [0, 1, 2, 3]
        assert batch.is_greedy == [greedily] * 4
        responses.append(batch.responses)
    greedy = train(prompts).responses[8:]
    assert not torch.equal(responses[0], greedy)
    assert torch.equal(responses[1], greedy)


def test_predict_samples_several_responses_per_prompt(prompts):
    batch = copied(prompts)
    rollout = Rollout(max_new_tokens=6, predict_samples=2)
    rollout.on_predict_batch_start(fake_trainer(), sampler(), batch, 0)
    assert batch.group == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.is_greedy == [False] * 8


@pytest.mark.parametrize(("samples", "greedily"), [(0, False), (2, True)])
def test_invalid_predict_samples_are_refused(samples, greedily):
    with pytest.raises(ValueError, match="predict_samples must be at least 1, and 1 with"):
        Rollout(predict_samples=samples, predict_greedy=greedily)


def test_top_k_of_one_is_greedy(prompts):
    batch = train(prompts, top_k=1)
    assert batch.responses[:8].tolist() == batch.responses[[8, 8, 9, 9, 10, 10, 11, 11]].tolist()
    assert Rollout(top_p=0.9, top_k=3).sampling == SamplingParams(top_k=3, top_p=0.9)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"top_p": 0.0}, {"top_k": -1}])
def test_invalid_rollout_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="Rollout needs max_new_tokens >= 1, 0 < top_p <= 1 and"):
        Rollout(**wrong)


def test_offline_algorithms_are_refused():
    with pytest.raises(ValueError, match=r"SFT does not generate responses\. Remove `rollout`"):
        Rollout().setup(fake_trainer(), SFT(policy=tiny), "fit")
