"""The policy samples responses and scores their tokens by one distribution."""

import json
import math

import pytest
import torch
from tiny_models import TINY

from lit_align.batches import Experience, TextBatch
from lit_align.errors import UserError
from lit_align.functional.masks import through_first
from lit_align.models.adapters.lora import LoRA
from lit_align.models.generation.decode import SamplingParams, filter_top_k_top_p, sample_tokens
from lit_align.models.policy import Policy


def respond(policy, prompts, greedy=(False,) * 4, temperature_noise=7, length=6):
    """Return four prompts with responses, as the callback `Rollout` samples them."""
    noise = torch.rand(4, length, generator=torch.Generator().manual_seed(temperature_noise))
    batch = prompts.repeat_interleave(1)
    responses = policy.eval().generate(batch, noise, greedy, [2], 0, SamplingParams())
    batch.responses, batch.sampling_logprobs = responses
    batch.response_mask = through_first(batch.responses, [2])
    batch.response_lengths = batch.response_mask.sum(-1).tolist()
    return batch


def shifted(batch, left, right):
    """Return the same rows with more padding on the left and right."""
    pad = torch.nn.functional.pad
    wider = Experience(batch.columns, **batch.fields())
    wider.prompts = pad(batch.prompts, (left, 0), value=0)
    wider.prompt_mask = pad(batch.prompt_mask, (left, 0), value=False)
    wider.responses = pad(batch.responses, (0, right), value=0)
    wider.response_mask = pad(batch.response_mask, (0, right), value=False)
    return wider


def test_logprobs_equal_the_networks_own_softmax(tiny_policy, prompts):
    batch = respond(tiny_policy, prompts)
    row = batch.rows([1])  # the longest prompt: no padding in front
    length = row.response_lengths[0]
    ids = torch.cat([row.prompts, row.responses[:, :length]], 1)
    logits = tiny_policy.network(input_ids=ids).logits[:, 4:-1].log_softmax(-1)
    expected = logits.gather(-1, row.responses[:, :length].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(tiny_policy.logprobs(row)[:, :length], expected)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (5, 7)])
def test_logprobs_do_not_depend_on_padding(tiny_policy, prompts, left, right):
    batch = respond(tiny_policy, prompts)
    plain = tiny_policy.logprobs(batch)
    wide = tiny_policy.logprobs(shifted(batch, left, right))[:, : plain.shape[1]]
    mask = batch.response_mask
    torch.testing.assert_close(wide[mask], plain[mask], atol=1e-5, rtol=0)


def test_logprobs_of_a_row_do_not_depend_on_other_rows(tiny_policy, prompts):
    batch = respond(tiny_policy, prompts)
    together = tiny_policy.logprobs(batch)
    for row in range(4):
        alone = batch.rows([row]).trim_padding()
        mask = alone.response_mask
        part = together[row : row + 1, : mask.shape[1]]
        torch.testing.assert_close(tiny_policy.logprobs(alone)[mask], part[mask], atol=1e-5, rtol=0)


def test_sampling_logprobs_equal_scoring_logprobs(prompts):
    torch.manual_seed(0)
    policy = Policy(config=dict(TINY), temperature=0.7)
    batch = respond(policy, prompts)
    mask = batch.response_mask
    scored = policy.logprobs(batch)
    torch.testing.assert_close(scored[mask], batch.sampling_logprobs[mask], atol=1e-4, rtol=0)


def test_greedy_rows_take_the_most_likely_token_for_any_noise(tiny_policy, prompts):
    one = respond(tiny_policy, prompts, greedy=(True,) * 4, temperature_noise=1)
    two = respond(tiny_policy, prompts, greedy=(True,) * 4, temperature_noise=2)
    assert torch.equal(one.responses, two.responses)
    is_top1 = tiny_policy.top1_correct(one)
    assert is_top1[one.response_mask].all()


def test_greedy_and_sampled_rows_can_be_mixed_in_one_call(tiny_policy, prompts):
    mixed = respond(tiny_policy, prompts, greedy=(True, False, True, False))
    greedy = respond(tiny_policy, prompts, greedy=(True,) * 4)
    sampled = respond(tiny_policy, prompts)
    assert torch.equal(mixed.responses[::2], greedy.responses[::2])
    assert torch.equal(mixed.responses[1::2], sampled.responses[1::2])


def test_a_response_is_padded_after_its_stop_if_pad_is_a_stop_token(tiny_policy, prompts):
    noise = torch.rand(4, 12, generator=torch.Generator().manual_seed(3))
    stops = list(range(2, 18))  # half of the vocabulary: every row stops early
    tokens, logprobs = tiny_policy.eval().generate(
        prompts, noise, [False] * 4, stops, 2, SamplingParams()
    )
    mask = through_first(tokens, stops)
    assert (mask.sum(-1) < 12).all()
    assert (tokens[~mask] == 2).all()
    assert (logprobs[~mask] == 0).all()


def test_noise_is_the_quantile_of_the_sampled_token():
    probs = torch.tensor([[0.2, 0.5, 0.3]]).expand(5, 3)
    noise = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71])
    greedy = torch.zeros(5, dtype=torch.bool)
    assert sample_tokens(probs.log(), noise, greedy, SamplingParams()).tolist() == [0, 0, 1, 1, 2]
    assert sample_tokens(probs.log(), noise, ~greedy, SamplingParams()).tolist() == [1] * 5


def test_sampling_frequencies_equal_the_probabilities():
    probs = torch.tensor([0.6, 0.35, 0.05]).expand(200_000, 3)
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    tokens = sample_tokens(
        probs.log(), noise, torch.zeros(200_000, dtype=torch.bool), SamplingParams()
    )
    frequencies = tokens.bincount(minlength=3) / 200_000
    assert (frequencies - probs[0]).abs().max() < 0.005  # over four standard errors


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    logprobs = torch.tensor([[0.6, 0.35, 0.05]]).log()
    assert filter_top_k_top_p(logprobs, SamplingParams(top_k=1)).tolist()[0][1:] == [0.0, 0.0]
    kept = filter_top_k_top_p(logprobs, SamplingParams(top_p=0.9))
    torch.testing.assert_close(kept, torch.tensor([[0.6, 0.35, 0.0]]))


def test_temperature_divides_the_logits(tiny_policy, prompts):
    batch = respond(tiny_policy, prompts)
    hot = Policy(config=dict(TINY), temperature=2.0)
    hot.load_state_dict(tiny_policy.state_dict())
    logits = hot.network(input_ids=batch.rows([1]).tokens).logits[:, 4:-1] / 2
    expected = logits.log_softmax(-1).gather(-1, batch.rows([1]).responses.unsqueeze(-1))
    torch.testing.assert_close(hot.logprobs(batch.rows([1])), expected.squeeze(-1))


def test_a_disabled_adapter_gives_the_base(prompts):
    torch.manual_seed(0)
    policy = Policy(config=dict(TINY), lora=LoRA(r=2, lora_alpha=4))
    batch = respond(policy, prompts)
    before = policy.logprobs(batch)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    assert (policy.logprobs(batch) - before).abs().max() > 0.1
    with policy.adapters.disable_all():
        torch.testing.assert_close(policy.logprobs(batch), before)
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_dropout_is_off(prompts):
    policy = Policy(
        config={"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    )
    batch = respond(policy, prompts)
    policy.train()
    assert torch.equal(policy.logprobs(batch), policy.logprobs(batch))


@pytest.mark.parametrize(
    "special",
    [
        {"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 0.05},
        {"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 30.0},
        {"model_type": "granite", "logits_scaling": 8.0},
    ],
)
def test_capped_or_scaled_logits_are_refused(special):
    config = {**TINY, **special, "initializer_range": 0.2}
    with pytest.raises(ValueError, match="soft-capped or scaled logits are not supported"):
        Policy(config=config)


def test_a_policy_needs_a_path_or_a_config():
    with pytest.raises(ValueError, match="has neither path nor config"):
        Policy()
    with pytest.raises(UserError, match=r"\./nowhere: no such folder"):
        Policy("./nowhere")
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Policy(config=dict(TINY), temperature=0.0)


def test_transformers_loads_a_saved_policy(tiny_policy, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_policy.save(tmp_path)
    ids = torch.arange(3, 9)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, tiny_policy.network(ids).logits)
    assert (tmp_path / "model.safetensors").is_file()
    again = Policy(str(tmp_path))
    assert all(map(torch.equal, again.state_dict().values(), tiny_policy.state_dict().values()))


def test_an_adapters_folder_is_merged_into_its_base(tmp_path, tiny_policy, prompts):
    tiny_policy.save(tmp_path / "base")
    policy = Policy(str(tmp_path / "base"), lora=LoRA(r=2, lora_alpha=4))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    policy.save(tmp_path / "adapter")
    merged = Policy(str(tmp_path / "adapter"))
    batch = respond(policy, prompts)
    torch.testing.assert_close(merged.logprobs(batch), policy.logprobs(batch))
    assert merged.adapted is None
    assert all(weight.requires_grad for weight in merged.parameters())


def test_a_wrong_data_type_and_a_folder_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown dtype flaot32\. Use float32"):
        Policy(config=dict(TINY), dtype="flaot32")
    with pytest.raises(ValueError, match="could not be loaded: "):
        Policy(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "lama from random weights could not be built: Unrecognized"),
        ({"hidden_size": 33}, r"hidden size \(33\) is not a multiple of the number of attention"),
        ({"vocab_size": "many"}, "Field 'vocab_size' expected int, got str"),
    ],
)
def test_an_impossible_architecture_is_refused_in_one_short_line(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        Policy(config={**TINY, **fields})
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 300


def test_stop_ids_are_those_of_the_generation_config(tiny_policy):
    assert tiny_policy.stop_ids == [2]
    tiny_policy.network.generation_config.eos_token_id = [2, 5]
    assert tiny_policy.stop_ids == [2, 5]


def test_top1_correct_marks_the_most_likely_tokens(tiny_policy):
    ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids, dtype=torch.bool)
    batch = TextBatch(tokens=ids, token_mask=ones, target_mask=ones, lengths=[6, 6])
    best = tiny_policy.network(input_ids=ids).logits[:, :-1].argmax(-1)
    assert torch.equal(tiny_policy.top1_correct(batch), best == ids[:, 1:])
    assert math.isclose(float(batch.response_mask.sum()), 10)


def test_remote_code_is_not_run_by_default(tmp_path):
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(ValueError, match="could not be loaded"):
        Policy(str(tmp_path))
    assert not (tmp_path / "ran").exists()
