"""Minibatches of a rollout: the rows of each optimizer step, equal for any number of ranks."""

import math
import random


def shuffle_rows(
    num_rows: int, rows_per_prompt: int, rank: int, world_size: int, seed: str
) -> list[int]:
    """Return the shuffled rows of this rank.

    Minibatch k holds the same prompts for any number of ranks.

    Rank r holds each `world_size`-th prompt from r on. The order is that of one process, which
    takes one sample of every prompt, then another sample of every prompt. A pass visits prompt
    (a * i + b) mod n at step i. a and b are random, and a is coprime to n. So the next
    `world_size` prompts are on different ranks.

    Args:
        num_rows: Rows of this rank. Rows of one prompt are adjacent.
        rows_per_prompt: Rows of a prompt.
        rank: Index of this rank.
        world_size: Number of ranks.
        seed: Seed of the order, equal on all ranks.

    Example:
        >>> ranks = [shuffle_rows(6, 1, rank, 2, "seed") for rank in range(2)]
        >>> [sorted(rows) for rows in ranks]
        [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    """
    # Python's generator gives equal draws on all ranks and leaves torch's generator unchanged.
    rng, prompts = random.Random(seed), num_rows // rows_per_prompt * world_size
    rows = []
    for sample in rng.sample(range(rows_per_prompt), rows_per_prompt):
        # With these steps, i -> (a i + b) mod n visits each prompt once.
        steps = [a for a in range(1, prompts + 1) if math.gcd(a, prompts) == 1]
        step, start = rng.choice(steps), rng.randrange(prompts)
        for position in range(prompts):
            local, owner = divmod((step * position + start) % prompts, world_size)
            if owner == rank:
                rows.append(local * rows_per_prompt + sample)
    return rows
