"""ResponseLog: responses as JSON lines and as tables of Weights & Biases."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import WandbLogger
from tiny_models import RandomPrompts, tiny, trainer

from lit_align.algorithms.remax import ReMax
from lit_align.batches import Experience
from lit_align.callbacks.response_log import ResponseLog, logger_cells, response_rows
from lit_align.callbacks.rollout import Rollout

KEYS = ["prompt", "completion", "scores/count", "score", "length", "truncated", "greedy"]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder, kind: str = "[rp]") -> list[str]:
    """Return the names of the files of rollouts and predictions."""
    return sorted(path.name for path in folder.glob(f"**/{kind}*.jsonl"))


def test_first_and_every_second_rollout_are_written(run, tmp_path):
    run(ReMax(policy=tiny), num_batches=5, callbacks=[ResponseLog(every_n_rollouts=2)])
    assert names(tmp_path) == [f"rollout_0000{number}.jsonl" for number in (1, 2, 4)]
    rows = read(tmp_path / "completions" / "rollout_00002.jsonl")
    assert [list(row) for row in rows] == [KEYS] * 8
    assert [row["greedy"] for row in rows] == [False] * 4 + [True] * 4
    assert [row["prompt"] for row in rows[:4]] == [row["prompt"] for row in rows[4:]]
    for row in rows:
        tokens = row["completion"].split()
        assert row["length"] == len(tokens) + (not row["truncated"])
        assert row["score"] == row["scores/count"] == tokens.count("5")


def test_zero_writes_no_file(run, tmp_path):
    run(ReMax(policy=tiny), callbacks=[ResponseLog(every_n_rollouts=0, num_eval_samples=0)])
    assert not list(tmp_path.rglob("*.jsonl"))


def test_held_out_responses_are_written_before_and_after(run, tmp_path):
    run(ReMax(policy=tiny), num_batches=5, callbacks=[ResponseLog(num_eval_samples=10)])
    assert names(tmp_path, "held") == ["held_out_00000.jsonl", "held_out_00005.jsonl"]
    before, after = (
        read(tmp_path / "completions" / f"held_out_0000{number}.jsonl") for number in (0, 5)
    )
    assert len(before) == 8  # two batches of the sanity check
    assert len(after) == 10
    assert [row["prompt"] for row in after[:8]] == [row["prompt"] for row in before]
    assert all(row["greedy"] for row in after)


def test_resumed_run_keeps_earlier_responses(tmp_path):
    first = trainer(tmp_path, callbacks=[ResponseLog()])
    first.fit(ReMax(policy=tiny), RandomPrompts(2))
    first.save_checkpoint(tmp_path / "part.ckpt")
    kept = (tmp_path / "completions" / "held_out_00002.jsonl").read_text()
    again = trainer(tmp_path, callbacks=[ResponseLog(num_eval_samples=3)], max_epochs=2)
    again.fit(ReMax(policy=tiny), RandomPrompts(2), ckpt_path=tmp_path / "part.ckpt")
    assert (tmp_path / "completions" / "held_out_00002.jsonl").read_text() == kept
    assert len(read(tmp_path / "completions" / "held_out_00004.jsonl")) == 3


class LastIsARepeat(RandomPrompts):
    """Random prompts whose fourth row of each batch is a repeat."""

    def batch(self, number: int) -> Experience:
        batch = super().batch(number)
        batch.is_new = [True, True, True, False]
        return batch


def test_predictions_have_kl_and_each_row_once(tmp_path):
    for _ in range(2):  # the second run starts with an empty file
        trainer(tmp_path, callbacks=[ResponseLog()]).predict(ReMax(policy=tiny), LastIsARepeat(2))
    rows = read(tmp_path / "predictions.jsonl")
    assert [list(row) for row in rows] == [[*KEYS, "kl"]] * 6
    assert [row["kl"] for row in rows] == [0.0] * 6
    assert len({row["prompt"] for row in rows}) == 6


def test_each_rank_writes_its_own_file(tmp_path):
    fake = SimpleNamespace(world_size=2, global_rank=1, default_root_dir=tmp_path, loggers=[])
    batch = Experience(
        {"prompt": ["déjà vu"], "completion": ["naïve"]},
        response_lengths=[2],
        truncated=[False],
        is_greedy=[False],
    )
    ResponseLog(every_n_rollouts=1).on_train_batch_end(
        fake, SimpleNamespace(iteration=3), None, batch, 2
    )
    text = (tmp_path / "completions" / "rollout_00003.rank1.jsonl").read_text()
    assert "déjà vu" in text
    assert "\\u" not in text


def test_rows_without_reward_have_no_score(prompts):
    fields = {"response_lengths": [1] * 4, "truncated": [True] * 4, "is_greedy": [True] * 4}
    batch = Experience(prompts.columns, **prompts.fields(), **fields)
    assert list(response_rows(batch)[0]) == ["prompt", "length", "truncated", "greedy"]


def test_predict_works_without_reward(tmp_path):
    run = trainer(tmp_path, callbacks=[ResponseLog()])
    run.callbacks[:] = [each for each in run.callbacks if isinstance(each, Rollout | ResponseLog)]
    run.predict(ReMax(policy=tiny), RandomPrompts(1))
    assert "score" not in read(tmp_path / "predictions.jsonl")[0]


def test_cells_of_column_have_one_type():
    rows = [
        {"prompt": [{"role": "user", "content": "é"}], "answer": 3, "score": 0.5, "kl": None},
        {"prompt": "b", "answer": "c", "score": 1, "kl": 2.0},
    ]
    assert logger_cells(rows) == [
        ['[{"role": "user", "content": "é"}]', "3", 0.5, None],
        ["b", "c", 1, 2.0],
    ]


def test_weights_and_biases_gets_rollouts_as_tables(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="x")
    settings = {"limit_val_batches": 0, "logger": logger, "log_every_n_steps": 1}
    run = trainer(tmp_path, callbacks=[ResponseLog(every_n_rollouts=2)], **settings)
    run.fit(ReMax(policy=tiny), RandomPrompts(4))
    logger.experiment.finish()
    written = names(tmp_path / "completions")
    assert written == [f"rollout_0000{number}.jsonl" for number in (1, 2, 4)]
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/completions*.json"))
    assert len(tables) == 3
    found = [json.loads(table.read_text()) for table in tables]
    assert [table["columns"] for table in found] == [KEYS] * 3
    logged = {json.dumps(table["data"]) for table in found}
    for name in written:
        rows = [list(row.values()) for row in read(tmp_path / "completions" / name)]
        assert json.dumps(rows) in logged
    assert not list((tmp_path / "completions").glob(".*"))
