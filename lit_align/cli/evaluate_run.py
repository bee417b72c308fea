"""Run `lit-align evaluate` after its words are parsed: build the sections and query the models."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import seed_everything
from rich.console import Console

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.cli.overlays import (
    Settings,
    chosen_class,
    drop_unsupported,
    read_config,
    split_option,
    to_inline_yaml,
)
from lit_align.cli.settings_parser import SettingsParser
from lit_align.data.base import TextDataModule
from lit_align.data.prompts import PromptData
from lit_align.errors import UserError
from lit_align.evaluation.compare import compare_models, model_comparison_table, write_evaluation
from lit_align.evaluation.generate import predict_responses
from lit_align.evaluation.judge import judge_pairs
from lit_align.evaluation.lm_eval import LMEvalTasks, torch_device
from lit_align.tools.resolve_model import resolve_model

AddOptions = Callable[[argparse.ArgumentParser], None]


def run_evaluation(args: list[str], add_options: AddOptions) -> int:
    """Query each model, print a table and write the figures as JSON.

    Args:
        args: The words after `evaluate`.
        add_options: Adds the options that are not sections to a parser.
    """
    options, built = parse(args, add_options)
    models = list(dict.fromkeys(map(resolve_model, options.models)))  # a repeated model runs once
    reference = resolve_model(options.reference or models[0])
    tasks = [task for task in options.tasks.split(",") if task]
    benchmarks = [LMEvalTasks(tasks, options.tasks_limit, options.tasks_folder)] if tasks else []
    responses = {}
    for model in models:
        # the same seed for each, so that models differ and not their random numbers
        seed_everything(options.seed, verbose=False)
        responses[model] = predict_responses(
            model, reference, built.data, built.rollout, built.reward,
            options.temperature, options.accelerator, options.precision,
        )  # fmt: skip
        print(f"{model}: {len(responses[model])} responses")
    judge = partial(judge_pairs, options.judge) if options.judge else None
    figures = compare_models(responses, built.rollout.predict_samples, judge)
    for model, each in product(models, benchmarks):
        figures[model] |= each.evaluate(model, torch_device(options.accelerator))
    Console().print(model_comparison_table(figures))
    write_evaluation(figures, reference, Path(options.out))
    print(f"wrote {options.out}")
    return 0


def parse(args: list[str], add_options: AddOptions) -> tuple[Namespace, Namespace]:
    """Return the options, and the same with the objects of the sections.

    Args:
        args: The words after `evaluate`.
        add_options: Adds the options that are not sections to a parser.
    """
    parser = SettingsParser(prog="lit-align evaluate")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help=argparse.SUPPRESS)
    add_options(parser)
    parser.add_argument("--data", type=PromptData, required=True)
    parser.add_argument("--reward", type=Reward | None, default=None)
    parser.add_argument("--rollout", type=Rollout, default={"class_path": "Rollout"})
    options = parser.parse_args(fit_sections(args))
    if options.reward is None and not options.judge:
        raise UserError(
            "evaluate compares models by rewards. Set --reward.functions, --judge, or --config "
            "of a run that has a reward."
        )
    data = options.data.init_args
    if data.tokenizer is None:
        data.tokenizer = resolve_model(options.models[0])
    if not (data.eval_path or data.eval_split or data.eval_fraction) and isinstance(data.path, str):
        data.eval_path = data.path  # all rows of a file are evaluated
    return options, parser.instantiate_classes(options)


def fit_sections(args: list[str]) -> list[str]:
    """Replace each `--config` of a run by the sections that an evaluation has.

    Args:
        args: The words after `evaluate`.
    """
    argv = [part for word in args for part in split_option(word)]
    positions = [i + 1 for i, word in enumerate(argv[:-1]) if word in ("--config", "-c")]
    configs = {position: read_config(argv[position]) for position in positions}
    kind = chosen_class("data", TextDataModule, list(configs.values()), argv)
    if kind is None or not issubclass(kind, PromptData):
        kind = PromptData  # reads the prompts of any other data module's rows
    for position, settings in configs.items():
        argv[position] = to_inline_yaml(evaluation_sections(settings, kind))
    return argv


def evaluation_sections(settings: Settings, data: type) -> Settings:
    """Return data, reward, rollout, accelerator and precision of a run's config.

    Args:
        settings: Settings of the config.
        data: Class of the data module that the evaluation reads.
    """
    remaining = drop_unsupported(settings, {"model": OnlineAlgorithm, "data": data})
    trainer = remaining.get("trainer") or {}
    sections = {
        name: remaining[name] for name in ("data", "reward", "rollout") if remaining.get(name)
    }
    if "rollout" in sections:
        sections["rollout"] = {**sections["rollout"], "class_path": "Rollout"}
    if "data" in sections:
        path = f"{data.__module__}.{data.__name__}"
        sections["data"] = {**sections["data"], "class_path": path}
    return {**sections, **{k: trainer[k] for k in ("accelerator", "precision") if trainer.get(k)}}
