"""Long-lived CPU processes of one group, forked once from a parent that imported everything."""

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed


class Ranks:
    """Process group (gloo) that calls a function on every rank and returns the results."""

    def __init__(self, number: int, port: int):
        context = get_context("fork")
        self.pipes, self.processes = [], []
        for rank in range(number):
            parent_end, child_end = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, number, port, child_end), daemon=True
            )
            process.start()
            self.pipes.append(parent_end)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return results by rank. Raise here, with its traceback, the error of any rank."""
        for pipe in self.pipes:
            pipe.send((function, args))
        results = [pipe.recv() for pipe in self.pipes]
        for failed, result in results:
            if failed:
                raise AssertionError(result)
        return [result for _, result in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, number: int, port: int, pipe: Connection) -> None:
    """Join the group as under torchrun, then run the functions that arrive."""
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
