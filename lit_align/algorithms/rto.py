"""RTO: reinforced token optimization (Zhong et al., 2024, arXiv:2404.18922)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.argument_checks import check_above_zero
from lit_align.algorithms.core.online import LossAggregation
from lit_align.algorithms.core.reference_model import check_same_vocabulary
from lit_align.algorithms.ppo import PPO
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.returns import dpo_token_rewards
from lit_align.models.backbone import Backbone
from lit_align.models.policy import Policy
from lit_align.models.roles import Role, single_head_role

DPO_ROLE = "dpo"  # name of the adapter and of the role


class RTO(PPO):
    """PPO with token rewards from a frozen DPO model.

    Eq. 4.7 of arXiv:2404.18922: the reward of a token is
    dpo_coef * log(pi_dpo / pi_ref) - kl_coef * log(pi / pi_ref). The last token also gets
    score_coef * score. It assumes that the DPO model's log-ratio is a reward per token. The DPO
    model's own beta is not applied again.

    Args:
        dpo_adapter: Folder of an adapter that DPO trained on the policy's base. It is loaded onto
            that base, or onto the reference if the policy has no adapter.
        dpo: A separate DPO model, instead of `dpo_adapter`.
        dpo_reference: The reference that `dpo` was trained with. Default: the KL's reference.
        dpo_coef: Reward per nat of the DPO log-ratio, beta_1. 0 disables it.
        dpo_clip: Clip a token's DPO reward to [-dpo_clip, dpo_clip]. Default: no clipping. The
            released script uses 0.05.
        kl_coef: KL penalty: reward subtracted per nat of log-ratio to the reference, beta_2.
        score_coef: Factor of the score, beta_3.
        loss_aggregation: token_mean averages over all response tokens. sequence_mean averages
            over each response's tokens and then over responses. sequence_sum sums over each
            response's tokens and averages over responses.
    """

    dpo: Policy
    dpo_reference: Policy

    def __init__(
        self,
        dpo_adapter: str | None = None,
        dpo: Callable[[], Policy] | None = None,
        dpo_reference: Callable[[], Policy] | None = None,
        dpo_coef: float = 0.05,
        dpo_clip: float | None = None,
        kl_coef: float = 0.01,
        score_coef: float = 1.0,
        loss_aggregation: LossAggregation = "sequence_mean",
        **kwargs: Any,
    ):
        super().__init__(kl_coef=kl_coef, loss_aggregation=loss_aggregation, **kwargs)
        if dpo_coef and (dpo_adapter is None) == (dpo is None):
            found = "none" if dpo is None else "two"
            raise UserError(
                f"RTO needs exactly one DPO model, found {found}. Set --model.dpo, or "
                f"--model.dpo_adapter and --model.dpo null, or --model.dpo_coef 0 for PPO."
            )
        if dpo_reference is not None and dpo is None:
            raise UserError(
                "dpo_reference needs dpo: the reference of an adapter is its base. Remove "
                "--model.dpo_reference."
            )
        check_above_zero(dpo_clip=dpo_clip)
        self.dpo_adapter, self.build_dpo, self.build_dpo_reference = dpo_adapter, dpo, dpo_reference
        self.dpo_coef, self.dpo_clip, self.score_coef = dpo_coef, dpo_clip, score_coef

    def build(self) -> dict[str, Backbone]:
        """Return PPO's networks, the DPO model and its reference, if they are separate."""
        networks = super().build()
        if not self.dpo_coef:
            return networks
        policy = networks["policy"]
        assert isinstance(policy, Policy)
        if self.dpo_adapter is not None:
            # Frozen weights carry the adapter: the reference, or the policy's base below its own.
            base = networks.get("reference", policy)
            base.adapters.load_frozen_adapter(self.dpo_adapter, DPO_ROLE)
        for role, build in (
            (DPO_ROLE, self.build_dpo),
            ("dpo_reference", self.build_dpo_reference),
        ):
            if build is not None:
                network = build().requires_grad_(False).eval()
                check_same_vocabulary(role, network, policy)
                # All log-ratios compare distributions of one temperature.
                network.set_temperature(policy.temperature)
                networks[role] = network
        return networks

    def all_roles(self) -> list[Role]:
        """Return PPO's roles, the DPO model and its reference."""
        roles = super().all_roles()
        if hasattr(self, DPO_ROLE):
            roles.append(single_head_role(DPO_ROLE, self.dpo))
        elif self.dpo_coef:
            roles.append(single_head_role(DPO_ROLE, self.reference_model.network, DPO_ROLE))
        if hasattr(self, "dpo_reference"):
            roles.append(single_head_role("dpo_reference", self.dpo_reference))
        return roles

    def prepare(self, batch: Experience) -> Experience:
        """Add `dpo_logprobs` and, with a separate reference, `dpo_ref_logprobs`, [N, R] nats."""
        if self.dpo_coef:
            (batch.dpo_logprobs,) = self.map_microbatches(
                batch, lambda microbatch: (self.dpo_logprobs(microbatch),)
            )
        if hasattr(self, "dpo_reference"):
            score = self.dpo_reference.logprobs
            (batch.dpo_ref_logprobs,) = self.map_microbatches(
                batch, lambda microbatch: (score(microbatch),)
            )
        return super().prepare(batch)

    def dpo_logprobs(self, batch: Experience) -> Tensor:
        """Return the log-probs [n, r] under the DPO model, in nats."""
        if hasattr(self, DPO_ROLE):
            return self.dpo.logprobs(batch)
        network = self.reference_model.network
        with network.adapters.use_adapter(DPO_ROLE):
            return network.logprobs(batch)

    def token_rewards(self, batch: Experience) -> Tensor:
        """Return token rewards [N, R]: those of PPO plus the DPO rewards."""
        rewards = super().token_rewards(batch)
        if not self.dpo_coef:
            return rewards
        has_own_reference = "dpo_ref_logprobs" in batch.fields()
        reference = batch.dpo_ref_logprobs if has_own_reference else batch.ref_logprobs
        mask, settings = batch.response_mask, (self.dpo_coef, self.dpo_clip)
        dpo_rewards = dpo_token_rewards(batch.dpo_logprobs, reference, mask, *settings)
        # A token is clipped if its reward differs from the unclipped one.
        unclipped_rewards = dpo_token_rewards(batch.dpo_logprobs, reference, mask, self.dpo_coef)
        self.metrics.add("rto/dpo_reward", dpo_rewards.sum(-1), mask.any(-1))
        self.metrics.add("rto/dpo_clipped", dpo_rewards != unclipped_rewards, mask)
        return rewards + dpo_rewards

    def shape_scores(self, batch: Experience) -> Tensor:
        """Return the scores [N] of PPO, times score_coef."""
        return self.score_coef * super().shape_scores(batch)
