"""Workers of a data loader end with the pass that started them."""

import gc
import multiprocessing
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_align.data.loader import Loader


@pytest.fixture
def before() -> Iterator[set[multiprocessing.Process]]:
    """Yield the running child processes, without garbage collection during the test."""
    gc.collect()
    gc.disable()
    yield set(multiprocessing.active_children())
    gc.enable()


def loader() -> Loader:
    return Loader(torch.arange(8.0), batch_size=2, num_workers=1)


def test_second_pass_ends_workers_of_first(before):
    batches = loader()
    first = iter(batches)
    first.cycle = first
    (worker,) = set(multiprocessing.active_children()) - before
    assert len(list(iter(batches))) == 4
    assert not worker.is_alive()
    assert worker.exitcode == 0  # it was not killed


class Reader(LightningModule):
    """Module that keeps every iterator of its batches, and may fail at the second batch."""

    def __init__(self, fails: bool):
        super().__init__()
        self.layer, self.fails, self.iterators = torch.nn.Linear(1, 1), fails, []

    def training_step(self, batch, batch_idx):
        self.iterators.append(self.trainer.train_dataloader._iterator)
        if self.fails and batch_idx == 1:
            raise RuntimeError("stop")
        return self.layer(batch.view(-1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.iterators.append(self.trainer.val_dataloaders._iterator)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_fit_ends_all_workers(before, fails):
    """Workers end in both epochs and in cut validations, although the iterators are kept."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=2, limit_val_batches=1, accelerator="cpu", enable_model_summary=False, **quiet
    )
    reader = Reader(fails)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            trainer.fit(reader, loader(), loader())
    else:
        trainer.fit(reader, loader(), loader())
    assert len(set(map(id, reader.iterators))) == (2 if fails else 5)
    assert set(multiprocessing.active_children()) == before
