"""A loss that is no number stops the run before it reaches the weights."""

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_align.algorithms.core.base import Algorithm
from lit_align.callbacks.checkpoint import Checkpoints
from lit_align.optim.galore import GaLore


class Finite(Callback):
    """Looks at losses and gradients once per optimizer step, on all ranks together.

    NaN and infinity are answered with the step, the rows and the last checkpoint; the step is not
    taken. Weights that are updated during backward (`per_layer`) have moved by then and are looked
    at instead, so that no checkpoint holds a NaN.
    """

    def on_before_optimizer_step(
        self, trainer: Trainer, algorithm: Algorithm, optimizer: Optimizer
    ) -> None:
        """Reads one number from the device."""
        moved = isinstance(optimizer, GaLore) and optimizer.per_layer
        numbers = shares(optimizer) if moved else algorithm.norms.values()
        facts = [number.isfinite().all() for number in numbers]
        facts += [part.finite.all() for part in algorithm.finite_rows]
        known = torch.stack(
            [fact.to(algorithm.device) for fact in facts]
        )  # shards may be offloaded
        if trainer.strategy.reduce_boolean_decision(bool(known.all())):
            return
        saved = [each for each in trainer.checkpoint_callbacks if isinstance(each, Checkpoints)]
        last = next((each.last_saved for each in saved if each.last_saved), "none yet")
        where = "; ".join(filter(None, of_all_ranks(strange_rows(trainer, algorithm))))
        what = f"The loss is not finite: {where}" if where else "The gradient is not finite"
        then = (
            "but after updates during backward" if moved else "so that the weights are as they were"
        )
        raise ValueError(
            f"{what}. Stopped in iteration {algorithm.iteration + 1}, before optimizer step "
            f"{trainer.global_step + 1}, {then}. Last checkpoint: {last}. "
            f"Lower the learning rate or max_grad_norm, or look at these rows."
        )


def shares(optimizer: Optimizer) -> list[Tensor]:
    """This rank's shares of the weights that train."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [w.to_local() if isinstance(w, DTensor) else w.detach() for w in weights]


def strange_rows(trainer: Trainer, algorithm: Algorithm) -> str:
    """Names this rank's rows whose loss is not finite, with their prompts where they have any."""
    named = []
    for part in algorithm.finite_rows:
        prompts = part.columns.get("prompt", [""] * len(part.rows))
        for row, prompt, finite in zip(part.rows, prompts, part.finite.tolist(), strict=True):
            if not finite:
                named.append(f"{row} ({str(prompt)[:60]!r})" if prompt else str(row))
    listed = ", ".join(named[:5]) + (" ..." if len(named) > 5 else "")
    return f"rows {listed} of rank {trainer.global_rank}" if named else ""


def of_all_ranks(text: str) -> list[str]:
    """What each rank says."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [text]
    texts = [text] * distributed.get_world_size()
    distributed.all_gather_object(texts, text)
    return texts
