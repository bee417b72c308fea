"""Short fits of every method, to compare their measured memory with the estimate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import AdamW

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.algorithms.dpo import DPO
from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.hydra_ppo import HydraPPO
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.algorithms.reward_model import RewardModel
from lit_align.algorithms.sft import SFT
from lit_align.algorithms.spr import SPR
from lit_align.batches import Experience
from lit_align.callbacks.memory import Memory
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.data.instructions import InstructionData
from lit_align.data.preferences import PreferenceData
from lit_align.data.prompts import PromptData
from lit_align.models.adapters.lora import LoRA
from lit_align.models.hydra import Hydra
from lit_align.models.kernels import varlen_attention
from lit_align.models.parallel.offload import OffloadedTensors
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead
from lit_align.optim.galore import GaLore
from lit_align.plan.architectures import architecture_config
from lit_align.plan.max_length_data import FIRST_TOKEN_ID, MaxLengthData
from lit_align.rewards.base import RewardFunction
from lit_align.rewards.reward_model import ModelReward, RewardNetwork
from lit_align.rewards.shared_backbone import SharedBackboneReward

TOY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


class Size(NamedTuple):
    """Size of the fits.

    Args:
        config: Architecture of every network.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
        rows: Texts of an optimizer step.
        microbatch_rows: Texts of a micro-batch.
        rank: Rank of GaLore and of adapters.
    """

    config: dict[str, Any]
    prompt: int
    response: int
    rows: int
    microbatch_rows: int
    rank: int


def size_of(model: str) -> Size:
    """Return the size of the fits of a model.

    Args:
        model: `toy`, or the name of a built-in architecture.
    """
    endless = {"eos_token_id": None}  # no response ends early, as in a plan
    if model == "toy":
        return Size(TOY | endless, 16, 24, 8, 3, 8)
    config = architecture_config(f"shape:{model}").to_diff_dict()
    return Size(config | endless, 384, 128, 16, 6, 64)


class Fit(NamedTuple):
    """Objects of a fit.

    Args:
        trainer: Trainer for one pass over `data`.
        algorithm: Algorithm that has not been fitted.
        data: Batches of the maximum length.
    """

    trainer: Trainer
    algorithm: Algorithm
    data: MaxLengthData


class RandomRewardModel(ModelReward):
    """Reward model with random weights, which reads token ids instead of text.

    Args:
        size: Size of the fits.
    """

    def __init__(self, size: Size):
        super().__init__("random weights", dtype="bfloat16", tokens_per_pass=4 * tokens(size))
        self.size = size

    def setup(self, algorithm: LightningModule) -> None:
        """Build the network.

        Args:
            algorithm: Algorithm of the run; not used.
        """
        scalar = RewardNetwork(config=dict(self.size.config), dtype=self.dtype)
        self.network = scalar.eval().requires_grad_(False)
        self.offloaded_weights = OffloadedTensors(self.network.parameters, is_frozen=True)

    def encode(self, batch: Experience) -> list[list[int]]:
        """Return N texts with the maximum length of the policy.

        Args:
            batch: N rows.
        """
        return [[FIRST_TOKEN_ID] * tokens(self.size)] * len(batch)


class TokenCountReward(RewardFunction):
    """Reward that counts one token in the response."""

    def __call__(self, batch: Experience) -> Tensor:
        """Return the scores [N].

        Args:
            batch: N rows.
        """
        return ((batch.responses == FIRST_TOKEN_ID) & batch.response_mask).sum(-1).float()


class Method(NamedTuple):
    """Method that is compared.

    Args:
        kind: Class of the algorithm.
        settings: Function of the size that returns the arguments of the algorithm.
        reward: Function of the size that returns the reward function.
    """

    kind: type[Algorithm]
    settings: Callable[[Size], dict[str, Any]]
    reward: Callable[[Size], RewardFunction] = lambda size: TokenCountReward()


def tokens(size: Size) -> int:
    """Return the tokens of prompt and response together."""
    return size.prompt + size.response


def network(kind: type, size: Size, **settings: Any) -> Callable[[], Any]:
    """Return a function that builds a network with random weights."""
    return partial(kind, config=dict(size.config), **settings)


def policy(size: Size) -> dict[str, Any]:
    """Return the arguments of full training of a policy."""
    return {"policy": network(Policy, size)}


def policy_and_critic(size: Size) -> dict[str, Any]:
    """Return the arguments of full training of a policy and a critic."""
    return {**policy(size), "critic": network(ScalarHead, size)}


def adapters(size: Size) -> dict[str, Any]:
    """Return the arguments of a policy and a critic with adapters on frozen bases."""
    half = {"dtype": "bfloat16", "lora": LoRA(r=size.rank, lora_alpha=2 * size.rank)}
    both = (("policy", Policy), ("critic", ScalarHead))
    return {role: network(kind, size, **half) for role, kind in both}


def galore_policy(size: Size) -> dict[str, Any]:
    """Return the arguments of a policy that GaLore trains."""
    return {**policy(size), "optimizer": partial(GaLore, rank=size.rank, lr=1e-5)}


def hydra(size: Size) -> dict[str, Any]:
    """Return the arguments of one frozen base with adapters of actor and critic."""
    half = {"dtype": "bfloat16", "lora": LoRA(r=size.rank, lora_alpha=2 * size.rank)}
    return {"policy": network(Hydra, size, **half)}


def checkpointed_policy(size: Size) -> dict[str, Any]:
    """Return the arguments of a policy with activation checkpointing."""
    return {"policy": network(Policy, size, activation_checkpointing=True)}


METHODS: dict[str, Method] = {
    "SFT": Method(SFT, policy),
    "SFT-checkpointing": Method(SFT, checkpointed_policy),
    "SFT-GaLore": Method(SFT, galore_policy),
    "DPO": Method(DPO, policy),
    "RewardModel": Method(RewardModel, lambda size: {"reward_model": network(ScalarHead, size)}),
    "GRPO": Method(GRPO, lambda size: {**policy(size), "num_samples": 4}),
    "ReMax": Method(ReMax, policy, RandomRewardModel),
    "SPR": Method(SPR, lambda size: {**policy(size), "num_samples": 4}),
    "PPO": Method(PPO, policy_and_critic, RandomRewardModel),
    "LoRA-PPO": Method(PPO, adapters, lambda size: SharedBackboneReward()),
    "Hydra-PPO": Method(HydraPPO, hydra, lambda size: SharedBackboneReward()),
}
PAIR_ALGORITHMS = (DPO, RewardModel)


def run(name: str, size: Size, folder: str, accelerator: str) -> Fit:
    """Build a fit of two batches in which every row has the maximum length.

    Args:
        name: Name of the method.
        size: Size of networks, texts and batches.
        folder: Folder that the run writes to.
        accelerator: Accelerator of Lightning.
    """
    method = METHODS[name]
    paired, online = method.kind in PAIR_ALGORITHMS, issubclass(method.kind, OnlineAlgorithm)
    settings = {
        "optimizer": partial(AdamW, lr=1e-6, fused=True),
        "microbatch_tokens": size.microbatch_rows * tokens(size),
        **method.settings(size),
    }
    algorithm = method.kind(**settings)
    data: Any = PreferenceData if paired else InstructionData
    if isinstance(algorithm, OnlineAlgorithm):
        rows = size.rows // algorithm.num_samples
        module: Any = PromptData("none", max_prompt_tokens=size.prompt, batch_size=rows)
        num_offline = algorithm.num_offline_samples
    else:
        rows, num_offline = size.rows // (2 if paired else 1), 0
        module = data("none", max_tokens=tokens(size), batch_size=rows)
    callbacks = [Rollout(max_new_tokens=size.response), Reward(method.reward(size))]
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=callbacks if online else [],
    )
    vocabulary = size.config["vocab_size"]
    return Fit(
        trainer, algorithm, MaxLengthData(module, None, size.response, num_offline, vocabulary)
    )


def measured(name: str, model: str, folder: str, device: str) -> dict[str, int]:
    """Run a fit and return the peak bytes of each phase that the allocator has counted.

    Args:
        name: Name of the method.
        model: Name of the model, as in `size_of`.
        folder: Folder that the run writes to.
        device: cpu or cuda.
    """
    patch_grouped_query_attention()
    torch.manual_seed(0)
    fit = run(name, size_of(model), folder, "cpu" if device == "cpu" else "gpu")
    callbacks: list[Callback] = vars(fit.trainer)["callbacks"]
    memory = Memory()
    callbacks.insert(0, memory)
    fit.trainer.fit(fit.algorithm, fit.data)
    return {phase: peak.peak for phase, peak in memory.peaks.items()}


def patch_grouped_query_attention() -> None:
    """Patch variable-length attention for torch before 2.13, which has no `enable_gqa`."""
    # The older kernel shares keys among heads without the argument.
    kernel = varlen_attention.varlen_attn
    if "enable_gqa" in signature(kernel).parameters:
        return

    def without_gqa(*args: Any, enable_gqa: bool, **kwargs: Any) -> Any:
        return kernel(*args, **kwargs)

    vars(varlen_attention)["varlen_attn"] = without_gqa
