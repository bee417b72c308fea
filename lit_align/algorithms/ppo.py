"""PPO with a separate critic (Ouyang et al., 2022, arXiv:2203.02155)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.actor_critic import ActorCritic
from lit_align.algorithms.core.reference_model import check_same_vocabulary
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.models.backbone import Backbone
from lit_align.models.roles import Role, single_head_role
from lit_align.models.scalar_head import ScalarHead


class PPO(ActorCritic):
    """PPO (arXiv:1707.06347 eq. 7) with policy and critic as two networks.

    Sample a response per prompt, estimate advantages by GAE, and take clipped steps on policy and
    critic. With adapters each frozen base serves a second role: the policy's base is the reference,
    and the critic's base is the reward model (`SharedBackboneReward`). This is the dynamic LoRA of
    arXiv:2309.00754.

    Args:
        critic: The network that predicts the value of each token. A path to a reward model starts
            it with that model's head, a path to a language model with a new head. Default: the
            policy's backbone at the start, with a new head.
    """

    trained_roles = ("policy", "critic")
    critic: ScalarHead

    def __init__(self, critic: Callable[[], ScalarHead] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.build_critic = critic

    def all_roles(self) -> list[Role]:
        """Return all roles. The critic's head is a value head."""
        roles = super().all_roles()
        return [role._replace(head="value") if role.name == "critic" else role for role in roles]

    def build(self) -> dict[str, Backbone]:
        """Return the unsharded networks by role: policy, reference and critic."""
        networks = super().build()
        policy = networks["policy"]
        critic = self.build_critic() if self.build_critic else ScalarHead.from_backbone(policy)
        check_same_vocabulary("critic", critic, policy)
        return {**networks, "critic": critic}

    def state_values(self, batch: Experience) -> Tensor:
        """Return V(s_t) for each response token, [n, r]; 0 where masked."""
        return self.critic.state_values(batch)

    def base_scores(self, batch: Experience) -> Tensor:
        """Return the scores [N] of the critic's frozen base, for `SharedBackboneReward`."""
        self.reward_role()  # refuses a critic whose base is not a reward model
        with self.critic.adapters.disable_all():
            (scores,) = self.map_microbatches(
                batch, lambda microbatch: (self.critic.scores(microbatch),)
            )
        return scores

    def reward_role(self) -> Role:
        """Return the critic's frozen base as the reward model. It must be a reward model."""
        if self.critic.adapted is None or self.critic.missing_weights:
            lacks_head = bool(self.critic.missing_weights)
            problem = "has no trained reward head" if lacks_head else "trains without an adapter"
            raise UserError(
                f"SharedBackboneReward needs a frozen reward model as the critic's base, but "
                f"{self.critic.name} {problem}. Set --model.critic.path to a reward model, and "
                f"--model.critic.lora."
            )
        return single_head_role("reward", self.critic, "off")
