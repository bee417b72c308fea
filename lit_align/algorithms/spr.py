"""SPR: successive policy re-weighting (OpenReview LglOy15bqe), a reconstruction."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lit_align.algorithms.core.online import OnlineAlgorithm, check_group_size
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.reweighting import (
    effective_sample_fraction,
    log_normalizer,
    log_ratios,
    sample_weights,
    shaped_scores,
)
from lit_align.models.backbone import Backbone
from lit_align.models.parallel.offload import (
    ExclusiveOffload,
    OffloadedTensors,
    optimizer_state_tensors,
)


class SPR(OnlineAlgorithm):
    """Supervised fine-tuning on its own and on stored answers, each with a weight of its own.

    The weights lead to the maximiser of E[score] - kl_coef KL(pi || reference) - step_kl_coef
    KL(pi || current policy), and over the iterations to the optimum of the first two terms. One
    network is on the device at a time, and the optimizer's state only in the update. Formulas
    are ours: of the paper, the abstract and its reviews are known (docs/spr.md).

    Args:
        num_samples: Sampled responses per prompt.
        kl_coef: beta, score lost per nat of KL to the reference.
        step_kl_coef: tau, score lost per nat of KL to the policy that has sampled.
        num_offline_samples: Answers of the data set per prompt in the first iteration.
        offline_half_life: Iterations after which half of these are left; .inf keeps all.
        max_importance_ratio: Cap on the importance ratio of a response; null for none.
    """

    exclusive: ExclusiveOffload

    def __init__(
        self,
        num_samples: int = 4,
        kl_coef: float = 0.1,
        step_kl_coef: float = 0.2,
        num_offline_samples: int = 0,
        offline_half_life: float = 8.0,
        max_importance_ratio: float | None = 2.0,
        **kwargs: Any,
    ):
        super().__init__(offload_frozen=False, **kwargs)  # its networks take turns, see `build`
        self.num_samples, self.kl_coef, self.step_kl_coef = num_samples, kl_coef, step_kl_coef
        self.initial_offline_samples = num_offline_samples
        self.offline_half_life = offline_half_life
        self.max_importance_ratio = max_importance_ratio
        self.check_arguments()
        self.optimizer_offload = OffloadedTensors(self.optimizer_state)

    def check_arguments(self) -> None:
        """Says which arguments make no algorithm."""
        if not self.initial_offline_samples:
            check_group_size(self, self.num_samples)
        if self.num_samples < 1 or self.initial_offline_samples < 0:
            raise UserError(
                f"SPR needs num_samples of at least 1 and num_offline_samples of at least 0, found "
                f"{self.num_samples} and {self.initial_offline_samples}."
            )
        if min(self.kl_coef, self.step_kl_coef) < 0 or self.kl_coef + self.step_kl_coef <= 0:
            raise UserError(
                f"SPR divides scores by kl_coef + step_kl_coef: neither may be below 0, one must "
                f"be above, found {self.kl_coef} and {self.step_kl_coef}."
            )
        if self.max_importance_ratio is not None and self.max_importance_ratio < 1:
            raise UserError(
                f"max_importance_ratio must be at least 1 or null for none, "
                f"found {self.max_importance_ratio}."
            )
        if self.offline_half_life <= 0:
            raise UserError(f"offline_half_life must be above 0, found {self.offline_half_life}.")
        if (
            self.initial_offline_samples
            and self.minibatch_size
            and not math.isinf(self.offline_half_life)
        ):
            raise UserError(
                "The rows of a rollout become fewer as stored answers decay: leave out "
                "minibatch_size, or set offline_half_life to .inf."
            )

    @property
    def num_offline_samples(self) -> int:
        """Answers of the data set per prompt in this iteration; groups stay of two at least."""
        left = self.initial_offline_samples / (1 + self.iteration / self.offline_half_life)
        return max(int(left + 0.5), 2 - self.num_samples) if self.initial_offline_samples else 0

    @property
    def group_size(self) -> int:
        """G: samples and stored answers of a prompt in this iteration."""
        return self.num_samples + self.num_offline_samples

    # Phases: one network on the device in each ---------------------------------------------------

    def build(self) -> dict[str, Backbone]:
        """Policy and reference, which take turns on the device."""
        networks = super().build()
        self.exclusive = ExclusiveOffload(networks.values())
        return networks

    def optimizer_state(self) -> Iterator[Tensor]:
        """What the optimizer keeps beside the weights."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        return optimizer_state_tensors(optimizer.optimizer)

    def on_train_start(self) -> None:
        """A resumed optimizer's state waits for the update."""
        self.optimizer_offload.offload()

    def on_rollout_end(self) -> None:
        """Ends the collection: both networks leave the device to the rewards."""
        self.exclusive.offload_all()

    def end_iteration(self, metrics: Mapping[str, Tensor]) -> None:
        """Ends the update."""
        super().end_iteration(metrics)
        self.optimizer_offload.offload()

    # What an answer is worth ---------------------------------------------------------------------

    def prepare(self, batch: Experience) -> Experience:
        """Adds `weights`, of groups with sampled answers first and stored ones behind them."""
        sort_keys = list(zip(batch.group, batch.is_offline, strict=True))
        batch = super().prepare(batch.rows(sorted(range(len(batch)), key=sort_keys.__getitem__)))
        batch.scores = self.fill_missing(batch.offline_scores, batch.scores)
        if self.num_samples > 1:
            self.log_equal_groups(select_sampled(batch))
        batch.weights = self.sample_weights(batch).flatten().type_as(batch.scores)
        self.optimizer_offload.reload()
        return batch

    def sample_weights(self, batch: Experience) -> Tensor:
        """[B, G] w = rho exp(ell) / (G Z); an unknown behaviour is taken to be the reference."""
        shape, mask = (-1, self.group_size), batch.response_mask
        scores = batch.scores.double().view(shape)
        logprobs = batch.logprobs.double().where(mask, 0.0).sum(-1).view(shape)
        reference = batch.ref_logprobs.double().where(mask, 0.0).sum(-1)
        behavior = self.fill_missing(batch.offline_logprobs, reference).view(shape)
        coefs = {"kl_coef": self.kl_coef, "step_coef": self.step_kl_coef}
        weights = sample_weights(
            scores,
            logprobs,
            reference.view(shape),
            behaviour_logprobs=behavior,
            num_online=self.num_samples,
            max_ratio=self.max_importance_ratio,
            **coefs,
        )
        shaped = shaped_scores(scores, logprobs, reference.view(shape), **coefs)
        log_rho = log_ratios(logprobs, behavior, self.num_samples)
        self.log_weights(weights, shaped, log_rho, mask.any(-1).view(shape).any(-1))
        return weights

    def fill_missing(self, values: list[float | None], otherwise: Tensor) -> Tensor:
        """[N] the values that are known, and `otherwise` [N] where one is None."""
        given = self.as_device_tensor([math.nan if value is None else value for value in values])
        return torch.where(given.isnan(), otherwise, given.type_as(otherwise))

    def log_weights(
        self, weights: Tensor, shaped: Tensor, log_rho: Tensor, has_response: Tensor
    ) -> None:
        """Logs how even the weights [B, G] are, Z, and rho, over the answered prompts [B]."""
        rows = has_response.unsqueeze(-1).expand_as(weights)
        capped = log_rho.clamp(
            max=math.inf
            if self.max_importance_ratio is None
            else math.log(self.max_importance_ratio)
        )
        rho = capped.exp().where(rows, 0.0)
        self.metrics.add("spr/ess", effective_sample_fraction(weights), has_response)
        self.metrics.add("spr/log_z", log_normalizer(shaped, capped), has_response)
        self.metrics.add("spr/ratio_mean", rho, rows)
        self.metrics.add("spr/ratio_clipped", log_rho > capped, rows)
        self.log("spr/ratio_max", self.trainer.strategy.reduce(rho.max(), reduce_op="max"))
        self.log("spr/offline_fraction", self.num_offline_samples / self.group_size)

    def log_rollout(self, batch: Experience) -> None:
        """Logs the sampled rows alone."""
        super().log_rollout(select_sampled(batch))

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """[n, R]: SFT's loss, with one number per response."""
        yield -batch.weights.unsqueeze(-1) * self.policy.logprobs(batch)

    def loss_denominator(self, batch: Experience) -> Tensor:
        """Prompts."""
        return self.num_responses(batch) / self.group_size


def select_sampled(batch: Experience) -> Experience:
    """The rows that the policy has sampled itself."""
    return batch.rows([row for row, own in enumerate(batch.is_sampled) if own])
