"""RTO: token rewards from a DPO model, its reference, and the optimum they lead to."""

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
from lit_align.errors import UserError
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


# Worked examples of arXiv:2404.18922 eq. 4.7 -----------------------------------------------------


def test_a_dpo_coefficient_of_0_leaves_the_kl_penalty():
    """The released code would apply the raw log-ratio."""
    off = RTO(policy=tiny, dpo_coef=0.0)
    assert off.token_rewards(rollout(0.0)).tolist() == [pytest.approx([-0.002, 0, 0.01, -0.005, 0])]


@pytest.mark.parametrize(("score", "last"), [(1.2, 1.225), (25.0, 10.025)])
def test_token_rewards_sum_dpo_reward_kl_penalty_and_score(score, last):
    algorithm = rto(dpo_clip=0.05, score_clip=10.0)
    rewards = algorithm.token_rewards(rollout(score))
    assert rewards.tolist() == [pytest.approx([0.013, -0.03, -0.04, last, 0], abs=1e-7)]


@pytest.mark.parametrize("padding_value", [0.0, 9.0])
def test_advantages_do_not_depend_on_the_value_of_padding(padding_value):
    rewards = rto(dpo_clip=0.05).token_rewards(rollout(1.2))
    values = torch.tensor([[0.5, 0.4, 0.3, 0.6, padding_value]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, MASK, 1.0, 0.95)
    expected = [0.560009375, 0.6810625, 0.85375, 0.625, 0]
    assert advantages.tolist() == [pytest.approx(expected, abs=1e-7)]
    expected = [1.060009375, 1.0810625, 1.15375, 1.225, 0]
    assert returns.tolist() == [pytest.approx(expected, abs=1e-7)]


def policy_at_optimum(
    start: Tensor, other: Tensor, scores: Tensor, coefs: tuple[float, ...]
) -> Tensor:
    """Return the policy [9] after gradient ascent on the expected token rewards of RTO.

    Args:
        start: [4, 3] logits of the reference: of the first token, and of the second after each.
        other: [4, 3] logits of the DPO model.
        scores: [9] scores of the responses.
        coefs: Coefficients of the DPO reward, the KL penalty and the score.
    """
    policy, reference, mask = Table(start), Table(start), torch.ones(9, 2, dtype=torch.bool)
    dense, kl, score = coefs
    algorithm = rto(dpo_coef=dense, kl_coef=kl, score_coef=score)
    batch = Experience(
        scores=scores,
        ref_logprobs=reference.token_logprobs.detach(),
        dpo_logprobs=Table(other).token_logprobs.detach(),
        response_mask=mask,
        truncated=[False] * 9,
    )
    for _ in range(600):
        batch.logprobs = policy.token_logprobs.detach()
        rewards = algorithm.token_rewards(batch)
        advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
        gain = (
            policy.response_logprobs.detach().exp() * (policy.token_logprobs * advantages).sum(-1)
        ).sum() / kl
        (uphill,) = torch.autograd.grad(gain, policy.logits)
        policy.logits.data += 4 * uphill
    return policy.response_logprobs.detach().exp()


def one_token(probs: list[float]) -> Tensor:
    """Return logits [4, 3]: these probabilities for the first token, equal ones for the second."""
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
def test_the_optimum_of_responses_of_one_token(coefs, expected):
    scores = torch.tensor([0.0, 0.01, 0.02], dtype=torch.float64).repeat_interleave(3)
    reference, other = one_token([0.5, 0.3, 0.2]), one_token([0.55, 0.35, 0.10])
    found = policy_at_optimum(reference, other, scores, coefs)
    assert found.view(3, 3).sum(-1).tolist() == pytest.approx(expected, abs=1e-6)
    assert (found.view(3, 3).std(-1) < 1e-6).all()


@pytest.mark.parametrize("coefs", [(0.05, 0.05, 0.0), (0.1, 0.05, 0.02)])
def test_the_optimum_of_responses_of_two_tokens(coefs):
    """It is pi_ref (pi_dpo / pi_ref)^(beta1 / beta2) exp(beta3 score / beta2), or pi_dpo."""
    reference, other = REFERENCE_TABLE, REFERENCE_TABLE.flip(1) * 1.5
    dense, kl, score = coefs
    logits = (1 - dense / kl) * Table(reference).response_logprobs + dense / kl * Table(
        other
    ).response_logprobs
    expected = (logits + score / kl * RESPONSE_SCORES).softmax(-1).detach()
    if coefs == (0.05, 0.05, 0.0):
        torch.testing.assert_close(expected, Table(other).response_logprobs.exp().detach())
    found = policy_at_optimum(reference, other, RESPONSE_SCORES, coefs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_truncated_response_keeps_its_last_token():
    responses = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [9, 0, 0, 0]])
    mask = through_first(responses, [9])
    assert mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert responses[0, -1] == 8


# The algorithm ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Paths of a base model, of a random adapter on it, and of both merged."""
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


class RecordingRTO(RTO):
    """RTO that keeps the last prepared batch."""

    def prepare(self, batch):
        self.batch = super().prepare(batch)
        return self.batch


def run_rto(folder, num_batches=1, **settings) -> tuple[RecordingRTO, Experience]:
    """Train on random prompts; return the algorithm and the last prepared batch."""
    torch.manual_seed(0)
    algorithm = RecordingRTO(critic=scalar, optimizer=sgd, **settings)
    trainer(folder, limit_val_batches=0).fit(algorithm, RandomPrompts(num_batches))
    return algorithm, algorithm.batch


def test_an_adapter_equals_the_merged_model_without_another_network(tmp_path, folders):
    """The adapter is on the policy's base with LoRA, else on the reference."""
    full = {"policy": lambda: Policy(folders["base"])}
    lora = {"policy": lambda: Policy(folders["base"], lora=LoRA(r=2))}
    for policy in (full, lora):
        _, merged = run_rto(tmp_path, **policy, dpo=lambda: Policy(folders["merged"]))
        algorithm, adapted = run_rto(tmp_path, **policy, dpo_adapter=folders["adapter"])
        assert torch.equal(adapted.responses, merged.responses)
        assert torch.allclose(adapted.dpo_logprobs, merged.dpo_logprobs, atol=1e-5)
        assert torch.equal(adapted.ref_logprobs, merged.ref_logprobs)
        assert not torch.allclose(adapted.dpo_logprobs, adapted.ref_logprobs, atol=1e-2)
        assert torch.allclose(adapted.advantages, merged.advantages, atol=1e-4)
        assert "dpo" not in algorithm._modules


def test_the_dpo_adapter_is_frozen_and_the_policys_adapter_trains(tmp_path, folders):
    settings = {"policy": lambda: Policy(folders["base"], lora=LoRA(r=2))}
    algorithm, _ = run_rto(tmp_path, 3, **settings, dpo_adapter=folders["adapter"])
    named = dict(algorithm.policy.network.named_parameters())
    fresh = Policy(folders["base"], lora=LoRA(r=2))
    fresh.adapters.load_frozen_adapter(folders["adapter"], "dpo")
    frozen = dict(fresh.network.named_parameters())
    assert all(torch.equal(named[n], frozen[n]) for n in named if ".dpo." in n)
    assert not any(named[n].requires_grad for n in named if ".dpo." in n)
    trained = [n for n in named if ".default." in n and "lora_B" in n]
    assert all(float(named[n].detach().abs().max()) > 0 for n in trained)
    assert algorithm.policy.adapted.active_adapter == "default"


def test_the_separate_reference_of_the_dpo_model_is_used(tmp_path, folders):
    settings = {"policy": tiny, "dpo": lambda: Policy(folders["merged"]), "kl_coef": 0.0}
    _, shared = run_rto(tmp_path, **settings)
    other = lambda: Policy(folders["merged"])  # noqa: E731
    _, own = run_rto(tmp_path, **settings, dpo_reference=other)
    assert torch.equal(own.dpo_ref_logprobs, own.dpo_logprobs)  # all DPO rewards are 0
    _, off = run_rto(tmp_path, policy=tiny, dpo_coef=0.0, kl_coef=0.0)
    assert torch.allclose(own.returns, off.returns, atol=1e-6)
    assert not torch.allclose(shared.returns, off.returns, atol=1e-3)


def test_without_a_dpo_reward_rto_equals_ppo(tmp_path):
    algorithm, _ = run_rto(tmp_path, 2, policy=tiny, dpo_coef=0.0)
    torch.manual_seed(0)
    ppo = PPO(
        policy=tiny, critic=scalar, optimizer=sgd, kl_coef=0.01, loss_aggregation="sequence_mean"
    )
    trainer(tmp_path, limit_val_batches=0).fit(ppo, RandomPrompts(2))
    assert all(map(torch.equal, weights(algorithm.policy), weights(ppo.policy)))
    assert distance(weights(ppo.policy), weights(tiny())) > 0


def test_rewards_have_no_gradient(tmp_path, folders):
    _, batch = run_rto(tmp_path, policy=tiny, dpo=lambda: Policy(folders["merged"]))
    for field in ("dpo_logprobs", "ref_logprobs", "advantages", "returns", "scores"):
        assert not getattr(batch, field).requires_grad


def test_all_parts_of_the_reward_are_logged(tmp_path, folders):
    torch.manual_seed(0)
    algorithm = RTO(
        policy=tiny, dpo=lambda: Policy(folders["merged"]), critic=scalar, dpo_clip=0.01
    )
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


# Refused settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "found"), [({}, "none"), ({"dpo": tiny, "dpo_adapter": "somewhere"}, "two")]
)
def test_zero_or_two_dpo_models_are_refused(settings, found):
    with pytest.raises(UserError, match=f"needs exactly one DPO model, found {found}. Set"):
        RTO(policy=tiny, **settings)


def test_a_dpo_clip_that_is_not_positive_is_refused():
    """`dpo_token_rewards` would raise a ValueError in the first step."""
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match=rf"dpo_clip must be above 0, found {clip}\. Set --mod"):
            RTO(policy=tiny, dpo=tiny, dpo_clip=clip)


def test_a_reference_of_a_dpo_adapter_is_refused():
    with pytest.raises(UserError, match=r"dpo_reference needs dpo: .* Remove --model.dpo_ref"):
        RTO(policy=tiny, dpo_adapter="somewhere", dpo_reference=tiny)


def test_another_vocabulary_is_refused():
    other = lambda: Policy(config={**TINY, "vocab_size": 40})  # noqa: E731
    with pytest.raises(UserError, match=r"The dpo .* has 40 tokens .* the policy .* has 32"):
        RTO(policy=tiny, dpo=other).configure_model()


def test_an_adapter_of_another_base_is_refused(folders):
    for policy in (tiny, lambda: Policy(folders["merged"])):
        with pytest.raises(UserError, match=r"was trained on .*base, and the base here is"):
            RTO(policy=policy, dpo_adapter=folders["adapter"]).configure_model()


def test_an_adapter_of_a_critic_is_refused(folders, tmp_path):
    """It was trained on the policy's base, but not as a language model."""
    ScalarHead(folders["base"], lora=LoRA(r=2)).save(tmp_path)
    with pytest.raises(UserError, match=r"trained with a score head .*, not as a language"):
        RTO(policy=lambda: Policy(folders["base"]), dpo_adapter=str(tmp_path)).configure_model()


def test_a_folder_without_an_adapter_is_refused(folders):
    with pytest.raises(UserError, match=r"no adapter_config.json"):
        RTO(policy=tiny, dpo_adapter=folders["base"]).configure_model()
