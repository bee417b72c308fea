"""Reward model in the frozen base of a trained adapter."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.models.roles import Role
from lit_align.rewards.base import RewardError, RewardFunction


@runtime_checkable
class HasFrozenBase(Protocol):
    """An algorithm with a network that is a reward model if its adapters are disabled."""

    def base_scores(self, batch: Experience) -> Tensor:
        """Return the scores [N] of the responses, from the policy's tokens."""

    def reward_role(self) -> Role:
        """Return the base as a role, for the table at the start of a run."""


class SharedBackboneReward(RewardFunction):
    """Score head of Hydra's frozen base, or of the frozen base of PPO's critic.

    It needs no additional model. The base reads the policy's tokens, so no text is encoded again.
    """

    algorithm: HasFrozenBase

    def setup(self, algorithm: LightningModule) -> None:
        """Store the algorithm. Its base computes the scores."""
        if not isinstance(algorithm, HasFrozenBase):
            raise UserError(
                f"SharedBackboneReward needs PPO with an adapted critic, or HydraPPO, found "
                f"{type(algorithm).__name__}. Set --reward.functions to another reward."
            )
        self.algorithm = algorithm

    def all_roles(self) -> list[Role]:
        """Return the base as the role `reward`."""
        return [self.algorithm.reward_role()]

    def __call__(self, batch: Experience) -> Tensor:
        """Return the scores [N]."""
        # A sharded base computes on all ranks together, so that rows cannot be scored alone. A
        # RewardError ends the run without trying it.
        try:
            return self.algorithm.base_scores(batch)
        except ValueError as error:
            raise RewardError(str(error)) from error
