"""`lit-align plan --sweep`: every method at one model and length, as the papers' tables have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lit_align.cli.overlays import Settings, read_config
from lit_align.cli.plan_run import PlanCLI
from lit_align.plan.architectures import architecture_config
from lit_align.plan.extrapolate import Extrapolation, extrapolated
from lit_align.plan.memory_tracker import MemoryTracker
from lit_align.plan.simulate import traced

LAYOUTS = ("ppo", "lora_ppo", "dl_ppo", "joint_hydra_ppo", "hydra_ppo")
WHOLE = ("ppo", "remax", "grpo", "grpovi", "rto", "spr", "sft", "dpo")
ROWS = 8  # texts that a rank learns from in a step
BLOCKS = (3, 4, 5)  # traced; the rest are like these, and the first says whether they are
SAMPLES = {"grpo": 4, "grpovi": 4, "spr": 4}  # of a prompt
PAIRED = ("dpo",)  # two texts a row


class Size(NamedTuple):
    """A model and the machines for it.

    Args:
        path: As `--model.policy.path` takes it.
        devices: GPUs of a node.
        nodes: Of these.
        gather: Whether whole weights are gathered to answer; None where an estimate says that
            they fit.
        sync_every_microbatch: As in `FSDP2`.
        prompt: Tokens of a prompt.
        answer: Tokens of an answer.
    """

    path: str
    devices: int = 8
    nodes: int = 1
    gather: bool | None = None
    sync_every_microbatch: bool = False
    prompt: int = 512
    answer: int = 512

    @property
    def tokens(self) -> int:
        """Of a whole text."""
        return self.prompt + self.answer

    @property
    def rank(self) -> int:
        """Of GaLore's and SLTrain's matrices: a quarter of the width, as their papers have it."""
        return int(architecture_config(self.path).hidden_size) // 4


SIZES = {
    "7b": Size("shape:llama-2-7b", gather=True),
    "70b": Size("shape:llama-2-70b", nodes=8, gather=False, sync_every_microbatch=True),
}


class Line(NamedTuple):
    """A line of the table.

    Args:
        method: The packaged config.
        by: AdamW, GaLore or SLTrain.
        grown: Of all blocks.
    """

    method: str
    by: str
    grown: Extrapolation

    def peak(self, phase: str) -> int:
        """The most bytes of a phase on the device, 0 where there is no such phase."""
        heights = self.grown.heights
        return heights[phase].total if phase in heights else 0


def sweep(size: Size, memory: int) -> Iterator[Line]:
    """All methods, one after the other.

    Args:
        size: The model.
        memory: Bytes of a device.
    """
    cases = [(method, "AdamW") for method in dict.fromkeys([*LAYOUTS, *WHOLE])]
    cases += [(method, by) for by in ("GaLore", "SLTrain") for method in WHOLE]
    for method, by in cases:
        traces = {blocks: with_blocks(method, by, size, blocks, memory) for blocks in BLOCKS}
        yield Line(
            method, by, extrapolated(traces, architecture_config(size.path).num_hidden_layers)
        )


def with_blocks(method: str, by: str, size: Size, blocks: int, memory: int) -> MemoryTracker:
    """One simulation.

    Args:
        method: Of the config.
        by: AdamW, GaLore or SLTrain.
        size: The model.
        blocks: Of every network.
        memory: Bytes of a device.
    """
    architecture = {**architecture_config(size.path).to_diff_dict(), "num_hidden_layers": blocks}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(architecture))
        config = settings(method, by, size, str(file))
        cli = PlanCLI(["--config", json.dumps(config)])
        return traced(cli.build, cli.machine._replace(memory=memory))


def settings(method: str, by: str, size: Size, path: str) -> Settings:
    """A packaged config at this length and number of rows, with all networks of one shape.

    Args:
        method: Of the config.
        by: AdamW, GaLore or SLTrain.
        size: The model.
        path: Of every network's config.json.
    """
    config = read_config(method)
    if "dpo_adapter" in config["model"]["init_args"]:  # its folder is not there: a whole model
        whole_model = {"class_path": "Policy", "init_args": {"path": path}}
        config["model"]["init_args"] |= {"dpo_adapter": None, "dpo": whole_model}
    for section in (config["model"], config.get("reward", {})):
        for network in networks(section):
            network["path"] = path
    arguments = config["model"]["init_args"]
    arguments["microbatch_tokens"] = 2 * size.tokens
    arguments.pop("minibatch_size", None)
    if method in SAMPLES:
        arguments["num_samples"] = SAMPLES[method]
    if "num_offline_samples" in arguments:
        arguments["num_offline_samples"] = 0
    lengths: dict[str, Any] = {"max_tokens": size.tokens}
    if "rollout" in config:
        lengths = {"max_prompt_tokens": size.prompt}
        config["rollout"]["init_args"] = {"max_new_tokens": size.answer}
        if config["reward"]["init_args"]["functions"]["class_path"] != "SharedBackboneReward":
            half = {"path": path, "dtype": "bfloat16", "tokens_per_pass": 2 * size.tokens}
            whole = {"class_path": "ModelReward", "init_args": half}
            config["reward"]["init_args"]["functions"] = whole
    rows = ROWS // SAMPLES.get(method, 2 if method in PAIRED else 1)
    config["data"] = {
        "class_path": config["data"]["class_path"],
        "init_args": {"path": "none", "batch_size": rows, **lengths},
    }
    change(arguments, by, size, path)
    config["trainer"] = trainer(size)
    return config


def networks(section: Any) -> Iterator[dict[str, Any]]:
    """The arguments of every network, or of what has one."""
    if isinstance(section, dict):
        if "path" in section:
            yield section
        for value in section.values():
            yield from networks(value)


def change(arguments: Settings, by: str, size: Size, path: str) -> None:
    """What trains does so by GaLore, or as low-rank and sparse weights.

    Args:
        arguments: Of the algorithm.
        by: AdamW, GaLore or SLTrain.
        size: The model.
        path: Of every network's config.json.
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
                network |= {"path": None, "config": architecture_config(path).to_diff_dict()}
                network["sltrain"] = {
                    "class_path": "lit_align.models.sltrain.SLTrain",
                    "init_args": sltrain,
                }


def trainer(size: Size) -> Settings:
    """FSDP2 with checkpointing over all GPUs."""
    sharding = {
        "activation_checkpointing": True,
        "gather_for_generation": size.gather,
        "sync_every_microbatch": size.sync_every_microbatch,
    }
    return {
        "devices": size.devices,
        "num_nodes": size.nodes,
        "precision": "bf16-mixed",
        "strategy": {"class_path": "lit_align.models.parallel.fsdp2.FSDP2", "init_args": sharding},
    }
