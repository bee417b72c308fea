"""PPO: what a token is rewarded with, what the critic sees, and who is updated when."""

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
from lit_align.functional.kl import k3
from lit_align.functional.returns import gae
from lit_align.models.adapters.lora import LoRA
from lit_align.models.scalar_head import ScalarHead


def sgd(params):
    return SGD(params, lr=0.1)


def rollout(**fields) -> Experience:
    """Two responses of 3 and 2 tokens; the second was cut."""
    given = {
        "responses": torch.tensor([[7, 8, 2], [9, 9, 0]]),
        "response_mask": torch.tensor([[True, True, True], [True, True, False]]),
        "scores": torch.tensor([1.0, 4.0]),
        "logprobs": torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-2.0, -2.0, -2.0], [-1.0, -3.0, 0.0]]),
    }
    return Experience(**{**given, **fields}, truncated=[False, True])


def test_a_token_pays_for_its_kl_and_the_last_one_earns_the_score():
    rewards = PPO(policy=tiny, kl_coef=0.5).token_rewards(rollout())
    assert rewards.tolist() == [[-0.5, 0.0, 1.5], [0.0, 3.0, 0.0]]


def test_kl_in_the_loss_is_not_in_the_reward():
    algorithm = PPO(policy=tiny, kl_coef=0.5, kl_in_loss=True)
    assert algorithm.token_rewards(rollout()).tolist() == [[0, 0, 1], [0, 4, 0]]
    batch = rollout(advantages=torch.zeros(2, 3))
    loss = algorithm.policy_loss(batch, batch.logprobs, torch.zeros(2, 3))
    assert torch.equal(loss, 0.5 * k3(batch.logprobs, batch.ref_logprobs))


def test_a_score_is_clipped_and_then_charged_for_its_missing_end():
    algorithm = PPO(policy=tiny, kl_coef=0.0, score_clip=2.0, missing_eos_penalty=1.5)
    assert algorithm.token_rewards(rollout()).tolist() == [[0, 0, 1], [0, 0.5, 0]]


def test_sequence_means_sum_to_one_mean_per_response():
    algorithm = PPO(policy=tiny, loss_aggregation="sequence_mean")
    batch = rollout(advantages=-torch.ones(2, 3))
    loss = algorithm.policy_loss(batch, batch.logprobs, torch.zeros(2, 3))
    assert loss.tolist() == [pytest.approx([1 / 3] * 3), [0.5] * 3]
    assert int(algorithm.loss_denominator(batch)) == 2
    assert int(PPO(policy=tiny).loss_denominator(batch)) == 5


def test_the_controller_moves_a_fifth_of_its_share_at_most():
    controller = KLController(0.1, target=4.0, horizon=100)
    controller.update(torch.tensor(4.4), torch.tensor(10.0))  # error 0.1
    assert float(controller.coef) == pytest.approx(0.1 * 1.01)
    controller.update(torch.tensor(400.0), torch.tensor(10.0))  # error clipped to 0.2
    assert float(controller.coef) == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(torch.tensor(0.0), torch.tensor(100.0))  # clipped to -0.2, a whole horizon
    assert float(controller.coef) == pytest.approx(0.1 * 1.01 * 1.02 * 0.8)


def test_the_controller_agrees_with_openrlhf():
    """Initial 0.2, target 6, horizon 10,000; rows of KL, responses and the value after."""
    file = SHARED / "golden" / "openrlhf_misc.json"
    if not file.is_file():
        pytest.skip("the golden files do not lie beside the project")
    name = "adaptive_kl(init=0.2,target=6,horizon=10000)[kl,n_steps,value_after]"
    controller = KLController(0.2, target=6.0, horizon=10_000)
    for kl, number, value in json.loads(file.read_text())["cases"][name]:
        controller.update(torch.tensor(kl), torch.tensor(float(number)))
        assert float(controller.coef) == pytest.approx(value, rel=2e-6)


def test_a_rollout_beyond_the_horizon_counts_as_one():
    controller = KLController(0.1, target=4.0, horizon=10)
    controller.update(torch.tensor(0.0), torch.tensor(1000.0))
    assert float(controller.coef) == pytest.approx(0.08)


def test_a_fixed_coefficient_stays_and_is_no_state():
    controller = KLController(0.1)
    controller.update(torch.tensor(100.0), torch.tensor(10.0))
    assert float(controller.coef) == pytest.approx(0.1)
    assert not controller.state_dict()
    assert "coef" in KLController(0.1, target=4.0).state_dict()


def test_the_running_scale_is_that_of_all_scores_together():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator) * 3 + 5 for n in (4, 1, 7)]
    scale, whole = RunningMeanStd(), torch.cat(parts)
    for part in parts:
        number = torch.tensor(float(len(part)))
        variance = part.var() if len(part) > 1 else torch.tensor(0.0)
        scale.update_from_moments(number, part.mean(), variance)
    assert torch.allclose(scale.normalize(whole), (whole - whole.mean()) / whole.std(), atol=1e-5)


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
    whole = critic.values(prompts)
    assert values.shape == (4, 4)
    assert torch.equal(values[0], whole[0, 4:8])  # behind the prompt's 5 columns, one early
    assert values[3].tolist()[1:] == [0.0, 0.0, 0.0]
    trunk, other = tiny_policy.network.base_model, critic.network.base_model
    assert all(map(torch.equal, trunk.state_dict().values(), other.state_dict().values()))


def test_a_critic_starts_as_the_reward_model_that_it_is_given(tmp_path, prompts):
    reward_model = scalar()
    reward_model.save(tmp_path)
    algorithm = PPO(policy=tiny, critic=lambda: ScalarHead(str(tmp_path)))
    algorithm.configure_model()
    ours, saved = weights(algorithm.critic), weights(reward_model)
    assert all(map(torch.equal, ours, saved))


def test_a_critic_of_other_tokens_is_refused():
    algorithm = PPO(policy=tiny, critic=lambda: ScalarHead(config={**TINY, "vocab_size": 40}))
    with pytest.raises(ValueError, match=r"critic .* knows 40 tokens and the policy .* 32"):
        algorithm.configure_model()


def test_an_adapted_policy_lends_no_trunk():
    algorithm = PPO(policy=lambda: tiny(lora=LoRA(r=2)))
    with pytest.raises(ValueError, match=r"has an adapter.*give the critic a path or config"):
        algorithm.configure_model()


def test_only_the_critic_learns_while_it_warms_up(run):
    algorithm = PPO(policy=tiny, critic=scalar, critic_warmup_iterations=3, optimizer=sgd)
    run(algorithm, num_batches=3)
    assert all(map(torch.equal, weights(algorithm.policy), weights(tiny())))
    assert distance(weights(algorithm.critic), weights(scalar())) > 1e-3
    algorithm = PPO(policy=tiny, critic=scalar, critic_warmup_iterations=2, optimizer=sgd)
    run(algorithm, num_batches=3)
    assert distance(weights(algorithm.policy), weights(tiny())) > 1e-5


def test_the_critic_has_a_learning_rate_of_its_own(run):
    rates = {}

    class Watching(PPO):
        def end_iteration(self, metrics):
            super().end_iteration(metrics)
            rates.update({group["role"]: group["lr"] for group in self.optimizers().param_groups})

    run(Watching(policy=tiny, critic_lr=0.5, optimizer=sgd), num_batches=1)
    assert rates == {"policy": 0.1, "critic": 0.5}


def test_each_role_is_clipped_by_itself(run):
    one = PPO(policy=tiny, critic=scalar, optimizer=sgd, max_grad_norm=1e-3)
    done = run(one, num_batches=1)
    norms = {k: float(v) for k, v in done.callback_metrics.items() if k.startswith("grad_norm")}
    assert norms.keys() == {"grad_norm/policy", "grad_norm/critic"}
    for role, start in (("policy", tiny()), ("critic", scalar())):
        moved = zip(weights(one.roles[role]), weights(start), strict=True)
        length = math.sqrt(sum(float((a - b).square().sum()) for a, b in moved))
        assert norms[f"grad_norm/{role}"] > 1e-3
        assert length == pytest.approx(0.1 * 1e-3, rel=1e-2)


class Kept(PPO):
    """Keeps what the update learnt from."""

    def prepare(self, batch):
        self.kept = super().prepare(batch)
        return self.kept


def test_one_epoch_on_the_whole_rollout_is_the_policy_gradient(tmp_path):
    """arXiv:1707.06347 section 3: where ratio = 1 the surrogate's gradient is REINFORCE's."""
    torch.manual_seed(0)
    algorithm = Kept(policy=tiny, critic=scalar, optimizer=sgd, max_grad_norm=1e9)
    trainer(tmp_path, limit_val_batches=0).fit(algorithm, RandomPrompts(1))
    batch, policy = algorithm.kept, tiny()
    mask = batch.response_mask
    gain = (policy.logprobs(batch) * batch.advantages).where(mask, 0.0).sum() / mask.sum()
    gain.backward()
    for moved, start in zip(algorithm.policy.parameters(), policy.parameters(), strict=True):
        assert torch.allclose(moved, start + 0.1 * start.grad, atol=1e-7)


def test_advantages_are_gaes_and_white(tmp_path):
    torch.manual_seed(0)
    algorithm = Kept(policy=tiny, critic=scalar, gae_lambda=0.9, gamma=0.99, optimizer=sgd)
    trainer(tmp_path, limit_val_batches=0).fit(algorithm, RandomPrompts(1))
    batch, mask = algorithm.kept, algorithm.kept.response_mask
    rewards = algorithm.token_rewards(batch)
    plain, returns = gae(rewards, batch.values, mask, 0.99, 0.9)
    assert torch.equal(batch.returns, returns)
    expected = (plain - plain[mask].mean()) / plain[mask].std()
    assert torch.allclose(batch.advantages[mask], expected[mask], atol=1e-5)
    assert batch.values.requires_grad is False


def test_adapted_coefficient_and_scale_are_in_the_checkpoint(run):
    settings = {"kl_target": 0.01, "kl_horizon": 10, "normalize_scores": True}
    algorithm = PPO(policy=tiny, critic=scalar, optimizer=sgd, **settings)
    run(algorithm, num_batches=3)
    state = algorithm.state_dict()
    assert float(state["kl.coef"]) != pytest.approx(0.02, rel=1e-3)
    assert float(state["scale.moments"][0]) == 3 * 4


def test_an_unanswered_row_gives_no_nan(tmp_path):
    """An empty answer, as a skipped reward leaves it, among others that are cut."""

    class Emptied(Kept):
        def prepare(self, batch):
            batch.response_mask[0] = False
            return super().prepare(batch)

    for loss_aggregation in ("sequence_mean", "token_mean"):
        algorithm = Emptied(
            policy=tiny, critic=scalar, optimizer=sgd, loss_aggregation=loss_aggregation
        )
        done = trainer(tmp_path, limit_val_batches=0)
        done.fit(algorithm, RandomPrompts(1))
        assert all(math.isfinite(float(value)) for value in done.callback_metrics.values())
        assert all(weight.isfinite().all() for weight in weights(algorithm.policy))


def test_old_names_of_the_metrics(run):
    metrics = run(PPO(policy=tiny, critic=scalar, optimizer=sgd, update_epochs=2)).callback_metrics
    names = """kl/per_response_k1 objective/non_score_reward objective/rlhf_reward
        objective/scores policy/approxkl_avg policy/clipfrac_avg entropy/update
        loss/policy_avg loss/value_avg value/clipfrac policy/ratio_mean objective/kl_coef reward"""
    assert set(names.split()) <= metrics.keys()


def test_reference_and_critic_are_apart_from_the_policy():
    algorithm = PPO(policy=tiny)
    algorithm.configure_model()
    assert isinstance(algorithm, OnlineAlgorithm)
    assert not any(weight.requires_grad for weight in algorithm.reference.parameters())
    owned = [{id(w) for w in role.parameters()} for role in algorithm.roles.values()]
    assert not owned[0] & owned[1]
