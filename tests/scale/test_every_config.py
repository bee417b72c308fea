"""Every packaged config logs the same numbers on two ranks as on one, under every strategy."""

import csv
import math

import pytest
from run_cli import ONLINE, fit_argv, run

from lit_align.cli.overlays import packaged_configs, read_config

OVERLAYS = [
    name
    for name in packaged_configs()
    if "class_path" not in (read_config(name).get("model") or {})
]
CONFIGS = [name for name in packaged_configs() if name not in OVERLAYS]
TWO = "--trainer.devices=2"
STRATEGIES = {
    "fsdp2": (TWO, "--trainer.strategy=fsdp2"),
    "fsdp2_cpu_offload": (TWO, "--trainer.strategy=fsdp2_cpu_offload"),
    "ddp": (TWO, "--trainer.strategy=ddp"),
    "fsdp.yaml": ("--config=fsdp", TWO),
    "fsdp.yaml, LoRA": ("--config=lora", "--model.policy.lora.r=4", "--config=fsdp", TWO),
    "ddp, LoRA": ("--config=lora", "--model.policy.lora.r=4", "--trainer.strategy=ddp", TWO),
    "multi_node.yaml": ("--config=multi_node", TWO, "--trainer.num_nodes=1"),
}
FIRST_TIER = {("dpo", "fsdp.yaml, LoRA")}
IN_TIERS = [
    pytest.param(
        config, strategy, marks=() if (config, strategy) in FIRST_TIER else pytest.mark.long
    )
    for config in CONFIGS
    for strategy in STRATEGIES
]
ADAPTED = {"hydra_ppo", "joint_hydra_ppo", "dynamic_lora_ppo", "lora_ppo"}  # with own adapters


def logged(folder, config, more, rows, ranks):
    """Return the metrics of four iterations with `rows` rows on each rank."""
    online = ("--rollout.max_new_tokens=8",) if config in ONLINE else ()
    argv = fit_argv(folder, config, *online, f"--data.batch_size={rows}", *more, epochs=1)
    # far above rounding noise, by which AdamW would otherwise take a full step
    argv += ["--model.optimizer.eps=1e-4", "--trainer.enable_checkpointing=false"]
    log = folder.parent / f"{folder.name}.log"
    assert run(argv, log, ranks) == [0] * ranks, log.read_text()
    with (folder / "metrics.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row.get("loss")]
    names = [name for name in table[0] if name.startswith(("loss", "grad_norm", "reward", "kl"))]
    return {name: [float(row[name]) for row in table if row[name]] for name in names}


@pytest.mark.parametrize(("config", "strategy"), IN_TIERS)
def test_two_ranks_log_what_one_logs(tmp_path, config, strategy):
    more = STRATEGIES[strategy]
    if config in ADAPTED:  # the overlay would only change their rank
        more = tuple(word for word in more if "lora" not in word)
    alone = tuple(word for word in more if "lora" in word)
    one = logged(tmp_path / "one", config, alone, 8, 1)
    two = logged(tmp_path / "two", config, more, 4, 2)
    assert one.keys() == two.keys()
    assert len(one["loss"]) == 4
    assert any(math.isfinite(x) and x > 0 for name in one if "norm" in name for x in one[name])
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
