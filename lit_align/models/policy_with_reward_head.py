"""A language model that also scores: one trunk, a head for words and a head for the reward."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass  # transformers 5.23

from lit_align.batches import Experience, PreferenceBatch, TextBatch
from lit_align.errors import UserError
from lit_align.models.adapters.lora import LoRA, upcast_modules_to_save
from lit_align.models.kernels.packing import scored_positions
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import values_at_last_token


class AutoPolicyWithRewardHead(_BaseAutoModelClass):
    """Loads and builds what transformers has no class for, from the same folders."""

    @classmethod
    def from_config(cls, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """Random weights."""
        options.pop("trust_remote_code")
        # what transformers' own auto_class classes call (transformers 5.23)
        network: PreTrainedModel = class_with_reward_head(config)._from_config(config, **options)
        return network

    @classmethod
    def from_pretrained(cls, path: str, *, config: PretrainedConfig, **options: Any) -> Any:
        """The weights of a folder or of the hub; the caller looks at what is missing."""
        return class_with_reward_head(config).from_pretrained(path, config=config, **options)


def class_with_reward_head(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal class for `config`, with a `score` head beside its language head.

    Its folder is one of a causal model and one of a sequence classifier: each of the two auto
    classes takes the head that it knows.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{config.model_type} is no causal language model of transformers' own.")
    causal: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        causal.__init__(self, config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    # the saved configuration names the class: it must be transformers' own
    return type(causal.__name__, (causal,), {"__init__": build})


class PolicyWithRewardHead(Policy):
    """A policy with a reward head on its trunk; what Hydra-SFT trains and Hydra-PPO stands on.

    Args:
        path: Hub id or folder: of a two-headed model, or of a language model that gets a new
            reward head.
    """

    auto_class = AutoPolicyWithRewardHead
    new_weights: ClassVar[tuple[str, ...]] = ("score.weight",)
    config_overrides: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def add_adapters(self, lora: LoRA | None) -> PeftModel | None:
        """Puts the adapter into the trunk; the reward head trains whole and is saved with it."""
        if lora is None:
            return None
        heads = ["score"]
        settings = lora.peft_config(
            self.task_type, [*(lora.modules_to_save or []), *heads], exclude_modules=heads
        )
        adapted = get_peft_model(self.network, settings)
        settings.exclude_modules = None  # peft has listed the layers: where it loads is no head
        return upcast_modules_to_save(adapted)

    def score_pairs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """([n, T-1] nats, [n, 2]): chosen answers' log-probs, and both scores; one pass.

        Log-probs are of the learnt tokens of the chosen text, 0 elsewhere; scores are read at
        the last token of the chosen and of the rejected text.
        """
        result: tuple[Tensor, Tensor] = self(self._score_pairs, batch.texts())
        return result

    def _score_pairs(self, texts: TextBatch) -> tuple[Tensor, Tensor]:
        hidden = self.hidden_states(texts)
        logprobs, _ = self.logprobs_from_hidden(hidden[::2], texts.rows(range(0, len(texts), 2)))
        return logprobs, values_at_last_token(self.token_scores(hidden), texts).view(-1, 2)

    def logprobs_from_hidden(
        self, hidden: Tensor, batch: Experience | TextBatch
    ) -> tuple[Tensor, Tensor]:
        """([N, R], [N, R]) nats: log-prob and entropy, of hidden states [N, T, H]."""
        state_index, token_index = scored_positions(batch)
        return self.token_logprobs(
            hidden.flatten(0, 1).index_select(0, state_index), token_index, batch
        )

    def token_scores(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, T, H] -> [N, T], by the score head that is switched on."""
        token_scores: Tensor = self.network.score(
            hidden.to(self.network.score.weight.dtype)
        ).squeeze(-1)
        return token_scores.float()
