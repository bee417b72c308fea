"""Reward model training: Bradley-Terry loss, accuracy and margin over pairs."""

import math

import pytest
import torch
from tiny_models import RandomPairs, scalar, trainer
from torch.optim import AdamW

from lit_align.algorithms.reward_model import RewardModel


def bare_trainer(tmp_path, **settings):
    run = trainer(tmp_path, **settings)
    run.callbacks.clear()
    return run


def test_the_chosen_text_scores_higher_after_training(tmp_path):
    algorithm = RewardModel(reward_model=scalar, optimizer=lambda p: AdamW(p, lr=1e-2))
    bare_trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(algorithm, RandomPairs(15))
    (measured,) = bare_trainer(tmp_path).validate(algorithm, RandomPairs(15), verbose=False)
    assert measured["val/accuracy"] == 1.0
    assert measured["val/margin"] > 1.0


def test_accuracy_and_margin_count_each_pair_once(tmp_path):
    algorithm = RewardModel(reward_model=scalar)
    (measured,) = bare_trainer(tmp_path).validate(algorithm, RandomPairs(1), verbose=False)
    pairs = RandomPairs().batch(0).rows([0, 1, 2])
    chosen, rejected = scalar().scores(pairs.texts()).view(-1, 2).unbind(-1)
    assert measured["val/accuracy"] == pytest.approx(float((chosen > rejected).float().mean()))
    assert measured["val/margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-5)


def test_microbatches_do_not_change_scores():
    algorithm = RewardModel(reward_model=scalar)
    algorithm.configure_model()
    pairs = RandomPairs().batch(0)
    together = algorithm.scores(pairs)
    alone = [algorithm.scores(pairs.rows([row]).trim_padding()) for row in range(4)]
    torch.testing.assert_close(together[0], torch.cat([chosen for chosen, _ in alone]))
    torch.testing.assert_close(together[1], torch.cat([rejected for _, rejected in alone]))


class FixedScores:
    """A network whose score is 1 for the chosen text and -3 for the rejected one."""

    def scores(self, texts):
        return torch.tensor([1.0, -3.0]).repeat(len(texts) // 2)


def loss_of(pairs, **settings) -> list[float]:
    algorithm = RewardModel(reward_model=scalar, **settings)
    algorithm.__dict__["reward_model"] = FixedScores()
    (loss,) = algorithm.losses(pairs)
    return loss.tolist()


def test_the_bradley_terry_loss_with_margin_and_centering():
    pairs = RandomPairs().batch(0).rows([0])
    assert loss_of(pairs) == pytest.approx([math.log1p(math.exp(-4))])
    pairs.margin = torch.tensor([1.0])
    assert loss_of(pairs) == pytest.approx([math.log1p(math.exp(-4))])
    assert loss_of(pairs, use_margin=True) == pytest.approx([math.log1p(math.exp(-3))])
    centered = loss_of(pairs, center_coef=0.5)
    assert centered == pytest.approx([math.log1p(math.exp(-4)) + 0.5 * 4.0])
