"""SPR: successive policy re-weighting (OpenReview LglOy15bqe), a reconstruction."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lit_align.algorithms.core.online import OnlineAlgorithm, refuse_single_samples
from lit_align.batches import Experience
from lit_align.functional.reweighting import (
    effective_share,
    log_normaliser,
    log_ratios,
    sample_weights,
    shaped_scores,
)
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.offload import Sleeper, Turns, state_of


class SPR(OnlineAlgorithm):
    """Supervised fine-tuning on its own and on stored answers, each with a weight of its own.

    The weights lead to the maximiser of E[score] - kl_coef KL(pi || reference) - step_coef
    KL(pi || current policy), and over the iterations to the optimum of the first two terms. One
    network is on the device at a time, and the optimizer's state only in the update. Formulas
    are ours: of the paper, the abstract and its reviews are known (docs/spr.md).

    Args:
        num_samples: Sampled responses per prompt.
        kl_coef: beta, score lost per nat of KL to the reference.
        step_coef: tau, score lost per nat of KL to the policy that has sampled.
        num_stored: Answers of the data set per prompt in the first iteration.
        stored_decay: Iterations after which half of the stored answers are left; .inf keeps all.
        max_ratio: Cap on how much likelier an answer is now than when it was drawn; null for none.
    """

    turns: Turns

    def __init__(
        self,
        num_samples: int = 4,
        kl_coef: float = 0.1,
        step_coef: float = 0.2,
        num_stored: int = 0,
        stored_decay: float = 8.0,
        max_ratio: float | None = 2.0,
        **kwargs: Any,
    ):
        super().__init__(park=False, **kwargs)  # its networks take turns, see `build`
        self.num_samples, self.kl_coef, self.step_coef = num_samples, kl_coef, step_coef
        self.first_stored, self.stored_decay = num_stored, stored_decay
        self.max_ratio = max_ratio
        self.refuse()
        self.state = Sleeper(self.optimizer_state)

    def refuse(self) -> None:
        """Says which arguments make no algorithm."""
        if not self.first_stored:
            refuse_single_samples(self, self.num_samples)
        if self.num_samples < 1 or self.first_stored < 0:
            raise ValueError(
                f"SPR needs num_samples of at least 1 and num_stored of at least 0, found "
                f"{self.num_samples} and {self.first_stored}."
            )
        if min(self.kl_coef, self.step_coef) < 0 or self.kl_coef + self.step_coef <= 0:
            raise ValueError(
                f"SPR divides scores by kl_coef + step_coef: neither may be below 0 and one must "
                f"be above, found {self.kl_coef} and {self.step_coef}."
            )
        if self.max_ratio is not None and self.max_ratio < 1:
            raise ValueError(
                f"max_ratio caps ratios of which a sample's own is 1: at least 1 or null for none, "
                f"found {self.max_ratio}."
            )
        if self.stored_decay <= 0:
            raise ValueError(f"stored_decay must be above 0, found {self.stored_decay}.")
        if self.first_stored and self.minibatch_size and not math.isinf(self.stored_decay):
            raise ValueError(
                "The rows of a rollout become fewer as stored answers decay: leave out "
                "minibatch_size, or set stored_decay to .inf."
            )

    @property
    def num_stored(self) -> int:
        """Answers of the data set per prompt in this iteration; groups stay of two at least."""
        left = self.first_stored / (1 + self.iteration / self.stored_decay)
        return max(int(left + 0.5), 2 - self.num_samples) if self.first_stored else 0

    @property
    def group_size(self) -> int:
        """G: samples and stored answers of a prompt in this iteration."""
        return self.num_samples + self.num_stored

    # Phases: one network on the device in each ---------------------------------------------------

    def build(self) -> dict[str, Backbone]:
        """Policy and reference, which take turns on the device."""
        networks = super().build()
        self.turns = Turns(networks.values())
        return networks

    def optimizer_state(self) -> Iterator[Tensor]:
        """What the optimizer keeps beside the weights."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        return state_of(optimizer.optimizer)

    def on_train_start(self) -> None:
        """A resumed optimizer's state waits for the update."""
        self.state.park()

    def make_room(self) -> None:
        """Ends the collection: both networks leave the device to the rewards."""
        self.turns.come(None)

    def end_iteration(self, metrics: Mapping[str, Tensor]) -> None:
        """Ends the update."""
        super().end_iteration(metrics)
        self.state.park()

    # What an answer is worth ---------------------------------------------------------------------

    def prepare(self, batch: Experience) -> Experience:
        """Adds `weights`, of groups with sampled answers first and stored ones behind them."""
        place = list(zip(batch.group, batch.stored, strict=True))
        batch = super().prepare(batch.rows(sorted(range(len(batch)), key=place.__getitem__)))
        batch.scores = self.known(batch.stored_scores, batch.scores)
        if self.num_samples > 1:
            self.log_equal_groups(sampled(batch))
        batch.weights = self.weigh(batch).flatten().type_as(batch.scores)
        self.state.wake()
        return batch

    def weigh(self, batch: Experience) -> Tensor:
        """[B, G] w = rho exp(ell) / (G Z); an unknown behaviour is taken to be the reference."""
        shape, mask = (-1, self.group_size), batch.response_mask
        scores = batch.scores.double().view(shape)
        logprobs = batch.logprobs.double().where(mask, 0.0).sum(-1).view(shape)
        reference = batch.ref_logprobs.double().where(mask, 0.0).sum(-1)
        behaviour = self.known(batch.stored_logprobs, reference).view(shape)
        coefs = {"kl_coef": self.kl_coef, "step_coef": self.step_coef}
        weights = sample_weights(
            scores,
            logprobs,
            reference.view(shape),
            behaviour_logprobs=behaviour,
            num_online=self.num_samples,
            max_ratio=self.max_ratio,
            **coefs,
        )
        shaped = shaped_scores(scores, logprobs, reference.view(shape), **coefs)
        log_rho = log_ratios(logprobs, behaviour, self.num_samples)
        self.log_weights(weights, shaped, log_rho, mask.any(-1).view(shape).any(-1))
        return weights

    def known(self, values: list[float | None], otherwise: Tensor) -> Tensor:
        """[N] the values that are known, and `otherwise` [N] where one is None."""
        given = self.on_device([math.nan if value is None else value for value in values])
        return torch.where(given.isnan(), otherwise, given.type_as(otherwise))

    def log_weights(
        self, weights: Tensor, shaped: Tensor, log_rho: Tensor, answered: Tensor
    ) -> None:
        """Logs how even the weights [B, G] are, Z, and rho, over the answered prompts [B]."""
        rows = answered.unsqueeze(-1).expand_as(weights)
        capped = log_rho.clamp(max=math.inf if self.max_ratio is None else math.log(self.max_ratio))
        rho = capped.exp().where(rows, 0.0)
        self.metrics.add("spr/ess", effective_share(weights), answered)
        self.metrics.add("spr/log_z", log_normaliser(shaped, capped), answered)
        self.metrics.add("spr/ratio_mean", rho, rows)
        self.metrics.add("spr/ratio_clipped", log_rho > capped, rows)
        self.log("spr/ratio_max", self.trainer.strategy.reduce(rho.max(), reduce_op="max"))
        self.log("spr/stored_share", self.num_stored / self.group_size)

    def log_rollout(self, batch: Experience) -> None:
        """Logs the sampled rows alone."""
        super().log_rollout(sampled(batch))

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """[n, R]: SFT's loss, with one number per response."""
        yield -batch.weights.unsqueeze(-1) * self.policy.logprobs(batch)

    def count(self, batch: Experience) -> Tensor:
        """Prompts."""
        return self.num_responses(batch) / self.group_size


def sampled(batch: Experience) -> Experience:
    """The rows that the policy has sampled itself."""
    return batch.rows([row for row, own in enumerate(batch.sampled) if own])
