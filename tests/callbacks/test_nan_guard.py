"""NonFiniteGuard: the error names step and rows, and the weights are unchanged."""

import math
import socket
from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from spawn_ranks import Ranks
from tiny_models import RandomPrompts, distance, tiny, trained, trainer
from torch.optim import AdamW

from lit_align.algorithms.remax import ReMax
from lit_align.callbacks.checkpoint import Checkpoints
from lit_align.callbacks.nan_guard import NonFiniteGuard
from lit_align.optim.galore import GaLore


class Poisoned(ReMax):
    """ReMax whose losses of one prompt are NaN from an iteration on."""

    def __init__(self, since: int, prompt: str, **more):
        settings = {"microbatch_tokens": 30, "optimizer": partial(AdamW, lr=1e-2), **more}
        super().__init__(policy=tiny, num_samples=1, **settings)
        self.since, self.prompt = since, prompt

    def losses(self, batch):
        (loss,) = super().losses(batch)
        bad = torch.tensor([text == self.prompt for text in batch.columns["prompt"]])
        yield loss.where(~bad.unsqueeze(-1) | (self.iteration < self.since), float("nan"))


def prompt_of(iteration: int, row: int, batch_size: int = 4) -> str:
    """Return the prompt of a row in a training iteration."""
    return RandomPrompts(batch_size=batch_size).batch(iteration).columns["prompt"][row]


def test_error_names_step_and_rows_and_weights_are_unchanged(tmp_path):
    short, poisoned = Poisoned(9, ""), Poisoned(1, prompt_of(1, 2))
    torch.manual_seed(0)
    trainer(tmp_path / "short", limit_train_batches=1, limit_val_batches=0).fit(
        short, RandomPrompts()
    )
    torch.manual_seed(0)
    run = trainer(
        tmp_path / "poisoned",
        limit_val_batches=0,
        callbacks=[Checkpoints(every_n_iterations=1), NonFiniteGuard()],
        enable_checkpointing=True,
    )
    with pytest.raises(ValueError, match="The loss is not finite") as error:
        run.fit(poisoned, RandomPrompts())
    text = str(error.value)
    assert f"2 ('{prompt_of(1, 2)}')" in text
    assert f"'{prompt_of(1, 0)}'" not in text
    assert "iteration 2, before optimizer step 2" in text
    assert "iteration_000001.ckpt" in text
    assert distance(trained(poisoned), trained(short)) == 0


def test_infinite_gradient_of_finite_loss_stops_run(tmp_path):
    class Steep(ReMax):
        def losses(self, batch):
            (loss,) = super().losses(batch)
            yield loss + (loss - loss.detach()).abs().sqrt().where(batch.loss_mask, 0.0)

    run = trainer(tmp_path, limit_val_batches=0, callbacks=[NonFiniteGuard()])
    with pytest.raises(ValueError, match=r"The gradient is not finite\. Stopped in iteration 1,"):
        run.fit(Steep(policy=tiny), RandomPrompts())


def during_backward(params):
    return GaLore(params, lr=1e-2, rank=2, per_layer=True)


BACKWARD = {"optimizer": during_backward, "max_grad_norm": math.inf, "microbatch_tokens": 999}


def test_error_names_updates_during_backward(tmp_path):
    short, poisoned = Poisoned(9, "", **BACKWARD), Poisoned(1, prompt_of(1, 2), **BACKWARD)
    torch.manual_seed(0)
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(short, RandomPrompts())
    torch.manual_seed(0)
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[NonFiniteGuard()])
    with pytest.raises(ValueError, match=r"optimizer step 2, after updates during") as error:
        run.fit(poisoned, RandomPrompts())
    assert "The loss is not finite: rows 2" in str(error.value)
    assert distance(trained(poisoned), trained(short)) > 0


def test_infinite_gradient_stops_run_with_updates_in_backward(tmp_path):
    class Steep(ReMax):
        def losses(self, batch):
            (loss,) = super().losses(batch)
            yield loss + (loss - loss.detach()).abs().sqrt().where(batch.loss_mask, 0.0)

    run = trainer(tmp_path, limit_val_batches=0, callbacks=[NonFiniteGuard()])
    with pytest.raises(ValueError, match=r"The gradient is not finite\. Stopped in iteration 1,"):
        run.fit(Steep(policy=tiny, **BACKWARD), RandomPrompts())


def test_finite_run_is_unchanged(tmp_path):
    plain, watched = Poisoned(9, ""), Poisoned(9, "")
    for algorithm, callbacks in ((plain, []), (watched, [NonFiniteGuard()])):
        torch.manual_seed(0)
        trainer(tmp_path, limit_val_batches=0, callbacks=callbacks).fit(algorithm, RandomPrompts())
    assert distance(trained(watched), trained(plain)) == 0


def fit_poisoned(folder, prompt):
    """Return the error message of this rank if one of two ranks has a NaN."""
    torch.manual_seed(0)
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    run = trainer(
        folder, limit_val_batches=0, callbacks=[NonFiniteGuard()], devices=2, strategy=strategy
    )
    with pytest.raises(ValueError, match="not finite") as error:
        run.fit(Poisoned(1, prompt), RandomPrompts(batch_size=2))
    return str(error.value)


def test_all_ranks_stop_and_name_rank_of_row(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(2, port)
    first, second = ranks(fit_poisoned, tmp_path, prompt_of(1, 3))
    ranks.close()
    assert first == second
    assert f"rows 1 ('{prompt_of(1, 3)}') of rank 1. Stopped" in first
