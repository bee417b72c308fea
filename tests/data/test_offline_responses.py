"""Prompts with answers: rows of one prompt together, numbers where they are known."""

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
    """The batch of each prompt."""
    return {batch.columns["prompt"][0]: batch for batch in module.train_dataloader()}


def test_rows_of_one_prompt_become_one_with_all_answers(data):
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


def test_score_and_logprob_are_kept_where_they_are_known(data):
    module = data(
        {"prompt": "a:", "completion": " x", "score": 0.5, "logprob": -3},
        {"prompt": "a:", "completion": " y", "score": None},
        {"prompt": "a:", "completion": " z", "score": "2", "logprob": ""},
    )
    (answers,) = batches(module)["a:"].offline_responses
    assert [(answer.score, answer.logprob) for answer in answers] == [
        (0.5, -3.0),
        (None, None),
        (2.0, None),
    ]


def test_conversations_are_answered_through_the_template(data):
    asked = [{"role": "user", "content": "hi"}]
    module = data({"prompt": asked, "completion": [{"role": "assistant", "content": "yes"}]})
    ((answer,),) = next(iter(module.train_dataloader())).offline_responses
    assert module.tokenizer.decode(list(answer.tokens)) == "yes<|im_end|>"


def test_long_prompts_leave_with_their_answers(data):
    rows = ({"prompt": "abcd", "completion": "x"}, {"prompt": "ab", "completion": "y"})
    module = data(*rows, max_prompt_tokens=3)
    assert set(batches(module)) == {"ab"}


def test_a_prompt_is_held_out_with_all_of_its_answers(data):
    rows = [{"prompt": f"p{number % 4}", "completion": f"{number}"} for number in range(12)]
    module = data(*rows, eval_fraction=0.25)
    assert len(batches(module)) == 3
    (held_out,) = module.val_dataloader()
    assert [len(answers) for answers in held_out.offline_responses] == [3]


def test_evaluation_needs_no_answers_but_training_does(data, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a:"}\n')
    module = data(
        {"prompt": "a:"},
        {"prompt": "b:", "completion": " y"},
        eval_path=str(tmp_path / "eval.jsonl"),
    )
    assert next(iter(module.val_dataloader())).offline_responses == [[]]
    with pytest.raises(ValueError, match=r"1 of 2 training prompts of .* have no completion: "):
        module.train_dataloader()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"score": "good"}, "row 0 of .*score must be a number, found 'good'"),
        ({"logprob": float("nan")}, "logprob must be a number"),
        ({"logprob": 0.2}, r"logprob is the log of a probability and at most 0, not 0\.2"),
    ],
)
def test_numbers_that_are_none_are_refused(data, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        data({"prompt": "a:", "completion": " x", **wrong}).train_dataloader()


def test_the_toy_data_answer_each_prompt_once():
    module = OfflineResponseData("toy", tokenizer="toy", max_rows=20, batch_size=20)
    (batch,) = module.train_dataloader()
    assert [len(answers) for answers in batch.offline_responses] == [1] * 20
    text = module.decode(list(batch.offline_responses[0][0].tokens))
    assert text.endswith(".")
