"""SPR: successive policy re-weighting (OpenReview LglOy15bqe), our reconstruction."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lit_align.algorithms.core.argument_checks import (
    check_above_zero,
    check_at_least,
    check_group_size,
)
from lit_align.algorithms.core.online import OnlineAlgorithm
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
    """Weighted supervised fine-tuning on sampled and offline responses.

    The new policy pi maximizes
    E[score] - kl_coef * KL(pi || pi_ref) - step_kl_coef * KL(pi || pi_t).
    It is the current policy pi_t with re-weighted responses, pi_t exp(ell) / Z. The
    fixed point is the optimum of the first two terms. One network is on the device at a time, and
    the optimizer state only during the update. All formulas are our reconstruction: we know only
    the abstract and the reviews of the paper (docs/spr.md).

    Args:
        num_samples: Sampled responses per prompt.
        kl_coef: KL penalty to the reference (beta): score units subtracted per nat.
        step_kl_coef: Score subtracted per nat of KL to the sampling policy, tau.
        num_offline_samples: Offline responses per prompt in the first iteration.
        offline_half_life: Half-life in iterations of the number of offline responses per prompt.
            .inf keeps all.
        max_importance_ratio: Upper limit of a response's importance ratio. null: no limit.
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
        super().__init__(offload_frozen=False, **kwargs)  # `build` offloads both networks itself
        self.num_samples, self.kl_coef, self.step_kl_coef = num_samples, kl_coef, step_kl_coef
        self.initial_offline_samples = num_offline_samples
        self.offline_half_life = offline_half_life
        self.max_importance_ratio = max_importance_ratio
        self.check_arguments()
        self.optimizer_offload = OffloadedTensors(self.optimizer_state)

    def check_arguments(self) -> None:
        """Refuse arguments under which the weights or the groups are not defined."""
        if not self.initial_offline_samples:
            check_group_size(self, self.num_samples)
        check_at_least(1, num_samples=self.num_samples)
        check_at_least(0, num_offline_samples=self.initial_offline_samples)
        check_at_least(0, kl_coef=self.kl_coef, step_kl_coef=self.step_kl_coef)
        if self.kl_coef + self.step_kl_coef <= 0:
            raise UserError(
                f"SPR divides scores by kl_coef + step_kl_coef: one must be above 0, found "
                f"{self.kl_coef} and {self.step_kl_coef}. Set --model.kl_coef or "
                f"--model.step_kl_coef."
            )
        check_at_least(1, max_importance_ratio=self.max_importance_ratio)
        check_above_zero(offline_half_life=self.offline_half_life)
        if (
            self.initial_offline_samples
            and self.minibatch_size
            and not math.isinf(self.offline_half_life)
        ):
            raise UserError(
                f"minibatch_size must divide the rows of a rollout, which become fewer with the "
                f"offline responses, found minibatch_size {self.minibatch_size} and "
                f"offline_half_life {self.offline_half_life:g}. Remove --model.minibatch_size, or "
                f"set --model.offline_half_life .inf."
            )

    @property
    def num_offline_samples(self) -> int:
        """Offline responses per prompt in this iteration. A group keeps at least two responses."""
        left = self.initial_offline_samples / (1 + self.iteration / self.offline_half_life)
        return max(int(left + 0.5), 2 - self.num_samples) if self.initial_offline_samples else 0

    @property
    def group_size(self) -> int:
        """G: sampled and offline responses per prompt in this iteration."""
        return self.num_samples + self.num_offline_samples

    # Phases: one network on the device in each ---------------------------------------------------

    def build(self) -> dict[str, Backbone]:
        """Return policy and reference. Only one of them is on the device at a time."""
        networks = super().build()
        self.exclusive = ExclusiveOffload(networks.values())
        return networks

    def optimizer_state(self) -> Iterator[Tensor]:
        """Yield the tensors of the optimizer state, such as Adam's moments."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # one, with a group per role
        return optimizer_state_tensors(optimizer.optimizer)

    def on_train_start(self) -> None:
        """Offload the optimizer state of a resumed run until the first update."""
        self.optimizer_offload.offload()

    def on_rollout_end(self) -> None:
        """Offload both networks, so that reward models have the device."""
        self.exclusive.offload_all()

    def end_iteration(self, metrics: Mapping[str, Tensor]) -> None:
        """Log and count the iteration, and offload the optimizer state."""
        super().end_iteration(metrics)
        self.optimizer_offload.offload()

    # Weights of the responses --------------------------------------------------------------------

    def prepare(self, batch: Experience) -> Experience:
        """Add `weights` [N], and sort each group: sampled responses, then offline responses."""
        # `Rollout` appends offline rows after all sampled rows. Weights need groups side by side.
        sort_keys = list(zip(batch.group, batch.is_offline, strict=True))
        batch = super().prepare(batch.rows(sorted(range(len(batch)), key=sort_keys.__getitem__)))
        batch.scores = self.fill_missing(batch.offline_scores, batch.scores)
        if self.num_samples > 1:
            self.log_equal_groups(select_sampled(batch))
        batch.weights = self.sample_weights(batch).flatten().type_as(batch.scores)
        self.optimizer_offload.reload()  # the last network pass without gradient is over
        return batch

    def sample_weights(self, batch: Experience) -> Tensor:
        """Return the weights w = rho exp(ell) / (G Z) of the responses, [B, G].

        If an offline response has no log-prob, the reference is assumed to have generated it.
        """
        shape, mask = (-1, self.group_size), batch.response_mask
        # float64: log-probs of long responses are large, and weights are their exponentials.
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
        """Replace each None in `values` by the entry of `otherwise`, [N].

        Args:
            values: [N] values of the data set.
            otherwise: [N] replacements.
        """
        given = self.as_device_tensor([math.nan if value is None else value for value in values])
        return torch.where(given.isnan(), otherwise, given.type_as(otherwise))

    def log_weights(
        self, weights: Tensor, shaped: Tensor, log_rho: Tensor, has_response: Tensor
    ) -> None:
        """Log the effective sample size, Z and the importance ratios rho.

        Args:
            weights: [B, G] weights of the responses.
            shaped: [B, G] ell, the shaped scores.
            log_rho: [B, G] log of rho before it is capped.
            has_response: [B] True for prompts that were not skipped.
        """
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
        """Log the sampled rows, without the offline responses."""
        super().log_rollout(select_sampled(batch))

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """Yield the cross-entropy of each token times the weight of its response, [n, r]."""
        yield -batch.weights.unsqueeze(-1) * self.policy.logprobs(batch)

    def loss_denominator(self, batch: Experience) -> Tensor:
        """Return the number of prompts [] on this rank."""
        return self.num_responses(batch) / self.group_size


def select_sampled(batch: Experience) -> Experience:
    """Return the rows that the policy sampled, without greedy and offline responses."""
    return batch.rows([row for row, own in enumerate(batch.is_sampled) if own])
