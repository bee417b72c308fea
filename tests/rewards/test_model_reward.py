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
    """A reward model whose vocabulary is WORDS, with its tokenizer."""
    where = tmp_path_factory.mktemp("reward_model")
    words = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(where)
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny()).save_pretrained(where)
    return str(where)


def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
    )


class LastToken:
    """Stands for the model: the score is the id of the last real token."""

    def __init__(self, path: str, dtype: str | None = None):
        self.passes: list[list[int]] = []

    def eval(self) -> "LastToken":
        return self

    def requires_grad_(self, wanted: bool) -> "LastToken":
        return self

    def to(self, device: torch.device) -> "LastToken":
        return self

    def parameters(self) -> list[Tensor]:
        return []

    def scores(self, tokens: TextBatch) -> Tensor:
        assert tokens.token_mask.sum(1).tolist() == tokens.lengths
        self.passes.append(tokens.lengths)
        last = torch.tensor(tokens.lengths).unsqueeze(1) - 1
        return tokens.tokens.gather(1, last).squeeze(1).bfloat16()


def answered(prompts: list, completions: list, truncated: list[bool]) -> Experience:
    return Experience(
        {"prompt": prompts, "completion": completions},
        responses=torch.zeros(len(prompts), 1, dtype=torch.long),
        truncated=truncated,
    )


@pytest.fixture
def stubbed(folder, monkeypatch):
    monkeypatch.setattr(learned, "RewardNetwork", LastToken)

    def make(**settings) -> ModelReward:
        reward = ModelReward(folder, **settings)
        reward.setup(None)
        return reward

    return make


def test_text_is_read_in_the_reward_model_s_tokens_with_a_stop_where_it_ended(stubbed):
    batch = answered(["a b", "a"], [" c", " d d"], truncated=[False, True])
    assert stubbed().encode(batch) == [[2, 3, 4, 1], [2, 5, 5]]
    assert stubbed()(batch).tolist() == [1.0, 5.0]


def test_conversations_go_through_the_reward_model_s_template(stubbed):
    prompt, completion = (
        [{"role": "user", "content": "a b"}],
        [{"role": "assistant", "content": "c"}],
    )
    batch = answered([prompt] * 2, [completion] * 2, truncated=[False, True])
    texts = stubbed(chat_template=TEMPLATE).encode(batch)
    assert texts == [[6, 2, 3, 7, 4, 1], [6, 2, 3, 7, 4]]


def test_a_long_text_loses_its_start(stubbed):
    batch = answered(["a b c"], [" d"], truncated=[False])
    assert stubbed(max_tokens=3).encode(batch) == [[4, 5, 1]]


def test_texts_of_similar_length_are_scored_together_and_come_back_in_order(stubbed):
    reward = stubbed(tokens_per_pass=6)
    batch = answered(["a"] * 3, [" b", " b b b d", " c"], truncated=[True] * 3)
    assert reward(batch).tolist() == [3.0, 5.0, 4.0]
    assert reward.network.passes == [[5], [2, 2]]


def test_scores_are_the_classifier_s_whatever_the_passes(folder):
    batch = answered(["a", "a b c"], [" b", " d"], truncated=[False, False])
    network = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = [torch.tensor([[2, 3, 1]]), torch.tensor([[2, 3, 4, 5, 1]])]
    with torch.no_grad():
        expected = [network(each).logits.item() for each in ids]
        for tokens_per_pass in (1, 100):
            reward = ModelReward(folder, tokens_per_pass=tokens_per_pass)
            reward.setup(None)
            assert reward(batch).tolist() == pytest.approx(expected, abs=1e-6)
    assert not any(weight.requires_grad for weight in reward.network.parameters())


def test_it_sleeps_between_its_calls(folder, monkeypatch):
    """As if the CPU were another device."""
    batch = answered(["a", "a b c"], [" b", " d"], truncated=[False, False])
    reward = ModelReward(folder)
    reward.setup(None)
    awake = reward(batch).tolist()
    assert not reward.offloaded_weights.devices
    monkeypatch.setattr(offload, "can_offload", lambda tensor: True)
    asleep, scores = [], reward.network.scores

    def watched(tokens):
        asleep.append(len(reward.offloaded_weights.devices))
        return scores(tokens)

    monkeypatch.setattr(reward.network, "scores", watched)
    assert [reward(batch).tolist() for _ in range(3)] == [awake] * 3
    assert asleep == [0, 0, 0]
    assert len(reward.offloaded_weights.devices) == len(list(reward.network.parameters()))


def test_setup_loads_once(folder):
    reward = ModelReward(folder)
    reward.setup(None)
    first = reward.network
    reward.setup(None)
    assert reward.network is first


def test_a_language_model_has_no_head_to_score_with(folder, tmp_path):
    ModelReward(folder)
    LlamaForCausalLM(tiny()).save_pretrained(tmp_path)
    learned.load_tokenizer(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is 'score.weight'"):
        ModelReward(str(tmp_path)).setup(None)


def test_there_is_room_for_a_token():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, not 0"):
        ModelReward("somewhere", max_tokens=0)
