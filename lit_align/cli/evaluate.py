"""`lit-align evaluate`: several models on the same prompts."""

import sys
from functools import partial
from itertools import product
from pathlib import Path

from jsonargparse import ActionConfigFile, Namespace
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch import seed_everything
from rich.console import Console

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.callbacks.asking import Asking
from lit_align.callbacks.reward import Reward
from lit_align.cli.discovery import open_rooms
from lit_align.cli.errors import Parser, quieten
from lit_align.cli.overlays import Settings, chosen_class, cut, inline, read, split_config
from lit_align.data.base import TextData
from lit_align.data.prompts import PromptData
from lit_align.evaluation.compare import compared, shown, write
from lit_align.evaluation.generate import answered
from lit_align.evaluation.judge import judged_wins
from lit_align.evaluation.lm_eval import Benchmarks, device_of
from lit_align.tools.resolve_model import found_model


def main(args: list[str]) -> int:
    """Parses the words behind `evaluate`, asks each model, prints a table and writes JSON."""
    quieten()
    open_rooms()
    sys.path.insert(0, str(Path.cwd()))  # a user's own rewards, as python itself would find them
    given, built = parsed(args)
    models = list(dict.fromkeys(map(found_model, given.models)))
    reference = found_model(given.reference or models[0])
    tasks = [task for task in given.lm_eval.split(",") if task]
    benchmarks = [Benchmarks(tasks, given.lm_eval_limit, given.lm_eval_folder)] if tasks else []
    answers = {}
    for model in models:
        seed_everything(given.seed, verbose=False)
        answers[model] = answered(
            model, reference, built.data, built.rollout, built.reward,
            given.temperature, given.accelerator, given.precision,
        )  # fmt: skip
        print(f"{model}: {len(answers[model])} answers")
    judge = partial(judged_wins, given.judge) if given.judge else None
    found = compared(answers, built.rollout.num_samples, judge)
    for model, each in product(models, benchmarks):
        found[model] |= each.figures(model, device_of(given.accelerator))
    Console().print(shown(found))
    write(found, reference, Path(given.out))
    print(f"wrote {given.out}")
    return 0


def parsed(args: list[str]) -> tuple[Namespace, Namespace]:
    """What was said, and with the objects that it names."""
    words = parser()
    given = words.parse_args(fit_sections(args))
    if given.reward is None and not given.judge:
        raise ValueError(
            "evaluate compares by rewards: add --reward.sources, --config of a run that has one, "
            "or a --judge."
        )
    data = given.data.init_args
    if data.tokenizer is None:
        data.tokenizer = found_model(given.models[0])
    if not (data.eval_path or data.eval_split or data.eval_fraction) and isinstance(data.path, str):
        data.eval_path = data.path  # a file of its own is evaluated whole
    return given, words.instantiate_classes(given)


def parser() -> Parser:
    """The arguments of `evaluate`; sections are those of `fit`."""
    words = Parser(prog="lit-align evaluate", description=__doc__)
    words.add_argument("-c", "--config", action=ActionConfigFile,
                       help="Of a run, for data, reward and rollout.")  # fmt: skip
    words.add_argument("models", nargs="+", type=str, help="Hub ids or folders of models; the "
                       "others are compared with the first.")  # fmt: skip
    words.add_argument("--data", type=PromptData, required=True, help="Whose rows are asked.")
    words.add_argument("--reward", type=Reward | None, default=None, help="What scores.")
    words.add_argument("--judge", type=str | None, default=None,
                       help="Command that reads pairs of answers as JSON lines and prints a, b or "
                       "tie for each.")  # fmt: skip
    words.add_argument("--rollout", type=Asking, default={"class_path": "Asking"},
                       help="How long answers may be, how many, and how sampled.")  # fmt: skip
    words.add_argument("--temperature", type=float, default=1.0, help="Of all models.")
    words.add_argument("--reference", type=str | None, default=None,
                       help="Model that the KL is to; by default the first.")  # fmt: skip
    words.add_argument("--out", type=str, default="evaluation.json", help="The JSON file.")
    words.add_argument("--seed", type=int, default=0, help="Of the samples.")
    words.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu, ...")
    words.add_argument(
        "--precision", type=_PRECISION_INPUT, default="32-true", help="bf16-true, ..."
    )
    add_benchmarks(words)
    return words


def add_benchmarks(words: Parser) -> None:
    """The arguments of the hook into lm-eval."""
    words.add_argument(
        "--lm_eval", type=str, default="", help="Tasks of lm-eval, with commas between them."
    )
    words.add_argument(
        "--lm_eval_limit", type=int | None, default=None, help="Documents of each; all by default."
    )
    words.add_argument(
        "--lm_eval_folder", type=str | None, default=None, help="YAML files that define more tasks."
    )


def fit_sections(args: list[str]) -> list[str]:
    """The words with each `--config` of a run cut to what an evaluation needs of it."""
    argv = [part for word in args for part in split_config(word)]
    places = [i + 1 for i, word in enumerate(argv[:-1]) if word in ("--config", "-c")]
    configs = {place: read(argv[place]) for place in places}
    kind = chosen_class("data", TextData, list(configs.values()), argv)
    if kind is None or not issubclass(kind, PromptData):
        kind = PromptData  # which reads the prompts of any other data module's rows
    for place, settings in configs.items():
        argv[place] = inline(needed(settings, kind))
    return argv


def needed(settings: Settings, data: type) -> Settings:
    """The sections of a run's config that an evaluation has, too."""
    left = cut(settings, {"model": OnlineAlgorithm, "data": data})
    trainer = left.get("trainer") or {}
    kept = {name: left[name] for name in ("data", "reward", "rollout") if left.get(name)}
    if "rollout" in kept:
        kept["rollout"] = {**kept["rollout"], "class_path": "Asking"}
    if "data" in kept:
        kept["data"] = {**kept["data"], "class_path": f"{data.__module__}.{data.__name__}"}
    return {**kept, **{k: trainer[k] for k in ("accelerator", "precision") if trainer.get(k)}}
