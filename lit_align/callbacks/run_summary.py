"""What one step means, in numbers, before it starts."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.data.text import load_tokenizer
from lit_align.models.roles import Role, table

MAY_LACK = {  # where a path has no tokenizer, or none can be fetched, there is nothing to compare
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class BatchPlan(Callback):
    """Prints the batch plan, the table of roles and the stop ids; refuses what cannot work."""

    def on_fit_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Checks on every rank, prints on the first."""
        check_vocabulary(trainer, algorithm)
        for role in algorithm.cast():
            check_tokenizer(role, trainer.datamodule.tokenizer)
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


def check_tokenizer(role: Role, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a network that was trained on other token ids than it will be given."""
    path = role.network.path
    files = None if path is None else cached_file(path, "tokenizer_config.json", **MAY_LACK)
    if path is None or files is None:
        return
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(path).get_vocab()
    strange = [token for token, number in ours.items() if theirs.get(token) != number]
    if strange:
        raise ValueError(
            f"The {role.name} {path} has another tokenizer than the data ({len(strange)} tokens "
            f"differ, such as {strange[0]!r}), and reads the data's token ids: take a {role.name} "
            f"with the same tokenizer, or set data.tokenizer."
        )


def judges(trainer: Trainer) -> list[Role]:
    """The networks that score."""
    rewards = [callback for callback in trainer.callbacks if isinstance(callback, Reward)]
    return [role for reward in rewards for s in reward.panel.sources.values() for role in s.cast()]


def describe(trainer: Trainer, algorithm: Algorithm) -> list[str]:
    """The plan, a line each for the batch, the roles and the ends of answers."""
    prompts, ranks = trainer.datamodule.batch_size, trainer.world_size
    lines = []
    if isinstance(algorithm, OnlineAlgorithm):
        greedy, stored = prompts * algorithm.greedy_baseline, prompts * algorithm.num_stored
        learnt = prompts * algorithm.num_samples + stored
        steps = algorithm.epochs * len(algorithm.minibatches(learnt, 0))
        more = {"greedy": greedy, "stored": stored}
        extra = "".join(f" + {number} {kind}" for kind, number in more.items() if number)
        lines.append(
            f"batch plan: {prompts} prompts x {algorithm.num_samples} samples{extra} = "
            f"{learnt + greedy} rows per rollout and rank; {ranks} rank(s); "
            f"{steps} optimizer step(s) per rollout"
        )
    else:
        lines.append(f"batch plan: {prompts} rows per optimizer step and rank; {ranks} rank(s)")
    lines[0] += f"; micro-batches of up to {algorithm.microbatch_tokens} tokens"
    lines.extend(table([*algorithm.cast(), *judges(trainer)]))
    lines.extend(
        f"answers end at token ids {callback.stops(trainer, algorithm)}"
        for callback in trainer.callbacks
        if isinstance(callback, Rollout) and isinstance(algorithm, OnlineAlgorithm)
    )
    return lines
