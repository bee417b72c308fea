"""PPO: token rewards, values of the critic, adapted state and updates of both networks."""

import json
import math

import pytest
import torch
from tiny_models import SHARED, TINY, RandomPrompts, distance, scalar, tiny, trainer, weights
from torch.optim import SGD

from lit_align.algorithms.core.online import OnlineAlgorithm
from lit_align.algorithms.core.running_statistics import KLController, RunningMeanStd
from lit_align.algorithms.ppo import PPO
from lit_align.batches import Experience
from lit_align.errors import UserError
from lit_align.functional.kl import k3
from lit_align.functional.returns import gae
from lit_align.models.adapters.lora import LoRA
from lit_align.models.scalar_head import ScalarHead


def sgd(params):
    return SGD(params, lr=0.1)


def rollout(**fields) -> Experience:
    """Return two responses of 3 and 2 tokens, the second one truncated."""
    default = {
        "responses": torch.tensor([[7, 8, 2], [9, 9, 0]]),
        "response_mask": torch.tensor([[True, True, True], [True, True, False]]),
        "scores": torch.tensor([1.0, 4.0]),
        "logprobs": torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-2.0, -2.0, -2.0], [-1.0, -3.0, 0.0]]),
    }
    return Experience(**{**default, **fields}, truncated=[False, True])


def test_a_token_gets_minus_its_kl_penalty_and_the_last_one_the_score():
    rewards = PPO(policy=tiny, kl_coef=0.5).token_rewards(rollout())
    assert rewards.tolist() == [[-0.5, 0.0, 1.5], [0.0, 3.0, 0.0]]


def test_with_kl_in_loss_the_penalty_is_not_in_the_reward():
    algorithm = PPO(policy=tiny, kl_coef=0.5, kl_in_loss=True)
    assert algorithm.token_rewards(rollout()).tolist() == [[0, 0, 1], [0, 4, 0]]
    batch = rollout(advantages=torch.zeros(2, 3))
    loss = algorithm.policy_loss(batch, batch.logprobs, torch.zeros(2, 3))
    assert torch.equal(loss, 0.5 * k3(batch.logprobs, batch.ref_logprobs))


def test_a_score_is_clipped_before_the_missing_eos_penalty():
    algorithm = PPO(policy=tiny, kl_coef=0.0, score_clip=2.0, missing_eos_penalty=1.5)
    assert algorithm.token_rewards(rollout()).tolist() == [[0, 0, 1], [0, 0.5, 0]]


def test_sequence_mean_averages_over_the_tokens_of_a_response():
    algorithm = PPO(policy=tiny, loss_aggregation="sequence_mean")
    batch = rollout(advantages=-torch.ones(2, 3))
    loss = algorithm.policy_loss(batch, batch.logprobs, torch.zeros(2, 3))
    assert loss.tolist() == [pytest.approx([1 / 3] * 3), [0.5] * 3]
    assert int(algorithm.loss_denominator(batch)) == 2
    assert int(PPO(policy=tiny).loss_denominator(batch)) == 5


def test_the_kl_controller_changes_by_at_most_20_percent_per_horizon():
    controller = KLController(0.1, target=4.0, horizon=100)
    controller.update(torch.tensor(4.4), torch.tensor(10.0))  # error 0.1
    assert float(controller.coef) == pytest.approx(0.1 * 1.01)
    controller.update(torch.tensor(400.0), torch.tensor(10.0))  # error clipped to 0.2
    assert float(controller.coef) == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(torch.tensor(0.0), torch.tensor(100.0))  # clipped to -0.2, a whole horizon
    assert float(controller.coef) == pytest.approx(0.1 * 1.01 * 1.02 * 0.8)


def test_the_kl_controller_equals_that_of_openrlhf():
    """The rows of the golden file are KL, number of responses, and coefficient afterwards."""
    file = SHARED / "golden" / "openrlhf_misc.json"
    if not file.is_file():
        pytest.skip("the reference data folder is not here")
    name = "adaptive_kl(init=0.2,target=6,horizon=10000)[kl,n_steps,value_after]"
    controller = KLController(0.2, target=6.0, horizon=10_000)
    for kl, number, value in json.loads(file.read_text())["cases"][name]:
        controller.update(torch.tensor(kl), torch.tensor(float(number)))
        assert float(controller.coef) == pytest.approx(value, rel=2e-6)


def test_a_rollout_larger_than_the_horizon_counts_as_one_horizon():
    controller = KLController(0.1, target=4.0, horizon=10)
    controller.update(torch.tensor(0.0), torch.tensor(1000.0))
    assert float(controller.coef) == pytest.approx(0.08)


def test_a_constant_coefficient_is_not_saved():
    controller = KLController(0.1)
    controller.update(torch.tensor(100.0), torch.tensor(10.0))
    assert float(controller.coef) == pytest.approx(0.1)
    assert not controller.state_dict()
    assert "coef" in KLController(0.1, target=4.0).state_dict()


def test_the_running_scale_equals_that_of_all_scores_at_once():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator) * 3 + 5 for n in (4, 1, 7)]
    scale, scores = RunningMeanStd(), torch.cat(parts)
    for part in parts:
        number = torch.tensor(float(len(part)))
        variance = part.var() if len(part) > 1 else torch.tensor(0.0)
        scale.update_from_moments(number, part.mean(), variance)
    expected = (scores - scores.mean()) / scores.std()
    assert torch.allclose(scale.normalize(scores), expected, atol=1e-5)


def test_running_state_stays_in_float64():
    controller = KLController(0.1, target=1.0, horizon=1000).to(torch.bfloat16)
    before = float(controller.coef)
    controller.update(torch.tensor(1.1), torch.tensor(10.0))
    assert controller.coef.dtype == torch.float64
    assert float(controller.coef) == pytest.approx(before * 1.001, rel=1e-6)


def test_the_critic_values_the_state_before_each_token(tiny_policy, prompts):
    critic = ScalarHead.from_backbone(tiny_policy)
    generator = torch.Generator().manual_seed(3)
    prompts.responses = torch.randint(3, 32, (4, 4), generator=generator)
    prompts.response_lengths = [4, 4, 2, 1]
    prompts.response_mask = torch.arange(4) < torch.tensor([4, 4, 2, 1]).unsqueeze(1)
    values = critic.state_values(prompts)
    all_values = critic.values(prompts)
    assert values.shape == (4, 4)
    assert torch.equal(values[0], all_values[0, 4:8])  # from the last of 5 prompt tokens on
    assert values[3].tolist()[1:] == [0.0, 0.0, 0.0]
    backbone, other = tiny_policy.network.base_model, critic.network.base_model
    assert all(map(torch.equal, backbone.state_dict().values(), other.state_dict().values()))


def test_a_critic_starts_with_the_weights_of_its_reward_model(tmp_path, prompts):
    reward_model = scalar()
    reward_model.save(tmp_path)
    algorithm = PPO(policy=tiny, critic=lambda: ScalarHead(str(tmp_path)))
    algorithm.configure_model()
    ours, saved = weights(algorithm.critic), weights(reward_model)
    assert all(map(torch.equal, ours, saved))


def test_a_critic_with_another_vocabulary_is_refused():
    algorithm = PPO(policy=tiny, critic=lambda: ScalarHead(config={**TINY, "vocab_size": 40}))
    with pytest.raises(UserError, match=r"critic .* has 40 tokens .* the policy .* has 32"):
        algorithm.configure_model()


def test_an_adapted_policy_needs_a_separate_critic():
    algorithm = PPO(policy=lambda: tiny(lora=LoRA(r=2)))
    with pytest.raises(UserError, match=r"has an adapter.*Set --model.critic.path or"):
        algorithm.configure_model()


def test_only_the_critic_trains_during_its_warmup(run):
    algorithm = PPO(policy=tiny, critic=scalar, critic_warmup_iterations=3, optimizer=sgd)
    run(algorithm, num_batches=3)
    assert all(map(torch.equal, weights(algorithm.policy), weights(tiny())))
    assert distance(weights(algorithm.critic), weights(scalar())) > 1e-3
    algorithm = PPO(policy=tiny, critic=scalar, critic_warmup_iterations=2, optimizer=sgd)
    run(algorithm, num_batches=3)
    assert distance(weights(algorithm.policy), weights(tiny())) > 1e-5


def test_the_critic_has_its_own_learning_rate(run):
    rates = {}

    class RecordingRates(PPO):
        def end_iteration(self, metrics):
            super().end_iteration(metrics)
            rates.update({group["role"]: group["lr"] for group in self.optimizers().param_groups})

    run(RecordingRates(policy=tiny, critic_lr=0.5, optimizer=sgd), num_batches=1)
    assert rates == {"policy": 0.1, "critic": 0.5}


def test_each_role_is_clipped_separately(run):
    one = PPO(policy=tiny, critic=scalar, optimizer=sgd, max_grad_norm=1e-3)
    done = run(one, num_batches=1)
    norms = {k: float(v) for k, v in done.callback_metrics.items() if k.startswith("grad_norm")}
    assert norms.keys() == {"grad_norm/policy", "grad_norm/critic"}
    for role, start in (("policy", tiny()), ("critic", scalar())):
        moved = zip(weights(one.roles[role]), weights(start), strict=True)
        length = math.sqrt(sum(float((a - b).square().sum()) for a, b in moved))
        assert norms[f"grad_norm/{role}"] > 1e-3
        assert length == pytest.approx(0.1 * 1e-3, rel=1e-2)


class RecordingPPO(PPO):
    """PPO that keeps the last prepared batch."""

    def prepare(self, batch):
        self.batch = super().prepare(batch)
        return self.batch


def test_a_single_update_is_the_policy_gradient(tmp_path):
    """At ratio 1 the gradient of the surrogate is that of REINFORCE, arXiv:1707.06347 section 3."""
    torch.manual_seed(0)
    algorithm = RecordingPPO(policy=tiny, critic=scalar, optimizer=sgd, max_grad_norm=1e9)
    trainer(tmp_path, limit_val_batches=0).fit(algorithm, RandomPrompts(1))
    batch, policy = algorithm.batch, tiny()
    mask = batch.response_mask
    gain = (policy.logprobs(batch) * batch.advantages).where(mask, 0.0).sum() / mask.sum()
    gain.backward()
    for moved, start in zip(algorithm.policy.parameters(), policy.parameters(), strict=True):
        assert torch.allclose(moved, start + 0.1 * start.grad, atol=1e-7)


def test_advantages_are_whitened_gae(tmp_path):
    torch.manual_seed(0)
    algorithm = RecordingPPO(policy=tiny, critic=scalar, gae_lambda=0.9, gamma=0.99, optimizer=sgd)
    trainer(tmp_path, limit_val_batches=0).fit(algorithm, RandomPrompts(1))
    batch, mask = algorithm.batch, algorithm.batch.response_mask
    rewards = algorithm.token_rewards(batch)
    unwhitened, returns = gae(rewards, batch.values, mask, 0.99, 0.9)
    assert torch.equal(batch.returns, returns)
    expected = (unwhitened - unwhitened[mask].mean()) / unwhitened[mask].std()
    assert torch.allclose(batch.advantages[mask], expected[mask], atol=1e-5)
    assert batch.values.requires_grad is False


def test_the_adapted_coefficient_and_scale_are_saved(run):
    settings = {"kl_target": 0.01, "kl_horizon": 10, "normalize_scores": True}
    algorithm = PPO(policy=tiny, critic=scalar, optimizer=sgd, **settings)
    run(algorithm, num_batches=3)
    state = algorithm.state_dict()
    assert float(state["kl.coef"]) != pytest.approx(0.02, rel=1e-3)
    assert float(state["scale.moments"][0]) == 3 * 4


def test_an_empty_response_gives_no_nan(tmp_path):
    """A skipped reward empties the mask of a row. The other responses are truncated."""

    class EmptyResponse(RecordingPPO):
        def prepare(self, batch):
            batch.response_mask[0] = False
            return super().prepare(batch)

    for loss_aggregation in ("sequence_mean", "token_mean"):
        algorithm = EmptyResponse(
            policy=tiny, critic=scalar, optimizer=sgd, loss_aggregation=loss_aggregation
        )
        done = trainer(tmp_path, limit_val_batches=0)
        done.fit(algorithm, RandomPrompts(1))
        assert all(math.isfinite(float(value)) for value in done.callback_metrics.values())
        assert all(weight.isfinite().all() for weight in weights(algorithm.policy))


def test_metrics_have_the_names_of_trls_ppo(run):
    metrics = run(PPO(policy=tiny, critic=scalar, optimizer=sgd, update_epochs=2)).callback_metrics
    names = """kl/per_response_k1 objective/non_score_reward objective/rlhf_reward
        objective/scores policy/approxkl_avg policy/clipfrac_avg entropy/update
        loss/policy_avg loss/value_avg value/clipfrac policy/ratio_mean objective/kl_coef reward"""
    assert set(names.split()) <= metrics.keys()


def test_reference_critic_and_policy_share_no_weights():
    algorithm = PPO(policy=tiny)
    algorithm.configure_model()
    assert isinstance(algorithm, OnlineAlgorithm)
    assert not any(weight.requires_grad for weight in algorithm.reference.parameters())
    policy, critic = ({id(w) for w in role.parameters()} for role in algorithm.roles.values())
    assert not policy & critic
