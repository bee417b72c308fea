"""What one step means, in numbers, before it starts."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_align.algorithms.base import Algorithm
from lit_align.algorithms.online import OnlineAlgorithm
from lit_align.callbacks.rollout import Rollout


class BatchPlan(Callback):
    """Prints the batch plan, the trained roles and the stop ids; refuses what cannot work."""

    def on_train_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Checks on every rank, prints on the first."""
        check_vocabulary(trainer, algorithm)
        for line in describe(trainer, algorithm):
            rank_zero_only(print)(line)


def check_vocabulary(trainer: Trainer, algorithm: Algorithm) -> None:
    """Refuses a tokenizer that makes ids which a trained network does not know."""
    tokenizer = trainer.datamodule.tokenizer
    for role, network in algorithm.roles.items():
        if len(tokenizer) > network.vocabulary:
            raise ValueError(
                f"The tokenizer makes {len(tokenizer)} token ids and the {role} {network.name} "
                f"knows {network.vocabulary}: set data.tokenizer to the model's own."
            )


def describe(trainer: Trainer, algorithm: Algorithm) -> list[str]:
    """The plan, a line each for the batch, the roles and the ends of answers."""
    prompts, ranks = trainer.datamodule.batch_size, trainer.world_size
    lines = []
    if isinstance(algorithm, OnlineAlgorithm):
        greedy = int(algorithm.greedy_baseline)
        sampled = prompts * algorithm.num_samples
        steps = algorithm.epochs * len(algorithm.minibatches(sampled, 0))
        extra = f" + {prompts} greedy" if greedy else ""
        lines.append(
            f"batch plan: {prompts} prompts x {algorithm.num_samples} samples{extra} = "
            f"{sampled + greedy * prompts} rows per rollout and rank; {ranks} rank(s); "
            f"{steps} optimizer step(s) per rollout"
        )
    else:
        lines.append(f"batch plan: {prompts} rows per optimizer step and rank; {ranks} rank(s)")
    lines[0] += f"; micro-batches of up to {algorithm.microbatch_tokens} tokens"
    for role, network in algorithm.roles.items():
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        total = sum(p.numel() for p in network.parameters())
        lines.append(f"{role}: {network.name}, {trained:,} of {total:,} parameters train")
    lines.extend(
        f"answers end at token ids {callback.stops(trainer, algorithm)}"
        for callback in trainer.callbacks
        if isinstance(callback, Rollout) and isinstance(algorithm, OnlineAlgorithm)
    )
    return lines
