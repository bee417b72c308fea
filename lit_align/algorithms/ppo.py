"""PPO with a critic of its own (Ouyang et al., 2022, arXiv:2203.02155)."""

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
    """Policy and critic are two networks; with adapters each base can serve a second role.

    The policy's base is the reference, the critic's base the reward model (`SharedBackboneReward`):
    the paper's dynamic LoRA, arXiv:2309.00754.

    Args:
        critic: The network that values each token: a reward model's path starts it as that, a
            language model's path gives it a new head. By default the policy's trunk as it was at
            the start, with a new head.
    """

    trained_roles = ("policy", "critic")
    critic: ScalarHead

    def __init__(self, critic: Callable[[], ScalarHead] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.build_critic = critic

    def all_roles(self) -> list[Role]:
        """The critic's head is a value head."""
        roles = super().all_roles()
        return [role._replace(head="value") if role.name == "critic" else role for role in roles]

    def build(self) -> dict[str, Backbone]:
        """Adds the critic."""
        networks = super().build()
        policy = networks["policy"]
        critic = self.build_critic() if self.build_critic else ScalarHead.from_backbone(policy)
        check_same_vocabulary("critic", critic, policy)
        return {**networks, "critic": critic}

    def state_values(self, batch: Experience) -> Tensor:
        """[n, R] the critic's number before each token is chosen; 0 off the mask."""
        return self.critic.state_values(batch)

    def base_scores(self, batch: Experience) -> Tensor:
        """[N]: scores of the critic's frozen base, for `SharedBackboneReward`."""
        self.reward_role()
        with self.critic.adapters.disabled():
            (scores,) = self.map_microbatches(
                batch, lambda microbatch: (self.critic.scores(microbatch),)
            )
        return scores

    def reward_role(self) -> Role:
        """The critic's base as the reward model; refused where it is none."""
        if self.critic.adapted is None or self.critic.missing_weights:
            problem = (
                "has no trained reward head" if self.critic.missing_weights else "trains whole"
            )
            raise UserError(
                f"SharedBackboneReward needs the critic's base, but {self.critic.name} {problem}: "
                f"give the critic a reward model's path, and lora."
            )
        return single_head_role("reward", self.critic, "off")
