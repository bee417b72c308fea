"""Which rows of a rollout an optimizer step takes: the same ones for any number of ranks."""

import math
import random


def shuffle_rows(
    num_rows: int, rows_per_prompt: int, rank: int, world_size: int, seed: str
) -> list[int]:
    """This rank's rows, shuffled so that its k-th of them belong to the k-th of every rank.

    Rank r holds each `world_size`-th prompt from r on. The order is that of one process, which
    takes the first sample of every prompt, then another: each time the prompts i of all n as
    (a i + b) mod n, with a random b and a random a that has no factor in common with n. Of any
    `world_size` neighbours in it, each rank has exactly one.

    Args:
        num_rows: Rows of this rank, a prompt's side by side.
        rows_per_prompt: Rows of a prompt.
        rank: This one.
        world_size: Number of ranks.
        seed: Of the order, the same on all ranks.
    """
    rng, prompts = random.Random(seed), num_rows // rows_per_prompt * world_size
    rows = []
    for sample in rng.sample(range(rows_per_prompt), rows_per_prompt):
        steps = [a for a in range(1, prompts + 1) if math.gcd(a, prompts) == 1]
        step, start = rng.choice(steps), rng.randrange(prompts)
        for position in range(prompts):
            local, owner = divmod((step * position + start) % prompts, world_size)
            if owner == rank:
                rows.append(local * rows_per_prompt + sample)
    return rows
