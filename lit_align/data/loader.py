"""A loader whose workers leave when it has no more use for them."""

from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader


class Loader(StatefulDataLoader):
    """Batches that can be gone on with.

    An iterator that is replaced or dropped sends its workers away, as Lightning does with torch's
    own iterators. Left to garbage collection it may be too late: of an iterator in a cycle the
    queues are closed first, then each worker is waited for five seconds and killed (torch 2.13).
    """

    current_iterator: Any = None

    @property
    def _iterator(self) -> Any:
        """The iterator over batches, by the name that torchdata and Lightning have for it."""
        return self.current_iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        if self.current_iterator is not None and self.num_workers:
            self.current_iterator._shutdown_workers()
        self.current_iterator = iterator
