"""RTO: what a DPO model adds to PPO's token rewards, whose reference it is compared with, and where
it leads."""

import math

import pytest
import torch
from tabular import REFERENCE as REFERENCE_TABLE
from tabular import SCORES as RESPONSE_SCORES
from tabular import Table
from tiny_models import TINY, RandomPrompts, distance, scalar, tiny, trainer, weights
from torch import Tensor
from torch.optim import SGD

from lit_align.algorithms.ppo import PPO
from lit_align.algorithms.rto import RTO
from lit_align.batches import Experience
from lit_align.functional.masks import through_first
from lit_align.functional.returns import gae
from lit_align.models.adapters.lora import LoRA
from lit_align.models.policy import Policy
from lit_align.models.scalar_head import ScalarHead

POLICY = torch.tensor([[-1, -0.5, -2, -0.3, 0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-1.2, -0.5, -1, -0.8, 0]], dtype=torch.float64)
DPO = torch.tensor([[-0.9, -1.1, -3, -0.2, 0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, True, False]])


def sgd(params):
    return SGD(params, lr=0.1)


def rto(**settings) -> RTO:
    return RTO(policy=tiny, dpo=tiny, optimizer=sgd, **settings)


def rollout(score: float) -> Experience:
    return Experience(
        scores=torch.tensor([score], dtype=torch.float64),
        logprobs=POLICY,
        ref_logprobs=REFERENCE,
        dpo_logprobs=DPO,
        response_mask=MASK,
        truncated=[False],
    )


# The papers' note, section 6 --------------------------------------------------------------------


def test_t1b_coefficient_0_switches_it_off():
    """The released code applies the raw log-ratio there."""
    off = RTO(policy=tiny, dpo_coef=0.0)
    assert off.token_rewards(rollout(0.0)).tolist() == [pytest.approx([-0.002, 0, 0.01, -0.005, 0])]


@pytest.mark.parametrize(("score", "last"), [(1.2, 1.225), (25.0, 10.025)])
def test_t2_rewards_of_all_three_sources(score, last):
    algorithm = rto(dpo_clip=0.05, score_clip=10.0)
    rewards = algorithm.token_rewards(rollout(score))
    assert rewards.tolist() == [pytest.approx([0.013, -0.03, -0.04, last, 0], abs=1e-7)]


@pytest.mark.parametrize("beyond", [0.0, 9.0])
def test_t3_advantages_and_a_value_on_padding_that_changes_nothing(beyond):
    rewards = rto(dpo_clip=0.05).token_rewards(rollout(1.2))
    values = torch.tensor([[0.5, 0.4, 0.3, 0.6, beyond]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, MASK, 1.0, 0.95)
    expected = [0.560009375, 0.6810625, 0.85375, 0.625, 0]
    assert advantages.tolist() == [pytest.approx(expected, abs=1e-7)]
    expected = [1.060009375, 1.0810625, 1.15375, 1.225, 0]
    assert returns.tolist() == [pytest.approx(expected, abs=1e-7)]


def climbed(start: Tensor, other: Tensor, judge: Tensor, coefs: tuple[float, ...]) -> Tensor:
    """[9] the policy of two tokens that ascends the expected gradient of RTO's own rewards.

    Args:
        start: [4, 3] logits of the reference: of the first token, and of the second after each.
        other: [4, 3] logits of the DPO model.
        judge: [9] scores of the responses.
        coefs: Of the DPO reward, of the KL and of the score.
    """
    policy, reference, mask = Table(start), Table(start), torch.ones(9, 2, dtype=torch.bool)
    dense, kl, score = coefs
    algorithm = rto(dpo_coef=dense, kl_coef=kl, score_coef=score)
    batch = Experience(
        scores=judge,
        ref_logprobs=reference.tokens.detach(),
        dpo_logprobs=Table(other).tokens.detach(),
        response_mask=mask,
        truncated=[False] * 9,
    )
    for _ in range(600):
        batch.logprobs = policy.tokens.detach()
        rewards = algorithm.token_rewards(batch)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
        gain = (policy.whole.detach().exp() * (policy.tokens * advantages).sum(-1)).sum() / kl
        (uphill,) = torch.autograd.grad(gain, policy.logits)
        policy.logits.data += 4 * uphill
    return policy.whole.detach().exp()


def one_token(probs: list[float]) -> Tensor:
    """[4, 3] logits whose first token has these probabilities; the second is a fair die."""
    logits = torch.zeros(4, 3, dtype=torch.float64)
    logits[0] = torch.tensor(probs, dtype=torch.float64).log()
    return logits


@pytest.mark.parametrize(
    ("coefs", "expected"),
    [
        ((0.05, 0.05, 0.0), [0.55, 0.35, 0.10]),  # the DPO policy itself
        ((0.05, 0.01, 0.0), [0.5515735, 0.4441454, 0.0042810]),
        ((0.05, 0.01, 1.0), [0.3080523, 0.6742808, 0.0176669]),
    ],
)
def test_t7_the_tabular_optimum(coefs, expected):
    judge = torch.tensor([0.0, 0.01, 0.02], dtype=torch.float64).repeat_interleave(3)
    found = climbed(one_token([0.5, 0.3, 0.2]), one_token([0.55, 0.35, 0.10]), judge, coefs)
    assert found.view(3, 3).sum(-1).tolist() == pytest.approx(expected, abs=1e-6)
    assert (found.view(3, 3).std(-1) < 1e-6).all()


@pytest.mark.parametrize("coefs", [(0.05, 0.05, 0.0), (0.1, 0.05, 0.02)])
def test_the_optimum_of_whole_responses(coefs):
    """pi_ref (pi_dpo / pi_ref)^(beta1 / beta2) exp(beta3 score / beta2); at first pi_dpo alone."""
    reference, other = REFERENCE_TABLE, REFERENCE_TABLE.flip(1) * 1.5
    dense, kl, score = coefs
    logits = (1 - dense / kl) * Table(reference).whole + dense / kl * Table(other).whole
    expected = (logits + score / kl * RESPONSE_SCORES).softmax(-1).detach()
    if coefs == (0.05, 0.05, 0.0):
        torch.testing.assert_close(expected, Table(other).whole.exp().detach())
    found = climbed(reference, other, RESPONSE_SCORES, coefs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_t10_a_cut_answer_keeps_its_last_token():
    answers = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [9, 0, 0, 0]])
    mask = through_first(answers, [9])
    assert mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert answers[0, -1] == 8


# The algorithm ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A base, an adapter that something trained on it, and the two merged."""
    folder = tmp_path_factory.mktemp("rto")
    tiny().save(folder / "base")
    adapted = Policy(str(folder / "base"), lora=LoRA(r=2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    adapted.save(folder / "adapter")
    Policy(str(folder / "adapter")).save(folder / "merged")
    return {name: str(folder / name) for name in ("base", "adapter", "merged")}


class Kept(RTO):
    def prepare(self, batch):
        self.kept = super().prepare(batch)
        return self.kept


def rolled(folder, num_batches=1, **settings) -> tuple[Kept, Experience]:
    torch.manual_seed(0)
    algorithm = Kept(critic=scalar, optimizer=sgd, **settings)
    trainer(folder, limit_val_batches=0).fit(algorithm, RandomPrompts(num_batches))
    return algorithm, algorithm.kept


def test_an_adapter_on_the_base_is_the_merged_model_and_costs_no_other(tmp_path, places):
    """On the policy's base under LoRA, on the reference where the policy trains whole."""
    whole = {"policy": lambda: Policy(places["base"])}
    light = {"policy": lambda: Policy(places["base"], lora=LoRA(r=2))}
    for policy in (whole, light):
        _, apart = rolled(tmp_path, **policy, dpo=lambda: Policy(places["merged"]))
        algorithm, worn = rolled(tmp_path, **policy, dpo_adapter=places["adapter"])
        assert torch.equal(worn.responses, apart.responses)
        assert torch.allclose(worn.dpo_logprobs, apart.dpo_logprobs, atol=1e-5)
        assert torch.equal(worn.ref_logprobs, apart.ref_logprobs)
        assert not torch.allclose(worn.dpo_logprobs, worn.ref_logprobs, atol=1e-2)
        assert torch.allclose(worn.advantages, apart.advantages, atol=1e-4)
        assert "dpo" not in algorithm._modules


def test_the_dpo_adapter_stays_frozen_and_the_policys_learns(tmp_path, places):
    settings = {"policy": lambda: Policy(places["base"], lora=LoRA(r=2))}
    algorithm, _ = rolled(tmp_path, 3, **settings, dpo_adapter=places["adapter"])
    named = dict(algorithm.policy.network.named_parameters())
    fresh = Policy(places["base"], lora=LoRA(r=2))
    fresh.adapters.load_frozen_adapter(places["adapter"], "dpo")
    frozen = dict(fresh.network.named_parameters())
    assert all(torch.equal(named[n], frozen[n]) for n in named if ".dpo." in n)
    assert not any(named[n].requires_grad for n in named if ".dpo." in n)
    learnt = [n for n in named if ".default." in n and "lora_B" in n]
    assert all(float(named[n].detach().abs().max()) > 0 for n in learnt)
    assert algorithm.policy.adapted.active_adapter == "default"


def test_the_dpo_models_own_reference_is_used(tmp_path, places):
    settings = {"policy": tiny, "dpo": lambda: Policy(places["merged"]), "kl_coef": 0.0}
    _, shared = rolled(tmp_path, **settings)
    other = lambda: Policy(places["merged"])  # noqa: E731
    _, own = rolled(tmp_path, **settings, dpo_reference=other)
    assert torch.equal(own.dpo_ref_logprobs, own.dpo_logprobs)  # so that no token is better
    _, off = rolled(tmp_path, policy=tiny, dpo_coef=0.0, kl_coef=0.0)
    assert torch.allclose(own.returns, off.returns, atol=1e-6)
    assert not torch.allclose(shared.returns, off.returns, atol=1e-3)


def test_without_a_dpo_reward_it_is_ppo(tmp_path):
    algorithm, _ = rolled(tmp_path, 2, policy=tiny, dpo_coef=0.0)
    torch.manual_seed(0)
    ppo = PPO(
        policy=tiny, critic=scalar, optimizer=sgd, kl_coef=0.01, loss_aggregation="sequence_mean"
    )
    trainer(tmp_path, limit_val_batches=0).fit(ppo, RandomPrompts(2))
    assert all(map(torch.equal, weights(algorithm.policy), weights(ppo.policy)))
    assert distance(weights(ppo.policy), weights(tiny())) > 0


def test_nothing_of_the_reward_carries_a_gradient(tmp_path, places):
    _, batch = rolled(tmp_path, policy=tiny, dpo=lambda: Policy(places["merged"]))
    for field in ("dpo_logprobs", "ref_logprobs", "advantages", "returns", "scores"):
        assert not getattr(batch, field).requires_grad


def test_every_part_is_logged(tmp_path, places):
    torch.manual_seed(0)
    algorithm = RTO(policy=tiny, dpo=lambda: Policy(places["merged"]), critic=scalar, dpo_clip=0.01)
    done = trainer(tmp_path, limit_val_batches=0)
    done.fit(algorithm, RandomPrompts(1))
    metrics = done.callback_metrics
    assert {
        "rto/dpo_reward",
        "kl/per_response_k1",
        "reward",
        "objective/rlhf_reward",
    } <= metrics.keys()
    assert 0 < float(metrics["rto/dpo_clipped"]) <= 1
    assert math.isfinite(float(metrics["rto/dpo_reward"]))


# Refused ----------------------------------------------------------------------------------------


def test_one_dpo_model_is_asked_for():
    for settings in ({}, {"dpo": tiny, "dpo_adapter": "somewhere"}):
        with pytest.raises(ValueError, match="rewards tokens by one DPO model: give dpo_adapter"):
            RTO(policy=tiny, **settings)
    with pytest.raises(ValueError, match="dpo_reference belongs to dpo"):
        RTO(policy=tiny, dpo_adapter="somewhere", dpo_reference=tiny)


def test_another_vocabulary_is_refused():
    other = lambda: Policy(config={**TINY, "vocab_size": 40})  # noqa: E731
    with pytest.raises(ValueError, match=r"The dpo .* knows 40 tokens and the policy .* 32"):
        RTO(policy=tiny, dpo=other).configure_model()


def test_an_adapter_of_another_base_is_refused(places):
    for policy in (tiny, lambda: Policy(places["merged"])):
        with pytest.raises(ValueError, match=r"was trained on .*base, and the base here is"):
            RTO(policy=policy, dpo_adapter=places["adapter"]).configure_model()


def test_an_adapter_that_judges_is_refused(places, tmp_path):
    """A critic's adapter on the policy's own base: its log-probs would mean nothing."""
    ScalarHead(places["base"], lora=LoRA(r=2)).save(tmp_path)
    with pytest.raises(ValueError, match=r"trained as a score head's .* and not as a language"):
        RTO(policy=lambda: Policy(places["base"]), dpo_adapter=str(tmp_path)).configure_model()


def test_a_folder_without_an_adapter_is_refused(places):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json"):
        RTO(policy=tiny, dpo_adapter=places["base"]).configure_model()
