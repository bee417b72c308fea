"""Gradients are synchronized once per optimizer step, for any number of micro-batches."""

import pytest
from tiny_models import RandomTexts, distance, tiny, trainer, weights
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from lit_align.algorithms.sft import SFT
from lit_align.models.parallel.fsdp2 import FSDP2

BLOCKS_AND_ROOT = 3
STEPS = 3


class ReduceScatterCounter(TorchDispatchMode):
    """Count of reduce-scatter operators."""

    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.number += "reduce_scatter" in operator.name()
        return operator(*args, **(kwargs or {}))


def fit_on_two_ranks(folder, strategy, tokens, on_start):
    """Return the weights after three steps, and the number of micro-batches."""
    policy = {"policy": tiny, "optimizer": lambda params: SGD(params, lr=0.1)}
    algorithm, passes = SFT(microbatch_tokens=tokens, **policy), []
    losses = algorithm.losses
    algorithm.losses = lambda batch: passes.append(len(batch)) or losses(batch)
    done = trainer(folder, devices=2, strategy=strategy, limit_val_batches=0)
    done.callbacks.clear()
    algorithm.on_train_start = lambda: on_start(done.strategy.model)
    done.fit(algorithm, RandomTexts(STEPS))
    return weights(algorithm.policy), len(passes)


def sharded(folder, tokens, sync_every_microbatch=False):
    """Return weights, micro-batches and reduce-scatters: one per block and one for the root."""
    strategy = FSDP2(sync_every_microbatch=sync_every_microbatch)
    with ReduceScatterCounter() as seen:
        trained, passes = fit_on_two_ranks(folder, strategy, tokens, lambda model: None)
    return trained, passes, seen.number


def replicated(folder, tokens):
    """Return the same for replicated weights, whose gradients DDP reduces in one bucket."""
    sent = []

    def hook(state, bucket):
        sent.append(bucket.index())
        return allreduce_hook(None, bucket)

    register = lambda model: model.register_comm_hook(None, hook)  # noqa: E731
    return *fit_on_two_ranks(folder, "ddp", tokens, register), len(sent)


@pytest.mark.parametrize(("function", "sums"), [(sharded, BLOCKS_AND_ROOT), (replicated, 1)])
def test_only_the_last_micro_batch_synchronizes(two_ranks, tmp_path, function, sums):
    trained = []
    for tokens, passes in ((9, 2), (1000, 1)):
        for found, taken, sent in two_ranks(function, tmp_path, tokens):
            assert taken == STEPS * passes
            assert sent == STEPS * sums
            trained.append(found)
    assert max(distance(found, trained[0]) for found in trained) < 1e-5


def test_every_micro_batch_synchronizes_on_request(two_ranks, tmp_path):
    once, _, _ = two_ranks(sharded, tmp_path, 9)[0]
    for found, taken, sent in two_ranks(sharded, tmp_path, 9, True):
        assert taken == 2 * STEPS
        assert sent == taken * BLOCKS_AND_ROOT
        assert distance(found, once) < 1e-5
