"""Base of PPO and Hydra-PPO: rewards, advantages and losses of an actor and a critic."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.argument_checks import check_above_zero, check_fraction
from lit_align.algorithms.core.online import LossAggregation, OnlineAlgorithm
from lit_align.algorithms.core.running_statistics import KLController, RunningMeanStd
from lit_align.batches import Experience
from lit_align.functional.kl import k1, k3
from lit_align.functional.losses import clip_fractions, clipped_surrogate, clipped_value
from lit_align.functional.returns import gae, on_last_token


class ActorCritic(OnlineAlgorithm):
    """Clipped policy updates with advantages from a critic, arXiv:1707.06347 eq. 7.

    The reward of a token is -kl_coef * k1, and the last token also gets the score
    (arXiv:2203.02155 section 3.5). Advantages are GAE (arXiv:1506.02438 eq. 16). Scores are
    normalized, then clipped. Then `missing_eos_penalty` is subtracted if there is no stop token.
    The log key `reward` is the raw score.

    Args:
        critic_lr: Learning rate of the critic. Default: that of the policy.
        critic_warmup_iterations: Iterations at the start in which only the critic trains.
        kl_coef: KL penalty: reward subtracted per nat of log-ratio to the reference.
        kl_in_loss: Add the KL (k3) to the loss instead of subtracting it (k1) from the reward.
        kl_target: KL in nats per response to which `kl_coef` is adapted (arXiv:1909.08593).
            Default: `kl_coef` is constant.
        kl_horizon: Responses in which an adapted `kl_coef` can change by 20 %.
        clip_low: Lower clip range of the importance ratio: it is clipped at 1 - clip_low.
        clip_high: Upper clip range of the importance ratio: it is clipped at 1 + clip_high.
        value_clip_range: Clip range of the value loss around the rollout's value.
        gamma: Discount per token, from 0 to 1.
        gae_lambda: Lambda of GAE, from 0 (one-step errors) to 1 (full returns).
        whiten_advantages: Scale the advantages of a rollout, over all ranks, to mean 0 and
            standard deviation 1.
        normalize_scores: Normalize scores by their running mean and standard deviation.
        score_clip: Clip scores to [-score_clip, score_clip]. Default: no clipping.
        missing_eos_penalty: Score subtracted from a response without a stop token.
        loss_aggregation: token_mean averages over all response tokens. sequence_mean averages
            over each response's tokens and then over responses. sequence_sum sums over each
            response's tokens and averages over responses.
    """

    has_multiple_losses = True

    def __init__(
        self,
        critic_lr: float | None = None,
        critic_warmup_iterations: int = 0,
        kl_coef: float = 0.02,
        kl_in_loss: bool = False,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        value_clip_range: float = 0.2,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        whiten_advantages: bool = True,
        normalize_scores: bool = False,
        score_clip: float | None = None,
        missing_eos_penalty: float = 0.0,
        loss_aggregation: LossAggregation = "token_mean",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_above_zero(score_clip=score_clip, critic_lr=critic_lr)
        check_above_zero(clip_low=clip_low, clip_high=clip_high, value_clip_range=value_clip_range)
        check_fraction(gamma=gamma, gae_lambda=gae_lambda)
        self.critic_warmup_iterations = critic_warmup_iterations
        self.role_lr = {} if critic_lr is None else {"critic": critic_lr}
        self.kl = KLController(kl_coef, kl_target, kl_horizon)
        self.scale = RunningMeanStd() if normalize_scores else None
        self.kl_in_loss, self.gamma, self.gae_lambda = kl_in_loss, gamma, gae_lambda
        self.clip_low, self.clip_high, self.value_clip_range = clip_low, clip_high, value_clip_range
        self.whiten_advantages, self.score_clip = whiten_advantages, score_clip
        self.missing_eos_penalty, self.loss_aggregation = missing_eos_penalty, loss_aggregation

    @abstractmethod
    def state_values(self, batch: Experience) -> Tensor:
        """Return V(s_t) for each response token, [n, r]; 0 where masked."""

    def training_step(self, batch: Experience, batch_idx: int) -> None:
        """Run one iteration, then adapt the KL coefficient to the rollout's KL."""
        super().training_step(batch, batch_idx)
        # After the update, so that rewards and losses of a rollout have one coefficient.
        self.kl.update(*self.observed_kl)

    def prepare(self, batch: Experience) -> Experience:
        """Add `values`, `advantages` and `returns`, each [N, R], by GAE."""
        batch = super().prepare(batch)
        mask = batch.response_mask
        (batch.values,) = self.map_microbatches(
            batch, lambda microbatch: (self.state_values(microbatch),)
        )
        rewards = self.token_rewards(batch)
        batch.advantages, batch.returns = gae(
            rewards, batch.values, mask, self.gamma, self.gae_lambda
        )
        self.log_rewards(batch, rewards)
        # After the returns: the critic predicts returns in the units of the reward.
        if self.whiten_advantages:
            _, mean, variance = self.moments_over_ranks(batch.advantages, mask)
            whitened = (batch.advantages - mean) / (variance + 1e-8).sqrt()
            batch.advantages = whitened.where(mask, 0.0)
        return batch

    def token_rewards(self, batch: Experience) -> Tensor:
        """Return token rewards [N, R]: the score on the last token, minus the KL penalty."""
        rewards = on_last_token(self.shape_scores(batch), batch.response_mask)
        return rewards if self.kl_in_loss else rewards - self.kl_penalty(batch)

    def kl_penalty(self, batch: Experience) -> Tensor:
        """Return the KL penalty of each token, [N, R]: kl_coef * k1."""
        return self.kl.coef * k1(batch.logprobs, batch.ref_logprobs)

    def shape_scores(self, batch: Experience) -> Tensor:
        """Return the scores [N], normalized, clipped and charged for a missing stop token."""
        scores = batch.scores  # unchanged: the log key `reward` reads it
        if self.scale is not None:
            self.scale.update_from_moments(
                *self.moments_over_ranks(scores, batch.response_mask.any(-1))
            )
            scores = self.scale.normalize(scores)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return scores - self.missing_eos_penalty * self.as_device_tensor(batch.truncated)

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """Yield the policy's losses [n, r] after the critic's warmup, then the critic's [n, r]."""
        if self.iteration >= self.critic_warmup_iterations:
            yield self.policy_loss(batch, *self.policy.logprobs_and_entropy(batch))
        yield self.value_loss(batch, self.state_values(batch))

    def policy_loss(self, batch: Experience, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """Return the clipped surrogate [n, r], plus the KL (k3) if it is in the loss.

        Args:
            batch: n rows with `logprobs` of the sampling policy and `advantages`.
            logprobs: [n, r] nats, under the policy that trains.
            entropy: [n, r] nats, of the policy that trains.
        """
        # The entropy is a metric here, not a bonus in the loss.
        mask, log_ratio = batch.response_mask, (logprobs - batch.logprobs).detach()
        clipping = (batch.logprobs, batch.advantages, self.clip_low, self.clip_high)
        loss = clipped_surrogate(logprobs, *clipping)
        is_clipped_low, is_clipped_high = clip_fractions(logprobs, *clipping)
        self.metrics.add("policy/approxkl_avg", log_ratio.square() / 2, mask)
        self.metrics.add("policy/clipfrac_avg", is_clipped_low | is_clipped_high, mask)
        self.metrics.add("entropy/update", entropy, mask)
        self.metrics.add("loss/policy_avg", loss, mask)
        self.metrics.add("policy/ratio_mean", log_ratio.exp(), mask)
        if self.kl_in_loss:
            loss = loss + self.kl.coef * k3(logprobs, batch.ref_logprobs)
        return self.aggregate(loss, batch)

    def value_loss(self, batch: Experience, values: Tensor) -> Tensor:
        """Return the value loss [n, r]: half the larger of the plain and clipped squared error.

        Args:
            batch: n rows with the rollout's `values` and `returns`.
            values: [n, r], of the critic that trains.
        """
        loss = clipped_value(values, batch.values, batch.returns, self.value_clip_range)
        unclipped = 0.5 * (values - batch.returns).square()
        # Larger than the clip range: not only a rounding difference.
        moved = (values.detach() - batch.values).abs() > self.value_clip_range
        self.metrics.add("loss/value_avg", loss, batch.response_mask)
        self.metrics.add("value/clipfrac", moved & (loss > unclipped), batch.response_mask)
        return self.aggregate(loss, batch)

    def log_rewards(self, batch: Experience, rewards: Tensor) -> None:
        """Log scores, KL penalty and the critic's explained variance under TRL's PPO names.

        Args:
            batch: N rows with `values` and `returns`.
            rewards: [N, R] token rewards.
        """
        mask, has_response = batch.response_mask, batch.response_mask.any(-1)
        non_score_reward = -self.kl_penalty(batch).where(mask, 0.0).sum(-1) * float(
            not self.kl_in_loss
        )
        number, kl, _ = self.moments_over_ranks(self.sequence_kl(batch), has_response)
        self.observed_kl = (kl, number)
        self.metrics.add("objective/scores", batch.scores, has_response)
        self.metrics.add("objective/non_score_reward", non_score_reward, has_response)
        self.metrics.add("objective/rlhf_reward", rewards.where(mask, 0.0).sum(-1), has_response)
        _, _, residual_variance = self.moments_over_ranks(batch.returns - batch.values, mask)
        _, _, return_variance = self.moments_over_ranks(batch.returns, mask)
        self.log("critic/vf_explained_var", 1 - residual_variance / return_variance.clamp(min=1e-8))
        self.log("objective/kl_coef", self.kl.coef)
