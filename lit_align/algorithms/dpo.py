"""Direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290), and IPO."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.core.argument_checks import check_above_zero
from lit_align.algorithms.core.base import Algorithm
from lit_align.algorithms.core.precomputed_logprobs import PrecomputedLogprobs, rank_batches
from lit_align.algorithms.core.reference_model import ReferenceModel
from lit_align.algorithms.reward_model import pair_accuracy
from lit_align.batches import PreferenceBatch, TextBatch
from lit_align.errors import UserError
from lit_align.functional.losses import dpo, ipo
from lit_align.models.backbone import Backbone
from lit_align.models.policy import Policy
from lit_align.models.roles import Role, single_head_role


class DPO(Algorithm):
    """Preference pairs as a classification loss on the policy, without a reward model.

    Eq. 7 of arXiv:2305.18290: the implicit reward of a response is
    r(x, y) = beta * log(pi(y | x) / pi_ref(y | x)), summed over its tokens. The loss is
    -log sigmoid(r(x, chosen) - r(x, rejected)), averaged over pairs. It assumes that preferences
    follow Bradley-Terry with these rewards.

    Args:
        policy: The model to align.
        reference: The frozen model from which the implicit reward is measured. Default: the
            policy at the start. For an adapted policy that is its base with the adapter disabled.
        offload_frozen: Keep frozen models on the CPU between uses. False keeps them on the GPU,
            which saves the copies.
        beta: Scale of the implicit reward per nat of log-ratio. A larger value keeps the policy
            closer to the reference.
        label_smoothing: Probability that a preference label is wrong (conservative DPO).
        precompute: Compute the reference's log-probs of all rows before the first step, so that
            no reference is in memory. False: compute those of each batch.
    """

    policy: Policy
    reference_model: ReferenceModel

    def __init__(
        self,
        policy: Callable[[], Policy],
        reference: Callable[[], Policy] | None = None,
        offload_frozen: bool = True,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        precompute: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.build_policy, self.reference_model = policy, ReferenceModel(reference, offload_frozen)
        check_above_zero(beta=beta)
        if not 0 <= label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing must be at least 0 and below 0.5, found {label_smoothing}. Set "
                f"--model.label_smoothing."
            )
        if precompute and reference is not None:
            raise UserError(
                "precompute uses the policy at the start as the reference, found another one. "
                "Remove --model.reference or --model.precompute."
            )
        self.beta, self.label_smoothing = beta, label_smoothing
        self.precomputed = PrecomputedLogprobs() if precompute else None

    def loss(self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch) -> Tensor:
        """Return the loss of each pair, [n].

        Args:
            chosen: [n] nats, summed log-probs of the chosen responses under the policy.
            rejected: [n] nats, those of the rejected responses.
            batch: The n pairs, with `ref_chosen` and `ref_rejected`.
        """
        sides = (chosen, rejected, batch.ref_chosen, batch.ref_rejected)
        return dpo(*sides, self.beta, self.label_smoothing)

    def losses(self, batch: PreferenceBatch) -> Iterator[Tensor]:
        """Yield the loss of each pair, [n]."""
        chosen, rejected = self.policy_pair_logprobs(batch)
        chosen_reward, rejected_reward = self.implicit_rewards(chosen, rejected, batch)
        means = {
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/accuracies": pair_accuracy(chosen_reward, rejected_reward),
            "rewards/margins": chosen_reward - rejected_reward,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        for name, values in means.items():
            self.metrics.add(name, values, batch.loss_mask)
        yield self.loss(chosen, rejected, batch)

    def prepare(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Add `ref_chosen` and `ref_rejected`, each [B] nats."""
        if self.precomputed:  # empty before a fit, when the policy still is the reference
            chosen, rejected = self.precomputed.lookup(batch.fingerprints)
            batch.ref_chosen = chosen.to(self.device, non_blocking=True)
            batch.ref_rejected = rejected.to(self.device, non_blocking=True)
        else:
            batch.ref_chosen, batch.ref_rejected = self.map_microbatches(
                batch, self.reference_pair_logprobs
            )
            self.reference_model.offload()
        return batch

    def implicit_rewards(
        self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch
    ) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards [n] and [n], arXiv:2305.18290 eq. 5 without log Z.

        Args:
            chosen: [n] nats, summed log-probs of the chosen responses under the policy.
            rejected: [n] nats, those of the rejected responses.
            batch: The n pairs, with `ref_chosen` and `ref_rejected`.
        """
        chosen_reward = self.beta * (chosen - batch.ref_chosen)
        return chosen_reward, self.beta * (rejected - batch.ref_rejected)

    def policy_pair_logprobs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the policy's log-probs [n] of chosen and [n] of rejected responses, in nats."""
        return pair_logprobs(self.policy.logprobs, batch)

    def reference_pair_logprobs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the reference's log-probs [n] of chosen and [n] of rejected responses, in nats."""
        # With `precompute` there is no reference network. Before the first step the policy equals
        # the reference.
        is_precomputed = self.precomputed is not None
        return pair_logprobs(
            self.policy.logprobs if is_precomputed else self.reference_model.logprobs, batch
        )

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Add the batch's pairs to the means of loss, accuracy, margin and both rewards."""
        batch = self.prepare(batch)
        chosen, rejected = self.map_microbatches(batch, self.policy_pair_logprobs)
        chosen_reward, rejected_reward = self.implicit_rewards(chosen, rejected, batch)
        means = {
            "loss": self.loss(chosen, rejected, batch),
            "accuracy": pair_accuracy(chosen_reward, rejected_reward),
            "margin": chosen_reward - rejected_reward,
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
        }
        pairs = batch.loss_mask
        self.metrics.add_eval(batch, **{name: (values, pairs) for name, values in means.items()})

    test_step = validation_step

    # Precomputed log-probs of the reference -------------------------------------------------------

    def build(self) -> dict[str, Backbone]:
        """Return the policy alone if its log-probs at the start are precomputed."""
        if self.precomputed is None:
            return super().build()
        return {"policy": self.build_policy()}

    def all_roles(self) -> list[Role]:
        """Return the policy alone if the reference's log-probs are precomputed."""
        return (
            super().all_roles()
            if self.precomputed is None
            else [single_head_role("policy", self.policy)]
        )

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Precompute the log-probs of all training and validation pairs, unless resumed.

        Each rank computes its own pairs, then all ranks gather the results.
        """
        if self.precomputed is None or self.precomputed:
            return
        data = self.trainer.datamodule
        if data is None:
            raise UserError(
                "precompute reads all rows before training and needs a data module, found a data "
                "loader. Pass fit(datamodule=...)."
            )
        loaders = [data.train_dataloader()]
        loaders += [data.val_dataloader()] if self.trainer.enable_validation else []
        pairs: list[int] = []
        sums: list[Tensor] = []
        for loader in loaders:
            for batch in rank_batches(loader, self.global_rank, self.trainer.world_size):
                # Lightning opens this context for its own steps, but not for hooks.
                with self.trainer.precision_plugin.forward_context():
                    parts = self.map_microbatches(
                        batch.to(self.device), self.reference_pair_logprobs
                    )
                sums.append(torch.stack(parts, -1))
                pairs += batch.fingerprints
        # Rows of other ranks too: another epoch's shuffle gives each rank other pairs.
        gather = self.trainer.strategy.all_gather
        names = gather(torch.tensor(pairs).to(self.device)).flatten()
        self.precomputed.store(names, gather(torch.cat(sums)).view(-1, 2))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the precomputed log-probs."""
        super().on_save_checkpoint(checkpoint)
        if self.precomputed is not None:
            checkpoint["reference_logprobs"] = self.precomputed.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the precomputed log-probs. The saved policy is no longer the reference."""
        has_logprobs = "reference_logprobs" in checkpoint
        if self.precomputed is None and has_logprobs and self.trainer.training:
            raise UserError(
                "This checkpoint was trained with precompute. Set --model.precompute true."
            )
        if self.precomputed is not None and not has_logprobs:
            raise UserError(
                "This checkpoint was trained without precompute, and its policy is no longer the "
                "reference. Set --model.precompute false."
            )
        super().on_load_checkpoint(checkpoint)
        if self.precomputed is not None:
            self.precomputed.store(**checkpoint["reference_logprobs"])


class IPO(DPO):
    """Squared loss on the pair's log-ratio difference h, with the target 1 / (2 beta) nats.

    Eq. 17 of arXiv:2310.12036: the loss is (h - 1 / (2 beta))^2. It does not assume
    Bradley-Terry. If every pair has a certain winner, the margins of DPO grow without bound, and
    those of IPO do not. Log-probs are summed, as in the paper; TRL divides them by the lengths.
    """

    def loss(self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch) -> Tensor:
        """Return the loss of each pair, [n], from summed log-probs [n] in nats."""
        sides = (chosen, rejected, batch.ref_chosen, batch.ref_rejected)
        return ipo(*sides, self.beta, self.label_smoothing)


def pair_logprobs(
    logprobs: Callable[[TextBatch], Tensor], batch: PreferenceBatch
) -> tuple[Tensor, Tensor]:
    """Return the log-probs [n] of chosen and [n] of rejected responses in nats, by one pass.

    Args:
        logprobs: Function of 2n texts that returns token log-probs [2n, T-1] in nats.
        batch: n pairs.
    """
    # One pass for both sides: sharded weights are gathered once.
    chosen, rejected = logprobs(batch.texts()).sum(-1).view(-1, 2).unbind(-1)
    return chosen, rejected
