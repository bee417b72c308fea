"""Memory of SPR: one network on the device in each phase, and an update as large as that of SFT."""

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
    """Fills offloaded tensors with NaN instead of moving them, so that any use shows."""

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


class RecordingSPR(SPR):
    """Records in each phase which of policy, reference and optimizer state are on the device."""

    def record(self, phase):
        state = [tensor for tensor in self.optimizer_state() if tensor.ndim]
        groups = [self.policy.parameters(), self.reference.parameters(), state]
        loaded = [all(map(self.is_loaded, group)) for group in groups]
        found = vars(self).setdefault("found", {}).setdefault(phase, set())
        found.add((loaded[0], loaded[1], loaded[2] and bool(state)))

    def is_loaded(self, tensor):
        return tensor.device == self.device and bool(tensor.isfinite().all())

    def log_equal_groups(self, batch):
        super().log_equal_groups(batch)
        self.record("log-probs")

    def reference_logprobs(self, batch):
        logprobs = super().reference_logprobs(batch)
        self.record("reference")
        return logprobs

    def losses(self, batch):
        for loss in super().losses(batch):
            self.record("update")
            yield loss


class RecordingCount(Count):
    """Records the networks on the device during scoring."""

    def setup(self, algorithm):
        self.algorithm = algorithm

    def __call__(self, batch):
        self.algorithm.record("scoring")
        return super().__call__(batch)


def assert_one_network_per_phase(folder, accelerator):
    algorithm = RecordingSPR(policy=tiny, optimizer=adam)
    run = trainer(folder, limit_val_batches=0, accelerator=accelerator, devices=1)
    run.callbacks[1].weighted_sum.functions["count"] = RecordingCount()
    run.fit(algorithm, RandomPrompts(3))
    policy, reference, state = (True, False, False), (False, True, False), (True, False, True)
    assert algorithm.found == {
        "scoring": {(False, False, False)},
        "reference": {reference},
        "log-probs": {policy},
        "update": {policy, state},  # before the first step there is no state
    }


def test_one_network_is_loaded_in_each_phase(tmp_path, poisoned):
    assert_one_network_per_phase(tmp_path, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_network_is_on_the_gpu_in_each_phase(tmp_path):
    assert_one_network_per_phase(tmp_path, "gpu")


@pytest.mark.parametrize("policy", [tiny, lambda: tiny(lora=LoRA(r=2))])
def test_offloading_changes_no_result(tmp_path, monkeypatch, policy):
    def fit():
        algorithm = SPR(policy=policy, optimizer=adam)
        torch.manual_seed(0)
        run = trainer(tmp_path, max_epochs=2)
        run.fit(algorithm, RandomPrompts(2))
        return weights(algorithm.policy), run.callback_metrics

    expected, metrics = fit()
    monkeypatch.setattr(offload.OffloadedTensors, "offload", Poison.offload)
    monkeypatch.setattr(offload.OffloadedTensors, "reload", Poison.reload)
    offloaded, offloaded_metrics = fit()
    assert all(map(torch.equal, expected, offloaded))
    assert metrics == offloaded_metrics
    assert "val/reward" in metrics


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the living tensors that were created inside this context."""

    def __init__(self):
        super().__init__()
        self.num_bytes, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        created = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, created)
        return created

    def count(self, tensor):
        storage = tensor.untyped_storage()
        # Private: the address of the storage, which views share. Checked with torch 2.13.
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = weakref.finalize(storage, self.free, key, size)
            self.num_bytes += size
            self.peak = max(self.peak, self.num_bytes)
        return tensor

    def free(self, key, size):
        del self.storages[key]
        self.num_bytes -= size


def update_peak(kind, batch) -> int:
    """Return the peak bytes of an update, without weights and optimizer state."""

    class WithoutTrainer(kind):
        trainer = SimpleNamespace(
            world_size=1, strategy=SimpleNamespace(reduce=lambda value, reduce_op: value)
        )

        def set_gradient_sync(self, is_last):
            pass

        def manual_backward(self, loss):
            loss.backward()

        def step(self):
            self.adam.step()
            self.adam.zero_grad()
            return {}

    algorithm = WithoutTrainer(policy=tiny)
    algorithm.policy = tiny()
    algorithm.adam = adam(algorithm.policy.parameters())
    algorithm.update(batch)  # creates the optimizer state
    with PeakBytes() as measured:
        algorithm.update(batch)
    return measured.peak


def test_the_update_needs_the_memory_of_an_sft_step():
    rows, num_prompt, num_response = 16, 8, 24  # N, P and R
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(3, 32, (rows, num_response), generator=generator)
    prompt_mask = torch.ones(rows, num_prompt, dtype=torch.bool)
    response_mask = torch.ones(rows, num_response, dtype=torch.bool)
    batch = Experience(
        prompts=prompt_mask.long(),
        prompt_mask=prompt_mask,
        prompt_lengths=[num_prompt] * rows,
        responses=responses,
        response_mask=response_mask,
        response_lengths=[num_response] * rows,
        weights=torch.full((rows,), 0.25),
    )
    texts = TextBatch(
        tokens=batch.tokens,
        token_mask=batch.token_mask,
        target_mask=torch.cat([~prompt_mask, response_mask], 1),
        lengths=batch.lengths,
    )
    step = update_peak(SFT, texts)  # its head also reads the prompts: 7 positions more per row
    assert 0.99 * step < update_peak(SPR, batch) < 1.005 * step
    assert update_peak(SPR, batch.rows(range(8))) < 0.7 * step
