"""The same data set and the same reward function, in TRL and in lit_align.

    python docs/examples/from_trl.py lit_align
    python docs/examples/from_trl.py trl           # needs pip install trl

Both run GRPO for two rollouts of 4 prompts x 4 answers on a Llama of 0.1 M parameters with random
weights, which is written to runs/from_trl/model first. Neither needs a network.
"""

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path("runs/from_trl")
NUM_ROLLOUTS, NUM_PROMPTS, NUM_SAMPLES, NUM_TOKENS = 2, 4, 4, 12


def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score completions as a TRL reward function: each word above the row's limit costs a point."""
    lengths = [len(text.split()) for text in completions]
    return [-max(0, n - most) for n, most in zip(lengths, columns["max_words"], strict=True)]


def prepare() -> tuple[Path, Path]:
    """Write the model and the data for both programs, and return their paths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lit_align.data.toy import toy_rows, toy_tokenizer

    model, data = FOLDER / "model", FOLDER / "prompts.jsonl"
    sizes = {"vocab_size": 192, "hidden_size": 64, "intermediate_size": 168}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **layers, **ends)).save_pretrained(model)
    toy_tokenizer().save_pretrained(model)
    rows = [{"prompt": row["prompt"], "max_words": 5} for row in toy_rows("train")[:64]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data


def with_lit_align(model: Path, data: Path) -> None:
    """Run `lit-align fit` with the same settings."""
    from lit_align.cli.main import main

    words = [
        *("fit", "--config", "grpo", "--model.policy.path", model),
        *("--model.policy.activation_checkpointing", "false", "--trainer.precision", "32-true"),
        *("--data.path", data, "--data.name", "null", "--data.rename_columns", "null"),
        *("--data.eval_split", "null", "--data.batch_size", NUM_PROMPTS),
        *("--model.num_samples", NUM_SAMPLES, "--rollout.max_new_tokens", NUM_TOKENS),
        *("--model.kl_coef", 0.04, "--model.optimizer.lr", 1e-3),
        *("--reward.functions", "FunctionReward"),
        *("--reward.functions.function", f"{Path(__file__).resolve()}:brevity"),
        *("--trainer.limit_train_batches", NUM_ROLLOUTS, "--trainer.accelerator", "cpu"),
        *("--trainer.default_root_dir", FOLDER / "lit_align"),
    ]
    if main([str(word) for word in words]):
        raise SystemExit("the run failed")


def with_trl(model: Path, data: Path) -> None:
    """Run the TRL script that the command above replaces."""
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(FOLDER / "trl"),
        per_device_train_batch_size=NUM_PROMPTS * NUM_SAMPLES,
        num_generations=NUM_SAMPLES,
        max_completion_length=NUM_TOKENS,
        beta=0.04,
        loss_type="grpo",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=NUM_ROLLOUTS,
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    rows = load_dataset("json", data_files=str(data), split="train")
    GRPOTrainer(model=str(model), reward_funcs=brevity, args=config, train_dataset=rows).train()


if __name__ == "__main__":
    {"lit_align": with_lit_align, "trl": with_trl}[sys.argv[1]](*prepare())
