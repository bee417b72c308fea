"""Tasks of lm-eval, the harness that public figures are made with; an extra, off by default."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from lit_align.data.text import load_tokenizer
from lit_align.errors import UserError
from lit_align.evaluation.statistics import Statistics
from lit_align.models.policy import Policy

Z_95 = 1.96  # standard errors on either side of a 95 % interval


class LMEvalTasks:
    """Tasks that lm-eval knows, or that a folder of its YAML files adds.

    Args:
        tasks: Their names.
        limit: Documents of each; None for all, which is what published figures are of.
        folder: Of YAML files that define more tasks.

    Raises:
        ValueError: In a sentence, where lm-eval is not installed or does not know a task.
    """

    def __init__(self, tasks: Sequence[str], limit: int | None = None, folder: str | None = None):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"--tasks needs the harness: pip install 'lit-align[lm-eval]' ({error})."
            ) from error
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"--tasks_folder {folder}: no such folder.")
        self.tasks, self.limit = list(tasks), limit
        self.manager = TaskManager(include_path=folder)
        for task in self.tasks:
            if not self.manager.match_tasks([task]):
                matches = difflib.get_close_matches(task, self.manager.all_tasks, n=1)
                hint = (
                    f"did you mean '{matches[0]}'?" if matches else "`lm-eval ls tasks` lists all."
                )
                raise UserError(f"--tasks {task}: lm-eval knows no such task; {hint}")

    def evaluate(self, path: str, device: str) -> Statistics:
        """What one model reaches, each metric with its 95 % interval where lm-eval has one.

        Args:
            path: Hub id or folder; an adapter is merged into its base.
            device: torch's word for where to compute.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        network = Policy(path).to(device).eval().network
        model = HFLM(pretrained=network, tokenizer=load_tokenizer(path), device=device)
        results = simple_evaluate(
            model=model,
            tasks=self.tasks,
            limit=self.limit,
            task_manager=self.manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
        statistics: Statistics = {}
        for task, values in (results or {})["results"].items():
            for name, value in values.items():
                if isinstance(value, int | float) and "," in name and "_stderr" not in name:
                    statistics |= metric_with_interval(task, name, float(value), values)
        return statistics


def metric_with_interval(
    task: str, name: str, value: float, values: dict[str, object]
) -> Statistics:
    """A metric under the name that people know.

    Args:
        task: Its task.
        name: As lm-eval has it: metric, comma, filter.
        value: Of the metric.
        values: All of the task, among them standard errors.
    """
    metric, _, kind = name.partition(",")
    label = f"{task}, {metric}" + ("" if kind == "none" else f" ({kind})")
    error = values.get(f"{metric}_stderr,{kind}")
    if not isinstance(error, int | float):
        return {label: value}
    return {label: value, f"{label}, 95 %": [value - Z_95 * error, value + Z_95 * error]}


def torch_device(accelerator: str) -> str:
    """torch's word for the device that Lightning's word means on this machine.

    Args:
        accelerator: auto, cpu, gpu, ...
    """
    kind = torch.accelerator.current_accelerator()
    return "cpu" if accelerator == "cpu" or kind is None else kind.type
