"""GRPO and SFT without Trainer, callbacks, logs or classes: the same maths in a bare loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from bench import ours
from bench.case import Case
from bench.material import EOS, PAD, reward
from lit_align.batches import Experience, Tokens, microbatches
from lit_align.functional.kl import k3
from lit_align.functional.losses import clipped_surrogate
from lit_align.functional.masks import through_first
from lit_align.functional.returns import group_relative
from lit_align.models.generation.decode import Sampling
from lit_align.models.policy import Policy


def run(case: Case, folder: Path, steps: int, stepped: Callable[[], None]) -> Policy:
    """So many optimizer steps, `stepped` called after each; the policy they have made."""
    torch.manual_seed(0)
    policy = Policy(str(folder / "model"))
    reference = deepcopy(policy).requires_grad_(False)
    settings = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    adam = AdamW(policy.parameters(), **settings)
    module = ours.data(case, folder)
    batches = iter(module.train_dataloader())
    for _ in range(steps):
        batch = next(batches)
        if case.online:
            batch = rollout(case, policy, reference, batch, module.decode)
        for rows in microbatches(batch.lengths, case.shape.part * case.shape.longest):
            part = batch.rows(rows).trim()
            logprobs, _ = policy.score(part)
            loss = grpo(part, logprobs) / len(batch) if case.online else sft(part, logprobs, batch)
            loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        stepped()
    return policy


@torch.no_grad()
def rollout(
    case: Case,
    policy: Policy,
    reference: Policy,
    batch: Experience,
    decode: Callable[[list[int]], str],
) -> Experience:
    """Answers, scores, log-probs of the reference, advantages."""
    shape, stops = case.shape, sorted({EOS, *policy.stop_ids})
    group = [row for row in range(len(batch)) for _ in range(shape.num_samples)]
    batch = batch.rows(group)
    batch.group = group
    noise = torch.rand(len(batch), shape.answer)
    batch.responses, _ = policy.respond(batch, noise, [False] * len(batch), stops, PAD, Sampling())
    batch.response_mask = through_first(batch.responses, stops)
    batch.response_lengths = batch.response_mask.sum(-1).tolist()
    ends = zip(batch.responses.tolist(), batch.response_lengths, strict=True)
    batch.scores = torch.tensor(reward([decode(row[:end]) for row, end in ends]))
    batch.ref_logprobs = torch.zeros(batch.responses.shape)
    for rows in microbatches(batch.lengths, shape.part * shape.longest):
        part = batch.rows(rows).trim()
        batch.ref_logprobs[rows, : part.responses.shape[1]] = reference.logprobs(part)
    credit = group_relative(batch.scores.view(-1, shape.num_samples))
    batch.advantages = credit.view(-1, 1).expand_as(batch.responses)
    return batch


def grpo(part: Experience, logprobs: Tensor) -> Tensor:
    """Summed over responses; the one update's policy is the one that has sampled."""
    loss = clipped_surrogate(logprobs, logprobs.detach(), part.advantages)
    loss = loss + 0.04 * k3(logprobs, part.ref_logprobs)
    mask = part.response_mask
    return (loss / mask.sum(-1, keepdim=True)).where(mask, 0.0).sum()


def sft(part: Tokens, logprobs: Tensor, batch: Tokens) -> Tensor:
    """This part's share of the mean over all learnt tokens."""
    return -logprobs.sum() / batch.response_mask.sum()
