"""Order of rows on each rank, and its resume."""

from itertools import chain

import pytest

from lit_align.data.sampler import IndexedRows, ResumableSampler


def flat(lists) -> list:
    """Return the entries of all lists."""
    return list(chain.from_iterable(lists))


def batches(num_rows, batch_size, training=True, num_ranks=1, epoch=0, **settings):
    """Return the batches of positions of each rank."""
    ranks = []
    for rank in range(num_ranks):
        sampler = ResumableSampler(
            IndexedRows(list(range(num_rows))),
            batch_size,
            training,
            num_replicas=num_ranks,
            rank=rank,
            **settings,
        )
        sampler.set_epoch(epoch)
        taken = list(sampler)
        assert len(sampler) == len(taken)
        ranks.append([taken[i : i + batch_size] for i in range(0, len(taken), batch_size)])
    return ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("epoch", [0, 3])
def test_batches_of_all_ranks_equal_those_of_one_rank(num_ranks, epoch):
    (one,) = batches(35, 8, epoch=epoch)
    several = batches(35, 8 // num_ranks, num_ranks=num_ranks, epoch=epoch)
    assert len(one) == 4
    for step, batch in enumerate(one):
        assert [several[i % num_ranks][step][i // num_ranks] for i in range(8)] == batch


def test_order_depends_on_epoch_and_seed():
    orders = [batches(20, 4, epoch=epoch, seed=seed) for epoch in (0, 1) for seed in (0, 1)]
    assert len({str(order) for order in orders}) == 4
    assert orders[0] == batches(20, 4)
    assert sorted(flat(orders[3][0])) == list(range(20))


def test_training_drops_last_incomplete_batch():
    assert [len(rank) for rank in batches(23, 2, num_ranks=4)] == [2] * 4
    taken = flat(flat(batches(23, 2, num_ranks=4)))
    assert len(set(taken)) == 16


def test_max_batches_shortens_epoch():
    (short,), (full,) = batches(23, 2, max_batches=3), batches(23, 2)
    assert short == full[:3]
    assert batches(5, 2, max_batches=9) == batches(5, 2)


def test_evaluation_keeps_every_row_and_repeats_some():
    assert batches(5, 2, training=False) == [[[0, 1], [2, 3], [4]]]
    assert batches(5, 2, training=False, num_ranks=2) == [[[0, 2], [4]], [[1, 3], [5]]]
    assert batches(1, 2, training=False, num_ranks=4) == [[[0]], [[1]], [[2]], [[3]]]


def test_repeated_rows_are_marked():
    rows = IndexedRows(["a", "b", "c"])
    assert [rows[i] for i in range(5)] == [
        ("a", True),
        ("b", True),
        ("c", True),
        ("a", False),
        ("b", False),
    ]


def test_fewer_rows_than_one_batch_are_refused():
    with pytest.raises(ValueError, match=r"^5 rows do not fill one batch of 4 rows on each of 2"):
        batches(5, 4, num_ranks=2)
    assert len(batches(5, 8, training=False)[0]) == 1


def make_sampler(num_rows, num_ranks=1, rank=0, epoch=0):
    sampler = ResumableSampler(
        IndexedRows(list(range(num_rows))), 2, True, num_replicas=num_ranks, rank=rank
    )
    sampler.set_epoch(epoch)
    return sampler


def test_state_resumes_on_any_number_of_ranks():
    before = iter(make_sampler(16, epoch=2))
    taken = [next(before) for _ in range(8)]
    for rank in (0, 1):
        resumed = iter(make_sampler(16, num_ranks=2, rank=rank))
        resumed.load_state_dict(before.state_dict())
        full = list(iter(make_sampler(16, epoch=2)))
        assert taken == full[:8]
        assert list(resumed) == full[8 + rank :: 2]


def test_state_at_end_of_epoch_resumes_with_next_epoch():
    before = iter(make_sampler(6))
    list(before)
    resumed = iter(make_sampler(6))
    resumed.load_state_dict(before.state_dict())
    assert list(resumed) == list(iter(make_sampler(6, epoch=1)))


def test_state_of_earlier_epoch_is_ignored():
    before = iter(make_sampler(6))
    next(before)
    resumed = iter(make_sampler(6, epoch=1))
    resumed.load_state_dict(before.state_dict())
    assert list(resumed) == list(iter(make_sampler(6, epoch=1)))
