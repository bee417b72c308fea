"""How token losses are aggregated: weights and denominators by hand, and what is refused."""

import pytest
import torch
from tiny_models import RandomPrompts, scalar, tiny, trainer

from lit_align.algorithms.grpo import GRPO
from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.remax import ReMax
from lit_align.batches import Experience

LOSSES = torch.tensor([[1.0, 3.0], [6.0, 0.0], [0.0, 0.0]])
MASK = torch.tensor([[True, True], [True, False], [False, False]])  # the third row was skipped
ALGORITHMS = {"GRPO": GRPO, "ReMax": ReMax, "PPO": lambda **given: PPO(critic=scalar, **given)}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token_mean", 10 / 3), ("sequence_mean", (2 + 6) / 2), ("sequence_sum", (4 + 6) / 2)],
)
def test_the_aggregated_loss_by_hand(name, aggregation, expected):
    algorithm = ALGORITHMS[name](policy=tiny, loss_aggregation=aggregation)
    batch = Experience(response_mask=MASK)
    total = algorithm.aggregate(LOSSES, batch).sum()
    assert float(total / algorithm.loss_denominator(batch)) == pytest.approx(expected)


def test_a_misspelt_aggregation_is_refused_when_the_run_starts(tmp_path):
    algorithm = ReMax(policy=tiny, loss_aggregation="token_sum")
    with pytest.raises(ValueError, match=r"must be token_mean or .*, found token_sum\. Set"):
        trainer(tmp_path).fit(algorithm, RandomPrompts(1))


def test_a_bool_is_no_advantage_scale():
    with pytest.raises(ValueError, match="must be group_std or none, found True"):
        GRPO(policy=tiny, advantage_scale=True)
