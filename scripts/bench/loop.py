"""GRPO and SFT without Trainer, callbacks, logs or classes: the same maths in a bare loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from bench import lit_align_side
from bench.case import Case
from bench.data import EOS, PAD, reward
from lit_align.batches import Experience, TextBatch, microbatch_indices
from lit_align.functional.kl import k3
from lit_align.functional.losses import clipped_surrogate
from lit_align.functional.masks import through_first
from lit_align.functional.returns import group_relative
from lit_align.models.generation.decode import SamplingParams
from lit_align.models.policy import Policy


def run(case: Case, folder: Path, steps: int, after_step: Callable[[], None]) -> Policy:
    """So many optimizer steps, `after_step` called after each; the policy they have made."""
    torch.manual_seed(0)
    policy = Policy(str(folder / "model"))
    reference = deepcopy(policy).requires_grad_(False)
    settings = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    adam = AdamW(policy.parameters(), **settings)
    module = lit_align_side.data(case, folder)
    batches = iter(module.train_dataloader())
    for _ in range(steps):
        batch = next(batches)
        if case.is_online:
            batch = rollout(case, policy, reference, batch, module.decode)
        for rows in microbatch_indices(
            batch.lengths, case.shape.rows_per_microbatch * case.shape.max_tokens
        ):
            microbatch = batch.rows(rows).trim_padding()
            logprobs, _ = policy.logprobs_and_entropy(microbatch)
            loss = (
                grpo(microbatch, logprobs) / len(batch)
                if case.is_online
                else sft(microbatch, logprobs, batch)
            )
            loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        after_step()
    return policy


@torch.no_grad()
def rollout(
    case: Case,
    policy: Policy,
    reference: Policy,
    batch: Experience,
    decode: Callable[[list[int]], str],
) -> Experience:
    """Sample responses, score them, and add reference log-probs and advantages."""
    shape, stops = case.shape, sorted({EOS, *policy.stop_ids})
    group = [row for row in range(len(batch)) for _ in range(shape.num_samples)]
    batch = batch.rows(group)
    batch.group = group
    noise = torch.rand(len(batch), shape.response)
    batch.responses, _ = policy.generate(
        batch, noise, [False] * len(batch), stops, PAD, SamplingParams()
    )
    batch.response_mask = through_first(batch.responses, stops)
    batch.response_lengths = batch.response_mask.sum(-1).tolist()
    ends = zip(batch.responses.tolist(), batch.response_lengths, strict=True)
    batch.scores = torch.tensor(reward([decode(row[:end]) for row, end in ends]))
    batch.ref_logprobs = torch.zeros(batch.responses.shape)
    for rows in microbatch_indices(batch.lengths, shape.rows_per_microbatch * shape.max_tokens):
        microbatch = batch.rows(rows).trim_padding()
        batch.ref_logprobs[rows, : microbatch.responses.shape[1]] = reference.logprobs(microbatch)
    advantages = group_relative(batch.scores.view(-1, shape.num_samples))
    batch.advantages = advantages.view(-1, 1).expand_as(batch.responses)
    return batch


def grpo(microbatch: Experience, logprobs: Tensor) -> Tensor:
    """Return the loss summed over responses. The policy has not changed since it sampled."""
    loss = clipped_surrogate(logprobs, logprobs.detach(), microbatch.advantages)
    loss = loss + 0.04 * k3(logprobs, microbatch.ref_logprobs)
    mask = microbatch.response_mask
    return (loss / mask.sum(-1, keepdim=True)).where(mask, 0.0).sum()


def sft(microbatch: TextBatch, logprobs: Tensor, batch: TextBatch) -> Tensor:
    """Return the micro-batch's part of the mean over all target tokens."""
    return -logprobs.sum() / batch.response_mask.sum()
