"""Names of version 0.1 and what they are called now. This table is kept for one version.

A command line, config or callback that uses an old name gets one sentence with the new name.
"""

from collections.abc import Container

KEYS = {  # last part of a setting's flag: the new one
    "warmup": "warmup_ratio",
    "final_lr": "final_lr_ratio",
    "epochs": "update_epochs",
    "park": "offload_frozen",
    "checkpointing": "activation_checkpointing",
    "attention": "attn_implementation",
    "fixed_cache": "static_kv_cache",
    "quantisation": "quantization",
    "train_fully": "modules_to_save",
    "gather": "gather_for_generation",
    "lam": "gae_lambda",
    "whiten": "whiten_advantages",
    "value_clip": "value_clip_range",
    "normalise_scores": "normalize_scores",
    "critic_warmup": "critic_warmup_iterations",
    "low": "min_score",
    "high": "max_score",
    "step_coef": "step_kl_coef",
    "num_stored": "num_offline_samples",
    "stored_decay": "offline_half_life",
    "max_ratio": "max_importance_ratio",
    "rm_coef": "reward_loss_coef",
    "sources": "functions",
    "time_limit": "timeout",
    "skip_failures": "skip_failed_prompts",
    "predict_greedily": "predict_greedy",
    "first_words": "prompt_words",
    "drop": "drop_matching",
    "header": "column_names",
    "columns": "rename_columns",
    "keep": "keep_last",
    "every": "every_n_rollouts",
    "held_out": "num_eval_samples",
    "lines": "lines_per_fit",
}
CHOICES = {  # booleans that were replaced: the new key, its value for true and for false
    "scale": ("advantage_scale", "group_std", "none"),
    "per_response": ("loss_aggregation", "sequence_mean", "token_mean"),
    "per_token": ("loss_aggregation", "token_mean", "sequence_sum"),
    "higher_is_better": ("mode", "max", "min"),
    "sum_once": ("sync_every_microbatch", "false", "true"),
}
LOCAL_KEYS = {  # last two parts of the flag, for keys that other classes still have: the new one
    "lora.rank": "r",
    "lora.alpha": "lora_alpha",
    "lora.targets": "target_modules",
    "model.weights": "response_weights",
    "rollout.num_samples": "predict_samples",  # of the class Asking
}
FLAGS = {  # (command, flag): the new flag
    ("plan", "--gpu"): "--gpu_memory",
    ("chat", "--with"): "--compare_with",
    ("evaluate", "--lm_eval"): "--tasks",
    ("evaluate", "--lm_eval_limit"): "--tasks_limit",
    ("evaluate", "--lm_eval_folder"): "--tasks_folder",
}
REMOVED_FLAGS = {  # (command, flag): what to run now
    ("fit", "--plan"): "Run `lit-align plan` with the same arguments.",
    ("plan", "--sweep"): "Run scripts/plan_sweep.py of the repository.",
}
CLASSES = {  # short class name: the new one
    "AnsweredPrompts": "OfflineResponseData",
    "TextData": "TextDataModule",
    "Samples": "ResponseLog",
    "Environment": "EnvironmentLog",
    "Finite": "NonFiniteGuard",
    "BatchPlan": "RunSummary",
    "RunLog": "ResumableCSVLogger",
    "RunConfig": "ConfigWriter",
    "CheckpointIO": "AtomicCheckpointIO",
    "Unwanted": "RowFilter",
    "Panel": "WeightedSum",
    "Caller": "RewardExecutor",
    "LearnedReward": "ModelReward",
    "BaseReward": "SharedBackboneReward",
    "PythonReward": "FunctionReward",
    "TrainedScalar": "RewardNetwork",
    "Scalar": "ScalarHead",
    "TwoHeaded": "PolicyWithRewardHead",
    "Quantisation": "Quantization",
    "Asking": "Rollout",
    "Sampling": "SamplingParams",
    "RunningScale": "RunningMeanStd",
    "Sleeper": "OffloadedTensors",
    "Turns": "ExclusiveOffload",
    "Referenced": "ReferenceModel",
    "Measuring": "MetricAccumulator",
    "OfflineAlgorithm": "Algorithm",
    "Tokens": "TextBatch",
    "Pairs": "PreferenceBatch",
    "Answer": "OfflineResponse",
    "Sharding": "ShardingConfig",
    "InBackward": "OptimizerInBackward",
    "Speaker": "ChatModel",
    "Benchmarks": "LMEvalTasks",
}
MODULES = {  # module of a class path: the new one
    "lit_align.algorithms.base": "lit_align.algorithms.core.base",
    "lit_align.algorithms.online": "lit_align.algorithms.core.online",
    "lit_align.algorithms.minibatches": "lit_align.algorithms.core.minibatches",
    "lit_align.algorithms.actor_critic": "lit_align.algorithms.core.actor_critic",
    "lit_align.algorithms.measuring": "lit_align.algorithms.core.metrics",
    "lit_align.algorithms.reference": "lit_align.algorithms.core.reference_model",
    "lit_align.algorithms.running": "lit_align.algorithms.core.running_statistics",
    "lit_align.algorithms.precomputed": "lit_align.algorithms.core.precomputed_logprobs",
    "lit_align.algorithms.offline": "lit_align.algorithms.core.base",
    "lit_align.callbacks.allocations": "lit_align.runs.allocations",
    "lit_align.callbacks.asking": "lit_align.callbacks.rollout",
    "lit_align.callbacks.card": "lit_align.runs.model_card",
    "lit_align.callbacks.checkpoint_files": "lit_align.runs.checkpoint_files",
    "lit_align.callbacks.checkpoint_io": "lit_align.runs.checkpoint_io",
    "lit_align.callbacks.generators": "lit_align.runs.rng_state",
    "lit_align.callbacks.optimizer_names": "lit_align.runs.optimizer_state_names",
    "lit_align.callbacks.run_folder": "lit_align.runs.run_folder",
    "lit_align.callbacks.run_log": "lit_align.runs.csv_log",
    "lit_align.callbacks.signals": "lit_align.runs.stop_signals",
    "lit_align.callbacks.whole": "lit_align.runs.atomic_io",
    "lit_align.callbacks.finite": "lit_align.callbacks.nan_guard",
    "lit_align.callbacks.samples": "lit_align.callbacks.response_log",
    "lit_align.callbacks.stored": "lit_align.callbacks.rollout",
    "lit_align.cli.batch_plan": "lit_align.callbacks.run_summary",
    "lit_align.cli.resuming": "lit_align.callbacks.config_writer",
    "lit_align.data.answers": "lit_align.data.offline_responses",
    "lit_align.data.forms": "lit_align.data.formats",
    "lit_align.data.loading": "lit_align.data.base",
    "lit_align.data.order": "lit_align.data.sampler",
    "lit_align.data.ratings": "lit_align.data.rated_pairs",
    "lit_align.data.rows": "lit_align.data.sources",
    "lit_align.data.unwanted": "lit_align.data.filters",
    "lit_align.models.decoding": "lit_align.models.generation.decode",
    "lit_align.models.fixed_context": "lit_align.models.generation.static_cache",
    "lit_align.models.prefill": "lit_align.models.generation.prefill",
    "lit_align.models.fitting": "lit_align.models.weights.state_dict_check",
    "lit_align.models.loading": "lit_align.models.weights.loading",
    "lit_align.models.streaming": "lit_align.models.weights.sharded_loading",
    "lit_align.models.quantised": "lit_align.models.weights.quantization",
    "lit_align.models.torchao_weights": "lit_align.models.weights.torchao",
    "lit_align.models.layout": "lit_align.models.kernels.packing",
    "lit_align.models.packing": "lit_align.models.kernels.varlen_attention",
    "lit_align.models.norms": "lit_align.models.kernels.rms_norm",
    "lit_align.models.compiling": "lit_align.models.kernels.compile",
    "lit_align.models.parking": "lit_align.models.parallel.offload",
    "lit_align.models.sharding": "lit_align.models.parallel.sharding",
    "lit_align.models.fsdp2": "lit_align.models.parallel.fsdp2",
    "lit_align.models.scalar": "lit_align.models.scalar_head",
    "lit_align.models.two_headed": "lit_align.models.policy_with_reward_head",
    "lit_align.models.wearing": "lit_align.models.adapters.switching",
    "lit_align.models.lora": "lit_align.models.adapters.lora",
    "lit_align.models.sparse_adapter": "lit_align.models.adapters.sparse_lora",
    "lit_align.models.merging": "lit_align.models.merge_adapter",
    "lit_align.rewards.base_reward": "lit_align.rewards.shared_backbone",
    "lit_align.rewards.calling": "lit_align.rewards.execution",
    "lit_align.rewards.learned": "lit_align.rewards.reward_model",
    "lit_align.rewards.panel": "lit_align.rewards.weighted_sum",
    "lit_align.rewards.python": "lit_align.rewards.function",
    "lit_align.tools.answering": "lit_align.evaluation.generate",
    "lit_align.tools.evaluate": "lit_align.evaluation.compare",
    "lit_align.tools.figures": "lit_align.evaluation.statistics",
    "lit_align.tools.judge": "lit_align.evaluation.judge",
    "lit_align.tools.benchmarks": "lit_align.evaluation.lm_eval",
    "lit_align.tools.tables": "lit_align.evaluation.tables",
    "lit_align.tools.found_model": "lit_align.tools.resolve_model",
    "lit_align.tools.report": "lit_align.report.build",
    "lit_align.tools.kept_answers": "lit_align.report.completions",
    "lit_align.tools.thinning": "lit_align.report.downsample",
    "lit_align.tools.plan": "lit_align.plan.simulate",
}
CONFIGS = {"dl_ppo": "dynamic_lora_ppo", "states8": "adamw_8bit"}  # packaged config: the new one
LOG_KEYS: dict[str, str | None] = {  # logged metric: the new one, None if it is logged no longer
    "objective/kl": "kl/per_response_k1",
    "objective/entropy": None,
    "policy/entropy_avg": "entropy/update",
    "val/ratio": "policy/ratio_mean",
    "val/clipfrac_avg": "value/clipfrac",
    "frac_advantage_zero": "frac_reward_zero_std",
    "rollout": "iteration",
    "spr/stored_share": "spr/offline_fraction",
    "rewards/learned_reward/mean": "rewards/model_reward/mean",
    "rewards/learned_reward/std": "rewards/model_reward/std",
    "rewards/base_reward/mean": "rewards/shared_backbone_reward/mean",
    "rewards/base_reward/std": "rewards/shared_backbone_reward/std",
}


def renamed_key(key: str, known: Container[str]) -> str | None:
    """Return a sentence if a setting has a name of version 0.1, else None.

    Args:
        key: Flag of the setting, such as --model.warmup.
        known: Names of the settings that exist in its place.

    Example:
        >>> renamed_key("--model.warmup", {"warmup_ratio"})
        'warmup was renamed to warmup_ratio. Use --model.warmup_ratio.'
        >>> renamed_key("--data.warmup", {"path"}) is None  # no new name there
        True
        >>> renamed_key("--model.scale", {"advantage_scale"})
        'scale was replaced. Use --model.advantage_scale group_std (was true) or none (was false).'
    """
    head, _, old = key.rpartition(".")
    parent = head.rpartition(".")[2].lstrip("-")
    new, if_true, if_false = CHOICES.get(old, ("", "", ""))
    new = new or LOCAL_KEYS.get(f"{parent}.{old}") or KEYS.get(old, "")
    if new not in known:
        return None
    # an entry of a list has no flag of its own
    use = f"{new} in {head}" if "[" in head else f"{head}.{new}"
    if if_true:
        return f"{old} was replaced. Use {use} {if_true} (was true) or {if_false} (was false)."
    return f"{old} was renamed to {new}. Use {use}."


def renamed_flag(command: str, flag: str) -> str | None:
    """Return a sentence if a command's flag has a name of version 0.1, else None.

    Args:
        command: Name of the command, such as plan.
        flag: Flag with its dashes, such as --gpu.

    Example:
        >>> renamed_flag("plan", "--gpu")
        '--gpu was renamed to --gpu_memory. Use --gpu_memory.'
    """
    if (command, flag) in REMOVED_FLAGS:
        return f"`{command} {flag}` was removed. {REMOVED_FLAGS[command, flag]}"
    new = FLAGS.get((command, flag))
    return None if new is None else f"{flag} was renamed to {new}. Use {new}."


def renamed_class(name: str) -> str | None:
    """Return a sentence if a class has a name or a module of version 0.1, else None.

    Args:
        name: Short name or import path.

    Example:
        >>> renamed_class("Panel")
        'Panel was renamed to WeightedSum. Use WeightedSum.'
    """
    module, _, short = name.rpartition(".")
    new = CLASSES.get(short, short)
    if new == short and module not in MODULES:
        return None
    path = f"{MODULES.get(module, module)}.{new}" if module else new
    return f"{name} was renamed to {path}. Use {path}."


def renamed_log_key(name: str) -> str | None:
    """Return a sentence if a logged metric has a name of version 0.1, else None.

    Args:
        name: Name of the metric. A metric of the validation has the prefix val/.

    Example:
        >>> renamed_log_key("val/objective/kl")
        'val/objective/kl was renamed to val/kl/per_response_k1.'
        >>> renamed_log_key("objective/entropy")
        'objective/entropy is no longer logged.'
    """
    # two metrics of the training had the prefix too, so the full name is looked up first
    has_prefix = name.startswith("val/") and name not in LOG_KEYS
    prefix, old = ("val/", name.removeprefix("val/")) if has_prefix else ("", name)
    if old not in LOG_KEYS:
        return None
    new = LOG_KEYS[old]
    if new is None:
        return f"{name} is no longer logged."
    return f"{name} was renamed to {prefix}{new}."
