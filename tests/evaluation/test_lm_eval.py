"""Tasks of lm-eval, with a task from a local file, since tests have no network."""

import json
import sys

import pytest
import torch
from tiny_models import WORDS

from lit_align.cli.main import main
from lit_align.data.text import load_tokenizer
from lit_align.data.toy import toy_rows
from lit_align.evaluation.lm_eval import metric_with_interval
from lit_align.models.policy import Policy

TASK = """task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[chosen, rejected]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    Policy(config={**WORDS, "initializer_range": 0.2}).save(tmp_path / "model")
    load_tokenizer("toy").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def argv(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")})
             for row in toy_rows("test")[:20]]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    task = TASK.format(file=tmp_path / "pairs.jsonl")
    (tmp_path / "tasks" / "toy_choice.yaml").write_text(task)
    common = ("--config", "remax", "--config", "toy", "--data.max_rows", "2")
    return ["evaluate", model, *common, "--accelerator", "cpu", "--tasks_folder", "tasks"]


def test_a_task_has_its_accuracy_and_interval(argv, model, tmp_path):
    pytest.importorskip("lm_eval")
    assert main([*argv, "--tasks", "toy_choice"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["models"][model]
    network, tokenizer = Policy(model), load_tokenizer(model)
    bos = [tokenizer.bos_token_id]  # lm-eval adds it at the start, as the tokenizer does
    is_correct = []
    for line in (tmp_path / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        sums = []
        for response in (row["chosen"], row["rejected"]):
            plain = {"add_special_tokens": False}
            ids = bos + tokenizer(f"{row['prompt']} {response}", **plain)["input_ids"]
            start = 1 + len(tokenizer(row["prompt"], **plain)["input_ids"])
            with torch.no_grad():
                logprobs = network.network(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))))
        is_correct.append(sums[0] > sums[1])
    accuracy = sum(is_correct) / len(is_correct)
    assert found["toy_choice, acc"] == pytest.approx(accuracy)
    low, high = found["toy_choice, acc, 95 %"]
    error = (accuracy * (1 - accuracy) / (len(is_correct) - 1)) ** 0.5
    assert (low, high) == pytest.approx((accuracy - 1.96 * error, accuracy + 1.96 * error))


def test_an_unknown_task_is_a_message(argv, capsys):
    pytest.importorskip("lm_eval")
    assert main([*argv, "--tasks", "toy_choise"]) == 2
    assert "lm-eval has no such task. Did you mean 'toy_choice'?" in capsys.readouterr().err
    assert main([*argv, "--tasks", "x", "--tasks_folder", "nowhere"]) == 2
    assert "--tasks_folder nowhere: no such folder" in capsys.readouterr().err


def test_a_missing_lm_eval_is_a_message_with_the_command_to_install_it(argv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main([*argv, "--tasks", "toy_choice"]) == 2
    assert "--tasks needs lm-eval. Run pip install 'lit-align[lm-eval]'" in capsys.readouterr().err


def test_a_metric_has_its_name_and_its_interval():
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1.0, "em_stderr,strict": "N/A"}
    assert metric_with_interval("t", "acc,none", 0.5, values) == {
        "t, acc": 0.5,
        "t, acc, 95 %": [pytest.approx(0.304), pytest.approx(0.696)],
    }
    assert metric_with_interval("t", "em,strict", 1.0, values) == {"t, em (strict)": 1.0}
