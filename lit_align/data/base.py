"""Base of all data modules: reads, encodes, splits, mixes, orders and batches rows."""

from __future__ import annotations

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
from lit_align.data.loader import Loader, collate, ignore_sigint
from lit_align.data.sampler import IndexedRows, ResumableSampler
from lit_align.data.sources import Row, Source, check_local_path, load_rows
from lit_align.data.splits import holdout_split, oversample
from lit_align.data.text import load_tokenizer, stop_ids
from lit_align.errors import UserError


class TextDataModule(LightningDataModule):
    """Batches of token ids from text rows, with the tokenizer and its chat template.

    Args:
        path: Hub id, local file or folder, the word toy, or a list of sources that are mixed.
        name: Configuration name of a hub data set. Default: the data set's own default.
        split: Training split of a hub data set, a folder or the toy data.
        eval_path: Hub id, local file or folder with the evaluation rows. Default: `path`.
        eval_split: Evaluation split of `eval_path`, or of `path` if that is not set.
        eval_fraction: Fraction of the training rows held out for evaluation. Used only if
            neither eval_path nor eval_split is set.
        rename_columns: New column names, such as {question: prompt}. The old ones stay too.
        tokenizer: Hub id or local folder. Default on the command line: the policy's path.
        chat_template: Jinja text or a file with it. Default: the tokenizer's own template.
        eos_token: Token that ends a response. Default: the tokenizer's own eos.
        drop_matching: Regular expressions by column, such as {answer: '^$'}. A row is dropped if
            one matches its column. The text of a conversation is searched.
        batch_size: Rows per batch and rank.
        eval_batch_size: Rows per evaluation batch and rank. Default: `batch_size`.
        max_rows: Most rows that are read of each source, from the first on. Default: all.
        num_workers: Processes that make batches. 0 makes them in the training process.
        seed: Seed of the row order, the held-out rows and the mixture.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Example:
        >>> from lit_align.data.prompts import PromptData
        >>> data = PromptData("toy", tokenizer="toy", max_rows=8, batch_size=4)
        >>> [len(batch) for batch in data.train_dataloader()]
        [4, 4]
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
        check_sizes(eval_fraction, batch_size, eval_batch_size or 1)
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
        """Return the encoded example of a row with the data set's columns; None drops the row."""
        raise NotImplementedError

    def collate_fn(self) -> Callable[..., Batch]:
        """Return a function that makes a batch of examples and of extra fields."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        return self.load_tokenizer()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, loaded once."""
        if self.loaded_tokenizer is None:
            if self.tokenizer_path is None:
                raise UserError(
                    "data.tokenizer is not set. Set --data.tokenizer to a hub id or a local "
                    "folder. The command line uses the policy's path by default."
                )
            self.loaded_tokenizer = load_tokenizer(
                self.tokenizer_path, self.chat_template, self.trust_remote_code, self.eos_token
            )
        return self.loaded_tokenizer

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end a response: eos and the chat template's end of turn."""
        return stop_ids(self.tokenizer)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids without special tokens."""
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def setup(self, stage: str) -> None:
        """Refuse missing files before a model is loaded. Rows are read by the first loader."""
        for path in [source.path for source in self.sources] + [self.eval_path or "toy"]:
            check_local_path(path)

    def train_dataloader(self) -> Loader:
        """Return shuffled batches; the order depends on seed and epoch.

        The last incomplete batch is dropped.
        """
        examples: list[Any] = []
        for source in self.sources:
            train_examples = self.train_eval_split(source)[0]
            examples += oversample(train_examples, source.weight, self.seed)
        return self.loader(examples, self.batch_size, training=True)

    def val_dataloader(self) -> Loader | list[Any]:
        """Return batches of all evaluation rows, or an empty list in a fit without such rows."""
        is_fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return [] if is_fitting and not self.has_evaluation else self.eval_loader()

    def test_dataloader(self) -> Loader:
        """Return batches of all evaluation rows."""
        return self.eval_loader()

    def predict_dataloader(self) -> Loader:
        """Return batches of all evaluation rows."""
        return self.eval_loader()

    @property
    def has_evaluation(self) -> bool:
        """True if a setting names evaluation rows."""
        return bool(self.eval_path or self.eval_split or self.eval_fraction)

    def eval_loader(self) -> Loader:
        """Return batches of all evaluation rows in data order. `is_new` is False for repeats."""
        if not self.has_evaluation:
            raise UserError(
                "there are no rows to evaluate. Set --data.eval_split, --data.eval_path or "
                "--data.eval_fraction."
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
        """Return this rank's batches."""
        rows = IndexedRows(examples)
        sampler = ResumableSampler(
            rows, batch_size, training, self.seed, **self.sampler_arguments(training)
        )
        # a resumed fit makes an iterator before Lightning calls set_epoch (lightning 2.6.6)
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)
        with warnings.catch_warnings():  # torchdata 0.11 calls a deprecated function of torch
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
        """Return rank, number of ranks and batches per epoch as the trainer has them.

        `limit_train_batches` is also the sampler's epoch: a checkpoint after the last batch then
        resumes with the next epoch.
        """
        if self.trainer is None:
            return {}
        limit = self.trainer.limit_train_batches
        epoch_limit = {"max_batches": limit} if training and isinstance(limit, int) else {}
        return {**epoch_limit, **(self.trainer.distributed_sampler_kwargs or {})}

    def train_eval_split(self, source: Source) -> tuple[list[Any], list[Any]]:
        """Return the training examples of a source and its held-out ones."""
        fraction = 0.0 if self.eval_path or self.eval_split else self.eval_fraction
        return holdout_split(self.examples(source), fraction, self.seed, self.group_key)

    def group_key(self, example: Any) -> Hashable:
        """Return the key of examples that are held out together. Default: each one by itself."""
        return id(example)

    def examples(self, source: Source) -> list[Any]:
        """Return the encoded rows of a source. Each source is read once."""
        key = repr(replace(source, weight=1.0))
        if key not in self.encoded:
            self.encoded[key] = self.read_source(source)
        return self.encoded[key]

    def read_source(self, source: Source) -> list[Any]:
        """Load and encode the rows of a source, and log the number of dropped and cut rows."""
        rows = load_rows(
            source.path,
            source.name,
            source.split,
            source.separator,
            self.max_rows,
            source.column_names,
        )
        previous = self.dropped.copy(), self.truncated.copy()
        self.load_tokenizer()  # here, so that its errors do not name a row
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


def check_sizes(eval_fraction: float, batch_size: int, eval_batch_size: int) -> None:
    """Refuse a fraction outside of [0, 1) and batches without rows.

    Example:
        >>> check_sizes(eval_fraction=0.5, batch_size=1, eval_batch_size=1)
    """
    if not 0 <= eval_fraction < 1:
        raise UserError(
            f"eval_fraction must be at least 0 and below 1, found {eval_fraction}. "
            "Set --data.eval_fraction."
        )
    for key, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
        if size < 1:
            raise UserError(f"{key} must be at least 1, found {size}. Set --data.{key}.")


def format_counts(reasons: Counter[str]) -> str:
    """Return the number of rows of each reason as text.

    Example:
        >>> format_counts(Counter({"empty rows": 3, "long rows": 1}))
        '3 empty rows, 1 long rows'
    """
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
