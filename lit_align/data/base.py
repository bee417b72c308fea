"""What all data modules share: rows are read, encoded, split, mixed, ordered and batched."""

from __future__ import annotations

import random
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_align.batches import Batch
from lit_align.data.filters import RowFilter
from lit_align.data.formats import add_renamed_columns
from lit_align.data.loader import Loader
from lit_align.data.sampler import IndexedRows, ResumableSampler
from lit_align.data.sources import Row, Source, check_local_path, load_rows
from lit_align.data.text import load_tokenizer, stop_ids
from lit_align.errors import UserError


class TextDataModule(LightningDataModule):
    """Texts as batches of token ids; owns the tokenizer and the chat template.

    Args:
        path: Hub id, local file or folder, the word toy, or a list of sources that are mixed.
        name: Configuration of a hub data set.
        split: Split that is trained on, of a hub data set, a folder or the toy data.
        eval_path: Hub id, local file or folder with the evaluation rows, if not `path`.
        eval_split: Split that is evaluated, of `eval_path` or else of `path`.
        eval_fraction: Share of the training rows set aside, if neither path nor split is given.
        rename_columns: New names of columns, such as {question: prompt}; the old ones stay too.
        tokenizer: Hub id or local folder; the command line gives the policy's by default.
        chat_template: Jinja text or its file; replaces the tokenizer's own template.
        eos_token: Token that ends an answer; replaces the tokenizer's own eos.
        drop_matching: Rows to leave out: a regular expression for each column that is searched,
            such as {answer: '^$'}; of a conversation its text is searched.
        batch_size: Rows per batch and rank.
        eval_batch_size: Rows per evaluation batch and rank; as in training if not given.
        max_rows: At most so many rows are read of each source, the first ones.
        num_workers: Processes that make batches; 0 makes them in the training process.
        seed: Of the order of rows, the evaluation share and the mixture.
        trust_remote_code: Whether to run Python code that comes with the tokenizer.
    """

    def __init__(
        self,
        path: str | list[Source],
        name: str | None = None,
        split: str = "train",
        eval_path: str | None = None,
        eval_split: str | None = None,
        eval_fraction: float = 0.0,
        rename_columns: dict[str, str] | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        eos_token: str | None = None,
        drop_matching: dict[str, str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_rows: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        if not 0 <= eval_fraction < 1:
            raise UserError(f"eval_fraction is {eval_fraction}, but a share is from 0 to below 1")
        if batch_size < 1 or (eval_batch_size or 1) < 1:
            raise UserError(f"batch_size must be at least 1, found {batch_size}")
        one = [Source(path, name, split, 1.0, rename_columns)] if isinstance(path, str) else path
        self.sources: list[Source] = one
        self.eval_path, self.eval_split, self.eval_fraction = eval_path, eval_split, eval_fraction
        self.rename_columns = rename_columns
        self.tokenizer_path = tokenizer
        self.chat_template, self.eos_token = chat_template, eos_token
        self.row_filter = RowFilter(drop_matching or {})
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_rows, self.num_workers, self.seed = max_rows, num_workers, seed
        self.trust_remote_code = trust_remote_code
        self.dropped: Counter[str] = Counter()  # rows by reason
        self.truncated: Counter[str] = Counter()  # rows by limit
        self.loaded_tokenizer: PreTrainedTokenizerBase | None = None
        self.encoded: dict[str, list[Any]] = {}  # examples by source

    def encode(self, row: Row) -> Any | None:
        """What is kept of a row, given as the data set has it; None if it is dropped."""
        raise NotImplementedError

    def collate_fn(self) -> Callable[..., Batch]:
        """A function of examples, and of fields to be added, that makes a batch of them."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first needed."""
        return self.load_tokenizer()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer once."""
        if self.loaded_tokenizer is None:
            if self.tokenizer_path is None:
                raise UserError(
                    "data.tokenizer is not set: the command line gives it the policy's path, "
                    "Python code gives tokenizer= a hub id or a local folder"
                )
            self.loaded_tokenizer = load_tokenizer(
                self.tokenizer_path, self.chat_template, self.trust_remote_code, self.eos_token
            )
        return self.loaded_tokenizer

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer, as tokenizer and chat template have them."""
        return stop_ids(self.tokenizer)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens and otherwise as it is."""
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def setup(self, stage: str) -> None:
        """Refuses files that are not there before a model is loaded; rows are read when needed."""
        for path in [source.path for source in self.sources] + [self.eval_path or "toy"]:
            check_local_path(path)

    def train_dataloader(self) -> Loader:
        """Batches in an order by seed and epoch, without the last incomplete one."""
        examples: list[Any] = []
        for source in self.sources:
            train_examples = self.train_eval_split(source)[0]
            examples += oversample(train_examples, source.weight, self.seed)
        return self.loader(examples, self.batch_size, training=True)

    def val_dataloader(self) -> Loader | list[Any]:
        """Batches of all evaluation rows; none in a fit without evaluation rows."""
        is_fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return [] if is_fitting and not self.has_evaluation else self.eval_loader()

    def test_dataloader(self) -> Loader:
        """Batches of all evaluation rows."""
        return self.eval_loader()

    def predict_dataloader(self) -> Loader:
        """Batches of all evaluation rows."""
        return self.eval_loader()

    @property
    def has_evaluation(self) -> bool:
        """Whether there are rows to evaluate."""
        return bool(self.eval_path or self.eval_split or self.eval_fraction)

    def eval_loader(self) -> Loader:
        """Batches of all evaluation rows in the data's order, with `is_new` False for repeats."""
        if not self.has_evaluation:
            raise UserError(
                "there are no rows to evaluate: set data.eval_split, data.eval_path or "
                "data.eval_fraction"
            )
        examples: list[Any] = []
        first = self.sources[0]
        if self.eval_path:
            split, columns = self.eval_split or "train", self.rename_columns
            eval_source = replace(first, path=self.eval_path, split=split, rename_columns=columns)
            examples = self.examples(eval_source)
        elif self.eval_split:
            for source in self.sources:
                examples += self.examples(replace(source, split=self.eval_split))
        else:
            for source in self.sources:
                examples += self.train_eval_split(source)[1]
        return self.loader(examples, self.eval_batch_size, training=False)

    def loader(self, examples: list[Any], batch_size: int, training: bool) -> Loader:
        """This rank's batches."""
        rows = IndexedRows(examples)
        sampler = ResumableSampler(
            rows, batch_size, training, self.seed, **self.sampler_arguments(training)
        )
        if self.trainer is not None:  # a resumed fit makes an iterator before it tells the epoch
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)
        with warnings.catch_warnings():  # torchdata calls what newer versions of torch deprecate
            warnings.filterwarnings("ignore", message=".*set_vital")
            return Loader(
                rows,
                batch_size=batch_size,
                sampler=sampler,
                num_workers=self.num_workers,
                worker_init_fn=ignore_sigint,
                collate_fn=partial(collate, self.collate_fn(), training),
                pin_memory=torch.cuda.is_available(),
            )

    def sampler_arguments(self, training: bool) -> dict[str, int]:
        """What the order has to know of the trainer: this rank, and how long an epoch is.

        An epoch of `limit_train_batches` ends with its order: a checkpoint after the last batch
        goes on with the next epoch.
        """
        if self.trainer is None:
            return {}
        limit = self.trainer.limit_train_batches
        epoch_limit = {"max_batches": limit} if training and isinstance(limit, int) else {}
        return {**epoch_limit, **(self.trainer.distributed_sampler_kwargs or {})}

    def train_eval_split(self, source: Source) -> tuple[list[Any], list[Any]]:
        """The training rows of a source, and those of them that are set aside."""
        fraction = 0.0 if self.eval_path or self.eval_split else self.eval_fraction
        return holdout_split(self.examples(source), fraction, self.seed, self.group_key)

    def group_key(self, example: Any) -> Hashable:
        """What examples have in common that are set aside only together; by default nothing."""
        return id(example)

    def examples(self, source: Source) -> list[Any]:
        """The encoded rows of a source; each source is read once."""
        key = repr(replace(source, weight=1.0))
        if key not in self.encoded:
            self.encoded[key] = self.read_source(source)
        return self.encoded[key]

    def read_source(self, source: Source) -> list[Any]:
        """Loads and encodes the rows of a source, and says how many were dropped or truncated."""
        rows = load_rows(
            source.path,
            source.name,
            source.split,
            source.separator,
            self.max_rows,
            source.column_names,
        )
        previous = self.dropped.copy(), self.truncated.copy()
        self.load_tokenizer()  # whose errors are not a row's
        examples = []
        for number, row in enumerate(rows):
            try:
                row = add_renamed_columns(row, source.rename_columns or {})
                reason = self.row_filter.drop_reason(row)
                example = self.encode(row) if reason is None else None
            except ValueError as error:
                raise UserError(f"row {number} of '{source.path}': {error}") from error
            if reason is not None:
                self.dropped[reason] += 1
            elif example is not None:
                examples.append(example)
        dropped, truncated = self.dropped - previous[0], self.truncated - previous[1]
        for verb, reasons in (("dropped", dropped), ("truncated", truncated)):
            if reasons:
                location = f"'{source.path}' ({source.split}, {len(rows)} rows)"
                rank_zero_info(f"{location}: {verb} {format_counts(reasons)}")
        if not examples:
            raise UserError(f"no row of '{source.path}' is left: dropped {format_counts(dropped)}")
        return examples


def ignore_sigint(worker: int) -> None:
    """Ctrl-C is for the trainer, which finishes its iteration with this worker's batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def format_counts(reasons: Counter[str]) -> str:
    """Such as: 3 prompts of more than max_prompt_tokens 512."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def collate(make: Callable[..., Batch], training: bool, items: list[tuple[Any, bool]]) -> Batch:
    """A batch; in evaluation with `is_new`, False for a row that was in an earlier batch."""
    examples = [example for example, _ in items]
    return make(examples) if training else make(examples, is_new=[new for _, new in items])


def holdout_split(
    examples: list[Any], fraction: float, seed: int, group_key: Callable[[Any], Hashable] = id
) -> tuple[list[Any], list[Any]]:
    """A random `fraction` of the groups, at least one, set aside; both parts in data order."""
    groups = list(dict.fromkeys(map(group_key, examples)))
    count = max(1, round(fraction * len(groups))) if fraction else 0
    held_out = {groups[i] for i in random.Random(seed).sample(range(len(groups)), count)}
    train_examples = [example for example in examples if group_key(example) not in held_out]
    return train_examples, [example for example in examples if group_key(example) in held_out]


def oversample(examples: list[Any], weight: float, seed: int) -> list[Any]:
    """Each example `weight` times: whole times all of them, and a random part of them."""
    num_copies = int(weight)
    count = round((weight - num_copies) * len(examples))
    part = sorted(random.Random(seed).sample(range(len(examples)), count))
    return examples * num_copies + [examples[i] for i in part]
