"""Which rows of a rollout an optimizer step takes: the same ones for any number of ranks."""

import math
import random


def shuffled(num_rows: int, per_prompt: int, rank: int, world: int, seed: str) -> list[int]:
    """This rank's rows, shuffled so that its k-th of them belong to the k-th of every rank.

    Rank r holds each `world`-th prompt from the r-th on. The order is that of one process, which
    takes the first sample of every prompt, then another: each time the prompts i of all n as
    (a i + b) mod n, with a random b and a random a that has no factor in common with n. Of any
    `world` neighbours in it, each rank has exactly one.

    Args:
        num_rows: Rows of this rank, a prompt's side by side.
        per_prompt: Rows of a prompt.
        rank: This one.
        world: Number of ranks.
        seed: Of the order, the same on all ranks.
    """
    source, prompts = random.Random(seed), num_rows // per_prompt * world
    rows = []
    for sample in source.sample(range(per_prompt), per_prompt):
        steps = [a for a in range(1, prompts + 1) if math.gcd(a, prompts) == 1]
        step, start = source.choice(steps), source.randrange(prompts)
        for place in range(prompts):
            local, holder = divmod((step * place + start) % prompts, world)
            if holder == rank:
                rows.append(local * per_prompt + sample)
    return rows
