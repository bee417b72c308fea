"""Minibatches of a rollout: random, uniform, and equal for any number of ranks."""

import pytest

from lit_align.algorithms.core.minibatches import shuffle_rows

PROMPTS, SAMPLES = 12, 3


def rows_of_steps(world, size, seed="0"):
    """Return the rows of all ranks in each optimizer step, numbered as in one process."""
    steps = []
    for rank in range(world):
        rows = shuffle_rows(PROMPTS * SAMPLES // world, SAMPLES, rank, world, seed)
        pairs = [divmod(row, SAMPLES) for row in rows]  # (prompt, sample) of this rank
        numbers = [(prompt * world + rank) * SAMPLES + sample for prompt, sample in pairs]
        steps.append([numbers[start : start + size] for start in range(0, len(numbers), size)])
    return [{row for part in step for row in part} for step in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    ("world", "size"), [(2, 1), (2, 2), (2, 9), (3, 4), (4, 1), (4, 3), (6, 2), (12, 1)]
)
def test_a_step_has_equal_rows_for_any_number_of_ranks(world, size):
    assert rows_of_steps(world, size) == rows_of_steps(1, size * world)


@pytest.mark.parametrize("size", [1, 4, 9, 36])
def test_each_row_is_in_one_minibatch(size):
    steps = rows_of_steps(1, size)
    assert [len(step) for step in steps] == [size] * (36 // size)
    assert set().union(*steps) == set(range(36))


def test_each_seed_has_another_order():
    assert len({tuple(shuffle_rows(36, 3, 0, 1, str(seed))) for seed in range(100)}) > 90


def test_each_row_can_be_first():
    first = {shuffle_rows(36, 3, 0, 1, str(seed))[0] for seed in range(1000)}
    assert first == set(range(36))


def test_the_samples_of_a_single_prompt_are_shuffled():
    orders = {tuple(shuffle_rows(3, 3, 0, 1, str(seed))) for seed in range(100)}
    assert len(orders) == 6
