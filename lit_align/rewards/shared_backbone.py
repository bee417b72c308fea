"""A reward model that is the frozen base under a trained adapter."""

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
    """An algorithm one of whose networks is a reward model while its adapters are off."""

    def base_scores(self, batch: Experience) -> Tensor:
        """[N] scores of the answers as the policy's tokens have them."""

    def reward_role(self) -> Role:
        """The role, for the table at the start."""


class SharedBackboneReward(RewardFunction):
    """The score head of Hydra's base, or of the base under PPO's critic: no model of its own.

    Reads the policy's tokens, which both share; nothing is encoded again.
    """

    algorithm: HasFrozenBase

    def setup(self, algorithm: LightningModule) -> None:
        """Takes the role from the algorithm."""
        if not isinstance(algorithm, HasFrozenBase):
            raise UserError(
                f"SharedBackboneReward needs PPO with an adapted critic, or HydraPPO: "
                f"{type(algorithm).__name__} trains no reward model's base."
            )
        self.algorithm = algorithm

    def all_roles(self) -> list[Role]:
        """The base that judges."""
        return [self.algorithm.reward_role()]

    def __call__(self, batch: Experience) -> Tensor:
        """[N] scores; an error ends the run at once, since ranks compute them together."""
        try:
            return self.algorithm.base_scores(batch)
        except ValueError as error:
            raise RewardError(str(error)) from error
