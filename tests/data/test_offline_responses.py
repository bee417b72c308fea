"""Prompts with offline responses: merged rows, scores and log-probs."""

import json

import pytest

from lit_align.data.offline_responses import OfflineResponseData


@pytest.fixture
def data(tmp_path, chat_path):
    def make(*rows, **settings) -> OfflineResponseData:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return OfflineResponseData(str(path), tokenizer=chat_path, batch_size=1, **settings)

    return make


def batches(module: OfflineResponseData) -> dict:
    """Return the batch of each prompt."""
    return {batch.columns["prompt"][0]: batch for batch in module.train_dataloader()}


def test_rows_of_one_prompt_are_merged(data):
    module = data(
        {"prompt": "a:", "completion": " x", "level": 1},
        {"prompt": "b:", "completion": " y", "level": 2},
        {"prompt": "a:", "completion": " zz", "level": 3},
    )
    found = batches(module)
    assert set(found) == {"a:", "b:"}
    ((one, two),) = found["a:"].offline_responses
    stop = module.tokenizer.eos_token_id
    assert list(one.tokens) == [*module.tokenizer(" x")["input_ids"], stop]
    assert list(two.tokens) == [*module.tokenizer(" zz")["input_ids"], stop]
    assert found["a:"].columns == {"prompt": ["a:"], "level": [1]}
    assert len(found["b:"].offline_responses[0]) == 1


def test_known_scores_and_logprobs_are_kept(data):
    module = data(
        {"prompt": "a:", "completion": " x", "score": 0.5, "logprob": -3},
        {"prompt": "a:", "completion": " y", "score": None},
        {"prompt": "a:", "completion": " z", "score": "2", "logprob": ""},
    )
    (responses,) = batches(module)["a:"].offline_responses
    assert [(response.score, response.logprob) for response in responses] == [
        (0.5, -3.0),
        (None, None),
        (2.0, None),
    ]


def test_conversation_response_ends_with_end_of_turn(data):
    prompt = [{"role": "user", "content": "hi"}]
    module = data({"prompt": prompt, "completion": [{"role": "assistant", "content": "yes"}]})
    ((response,),) = next(iter(module.train_dataloader())).offline_responses
    assert module.tokenizer.decode(list(response.tokens)) == "yes<|im_end|>"


def test_long_prompts_are_dropped_with_their_responses(data):
    rows = ({"prompt": "abcd", "completion": "x"}, {"prompt": "ab", "completion": "y"})
    module = data(*rows, max_prompt_tokens=3)
    assert set(batches(module)) == {"ab"}


def test_prompt_is_held_out_with_all_its_responses(data):
    rows = [{"prompt": f"p{number % 4}", "completion": f"{number}"} for number in range(12)]
    module = data(*rows, eval_fraction=0.25)
    assert len(batches(module)) == 3
    (held_out,) = module.val_dataloader()
    assert [len(responses) for responses in held_out.offline_responses] == [3]


def test_training_needs_completions_and_evaluation_does_not(data, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a:"}\n')
    module = data(
        {"prompt": "a:"},
        {"prompt": "b:", "completion": " y"},
        eval_path=str(tmp_path / "eval.jsonl"),
    )
    assert next(iter(module.val_dataloader())).offline_responses == [[]]
    with pytest.raises(
        ValueError, match=r"1 of 2 training prompts of .* have no completion\. Set --data"
    ):
        module.train_dataloader()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"score": "good"}, "row 0 of .*score must be a finite number, found 'good'"),
        ({"logprob": float("nan")}, "logprob must be a finite number, found 'nan'"),
        ({"logprob": 0.2}, r"logprob must be at most 0, found 0\.2"),
    ],
)
def test_invalid_numbers_are_refused(data, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        data({"prompt": "a:", "completion": " x", **wrong}).train_dataloader()


def test_toy_data_have_one_response_per_prompt():
    module = OfflineResponseData("toy", tokenizer="toy", max_rows=20, batch_size=20)
    (batch,) = module.train_dataloader()
    assert [len(responses) for responses in batch.offline_responses] == [1] * 20
    text = module.decode(list(batch.offline_responses[0][0].tokens))
    assert text.endswith(".")
