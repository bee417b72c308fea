"""Reward models: texts in their own tokens, passes, offloading and refusals."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lit_align.batches import Experience, TextBatch
from lit_align.errors import UserError
from lit_align.models.parallel import offload
from lit_align.rewards import reward_model as learned
from lit_align.rewards.reward_model import ModelReward

WORDS = ["<unk>", "</s>", "a", "b", "c", "d", "User", "Bot"]
TEMPLATE = (
    "{% for turn in messages %}{{ 'User ' if turn.role == 'user' else 'Bot ' }}"
    "{{ turn.content }}{{ ' </s> ' if turn.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Return the path of a reward model with the vocabulary WORDS, and its tokenizer."""
    where = tmp_path_factory.mktemp("reward_model")
    words = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(where)
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config()).save_pretrained(where)
    return str(where)


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
    )


class LastTokenNetwork:
    """A reward model that scores a text by the id of its last token."""

    def __init__(self, path: str, dtype: str | None = None):
        self.passes: list[list[int]] = []

    def eval(self) -> "LastTokenNetwork":
        return self

    def requires_grad_(self, requires_grad: bool) -> "LastTokenNetwork":
        return self

    def to(self, device: torch.device) -> "LastTokenNetwork":
        return self

    def parameters(self) -> list[Tensor]:
        return []

    def scores(self, tokens: TextBatch) -> Tensor:
        assert tokens.token_mask.sum(1).tolist() == tokens.lengths
        self.passes.append(tokens.lengths)
        last = torch.tensor(tokens.lengths).unsqueeze(1) - 1
        return tokens.tokens.gather(1, last).squeeze(1).bfloat16()


def batch_of(prompts: list, completions: list, truncated: list[bool]) -> Experience:
    return Experience(
        {"prompt": prompts, "completion": completions},
        responses=torch.zeros(len(prompts), 1, dtype=torch.long),
        truncated=truncated,
    )


@pytest.fixture
def stubbed(folder, monkeypatch):
    monkeypatch.setattr(learned, "RewardNetwork", LastTokenNetwork)

    def make(**settings) -> ModelReward:
        reward = ModelReward(folder, **settings)
        reward.setup(None)
        return reward

    return make


def test_a_complete_response_ends_with_the_reward_models_stop_token(stubbed):
    batch = batch_of(["a b", "a"], [" c", " d d"], truncated=[False, True])
    assert stubbed().encode(batch) == [[2, 3, 4, 1], [2, 5, 5]]
    assert stubbed()(batch).tolist() == [1.0, 5.0]


def test_conversations_use_the_reward_models_chat_template(stubbed):
    prompt, completion = (
        [{"role": "user", "content": "a b"}],
        [{"role": "assistant", "content": "c"}],
    )
    batch = batch_of([prompt] * 2, [completion] * 2, truncated=[False, True])
    texts = stubbed(chat_template=TEMPLATE).encode(batch)
    assert texts == [[6, 2, 3, 7, 4, 1], [6, 2, 3, 7, 4]]


def test_a_long_text_is_cut_at_its_start(stubbed):
    batch = batch_of(["a b c"], [" d"], truncated=[False])
    assert stubbed(max_tokens=3).encode(batch) == [[4, 5, 1]]


def test_texts_of_similar_length_share_a_pass_and_scores_keep_their_order(stubbed):
    reward = stubbed(tokens_per_pass=6)
    batch = batch_of(["a"] * 3, [" b", " b b b d", " c"], truncated=[True] * 3)
    assert reward(batch).tolist() == [3.0, 5.0, 4.0]
    assert reward.network.passes == [[5], [2, 2]]


def test_scores_equal_those_of_the_classifier_for_any_passes(folder):
    batch = batch_of(["a", "a b c"], [" b", " d"], truncated=[False, False])
    network = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = [torch.tensor([[2, 3, 1]]), torch.tensor([[2, 3, 4, 5, 1]])]
    with torch.no_grad():
        expected = [network(each).logits.item() for each in ids]
        for tokens_per_pass in (1, 100):
            reward = ModelReward(folder, tokens_per_pass=tokens_per_pass)
            reward.setup(None)
            assert reward(batch).tolist() == pytest.approx(expected, abs=1e-6)
    assert not any(weight.requires_grad for weight in reward.network.parameters())


def test_the_weights_are_offloaded_between_calls(folder, monkeypatch):
    """The CPU is treated as another device."""
    batch = batch_of(["a", "a b c"], [" b", " d"], truncated=[False, False])
    reward = ModelReward(folder)
    reward.setup(None)
    expected = reward(batch).tolist()
    assert not reward.offloaded_weights.devices
    monkeypatch.setattr(offload, "can_offload", lambda tensor: True)
    num_offloaded, scores = [], reward.network.scores

    def record_scores(tokens):
        num_offloaded.append(len(reward.offloaded_weights.devices))
        return scores(tokens)

    monkeypatch.setattr(reward.network, "scores", record_scores)
    assert [reward(batch).tolist() for _ in range(3)] == [expected] * 3
    assert num_offloaded == [0, 0, 0]
    assert len(reward.offloaded_weights.devices) == len(list(reward.network.parameters()))


def test_setup_loads_once(folder):
    reward = ModelReward(folder)
    reward.setup(None)
    first = reward.network
    reward.setup(None)
    assert reward.network is first


def test_a_language_model_without_a_reward_head_is_refused(folder, tmp_path):
    ModelReward(folder)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    learned.load_tokenizer(folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks 1 weights, the first is 'score.weight'"):
        ModelReward(str(tmp_path)).setup(None)


def test_max_tokens_of_zero_is_refused():
    with pytest.raises(UserError, match=r"max_tokens must be at least 1, found 0. Set --reward"):
        ModelReward("somewhere", max_tokens=0)
