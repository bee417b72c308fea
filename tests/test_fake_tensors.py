"""No code after the rollout reads a tensor's value: a step runs on fake tensors."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import RandomPrompts, tiny
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import AdamW

from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.spr import SPR
from lit_align.batches import Experience
from lit_align.models.policy import Policy


def rollout() -> Experience:
    """Return two prompts with a sampled and a greedy response each, after Rollout and Reward."""
    batch = RandomPrompts(batch_size=2).batch(0).rows([0, 1, 0, 1])
    batch.group, batch.is_greedy = [0, 1, 0, 1], [False, False, True, True]
    batch.is_offline = [False] * 4
    batch.responses = torch.randint(3, 32, (4, 6))
    batch.response_lengths, batch.truncated = [3, 6, 2, 4], [False, True, False, False]
    lengths = torch.tensor(batch.response_lengths).unsqueeze(1)
    batch.response_mask = torch.arange(6) < lengths
    batch.sampling_logprobs = torch.zeros(4, 6)
    batch.scores = torch.tensor([1.0, 0.0, 0.5, 2.0])
    return batch


def rollout_with_offline_responses() -> Experience:
    """Return the same batch, with offline responses in place of the greedy ones."""
    batch = rollout()
    batch.is_greedy, batch.is_offline = batch.is_offline, batch.is_greedy
    batch.offline_scores, batch.offline_logprobs = [None, None, 0.5, None], [None, None, None, -9.0]
    return batch


class Bare:
    """Algorithm with an optimizer and without a Trainer."""

    trainer = SimpleNamespace(
        world_size=1, strategy=SimpleNamespace(reduce=lambda value, reduce_op: value, model=None)
    )
    log = log_dict = lambda self, *args, **kwargs: None

    def manual_backward(self, loss):
        loss.backward()

    def step(self):
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.adam.step()
        return {"grad_norm": norm}

    def end_iteration(self, metrics):
        self.iteration += 1


class BareReMax(Bare, ReMax):
    """ReMax without a Trainer."""


class BareSPR(Bare, SPR):
    """SPR without a Trainer."""


def fake(policy: Policy, mode: FakeTensorMode) -> Policy:
    """Replace a policy's weights by fake ones after loading, which reads their values."""
    for module in policy.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(mode.from_tensor(weight.detach())))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, mode.from_tensor(buffer))
    return policy


@pytest.mark.parametrize(
    ("kind", "settings", "make"),
    [
        (BareReMax, {}, rollout),
        (BareReMax, {"kl_to_go": True, "gamma": 0.99, "loss_aggregation": "token_mean"}, rollout),
        (
            BareSPR,
            {"num_samples": 1, "num_offline_samples": 1, "update_epochs": 2},
            rollout_with_offline_responses,
        ),
    ],
)
def test_one_step_runs_on_fake_tensors(kind, settings, make):
    policy, reference, batch, mode = tiny(), tiny(), make(), FakeTensorMode()
    algorithm = kind(policy=tiny, microbatch_tokens=16, **settings)
    algorithm.policy = fake(policy, mode)
    algorithm.reference_model.network = fake(reference, mode)
    algorithm.adam = AdamW(policy.parameters(), lr=1e-3)
    with mode:
        algorithm.training_step(batch.map(mode.from_tensor), 0)
    assert algorithm.iteration == 1
    assert all(isinstance(state["exp_avg"], FakeTensor) for state in algorithm.adam.state.values())
    assert len(algorithm.adam.state) == len(list(policy.parameters()))
