"""Supervised fine-tuning on given responses."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.metrics import Means
from lit_align.batches import TextBatch
from lit_align.models.policy import Policy


class SFT(Algorithm):
    """Maximum likelihood of the target tokens (arXiv:2203.02155 section 3.5).

    The loss is the mean of -log pi(y_t | x, y_<t) over all target tokens of the batch. A
    long response has more weight than a short one.

    Args:
        policy: The model to train.
    """

    policy: Policy

    def __init__(self, policy: Callable[[], Policy], **kwargs: Any):
        super().__init__(**kwargs)
        self.build_policy = policy

    def losses(self, batch: TextBatch) -> Iterator[Tensor]:
        """Yield the cross-entropy of each token, [n, T-1] nats."""
        logprobs, entropy = self.policy.logprobs_and_entropy(batch)
        self.metrics.add("entropy", entropy, batch.loss_mask)
        yield -logprobs

    @torch.no_grad()
    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add the batch's tokens to the means of loss and accuracy."""
        mask = batch.response_mask
        nll, hits = self.map_microbatches(
            batch,
            lambda microbatch: (
                -self.policy.logprobs(microbatch),
                self.policy.top1_correct(microbatch).float(),
            ),
        )
        self.metrics.add_eval(batch, loss=(nll, mask), mean_token_accuracy=(hits, mask))

    test_step = validation_step

    def derived_eval_metrics(self, means: Means) -> Means:
        """Return the perplexity of the mean loss."""
        return {"perplexity": means["loss"].exp()}
