"""Reward: scores, their statistics over ranks, and skipped prompts."""

import math
from contextlib import nullcontext

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_align.batches import Experience, TextBatch
from lit_align.callbacks.reward import Reward
from lit_align.rewards.base import RewardError, RewardFunction
from lit_align.rewards.rules import Length


class Fixed(RewardFunction):
    """Reward function with fixed scores and with weights."""

    def __init__(self, *scores: float | None):
        self.scores, self.setups = scores, 0

    def setup(self, algorithm: LightningModule) -> None:
        self.setups += 1
        self.weights = nn.Linear(1, 1)

    def __call__(self, batch: Experience) -> list[float | None]:
        self.grad, self.dtype = torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")
        self.autocast = torch.is_autocast_enabled("cpu")
        return [self.scores[row] for row in batch.columns["row"]]


class FakeRollout(Callback):
    """Replacement of `Rollout` with two rows per prompt, the second one greedy."""

    def generate(self, batch: Experience) -> None:
        rows = 4
        columns = {"prompt": ["p"] * rows, "completion": ["c"] * rows, "row": [0, 1, 2, 3]}
        rollout = Experience(
            columns,
            prompts=torch.zeros(rows, 1),
            responses=torch.zeros(rows, 2),
            response_mask=torch.ones(rows, 2, dtype=torch.bool),
            is_greedy=[False, True, False, True],
            is_offline=[False] * 4,
            group=[0, 0, 1, 1],
            is_new=[True, True, True, False],
        )
        batch.replace_with(rollout)

    def on_train_batch_start(self, trainer, algorithm, batch, batch_idx):
        self.generate(batch)

    def on_validation_batch_start(self, trainer, algorithm, batch, batch_idx, dataloader_idx=0):
        self.generate(batch)

    def on_predict_batch_start(self, trainer, algorithm, batch, batch_idx, dataloader_idx=0):
        self.generate(batch)


class KeepBatch(LightningModule):
    """Module that keeps the last batch."""

    phase = nullcontext

    def __init__(self):
        super().__init__()
        self.policy = nn.Linear(1, 1)
        self.automatic_optimization = False

    def training_step(self, batch: Experience) -> None:
        self.batch = batch

    def validation_step(self, batch: Experience) -> None:
        self.batch = batch

    def predict_step(self, batch: Experience) -> list[float]:
        return batch.scores.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def trainer(reward: Reward, folder, precision: str = "32-true") -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=[FakeRollout(), reward],
        max_epochs=1,
        precision=precision,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def prompts(batches: int = 1) -> DataLoader:
    rows = [Experience(prompts=torch.zeros(2, 1)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def test_training_logs_sampled_rows_of_each_function(tmp_path):
    algorithm, reward = (
        KeepBatch(),
        Reward([Fixed(1, 9, 3, 9), Fixed(None, 9, 4, 9)], weights=[1, 10]),
    )
    run = trainer(reward, tmp_path)
    run.fit(algorithm, prompts())
    assert numbers(run.logged_metrics) == {
        "rewards/fixed/mean": 2.0,
        "rewards/fixed/std": pytest.approx(2**0.5),
        "rewards/fixed_2/mean": 4.0,
        "rewards/fixed_2/std": 0.0,
    }
    assert algorithm.batch.scores.tolist() == [1.0, 99.0, 43.0, 99.0]
    assert algorithm.batch.columns["scores/fixed"] == [1.0, 9.0, 3.0, 9.0]


def test_validation_logs_mean_over_new_rows(tmp_path):
    run = trainer(Reward([Fixed(1, 2, 6, 100), Fixed(None, 2, None, None)], [1, 1]), tmp_path)
    run.validate(KeepBatch(), prompts(2), verbose=False)
    assert numbers(run.callback_metrics) == {
        "val/rewards/fixed/mean": 3.0,
        "val/rewards/fixed_2/mean": 2.0,
    }


def test_predict_scores_and_logs_nothing(tmp_path):
    run = trainer(Reward(Fixed(1, 2, 3, 4)), tmp_path)
    assert run.predict(KeepBatch(), prompts()) == [[1.0, 2.0, 3.0, 4.0]]


def test_skipped_prompt_is_masked_and_counted(tmp_path):
    algorithm, reward = KeepBatch(), Reward(Fixed(1, 9, 3, math.nan), skip_failed_prompts=True)
    run = trainer(reward, tmp_path)
    with pytest.warns(UserWarning, match="returned nan"):
        run.fit(algorithm, prompts())
    assert numbers(run.logged_metrics) == {
        "rewards/fixed/mean": 1.0,
        "rewards/fixed/std": 0.0,
        "rewards/skipped_prompts": 1.0,
    }
    assert algorithm.batch.scores.tolist() == [1.0, 9.0, 0.0, 0.0]
    assert algorithm.batch.response_mask.tolist() == [[True] * 2] * 2 + [[False] * 2] * 2


def test_skipped_rows_are_not_new_in_validation(tmp_path):
    algorithm, reward = KeepBatch(), Reward(Fixed(1, 2, math.nan, 4), skip_failed_prompts=True)
    run = trainer(reward, tmp_path)
    with pytest.warns(UserWarning, match="returned nan"):
        run.validate(algorithm, prompts(2), verbose=False)
    assert algorithm.batch.is_new == [True, True, False, False]
    assert numbers(run.callback_metrics) == {
        "val/rewards/fixed/mean": 1.5,
        "val/rewards/skipped_prompts": 2.0,
    }


def test_failed_function_stops_run(tmp_path):
    with pytest.raises(RewardError, match=r"reward 'fixed' returned inf, .*\n  prompt: p\n  compl"):
        trainer(Reward(Fixed(1, math.inf, 1, 1)), tmp_path).fit(KeepBatch(), prompts())


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_functions_run_in_trainer_precision_without_gradients(tmp_path, timeout):
    source = Fixed(1, 1, 1, 1)
    trainer(Reward(source, timeout=timeout), tmp_path, "bf16-mixed").fit(KeepBatch(), prompts())
    assert (source.grad, source.autocast, source.dtype) == (False, True, torch.bfloat16)


def test_reward_weights_are_not_in_checkpoints(tmp_path):
    algorithm, source = KeepBatch(), Fixed(1, 1, 1, 1)
    run = trainer(Reward(source), tmp_path)
    run.fit(algorithm, prompts())
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert sorted(state) == ["policy.bias", "policy.weight"]
    assert source.setups == 1


def test_statistics_are_over_all_ranks():
    class TwoRanks:
        """Trainer whose other rank has one row with score 6."""

        strategy: "TwoRanks"

        def __init__(self):
            self.strategy, self.others = self, [torch.tensor([[6.0], [1.0]]), torch.tensor([4.0])]

        def reduce(self, mine: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "sum"
            return mine + self.others.pop(0)

    reward = Reward(Length(1))
    batch = Experience({"scores/length": [2.0, 4.0, 50.0]}, responses=torch.zeros(3, 1))
    mean, std, number = reward.source_statistics(TwoRanks(), batch, [True, True, False])["length"]
    assert (mean, number) == (4.0, 3.0)
    assert std == 2.0  # of 2, 4 and 6


@pytest.mark.parametrize("batch", [Experience(prompts=torch.zeros(1, 1)), TextBatch()])
def test_batch_without_responses_is_ignored(batch):
    Reward(Fixed(1.0)).on_train_batch_start(None, None, batch, 0)
    assert "scores" not in vars(batch)


def test_reward_is_built_from_config():
    parser = ArgumentParser()
    parser.add_class_arguments(Reward, "reward")
    length = {"class_path": "lit_align.rewards.rules.Length", "init_args": {"target": 3}}
    for functions, names in ((length, ["length"]), ([length, length], ["length", "length_2"])):
        settings = {"reward": {"functions": functions, "timeout": 2, "skip_failed_prompts": True}}
        built = parser.instantiate_classes(parser.parse_object(settings)).reward
        assert list(built.weighted_sum.functions) == names
