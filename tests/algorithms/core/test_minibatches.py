"""Minibatches of a rollout: random, fair, and the same for any number of ranks."""

import pytest

from lit_align.algorithms.core.minibatches import shuffle_rows

PROMPTS, SAMPLES = 12, 3


def steps_of(world, size, seed="0"):
    """The rows of all ranks in each optimizer step, as one process numbers them."""
    steps = []
    for rank in range(world):
        rows = shuffle_rows(PROMPTS * SAMPLES // world, SAMPLES, rank, world, seed)
        places = [divmod(row, SAMPLES) for row in rows]
        ours = [(prompt * world + rank) * SAMPLES + sample for prompt, sample in places]
        steps.append([ours[start : start + size] for start in range(0, len(ours), size)])
    return [{row for part in step for row in part} for step in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    ("world", "size"), [(2, 1), (2, 2), (2, 9), (3, 4), (4, 1), (4, 3), (6, 2), (12, 1)]
)
def test_a_step_takes_the_same_rows_on_any_number_of_ranks(world, size):
    assert steps_of(world, size) == steps_of(1, size * world)


@pytest.mark.parametrize("size", [1, 4, 9, 36])
def test_every_row_comes_once(size):
    steps = steps_of(1, size)
    assert [len(step) for step in steps] == [size] * (36 // size)
    assert set().union(*steps) == set(range(36))


def test_another_seed_is_another_order():
    assert len({tuple(shuffle_rows(36, 3, 0, 1, str(seed))) for seed in range(100)}) > 90


def test_any_row_may_come_first():
    first = {shuffle_rows(36, 3, 0, 1, str(seed))[0] for seed in range(1000)}
    assert first == set(range(36))


def test_a_single_prompt_has_its_samples_shuffled():
    orders = {tuple(shuffle_rows(3, 3, 0, 1, str(seed))) for seed in range(100)}
    assert len(orders) == 6
