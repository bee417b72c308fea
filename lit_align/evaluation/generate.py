"""A model's answers to held-out prompts, scored, with the log-probs of model and reference."""

from functools import partial

from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch import Callback, Trainer

from lit_align.algorithms.remax import ReMax
from lit_align.batches import Experience
from lit_align.callbacks.response_log import response_rows
from lit_align.callbacks.reward import Reward
from lit_align.callbacks.rollout import Rollout
from lit_align.data.prompts import PromptData
from lit_align.data.text import load_tokenizer
from lit_align.errors import UserError
from lit_align.evaluation.statistics import ResponseRows
from lit_align.models.policy import Policy


def predict_responses(
    path: str,
    reference: str,
    data: PromptData,
    rollout: Rollout,
    reward: Reward | None,
    temperature: float = 1.0,
    accelerator: str = "auto",
    precision: _PRECISION_INPUT = "32-true",
) -> ResponseRows:
    """One row per answer, a prompt's answers side by side.

    Args:
        path: Hub id or folder of the model.
        reference: Of the model that the KL is to.
        data: Whose evaluation rows are asked.
        rollout: Generates `predict_samples` responses per prompt, or a greedy one.
        reward: What scores the answers, if anything does.
        temperature: Of the model, when it answers and when it is scored.
        accelerator: Lightning's word for where to compute.
        precision: Lightning's word for the data type.
    """
    check_same_tokenizer(path, data)
    reference_factory = (
        None if path == reference else partial(Policy, reference, temperature=temperature)
    )
    callbacks: list[Callback] = [rollout] if reward is None else [rollout, reward]
    policy = partial(Policy, path, temperature=temperature)
    algorithm = ReMax(
        policy=policy, reference=reference_factory
    )  # all online algorithms predict alike
    trainer = quiet_trainer(callbacks, accelerator, precision)
    rows: ResponseRows = []
    for batch in trainer.predict(algorithm, data) or []:
        assert isinstance(batch, Experience)
        batch_rows = response_rows(batch, kl=algorithm.sequence_kl(batch).tolist())
        rows += [row for row, is_real in zip(batch_rows, batch.is_new, strict=True) if is_real]
    return rows


def quiet_trainer(
    callbacks: list[Callback], accelerator: str, precision: _PRECISION_INPUT
) -> Trainer:
    """One process that writes nothing."""
    return Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def check_same_tokenizer(path: str, data: PromptData) -> None:
    """Refuses a model whose token ids mean other words than the data's."""
    vocabulary = load_tokenizer(path).get_vocab()
    if vocabulary != data.tokenizer.get_vocab():
        raise UserError(
            f"{path} has another tokenizer than {data.tokenizer_path}: answers are compared token "
            f"by token. Evaluate it on its own, and compare the rewards."
        )
