"""Generate and score a model's responses to held-out prompts, with log-probs of a reference."""

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
    """Return a row per response; the responses of one prompt follow each other.

    Args:
        path: Hub id or folder of the model.
        reference: Hub id or folder of the reference model of the KL.
        data: Data module with the evaluation prompts.
        rollout: Generates `predict_samples` responses per prompt, or one greedy response.
        reward: Scores the responses. None: rows without scores.
        temperature: Sampling temperature; the log-probs of the KL have the same.
        accelerator: Lightning's name of the device, such as cpu or gpu.
        precision: Lightning's name of the data type, such as bf16-true.
    """
    check_same_tokenizer(path, data)
    # ReMax's default reference is a copy of the policy, so that this model's KL is 0
    reference_factory = (
        None if path == reference else partial(Policy, reference, temperature=temperature)
    )
    callbacks: list[Callback] = [rollout] if reward is None else [rollout, reward]
    policy = partial(Policy, path, temperature=temperature)
    # Any online algorithm gives the same predictions.
    algorithm = ReMax(policy=policy, reference=reference_factory)
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
    """Return a Trainer of one process that writes and prints nothing.

    Args:
        callbacks: Rollout and reward.
        accelerator: Lightning's name of the device.
        precision: Lightning's name of the data type (checked with lightning 2.6.6, where the
            type of these names is private).
    """
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
    """Refuse a model whose tokenizer has other token ids than the data's.

    Args:
        path: Hub id or folder of the model.
        data: Data module with the prompts as token ids.
    """
    vocabulary = load_tokenizer(path).get_vocab()
    if vocabulary != data.tokenizer.get_vocab():
        raise UserError(
            f"{path} has another tokenizer than {data.tokenizer_path}, so their log-probs cannot "
            f"be compared. Run evaluate for each model alone and compare the rewards."
        )
