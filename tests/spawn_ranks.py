"""Two CPU processes that stay: forked once from a parent that has imported everything."""

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed


class Ranks:
    """Calls a function on every rank of one process group (gloo) and returns what each says."""

    def __init__(self, number: int, port: int):
        context = get_context("fork")
        self.pipes, self.processes = [], []
        for rank in range(number):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, number, port, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank; what one of them raised is raised here, with its traceback."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self.pipes]
        for failed, answer in answers:
            if failed:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, number: int, port: int, pipe: Connection) -> None:
    """One rank: joins the group as torchrun would start it, then does what it is asked."""
    torch.set_num_threads(1)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in {**group, **address}.items()})
    distributed.init_process_group("gloo")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*args)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
