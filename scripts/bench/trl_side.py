"""TRL's side of the benchmark: the same model, rows, lengths and micro-batches.

All other settings are TRL's defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from bench.case import Case
from bench.data import reward

KINDS = {
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "sft": (SFTTrainer, SFTConfig),
    "reward_model": (RewardTrainer, RewardConfig),
}


class StepCallback(TrainerCallback):
    """Callback that calls a function after each step.

    Args:
        after_step: Function to call.
    """

    def __init__(self, after_step: Callable[[], None]):
        self.after_step = after_step

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Call the function."""
        self.after_step()


def settings(case: Case, folder: Path, steps: int, batched: bool) -> dict[str, Any]:
    """Return the arguments of the configuration class.

    Args:
        case: Case of the benchmark.
        folder: Folder that the run writes to.
        steps: Number of optimizer steps.
        batched: Generate by the continuous batching of transformers.
    """
    shape = case.shape
    own: dict[str, Any] = {"max_length": shape.max_tokens}
    if case.is_online:
        own = {
            "num_generations": shape.num_samples,
            "max_completion_length": shape.response,
            "beta": 0.04 if case.algorithm == "grpo" else 0.05,
            "temperature": 1.0,
            "top_k": 0,
        }
        own |= {"loss_type": "grpo"} if case.algorithm == "grpo" else {}
        own |= {"use_transformers_continuous_batching": True} if batched else {}
    return own | {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": shape.rows_per_microbatch,
        "gradient_accumulation_steps": shape.num_rows // shape.rows_per_microbatch,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not case.is_bf16,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }


def run(
    case: Case, folder: Path, steps: int, after_step: Callable[[], None], batched: bool = False
) -> None:
    """Run optimizer steps of the case.

    Args:
        case: Case of the benchmark.
        folder: Folder with model and rows.
        steps: Number of optimizer steps.
        after_step: Function to call after each step.
        batched: Generate by the continuous batching of transformers.
    """
    kind, config = KINDS[case.algorithm]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    auto, options = AutoModelForCausalLM, {}
    if case.algorithm == "reward_model":
        auto, options = AutoModelForSequenceClassification, {"num_labels": 1}
    trainer = kind(
        model=auto.from_pretrained(folder / "model", dtype="auto", **options),
        args=config(**settings(case, folder, steps, batched)),
        train_dataset=Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder)),
        processing_class=tokenizer,
        callbacks=[StepCallback(after_step)],
        **({"reward_funcs": reward} if case.is_online else {}),
    )
    trainer.train()
