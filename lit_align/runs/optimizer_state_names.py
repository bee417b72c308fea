"""Optimizer states by the weights' names, so that any strategy and number of ranks finds them."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy


def add_weight_names(trainer: Trainer, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The states with names where torch has numbers; ranks that hold none keep none.

    torch numbers the weights of the groups, one after the other; Lightning, when it gathers sharded
    states, all weights of the module, frozen ones too.

    Args:
        trainer: Has the optimizers.
        states: One per optimizer, as torch makes them.
    """
    named = list(trainer.lightning_module.named_parameters())
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
    """A state whose numbers are names.

    Args:
        state: As an optimizer makes it.
        names: By number; what has a name already keeps it.
    """
    if not state:
        return state
    groups = [
        {**group, "params": [names.get(key, key) for key in group["params"]]}
        for group in state["param_groups"]
    ]
    weights = {names.get(key, key): value for key, value in state["state"].items()}
    return {**state, "state": weights, "param_groups": groups}
