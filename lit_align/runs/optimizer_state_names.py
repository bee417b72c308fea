"""Optimizer states keyed by weight names, for any strategy and number of ranks."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy


def add_weight_names(trainer: Trainer, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return optimizer states with weight names as keys, in the place of torch's numbers.

    A state that is empty on this rank stays empty.

    Args:
        trainer: Trainer with the optimizers.
        states: State dict of each optimizer.
    """
    named = list(trainer.lightning_module.named_parameters())
    # lightning 2.6.6 numbers gathered sharded states by all weights of the module, also frozen
    # ones; torch numbers plain states by the weights of the groups
    if isinstance(trainer.strategy, ModelParallelStrategy):
        names = {number: name for number, (name, _) in enumerate(named)}
        return [replace_numbers(state, names) for state in states]
    known = {id(weight): name for name, weight in named}
    result = []
    for optimizer, state in zip(trainer.optimizers, states, strict=True):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        result.append(replace_numbers(state, {i: known[id(w)] for i, w in enumerate(weights)}))
    return result


def replace_numbers(state: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """Return an optimizer state dict with names in the place of numbers.

    Args:
        state: State dict of an optimizer.
        names: Weight names by number. Other keys stay as they are.

    Example:
        >>> state = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
        >>> named = replace_numbers(state, {0: "head"})
        >>> named["state"], named["param_groups"][0]["params"]
        ({'head': {'step': 3}}, ['head'])
    """
    if not state:
        return state
    groups = [
        {**group, "params": [names.get(key, key) for key in group["params"]]}
        for group in state["param_groups"]
    ]
    weights = {names.get(key, key): value for key, value in state["state"].items()}
    return {**state, "state": weights, "param_groups": groups}
