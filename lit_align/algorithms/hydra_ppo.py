"""Hydra-PPO: four roles on one trunk (Santacroce et al., 2023, arXiv:2309.00754)."""

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
    """PPO whose reference and reward model are the base under the actor's and critic's adapters.

    With `SharedBackboneReward`, one pass with the adapters off gives both the scores and the
    reference's log-probs. A `JointHydra` has one adapter and takes one pass for both losses.

    Args:
        policy: The trunk with its heads and adapters: `Hydra` or `JointHydra`.
        kl_coef: Reward lost per nat by which a token exceeds the reference.
        score_clip: Largest score either way.
        whiten_advantages: Give a rollout's advantages mean 0 and deviation 1, over all ranks.
        value_coef: Weight of the value loss where one adapter learns from both.
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
                "HydraPPO's reference is its own base with the adapters off: leave out reference."
            )

    def build(self) -> dict[str, Backbone]:
        """The one network."""
        networks = super().build()
        joint = isinstance(networks["policy"], Hydra) and networks["policy"].is_joint
        if joint and (self.role_lr or self.critic_warmup_iterations):
            raise UserError(
                "JointHydra's one adapter is actor and critic at once: leave out critic_lr and "
                "critic_warmup_iterations, or take Hydra."
            )
        return networks

    @property
    def roles(self) -> dict[str, Backbone]:
        """Actor and critic on one network, or one role for both on one adapter."""
        both: dict[str, Backbone] = {"policy": self.policy, "critic": self.policy}
        return {"policy": self.policy} if self.policy.is_joint else both

    def trainable_weights(self, role: str) -> list[nn.Parameter]:
        """What trains in a role, by its adapter's name: peft's flags follow the last switch."""
        return self.policy.adapter_weights(
            "actor" if role == "policy" else self.policy.critic_adapter
        )

    def all_roles(self) -> list[Role]:
        """All but the reward, on one network."""
        hydra = self.policy
        critic = hydra.role("critic", hydra.critic_adapter, "value")
        return [
            hydra.role("policy", "actor", "language"),
            critic,
            self.frozen_base_role("reference"),
        ]

    def frozen_base_role(self, name: str) -> Role:
        """The base in a role of its own."""
        return self.policy.role(name, "off", "score" if name == "reward" else "language")

    def reward_role(self) -> Role:
        """The base and its frozen score head."""
        return self.frozen_base_role("reward")

    def state_values(self, batch: Experience) -> Tensor:
        """[n, R] the critic's number before each token is chosen; 0 off the mask."""
        return self.policy.state_values(batch)

    def losses(self, batch: Experience) -> Iterator[Tensor]:
        """[n, R] of the actor and then of the critic; of a joint adapter, their sum."""
        if not self.policy.is_joint:
            yield from super().losses(batch)
            return
        logprobs, entropy, values = self.policy.logprobs_entropy_and_values(batch)
        loss = self.value_coef * self.value_loss(batch, values)
        if self.iteration >= self.critic_warmup_iterations:
            loss = loss + self.policy_loss(batch, logprobs, entropy)
        yield loss

    def base_scores(self, batch: Experience) -> Tensor:
        """[N] of the frozen reward head; the reference's log-probs of the same pass are kept."""
        scores, batch.ref_logprobs = self.map_microbatches(
            batch, self.policy.scores_and_ref_logprobs
        )
        return scores

    def reference_logprobs(self, batch: Experience) -> Tensor:
        """[n, r] nats: as `base_scores` left them, or by a pass with the adapters off."""
        if "ref_logprobs" in batch.fields():
            return batch.ref_logprobs
        return super().reference_logprobs(batch)
