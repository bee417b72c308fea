"""Summary of a run, printed before it starts: rows, steps, roles and stop ids."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.data.text import load_tokenizer
from lit_align.errors import UserError
from lit_align.models.roles import Role, role_table

OPTIONAL = {  # no error if a path has no tokenizer, or none can be fetched (transformers 5.23)
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class RunSummary(Callback):
    """Print batch, roles and stop ids, and refuse tokenizers that do not fit the networks."""

    def on_fit_start(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Check on every rank, and print on the first."""
        check_vocabulary(trainer, algorithm)
        for role in algorithm.all_roles():
            check_role_tokenizer(role, trainer.datamodule.tokenizer)
        for line in summary_lines(trainer, algorithm):
            rank_zero_only(print)(line)


def check_vocabulary(trainer: Trainer, algorithm: Algorithm) -> None:
    """Refuse a tokenizer with more token ids than a network's vocabulary."""
    tokenizer = trainer.datamodule.tokenizer
    for role, network in algorithm.roles.items():
        if len(tokenizer) > network.vocab_size:
            raise UserError(
                f"The tokenizer has {len(tokenizer)} token ids and the {role} {network.name} "
                f"has {network.vocab_size}. Set --data.tokenizer to the model's own."
            )


def check_role_tokenizer(role: Role, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a network whose own tokenizer has other token ids than the data's tokenizer."""
    path = role.network.path
    files = None if path is None else cached_file(path, "tokenizer_config.json", **OPTIONAL)
    if path is None or files is None:
        return
    data_vocab, role_vocab = tokenizer.get_vocab(), load_tokenizer(path).get_vocab()
    unequal = [token for token, number in data_vocab.items() if role_vocab.get(token) != number]
    if unequal:
        raise UserError(
            f"The {role.name} {path} has another tokenizer than the data ({len(unequal)} tokens "
            f"differ, such as {unequal[0]!r}), but it gets the data's token ids. Use a {role.name} "
            f"with the same tokenizer, or set --data.tokenizer."
        )


def reward_roles(trainer: Trainer) -> list[Role]:
    """Return the roles of the networks of all reward functions."""
    rewards = [callback for callback in trainer.callbacks if isinstance(callback, Reward)]
    return [
        role
        for reward in rewards
        for s in reward.weighted_sum.functions.values()
        for role in s.all_roles()
    ]


def summary_lines(trainer: Trainer, algorithm: Algorithm) -> list[str]:
    """Return the lines of the summary: batch and steps, the role table, stop ids."""
    prompts, ranks = trainer.datamodule.batch_size, trainer.world_size
    lines = []
    if isinstance(algorithm, OnlineAlgorithm):
        greedy, offline = (
            prompts * algorithm.uses_greedy_baseline,
            prompts * algorithm.num_offline_samples,
        )
        num_trained = prompts * algorithm.num_samples + offline
        steps = algorithm.update_epochs * len(algorithm.minibatches(num_trained, 0))
        extra_rows = {"greedy": greedy, "offline": offline}
        extra_text = "".join(f" + {number} {kind}" for kind, number in extra_rows.items() if number)
        lines.append(
            f"batch: {prompts} prompts x {algorithm.num_samples} samples{extra_text} = "
            f"{num_trained + greedy} rows per rollout and rank; {ranks} rank(s); "
            f"{steps} optimizer step(s) per rollout"
        )
    else:
        lines.append(f"batch: {prompts} rows per optimizer step and rank; {ranks} rank(s)")
    lines[0] += f"; micro-batches of up to {algorithm.microbatch_tokens} tokens"
    lines.extend(role_table([*algorithm.all_roles(), *reward_roles(trainer)]))
    lines.extend(
        f"stop token ids: {callback.stop_ids(trainer, algorithm)}"
        for callback in trainer.callbacks
        if isinstance(callback, Rollout) and isinstance(algorithm, OnlineAlgorithm)
    )
    return lines
