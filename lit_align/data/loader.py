"""Data loader that can resume and that stops its workers when an iterator is replaced."""

import signal
from collections.abc import Callable
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from lit_align.batches import Batch


class Loader(StatefulDataLoader):
    """Batches of one rank, from a position that can be saved and loaded.

    Replacing or dropping an iterator shuts its workers down at once. Garbage collection would be
    too late: it closes the queues of an iterator in a reference cycle first. Each worker is then
    killed after a wait of five seconds (checked with torch 2.13).

    Example:
        >>> list(Loader([1, 2, 3], batch_size=2, collate_fn=sum))
        [3, 3]
    """

    current_iterator: Any = None

    # `_iterator` is a private attribute of torchdata 0.11, which Lightning 2.6.6 also sets
    @property
    def _iterator(self) -> Any:
        """The iterator over batches."""
        return self.current_iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        if self.current_iterator is not None and self.num_workers:
            self.current_iterator._shutdown_workers()  # private method, checked with torch 2.13
        self.current_iterator = iterator


def ignore_sigint(worker: int) -> None:
    """Ignore Ctrl-C in a worker, so that the trainer can finish its iteration."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(make: Callable[..., Batch], training: bool, items: list[tuple[Any, bool]]) -> Batch:
    """Return a batch of (example, is_new) pairs. Evaluation batches get the field `is_new`.

    Args:
        make: Function that makes a batch of a list of examples and of extra fields.
        training: True leaves `is_new` out, because training rows never repeat within an epoch.
        items: Rows as `IndexedRows` returns them.

    Example:
        >>> collate(lambda examples, is_new: (examples, is_new), False, [("a", True), ("b", False)])
        (['a', 'b'], [True, False])
    """
    examples = [example for example, _ in items]
    return make(examples) if training else make(examples, is_new=[new for _, new in items])
