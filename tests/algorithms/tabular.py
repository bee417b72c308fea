"""Tabular SPR: responses of two tokens from a vocabulary of three, without a Trainer."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lit_align.algorithms.spr import SPR
from lit_align.batches import Experience
from lit_align.models.parallel.offload import ExclusiveOffload

FIRST, SECOND = torch.arange(9) // 3, torch.arange(9) % 3
SCORES = torch.tensor([1, -0.5, 2, 0.3, 0.7, -1.2, 3, 0.8, 0.5], dtype=torch.double)
REFERENCE = torch.tensor(
    [[0, 0.1, -0.3], [0.4, 0, 0.2], [0, -0.5, 0], [0.3, 0.1, 0]], dtype=torch.double
)


class Table(nn.Module):
    """A policy of [4, 3] logits: of the first token, and of the second after each first token."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    @property
    def token_logprobs(self) -> Tensor:
        """Log-probs [9, 2] of both tokens of every response, in nats."""
        rows = self.logits.log_softmax(-1)
        return torch.stack([rows[0, FIRST], rows[FIRST + 1, SECOND]], -1)

    @property
    def response_logprobs(self) -> Tensor:
        """Log-probs [9] of every response, in nats."""
        return self.token_logprobs.sum(-1)

    def set_probabilities(self, probs: Tensor) -> None:
        """Set the probabilities [9] of the responses: the exact solution of SFT."""
        joint = probs.view(3, 3)
        self.logits.data = torch.cat([joint.sum(1, keepdim=True).T, joint]).log()

    def logprobs(self, batch: Experience) -> Tensor:
        return self.token_logprobs[batch.responses @ torch.tensor([3, 1])]

    def logprobs_and_entropy(self, batch: Experience) -> tuple[Tensor, Tensor]:
        logprobs = self.logprobs(batch)
        return logprobs, torch.zeros_like(logprobs)


class TabularSPR(SPR):
    """SPR with two tables, and gradient steps without an optimizer."""

    trainer = SimpleNamespace(
        world_size=1, strategy=SimpleNamespace(reduce=lambda value, reduce_op: value, model=None)
    )

    def __init__(self, **settings):
        super().__init__(policy=lambda: None, **settings)
        self.policy, self.reference = Table(REFERENCE), Table(REFERENCE)
        self.exclusive, self.lr, self.logged = ExclusiveOffload([]), 1.0, {}

    def log(self, name, value, **kwargs):
        self.logged[name] = float(value)

    def log_dict(self, metrics):
        self.logged.update({name: float(value) for name, value in metrics.items()})

    def reference_logprobs(self, batch):
        return self.reference.logprobs(batch)

    def manual_backward(self, loss):
        loss.backward()

    def optimizer_state(self):
        return iter(())

    def set_gradient_sync(self, is_last):
        """Do nothing: there is one rank."""

    def step(self):
        self.policy.logits.data -= self.lr * self.policy.logits.grad
        self.policy.logits.grad = None
        return {}

    @property
    def optimum(self) -> Tensor:
        """Probabilities [9] that maximize E[score] - kl_coef KL(policy || reference)."""
        return (self.reference.response_logprobs.detach() + SCORES / self.kl_coef).softmax(-1)

    @property
    def objective(self) -> float:
        """E[score] - kl_coef KL(policy || reference) of the policy."""
        logprobs = self.policy.response_logprobs.detach()
        value = SCORES - self.kl_coef * (logprobs - self.reference.response_logprobs.detach())
        return float((logprobs.exp() * value).sum())

    @property
    def gap(self) -> float:
        """KL(policy || optimum) in nats."""
        logprobs = self.policy.response_logprobs.detach()
        return float((logprobs.exp() * (logprobs - self.optimum.log())).sum())


def rollout(groups: Tensor, num_sampled: int) -> Experience:
    """Return the rows that `Rollout` and `Reward` would return.

    Args:
        groups: [B, G] responses, sampled ones first.
        num_sampled: Sampled responses per group. The others are offline responses.
    """
    number, size = groups.shape
    num_offline = size - num_sampled
    places = torch.cat([groups[:, :num_sampled].flatten(), groups[:, num_sampled:].flatten()])
    rows = len(places)
    return Experience(
        prompts=torch.zeros(rows, 1, dtype=torch.long),
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        prompt_lengths=[1] * rows,
        responses=torch.stack([FIRST[places], SECOND[places]], -1),
        response_mask=torch.ones(rows, 2, dtype=torch.bool),
        response_lengths=[2] * rows,
        truncated=[False] * rows,
        is_greedy=[False] * rows,
        is_offline=[False] * (number * num_sampled) + [True] * (number * num_offline),
        offline_scores=[None] * rows,
        offline_logprobs=[None] * rows,
        group=[row for row in range(number) for _ in range(num_sampled)]
        + [row for row in range(number) for _ in range(num_offline)],
        sampling_logprobs=torch.zeros(rows, 2),
        scores=SCORES[places],
    )
