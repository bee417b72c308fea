"""SPR's memory: one network is on the device in each phase, and the update is as large as SFT's."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_models import Count, RandomPrompts, tiny, trainer, weights
from torch import Tensor
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lit_align.algorithms.sft import SFT
from lit_align.algorithms.spr import SPR
from lit_align.batches import Experience, TextBatch
from lit_align.models.adapters.lora import LoRA
from lit_align.models.parallel import offload


def adam(params):
    return AdamW(params, lr=1e-2)


class Poison:
    """Instead of moving tensors this makes what is parked unusable."""

    def offload(self):
        for tensor in self.tensors():
            if tensor not in self.devices:
                self.devices[tensor] = tensor.detach().clone()
                tensor.data.fill_(torch.nan)

    def reload(self):
        for tensor, kept in self.devices.items():
            tensor.data.copy_(kept)
        self.devices.clear()


@pytest.fixture
def poisoned(monkeypatch):
    monkeypatch.setattr(offload.OffloadedTensors, "offload", Poison.offload)
    monkeypatch.setattr(offload.OffloadedTensors, "reload", Poison.reload)


class Phases(SPR):
    """Notes in each phase which of policy, reference and optimizer state can be used."""

    def awake(self, phase):
        state = [tensor for tensor in self.optimizer_state() if tensor.ndim]
        parts = [self.policy.parameters(), self.reference.parameters(), state]
        usable = [all(map(self.usable, part)) for part in parts]
        found = vars(self).setdefault("found", {}).setdefault(phase, set())
        found.add((usable[0], usable[1], usable[2] and bool(state)))

    def usable(self, tensor):
        return tensor.device == self.device and bool(tensor.isfinite().all())

    def log_equal_groups(self, batch):
        super().log_equal_groups(batch)
        self.awake("log-probs")

    def reference_logprobs(self, batch):
        logprobs = super().reference_logprobs(batch)
        self.awake("reference")
        return logprobs

    def losses(self, batch):
        for loss in super().losses(batch):
            self.awake("update")
            yield loss


class Watched(Count):
    """Looks around while it scores."""

    def setup(self, algorithm):
        self.algorithm = algorithm

    def __call__(self, batch):
        self.algorithm.awake("scoring")
        return super().__call__(batch)


def check_phases(folder, accelerator):
    algorithm = Phases(policy=tiny, optimizer=adam)
    run = trainer(folder, limit_val_batches=0, accelerator=accelerator, devices=1)
    run.callbacks[1].weighted_sum.functions["count"] = Watched()
    run.fit(algorithm, RandomPrompts(3))
    policy, reference, state = (True, False, False), (False, True, False), (True, False, True)
    assert algorithm.found == {
        "scoring": {(False, False, False)},
        "reference": {reference},
        "log-probs": {policy},
        "update": {policy, state},  # before the first step there is no state
    }


def test_one_network_is_awake_in_each_phase(tmp_path, poisoned):
    check_phases(tmp_path, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_network_is_on_the_gpu_in_each_phase(tmp_path):
    check_phases(tmp_path, "gpu")


@pytest.mark.parametrize("policy", [tiny, lambda: tiny(lora=LoRA(r=2))])
def test_parking_changes_no_result(tmp_path, monkeypatch, policy):
    def learnt():
        algorithm = SPR(policy=policy, optimizer=adam)
        torch.manual_seed(0)
        run = trainer(tmp_path, max_epochs=2)
        run.fit(algorithm, RandomPrompts(2))
        return weights(algorithm.policy), run.callback_metrics

    plain, metrics = learnt()
    monkeypatch.setattr(offload.OffloadedTensors, "offload", Poison.offload)
    monkeypatch.setattr(offload.OffloadedTensors, "reload", Poison.reload)
    parked, others = learnt()
    assert all(map(torch.equal, plain, parked))
    assert metrics == others
    assert "val/reward" in metrics


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it and live."""

    def __init__(self):
        super().__init__()
        self.living, self.most, self.seen = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, made)
        return made

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen[key] = weakref.finalize(storage, self.free, key, size)
            self.living += size
            self.most = max(self.most, self.living)
        return tensor

    def free(self, key, size):
        del self.seen[key]
        self.living -= size


def peak(kind, batch) -> int:
    """Bytes at the height of an update, beside weights and optimizer state."""

    class Bare(kind):
        trainer = SimpleNamespace(
            world_size=1, strategy=SimpleNamespace(reduce=lambda value, reduce_op: value)
        )

        def set_gradient_sync(self, wanted):
            pass

        def manual_backward(self, loss):
            loss.backward()

        def step(self):
            self.adam.step()
            self.adam.zero_grad()
            return {}

    algorithm = Bare(policy=tiny)
    algorithm.policy = tiny()
    algorithm.adam = adam(algorithm.policy.parameters())
    algorithm.update(batch)  # makes the optimizer's state
    with Peak() as measured:
        algorithm.update(batch)
    return measured.most


def test_the_update_takes_the_memory_of_an_sft_step():
    rows, before, after = 16, 8, 24
    responses = torch.randint(3, 32, (rows, after), generator=torch.Generator().manual_seed(0))
    asked, said = torch.ones(rows, before), torch.ones(rows, after, dtype=torch.bool)
    batch = Experience(
        prompts=asked.long(),
        prompt_mask=asked.bool(),
        prompt_lengths=[before] * rows,
        responses=responses,
        response_mask=said,
        response_lengths=[after] * rows,
        weights=torch.full((rows,), 0.25),
    )
    texts = TextBatch(
        tokens=batch.tokens,
        token_mask=batch.token_mask,
        target_mask=torch.cat([~asked.bool(), said], 1),
        lengths=batch.lengths,
    )
    step = peak(SFT, texts)  # reads its head for the prompts, too: 7 places more per row
    assert 0.99 * step < peak(SPR, batch) < 1.005 * step
    assert peak(SPR, batch.rows(range(8))) < 0.7 * step
