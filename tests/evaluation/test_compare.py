"""Comparison of models on the same prompts."""

import json

import pytest
import torch
from tiny_models import WORDS

from lit_align.cli.main import main
from lit_align.data.text import load_tokenizer
from lit_align.errors import UserError
from lit_align.evaluation.compare import compare_models, model_comparison_table
from lit_align.models.policy import Policy
from lit_align.tools.resolve_model import resolve_model


def rows(*scores: float, length: int = 3, text: str = "a b", **factors: float) -> list[dict]:
    """Return a row per score; `factors` add columns of scores times a factor."""
    return [
        {
            "prompt": "p",
            "completion": text,
            "score": score,
            "length": length,
            "kl": 0.5,
            "truncated": False,
            **{name.replace("__", "/"): score * factor for name, factor in factors.items()},
        }
        for score in scores
    ]


def test_the_others_are_compared_with_the_first():
    found = compare_models({"one": rows(0, 1, 2, 3), "other": rows(2, 1, 3, 2, length=5)}, 1)
    assert found["one"]["reward"] == 1.5
    assert "win rate" not in found["one"]
    assert found["other"]["gain"] == 0.5
    assert found["other"]["win rate"] == (1 + 0.5 + 1 + 0) / 4
    assert found["other"]["KL to the reference, nats per response"] == 0.5
    assert found["other"]["length, tokens"] == 5.0


def test_an_interval_is_over_prompts_and_not_over_samples():
    found = compare_models({"one": rows(*[1, 3] * 40)}, 2)["one"]
    assert found["prompts"] == 40
    assert found["reward, 95 %"] == [2.0, 2.0]


def test_a_reward_function_of_zeros_and_ones_has_exact_match_and_pass_at_k():
    responses = rows(1, 0, 0, 0, 1, 1, 1, 1, scores__exact_answer=1.0, scores__length=2.0)
    found = compare_models({"one": responses}, 4)["one"]
    assert found["exact_answer, exact match"] == 5 / 8
    assert found["exact_answer, pass@1"] == 5 / 8
    assert found["exact_answer, pass@2"] == (3 / 6 + 1) / 2
    assert found["exact_answer, pass@4"] == 1.0
    assert not [name for name in found if name.startswith("length, exact")]


def test_unequal_prompts_are_refused():
    other = [{**row, "prompt": "q"} for row in rows(1, 2)]
    with pytest.raises(ValueError, match="two has other prompts than the first model"):
        compare_models({"one": rows(1, 2), "two": other}, 1)
    with pytest.raises(ValueError, match="There are no responses to compare"):
        compare_models({"one": []}, 1)


def test_the_table_has_a_column_per_model():
    table = model_comparison_table(compare_models({"one": rows(0, 1), "[b]two": rows(1, 1)}, 1))
    assert [column.header for column in table.columns] == ["figure", "one", "\\[b]two"]


def save(folder, seed: int, **config: object) -> str:
    """Save random weights with the toy tokenizer and return the folder."""
    torch.manual_seed(seed)
    Policy(config={**WORDS, "initializer_range": 0.2, **config}).save(folder)
    load_tokenizer("toy").save_pretrained(folder)
    return str(folder)


def test_a_run_folder_or_an_export_of_several_roles_is_resolved(tmp_path):
    for folder in ("one/hf", "two/hf/policy"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "one")) == str(tmp_path / "one/hf")
    assert resolve_model(str(tmp_path / "two" / "hf")) == str(tmp_path / "two/hf/policy")
    assert resolve_model("some/hub-id") == "some/hub-id"
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match=r"Give a folder with a saved model\. Found: nothing"):
        resolve_model(str(tmp_path / "notes"))


EVALUATE = (
    "--config",
    "remax",
    "--config",
    "toy",
    "--data.max_rows",
    "6",
    "--rollout.predict_samples",
    "2",
)


def test_the_command_writes_json_and_prints_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, other = save(tmp_path / "one", 0), save(tmp_path / "other", 1)
    assert main(["evaluate", one, other, *EVALUATE, "--out", "found/x.json"]) == 0
    found = json.loads((tmp_path / "found" / "x.json").read_text())
    assert [*found["models"]] == [one, other]
    assert found["reference"] == one
    assert found["models"][one]["KL to the reference, nats per response"] == 0.0
    assert found["models"][other]["KL to the reference, nats per response"] > 0.1
    assert found["models"][other]["prompts"] == 6
    assert "win rate" in capsys.readouterr().out


def test_all_rows_of_a_file_are_evaluated_and_greedy_responses_are_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"review of the {word} river:"}) for word in ("silent", "lost")]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    words = [
        "evaluate",
        save(tmp_path / "one", 0),
        "--data.path",
        "mine.jsonl",
        "--rollout.predict_greedy",
        "true",
    ]
    words += ["--reward.functions", "Length", "--reward.functions.target", "3"]
    words += ["--rollout.max_new_tokens", "5", "--accelerator", "cpu"]
    found = []
    for seed in ("0", "1"):
        assert main([*words, "--seed", seed]) == 0
        found.append(json.loads((tmp_path / "evaluation.json").read_text())["models"])
    assert found[0] == found[1]
    assert next(iter(found[0].values()))["prompts"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--reward", "null"), "evaluate compares models by rewards. Set --reward.functions"),
        (("--rollout.predict_samples", "0"), "predict_samples must be at least 1"),
        (("--rollout.predict_greedy", "true"), "and 1 with predict_greedy, found 2"),
        (("--data.pth", "x"), "PromptData has no setting 'pth'. Did you mean 'path'?"),
    ],
)
def test_a_mistake_is_a_message(more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", save(tmp_path / "one", 0), *EVALUATE, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()


def test_a_model_with_another_tokenizer_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, other = save(tmp_path / "one", 0), save(tmp_path / "other", 1)
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"film"', '"filn"'))
    assert main(["evaluate", one, other, *EVALUATE]) == 2
    assert "other has another tokenizer than toy" in capsys.readouterr().err
