"""Counts the moments of a run in which it can be killed, and kills it in one of them."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_align.callbacks.checkpoint import Checkpoints


class Moment(NamedTuple):
    """One forward pass, or one step of a save.

    Args:
        number: Of the run, from 1 on.
        phase: rollout, prepare, update or save.
        iteration: In which it is.
        what: The step of a save.
    """

    number: int
    phase: str
    iteration: int
    what: str


class Moments:
    """Logs every moment of a process, and kills the process in one of them.

    Args:
        log: A line is written into it for each moment before it passes.
        kill_at: Number of the last moment; 0 for none.
    """

    def __init__(self, log: Path, kill_at: int = 0):
        self.log, self.kill_at = log, kill_at
        self.number, self.phase = 0, ""

    def begin(self, phase: str) -> None:
        self.phase = phase

    def end(self, phase: str) -> None:
        self.phase = ""

    def passes(self, what: str) -> bool:
        """Logs a moment; whether it is the last one."""
        self.number += 1
        moment = Moment(self.number, self.phase, self.algorithm.iteration, what)
        with self.log.open("a") as file:
            file.write(json.dumps(moment) + "\n")
        return self.number == self.kill_at

    def tick(self, what: str) -> None:
        """A moment; the end, if it is the chosen one."""
        if self.phase and self.passes(what):
            os.kill(os.getpid(), signal.SIGKILL)

    # What is watched ------------------------------------------------------------------------------

    def watch(self) -> None:
        """Comes in the process that is to be watched, before anything else; on rank 0 alone."""
        if os.environ.get("RANK", "0") != "0":
            return
        start, save = Checkpoints.on_train_start, Checkpoints.save

        def on_train_start(callback: Any, trainer: Any, algorithm: Any) -> None:
            start(callback, trainer, algorithm)
            algorithm.phase_listeners.append(self)
            self.algorithm = algorithm
            for network in algorithm.roles.values():
                embedding = network.network.get_input_embeddings()
                embedding.register_forward_hook(lambda *_: self.tick("forward"))

        def watched_save(callback: Any, trainer: Any, algorithm: Any) -> None:
            self.phase = "save"
            self.tick("begins")
            save(callback, trainer, algorithm)
            self.tick("ends")
            self.phase = ""

        Checkpoints.on_train_start, Checkpoints.save = on_train_start, watched_save
        torch.save = self.half_saved(torch.save)
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink")):
            setattr(owner, name, self.around(getattr(owner, name), name))

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function with a moment before it and one after it, in a save."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            saving = self.phase == "save"
            if saving:
                self.tick(f"before {name}")
            result = function(*args, **kwargs)
            if saving:
                self.tick(f"after {name}")
            return result

        return watched

    def half_saved(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.save with a moment in which half of the file is written."""

        def watched(content: Any, place: Any, *args: Any, **kwargs: Any) -> None:
            a_file = self.phase == "save" and isinstance(place, str | os.PathLike)
            if a_file and self.passes("half a file"):
                whole = io.BytesIO()
                function(content, whole, *args, **kwargs)
                Path(place).write_bytes(whole.getvalue()[: whole.tell() // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            function(content, place, *args, **kwargs)

        return watched


def read(log: Path) -> list[Moment]:
    """All moments of a run."""
    return [Moment(*json.loads(line)) for line in log.read_text().splitlines()]


def spread(moments: list[Moment], number: int) -> list[Moment]:
    """So many of them, at equal distances, none at the very ends."""
    return [moments[(2 * place + 1) * len(moments) // (2 * number)] for place in range(number)]
