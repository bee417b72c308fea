"""A language model with a second head for the reward, on one backbone."""

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
    """Loader for a causal language model with a `score` head, which transformers has no class for.

    It reads the folders of causal language models and of sequence classifiers.
    """

    @classmethod
    def from_config(cls, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
        """Build a network with random weights.

        Args:
            config: Configuration of a causal language model.
            **options: As transformers' auto classes take them, and trust_remote_code.
        """
        options.pop("trust_remote_code")
        # private; the auto classes of transformers call it, too (transformers 5.23)
        network: PreTrainedModel = class_with_reward_head(config)._from_config(config, **options)
        return network

    @classmethod
    def from_pretrained(cls, path: str, *, config: PretrainedConfig, **options: Any) -> Any:
        """Load the weights of a folder or of the hub. The caller checks the missing ones.

        Args:
            path: Hub id or folder.
            config: Configuration of a causal language model.
            **options: As `PreTrainedModel.from_pretrained` takes them.
        """
        return class_with_reward_head(config).from_pretrained(path, config=config, **options)


def class_with_reward_head(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return transformers' causal class for `config`, with a second head named `score`.

    A saved folder loads as a causal model and as a sequence classifier. Each of the two auto
    classes of transformers loads only its own head.

    Args:
        config: Configuration of a causal language model.

    Example:
        >>> from transformers import LlamaConfig
        >>> class_with_reward_head(LlamaConfig()).__name__
        'LlamaForCausalLM'
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"transformers has no causal language model of type {config.model_type}. "
            f"Use a decoder-only architecture."
        )
    causal: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        causal.__init__(self, config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    # the saved configuration has the class's name, so it must be a name that transformers knows
    return type(causal.__name__, (causal,), {"__init__": build})


class PolicyWithRewardHead(Policy):
    """A policy with a reward head on its backbone. Hydra-SFT trains it, Hydra-PPO starts from it.

    Args:
        path: Hub id or folder of a two-headed model, or of a language model that gets a new
            reward head. Default: random weights from `config`.
    """

    auto_class = AutoPolicyWithRewardHead
    new_weights: ClassVar[tuple[str, ...]] = ("score.weight",)
    config_overrides: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def add_adapters(self, lora: LoRA | None) -> PeftModel | None:
        """Add the adapter to the backbone. The reward head trains fully and is saved with it.

        Args:
            lora: Settings of the adapter. None: all weights train.
        """
        if lora is None:
            return None
        heads = ["score"]
        settings = lora.peft_config(
            self.task_type, [*(lora.modules_to_save or []), *heads], exclude_modules=heads
        )
        adapted = get_peft_model(self.network, settings)
        # peft has resolved the adapted layers by now. A saved exclusion would name a head that the
        # network which loads the adapter may not have.
        settings.exclude_modules = None
        return upcast_modules_to_save(adapted)

    def score_pairs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the log-probs of the chosen texts and the scores of both, from one pass.

        Args:
            batch: B pairs of texts of T tokens.

        Returns:
            Log-probs [B, T-1] in nats of the chosen text's target tokens, 0 elsewhere. Scores
            [B, 2] at the last token of the chosen and of the rejected text.
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
        """Return log-prob and entropy (nats) at each scored token, both [N, R]; 0 elsewhere.

        Args:
            hidden: [N, T, H] last hidden states of the batch.
            batch: N texts of T tokens, of which R can be scored.
        """
        state_index, token_index = scored_positions(batch)
        return self.token_logprobs(
            hidden.flatten(0, 1).index_select(0, state_index), token_index, batch
        )

    def token_scores(self, hidden: Tensor) -> Tensor:
        """Return the output of the active score head at each token, [N, T] in float32.

        Args:
            hidden: [N, T, H] last hidden states.
        """
        token_scores: Tensor = self.network.score(
            hidden.to(self.network.score.weight.dtype)
        ).squeeze(-1)
        return token_scores.float()
