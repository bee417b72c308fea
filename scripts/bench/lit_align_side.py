"""lit_align's side of the benchmark: the objects that `lit-align fit` builds, from Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, Trainer

from bench.case import Case
from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.dpo import DPO
from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.reward_model import RewardModel
from lit_align.algorithms.rloo import RLOO
from lit_align.algorithms.sft import SFT
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.data.base import TextDataModule
from lit_align.data.instructions import InstructionData
from lit_align.data.preferences import PreferenceData
from lit_align.data.prompts import PromptData
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead
from lit_align.rewards.function import FunctionReward


class StepCallback(Callback):
    """Callback that calls a function after each step.

    Args:
        after_step: Function to call.
    """

    def __init__(self, after_step: Callable[[], None]):
        self.after_step = after_step

    def on_train_batch_end(self, *args: object) -> None:
        """Call the function."""
        self.after_step()


def algorithm(case: Case, folder: Path) -> Algorithm:
    """Return the algorithm with the settings of the case.

    Args:
        case: Case of the benchmark.
        folder: Folder with the model.
    """
    shape, model = case.shape, str(folder / "model")
    tokens = (
        shape.rows_per_microbatch
        * shape.max_tokens
        * (1 if case.algorithm in ("sft", "grpo", "rloo") else 2)
    )
    parts = {"microbatch_tokens": tokens}
    if case.algorithm == "reward_model":
        return RewardModel(reward_model=partial(ScalarHead, model), **parts)
    policy = partial(Policy, model)
    if case.is_online:
        kind = {"grpo": GRPO, "rloo": RLOO}[case.algorithm]
        return kind(policy=policy, num_samples=shape.num_samples, **parts)
    return {"sft": SFT, "dpo": DPO}[case.algorithm](policy=policy, **parts)


def data(case: Case, folder: Path) -> TextDataModule:
    """Return the data module, with batches of one optimizer step.

    Args:
        case: Case of the benchmark.
        folder: Folder with the rows and the tokenizer.
    """
    shape, files = case.shape, {"path": f"{folder}/rows.jsonl", "tokenizer": f"{folder}/model"}
    if case.is_online:
        return PromptData(**files, batch_size=shape.num_rows // shape.num_samples)
    kind = InstructionData if case.algorithm == "sft" else PreferenceData
    return kind(**files, batch_size=shape.num_rows)


def callbacks(case: Case) -> list[Callback]:
    """Return the callbacks of rollout and reward if the algorithm has prompts.

    Args:
        case: Case of the benchmark.
    """
    if not case.is_online:
        return []
    return [
        Rollout(max_new_tokens=case.shape.response),
        Reward(FunctionReward("bench.data.reward")),
    ]


def run(case: Case, folder: Path, steps: int, after_step: Callable[[], None]) -> None:
    """Run optimizer steps of the case.

    Args:
        case: Case of the benchmark.
        folder: Folder with model and rows.
        steps: Number of optimizer steps.
        after_step: Function to call after each step.
    """
    fit(case, folder, steps, after_step, algorithm(case, folder), callbacks(case))


def fit(
    case: Case,
    folder: Path,
    steps: int,
    after_step: Callable[[], None],
    algorithm: Algorithm,
    callbacks: list[Callback],
) -> None:
    """Run optimizer steps of an algorithm on the rows of a case.

    Args:
        case: Case of the benchmark.
        folder: Folder with model and rows.
        steps: Number of optimizer steps.
        after_step: Function to call after each step.
        algorithm: Algorithm to fit.
        callbacks: Callbacks of the trainer.
    """
    trainer = Trainer(
        accelerator="gpu" if case.is_bf16 else "cpu",
        devices=1,
        precision="bf16-true" if case.is_bf16 else "32-true",
        max_epochs=1,
        limit_train_batches=steps,
        callbacks=[*callbacks, StepCallback(after_step)],
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(algorithm, data(case, folder))
