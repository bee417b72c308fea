"""The frozen reference model that a trained policy is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from lit_align.batches import Experience, TextBatch
from lit_align.errors import UserError
from lit_align.models.backbone import Backbone
from lit_align.models.kernels.compile import compile_blocks
from lit_align.models.parallel.offload import ExclusiveOffload
from lit_align.models.policy import Policy
from lit_align.models.roles import Role, single_head_role


class ReferenceModel:
    """A frozen reference: a separate network, or the policy's base with its adapters disabled.

    An algorithm holds this object as `self.reference_model`. A separate network is registered as
    the algorithm's module `reference`, so that Lightning moves it to the device. The object
    itself is not a module and adds nothing to a state dict.

    Args:
        build_network: Builds a reference network. Default: the policy's base if the policy has
            adapters, else a copy of the policy at the start.
        offload_frozen: Keep frozen networks on the CPU between uses.
    """

    network: Policy  # the reference network, or the policy whose base is the reference

    def __init__(
        self, build_network: Callable[[], Policy] | None = None, offload_frozen: bool = True
    ):
        self.build_network = build_network
        self.offload_frozen = offload_frozen
        self.offloaded = ExclusiveOffload([])  # frozen networks, on the device while they are used
        self.fingerprint = 0.0  # sum over the frozen weights of all roles

    def build(self, policy: Policy) -> dict[str, Backbone]:
        """Return {"reference": network}, or {} if the policy's base is the reference.

        Args:
            policy: The policy, not yet sharded.
        """
        self.network = policy  # its base, since `logprobs` disables the adapters
        if self.build_network is None and policy.adapted is not None:
            return {}
        reference = self.build_network() if self.build_network else copy_policy(policy)
        check_same_vocabulary("reference", reference, policy)
        reference.set_temperature(policy.temperature)  # the KL compares equal temperatures
        self.network = reference.requires_grad_(False).eval()
        return {"reference": self.network}

    def register(self, networks: Mapping[str, Backbone], trained: Iterable[str]) -> None:
        """Compute the fingerprint of all networks, and offload the frozen ones between uses.

        Args:
            networks: All networks of the algorithm by role, sharded.
            trained: Roles that train.
        """
        self.fingerprint = sum(network.fingerprint for network in networks.values())
        frozen = [network for role, network in networks.items() if role not in set(trained)]
        self.offloaded = ExclusiveOffload(frozen if self.offload_frozen else [])

    def offload(self) -> None:
        """Move all frozen networks to the CPU. The update does not need them."""
        self.offloaded.offload_all()

    def logprobs(self, batch: Experience | TextBatch) -> Tensor:
        """Return the log-prob of each response token, [n, r] nats."""
        with self.network.adapters.disable_all():
            return self.network.logprobs(batch)

    def role(self, name: str = "reference") -> Role:
        """Return the network without adapters as a role.

        Args:
            name: Name of the role in the table of roles.
        """
        return single_head_role(name, self.network, "off")

    def check_fingerprint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other frozen weights, such as random weights of another seed.

        Args:
            checkpoint: The loaded checkpoint.
        """
        # The sum depends on the order in which ranks add, so a tolerance is needed.
        expected = checkpoint.get("frozen_fingerprint", self.fingerprint)
        if not math.isclose(expected, self.fingerprint, abs_tol=1e-6):
            raise UserError(
                "The reference or another frozen base has other weights than at the start of this "
                "run. Use the same path, or for random weights the same --seed_everything."
            )


def check_same_vocabulary(role: str, network: Backbone, policy: Backbone) -> None:
    """Refuse a network whose vocabulary size differs from the policy's.

    Args:
        role: Role of the network, which is also its setting.
        network: The network to check.
        policy: The policy.
    """
    if network.vocab_size != policy.vocab_size:
        raise UserError(
            f"The {role} {network.name} has {network.vocab_size} tokens in its vocabulary and the "
            f"policy {policy.name} has {policy.vocab_size}. Set --model.{role} to a model with the "
            f"policy's vocabulary."
        )


def copy_policy(policy: Policy) -> Policy:
    """Return a copy of the policy. Compiled blocks are not copied but compiled again."""
    copy = deepcopy(policy)
    # Only the policy needs activation checkpointing: the reference has no backward pass.
    if copy.is_compiled:
        compile_blocks(copy.blocks, uses_checkpointing=False)
    return copy
