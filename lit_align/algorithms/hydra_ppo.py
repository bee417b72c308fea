"""Hydra-PPO: four roles on one backbone (Santacroce et al., 2023, arXiv:2309.00754)."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from lit_align.algorithms.core.actor_critic import ActorCritic
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.models.backbone import Backbone
from lit_align.models.hydra import Hydra
from lit_align.models.roles import Role


class HydraPPO(ActorCritic):
    """PPO with actor and critic as adapters on one frozen base, the reference and reward model.

    arXiv:2309.00754: the base is a language model with a trained reward head (`HydraSFT`). With
    `SharedBackboneReward`, one pass with the adapters disabled gives both the scores and the
    reference's log-probs. `JointHydra` has one adapter for actor and critic, and one pass for
    both losses.

    Args:
        policy: The backbone with its heads and adapters: `Hydra` or `JointHydra`.
        kl_coef: KL penalty: reward subtracted per nat of log-ratio to the reference.
        score_clip: Clip scores to [-score_clip, score_clip]. null: no clipping.
        whiten_advantages: Scale the advantages of a rollout, over all ranks, to mean 0 and
            standard deviation 1.
        value_coef: Coefficient of the value loss if one adapter learns from both losses.
    """

    policy: Hydra

    def __init__(
        self,
        policy: Callable[[], Hydra],
        kl_coef: float = 0.02,
        score_clip: float | None = 5.0,
        whiten_advantages: bool = False,
        value_coef: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(
            policy=policy,
            kl_coef=kl_coef,
            score_clip=score_clip,
            whiten_advantages=whiten_advantages,
            **kwargs,
        )
        self.value_coef = value_coef
        if self.reference_model.build_network is not None:
            raise UserError(
                "HydraPPO has its reference in its own base, with the adapters disabled. Remove "
                "--model.reference."
            )

    def build(self) -> dict[str, Backbone]:
        """Return the one unsharded network, which serves all roles."""
        networks = super().build()
        joint = isinstance(networks["policy"], Hydra) and networks["policy"].is_joint
        if joint and (self.role_lr or self.critic_warmup_iterations):
            raise UserError(
                "JointHydra has one adapter for actor and critic. Remove --model.critic_lr and "
                "--model.critic_warmup_iterations, or set --model.policy Hydra."
            )
        return networks

    @property
    def roles(self) -> dict[str, Backbone]:
        """Actor and critic on one network, or a single role if they share an adapter."""
        both: dict[str, Backbone] = {"policy": self.policy, "critic": self.policy}
        return {"policy": self.policy} if self.policy.is_joint else both

    def trainable_weights(self, role: str) -> list[nn.Parameter]:
        """Return the weights of the role's adapter."""
        # By name: peft sets `requires_grad` only on the adapter that was set last.
        return self.policy.adapter_weights(
            "actor" if role == "policy" else self.policy.critic_adapter
        )

    def all_roles(self) -> list[Role]:
        """Return policy, critic and reference. The reward function adds its own role."""
        hydra = self.policy
        critic = hydra.role("critic", hydra.critic_adapter, "value")
        return [
            hydra.role("policy", "actor", "language"),
            critic,
            self.frozen_base_role("reference"),
        ]

    def frozen_base_role(self, name: str) -> Role:
        """Return the frozen base as a role.

        Args:
            name: `reward` for the score head, `reference` for the language head.
        """
        return self.policy.role(name, "off", "score" if name == "reward" else "language")

    def reward_role(self) -> Role:
        """Return the frozen base with its score head as the reward model."""
        return self.frozen_base_role("reward")

    def state_values(self, batch: Experience) -> Tensor:
        """Return V(s_t) for each response token, [n, r]; 0 where masked."""
        return self.policy.state_values(batch)

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """Yield the actor's losses [n, r] and the critic's [n, r], or their sum if joint."""
        if not self.policy.is_joint:
            yield from super().losses(batch)
            return
        logprobs, entropy, values = self.policy.logprobs_entropy_and_values(batch)
        # One forward pass gives both losses, so they need one backward pass.
        loss = self.value_coef * self.value_loss(batch, values)
        if self.iteration >= self.critic_warmup_iterations:
            loss = loss + self.policy_loss(batch, logprobs, entropy)
        yield loss

    def base_scores(self, batch: Experience) -> Tensor:
        """Return the reward head's scores [N], and add `ref_logprobs` [N, R] of the same pass."""
        scores, batch.ref_logprobs = self.map_microbatches(
            batch, self.policy.scores_and_ref_logprobs
        )
        return scores

    def reference_logprobs(self, batch: Experience) -> Tensor:
        """Return the reference's log-probs [n, r] in nats, if possible those of `base_scores`."""
        if "ref_logprobs" in batch.fields():  # `SharedBackboneReward` has scored this batch
            return batch.ref_logprobs
        return super().reference_logprobs(batch)
