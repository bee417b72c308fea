"""Four roles on one frozen base: two adapters are actor and critic (arXiv:2309.00754)."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lit_align.batches import Experience, TextBatch
from lit_align.errors import UserError
from lit_align.models.adapters.lora import LoRA, upcast_modules_to_save
from lit_align.models.generation.decode import Responses
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead
from lit_align.models.roles import Role
from lit_align.models.scalar_head import values_at_last_token, values_before_tokens

ACTOR, CRITIC = "actor", "critic"


class Hydra(PolicyWithRewardHead):
    """A frozen two-headed base with an actor and a critic adapter (arXiv:2309.00754).

    Each method changes the active adapter. Call backward before the next method, because the
    backward pass needs the same adapter.

    With both adapters disabled, the language head is the reference model and the score head is the
    reward model. The value head is the critic's own copy of the score head.

    Args:
        path: Hub id or folder of a two-headed model, as Hydra-SFT saves it.
        lora: Settings of both adapters. Default: rank 128, as in the paper.
    """

    new_weights: ClassVar[tuple[str, ...]] = ()  # the reward head must have been trained
    always_adapted: ClassVar[bool] = True
    is_joint: ClassVar[bool] = False  # actor and critic share one adapter
    critic_adapter: ClassVar[str] = CRITIC  # the adapter that the value head belongs to

    def add_adapters(self, lora: LoRA | None) -> PeftModel:
        """Add two adapters to the network, and a value head.

        Args:
            lora: Settings of both adapters. None: rank 128.
        """
        lora, heads = lora or LoRA(r=128, lora_alpha=128), ["score"]
        if lora.modules_to_save:
            raise UserError(
                f"Hydra does not support lora.modules_to_save, found {lora.modules_to_save}: "
                f"the base model must stay frozen. Remove it."
            )
        actor = lora.peft_config(
            self.task_type, heads if self.is_joint else None, exclude_modules=heads
        )
        adapted = get_peft_model(self.network, actor, adapter_name=ACTOR)
        if not self.is_joint:
            adapted.add_adapter(CRITIC, lora.peft_config("SEQ_CLS", heads, exclude_modules=heads))
        for adapter, settings in adapted.peft_config.items():
            adapted.set_requires_grad(adapter, True)
            settings.exclude_modules = None  # as in `PolicyWithRewardHead.add_adapters`
        return upcast_modules_to_save(adapted)

    def adapter_weights(self, adapter: str) -> list[nn.Parameter]:
        """Return the weights that train with an adapter: low-rank factors and its copy of the head.

        Args:
            adapter: `actor` or `critic`.
        """
        return [
            weight
            for name, weight in self.network.named_parameters()
            if parameter_part(name) == adapter
        ]

    def role(self, name: str, adapter: str, head: str) -> Role:
        """Return a role of this network.

        Args:
            name: Name of the role.
            adapter: Active adapter, or `off` if both are disabled.
            head: Head of the role: language, score or value.
        """
        parts = {"backbone", adapter, head}
        named = self.network.named_parameters()
        return Role(name, self, adapter, head, [p for n, p in named if parameter_part(n) in parts])

    def generate(self, *args: Any, **kwargs: Any) -> Responses:
        """Sample the actor's responses; see `Policy.generate`."""
        self.adapters.set_adapter(ACTOR)
        return super().generate(*args, **kwargs)

    def logprobs_and_entropy(self, batch: Experience | TextBatch) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropy (nats) of the actor, both [N, R].

        While adapters are disabled, the reference model computes them.

        Args:
            batch: N rows with R tokens that can be scored.
        """
        self.adapters.set_adapter(ACTOR)
        return super().logprobs_and_entropy(batch)

    def state_values(self, batch: Experience) -> Tensor:
        """Return the critic's V(s_t) for each response token, [N, R]; 0 where masked.

        Args:
            batch: N rows with responses of R tokens.
        """
        self.adapters.set_adapter(self.critic_adapter)
        return values_before_tokens(
            self(lambda: self.token_scores(self.hidden_states(batch))), batch
        )

    def logprobs_entropy_and_values(self, batch: Experience) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs, entropy (nats) and state values, each [N, R], from one pass.

        Args:
            batch: N rows with responses of R tokens.
        """
        self.adapters.set_adapter(ACTOR)
        logprobs, entropy, values = self(self._logprobs_entropy_and_values, batch)
        return logprobs, entropy, values_before_tokens(values, batch)

    def scores_and_ref_logprobs(self, batch: Experience) -> tuple[Tensor, Tensor]:
        """Return scores [N] and reference log-probs [N, R] (nats) of the base, from one pass.

        Args:
            batch: N rows with responses of R tokens.
        """
        with self.adapters.disable_all():
            logprobs, _, values = self(self._logprobs_entropy_and_values, batch)
        return values_at_last_token(values, batch), logprobs

    def _logprobs_entropy_and_values(self, batch: Experience) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.hidden_states(batch)
        return *self.logprobs_from_hidden(hidden, batch), self.token_scores(hidden)


def parameter_part(name: str) -> str:
    """Return the part of a Hydra that a parameter belongs to: an adapter, `score` or `backbone`.

    Args:
        name: Name of the parameter in the network.

    Example:
        >>> parameter_part("model.layers.0.mlp.up_proj.lora_A.critic.weight")
        'critic'
        >>> parameter_part("score.original_module.weight")
        'score'
    """
    for adapter in (ACTOR, CRITIC):
        if f".{adapter}." in name:
            return adapter
    return "score" if name.startswith("score.") else "backbone"


class JointHydra(Hydra):
    """A Hydra with one adapter for actor and critic (joint Hydra-PPO, arXiv:2309.00754).

    One pass serves both losses, but each loss also changes the other role.
    """

    is_joint = True
    critic_adapter = ACTOR
