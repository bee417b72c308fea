"""Workers leave with the pass over the batches for which they came."""

import gc
import multiprocessing
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_align.data.loader import Loader


@pytest.fixture
def before() -> Iterator[set[multiprocessing.Process]]:
    """Processes that are there already; until the test is over no garbage is collected."""
    gc.collect()
    gc.disable()
    yield set(multiprocessing.active_children())
    gc.enable()


def loader() -> Loader:
    return Loader(torch.arange(8.0), batch_size=2, num_workers=1)


def test_a_second_pass_ends_the_workers_of_the_first(before):
    batches = loader()
    first = iter(batches)
    first.cycle = first
    (worker,) = set(multiprocessing.active_children()) - before
    assert len(list(iter(batches))) == 4
    assert not worker.is_alive()
    assert worker.exitcode == 0  # it was not killed


class Reader(LightningModule):
    """Holds on to every iterator that feeds it; may fail at the second batch."""

    def __init__(self, fails: bool):
        super().__init__()
        self.layer, self.fails, self.fed = torch.nn.Linear(1, 1), fails, []

    def training_step(self, batch, batch_idx):
        self.fed.append(self.trainer.train_dataloader._iterator)
        if self.fails and batch_idx == 1:
            raise RuntimeError("stop")
        return self.layer(batch.view(-1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.fed.append(self.trainer.val_dataloaders._iterator)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_a_fit_leaves_no_worker_behind(before, fails):
    """Of both epochs and of validations that see a part of their batches, whoever holds on."""
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
    assert len(set(map(id, reader.fed))) == (2 if fails else 5)
    assert set(multiprocessing.active_children()) == before
