"""`lit-align plan --sweep`: every method at one model and length, as the papers' tables have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from lit_align.cli.overlays import Settings, read
from lit_align.cli.planned import PlannedCLI
from lit_align.tools.plan import Heights, simulated
from lit_align.tools.plan_blocks import extrapolated
from lit_align.tools.plan_ledger import Place
from lit_align.tools.plan_shapes import config_of

LAYOUTS = ("ppo", "lora_ppo", "dl_ppo", "joint_hydra_ppo", "hydra_ppo")
WHOLE = ("ppo", "remax", "grpo", "grpovi", "rto", "spr", "sft", "dpo")
ROWS = 8  # texts that a rank learns from in a step
BLOCKS = (2, 4)  # traced; the rest are like these
SAMPLES = {"grpo": 4, "grpovi": 4, "spr": 4}  # of a prompt
PAIRED = ("dpo",)  # two texts a row


class Size(NamedTuple):
    """A model and the machines for it.

    Args:
        shape: As `--model.policy.path` takes it.
        ranks: GPUs of all nodes, 8 to a node.
        rank: Of GaLore's and SLTrain's matrices, as their papers have it for this size.
        gather: Whether whole weights are gathered to answer.
        tokens: Of a prompt, and of an answer.
    """

    shape: str
    ranks: int
    rank: int
    gather: bool
    tokens: int = 512


SIZES = {
    "7b": Size("shape:llama-2-7b", 8, 1024, True),
    "70b": Size("shape:llama-2-70b", 64, 2048, False),
}


class Line(NamedTuple):
    """A line of the table.

    Args:
        method: The packaged config.
        by: AdamW, GaLore or SLTrain.
        heights: Of each phase.
    """

    method: str
    by: str
    heights: Heights

    def peak(self, phase: str) -> int:
        """The most bytes of a phase on the device, 0 where there is no such phase."""
        return self.heights[phase][Place.DEVICE].total if phase in self.heights else 0


def sweep(size: Size, memory: int) -> Iterator[Line]:
    """All methods, one after the other.

    Args:
        size: The model.
        memory: Bytes of a device.
    """
    cases = [(method, "AdamW") for method in dict.fromkeys([*LAYOUTS, *WHOLE])]
    cases += [(method, by) for by in ("GaLore", "SLTrain") for method in WHOLE]
    for method, by in cases:
        few, more = (traced(settings(method, by, size, each), memory) for each in BLOCKS)
        number = config_of(size.shape).num_hidden_layers
        yield Line(method, by, extrapolated(few, more, *BLOCKS, number))


def traced(config: Settings, memory: int) -> Heights:
    """One simulation."""
    cli = PlannedCLI(["--config", json.dumps(config)])
    return simulated(cli.build, cli.machine._replace(memory=memory))


def settings(method: str, by: str, size: Size, blocks: int) -> Settings:
    """A packaged config at this model, length and number of rows, with so many blocks.

    Args:
        method: Of the config.
        by: AdamW, GaLore or SLTrain.
        size: The model.
        blocks: Of every network.
    """
    config = read(method)
    architecture = {**config_of(size.shape).to_diff_dict(), "num_hidden_layers": blocks}
    for section in (config["model"], config.get("reward", {})):
        for network in networks(section):
            network["path"] = json.dumps(architecture)
    arguments = config["model"]["init_args"]
    arguments["microbatch_tokens"] = 2 * 2 * size.tokens
    arguments.pop("minibatch_size", None)
    if method in SAMPLES:
        arguments["num_samples"] = SAMPLES[method]
    if "num_stored" in arguments:
        arguments["num_stored"] = 0
    lengths: dict[str, Any] = {"max_tokens": 2 * size.tokens}
    if "rollout" in config:
        lengths = {"max_prompt_tokens": size.tokens}
        config["rollout"]["init_args"] = {"max_new_tokens": size.tokens}
        whole: dict[str, Any] = {
            "class_path": "LearnedReward",
            "init_args": {"path": json.dumps(architecture)},
        }
        if config["reward"]["init_args"]["sources"]["class_path"] != "BaseReward":
            whole["init_args"] |= {"dtype": "bfloat16", "tokens_per_pass": 4 * size.tokens}
            config["reward"]["init_args"]["sources"] = whole
    rows = ROWS // SAMPLES.get(method, 2 if method in PAIRED else 1)
    config["data"] = {
        "class_path": config["data"]["class_path"],
        "init_args": {"path": "none", "batch_size": rows, **lengths},
    }
    change(arguments, by, size, architecture)
    config["trainer"] = trainer(size)
    return config


def networks(section: Any) -> Iterator[dict[str, Any]]:
    """The arguments of every network, or of what has one."""
    if isinstance(section, dict):
        if "path" in section:
            yield section
        for value in section.values():
            yield from networks(value)


def change(arguments: Settings, by: str, size: Size, architecture: Settings) -> None:
    """What trains does so by GaLore, or as low-rank and sparse weights.

    Args:
        arguments: Of the algorithm.
        by: AdamW, GaLore or SLTrain.
        size: The model.
        architecture: Its config.
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
                network |= {"path": None, "config": architecture}
                network["sltrain"] = {
                    "class_path": "lit_align.models.sltrain.SLTrain",
                    "init_args": sltrain,
                }


def trainer(size: Size) -> Settings:
    """FSDP2 with checkpointing over all GPUs."""
    sharding = {"checkpointing": True, "gather": size.gather}
    return {
        "devices": 8,
        "num_nodes": size.ranks // 8,
        "precision": "bf16-mixed",
        "strategy": {"class_path": "lit_align.models.fsdp2.FSDP2", "init_args": sharding},
    }
