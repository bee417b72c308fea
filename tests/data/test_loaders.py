"""Behavior of all data modules: splits, mixtures, evaluation, resuming, error messages."""

import json
import multiprocessing
import os
import pathlib
import signal
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.data.prompts import PromptData
from lit_align.data.sources import Source


def flat(batches) -> list:
    """Return the rows of all batches."""
    return list(chain.from_iterable(batches))


@pytest.fixture
def numbers(tmp_path: pathlib.Path):
    """Write a file with `count` prompts: the word `the`, repeated 1 to `count` times."""

    def write(count: int, name: str = "numbers.jsonl") -> str:
        rows = [{"prompt": " ".join(["the"] * (n + 1)), "n": n} for n in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def data(path, **settings) -> PromptData:
    return PromptData(path, **{"tokenizer": "toy", "batch_size": 4, **settings})


def taken(loader) -> list[list[int]]:
    return [batch.columns["n"] for batch in loader]


def on_rank(module: PromptData, rank: int, num_ranks: int) -> PromptData:
    """Return the module with a fake trainer of several ranks."""
    module.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": num_ranks, "rank": rank},
        limit_train_batches=1.0,
        fit_loop=SimpleNamespace(
            epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0))
        ),
    )
    return module


def test_training_batches_cover_rows_once_in_random_order(numbers):
    seen = taken(data(numbers(10)).train_dataloader())
    assert [len(batch) for batch in seen] == [4, 4]
    assert len(set(flat(seen))) == 8
    assert seen != [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert seen == taken(data(numbers(10)).train_dataloader())
    assert seen != taken(data(numbers(10), seed=1).train_dataloader())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_split_batches_of_one_process(numbers, num_ranks):
    path = numbers(35)
    one_process = taken(data(path, batch_size=8).train_dataloader())
    parts = [
        taken(on_rank(data(path, batch_size=8 // num_ranks), rank, num_ranks).train_dataloader())
        for rank in range(num_ranks)
    ]
    for step, batch in enumerate(one_process):
        assert [parts[i % num_ranks][step][i // num_ranks] for i in range(8)] == batch


def test_evaluation_has_each_row_once_as_new(numbers):
    path = numbers(7)
    seen = list(data(path, eval_path=path).val_dataloader())
    assert [b.columns["n"] for b in seen] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [b.is_new for b in seen] == [[True] * 4, [True] * 3]
    ranks = [
        list(on_rank(data(path, eval_path=path, batch_size=2), rank, 2).test_dataloader())
        for rank in (0, 1)
    ]
    assert [[b.columns["n"] for b in rank] for rank in ranks] == [
        [[0, 2], [4, 6]],
        [[1, 3], [5, 0]],
    ]
    assert [b.is_new for b in ranks[1]] == [[True, True], [True, False]]
    assert all(all(b.is_new) for b in ranks[0])


def test_training_batches_have_no_is_new_field(numbers):
    with pytest.raises(AttributeError, match="'is_new' is not written yet"):
        _ = next(iter(data(numbers(4)).train_dataloader())).is_new


def test_fraction_is_held_out(numbers):
    module = data(numbers(20), eval_fraction=0.25, batch_size=5, eval_batch_size=3)
    trained, held_out = flat(taken(module.train_dataloader())), taken(module.val_dataloader())
    assert [len(batch) for batch in held_out] == [3, 2]
    assert sorted(trained + flat(held_out)) == list(range(20))
    assert taken(data(numbers(20), eval_fraction=0.25).predict_dataloader()) == [
        flat(held_out)[:4],
        flat(held_out)[4:],
    ]


def test_training_and_evaluation_splits_by_name():
    module = PromptData("toy", tokenizer="toy", split="train", eval_split="test", max_rows=9)
    evaluated = flat(b.columns["prompt"] for b in module.val_dataloader())
    trained = flat(b.columns["prompt"] for b in module.train_dataloader())
    assert (len(evaluated), len(trained)) == (9, 8)
    assert not set(evaluated) & set(trained)


def test_mixture_repeats_rows_by_weight(numbers):
    sources = [Source(numbers(8, "a.jsonl"), weight=1.5), Source(numbers(4, "b.jsonl"), weight=2)]
    module = data(sources, batch_size=1, eval_fraction=0)
    seen = flat(taken(module.train_dataloader()))
    assert len(seen) == 12 + 8
    assert sorted(seen) == sorted(flat(taken(data(sources, batch_size=1).train_dataloader())))
    counts = [seen.count(n) for n in range(8)]
    assert all(count in (3, 4) for count in counts[:4])
    assert sum(counts[4:]) == 20 - sum(counts[:4])
    assert all(count in (1, 2) for count in counts[4:])


def test_held_out_rows_are_not_in_mixture(numbers):
    sources = [Source(numbers(8), weight=2)]
    module = data(sources, batch_size=1, eval_fraction=0.5)
    trained, held_out = (
        flat(taken(loader)) for loader in (module.train_dataloader(), module.val_dataloader())
    )
    assert (len(trained), len(held_out)) == (8, 4)
    assert not set(trained) & set(held_out)


def test_mixture_with_renamed_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "the", "answer": "4"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "the the"}\n')
    sources = [
        Source(str(tmp_path / "a.jsonl"), rename_columns={"question": "prompt"}),
        Source(str(tmp_path / "b.jsonl")),
    ]
    batch = next(iter(data(sources, batch_size=2).train_dataloader()))
    rows = {prompt: i for i, prompt in enumerate(batch.columns["prompt"])}
    assert batch.columns["answer"][rows["the"]] == "4"
    assert batch.columns["question"][rows["the"]] == "the"
    assert batch.columns["answer"][rows["the the"]] is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_resumes_at_its_position(numbers, num_workers):
    path = numbers(26)

    def loader(epoch):
        made = data(path, num_workers=num_workers).train_dataloader()
        made.sampler.set_epoch(epoch)
        return made

    for epoch in (0, 1):
        full, first = taken(loader(epoch)), loader(epoch)
        steps = iter(first)
        assert [next(steps).columns["n"] for _ in range(2)] == full[:2]
        resumed = loader(0)
        resumed.load_state_dict(first.state_dict())
        assert taken(resumed) == full[2:]
        assert len(full) == 6


class Reader(LightningModule):
    """Module that records its rows."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.columns["n"])
        return self.layer(torch.ones(1, 1)).sum()

    def predict_step(self, batch, batch_idx):
        return batch.columns["n"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAlways(Callback):
    """Callback that saves a checkpoint after every batch and every epoch.

    Args:
        folder: Folder of the checkpoints.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def on_train_batch_end(self, trainer, reader, *args):
        trainer.save_checkpoint(self.folder / f"batch-{len(reader.seen)}.ckpt")

    def on_train_epoch_end(self, trainer, reader):
        trainer.save_checkpoint(self.folder / f"epoch-{len(reader.seen)}.ckpt")


def fit(module, checkpoint=None, limit=1.0, callbacks=()):
    """Return the rows of each training batch of a fit of 2 epochs."""
    reader = Reader()
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=limit,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(reader, module, ckpt_path=checkpoint, weights_only=True)
    return reader.seen


@pytest.mark.parametrize(("num_workers", "limit"), [(0, 1.0), (0, 2), (2, 2)])
def test_resumed_fit_gets_remaining_rows(numbers, tmp_path, num_workers, limit):
    path = numbers(13)

    def module():
        return data(path, num_workers=num_workers)

    full = fit(module(), limit=limit, callbacks=[SaveAlways(tmp_path)])
    assert len(full) == (6 if limit == 1.0 else 4)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    for checkpoint in checkpoints if num_workers == 0 else checkpoints[1:3]:
        done = int(checkpoint.stem.partition("-")[2])
        assert fit(module(), checkpoint, limit) == full[done:], checkpoint.stem


def test_predict_gets_every_evaluation_row(numbers):
    path = numbers(7)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    seen = trainer.predict(Reader(), data(path, eval_path=path))
    assert seen == [[0, 1, 2, 3], [4, 5, 6]]


def test_tokenizer_stop_ids_and_decoding():
    module = data("toy", max_rows=4)
    assert module.tokenizer is module.tokenizer
    assert module.stop_ids == [module.tokenizer.eos_token_id]
    ids = module.tokenizer("haunting, but the plot is thin.")["input_ids"] + module.stop_ids
    assert module.decode(ids) == "haunting, but the plot is thin."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokenizer": None},
            r"^data\.tokenizer is not set\. Set --data\.tokenizer to a hub id",
        ),
        ({"eval_fraction": 1.0}, "eval_fraction must be at least 0 and below 1, found 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, found -1"),
        ({"batch_size": 8}, "5 rows do not fill one batch of 8 rows"),
        (
            {"max_prompt_tokens": 1},
            r"no row of '.*' is left: dropped 5 prompts of more than max_prompt_tokens 1",
        ),
        (
            {"rename_columns": {"question": "prompt"}},
            r"row 0 of '.*': there is no column 'question'",
        ),
        ({"split": "test"}, "is one file and has no split 'test'"),
    ],
)
def test_invalid_settings_are_refused(numbers, settings, message):
    with pytest.raises(ValueError, match=message):
        data(numbers(5), **settings).train_dataloader()


def test_error_names_the_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "the"}\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"^row 1 of '.*a.jsonl': the prompt is empty$"):
        data(str(tmp_path / "a.jsonl")).train_dataloader()


def test_evaluation_without_rows_is_refused(numbers):
    with pytest.raises(ValueError, match=r"Set --data\.eval_split, --data\.eval_path or"):
        data(numbers(5)).val_dataloader()
    with pytest.raises(ValueError, match="is one file and has no split 'test'"):
        data(numbers(5), eval_split="test").val_dataloader()


def test_worker_ignores_ctrl_c(numbers):
    before = set(multiprocessing.active_children())
    batches = iter(data(numbers(24), batch_size=1, num_workers=1).train_dataloader())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 23
