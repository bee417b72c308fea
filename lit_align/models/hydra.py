"""Four roles on one trunk: adapters make the actor and the critic, the base is both others."""

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
    """A frozen two-headed base; adapters make it the actor and the critic (arXiv:2309.00754).

    Both off, the language head is the reference and the score head the reward model. The value
    head is the critic's own copy of the score head. Each method puts on the adapter that it
    needs and leaves it on, since backward needs it, too: run backward before the next call.

    Args:
        path: Hub id or folder of a two-headed model, as Hydra-SFT makes it.
        lora: Size of the adapters; by default the paper's rank, 128.
    """

    new_weights: ClassVar[tuple[str, ...]] = ()  # the reward head must have been trained
    always_adapted: ClassVar[bool] = True
    is_joint: ClassVar[bool] = False  # actor and critic share one adapter
    critic_adapter: ClassVar[str] = CRITIC  # the adapter that the value head belongs to

    def add_adapters(self, lora: LoRA | None) -> PeftModel:
        """Puts two adapters into the network, and a value head beside the reward head."""
        lora, heads = lora or LoRA(r=128, lora_alpha=128), ["score"]
        if lora.modules_to_save:
            raise UserError(
                f"Hydra's base serves four roles and stays as it is: "
                f"leave out lora.modules_to_save "
                f"{lora.modules_to_save}."
            )
        actor = lora.peft_config(
            self.task_type, heads if self.is_joint else None, exclude_modules=heads
        )
        adapted = get_peft_model(self.network, actor, adapter_name=ACTOR)
        if not self.is_joint:
            adapted.add_adapter(CRITIC, lora.peft_config("SEQ_CLS", heads, exclude_modules=heads))
        for adapter, settings in adapted.peft_config.items():
            adapted.set_requires_grad(adapter, True)
            settings.exclude_modules = None  # peft has listed the layers: where it loads is no head
        return upcast_modules_to_save(adapted)

    def adapter_weights(self, adapter: str) -> list[nn.Parameter]:
        """What trains with an adapter: its low-rank factors, and its copy of the head."""
        return [
            weight
            for name, weight in self.network.named_parameters()
            if parameter_part(name) == adapter
        ]

    def role(self, name: str, adapter: str, head: str) -> Role:
        """A role on this network.

        Args:
            name: Of the role.
            adapter: The one that is on, or `off`.
            head: language, score or value.
        """
        parts = {"trunk", adapter, head}
        named = self.network.named_parameters()
        return Role(name, self, adapter, head, [p for n, p in named if parameter_part(n) in parts])

    def generate(self, *args: Any, **kwargs: Any) -> Responses:
        """The actor's answers."""
        self.adapters.set_adapter(ACTOR)
        return super().generate(*args, **kwargs)

    def logprobs_and_entropy(self, batch: Experience | TextBatch) -> tuple[Tensor, Tensor]:
        """([N, R], [N, R]) nats: log-probs and entropy of the actor, or of the base."""
        self.adapters.set_adapter(ACTOR)
        return super().logprobs_and_entropy(batch)

    def state_values(self, batch: Experience) -> Tensor:
        """[N, R] the critic's number before each token is chosen; 0 off the mask."""
        self.adapters.set_adapter(self.critic_adapter)
        return values_before_tokens(
            self(lambda: self.token_scores(self.hidden_states(batch))), batch
        )

    def logprobs_entropy_and_values(self, batch: Experience) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, entropy (nats) and state values, each [N, R], from one pass of one adapter."""
        self.adapters.set_adapter(ACTOR)
        logprobs, entropy, values = self(self._logprobs_entropy_and_values, batch)
        return logprobs, entropy, values_before_tokens(values, batch)

    def scores_and_ref_logprobs(self, batch: Experience) -> tuple[Tensor, Tensor]:
        """([N], [N, R]): scores and the reference's log-probs (nats), from one pass."""
        with self.adapters.disabled():
            logprobs, _, values = self(self._logprobs_entropy_and_values, batch)
        return values_at_last_token(values, batch), logprobs

    def _logprobs_entropy_and_values(self, batch: Experience) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.hidden_states(batch)
        return *self.logprobs_from_hidden(hidden, batch), self.token_scores(hidden)


def parameter_part(name: str) -> str:
    """Which part of a Hydra a parameter belongs to: an adapter, the score head or the trunk."""
    for adapter in (ACTOR, CRITIC):
        if f".{adapter}." in name:
            return adapter
    return "score" if name.startswith("score.") else "trunk"


class JointHydra(Hydra):
    """One adapter for actor and critic: one pass for both, and they disturb each other."""

    is_joint = True
    critic_adapter = ACTOR
