"""A loss that is no number names the step and the rows, and never reaches the weights."""

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
    """Its losses of one prompt are NaN from an iteration on."""

    def __init__(self, since: int, prompt: str, **more):
        settings = {"microbatch_tokens": 30, "optimizer": partial(AdamW, lr=1e-2), **more}
        super().__init__(policy=tiny, num_samples=1, **settings)
        self.since, self.prompt = since, prompt

    def losses(self, batch):
        (loss,) = super().losses(batch)
        bad = torch.tensor([text == self.prompt for text in batch.columns["prompt"]])
        yield loss.where(~bad.unsqueeze(-1) | (self.iteration < self.since), float("nan"))


def prompt_of(iteration: int, row: int, batch_size: int = 4) -> str:
    """A prompt that training meets."""
    return RandomPrompts(batch_size=batch_size).batch(iteration).columns["prompt"][row]


def test_the_step_and_the_rows_are_named_and_the_weights_are_whole(tmp_path):
    short, whole = Poisoned(9, ""), Poisoned(1, prompt_of(1, 2))
    torch.manual_seed(0)
    trainer(tmp_path / "short", limit_train_batches=1, limit_val_batches=0).fit(
        short, RandomPrompts()
    )
    torch.manual_seed(0)
    run = trainer(
        tmp_path / "whole",
        limit_val_batches=0,
        callbacks=[Checkpoints(every_n_iterations=1), NonFiniteGuard()],
        enable_checkpointing=True,
    )
    with pytest.raises(ValueError, match="The loss is not finite") as error:
        run.fit(whole, RandomPrompts())
    text = str(error.value)
    assert f"2 ('{prompt_of(1, 2)}')" in text
    assert f"'{prompt_of(1, 0)}'" not in text
    assert "iteration 2, before optimizer step 2" in text
    assert "iteration_000001.ckpt" in text
    assert distance(trained(whole), trained(short)) == 0


def test_an_infinite_gradient_of_a_finite_loss_is_noticed(tmp_path):
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


def test_weights_that_were_updated_during_backward_are_not_said_to_be_whole(tmp_path):
    short, poisoned = Poisoned(9, "", **BACKWARD), Poisoned(1, prompt_of(1, 2), **BACKWARD)
    torch.manual_seed(0)
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(short, RandomPrompts())
    torch.manual_seed(0)
    run = trainer(tmp_path, limit_val_batches=0, callbacks=[NonFiniteGuard()])
    with pytest.raises(ValueError, match=r"optimizer step 2, but after updates during") as error:
        run.fit(poisoned, RandomPrompts())
    assert "The loss is not finite: rows 2" in str(error.value)
    assert distance(trained(poisoned), trained(short)) > 0


def test_an_infinite_gradient_is_noticed_where_none_is_left(tmp_path):
    class Steep(ReMax):
        def losses(self, batch):
            (loss,) = super().losses(batch)
            yield loss + (loss - loss.detach()).abs().sqrt().where(batch.loss_mask, 0.0)

    run = trainer(tmp_path, limit_val_batches=0, callbacks=[NonFiniteGuard()])
    with pytest.raises(ValueError, match=r"The gradient is not finite\. Stopped in iteration 1,"):
        run.fit(Steep(policy=tiny, **BACKWARD), RandomPrompts())


def test_a_sound_run_is_left_alone(tmp_path):
    plain, watched = Poisoned(9, ""), Poisoned(9, "")
    for algorithm, callbacks in ((plain, []), (watched, [NonFiniteGuard()])):
        torch.manual_seed(0)
        trainer(tmp_path, limit_val_batches=0, callbacks=callbacks).fit(algorithm, RandomPrompts())
    assert distance(trained(watched), trained(plain)) == 0


def fit_poisoned(folder, prompt):
    """What each of two ranks says of a NaN that one of them has."""
    torch.manual_seed(0)
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    run = trainer(
        folder, limit_val_batches=0, callbacks=[NonFiniteGuard()], devices=2, strategy=strategy
    )
    with pytest.raises(ValueError, match="not finite") as error:
        run.fit(Poisoned(1, prompt), RandomPrompts(batch_size=2))
    return str(error.value)


def test_all_ranks_stop_and_name_the_rank_that_has_the_row(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(2, port)
    first, second = ranks(fit_poisoned, tmp_path, prompt_of(1, 3))
    ranks.close()
    assert first == second
    assert f"rows 1 ('{prompt_of(1, 3)}') of rank 1. Stopped" in first
