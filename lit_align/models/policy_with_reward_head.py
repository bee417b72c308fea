"""A language model that also scores: one trunk, a head for words and a head for the reward."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass  # transformers 5.23

from lit_align.batches import Experience, Pairs, Tokens
from lit_align.models.adapters.lora import LoRA, with_float_heads
from lit_align.models.kernels.packing import scored_places
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import at_last_token


class AutoTwoHeaded(_BaseAutoModelClass):
    """Loads and builds what transformers has no class for, from the same folders."""

    @classmethod
    def from_config(cls, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """Random weights."""
        options.pop("trust_remote_code")
        # what transformers' own auto classes call (transformers 5.23)
        network: PreTrainedModel = two_headed(config)._from_config(config, **options)
        return network

    @classmethod
    def from_pretrained(cls, path: str, *, config: PretrainedConfig, **options: Any) -> Any:
        """The weights of a folder or of the hub; the caller looks at what is missing."""
        return two_headed(config).from_pretrained(path, config=config, **options)


def two_headed(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal class for `config`, with a `score` head beside its language head.

    Its folder is one of a causal model and one of a sequence classifier: each of the two auto
    classes takes the head that it knows.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config.model_type} is no causal language model of transformers' own.")
    causal: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        causal.__init__(self, config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    # the saved configuration names the class: it must be transformers' own
    return type(causal.__name__, (causal,), {"__init__": build})


class TwoHeaded(Policy):
    """A policy with a reward head on its trunk; what Hydra-SFT trains and Hydra-PPO stands on.

    Args:
        path: Hub id or folder: of a two-headed model, or of a language model that gets a new
            reward head.
    """

    auto = AutoTwoHeaded
    new_weights: ClassVar[tuple[str, ...]] = ("score.weight",)
    overrides: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def adapt(self, lora: LoRA | None) -> PeftModel | None:
        """Puts the adapter into the trunk; the reward head trains whole and is saved with it."""
        if lora is None:
            return None
        heads = ["score"]
        settings = lora.settings(self.task, [*(lora.train_fully or []), *heads], exclude=heads)
        adapted = get_peft_model(self.network, settings)
        settings.exclude_modules = None  # peft has listed the layers: where it loads is no head
        return with_float_heads(adapted)

    def judge(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """([n, T-1] nats, [n, 2]): chosen answers' log-probs, and both scores; one pass.

        Log-probs are of the learnt tokens of the chosen text, 0 elsewhere; scores are read at
        the last token of the chosen and of the rejected text.
        """
        judged: tuple[Tensor, Tensor] = self(self._judge, batch.texts())
        return judged

    def _judge(self, texts: Tokens) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(texts)
        logprobs, _ = self.chosen_in(hidden[::2], texts.rows(range(0, len(texts), 2)))
        return logprobs, at_last_token(self.numbers(hidden), texts).view(-1, 2)

    def chosen_in(self, hidden: Tensor, batch: Experience | Tokens) -> tuple[Tensor, Tensor]:
        """([N, R], [N, R]) nats: log-prob and entropy, of hidden states [N, T, H]."""
        states, places = scored_places(batch)
        return self.chosen(hidden.flatten(0, 1).index_select(0, states), places, batch)

    def numbers(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, T, H] -> [N, T], by the score head that is switched on."""
        numbers: Tensor = self.network.score(hidden.to(self.network.score.weight.dtype)).squeeze(-1)
        return numbers.float()
