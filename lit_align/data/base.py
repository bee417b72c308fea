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
from lit_align.data.filters import Unwanted
from lit_align.data.formats import rename
from lit_align.data.loader import Loader
from lit_align.data.sampler import Order, Rows
from lit_align.data.sources import Row, Source, load_rows, refuse_missing
from lit_align.data.text import load_tokenizer, stop_ids


class TextData(LightningDataModule):
    """Texts as batches of token ids; owns the tokenizer and the chat template.

    Args:
        path: Hub id, local file or folder, the word toy, or a list of sources that are mixed.
        name: Configuration of a hub data set.
        split: Split that is trained on, of a hub data set, a folder or the toy data.
        eval_path: Hub id, local file or folder with the evaluation rows, if not `path`.
        eval_split: Split that is evaluated, of `eval_path` or else of `path`.
        eval_fraction: Share of the training rows set aside, if neither path nor split is given.
        columns: New names of columns, such as {question: prompt}; the old ones stay too.
        tokenizer: Hub id or local folder; the command line gives the policy's by default.
        chat_template: Jinja text or its file; replaces the tokenizer's own template.
        eos_token: Token that ends an answer; replaces the tokenizer's own eos.
        drop: Rows to leave out: a regular expression for each column in which it may be found,
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
        columns: dict[str, str] | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        eos_token: str | None = None,
        drop: dict[str, str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_rows: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        if not 0 <= eval_fraction < 1:
            raise ValueError(f"eval_fraction is {eval_fraction}, but a share is from 0 to below 1")
        if batch_size < 1 or (eval_batch_size or 1) < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        one = [Source(path, name, split, columns=columns)] if isinstance(path, str) else path
        self.sources: list[Source] = one
        self.eval_path, self.eval_split, self.eval_fraction = eval_path, eval_split, eval_fraction
        self.columns = columns
        self.tokenizer_path = tokenizer
        self.chat_template, self.eos_token = chat_template, eos_token
        self.unwanted = Unwanted(drop or {})
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_rows, self.num_workers, self.seed = max_rows, num_workers, seed
        self.trust_remote_code = trust_remote_code
        self.dropped: Counter[str] = Counter()  # rows by reason
        self.cut: Counter[str] = Counter()  # rows by limit
        self.loaded_tokenizer: PreTrainedTokenizerBase | None = None
        self.encoded: dict[str, list[Any]] = {}  # examples by source

    def encode(self, row: Row) -> Any | None:
        """What is kept of a row, given as the data set has it; None if it is dropped."""
        raise NotImplementedError

    def collate(self) -> Callable[..., Batch]:
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
                raise ValueError(
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
            refuse_missing(path)

    def train_dataloader(self) -> Loader:
        """Batches in an order by seed and epoch, without the last incomplete one."""
        examples: list[Any] = []
        for source in self.sources:
            kept = self.halves(source)[0]
            examples += weighted(kept, source.weight, self.seed)
        return self.loader(examples, self.batch_size, training=True)

    def val_dataloader(self) -> Loader | list[Any]:
        """Batches of all evaluation rows; none in a fit without evaluation rows."""
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return [] if fitting and not self.has_evaluation else self.eval_loader()

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
        """Batches of all evaluation rows in the data's order, with `counted` False for repeats."""
        if not self.has_evaluation:
            raise ValueError(
                "there are no rows to evaluate: set data.eval_split, data.eval_path or "
                "data.eval_fraction"
            )
        examples: list[Any] = []
        first = self.sources[0]
        if self.eval_path:
            split, columns = self.eval_split or "train", self.columns
            other = replace(first, path=self.eval_path, split=split, columns=columns)
            examples = self.examples(other)
        elif self.eval_split:
            for source in self.sources:
                examples += self.examples(replace(source, split=self.eval_split))
        else:
            for source in self.sources:
                examples += self.halves(source)[1]
        return self.loader(examples, self.eval_batch_size, training=False)

    def loader(self, examples: list[Any], batch_size: int, training: bool) -> Loader:
        """This rank's batches."""
        rows = Rows(examples)
        order = Order(rows, batch_size, training, self.seed, **self.place(training))
        if self.trainer is not None:  # a resumed fit makes an iterator before it tells the epoch
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            order.set_epoch(progress.processed)
        with warnings.catch_warnings():  # torchdata calls what newer versions of torch deprecate
            warnings.filterwarnings("ignore", message=".*set_vital")
            return Loader(
                rows,
                batch_size=batch_size,
                sampler=order,
                num_workers=self.num_workers,
                worker_init_fn=deaf,
                collate_fn=partial(collated, self.collate(), training),
                pin_memory=torch.cuda.is_available(),
            )

    def place(self, training: bool) -> dict[str, int]:
        """What the order has to know of the trainer: this rank, and how long an epoch is.

        An epoch of `limit_train_batches` ends with its order: a checkpoint after the last batch
        goes on with the next epoch.
        """
        if self.trainer is None:
            return {}
        limit = self.trainer.limit_train_batches
        ends = {"max_batches": limit} if training and isinstance(limit, int) else {}
        return {**ends, **(self.trainer.distributed_sampler_kwargs or {})}

    def halves(self, source: Source) -> tuple[list[Any], list[Any]]:
        """The training rows of a source, and those of them that are set aside."""
        fraction = 0.0 if self.eval_path or self.eval_split else self.eval_fraction
        return share(self.examples(source), fraction, self.seed, self.unit)

    def unit(self, example: Any) -> Hashable:
        """What examples have in common that are set aside only together; by default nothing."""
        return id(example)

    def examples(self, source: Source) -> list[Any]:
        """The encoded rows of a source; each source is read once."""
        key = repr(replace(source, weight=1.0))
        if key not in self.encoded:
            self.encoded[key] = self.read(source)
        return self.encoded[key]

    def read(self, source: Source) -> list[Any]:
        """Loads and encodes the rows of a source, and says how many were dropped or cut."""
        rows = load_rows(
            source.path,
            source.name,
            source.split,
            source.separator,
            self.max_rows,
            source.header,
        )
        before = self.dropped.copy(), self.cut.copy()
        self.load_tokenizer()  # whose errors are not a row's
        examples = []
        for number, row in enumerate(rows):
            try:
                row = rename(row, source.columns or {})
                reason = self.unwanted.reason(row)
                example = self.encode(row) if reason is None else None
            except ValueError as error:
                raise ValueError(f"row {number} of '{source.path}': {error}") from error
            if reason is not None:
                self.dropped[reason] += 1
            elif example is not None:
                examples.append(example)
        dropped, cut = self.dropped - before[0], self.cut - before[1]
        for verb, reasons in (("dropped", dropped), ("cut", cut)):
            if reasons:
                place = f"'{source.path}' ({source.split}, {len(rows)} rows)"
                rank_zero_info(f"{place}: {verb} {listed(reasons)}")
        if not examples:
            raise ValueError(f"no row of '{source.path}' is left: dropped {listed(dropped)}")
        return examples


def deaf(worker: int) -> None:
    """Ctrl-C is for the trainer, which finishes its iteration with this worker's batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def listed(reasons: Counter[str]) -> str:
    """Such as: 3 prompts of more than max_prompt_tokens 512."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def collated(make: Callable[..., Batch], training: bool, items: list[tuple[Any, bool]]) -> Batch:
    """A batch; in evaluation with `counted`, False for a row that was in an earlier batch."""
    examples = [example for example, _ in items]
    return make(examples) if training else make(examples, counted=[new for _, new in items])


def share(
    examples: list[Any], fraction: float, seed: int, unit: Callable[[Any], Hashable] = id
) -> tuple[list[Any], list[Any]]:
    """A random `fraction` of the units, at least one, set aside; both parts in the data's order."""
    units = list(dict.fromkeys(map(unit, examples)))
    count = max(1, round(fraction * len(units))) if fraction else 0
    aside = {units[i] for i in random.Random(seed).sample(range(len(units)), count)}
    kept = [example for example in examples if unit(example) not in aside]
    return kept, [example for example in examples if unit(example) in aside]


def weighted(examples: list[Any], weight: float, seed: int) -> list[Any]:
    """Each example `weight` times: whole times all of them, and a random part of them."""
    whole = int(weight)
    count = round((weight - whole) * len(examples))
    part = sorted(random.Random(seed).sample(range(len(examples)), count))
    return examples * whole + [examples[i] for i in part]
