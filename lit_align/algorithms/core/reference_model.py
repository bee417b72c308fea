"""What every algorithm shares that stays near a reference: the policy, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor

from lit_align.algorithms.core.base import Algorithm
from lit_align.batches import Experience, Tokens
from lit_align.models.backbone import Backbone
from lit_align.models.kernels.compile import compile_blocks
from lit_align.models.parallel.offload import Turns
from lit_align.models.policy import Policy
from lit_align.models.roles import Role, whole


class Referenced(Algorithm):
    """A policy that trains, and a frozen reference that it is compared with.

    Args:
        policy: The model to align.
        reference: The frozen model to stay near; by default the policy as it was at the start,
            which for LoRA is its base with the adapter switched off.
        park: Keep frozen models on the CPU between uses; without, they stay on the GPU, which
            spares the copies where there is room.
    """

    policy: Policy
    reference: Policy  # where the policy's own base cannot serve

    def __init__(
        self,
        policy: Callable[[], Policy],
        reference: Callable[[], Policy] | None = None,
        park: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.parks = park
        self.guests = Turns([])  # frozen networks, on the device while they are called
        self.build_policy, self.build_reference = policy, reference
        self.frozen_fingerprint = 0.0  # of all roles' frozen weights

    @property
    def roles(self) -> dict[str, Backbone]:
        """The policy; algorithms with a critic add it."""
        return {"policy": self.policy}

    def configure_model(self) -> None:
        """Builds the roles, once: Lightning asks before every fit and validate."""
        if "policy" in self._modules:
            return
        with self.phase("load"):
            networks = {role: self.placed(network) for role, network in self.build().items()}
            self.frozen_fingerprint = sum(network.fingerprint for network in networks.values())
            for role, network in networks.items():
                setattr(self, role, network)
            frozen = [network for role, network in networks.items() if role not in self.roles]
            self.guests = Turns(frozen if self.parks else [])

    def sleep(self) -> None:
        """Frozen networks leave the device: the update does not need them."""
        self.guests.come(None)

    def on_train_start(self) -> None:
        """Lightning has put all networks on the device."""
        self.sleep()

    def build(self) -> dict[str, Backbone]:
        """The networks by role, whole: the policy and, where its base cannot serve, a reference."""
        policy = self.build_policy()
        if self.build_reference is None and policy.adapted is not None:
            return {"policy": policy}
        reference = self.build_reference() if self.build_reference else copied(policy)
        same_vocabulary("reference", reference, policy)
        reference.set_temperature(policy.temperature)  # a KL of two distributions sharpened alike
        return {"policy": policy, "reference": reference.requires_grad_(False).eval()}

    @property
    def base(self) -> Policy:
        """What is the reference while its adapters are off."""
        return self.reference if "reference" in self._modules else self.policy

    def cast(self) -> list[Role]:
        """Adds the reference."""
        return [*super().cast(), self.base_role("reference")]

    def base_role(self, name: str) -> Role:
        """The base in a role of its own."""
        return whole(name, self.base, "off")

    def reference_logprobs(self, batch: Experience | Tokens) -> Tensor:
        """[n, r] nats: from the reference, or from the policy's base where they share it."""
        with self.base.adapters.disabled():
            return self.base.logprobs(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what tells frozen weights from others; they stay where they are."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["frozen_fingerprint"] = self.frozen_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other frozen weights, such as random ones of another seed."""
        super().on_load_checkpoint(checkpoint)
        found = self.frozen_fingerprint
        expected = checkpoint.get("frozen_fingerprint", found)
        if self.trainer.training and not math.isclose(expected, found, abs_tol=1e-6):
            raise ValueError(
                "The reference or another frozen base has other weights than when this run began: "
                "resume with the same path, or for random weights with the same seed_everything."
            )


def same_vocabulary(role: str, network: Backbone, policy: Backbone) -> None:
    """Roles that read the policy's tokens must know as many of them."""
    if network.vocabulary != policy.vocabulary:
        raise ValueError(
            f"The {role} {network.name} knows {network.vocabulary} tokens and the policy "
            f"{policy.name} {policy.vocabulary}: they must share one vocabulary."
        )


def copied(policy: Policy) -> Policy:
    """The same network again; what is compiled is not copied, and is compiled anew."""
    copy = deepcopy(policy)
    if copy.compiles:
        compile_blocks(copy.blocks, recomputed=False)
    return copy
