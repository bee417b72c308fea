"""Guard that stops a run at a loss or gradient of NaN or infinity."""

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_align.algorithms.core.base import Algorithm
from lit_align.callbacks.checkpoint import Checkpoints
from lit_align.errors import UserError
from lit_align.optim.galore import GaLore


class NonFiniteGuard(Callback):
    """Check the losses and gradients of all ranks before each optimizer step.

    A NaN or infinity raises a UserError with the step, the rows and the last checkpoint. The step
    is not taken. With updates during backward (GaLore's `per_layer`) there are no gradients left
    and the weights are checked instead, so that no checkpoint contains a NaN.
    """

    def on_before_optimizer_step(
        self, trainer: Trainer, algorithm: Algorithm, optimizer: Optimizer
    ) -> None:
        """Raise a UserError if a loss or a gradient is not finite on any rank."""
        updated_in_backward = isinstance(optimizer, GaLore) and optimizer.per_layer
        tensors = local_shards(optimizer) if updated_in_backward else algorithm.grad_norms.values()
        checks = [tensor.isfinite().all() for tensor in tensors]
        checks += [part.finite.all() for part in algorithm.finite_rows]
        # one value is read from the device; shards may be offloaded to the CPU
        all_checks = torch.stack([check.to(algorithm.device) for check in checks])
        if trainer.strategy.reduce_boolean_decision(bool(all_checks.all())):
            return
        saved = [each for each in trainer.checkpoint_callbacks if isinstance(each, Checkpoints)]
        last = next((each.last_saved for each in saved if each.last_saved), "none yet")
        where = "; ".join(filter(None, gather_texts(describe_non_finite_rows(trainer, algorithm))))
        what = f"The loss is not finite: {where}" if where else "The gradient is not finite"
        consequence = (
            "after updates during backward" if updated_in_backward else "with unchanged weights"
        )
        raise UserError(
            f"{what}. Stopped in iteration {algorithm.iteration + 1}, before optimizer step "
            f"{trainer.global_step + 1}, {consequence}. Last checkpoint: {last}. "
            f"Lower --model.optimizer.lr or --model.max_grad_norm, or check these rows."
        )


def local_shards(optimizer: Optimizer) -> list[Tensor]:
    """Return this rank's shards of the trained weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [w.to_local() if isinstance(w, DTensor) else w.detach() for w in weights]


def describe_non_finite_rows(trainer: Trainer, algorithm: Algorithm) -> str:
    """Return this rank's rows with a loss that is not finite, with their prompts; "" if none."""
    names = []
    for part in algorithm.finite_rows:
        prompts = part.columns.get("prompt", [""] * len(part.rows))
        for row, prompt, finite in zip(part.rows, prompts, part.finite.tolist(), strict=True):
            if not finite:
                names.append(f"{row} ({str(prompt)[:60]!r})" if prompt else str(row))
    row_list = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return f"rows {row_list} of rank {trainer.global_rank}" if names else ""


def gather_texts(text: str) -> list[str]:
    """Return the text of each rank, by rank. A collective: every rank must call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [text]
    texts = [text] * distributed.get_world_size()
    distributed.all_gather_object(texts, text)
    return texts
