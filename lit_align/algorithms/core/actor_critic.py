"""What PPO's layouts share: all of PPO but where its networks live.

Ouyang et al., 2022, arXiv:2203.02155; Schulman et al., 2017, arXiv:1707.06347 eq. 7.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.online import LossAggregation, OnlineAlgorithm
from lit_align.algorithms.core.running_statistics import KLController, RunningMeanStd
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.kl import k1, k3
from lit_align.functional.losses import clip_fractions, clipped_surrogate, clipped_value
from lit_align.functional.returns import gae, on_last_token


class ActorCritic(OnlineAlgorithm):
    """Clipped policy updates; a critic says what was to be expected at each token.

    A token's reward is the price of its KL (k1); the last one gets the score as well. The score
    is normalised, clipped and charged for a missing end in this order, each only if asked for;
    what is logged as `reward` is the raw score.

    Args:
        critic_lr: Learning rate of the critic; by default the policy's.
        critic_warmup_iterations: First iterations, in which only the critic learns.
        kl_coef: Reward lost per nat by which a token exceeds the reference.
        kl_in_loss: Charge the KL in the loss (k3), where the gradient sees it, not in the reward.
        kl_target: Nats per response towards which `kl_coef` is adapted (arXiv:1909.08593).
        kl_horizon: Responses in which an adapted `kl_coef` can change by 20 %.
        clip_low: How far below 1 the ratio of a token to the sampling policy may count.
        clip_high: How far above 1 it may count.
        value_clip_range: How far a value may move from that of the sampling time and still earn.
        gamma: Discount per token.
        gae_lambda: GAE's lambda, between one-step errors (0) and whole returns (1).
        whiten_advantages: Give a rollout's advantages mean 0 and deviation 1, over all ranks.
        normalize_scores: Take the scores' mean and standard deviation over the run out of them.
        score_clip: Largest score either way.
        missing_eos_penalty: Score lost by a response that was cut before its end.
        loss_aggregation: token_mean averages over all response tokens, sequence_mean over each
            response's tokens and then over responses, sequence_sum sums each response's tokens
            and averages over responses.
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
        if score_clip is not None and not score_clip > 0:
            raise UserError(f"score_clip is a bound above 0, found {score_clip}: leave it out.")
        if critic_lr is not None and not critic_lr > 0:
            raise UserError(f"critic_lr must be above 0, found {critic_lr}.")
        if not (0 <= gamma <= 1 and 0 <= gae_lambda <= 1):
            raise UserError(f"gamma, gae_lambda must be in [0, 1], found {gamma}, {gae_lambda}.")
        if min(clip_low, clip_high, value_clip_range) <= 0:
            raise UserError(
                f"clip_low, clip_high and value_clip_range must be above 0, found {clip_low}, "
                f"{clip_high} and {value_clip_range}."
            )
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
        """[n, R] the critic's number before each token is chosen; 0 off the mask."""

    def training_step(self, batch: Experience, batch_idx: int) -> None:
        """One iteration, after which the KL's coefficient follows the KL that was seen."""
        super().training_step(batch, batch_idx)
        self.kl.update(*self.observed_kl)

    def prepare(self, batch: Experience) -> Experience:
        """Adds `values`, and `advantages` and `returns` by generalised advantage estimation."""
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
        if self.whiten_advantages:
            _, mean, variance = self.moments_over_ranks(batch.advantages, mask)
            whitened = (batch.advantages - mean) / (variance + 1e-8).sqrt()
            batch.advantages = whitened.where(mask, 0.0)
        return batch

    def token_rewards(self, batch: Experience) -> Tensor:
        """[N, R]: the score on the last token, less the price of each token's KL."""
        rewards = on_last_token(self.shape_scores(batch), batch.response_mask)
        return rewards if self.kl_in_loss else rewards - self.kl_penalty(batch)

    def kl_penalty(self, batch: Experience) -> Tensor:
        """[N, R]: what each token's KL costs."""
        return self.kl.coef * k1(batch.logprobs, batch.ref_logprobs)

    def shape_scores(self, batch: Experience) -> Tensor:
        """[N]: the raw scores, normalised, clipped and charged for a missing end."""
        scores = batch.scores
        if self.scale is not None:
            self.scale.update_from_moments(
                *self.moments_over_ranks(scores, batch.response_mask.any(-1))
            )
            scores = self.scale.normalize(scores)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return scores - self.missing_eos_penalty * self.as_device_tensor(batch.truncated)

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """[n, R] of the policy, once the critic is warm, then [n, R] of the critic."""
        if self.iteration >= self.critic_warmup_iterations:
            yield self.policy_loss(batch, *self.policy.logprobs_and_entropy(batch))
        yield self.value_loss(batch, self.state_values(batch))

    def policy_loss(self, batch: Experience, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """[n, R]: the clipped surrogate, with the KL where it belongs in the loss."""
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
        """[n, R]: half the larger of the plain and the clipped squared error."""
        loss = clipped_value(values, batch.values, batch.returns, self.value_clip_range)
        unclipped = 0.5 * (values - batch.returns).square()
        moved = (values.detach() - batch.values).abs() > self.value_clip_range  # beyond rounding
        self.metrics.add("loss/value_avg", loss, batch.response_mask)
        self.metrics.add("value/clipfrac", moved & (loss > unclipped), batch.response_mask)
        return self.aggregate(loss, batch)

    def log_rewards(self, batch: Experience, rewards: Tensor) -> None:
        """Logs scores, prices and how well the critic knew, under PPO's old names."""
        mask, has_response = batch.response_mask, batch.response_mask.any(-1)
        non_score_reward = -self.kl_penalty(batch).where(mask, 0.0).sum(-1) * float(
            not self.kl_in_loss
        )
        number, kl, _ = self.moments_over_ranks(self.sequence_kl(batch), has_response)
        self.observed_kl = (kl, number)
        self.metrics.add("objective/scores", batch.scores, has_response)
        self.metrics.add("objective/non_score_reward", non_score_reward, has_response)
        self.metrics.add("objective/rlhf_reward", rewards.where(mask, 0.0).sum(-1), has_response)
        surprise = -batch.logprobs.where(mask, 0.0).sum(-1)
        self.metrics.add("objective/entropy", surprise, has_response)
        _, _, residual_variance = self.moments_over_ranks(batch.returns - batch.values, mask)
        _, _, return_variance = self.moments_over_ranks(batch.returns, mask)
        self.log("critic/vf_explained_var", 1 - residual_variance / return_variance.clamp(min=1e-8))
        self.log("objective/kl_coef", self.kl.coef)
