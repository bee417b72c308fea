"""Points of a run at which it can be killed: counts them, and kills the run at one."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_align.callbacks.checkpoint import Checkpoints


class KillingPoint(NamedTuple):
    """One forward pass, or one step of a save.

    Args:
        number: Index in the run, from 1.
        phase: rollout, prepare, update or save.
        iteration: Iteration of the run.
        what: "forward", or the step of a save.
    """

    number: int
    phase: str
    iteration: int
    what: str


class KillingPoints:
    """Log of the killing points of a process, which can be killed at one of them.

    Args:
        log: File. A line is written for each point when the run reaches it.
        kill_at: Number of the point at which to kill. 0 never kills.
    """

    def __init__(self, log: Path, kill_at: int = 0):
        self.log, self.kill_at = log, kill_at
        self.number, self.phase = 0, ""

    def begin(self, phase: str) -> None:
        self.phase = phase

    def end(self, phase: str) -> None:
        self.phase = ""

    def is_last(self, what: str) -> bool:
        """Log a point and return True if the process ends at it."""
        self.number += 1
        point = KillingPoint(self.number, self.phase, self.algorithm.iteration, what)
        with self.log.open("a") as file:
            file.write(json.dumps(point) + "\n")
        return self.number == self.kill_at

    def tick(self, what: str) -> None:
        """Log a point, and kill the process if it is the chosen one."""
        if self.phase and self.is_last(what):
            os.kill(os.getpid(), signal.SIGKILL)

    # Hooks ---------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Install the hooks on rank 0, before anything else in the process."""
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
        """Return the function with a point before it and one after it, during a save."""

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
        """Return torch.save with a point at which half of the file is written."""

        def watched(content: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            a_file = self.phase == "save" and isinstance(target, str | os.PathLike)
            if a_file and self.is_last("half a file"):
                buffer = io.BytesIO()
                function(content, buffer, *args, **kwargs)
                Path(target).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            function(content, target, *args, **kwargs)

        return watched


def read(log: Path) -> list[KillingPoint]:
    """Return all killing points of a run."""
    return [KillingPoint(*json.loads(line)) for line in log.read_text().splitlines()]


def evenly_spaced(points: list[KillingPoint], number: int) -> list[KillingPoint]:
    """Return `number` of the points at equal distances, not the first or last."""
    return [points[(2 * index + 1) * len(points) // (2 * number)] for index in range(number)]
