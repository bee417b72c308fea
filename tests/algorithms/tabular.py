"""SPR on a table: two tokens out of three, every response known, no Trainer."""

from contextlib import nullcontext
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
    """Logits of the first token, and of the second after each first."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    @property
    def tokens(self) -> Tensor:
        """[9, 2] log-probs of both tokens of every response."""
        rows = self.logits.log_softmax(-1)
        return torch.stack([rows[0, FIRST], rows[FIRST + 1, SECOND]], -1)

    @property
    def whole(self) -> Tensor:
        """[9] log-probs of every response."""
        return self.tokens.sum(-1)

    def become(self, probs: Tensor) -> None:
        """The table with these probabilities [9]: SFT's exact solution."""
        joint = probs.view(3, 3)
        self.logits.data = torch.cat([joint.sum(1, keepdim=True).T, joint]).log()

    adapters = SimpleNamespace(disabled=nullcontext)

    def logprobs(self, batch: Experience) -> Tensor:
        return self.tokens[batch.responses @ torch.tensor([3, 1])]

    def logprobs_and_entropy(self, batch: Experience) -> tuple[Tensor, Tensor]:
        logprobs = self.logprobs(batch)
        return logprobs, torch.zeros_like(logprobs)


class TabularSPR(SPR):
    """SPR with two tables and plain gradient steps."""

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

    def step(self):
        self.policy.logits.data -= self.lr * self.policy.logits.grad
        self.policy.logits.grad = None
        return {}

    @property
    def optimum(self) -> Tensor:
        """[9] probabilities that maximise F."""
        return (self.reference.whole.detach() + SCORES / self.kl_coef).softmax(-1)

    @property
    def objective(self) -> float:
        """F of the policy."""
        logprobs = self.policy.whole.detach()
        value = SCORES - self.kl_coef * (logprobs - self.reference.whole.detach())
        return float((logprobs.exp() * value).sum())

    @property
    def gap(self) -> float:
        """Nats between the policy and the optimum."""
        logprobs = self.policy.whole.detach()
        return float((logprobs.exp() * (logprobs - self.optimum.log())).sum())


def rollout(groups: Tensor, num_sampled: int) -> Experience:
    """Rows as Rollout and Reward leave them: groups [B, G] of responses, sampled ones first."""
    number, size = groups.shape
    stored = size - num_sampled
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
        is_offline=[False] * (number * num_sampled) + [True] * (number * stored),
        offline_scores=[None] * rows,
        offline_logprobs=[None] * rows,
        group=[row for row in range(number) for _ in range(num_sampled)]
        + [row for row in range(number) for _ in range(stored)],
        sampling_logprobs=torch.zeros(rows, 2),
        scores=SCORES[places],
    )
