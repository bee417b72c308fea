"""Rewards, returns and advantages agree with OpenRLHF, torchtune and the released code of RTO."""

import math

import pytest
import torch

from lit_align.functional.kl import k1
from lit_align.functional.masks import whiten
from lit_align.functional.returns import (
    dpo_token_rewards,
    gae,
    group_relative,
    leave_one_out,
    on_last_token,
    rewards_to_go,
)


@pytest.mark.parametrize(
    "name",
    ["gamma=1.0,lam=0.95", "gamma=0.99,lam=0.9", "gamma=1.0,lam=1.0", "gamma=0.9,lam=0.0"],
)
def test_gae_agrees_with_openrlhf_and_torchtune(assert_close, golden, name):
    gamma, lam = (float(part.split("=")[1]) for part in name.split(","))
    for source, prefix, key in (
        ("openrlhf_gae", "gae,", "advantages"),
        ("torchtune_gae", "", "raw_advantages"),
    ):
        file = golden(source)
        case = file.cases[prefix + name]
        advantages, returns = gae(file["token_rewards"], file["values"], file.mask, gamma, lam)
        assert_close(advantages, torch.where(file.mask, case[key], 0))
        assert_close(returns, torch.where(file.mask, case["returns"], 0))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_agree_with_openrlhf(assert_close, golden, gamma):
    file = golden("openrlhf_gae")
    expected = file.cases[f"cumulative_returns,gamma={gamma}"]
    assert_close(rewards_to_go(file["token_rewards"], file.mask, gamma), expected)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_rewards_agree_with_openrlhf_and_torchtune(assert_close, golden, kl_coef):
    file = golden("openrlhf_misc")
    kl = k1(file["old_logp"], file["ref_logp"])
    rewards = on_last_token(file["scores"], file.mask) - kl_coef * file["mask"] * kl
    assert_close(rewards, file.cases[f"compute_reward,kl_coef={kl_coef},kl=k1*mask"])

    file = golden("torchtune_rewards")
    kl = k1(file["old_logp"], file["ref_logp"])
    rewards = on_last_token(file["scores"], file.mask) - kl_coef * kl
    assert_close(rewards, file.cases[f"kl_coeff={kl_coef}"]["total_reward"])


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
@pytest.mark.parametrize(
    ("name", "advantages_of"),
    [
        ("group_norm", group_relative),
        ("dr_grpo", lambda scores: group_relative(scores, scale=False)),
        ("rloo", leave_one_out),
    ],
)
def test_group_advantages_agree_with_openrlhf(assert_close, golden, name, advantages_of, kl_coef):
    file = golden("openrlhf_advantages")
    case = file.cases[f"{name},gamma=1,lam=0.95,kl_coef={kl_coef}"]
    scores = advantages_of(file["scores"].view(-1, 3)).flatten()
    kl = kl_coef * k1(file["old_logp"], file["ref_logp"])
    advantages = rewards_to_go(on_last_token(scores, file.mask) - kl, file.mask)
    assert_close(advantages, torch.where(file.mask, case["advantages"], 0))


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
@pytest.mark.parametrize("name", ["gae", "reinforce", "reinforce_baseline"])
def test_whitened_advantages_agree_with_openrlhf(assert_close, golden, name, kl_coef):
    """OpenRLHF divides by n, which is the biased variance, and `whiten` by n - 1."""
    file = golden("openrlhf_advantages")
    case = file.cases[f"{name},gamma=1,lam=0.95,kl_coef={kl_coef}"]
    scores = file["scores"]
    if name == "reinforce_baseline":
        scores = group_relative(scores.view(-1, 3), scale=False).flatten()
    kl = kl_coef * k1(file["old_logp"], file["ref_logp"])
    rewards = on_last_token(scores, file.mask) - kl
    advantages = returns = rewards_to_go(rewards, file.mask)
    if name == "gae":
        advantages, returns = gae(rewards, file["values"], file.mask)
    count = file["mask"].sum().item()
    biased = whiten(advantages, file.mask) * math.sqrt(count / (count - 1))
    assert_close(biased, torch.where(file.mask, case["advantages"], 0))
    assert_close(returns, torch.where(file.mask, case["returns"], 0))


@pytest.mark.parametrize("kl_coef", [0.0, 0.01])
@pytest.mark.parametrize(("coef", "clip"), [(1.0, None), (0.05, 0.05), (0.05, None), (1.0, 0.3)])
def test_dpo_rewards_agree_with_the_released_code_of_rto(assert_close, golden, coef, clip, kl_coef):
    file = golden("rto_rewards")
    case = file.cases[f"scale={coef},clip={clip or 0.0},kl_coef={kl_coef}"]
    dense = dpo_token_rewards(file["dpo_logp"], file["ref_logp"], file.mask, coef, clip)
    assert_close(dense, case["token_reward"])
    kl = torch.where(file.mask, k1(file["old_logp"], file["ref_logp"]), 0)
    rewards = dense - kl_coef * kl + on_last_token(file["scores"].clamp(-10, 10), file.mask)
    assert_close(rewards, case["reward"])
    advantages, returns = gae(rewards, file["values"], file.mask, 1.0, 0.95)
    assert_close(advantages, case["advantages(gamma=1,lam=0.95)"])
    assert_close(returns, case["returns"])


def test_clipped_scores_agree_with_rto_and_openrlhf(assert_close, golden):
    file = golden("rto_rewards")
    case = file.cases["no token reward,big_scores,kl_coef=0.01"]
    kl = torch.where(file.mask, k1(file["old_logp"], file["ref_logp"]), 0)
    rewards = on_last_token(file["big_scores"].clamp(-10, 10), file.mask) - 0.01 * kl
    assert_close(rewards, case["reward"])

    file = golden("openrlhf_misc")
    kl = torch.where(file.mask, k1(file["old_logp"], file["ref_logp"]), 0)
    rewards = on_last_token(file["scores"].clamp(-0.5, 0.5), file.mask) - 0.05 * kl
    assert_close(rewards, file.cases["compute_reward,kl_coef=0.05,clip=(-0.5,0.5)"])


def test_centered_advantages_agree_with_openrlhf(assert_close, golden):
    file = golden("openrlhf_advantages")
    case = file.cases["gae,gamma=0.99,lam=0.9,kl_coef=0.05,no_std_norm"]
    kl = 0.05 * k1(file["old_logp"], file["ref_logp"])
    rewards = on_last_token(file["scores"], file.mask) - kl
    advantages, returns = gae(rewards, file["values"], file.mask, 0.99, 0.9)
    # no_std_norm of OpenRLHF subtracts the mean and does not divide
    centered = advantages - advantages[file.mask].mean()
    assert_close(torch.where(file.mask, centered, 0), torch.where(file.mask, case["advantages"], 0))
    assert_close(returns, torch.where(file.mask, case["returns"], 0))
