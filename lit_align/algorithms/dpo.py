"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290), and IPO."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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
    """Learns which of two answers is better, with the policy itself as the reward model.

    An answer's implicit reward is beta times its log-ratio to the reference, summed over its
    tokens. A step averages over pairs.

    Args:
        policy: The model to align.
        reference: The frozen model to stay near. Default: the policy at the start, which for an
            adapted policy is its base with the adapter disabled.
        offload_frozen: Keep frozen models on the CPU between uses. False keeps them on the GPU, which saves
            the copies.
        beta: Implicit reward per nat; a larger one stays closer to the reference.
        label_smoothing: Probability that a preference is the wrong way round (conservative DPO).
        precompute: Score all rows with the policy before its first step and keep the numbers, so
            that no reference is in memory; by default each batch is scored when its turn comes.
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
        if not beta > 0:
            raise UserError(f"beta must be above 0, found {beta}.")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing must be at least 0 and below 0.5, where a preference would say "
                f"nothing, found {label_smoothing}."
            )
        if precompute and reference is not None:
            raise UserError(
                "precompute scores with the policy as it is at the start: leave out reference."
            )
        self.beta, self.label_smoothing = beta, label_smoothing
        self.precomputed = PrecomputedLogprobs() if precompute else None

    def loss(self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch) -> Tensor:
        """[n] per pair, from summed log-probs [n] of the policy."""
        sides = (chosen, rejected, batch.ref_chosen, batch.ref_rejected)
        return dpo(*sides, self.beta, self.label_smoothing)

    def losses(self, batch: PreferenceBatch) -> Iterator[Tensor]:
        """[n] per pair."""
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
        """Writes both answers' log-probs under the reference."""
        if self.precomputed:  # empty before a fit, where the policy still is the reference
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
        """([n], [n]): implicit rewards of both answers, arXiv:2305.18290 eq. 5 without log Z."""
        chosen_reward = self.beta * (chosen - batch.ref_chosen)
        return chosen_reward, self.beta * (rejected - batch.ref_rejected)

    def policy_pair_logprobs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """([n], [n]) nats: log-probs of the chosen and of the rejected answers."""
        return pair_logprobs(self.policy.logprobs, batch)

    def reference_pair_logprobs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """([n], [n]) nats: the same under the reference, which the policy is before it learns."""
        is_precomputed = self.precomputed is not None
        return pair_logprobs(
            self.policy.logprobs if is_precomputed else self.reference_model.logprobs, batch
        )

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds the batch's pairs to loss, accuracy, margin and both rewards."""
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

    # The reference's log-probs in advance ---------------------------------------------------------

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
        """Scores all pairs of training and evaluation, each rank its share, and tells all ranks.

        A checkpoint has already brought what was computed before its run's first step.
        """
        if self.precomputed is None or self.precomputed:
            return
        data = self.trainer.datamodule
        if data is None:
            raise UserError("precompute reads all rows in advance: give fit a data module.")
        loaders = [data.train_dataloader()]
        loaders += [data.val_dataloader()] if self.trainer.enable_validation else []
        pairs: list[int] = []
        sums: list[Tensor] = []
        for loader in loaders:
            for batch in rank_batches(loader, self.global_rank, self.trainer.world_size):
                with self.trainer.precision_plugin.forward_context():
                    parts = self.map_microbatches(
                        batch.to(self.device), self.reference_pair_logprobs
                    )
                sums.append(torch.stack(parts, -1))
                pairs += batch.fingerprints
        gather = self.trainer.strategy.all_gather
        names = gather(torch.tensor(pairs).to(self.device)).flatten()
        self.precomputed.store(names, gather(torch.cat(sums)).view(-1, 2))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what was computed in advance."""
        super().on_save_checkpoint(checkpoint)
        if self.precomputed is not None:
            checkpoint["reference_logprobs"] = self.precomputed.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it over: the policy of the checkpoint is not the reference any more."""
        has_logprobs = "reference_logprobs" in checkpoint
        if self.precomputed is None and has_logprobs and self.trainer.training:
            raise UserError("The checkpoint is of a run with precompute: go on with precompute.")
        if self.precomputed is not None and not has_logprobs:
            raise UserError(
                "The checkpoint is of a run without precompute, and its policy is not the "
                "reference any more: leave out precompute."
            )
        super().on_load_checkpoint(checkpoint)
        if self.precomputed is not None:
            self.precomputed.store(**checkpoint["reference_logprobs"])


class IPO(DPO):
    """DPO with an end: a pair's log-ratios are to differ by 1 / (2 beta) nats, and no more.

    arXiv:2310.12036 eq. 17, on summed log-probs as there; TRL divides them by the answers'
    lengths. Where every pair has one clear winner, DPO's margins grow without bound.
    """

    def loss(self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch) -> Tensor:
        """[n] per pair, from summed log-probs [n] of the policy."""
        sides = (chosen, rejected, batch.ref_chosen, batch.ref_rejected)
        return ipo(*sides, self.beta, self.label_smoothing)


def pair_logprobs(
    logprobs: Callable[[TextBatch], Tensor], batch: PreferenceBatch
) -> tuple[Tensor, Tensor]:
    """([n], [n]) nats: log-probs of the chosen and of the rejected answers, in one pass."""
    chosen, rejected = logprobs(batch.texts()).sum(-1).view(-1, 2).unbind(-1)
    return chosen, rejected
