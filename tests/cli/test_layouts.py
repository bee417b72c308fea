"""The five layouts of arXiv:2309.00754 as configs: number of models and adapters, and bytes."""

import re

import pytest
import torch

from lit_align.cli.main import main
from lit_align.data.text import load_tokenizer
from lit_align.models.policy_with_reward_head import PolicyWithRewardHead

SHAPE = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 176,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
# parameters of a model without its score head, of an adapter of rank 4, and of the head
N, L, HEAD = 117056, 9856, 64
LAYOUTS = {  # full models, adapters, heads (score and value), and static bytes by the formula
    "ppo": (4, 0, 2, 28 * N),
    "lora_ppo": (4, 2, 3, 8 * N + 24 * L),
    "dynamic_lora_ppo": (2, 2, 2, 4 * N + 24 * L),
    "joint_hydra_ppo": (1, 1, 2, 2 * N + 12 * L),
    "hydra_ppo": (1, 2, 2, 2 * N + 24 * L),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Save a policy with a reward head and the toy tokenizer, which can serve every role."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    PolicyWithRewardHead(config=dict(SHAPE)).save(folder)
    load_tokenizer("toy").save_pretrained(folder)
    return str(folder)


def run_argv(layout: str, base: str) -> list[str]:
    """Return the arguments of a run of one batch in which every path is `base`."""
    argv = ["fit", "--config", layout, "--model.policy.path", base, "--trainer.max_epochs", "1"]
    argv += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0"]
    argv += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    argv += ["--data.path", "toy", "--data.batch_size", "4", "--data.max_rows", "8"]
    argv += ["--data.tokenizer", "toy", "--rollout.max_new_tokens", "4"]
    argv += ["--model.policy.dtype", "float32", "--trainer.enable_checkpointing", "false"]
    if "hydra" not in layout:
        argv += ["--model.critic.path", base, "--model.critic.dtype", "float32"]
    if layout in ("ppo", "lora_ppo"):
        argv += ["--reward.functions.path", base]
        argv += ["--reward.functions.dtype", "float32"]
    if layout == "ppo":
        argv += ["--model.minibatch_size", "4"]
    else:
        argv += ["--model.policy.lora.r", "4"]
    if layout == "lora_ppo":
        argv += ["--model.reference.path", base, "--model.reference.dtype", "float32"]
    if layout in ("lora_ppo", "dynamic_lora_ppo"):
        argv += ["--model.critic.lora.r", "4"]
    return argv


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_models_and_bytes_of_its_formula(layout, base, tmp_path, capsys):
    models, adapters, heads, static = LAYOUTS[layout]
    assert main([*run_argv(layout, base), "--trainer.default_root_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    line = r"^(policy|critic|reference|reward) .* ([\d,]+) +([\d,]+)$"
    table = {
        role: (int(trained.replace(",", "")), int(size.replace(",", "")) // 4)
        for role, trained, size in re.findall(line, printed, re.MULTILINE)
    }
    assert table.keys() == {"policy", "critic", "reference", "reward"}
    trained, total = (sum(column) for column in zip(*table.values(), strict=True))
    assert total == models * N + adapters * L + heads * HEAD
    # 2 bytes per weight and 10 more per trained one; the formulas do not count heads
    trained_without_head = trained - HEAD
    assert 2 * (total - heads * HEAD) + 10 * trained_without_head == static
