"""Tasks of lm-eval, the harness of most published benchmark figures. It is an optional extra."""

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
    """Tasks of lm-eval, and those that a folder of YAML files adds.

    Args:
        tasks: Names of the tasks.
        limit: Documents of each task. None: all, as in published figures.
        folder: Folder of YAML files that define more tasks. None: only lm-eval's own.

    Raises:
        UserError: If lm-eval is not installed or does not have a task.
    """

    def __init__(self, tasks: Sequence[str], limit: int | None = None, folder: str | None = None):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"--tasks needs lm-eval. Run pip install 'lit-align[lm-eval]' ({error})."
            ) from error
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"--tasks_folder {folder}: no such folder.")
        self.tasks, self.limit = list(tasks), limit
        self.manager = TaskManager(include_path=folder)
        for task in self.tasks:
            if not self.manager.match_tasks([task]):
                matches = difflib.get_close_matches(task, self.manager.all_tasks, n=1)
                hint = f"Did you mean '{matches[0]}'?" if matches else "See `lm-eval ls tasks`."
                raise UserError(f"--tasks {task}: lm-eval has no such task. {hint}")

    def evaluate(self, path: str, device: str) -> Statistics:
        """Return each metric of one model, with a 95 % interval if lm-eval has a standard error.

        Args:
            path: Hub id or folder of the model. An adapter is merged into its base.
            device: Name of the device in torch, such as cuda.
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
    """Return a metric by its usual name, and its 95 % interval if it has a standard error.

    Args:
        task: Name of the task.
        name: lm-eval's name of the metric: metric, comma, filter.
        value: Value of the metric.
        values: All values of the task, among them standard errors.

    Example:
        >>> metric_with_interval("gsm8k", "exact_match,strict", 0.5, {})
        {'gsm8k, exact_match (strict)': 0.5}
    """
    metric, _, kind = name.partition(",")
    label = f"{task}, {metric}" + ("" if kind == "none" else f" ({kind})")
    error = values.get(f"{metric}_stderr,{kind}")
    if not isinstance(error, int | float):  # lm-eval 0.4 writes "N/A" for a metric without one
        return {label: value}
    return {label: value, f"{label}, 95 %": [value - Z_95 * error, value + Z_95 * error]}


def torch_device(accelerator: str) -> str:
    """Return the name in torch of a device that Lightning names.

    Args:
        accelerator: Lightning's name: auto, cpu or gpu.

    Example:
        >>> torch_device("cpu")
        'cpu'
    """
    kind = torch.accelerator.current_accelerator()
    return "cpu" if accelerator == "cpu" or kind is None else kind.type
