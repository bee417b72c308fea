"""Memory of every method at one model and length, from simulated runs with a few blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from plan_extrapolate import Extrapolation, extrapolate_peaks

from lit_align.cli.overlays import Settings, read_config
from lit_align.cli.plan_run import PlanCLI
from lit_align.plan.architectures import architecture_config
from lit_align.plan.memory_tracker import MemoryTracker
from lit_align.plan.simulate import simulate

LAYOUTS = ("ppo", "lora_ppo", "dynamic_lora_ppo", "joint_hydra_ppo", "hydra_ppo")
FULL_TRAINING = ("ppo", "remax", "grpo", "grpovi", "rto", "spr", "sft", "dpo")
NUM_ROWS = 8  # texts per rank and optimizer step
# Blocks of the traces. With two or fewer, FSDP2 gathers fewer blocks at once than with more.
TRACED_BLOCKS = (3, 4, 5)
NUM_SAMPLES = {"grpo": 4, "grpovi": 4, "spr": 4}  # responses per prompt
PAIRED = ("dpo",)  # methods with two texts per row


class SweepSize(NamedTuple):
    """Model, lengths and machine that all methods are compared at.

    Args:
        path: Architecture, as in `--model.policy.path`.
        devices: GPUs per node.
        num_nodes: Number of nodes.
        gather_for_generation: Argument of `FSDP2`. None means to estimate if the weights fit.
        sync_every_microbatch: Argument of `FSDP2`.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
    """

    path: str
    devices: int = 8
    num_nodes: int = 1
    gather_for_generation: bool | None = None
    sync_every_microbatch: bool = False
    prompt: int = 512
    response: int = 512

    @property
    def tokens(self) -> int:
        """Return the tokens of prompt and response together."""
        return self.prompt + self.response

    @property
    def rank(self) -> int:
        """Return the rank of GaLore and SLTrain: a quarter of the hidden size, as in the papers."""
        return int(architecture_config(self.path).hidden_size) // 4


SWEEP_SIZES = {
    "7b": SweepSize("shape:llama-2-7b", gather_for_generation=True),
    "70b": SweepSize(
        "shape:llama-2-70b", num_nodes=8, gather_for_generation=False, sync_every_microbatch=True
    ),
}


class SweepRow(NamedTuple):
    """Memory of one method.

    Args:
        method: Name of the recipe.
        by: AdamW, GaLore or SLTrain.
        extrapolation: Peaks with all blocks.
    """

    method: str
    by: str
    extrapolation: Extrapolation

    def peak(self, phase: str) -> int:
        """Return the peak bytes of a phase on the device, 0 if the method has no such phase.

        Args:
            phase: Name of the phase.
        """
        peaks = self.extrapolation.peaks
        return peaks[phase].total if phase in peaks else 0


def sweep_methods(size: SweepSize, memory: int) -> Iterator[SweepRow]:
    """Plan all methods, one after the other.

    Args:
        size: Model, lengths and machine.
        memory: Memory of a device in bytes.
    """
    num_blocks = architecture_config(size.path).num_hidden_layers
    cases = [(method, "AdamW") for method in dict.fromkeys([*LAYOUTS, *FULL_TRAINING])]
    cases += [(method, by) for by in ("GaLore", "SLTrain") for method in FULL_TRAINING]
    for method, by in cases:
        traces = {n: trace_with_blocks(method, by, size, n, memory) for n in TRACED_BLOCKS}
        yield SweepRow(method, by, extrapolate_peaks(traces, num_blocks))


def trace_with_blocks(
    method: str, by: str, size: SweepSize, num_blocks: int, memory: int
) -> MemoryTracker:
    """Simulate one method with networks of a given number of blocks.

    Args:
        method: Name of the recipe.
        by: AdamW, GaLore or SLTrain.
        size: Model, lengths and machine.
        num_blocks: Blocks of every network.
        memory: Memory of a device in bytes.
    """
    architecture = architecture_config(size.path).to_diff_dict()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({**architecture, "num_hidden_layers": num_blocks}))
        config = method_config(method, by, size, str(file))
        cli = PlanCLI(["--config", json.dumps(config)])
        return simulate(cli.build, cli.machine._replace(memory=memory))


def method_config(method: str, by: str, size: SweepSize, path: str) -> Settings:
    """Return a recipe at the lengths and rows of a size, with all networks of one architecture.

    Args:
        method: Name of the recipe.
        by: AdamW, GaLore or SLTrain.
        size: Model, lengths and machine.
        path: Path of the config.json of every network.
    """
    config = read_config(method)
    arguments = config["model"]["init_args"]
    if "dpo_adapter" in arguments:  # a folder of an earlier run: use a full model instead
        full_model = {"class_path": "Policy", "init_args": {"path": path}}
        arguments |= {"dpo_adapter": None, "dpo": full_model}
    for section in (config["model"], config.get("reward", {})):
        for network in network_arguments(section):
            network["path"] = path
    arguments["microbatch_tokens"] = 2 * size.tokens
    arguments.pop("minibatch_size", None)
    if method in NUM_SAMPLES:
        arguments["num_samples"] = NUM_SAMPLES[method]
    if "num_offline_samples" in arguments:
        arguments["num_offline_samples"] = 0
    lengths = {"max_tokens": size.tokens}
    if "rollout" in config:
        lengths = {"max_prompt_tokens": size.prompt}
        config["rollout"]["init_args"] = {"max_new_tokens": size.response}
        set_reward_model(config["reward"]["init_args"], size, path)
    rows = NUM_ROWS // NUM_SAMPLES.get(method, 2 if method in PAIRED else 1)
    config["data"] = {
        "class_path": config["data"]["class_path"],
        "init_args": {"path": "none", "batch_size": rows, **lengths},
    }
    set_training(arguments, by, size, path)
    config["trainer"] = trainer_config(size)
    return config


def set_reward_model(arguments: Settings, size: SweepSize, path: str) -> None:
    """Replace all reward functions by one reward model, unless the reward shares the backbone.

    Args:
        arguments: Arguments of the reward callback, changed in place.
        size: Model, lengths and machine.
        path: Path of the config.json of every network.
    """
    if arguments["functions"]["class_path"] != "SharedBackboneReward":
        settings = {"path": path, "dtype": "bfloat16", "tokens_per_pass": 2 * size.tokens}
        arguments["functions"] = {"class_path": "ModelReward", "init_args": settings}


def network_arguments(section: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments of every network in a section: each dictionary with a `path`.

    Args:
        section: Section of a config, or any value in it.
    """
    if isinstance(section, dict):
        if "path" in section:
            yield section
        for value in section.values():
            yield from network_arguments(value)


def set_training(arguments: Settings, by: str, size: SweepSize, path: str) -> None:
    """Set GaLore or SLTrain for the networks that train.

    Args:
        arguments: Arguments of the algorithm, changed in place.
        by: AdamW, GaLore or SLTrain.
        size: Model, lengths and machine.
        path: Path of the config.json of every network.
    """
    if by == "GaLore":
        galore = {"lr": 1e-5, "rank": size.rank}
        arguments["optimizer"] = {
            "class_path": "lit_align.optim.galore.GaLore",
            "init_args": galore,
        }
    if by == "SLTrain":
        sltrain = {"rank": size.rank, "alpha": 8.0, "density": 0.05}
        for role in ("policy", "critic"):
            network = (arguments.get(role) or {}).get("init_args")
            if network is not None:
                # SLTrain starts from random weights: a config instead of a path.
                network |= {"path": None, "config": architecture_config(path).to_diff_dict()}
                network["sltrain"] = {
                    "class_path": "lit_align.models.sltrain.SLTrain",
                    "init_args": sltrain,
                }


def trainer_config(size: SweepSize) -> Settings:
    """Return the trainer section: FSDP2 with activation checkpointing over all GPUs.

    Args:
        size: Model, lengths and machine.
    """
    sharding = {
        "activation_checkpointing": True,
        "gather_for_generation": size.gather_for_generation,
        "sync_every_microbatch": size.sync_every_microbatch,
    }
    return {
        "devices": size.devices,
        "num_nodes": size.num_nodes,
        "precision": "bf16-mixed",
        "strategy": {"class_path": "lit_align.models.parallel.fsdp2.FSDP2", "init_args": sharding},
    }
